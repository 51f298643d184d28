"""Monte Carlo labels against a dictionary that is as slow and plain as the definition."""

import random
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from env import AlfworldEnv
from qestimate import (forked, forks_of, held_out_check, history_keys, labels_of, pearson, preference_pairs, q_table, returns, sarsa, shaped, squashed, state_labels,
                       td_gae, visit_statistics, world_keys)
from rollout import Trajectory
from tiny import expert_trajectories, games, played, tokenizer
from tokenizer import split_intro

GAMMA = 0.95


def told(task, *turns, won=False, game="a/1", first="You see a desk 1."):
    """A trajectory from words: turns are (action, the world's answer); an action given as a tuple of texts is that many encodings."""
    tok = tokenizer()
    ids, spans = list(tok.prompt(task, first)), []
    for action, answer in turns:
        start = len(ids)
        ids += [i for part in ([action] if isinstance(action, str) else action) for i in tok.encode(part)] + [5]
        spans.append((start, len(ids)))
        ids += tok.turn(answer)
    n = len(turns)
    return Trajectory(game, np.array(ids[:spans[-1][1]], np.int32), np.array(spans, np.int32), np.zeros(n, np.float32), np.zeros(n, bool),
                      np.zeros(n, bool), float(won), won, not won, 0, 0)


def random_trajectories(seed, n=200):
    """Few tasks, actions and answers, so that most histories are shared; every trajectory is of another game."""
    rng = random.Random(seed)
    texts = ["go to desk 1", " go to desk 1 ", ("go to", " desk", " 1"), "look", ("l", "ook"), "take pen 1"]
    return [told(rng.choice(["put a pen.", "put a mug."]),
                 *((rng.choice(texts), rng.choice(["Nothing happens.", "You arrive at desk 1."])) for _ in range(rng.randrange(1, 5))),
                 won=rng.random() < 0.5, game=f"task/{i}") for i in range(n)]


def by_definition(trajectories, gamma):
    """{(everything said before, action): [its returns]} and the keys in order of the actions."""
    tok, table, order = tokenizer(), defaultdict(list), []
    for t in trajectories:
        history = ()
        for k, (start, end) in enumerate(t.spans):
            seen = t.spans[k - 1, 1] if k else 0
            history += (tok.decode(t.ids[seen:start]),)
            action = tok.decode(t.ids[start:end]).strip()
            table[history, action].append(gamma ** (len(t) - 1 - k) * t.reward)
            order.append((history, action))
            history += (action,)
    return table, order


@pytest.mark.parametrize("trajectories", (lambda: random_trajectories(0), lambda: random_trajectories(1), played, expert_trajectories),
                         ids=("random 0", "random 1", "played", "expert"))
@pytest.mark.parametrize("gamma", (0.95, 0.5))
def test_q_hat_is_the_mean_return_of_all_rollouts_through_the_same_history_and_action(trajectories, gamma):
    trajectories = trajectories()
    table, order = by_definition(trajectories, gamma)
    ours = q_table(trajectories, tokenizer(), gamma)
    np.testing.assert_allclose(ours["q_hat"], [np.mean(table[key]) for key in order])
    assert ours["count"].tolist() == [len(table[key]) for key in order]
    assert (ours["count"] > 1).sum() > 10  # histories are shared, by different games too
    labels = labels_of(trajectories, ours)
    assert [len(q) for q, _ in labels] == [len(t) for t in trajectories]
    assert sum(float(w.sum()) for _, w in labels) == pytest.approx(len(table), rel=1e-5)
    np.testing.assert_allclose(np.concatenate([q for q, _ in labels]), ours["q_hat"], rtol=1e-6)
    # and the weighted mean of the labels is the mean over distinct (s, a)
    q, w = (np.concatenate(part) for part in zip(*labels))
    assert (q * w).sum() / w.sum() == pytest.approx(np.mean([np.mean(g) for g in table.values()]), rel=1e-5)


