"""Rollouts: an episode does not depend on its neighbours, is sampled exactly, and is told as it happened."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from common import UserError, key, uniform
from env import NOTHING_HAPPENS, AlfworldEnv
from expert import Expert, demonstrate
from rollout import MAX_ACTION, rollout
from tiny import assert_same, expert_trajectories, games, play, prior, random_model, taught, tokenizer
from tokenizer import END, SPECIAL, split_intro

MASKED = [i for i in range(len(SPECIAL)) if i != END]  # what the policy may not say


def some(n=4, k=3):
    return [(game, episode) for game in games()[:n] for episode in range(k)]


@torch.no_grad()
def next_logprobs(policy, ids, temperature):
    """The policy's distribution after every token of ids (L,), written once more, without a cache. -> (L, V)"""
    logits = policy.logits(policy(torch.as_tensor(ids, dtype=torch.long)[None])[0]) / temperature
    logits[:, MASKED] = -torch.inf
    return logits.log_softmax(-1)


# --- neighbours in the batch -------------------------------------------------------------------------------------------------

def differs(policy, a, b, temperature):
    """Are two trajectories of the same name different? Only allowed where the random number lies on the border of two tokens."""
    n = min(len(a.ids), len(b.ids))
    places = np.nonzero(a.ids[:n] != b.ids[:n])[0]
    if not len(places):
        assert_same(a, b)
        return False
    step = np.searchsorted(a.spans[:, 0], places[0], side="right") - 1
    cdf = next_logprobs(policy, a.ids[:places[0]], temperature)[-1].double().exp().cumsum(0)
    u = uniform(a.seed, key(a.game), a.episode, step, places[0] - a.spans[step, 0])
    assert (cdf - u).abs().min() < 1e-5
    return True


@pytest.mark.parametrize("make", (taught, lambda: random_model(1, context=500)), ids=("taught", "random"))
def test_an_episode_does_not_depend_on_its_neighbours(make):
    """One slot or many, any order, prompts shared or not: the same trajectories."""
    policy, options = make(), dict(temperature=0.7, seed=3, max_steps=8)
    reference = play(policy, some(), slots=16, **options)
    shuffled = some()
    random.Random(0).shuffle(shuffled)
    alone = [t for episode in some() for t in rollout(policy, tokenizer(), [episode], **options)]  # every prompt encoded afresh
    for other in (play(policy, some(), slots=1, **options), play(policy, shuffled, slots=5, **options), sorted(alone, key=lambda t: (t.game, t.episode))):
        assert len(other) == len(reference)
        assert sum(differs(policy, a, b, 0.7) for a, b in zip(reference, other)) <= 1


def test_the_seed_names_all_randomness():
    a, b, c = (play(taught(), some(), temperature=0.7, seed=seed, max_steps=6) for seed in (1, 1, 2))
    for x, y in zip(a, b):
        assert_same(x, y)
        assert (x.logp == y.logp).all()
    assert any(len(x.ids) != len(y.ids) or (x.ids != y.ids).any() for x, y in zip(a, c))
    texts = Counter(t.ids.tobytes() for t in a)
    assert len(texts) > len(games()[:4])  # the episodes of a game differ


# --- sampling ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", (0.5, 1.0))
def test_first_actions_are_drawn_from_the_models_distribution(temperature):
    """Chi-square of 3,000 sampled first actions against probabilities from an uncached pass."""
    policy, game, n = taught(), games()[0], 3000
    drawn = Counter(tuple(t.ids[t.spans[0, 0]:t.spans[0, 1]]) for t in
                    rollout(policy, tokenizer(), [(game, k) for k in range(n)], temperature=temperature, max_steps=1, slots=500))
    prompt = tokenizer().prompt(*split_intro(AlfworldEnv().reset(game)[0]))
    expected = {}
    for action in drawn:
        if len(action) < MAX_ACTION:
            logp = next_logprobs(policy, [*prompt, *action], temperature)
            expected[action] = n * float(sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(action)).exp())
    common = [action for action, e in expected.items() if e >= 5]
    rest = n - sum(drawn[a] for a in common), n - sum(expected[a] for a in common)
    chi2 = sum((drawn[a] - expected[a]) ** 2 / expected[a] for a in common) + (rest[0] - rest[1]) ** 2 / rest[1]
    assert len(common) > 8
    assert chi2 < len(common) + 4 * (2 * len(common)) ** 0.5


