"""Labels against a dictionary that is as slow and plain as the definition."""

import random
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from ablations.sarsa import sarsa
from ablations.shaping import state_labels
from qestimate import (history_keys, labels_of, pearson, preference_pairs, q_table, returns,
                       td_gae)
from rollout import Episode, Trajectory
from tiny import games, play, played, taught, tokenizer
from tokenizer import ACT, END
from tools.q_checks import held_out_check, visit_statistics

GAMMA = 0.95


def said(task, *turns, won=False, game="a/1", first="You see a desk 1."):
    """A trajectory from words. turns: (action, the world's answer); an action given as a tuple of
    texts is encoded part by part."""
    tok = tokenizer()
    ids, spans, T = list(tok.prompt(task, first)), [], len(turns)
    for action, answer in turns:
        start = len(ids)
        parts = [action] if isinstance(action, str) else action
        ids += [*(i for part in parts for i in tok.encode(part)), END]
        spans.append((start, len(ids)))
        ids += tok.turn(answer)
    return Trajectory(game, np.array(ids[:spans[-1][1]], np.int32), np.array(spans, np.int32),
                      np.zeros(T, np.int32), np.full(T, 3, np.int32), np.zeros(T, np.float32),
                      float(won), won, not won, 0, 0)


def random_trajectories(seed, n=200):
    """Few tasks, actions and answers, so that most histories are shared; each of another game."""
    rng = random.Random(seed)
    actions = ["go to desk 1", " go to desk 1 ", ("go to", " desk", " 1"), "look", ("l", "ook"),
               "take pen 1"]
    answers = ["Nothing happens.", "You arrive at desk 1."]
    return [said(rng.choice(["put a pen.", "put a mug."]),
                 *((rng.choice(actions), rng.choice(answers)) for _ in range(rng.randrange(1, 5))),
                 won=rng.random() < 0.5, game=f"task/{i}") for i in range(n)]


@lru_cache
def shared():
    """Rollouts of one game, whose histories are shared."""
    return [*play(taught(), [Episode(games()[-1], k) for k in range(30)], max_steps=8, seed=4,
                  temperature=1.0), *played()]


def by_definition(trajectories, gamma):
    """{(all that was said before, action): [its returns]} and the keys in order of the actions."""
    tok, table, order = tokenizer(), defaultdict(list), []
    for t in trajectories:
        history = ()
        for k, (start, end) in enumerate(t.spans):
            seen = t.spans[k - 1, 1] if k else 0
            action = tok.decode(t.ids[start:end]).strip()
            history += (tok.decode(t.ids[seen:start]),)
            table[history, action].append(gamma ** (len(t) - 1 - k) * t.reward)
            order.append((history, action))
            history += (action,)
    return table, order


sets = pytest.mark.parametrize("trajectories", (
    lambda: random_trajectories(0), lambda: random_trajectories(1), shared),
    ids=("random 0", "random 1", "rollouts"))


# --- eq. 1 ---------------------------------------------------------------------------------------

@sets
@pytest.mark.parametrize("gamma", (0.95, 0.5))
def test_q_hat_is_the_mean_return_of_all_rollouts_through_the_same_history_and_action(
        trajectories, gamma):
    trajectories = trajectories()
    table, order = by_definition(trajectories, gamma)
    ours = q_table(trajectories, tokenizer(), gamma)
    np.testing.assert_allclose(ours["q_hat"], [np.mean(table[pair]) for pair in order])
    assert ours["count"].tolist() == [len(table[pair]) for pair in order]
    assert (ours["count"] > 1).sum() > 10  # histories are shared, by different games too
    assert len(set(ours["pair"].tolist())) == len(table)
    assert len(set(ours["state"].tolist())) == len({history for history, _ in order})
    labels = labels_of(trajectories, ours)
    assert [len(q) for q, _ in labels] == [len(w) for _, w in labels] == [*map(len, trajectories)]
    q, w = (np.concatenate(part) for part in zip(*labels))
    np.testing.assert_allclose(q, ours["q_hat"], rtol=1e-6)
    assert float(w.sum()) == pytest.approx(len(table), rel=1e-5)  # each distinct (s, a) weighs 1,
    mean = np.mean([np.mean(G) for G in table.values()])  # so their mean is that over pairs
    assert (q * w).sum() / w.sum() == pytest.approx(mean, rel=1e-5)