def test_shared_histories_of_different_games():
    a = told("put a pen.", ("look", "You see nothing."), ("go to desk 1", "Nothing happens."), won=True, game="one/1")
    b = told("put a pen.", ("look", "You see nothing."), ("go to desk 1", "Nothing happens."), won=False, game="two/2")
    other_answer = told("put a pen.", ("look", "You see a desk."), ("go to desk 1", "Nothing happens."), won=True)
    other_task = told("put a mug.", ("look", "You see nothing."), ("go to desk 1", "Nothing happens."), won=True)
    table = q_table([a, b, other_answer, other_task], tokenizer(), 0.5)
    assert table["q_hat"].tolist() == pytest.approx([1 / 3, 0.5, 1 / 3, 0.5, 1 / 3, 1, 0.5, 1])
    assert table["count"].tolist() == [3, 2, 3, 2, 3, 1, 1, 1]
    assert len(set(table["state"].tolist())) == 5  # two tasks at the start, then three histories


def test_the_text_of_a_history_counts_not_its_tokens_nor_the_blanks_around_an_action():
    tok = tokenizer()
    same = [told("put a pen.", (action, "Nothing happens."), ("look", "x")) for action in ("go to desk 1", (" ", "go to desk 1"), ("go to", " desk", " 1", "  "))]
    keys = [history_keys(t, tok) for t in same]
    assert all((s == keys[0][0]).all() and (p == keys[0][1]).all() for s, p in keys)
    states, pairs = keys[0]
    assert len({*states.tolist(), *pairs.tolist()}) == 4  # a state is not a pair
    assert (history_keys(told("put a pen.", ("go to desk 2", "Nothing happens.")), tok)[1][:1] != pairs[:1]).all()


def test_worked_discounts():
    """A sure win in 10 more actions is worth 0.63, in 30 more 0.23; a loss is worth nothing; the last action of a win is worth 1."""
    win = told("put a pen.", *[("look", "x")] * 30, won=True)
    G = returns(win, GAMMA)
    assert (round(G[20], 2), round(G[0], 2), G[-1]) == (0.63, 0.23, 1.0) and len(G) == 30
    assert G[5] == pytest.approx(G[6] * GAMMA)  # one wasted action costs 5 %
    assert not returns(told("put a pen.", *[("look", "x")] * 30), GAMMA).any()


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("gap", (0.03, 0.4))
def test_preference_pairs_against_the_definition(seed, gap):
    trajectories, tok = random_trajectories(seed), tokenizer()
    table, order = by_definition(trajectories, GAMMA)
    actions = {}
    for history, action in table:
        actions.setdefault(history, []).append(action)
    expected = {(h, a, b) for h, some in actions.items() for a in some for b in some if np.mean(table[h, a]) > np.mean(table[h, b]) + gap}
    pairs, told = preference_pairs(trajectories, q_table(trajectories, tok, GAMMA), gap)
    where = iter(order)
    keys = [[next(where) for _ in t.spans] for t in trajectories]
    ours = [(*keys[i][k], tok.decode(other).strip()) for i, found in enumerate(pairs) for k, other in found]
    assert len(ours) == len(set(ours)) == told["pairs"] and set(ours) == expected and expected
    assert told["states"] == len({h for h, _, _ in expected}) and told["states"] + told["dropped"] == len(actions)