@pytest.mark.parametrize("make", (taught, lambda: random_model(1)), ids=("taught", "random"))
@pytest.mark.parametrize("temperature", (0.3, 1.5))
def test_recorded_logprobs_are_those_of_an_uncached_pass(make, temperature):
    policy, forced = make(), 0
    for t in play(policy, some(), temperature=temperature, max_steps=6):
        logp = next_logprobs(policy, t.ids, temperature)
        for (start, end), recorded, cut in zip(t.spans, t.logp, t.forced):
            sampled = range(start, end - cut)  # a forced <end> carries no log-probability
            assert recorded == pytest.approx(float(sum(logp[i - 1, t.ids[i]] for i in sampled)), abs=1e-3)
            forced += cut
    assert forced or make is taught


@pytest.mark.parametrize("make", (taught, lambda: random_model(1)), ids=("taught", "random"))
def test_greedy_takes_the_most_probable_token(make):
    policy = make()
    for t in play(policy, some(k=1), temperature=0, max_steps=5):
        best = next_logprobs(policy, t.ids, 1.0).argmax(-1)
        for (start, end), cut in zip(t.spans, t.forced):
            assert (best[start - 1:end - 1 - cut].numpy() == t.ids[start:end - cut]).all()


# --- what an episode is --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", (taught, lambda: random_model(2)), ids=("taught", "random"))
def test_a_trajectory_tells_what_happened(make):
    """Its actions, played again, get the answers that stand in it: at every place the action, not the observation."""
    tok, env, by_id = tokenizer(), AlfworldEnv(7), {game.id: game for game in games()}
    for t in play(make(), some(), temperature=1.0, max_steps=7):
        intro, _ = env.reset(by_id[t.game])
        ids = list(tok.prompt(*split_intro(intro)))
        for k, (start, end) in enumerate(t.spans):
            assert len(ids) == start
            ids += t.ids[start:end].tolist()
            observation, reward, won, truncated, _ = env.step(tok.decode(t.ids[start:end]))
            assert t.inadmissible[k] == (observation == NOTHING_HAPPENS)
            if k < len(t) - 1:
                ids += tok.turn(observation)
        assert ids == t.ids.tolist() and t.ids.dtype == np.int32
        assert (t.reward, t.won, t.truncated) == (reward, won, truncated) and won != truncated


def test_a_win_ends_an_episode_with_reward_one():
    """The expert's actions in place of the policy's."""
    for game in games()[:6]:
        commands = [step.action for step in demonstrate(AlfworldEnv(), game, Expert(prior()), None).steps]

        def choose(policy, tok, cache, rows, lengths, h, names, temperature, histories):
            return [list(tok.action(commands[names[-1][j]])) for j in range(len(rows))], [0.0] * len(rows), [False] * len(rows)

        for cap in (len(commands), len(commands) - 1):
            t, = rollout(taught(), tokenizer(), [(game, 0)], choose=choose, max_steps=cap)
            assert t.won == (t.reward == 1.0) == (not t.truncated) == (cap == len(commands))
            assert [tokenizer().decode(t.ids[start:end]) for start, end in t.spans] == commands[:cap]


def test_a_forced_end_closes_an_action_at_the_token_cap_and_nowhere_else():
    kinds = set()
    for t in play(taught(), some(), temperature=2.0, max_steps=5):
        for (start, end), cut in zip(t.spans, t.forced):
            action = t.ids[start:end]
            assert (action[:-1] >= len(SPECIAL)).all() and action[-1] == END  # no special token inside
            assert len(action) == MAX_ACTION if cut else len(action) <= MAX_ACTION
            kinds.add(bool(cut))
    assert kinds == {True, False}


@pytest.mark.parametrize("context", (260, 330))
def test_an_episode_that_outgrows_the_context_is_cut_as_by_the_step_cap(context):
    policy, tok = random_model(2, context=context), tokenizer()
    cut = [t for t in play(policy, some(6, 2), temperature=1.0, max_steps=30) if len(t) < 30]
    for t in cut:
        assert t.truncated and not t.won and t.reward == 0 and len(t.ids) <= context
        next_logprobs(policy, t.ids, 1.0)  # fits
        assert len(t.ids) + len(tok.turn(NOTHING_HAPPENS)) + MAX_ACTION > context or not t.inadmissible[-1]
        assert len(t) == 1 or t.spans[-1, 0] + MAX_ACTION <= context
    assert cut


def test_a_context_too_small_for_the_first_observation_is_told():
    with pytest.raises(UserError, match="does not fit a context of 60"):
        play(random_model(context=60), some())


