"""Acting with a PRM, against slow and independent versions without caches or batches."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from candidates import PrefixTree, score_states, tilt
from fast_alfworld import AlfworldEnv
from fast_alfworld.cli import UserError
from fast_alfworld.gamefile import split_intro
from model import Transformer
from rollout import MAX_ACTION, Episode, Turn, replay, rollout, sample
from search import (MAX_ANSWER, beam_search, best_episodes, best_of_n, draws, imagine, look_ahead,
                    read_prm, tilted)
from tiny import (assert_same, brute_force, by_id, games, play, played, random_model, taught,
                  tokenizer)
from tokenizer import ACT, END, SPECIAL, Tokenizer
from utils import key, save_model, uniform

EPISODES = [Episode(game, k) for game in games()[::8] for k in range(2)]
OPTIONS = dict(temperature=3.0, max_steps=6, seed=5)


def prm():
    return random_model(3, "score")


def played_with(act, model=None, episodes=EPISODES, **options):
    return play(taught(), episodes, **OPTIONS | options, act=act, prm=model)


def assert_all_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert_same(x, y)


def fake_turn(log_pi, f):
    """A turn of B states without models."""
    names = np.array([(1, 2, b, 3) for b in range(len(log_pi))]).T
    return Turn(log_pi, f, [], names, [])


# --- actions of one state ------------------------------------------------------------------------

def test_best_of_one_is_sampling():
    assert_all_same(played_with(best_of_n(1), prm()), played_with(sample))


@pytest.mark.parametrize("n", [2, 7])
def test_best_of_n_takes_the_best_of_what_it_sampled(n):
    states, changed = [], []

    def act(turn):
        picked = best_of_n(n)(turn)
        for b, (pi, f) in enumerate(zip(turn.log_pi.exp().double().numpy(), turn.f.numpy())):
            u = [uniform(*turn.names[:, b], *([i] if i else [])) for i in range(n)]
            drawn = [int(np.searchsorted(pi.cumsum(), x * pi.sum(), side="right")) for x in u]
            assert picked[b] == max(dict.fromkeys(drawn), key=lambda c: f[c])  # ties: the first
            states.append(b), changed.append(int(picked[b]) != drawn[0])
        return picked

    played_with(act, prm())
    assert len(states) > 50 and 0.2 < np.mean(changed) < 1


def test_ties_go_to_the_first_drawn():
    log_pi = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    turn = fake_turn(log_pi, torch.zeros(200, 6))
    assert torch.equal(best_of_n(5)(turn), sample(turn))


def test_tilted_without_limit_is_the_policy_and_near_zero_the_argmax():
    assert_all_same(played_with(tilted(np.inf), prm()), played_with(sample))
    rng = torch.Generator().manual_seed(0)
    log_pi = torch.randn(500, 8, generator=rng).log_softmax(-1)
    f = torch.stack([torch.randperm(8, generator=rng) - 4 for _ in range(500)]).float()
    assert torch.equal(tilted(1e-4)(fake_turn(log_pi, f)), f.argmax(-1))


def test_tilted_samples_from_the_closed_form():
    rng, n = torch.Generator().manual_seed(1), 20_000
    log_pi, f = torch.randn(6, generator=rng).log_softmax(-1), torch.randn(6, generator=rng)
    picked = tilted(0.2)(fake_turn(log_pi.expand(n, 6), f.expand(n, 6)))
    p = torch.softmax(log_pi + f.sigmoid() / 0.2, -1)
    assert torch.allclose(p, tilt(log_pi[None], f[None].sigmoid(), 0.2).exp()[0], atol=1e-6)
    counts = torch.bincount(picked, minlength=6)
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 20.5  # chi-square, 5 d.o.f., p = 0.001


# --- look-ahead ----------------------------------------------------------------------------------

def test_look_ahead_by_nothing_is_best_of_n():
    ahead = played_with(look_ahead(prm(), 6, 0, OPTIONS["temperature"]))
    assert_all_same(ahead, played_with(best_of_n(6), prm()))


def imagined_slowly(policy, ids, depth):
    """Greedy answers and greedy actions behind a transcript, without a cache."""
    ids = [*ids, END]
    for _ in range(depth):
        for last, most in ((ACT, MAX_ANSWER), (END, MAX_ACTION)):
            allowed = [last, *range(len(SPECIAL), len(tokenizer()))]
            for k in range(most):
                logits = policy.logits(policy(torch.tensor([ids]))[0, -1])
                token = last if k == most - 1 else allowed[int(logits[allowed].argmax())]
                ids.append(token)
                if token == last:
                    break
    return ids


@torch.no_grad()
def test_look_ahead_by_brute_force():
    """What is imagined, what it is worth, and that the rollout's own cache stays as it is."""
    scorer, seen = prm(), []

    def act(turn):
        before = turn.cache.k.clone(), turn.cache.v.clone(), turn.lengths.copy()
        picked = look_ahead(scorer, 3, 1, temperature=0)(turn)
        assert torch.equal(turn.cache.k, before[0]) and torch.equal(turn.cache.v, before[1])
        assert (turn.lengths == before[2]).all()
        if len(seen) < 3:
            for b, drawn in enumerate(draws(turn.log_pi, turn.names, 3).tolist()):
                values = {}
                for c in dict.fromkeys(drawn):
                    path = turn.trees[b].ids[turn.trees[b].paths[c]]
                    ids = imagined_slowly(turn.policy, [*turn.histories[b], *path], 1)
                    values[c] = float(scorer.scores(scorer(torch.tensor([ids])))[0, -1])
                assert picked[b] == max(values, key=values.get)
            seen.append(b)
        return picked

    played_with(act, episodes=EPISODES[:4], max_steps=3)
    assert len(seen) == 3