def test_bootstrapped_labels_by_hand():
    """The worked example: M = 0.5, 0.6, 0.8, v_0 = 0.4, R = 1, γ = λ = 0.95."""
    q_hat, advantage = td_gae(np.array([0.5, 0.6, 0.8]), 0.4, 1.0, 0.95, 0.95)
    np.testing.assert_allclose(advantage, [0.4640, 0.4310, 0.4], atol=5e-5)
    np.testing.assert_allclose(q_hat, [0.8640, 0.9310, 1.0], atol=5e-5)
    for labels in (td_gae, sarsa):
        for T in (1, 5):
            M = np.random.default_rng(T).random(T)
            for lam in (0.0, 0.7, 1.0):
                q_hat, advantage = labels(M, 0.3, 1.0, 0.9, lam)
                np.testing.assert_allclose(q_hat - advantage, [0.3, *M[:-1]])
                assert q_hat[-1] == pytest.approx(1.0)
                assert labels(M, 99.0, 1.0, 0.9, lam)[0][0] == pytest.approx(q_hat[0])  # the first state's value cancels in Q̂
            np.testing.assert_allclose(q_hat, 0.9 ** np.arange(T - 1, -1, -1))  # λ = 1: Monte Carlo
    M = np.random.default_rng(0).random(4)
    np.testing.assert_allclose(sarsa(M, 0.0, 1.0, 0.9, 0.0)[0], [0.9 * M[1], 0.9 * M[2], 0.9 * M[3], 1.0])  # λ = 0: one step ahead
    np.testing.assert_allclose(td_gae(M, 0.0, 1.0, 0.9, 0.0)[0], [0.9 * M[0], 0.9 * M[1], 0.9 * M[2], 1.0])  # here each leans on itself


@pytest.mark.parametrize("trajectories", (lambda: random_trajectories(0), played), ids=("random", "played"))
def test_a_states_value_is_the_mean_return_of_all_rollouts_through_it(trajectories):
    trajectories = trajectories()
    table, order = by_definition(trajectories, GAMMA)
    value = defaultdict(list)
    for (history, _), some in table.items():
        value[history] += some
    labels = state_labels(trajectories, q_table(trajectories, tokenizer(), GAMMA))
    np.testing.assert_allclose(np.concatenate([v for v, _ in labels]), [np.mean(value[history]) for history, _ in order], rtol=1e-5)
    assert sum(float(w.sum()) for _, w in labels) == pytest.approx(len(value), rel=1e-5)


def test_shaping():
    q_hat, V = np.array([0.5, 0.7, 1.0]), np.array([0.4, 0.6, 0.9])
    np.testing.assert_allclose(shaped(q_hat, V, 0.9, "difference"), [0.5 + 0.54 - 0.4, 0.7 + 0.81 - 0.6, 1.0 - 0.9])
    np.testing.assert_allclose(shaped(q_hat, V, 0.9, "potential"), [0.1, 0.1, 0.1])
    # shaping the reward by a potential, r + γV(s') − V(s), and adding it up: Q − V(s), whatever comes later
    rewards = [0.9 * V[1] - V[0], 0.9 * V[2] - V[1], 1 - V[2]]
    G = [sum(0.9 ** (k - t) * rewards[k] for k in range(t, 3)) for t in range(3)]
    np.testing.assert_allclose(shaped(returns_of_win(3, 0.9), V, 0.9, "potential"), G)
    x = np.random.default_rng(0).normal(size=1000)
    y = squashed(x)
    assert (y > 0).all() and (y < 1).all() and (np.argsort(x) == np.argsort(y)).all()
    low, high = np.quantile(x, (0.25, 0.75))
    assert squashed(np.array([*x, 0.0]))[-1] == pytest.approx(1 / (1 + np.exp(3 / (high - low) * x.mean())), abs=1e-3)
    np.testing.assert_allclose(squashed(5 * x + 2), y)
    assert squashed(np.ones(4)).tolist() == [0.5] * 4


def returns_of_win(T, gamma):
    return gamma ** np.arange(T - 1, -1, -1.0)