@sets
def test_a_states_value_is_the_mean_return_of_all_rollouts_through_it(trajectories):
    trajectories = trajectories()
    table, order = by_definition(trajectories, GAMMA)
    value = defaultdict(list)
    for (history, _), some in table.items():
        value[history] += some
    labels = state_labels(trajectories, q_table(trajectories, tokenizer(), GAMMA))
    v, w = (np.concatenate(part) for part in zip(*labels))
    np.testing.assert_allclose(v, [np.mean(value[history]) for history, _ in order], rtol=1e-5)
    assert float(w.sum()) == pytest.approx(len(value), rel=1e-5)


def test_worked_discounts():
    """A sure win in 10 more actions is worth 0.63, in 30 more 0.23; one wasted action costs 5 %."""
    win = said("put a pen.", *[("look", "x")] * 30, won=True)
    G = returns(win, GAMMA)
    assert (round(G[20], 2), round(G[0], 2), G[-1]) == (0.63, 0.23, 1.0) and len(G) == 30
    assert G[5] == pytest.approx(G[6] * GAMMA)
    assert not returns(said("put a pen.", *[("look", "x")] * 30), GAMMA).any()


def test_different_games_share_a_history_but_no_other_answer_and_no_other_task():
    a = said("put a pen.", ("look", "You see."), ("look", "x"), won=True, game="one/1")
    b = said("put a pen.", ("look", "You see."), ("look", "x"), won=False, game="two/2")
    other_answer = said("put a pen.", ("look", "A desk."), ("look", "x"), won=True)
    other_task = said("put a mug.", ("look", "You see."), ("look", "x"), won=True)
    table = q_table([a, b, other_answer, other_task], tokenizer(), 0.5)
    assert table["q_hat"].tolist() == pytest.approx([1 / 3, 0.5, 1 / 3, 0.5, 1 / 3, 1, 0.5, 1])
    assert table["count"].tolist() == [3, 2, 3, 2, 3, 1, 1, 1]
    assert len(set(table["state"].tolist())) == 5  # two tasks at the start, then three histories


def test_the_text_of_a_history_counts_not_its_tokens_nor_the_spaces_around_an_action():
    tok, look = tokenizer(), ("look", "x")
    ways = ("go to desk 1", (" ", "go to desk 1"), ("go to", " desk", " 1", "  "))
    same = [said("put a pen.", (way, "Nothing happens."), look) for way in ways]
    assert len({t.ids.tobytes() for t in same}) == 3
    keys = [history_keys(t, tok) for t in same]
    assert all((s == keys[0][0]).all() and (p == keys[0][1]).all() for s, p in keys)
    states, pairs = keys[0]
    assert len({*states.tolist(), *pairs.tolist()}) == 4  # a state is not a pair
    other = history_keys(said("put a pen.", ("go to desk 2", "Nothing happens."), look), tok)
    assert other[0][0] == states[0] and not {*other[0][1:], *other[1]} & {*states, *pairs}
    # where an action ends and an answer begins counts
    moved = [said("t", ("look", "ab"), look), said("t", ("look a", "b"), look)]
    assert len({int(history_keys(t, tok)[0][1]) for t in moved}) == 2


@sets
def test_a_rollout_that_began_in_a_transcript_shares_its_keys(trajectories):
    """Its own actions alone are named, as they would be had it been played from the start."""
    for t in trajectories()[:20]:
        states, pairs = history_keys(t, tokenizer())
        assert len(states) == len(t) == (t.ids == ACT).sum()
        for k in range(len(t)):
            later = history_keys(replace(t, spans=t.spans[k:]), tokenizer())
            assert (later[0] == states[k:]).all() and (later[1] == pairs[k:]).all()


