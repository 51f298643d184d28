"""Rollouts: exact sampling, independent of neighbours, true to the world; and shards on disk."""

import multiprocessing
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from candidates import PrefixTree, score_states
from fast_alfworld import NOTHING_HAPPENS, AlfworldEnv
from fast_alfworld.cli import UserError
from fast_alfworld.gamefile import split_intro
from rollout import (MAX_ACTION, Episode, load_trajectories, play_shards, replay, rollout,
                     sample, save_trajectories)
from tiny import (assert_same, brute_force, by_id, demonstrations, games, play, played, prm,
                  random_model, some_states, taught, tokenizer, transcript)
from tokenizer import END, SPECIAL
from utils import key, save_model, uniform

POLICIES = {"taught": taught, "random": lambda: random_model(1)}
both_policies = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def some(n=3, k=3):
    """Episodes of large and of small games."""
    return [Episode(game, number) for game in (*games()[:n], *games()[-n:]) for number in range(k)]


def all_states(trajectories):
    return some_states(10 ** 6, trajectories=trajectories)


@torch.no_grad()
def next_logprobs(policy, ids, temperature):
    """The distribution after every token of ids (L,), without a cache, as `free` samples. (L, V)"""
    logits = policy.logits(policy(torch.as_tensor(ids, dtype=torch.long)[None])[0])
    logits[:, [i for i in range(len(SPECIAL)) if i != END]] = -torch.inf
    return (logits / temperature).log_softmax(-1)


# --- what is recorded ----------------------------------------------------------------------------

@both_policies
@pytest.mark.parametrize("temperature", (0.3, 1.5))
def test_recorded_logprobs_are_those_of_the_brute_force_softmax(make, temperature):
    """Recorded with a cache, prompts shared, rows moved; recomputed without, and one by one."""
    policy = make()
    trajectories = play(policy, some(), temperature=temperature, max_steps=6, slots=7)
    sequences, states = all_states(trajectories)
    recorded = np.concatenate([t.logp for t in trajectories])
    choice = np.concatenate([t.choice for t in trajectories])
    with torch.no_grad():
        table = score_states(policy, sequences, states, temperature).numpy()
    np.testing.assert_allclose(recorded, table[np.arange(len(choice)), choice], atol=2e-5)
    few = slice(0, None, 20)
    for logp, c, row in zip(recorded[few], choice[few],
                            brute_force(policy, sequences, states[few], temperature)):
        assert logp == pytest.approx(float(row[c]), abs=2e-5)
    assert recorded.std() > 0.1


@both_policies
def test_greedy_takes_the_most_likely_command(make):
    trajectories = play(make(), some(k=1), temperature=0, max_steps=3)
    rows = iter(brute_force(make(), *all_states(trajectories)))
    for t in trajectories:
        assert [int(next(rows).argmax()) for _ in t.choice] == t.choice.tolist()
        assert (t.logp == 0).all()


@pytest.mark.parametrize("free", (False, True))
@both_policies
def test_a_trajectory_tells_what_happened(make, free):
    """Its actions, played again, get the answers that stand in it, and nothing else does."""
    tok, env, lost = tokenizer(), AlfworldEnv(7), 0
    for t in play(make(), some(), temperature=1.0, max_steps=7, act=None if free else sample):
        intro, info = env.reset(by_id()[t.game])
        ids = list(tok.prompt(*split_intro(intro)))
        for k, (start, end) in enumerate(t.spans):
            assert len(ids) == start and t.ids[end - 1] == END
            action, admissible = tok.decode(t.ids[start:end]), info["admissible_commands"]
            assert t.n_candidates[k] == len(admissible)
            if t.choice[k] >= 0:
                assert admissible[t.choice[k]] == action.strip()
            ids += t.ids[start:end].tolist()
            observation, reward, won, truncated, info = env.step(action)
            assert (t.choice[k] == -1) == (observation == NOTHING_HAPPENS)
            lost += t.choice[k] == -1
            if k < len(t) - 1:
                ids += tok.turn(observation)
        assert ids == t.ids.tolist() and t.ids.dtype == np.int32
        assert (t.reward, t.won, t.truncated) == (reward, won, truncated) and won != truncated
    assert bool(lost) == free


def test_some_are_won_which_ends_them_and_some_are_cut():
    won = [t for t in played() if t.won]
    assert 5 < len(won) < len(played()) and all(t.reward == 1.0 and len(t) <= 15 for t in won)
    assert all(t.reward == 0.0 and len(t) == 15 for t in played() if not t.won)