@torch.no_grad()
def test_imagined_futures_equal_generation_without_a_cache():
    compared = []

    def act(turn):
        actions = [tree.ids[tree.paths[-1]] for tree in turn.trees]
        depths = np.arange(len(actions)) % 3  # rows that end early disturb no others
        for ids, history, action, depth in zip(
                imagine(turn, turn.rows, actions, depths, 0, turn.names), turn.histories, actions,
                depths):
            assert [*history, *ids, END] == imagined_slowly(turn.policy, [*history, *action], depth)
            compared.append(depth)
        return sample(turn)

    list(rollout(random_model(7), tokenizer(), EPISODES[:5], act=act, max_steps=1))
    assert sorted(compared) == [0, 0, 1, 1, 2]


def test_imagined_futures_have_turns_and_fit_the_context():
    policy = Transformer(replace(taught().config, max_len=520)).eval()
    policy.load_state_dict(taught().state_dict())
    depths = set()

    def act(turn):
        n = len(turn.rows)
        room = (520 - turn.lengths[turn.rows] - MAX_ACTION) // (
            MAX_ANSWER + MAX_ACTION)
        actions = [tree.ids[tree.paths[0]] for tree in turn.trees]
        futures = imagine(turn, turn.rows, actions, np.minimum(9, room), 1.0, turn.names)
        for ids, history, depth in zip(futures, turn.histories, room):
            assert ids.count(ACT) == depth == ids.count(END)
            assert len(history) + len(ids) + 1 <= 520
        depths.update(room.tolist())
        return look_ahead(prm(), 2, 9)(turn) if n else sample(turn)

    list(rollout(policy, tokenizer(), EPISODES[:3], act=act, temperature=1.0, max_steps=12))
    assert len(depths) > 1


# --- whole episodes ------------------------------------------------------------------------------