def test_histories_that_lead_to_the_same_world_share_their_returns():
    game = games()[0]
    a, b = [c for c in begin(game) if c.startswith("go to")][:2]
    ways = [("look", f"{a}", f"{b}", "look"), ("inventory", f"{a}", f"{b}", "look"), (f"{a}", "look", f"{b}", "inventory"), (f"{b}", "look", "look", "look")]
    trajectories = [play_through(game, way, reward) for way, reward in zip(ways, (1.0, 0.0, 1.0, 0.0))]
    keys = lambda t, tok: world_keys(t, tok, game)
    table, plain = q_table(trajectories, tokenizer(), 1.0, keys), q_table(trajectories, tokenizer(), 1.0)
    states = table["state"].reshape(4, 4)
    assert states[0, 0] == states[0, 1] == states[1, 1] == states[2, 0] != states[0, 2]  # looking changes nothing
    assert states[0, 3] == states[1, 3] == states[2, 3] == states[3, 1] != states[0, 2]
    pair = {name: q for name, q in zip(((w, k) for w in range(4) for k in range(4)), table["q_hat"])}
    assert pair[0, 1] == pair[1, 1] == pytest.approx(2 / 3) and pair[0, 3] == pair[1, 3] == pytest.approx(0.2)
    assert len(set(table["pair"].tolist())) < len(set(plain["pair"].tolist()))
    taken = next((take, move, back) for g in [game] for take, move, back in things_to_put_back(g))
    put_back = world_keys(play_through(game, (taken[0], "look", *taken[1:], "look"), 1.0), tokenizer(), game)[0]
    assert put_back[1] == put_back[4]  # what is back in its place is as if it had never been taken
    other = world_keys(play_through(games()[1], ("look",) * 2, 1.0), tokenizer(), games()[1])[0]
    assert other[0] != states[0, 0]  # another game is another world
    begun = replace(trajectories[0], spans=trajectories[0].spans[2:])  # its first actions were a demonstration's
    assert (world_keys(begun, tokenizer(), game)[0] == states[0, 2:]).all()


def things_to_put_back(game):
    """Yield (go, take, move back) for things that can be taken from where they are in view."""
    env = AlfworldEnv()
    for go in (c for c in begin(game) if c.startswith("go to")):
        env.reset(game)
        info = env.step(go)[-1]
        for take in (c for c in info["admissible_commands"] if c.startswith("take")):
            thing, place = take[5:].split(" from ")
            yield go, take, f"move {thing} to {place}"


def begin(game):
    env = AlfworldEnv()
    return env.reset(game)[1]["admissible_commands"]


def play_through(game, actions, reward):
    env = AlfworldEnv()
    task, first = split_intro(env.reset(game)[0])
    return replace(told(task, *((action, env.step(action)[0]) for action in actions), game=game.id, first=first), reward=reward, won=bool(reward))


def test_visit_statistics():
    a, b, c = (told("put a pen.", ("look", "x"), (last, "x"), won=won) for last, won in (("look", True), ("look", False), ("take pen 1", True)))
    stats = visit_statistics(q_table([a, b, c], tokenizer(), 1.0))
    assert (stats["actions"], stats["distinct_pairs"], stats["distinct_states"]) == (6, 3, 2)
    assert stats["visits"] == {"1+": 3, "2+": 2, "4+": 0, "8+": 0, "16+": 0, "32+": 0, "64+": 0}
    # (look): returns 1, 0, 1 about 2/3, from three of them; (look, look): 1, 0 about 1/2, from two
    assert stats["label_variance_where_revisited"] == pytest.approx((3 * (2 / 9) * 3 / 2 + 2 * 0.25 * 2) / 5)
    assert visit_statistics(q_table([a], tokenizer(), 1.0))["label_variance_where_revisited"] is None


def test_statistics_by_visits_are_those_of_a_dictionary():
    trajectories = random_trajectories(6, 400)
    seen, _ = by_definition(trajectories, GAMMA)
    told_of = visit_statistics(q_table(trajectories, tokenizer(), GAMMA))["by_visits"]
    edges = [1, 2, 4, 8, 16, 32, 64, np.inf]
    for low, high in zip(edges, edges[1:]):
        some = [returns for returns in seen.values() if low <= len(returns) < high]
        assert (f"{low}+" in told_of) == bool(some)
        if some:
            mine = told_of[f"{low}+"]
            assert mine["pairs"] == len(some) and mine["q_hat"] == pytest.approx(np.mean([np.mean(r) for r in some]))
            variances = [np.var(returns, ddof=1) for returns in some for _ in returns] if low > 1 else None
            assert mine["variance"] == (None if low == 1 else pytest.approx(np.mean(variances)))
    assert len(told_of) > 3