def test_other_keys_can_tell_pairs_apart():
    """An ablation's: here every action of every state is the same pair."""
    keys = lambda t, tok: (np.arange(len(t), dtype=np.uint64), np.zeros(len(t), np.uint64))
    trajectories = random_trajectories(3)
    table = q_table(trajectories, tokenizer(), GAMMA, keys)
    mean = np.mean(np.concatenate([returns(t, GAMMA) for t in trajectories]))
    np.testing.assert_allclose(table["q_hat"], mean)
    assert (table["count"] == len(table["pair"])).all()


# --- preferences ---------------------------------------------------------------------------------

@sets
@pytest.mark.parametrize("gap", (0.03, 0.4))
def test_preference_pairs_against_the_definition(trajectories, gap):
    trajectories, tok = trajectories(), tokenizer()
    table, order = by_definition(trajectories, GAMMA)
    actions = defaultdict(list)
    for history, action in table:
        actions[history].append(action)
    mean = {pair: np.mean(G) for pair, G in table.items()}
    want = {(h, a, b) for h, some in actions.items() for a in some for b in some
            if mean[h, a] > mean[h, b] + gap}
    pairs = preference_pairs(trajectories, q_table(trajectories, tok, GAMMA), gap)
    where = iter(order)
    keys = [[next(where) for _ in t.spans] for t in trajectories]
    assert all(other[-1] == END for found in pairs for _, other in found)
    ours = [(*keys[i][k], tok.decode(other).strip())
            for i, found in enumerate(pairs) for k, other in found]
    assert len(ours) == len(set(ours)) and set(ours) == want and want


# --- labels that bootstrap -----------------------------------------------------------------------

def test_the_worked_example_of_p2():
    """M = 0.5, 0.6, 0.8, v_0 = 0.4, R = 1, γ = λ = 0.95."""
    q_hat, advantage = td_gae(np.array([0.5, 0.6, 0.8]), 0.4, 1.0, 0.95, 0.95)
    np.testing.assert_allclose(advantage, [0.4640, 0.4310, 0.4], atol=5e-5)
    np.testing.assert_allclose(q_hat, [0.8640, 0.9310, 1.0], atol=5e-5)
    win = said("put a pen.", *[("look", "x")] * 3, won=True)
    np.testing.assert_allclose(returns(win, 0.95), [0.9025, 0.95, 1.0])  # Monte Carlo


@pytest.mark.parametrize("R", (0.0, 1.0))
@pytest.mark.parametrize("lam", (0.0, 0.7, 1.0))
@pytest.mark.parametrize("T", (1, 2, 6))
def test_bootstrapped_labels_against_their_sums(T, lam, R):
    """γ = 0.9: Â_t is the sum over k of (γλ)^k δ_{t+k}; SARSA(λ) is a mean of n-step returns."""
    M, gamma, v_0 = np.random.default_rng(T).random(T), 0.9, 0.3
    before = [v_0, *M[:-1]]
    delta = [gamma * M[t] - before[t] for t in range(T - 1)] + [R - before[-1]]
    q_hat, advantage = td_gae(M, v_0, R, gamma, lam)
    for t in range(T):
        want = sum((gamma * lam) ** k * delta[t + k] for k in range(T - t))
        assert advantage[t] == pytest.approx(want) and q_hat[t] == pytest.approx(before[t] + want)
    ours, progress = sarsa(M, v_0, R, gamma, lam)
    for t in range(T):
        steps = [gamma ** n * M[t + n] for n in range(1, T - t)]  # n-step returns, then the end's
        weights = [(1 - lam) * lam ** (n - 1) for n in range(1, T - t)]
        end = gamma ** (T - 1 - t) * R
        assert ours[t] == pytest.approx(np.dot(weights, steps) + lam ** (T - 1 - t) * end)
    np.testing.assert_allclose(progress, ours - before)
    for labels in (td_gae, sarsa):
        assert labels(M, v_0, R, gamma, lam)[0][-1] == pytest.approx(R)
        if lam == 1:  # Monte Carlo
            mc = R * gamma ** np.arange(T - 1, -1, -1.0)
            np.testing.assert_allclose(labels(M, v_0, R, gamma, lam)[0], mc, atol=1e-12)