def test_replay_gives_the_candidates_of_every_state():
    env, texts = AlfworldEnv(), set()
    for t in played()[::5]:
        commands = replay(t, by_id()[t.game], tokenizer())
        _, info = env.reset(by_id()[t.game])
        assert len(commands) == len(t)
        for found, c, (start, end), n in zip(commands, t.choice, t.spans, t.n_candidates):
            assert found == tuple(info["admissible_commands"]) and len(found) == n
            assert found[c] == tokenizer().decode(t.ids[start:end])
            texts.add(found)
            info = env.step(found[c])[-1]
    assert len(texts) > 10


# --- neighbours in the batch ---------------------------------------------------------------------

def differs(policy, a, b, temperature):
    """Do two trajectories of one episode differ? Only allowed by rounding: where the random number
    lies on the border between two candidates."""
    n = min(len(a), len(b))
    steps = np.nonzero(a.choice[:n] != b.choice[:n])[0]
    if not len(steps):
        assert_same(a, b)
        return False
    k = int(steps[0])
    commands = replay(a, by_id()[a.game], tokenizer())[k]
    state = (0, int(a.spans[k, 0]), PrefixTree(commands, tokenizer().encode))
    cdf = brute_force(policy, [a.ids], [state], temperature)[0].double().exp().cumsum(0)
    assert (cdf - uniform(a.seed, key(a.game), a.episode, k)).abs().min() < 1e-5
    return True


@both_policies
def test_an_episode_does_not_depend_on_its_neighbours(make):
    """One slot or many, any order, prompts shared or not, alone: the same trajectories."""
    policy, options = make(), dict(temperature=1.2, seed=3, max_steps=8)
    reference = play(policy, some(), slots=18, **options)
    shuffled = some()
    random.Random(0).shuffle(shuffled)
    alone = [t for one in some()[::3] for t in rollout(policy, tokenizer(), [one], **options)]
    by_name = {(t.game, t.episode): t for t in reference}
    assert len(by_name) == len(some())
    for other in (play(policy, some(), slots=1, **options), alone,
                  play(policy, shuffled, slots=5, **options)):
        assert len(other) in (18, 6)
        assert sum(differs(policy, by_name[t.game, t.episode], t, 1.2) for t in other) <= 1


def test_many_slots_are_several_stretches_of_attention_and_rows_get_sorted():
    """70 rows of different lengths: against few slots, which take more than 32 turns."""
    episodes = [Episode(game, number) for game in games()[-10:] for number in range(8)]
    many = play(taught(), episodes, temperature=1.5, seed=5, max_steps=15, slots=70)
    few = play(taught(), episodes, temperature=1.5, seed=5, max_steps=15, slots=16)
    assert len({len(t) for t in many}) > 3
    assert sum(differs(taught(), a, b, 1.5) for a, b in zip(many, few, strict=True)) <= 2


def test_the_seed_and_the_number_of_an_episode_name_its_randomness():
    a, b, c = (play(taught(), some(), temperature=1.5, seed=seed, max_steps=6)
               for seed in (1, 1, 2))
    for x, y in zip(a, b):
        assert_same(x, y)
        assert (x.logp == y.logp).all()
    assert sum(x.ids.tobytes() != y.ids.tobytes() for x, y in zip(a, c)) > len(a) / 2
    assert len({t.ids.tobytes() for t in a}) > len({t.game for t in a})


# --- other ways to act ---------------------------------------------------------------------------