@torch.no_grad()
def test_best_episodes():
    scorer, some = prm(), played()
    f = {(t.game, t.episode): float(scorer.scores(scorer(torch.tensor(t.ids[None]).long()))[0, -1])
         for t in some}
    best = {(t.game, t.episode) for t in best_episodes(scorer, some, 2)}
    pairs = {(t.game, t.episode // 2) for t in some}
    assert best == {max(((game, 2 * k), (game, 2 * k + 1)), key=f.get) for game, k in pairs}
    assert len(best_episodes(scorer, some, 1)) == len(some)


# --- beams ---------------------------------------------------------------------------------------

def beams(keep, expand, episodes=EPISODES, **options):
    found = list(beam_search(taught(), prm(), tokenizer(), episodes, keep, expand,
                             **OPTIONS | options))
    return zip(*sorted(found, key=lambda x: (x[0].game, x[0].episode)))


def test_one_beam_is_best_of_n():
    trajectories, tried = beams(1, 5)
    assert_all_same(trajectories, played_with(best_of_n(5), prm()))
    assert list(tried) == [len(t) for t in trajectories]


def test_one_wide_beam_is_greedy_in_q():
    trajectories, _ = beams(1, 400, temperature=20.0)
    greedy = played_with(lambda turn: turn.f.masked_fill(turn.log_pi < -1e8, -1e9).argmax(-1),
                         prm(), temperature=20.0)
    assert_all_same(trajectories, greedy)


def test_the_slots_change_nothing():
    (a, tried_a), (b, tried_b) = beams(3, 2, slots=1), beams(3, 2, slots=5)
    assert_all_same(a, b)
    assert tried_a == tried_b


def test_worlds_are_restored_exactly():
    """What a beam search returns is what its actions lead to, played from the start."""
    trajectories, _ = beams(4, 3, episodes=[Episode(game, 0) for game in games()], max_steps=9)
    for t in trajectories:
        env, game = AlfworldEnv(9), by_id()[t.game]
        intro, _ = env.reset(game)
        ids = [*tokenizer().prompt(*split_intro(intro))]
        for action in tokenizer().actions(t.ids):
            observation, reward, won, truncated, _ = env.step(action)
            ids += [*tokenizer().encode(action), END, *tokenizer().turn(observation)]
        assert ids[:len(t.ids)] == t.ids.tolist()
        assert (t.won, t.truncated, t.reward) == (won, truncated, reward)
        commands = replay(t, game, tokenizer())
        states = [(0, int(start), PrefixTree(c, tokenizer().encode))
                  for start, c in zip(t.spans[:, 0], commands)]
        with torch.no_grad():
            log_pi = score_states(taught(), [t.ids], states, OPTIONS["temperature"])
        np.testing.assert_allclose(log_pi[range(len(t)), t.choice], t.logp, atol=1e-4)
        assert [len(c) for c in commands] == t.n_candidates.tolist()


def searched_slowly(episode, keep, expand, max_steps, temperature, seed):
    """Beam search by replaying every history from the start. -> (commands, tried)"""
    live, ended, tried = [((), None)], [], 0
    while live and not any(by_world and f >= live[0][1] for by_world, f, _ in ended):
        options = []
        for rank, (history, _) in enumerate(live):
            env = AlfworldEnv(max_steps)
            intro, info = env.reset(episode.game)
            ids = [*tokenizer().prompt(*split_intro(intro))]
            for action in history:
                observation, _, _, _, info = env.step(action)
                ids += [*tokenizer().encode(action), END, *tokenizer().turn(observation)]
            state = (0, len(ids), PrefixTree(info["admissible_commands"], tokenizer().encode))
            pi, = brute_force(taught(), [np.array(ids)], [state], temperature)
            f, = brute_force(prm(), [np.array(ids)], [state])
            names = seed, key(episode.game.id), episode.number, len(history) + rank * max_steps
            pi, drawn = pi.exp().double().numpy(), []
            for i in range(expand if history else keep * expand):
                u = uniform(*names, *([i] if i else [])) * pi.sum()
                drawn.append(int(np.searchsorted(pi.cumsum(), u, side="right")))
            options += [(float(f[c]), (*history, info["admissible_commands"][c]))
                        for c in dict.fromkeys(drawn)]
        live = []
        for f, history in sorted(options, key=lambda o: -o[0])[:keep]:
            env = AlfworldEnv(max_steps)
            env.reset(episode.game)
            for action in history:
                *_, won, truncated, _ = env.step(action)
            tried += 1
            if won or truncated:
                ended.append((won, f, history))
            else:
                live.append((history, f))
    return max(ended, key=lambda e: e[:2])[2], tried


@pytest.mark.parametrize("max_steps", [9, 12])
def test_beams_by_brute_force(max_steps):
    episodes = [Episode(game, 1) for game in games()[-4:]]
    trajectories, tried = beams(3, 2, episodes, max_steps=max_steps, temperature=1.0)
    for t, n in zip(trajectories, tried):
        slow = searched_slowly(Episode(by_id()[t.game], 1), 3, 2, max_steps, 1.0, 5)
        assert (tuple(tokenizer().actions(t.ids)), n) == slow
    if max_steps == 9:
        assert {t.won for t in trajectories} == {True, False}
    else:  # a search that went on after a history had won
        assert any(t.won and n > 3 * len(t) + 3 for t, n in zip(trajectories, tried))


# --- which PRMs may be used ----------------------------------------------------------------------

def test_a_prm_of_another_vocabulary_is_refused(tmp_path):
    other = Tokenizer.train(["nothing", "happens"] * 9, {"desk": 2})
    save_model(tmp_path / "prm", random_model(0, "score", vocab_size=len(other)), other)
    with pytest.raises(UserError, match="another vocabulary"):
        read_prm(tmp_path / "prm", tokenizer())


@pytest.mark.parametrize("flags, fine", [
    ({"prm_loss": "bt"}, False), ({"algo": "inverseprm"}, False),
    ({"ablation": "reset,shaping"}, False), ({"ablation": ["shaping"]}, False),
    ({"prm_loss": "bce", "algo": "agentprm", "ablation": ""}, True),
    ({"ablation": None}, True), ([], True), (None, True)])
def test_a_relative_prm_is_for_one_state_only(tmp_path, flags, fine):
    folder = tmp_path / "iter1" / "prm"
    save_model(folder, prm(), tokenizer())
    (tmp_path / "config.json").write_text(json.dumps({"flags": flags}))
    read_prm(folder, tokenizer(), within_state=True)
    if fine:
        read_prm(folder, tokenizer())
    else:
        with pytest.raises(UserError, match="one state only") as caught:
            read_prm(folder, tokenizer())
        assert "\n" not in str(caught.value)