def test_the_variance_does_not_depend_on_how_often_one_looked():
    """Throws of a fair coin, 2, 3 or 40 at each of many pairs: 1/4."""
    rng = np.random.default_rng(0)
    for n in (2, 3, 40):
        pair, G = np.repeat(np.arange(20_000 // n, dtype=np.uint64), n), rng.integers(0, 2, 20_000 // n * n).astype(float)
        q_hat = np.repeat(G.reshape(-1, n).mean(1), n)
        stats = visit_statistics({"pair": pair, "state": pair, "count": np.full(len(pair), n), "returns": G, "q_hat": q_hat})
        assert stats["label_variance_where_revisited"] == pytest.approx(0.25, abs=0.01)


def test_held_out_check():
    """Half of the rollouts predict the other half: wholly where the action decides, not at all by chance, not where nothing is shared."""
    tok, rng = tokenizer(), random.Random(0)
    acts = ("look", "take pen 1", "go to desk 1")
    decided = [told("put a pen.", (a, "x"), won=a == "look") for a in (rng.choice(acts) for _ in range(60))]
    assert held_out_check(decided, tok, GAMMA) == {"pairs": 30, "pearson": pytest.approx(1)}
    chance = [told("put a pen.", (rng.choice(acts), "x"), won=rng.random() < 0.5) for _ in range(4000)]
    assert abs(held_out_check(chance, tok, GAMMA)["pearson"]) < 0.1  # its own return is not among those that predict it
    strangers = [told(f"put a pen {i}.", ("look", "x"), won=i % 3 == 0) for i in range(20)]
    assert held_out_check(strangers, tok, GAMMA) == {"pairs": 0, "pearson": None}
    assert held_out_check(strangers[:1], tok, GAMMA) == {"pairs": 0, "pearson": None}


def test_pearson():
    x = np.random.default_rng(0).normal(size=50)
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1) and pearson(x, x + 1) == pytest.approx(1)
    assert pearson(x, np.ones(50)) is None and pearson([1.0], [2.0]) is None


@pytest.mark.parametrize("trajectories", (played, expert_trajectories), ids=("played", "expert"))
def test_a_rollout_that_began_in_a_transcript_shares_its_names(trajectories):
    """Its own actions alone are named, as they would be had it played from the start."""
    for t in trajectories():
        states, pairs = history_keys(t, tokenizer())
        for k in range(len(t)):
            later = history_keys(replace(t, spans=t.spans[k:], logp=t.logp[k:]), tokenizer())
            assert (later[0] == states[k:]).all() and (later[1] == pairs[k:]).all()


# --- rollouts forked from every step ------------------------------------------------------------------------------------

@pytest.mark.parametrize("K", (1, 3))
def test_forked_labels_are_means_over_all_that_was_played_behind_an_action(K):
    rng = random.Random(K)
    trajectories = random_trajectories(4)
    at = forks_of(trajectories, K)
    assert len(at) == K * sum(len(t) - 1 for t in trajectories) and all(k + 1 < len(trajectories[i]) for i, k in at)
    forks = rng.choices(random_trajectories(5), k=len(at))
    seen = {(i, k): [GAMMA ** (len(t) - 1 - k) * t.reward] for i, t in enumerate(trajectories) for k in range(len(t))}
    for (i, k), fork in zip(at, forks):
        seen[i, k].append(GAMMA ** len(fork) * fork.won)
    labels = forked(trajectories, forks, K, GAMMA)
    for i, (t, (q_hat, weight)) in enumerate(zip(trajectories, labels, strict=True)):
        np.testing.assert_allclose(q_hat, [np.mean(seen[i, k]) for k in range(len(t))], rtol=1e-6)
        assert (weight == 1).all()
    with pytest.raises(ValueError):
        forked(trajectories, forks[1:], K, GAMMA)