def test_act_gets_log_pi_and_f_of_the_candidates_and_what_it_picks_is_played():
    """A policy and a PRM, each with a cache of its own: what `act` sees is the brute force."""
    seen = {}

    def act(turn):
        for n, ids in enumerate(turn.histories):
            C = len(turn.trees[n])
            seen[tuple(turn.names[1:, n])] = (np.array(ids), turn.trees[n], turn.log_pi[n, :C],
                                              turn.f[n, :C])
            assert turn.lengths[n] == len(ids)
        return torch.tensor([len(tree) // 2 for tree in turn.trees])

    trajectories = play(taught(), some(2, 2), temperature=0.7, max_steps=5, slots=3, act=act,
                        prm=prm())
    assert all((t.choice == t.n_candidates // 2).all() for t in trajectories)
    assert len(seen) == sum(map(len, trajectories))
    turns = list(seen.values())[::7]
    sequences = [ids for ids, *_ in turns]
    states = [(n, len(ids), tree) for n, (ids, tree, *_) in enumerate(turns)]
    for (*_, log_pi, f), p, q in zip(turns, brute_force(taught(), sequences, states, 0.7),
                                     brute_force(prm(), sequences, states)):
        torch.testing.assert_close(log_pi, p, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(f, q, atol=2e-5, rtol=1e-5)


def test_a_win_ends_an_episode_with_reward_one_and_the_cap_cuts_it():
    won = {game.id: (game, demo) for game, demo in demonstrations() if demo.won}
    for game, demo in list(won.values())[::5]:
        commands = [step.action for step in demo.steps]
        act = lambda turn: torch.tensor([tree.commands.index(commands[k])
                                         for tree, k in zip(turn.trees, turn.names[-1])])
        for cap in (len(commands), len(commands) - 1):
            t, = rollout(taught(), tokenizer(), [Episode(game, 0)], act=act, max_steps=cap)
            assert t.won == (t.reward == 1.0) == (not t.truncated) == (cap == len(commands))
            assert tokenizer().actions(t.ids) == commands[:cap]


@both_policies
def test_an_episode_goes_on_from_a_demonstration(make):
    """Only its own actions are recorded, and `played` of the earlier ones count for the cap."""
    policy, begun = make(), []
    for number, (game, demo) in enumerate(demonstrations()[::12]):
        ids = np.array(transcript(demo), np.int32)
        starts = np.nonzero(ids == END)[0]
        for k in {0, len(starts) // 2}:
            prompt = len(tokenizer().prompt(demo.task, demo.observation.split("\n\n")[1]))
            cut = prompt if k == 0 else int(np.nonzero(ids == 4)[0][k]) + 1
            begun.append((Episode(game, 100 * number + k, ids[:cut], min(k, 2)), k))
    assert {k > 0 for _, k in begun} == {True, False}
    plain = [Episode(games()[-1], 0)]
    for slots in (3, 64):
        done = play(policy, [*(episode for episode, _ in begun), *plain], temperature=0.7,
                    max_steps=4, seed=2, slots=slots)
        by_name = {(t.game, t.episode): t for t in done}
        assert len(done) == len(by_name) == len(begun) + 1
        for (game, number, ids, counted), k in begun:
            t = by_name[game.id, number]
            assert (t.ids[:len(ids)] == ids).all() and t.spans[0, 0] == len(ids)
            assert t.won or len(t) == 4 - counted
            assert len(replay(t, game, tokenizer())) == len(t)
        mine = [by_name[e.game.id, e.number] for e, _ in begun]
        choice, logp = (np.concatenate([getattr(t, x) for t in mine]) for x in ("choice", "logp"))
        with torch.no_grad():
            table = score_states(policy, *all_states(mine), 0.7).numpy()
        np.testing.assert_allclose(logp, table[np.arange(len(logp)), choice], atol=2e-5)
    alone, = play(policy, plain, temperature=0.7, max_steps=4, seed=2)
    prompt = alone.ids[:alone.spans[0, 0]]
    again, = play(policy, [plain[0]._replace(begun=prompt)], temperature=0.7, max_steps=4, seed=2)
    assert_same(again, alone)  # begun at the beginning


# --- free generation -----------------------------------------------------------------------------

@both_policies
@pytest.mark.parametrize("temperature", (0.5, 2.0))
def test_free_actions_end_and_their_logprobs_are_those_of_an_uncached_pass(make, temperature):
    policy, lengths = make(), Counter()
    for t in play(policy, some(), temperature=temperature, max_steps=4, act=None, slots=7):
        logp = next_logprobs(policy, t.ids, temperature)
        for (start, end), recorded in zip(t.spans, t.logp):
            action = t.ids[start:end]
            assert (action[:-1] >= len(SPECIAL)).all() and action[-1] == END
            assert len(action) <= MAX_ACTION
            lengths[len(action)] += 1
            # token number MAX_ACTION can only be <end>, which then has probability 1
            sampled = range(start, end - (len(action) == MAX_ACTION))
            want = float(sum(logp[i - 1, t.ids[i]] for i in sampled))
            assert recorded == pytest.approx(want, abs=1e-4)
    assert lengths[MAX_ACTION] and (len(lengths) > 2 or make is not taught)


@both_policies
def test_greedy_free_actions_take_the_most_likely_token(make):
    for t in play(make(), some(k=1), temperature=0, max_steps=4, act=None):
        best = next_logprobs(make(), t.ids, 1.0).argmax(-1).numpy()
        for start, end in t.spans:
            end -= end - start == MAX_ACTION
            assert (best[start - 1:end - 1] == t.ids[start:end]).all()


def test_first_tokens_of_free_actions_follow_the_distribution():
    """Chi-square of 2,000 samples."""
    game, n = games()[-1], 2000
    trajectories = play(taught(), [Episode(game, k) for k in range(n)], temperature=2.0,
                        max_steps=1, slots=500, act=None)
    start = trajectories[0].spans[0, 0]
    p = next_logprobs(taught(), trajectories[0].ids[:start], 2.0)[-1].exp().double().numpy()
    got = np.bincount([t.ids[start] for t in trajectories], minlength=len(p))
    common = n * p >= 5
    got, want = (np.append(x[common], x[~common].sum()) for x in (got, n * p))
    assert common.sum() > 4
    assert ((got - want) ** 2 / want).sum() < common.sum() + 4 * (2 * common.sum()) ** 0.5


def test_a_free_episode_does_not_depend_on_its_neighbours():
    options = dict(temperature=0.7, seed=3, max_steps=6, act=None)
    many, few = (play(taught(), some(), slots=slots, **options) for slots in (18, 2))
    assert sum(a.ids.tobytes() != b.ids.tobytes() for a, b in zip(many, few, strict=True)) <= 1


# --- limits and trouble --------------------------------------------------------------------------

@pytest.mark.parametrize("free", (False, True))
def test_an_episode_that_outgrows_the_context_is_cut_as_by_the_step_cap(free):
    policy, cut = random_model(2, max_len=260), 0
    for t in play(policy, some(2, 2), temperature=4.0, max_steps=30, act=None if free else sample):
        assert len(t.ids) <= 260 and t.truncated != t.won
        if len(t) < 30 and not t.won:
            cut += 1
            assert t.reward == 0 and len(t.ids) > 100
            policy(torch.tensor(t.ids[None], dtype=torch.long))  # fits
    assert cut > 3


def test_a_context_too_small_for_the_first_observation_is_an_error():
    with pytest.raises(UserError, match="too many for a context of 60"):
        play(random_model(max_len=60), some())


def test_an_exception_in_the_world_is_not_swallowed():
    class Broken(AlfworldEnv):
        def step(self, action):
            raise RuntimeError("the world is broken")

    with pytest.raises(RuntimeError, match="the world is broken"):
        play(taught(), some(), make_env=Broken)


# --- shards --------------------------------------------------------------------------------------

def test_a_shard_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "deep/00000.safetensors"
    for trajectories in (played(), played()[:1]):
        save_trajectories(file, trajectories)
        read = load_trajectories(file)
        for a, b in zip(trajectories, read, strict=True):
            assert_same(a, b)
            assert (a.logp == b.logp).all() and len(a) == len(b)
            for name in ("ids", "spans", "choice", "n_candidates", "logp"):
                assert getattr(a, name).dtype == getattr(b, name).dtype
            assert (type(b.won), type(b.reward), type(b.seed)) == (bool, float, int)
    assert [f.name for f in file.parent.iterdir()] == ["00000.safetensors"]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match="00000.*damaged"):
        load_trajectories(file)


OPTIONS = dict(temperature=1.0, seed=1, max_steps=5, slots=4)


def shards(folder, n=3):
    return [(folder / f"{k}.safetensors", [Episode(game, k) for game in games()[-5:]])
            for k in range(n)]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a policy."""
    folder = tmp_path_factory.mktemp("policy")
    save_model(folder, taught(), tokenizer())
    return folder


@pytest.fixture(scope="module")
def by_one(saved, tmp_path_factory):
    """A folder of three shards that one worker process has played."""
    folder = tmp_path_factory.mktemp("one")
    first, *_, last = play_shards(shards(folder), saved, "cpu", 1, **OPTIONS)
    trajectories = [t for file, _ in shards(folder) for t in load_trajectories(file)]
    assert first.tolist() == [0, 0]
    assert last.tolist() == [15, sum(t.won for t in trajectories)]
    return folder


def test_a_shard_is_the_same_when_played_by_two_workers_one_of_which_is_killed(
        saved, by_one, tmp_path):
    playing = play_shards(shards(tmp_path), saved, "cpu", 2, **OPTIONS)
    next(playing), next(playing)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(UserError, match="has died; the same command continues"):
        list(playing)
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    left = contents(tmp_path) if tmp_path.exists() else {}
    assert len(left) < 3 and left.items() <= contents(by_one).items()  # whole shards only
    *_, last = play_shards(shards(tmp_path), saved, "cpu", 2, **OPTIONS)
    assert last[0] == 15 and contents(tmp_path) == contents(by_one)
    assert [x.tolist() for x in play_shards(shards(tmp_path), saved, "cpu", 2, **OPTIONS)][-1] == [
        *last]  # nothing left to do


def test_a_shard_holds_what_a_rollout_of_its_episodes_yields(by_one):
    file, episodes = shards(by_one)[1]
    for a, b in zip(load_trajectories(file), play(taught(), episodes, **OPTIONS), strict=True):
        assert_same(a, b)


def test_a_model_that_cannot_be_read_is_an_error_of_one_line(saved, tmp_path, capfd):
    damaged = tmp_path / "policy"
    shutil.copytree(saved, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="has died"):
        list(play_shards(shards(tmp_path / "rollouts"), damaged, "cpu", 1, **OPTIONS))
    shown = capfd.readouterr().err
    assert "damaged one" in shown and "Traceback" not in shown