# --- from the midst of a transcript -----------------------------------------------------------------------------------------------

def test_an_episode_goes_on_from_a_demonstration():
    """Told and scored as if the policy had said the beginning itself, which is not counted as its own and does not count for the cap."""
    by_id = {game.id: game for game in games()}
    begun = [(by_id[t.game], 100 + k, t.ids[:t.spans[k, 0]]) for t in expert_trajectories()[:8] for k in (0, 3, 5) if k < len(t)]
    plain = [(by_id[t.game], 0) for t in expert_trajectories()[:8]]
    for slots in (3, 64):
        done = {(t.game, t.episode): t for t in rollout(taught(), tokenizer(), [*begun, *plain], temperature=0.7, max_steps=4, seed=2, slots=slots)}
        for game, number, ids in begun:
            t = done[game.id, number]
            assert (t.ids[:len(ids)] == ids).all() and t.spans[0, 0] == len(ids) and len(t) <= 4 and t.truncated == (not t.won)
            env = AlfworldEnv(100)
            intro, _ = env.reset(game)
            told = list(tokenizer().prompt(*split_intro(intro)))
            for action in tokenizer().actions(t.ids):
                observation, reward, won, *_ = env.step(action)
                told += [*tokenizer().action(action), *tokenizer().turn(observation)]
            assert tokenizer().decode(told).startswith(tokenizer().decode(t.ids)) and (won, reward) == (t.won, t.reward)
            for (start, end), logp, forced in zip(t.spans, t.logp, t.forced):
                expected = next_logprobs(taught(), t.ids, 0.7)[range(start - 1, end - 1 - forced), t.ids[start:end - forced].tolist()].sum()
                assert logp == pytest.approx(float(expected), abs=1e-3)
        assert len(done) == len(begun) + len({g.id for g, _ in plain})
    alone = play(taught(), plain[:1], temperature=0.7, max_steps=4, seed=2)[0]
    prompt = alone.ids[:alone.spans[0, 0]]
    assert_same(play(taught(), [(plain[0][0], 0, prompt)], temperature=0.7, max_steps=4, seed=2)[0], alone)  # begun at the beginning


# --- only admissible commands ----------------------------------------------------------------------------------------------------

def test_admissible_plays_only_what_the_world_accepts():
    tok, env, by_id = tokenizer(), AlfworldEnv(), {game.id: game for game in games()}
    said = Counter()
    for t in play(random_model(3), some(), temperature=4.0, max_steps=10, admissible=True):
        assert not t.inadmissible.any() and not t.forced.any()
        _, info = env.reset(by_id[t.game])
        for start, end in t.spans:
            action = tok.decode(t.ids[start:end])
            assert action in info["admissible_commands"]
            said[action.split()[0]] += 1
            info = env.step(action)[-1]
    assert len(said) > 4


@torch.no_grad()
def test_admissible_renormalises_token_by_token():
    policy, tok = random_model(3, scale=0.15), tokenizer()
    _, info = AlfworldEnv().reset(games()[0])
    commands = info["admissible_commands"]
    prompt = tok.prompt(*split_intro(AlfworldEnv().reset(games()[0])[0]))
    exact = {}
    for command in commands:
        action, logp = tok.action(command), 0.0
        after = next_logprobs(policy, [*prompt, *action], 1.0)
        for i, token in enumerate(action):
            also = sorted({a[i] for a in map(tok.action, commands) if a[:i] == action[:i]})
            logp += after[len(prompt) - 1 + i].log_softmax(-1)[also].log_softmax(-1)[also.index(token)].item()
        exact[action] = logp
    assert sum(np.exp(list(exact.values()))) == pytest.approx(1, abs=1e-4)
    trajectories = play(policy, [(games()[0], k) for k in range(300)], temperature=1.0, max_steps=1, admissible=True)
    for t in trajectories:
        assert t.logp[0] == pytest.approx(exact[tuple(t.ids[slice(*t.spans[0])])], abs=1e-3)
    assert len({t.ids.tobytes() for t in trajectories}) > 5


# --- trouble ---------------------------------------------------------------------------------------------------------------------

def test_a_fault_in_the_world_is_not_swallowed():
    class Broken(AlfworldEnv):
        def step(self, action):
            raise RuntimeError("the world is broken")

    with pytest.raises(RuntimeError, match="the world is broken"):
        list(rollout(taught(), tokenizer(), some(), make_env=Broken))