# --- statistics ----------------------------------------------------------------------------------

def test_visit_statistics_by_hand():
    a, b, c = (said("put a pen.", ("look", "x"), (last, "x"), won=won)
               for last, won in (("look", True), ("look", False), ("take pen 1", True)))
    stats = visit_statistics(q_table([a, b, c], tokenizer(), 1.0))
    assert (stats["actions"], stats["distinct_pairs"], stats["distinct_states"]) == (6, 3, 2)
    # (look): returns 1, 0, 1 around 2/3, thrice; (look, look): 1, 0 around 1/2, twice
    want = (3 * (2 / 9) * 3 / 2 + 2 * 0.25 * 2) / 5
    assert stats["label_variance_where_revisited"] == pytest.approx(want)
    alone = visit_statistics(q_table([a], tokenizer(), 1.0))
    assert alone["label_variance_where_revisited"] is None
    assert alone["by_visits"] == {"1+": {"pairs": 2, "q_hat": 1.0, "variance": None}}


def test_statistics_by_visits_are_those_of_a_dictionary():
    trajectories = random_trajectories(6, 400)
    seen, _ = by_definition(trajectories, GAMMA)
    ours = visit_statistics(q_table(trajectories, tokenizer(), GAMMA))["by_visits"]
    edges = [1, 2, 4, 8, 16, 32, 64, np.inf]
    for low, high in zip(edges, edges[1:]):
        some = [G for G in seen.values() if low <= len(G) < high]
        assert (f"{low}+" in ours) == bool(some)
        if some:
            mine = ours[f"{low}+"]
            variance = np.mean([np.var(G, ddof=1) for G in some for _ in G]) if low > 1 else None
            assert mine["pairs"] == len(some)
            assert mine["q_hat"] == pytest.approx(np.mean([np.mean(G) for G in some]))
            assert mine["variance"] == (None if low == 1 else pytest.approx(variance))
    assert len(ours) > 3


@pytest.mark.parametrize("n", (2, 3, 40))
def test_the_variance_does_not_depend_on_the_number_of_visits(n):
    """Throws of a fair coin, n at each of many pairs: 1/4."""
    m, rng = 20_000 // n, np.random.default_rng(0)
    pair, G = np.repeat(np.arange(m, dtype=np.uint64), n), rng.integers(0, 2, m * n).astype(float)
    q_hat = np.repeat(G.reshape(-1, n).mean(1), n)
    stats = visit_statistics({"pair": pair, "state": pair, "count": np.full(len(pair), n),
                              "returns": G, "q_hat": q_hat})
    assert stats["label_variance_where_revisited"] == pytest.approx(0.25, abs=0.01)


def test_held_out_check():
    """Half of the rollouts predict the others: fully where the action decides, not by chance."""
    tok, rng, acts = tokenizer(), random.Random(0), ("look", "take pen 1", "go to desk 1")
    decided = [said("put a pen.", (a, "x"), won=a == "look")
               for a in (rng.choice(acts) for _ in range(60))]
    assert held_out_check(decided, tok, GAMMA) == {"pairs": 30, "pearson": pytest.approx(1)}
    chance = [said("put a pen.", (rng.choice(acts), "x"), won=rng.random() < 0.5)
              for _ in range(4000)]
    assert abs(held_out_check(chance, tok, GAMMA)["pearson"]) < 0.1  # its own return is left out
    strangers = [said(f"put a pen {i}.", ("look", "x"), won=i % 3 == 0) for i in range(20)]
    for few in (strangers, strangers[:1], []):
        assert held_out_check(few, tok, GAMMA) == {"pairs": 0, "pearson": None}


def test_pearson():
    x = np.random.default_rng(0).normal(size=50)
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1) and pearson(x, x + 1) == pytest.approx(1)
    assert pearson(x, np.ones(50)) is pearson(np.ones(50), x) is None
    assert pearson([1.0], [2.0]) is None and pearson([1.0, 2.0], [3.0, 1.0]) is None
