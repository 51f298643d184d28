"""log π and Q of all candidates of a state, against one plain forward pass for each command."""

from collections import Counter

import numpy as np
import pytest
import torch

from candidates import (FORBIDDEN, PrefixTree, draw, entropy, expected, extend, hidden,
                        keep_branch, kl, log_policy, padded, score_states, tilt)
from fast_alfworld import AlfworldEnv
from fast_alfworld.gamefile import split_intro
from model import Cache
from rollout import Episode, rollout
from tiny import brute_force, games, played, random_model, some_states, taught, tokenizer
from tokenizer import END

MODELS = {"random": lambda: random_model(1), "taught": taught,
          "one kv head": lambda: random_model(2, n_kv_heads=1, n_layers=3),
          "prm": lambda: random_model(3, head="score")}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def assert_rows(model, values, expected, atol=1e-5):
    """values (B, C) equal the rows of `expected`; padding has probability 0, or score 0."""
    assert values.shape == (len(expected), max(map(len, expected)))
    for row, want in zip(values, expected, strict=True):
        torch.testing.assert_close(row[:len(want)], want, atol=atol, rtol=1e-5)
        padding = row[len(want):]
        assert ((padding if model.config.head == "score" else padding.exp()) == 0).all()


# --- the prefix tree -----------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_a_tree_holds_each_prefix_once_and_every_command_whole(seed):
    _, states = some_states(20, seed)
    for *_, tree in states:
        encoded = [tokenizer().encode(command) for command in tree.commands]
        assert tree.n == len({ids[:k + 1] for ids in encoded for k in range(len(ids))})
        assert len(tree) == len(encoded) and len(tree.ids) == tree.n + len(tree)
        for c, (ids, path) in enumerate(zip(encoded, tree.paths)):
            assert tuple(tree.ids[path]) == ids and tree.depth[path].tolist() == [*range(len(ids))]
            seen = np.nonzero(tree.seen[tree.n + c])[0]  # by its <end>: the path and itself
            assert seen.tolist() == [*path, tree.n + c] and tree.ids[tree.n + c] == END
            mine = tree.command == c
            assert tree.token[mine].tolist() == [*ids, END]
            assert tree.before[mine].tolist() == [0, *(1 + path)]
        assert tree.nodes(False) == tree.n and tree.nodes(True) == tree.n + len(tree)


def test_a_command_that_begins_another_one():
    tree = PrefixTree(("go to desk 1", "go to desk", "go"), tokenizer().encode)
    model, history = random_model(), torch.tensor(tokenizer().prompt("put a pen.", "You see."))
    state = [(0, len(history), tree)]
    assert_rows(model, score_states(model, [history], state),
                brute_force(model, [history], state))


# --- uncached: trajectories with the trees of several states -------------------------------------

@every_model
@pytest.mark.parametrize("temperature", (0.3, 1.0, 2.0))
@torch.no_grad()
def test_several_states_of_several_trajectories_at_once(make, temperature):
    model = make()
    sequences, states = some_states(16)
    assert max(Counter(b for b, *_ in states).values()) > 2
    assert len({len(tree) for *_, tree in states}) > 2
    want = brute_force(model, sequences, states, temperature)
    assert_rows(model, score_states(model, sequences, states, temperature), want)


@every_model
@torch.no_grad()
def test_a_state_does_not_depend_on_the_others_of_the_batch(make):
    """Alone, from a sequence that is cut behind the state, and in another order: the same."""
    model = make()
    sequences, states = some_states(10, seed=1)
    together = score_states(model, sequences, states)
    for n, (b, start, tree) in enumerate(states):
        alone = score_states(model, [sequences[b][:start]], [(0, start, tree)])[0]
        torch.testing.assert_close(together[n, :len(tree)], alone, atol=1e-5, rtol=1e-5)
    order = np.random.default_rng(0).permutation(len(states))
    shuffled = score_states(model, sequences, [states[i] for i in order])
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ("lm", "score"))
def test_gradients_are_those_of_separate_sequences(head):
    model = random_model(4, head=head)
    sequences, states = some_states(5, seed=2)
    gradients, weights = [], torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    for values in (score_states(model, sequences, states, 0.7),
                   brute_force.__wrapped__(model, sequences, states, 0.7)):
        model.zero_grad()
        sum((row[:len(tree)] * w[:len(tree)]).sum()
            for row, w, (*_, tree) in zip(values, weights, states)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    scale = float(gradients[1].abs().max())
    assert scale > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5 * scale, rtol=1e-3)


@torch.no_grad()
def test_hidden_states_serve_two_temperatures():
    """One pass, read twice."""
    model = taught()
    sequences, states = some_states(6)
    h, trees = hidden(model, sequences, states), [tree for *_, tree in states]
    for temperature in (0.5, 1.0):
        assert_rows(model, log_policy(model, h, trees, temperature),
                    brute_force(model, sequences, states, temperature))


@torch.no_grad()
def test_the_scores_of_what_was_played_stand_at_the_ends_of_actions_of_the_trajectory():
    """So one plain pass over a trajectory gives Q of all its actions."""
    model, trajectories = random_model(6, head="score"), played()[::11]
    sequences, states = some_states(20, seed=3)
    for (b, start, tree), row in zip(states, score_states(model, sequences, states)):
        t = trajectories[b]
        k = t.spans[:, 0].tolist().index(start)
        whole = model.scores(model(torch.tensor(t.ids[None], dtype=torch.long)))[0]
        assert float(row[t.choice[k]]) == pytest.approx(float(whole[t.spans[k, 1] - 1]), abs=1e-5)


# --- cached: as in rollouts ----------------------------------------------------------------------

def histories(trajectories, k):
    """(ids up to the <act> of action k, its commands) of each trajectory."""
    sequences, states = some_states(10 ** 6, trajectories=trajectories)
    of = {}
    for b, start, tree in states:
        of.setdefault(b, []).append((start, tree))
    return [(sequences[b][:mine[k][0]], mine[k][1]) for b, mine in of.items()]


@every_model
@torch.no_grad()
def test_scores_behind_a_cache_of_rows_that_grow_by_chains_and_branches(make):
    """Rollouts in small: at each step some rows rest; each step is compared with no cache at all,
    so that a branch that is kept must hold what a recomputation would."""
    model, rng = make(), np.random.default_rng(0)
    trajectories = [t for t in played() if len(t) > 6][::5][:7]
    B, lengths, at = len(trajectories), np.zeros(7, np.int64), np.zeros(7, int)
    cache = Cache(model.config, B)
    cache.reserve(300)
    cache.k.normal_(), cache.v.normal_()  # what a row does not hold is rubbish
    steps = [histories(trajectories, k) for k in range(5)]
    while (at < 5).any():
        live = [b for b in range(B) if at[b] < 5 and rng.random() < 0.7]
        if not live:
            continue
        now = {b: steps[at[b]][b] for b in live}
        chains = [now[b][0][lengths[b]:] if b in now else [] for b in range(B)]
        trees = [tree for _, tree in now.values()]
        values = extend(model, cache, lengths, chains, trees, 0.7)
        sequences = [history for history, _ in now.values()]
        states = [(n, len(h), tree) for n, (h, tree) in enumerate(now.values())]
        assert_rows(model, values, brute_force(model, sequences, states, 0.7))
        lengths[live] = [len(history) for history in sequences]
        chosen = [int(trajectories[b].choice[at[b]]) for b in live]
        paths = [tree.paths[c] for tree, c in zip(trees, chosen)]
        keep_branch(cache, np.array(live), lengths[live], paths)
        lengths[live] += [len(path) for path in paths]
        at[live] += 1


@pytest.mark.parametrize("head", ("lm", "score"))
@torch.no_grad()
def test_a_kept_branch_holds_the_keys_and_values_of_a_recomputation(head):
    model = random_model(5, head=head)
    some = histories(played()[::9], 3)
    cache, start = Cache(model.config, len(some)), np.zeros(len(some), np.int64)
    extend(model, cache, start, [h for h, _ in some], [tree for _, tree in some])
    lengths = np.array([len(h) for h, _ in some])
    chosen = [(7 * i) % len(tree) for i, (_, tree) in enumerate(some)]
    paths = [tree.paths[c] for c, (_, tree) in zip(chosen, some)]
    assert any((path != np.arange(len(path))).any() for path in paths)  # something has to move
    keep_branch(cache, np.arange(len(some)), lengths, paths)
    for row, (c, (history, tree)) in enumerate(zip(chosen, some)):
        ids = [*history, *tokenizer().encode(tree.commands[c])]
        fresh = Cache(model.config, 1)
        model.extend(fresh, np.zeros(1, np.int64), [ids])
        for ours, theirs in zip(cache.read(row, len(ids)), fresh.read(0, len(ids))):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# --- sampling ------------------------------------------------------------------------------------

@torch.no_grad()
def test_temperature_0_is_the_most_likely_command():
    sequences, states = some_states(12)
    greedy = score_states(taught(), sequences, states, 0)
    for row, want in zip(greedy, brute_force(taught(), sequences, states)):
        assert row.argmax() == want.argmax() and row.max() == 0
        assert (row.exp().sum() == 1) and (draw(row[None], [0.999]) == want.argmax()).all()


@pytest.mark.parametrize("temperature", (0.7, 2.0))
def test_first_actions_of_rollouts_follow_the_brute_force_softmax(temperature):
    """Chi-square of 4,000 sampled first actions."""
    game, n = games()[24], 4000
    first = [t.ids[slice(*t.spans[0])].tobytes() for t in rollout(
        taught(), tokenizer(), [Episode(game, k) for k in range(n)], temperature=temperature,
        max_steps=1, slots=500)]
    intro, info = AlfworldEnv().reset(game)
    prompt = np.array(tokenizer().prompt(*split_intro(intro)))
    tree = PrefixTree(info["admissible_commands"], tokenizer().encode)
    p, = brute_force(taught(), [prompt], [(0, len(prompt), tree)], temperature)
    want = n * p.exp().double().numpy()
    seen = Counter(first)
    got = np.array([seen[np.array([*tokenizer().encode(c), END], np.int32).tobytes()]
                    for c in tree.commands])
    assert got.sum() == n
    common = want >= 5
    want = np.append(want[common], max(want[~common].sum(), 1e-9))
    got = np.append(got[common], got[~common].sum())
    degrees = common.sum()
    assert degrees > 4
    assert ((got - want) ** 2 / np.maximum(want, 1)).sum() < degrees + 4 * (2 * degrees) ** 0.5


def test_draws_by_evenly_spaced_numbers_have_exact_frequencies():
    log_pi = torch.tensor([[0.5, 0.25, 0.25, 0], [0, 0, 1, 0]]).log().clamp(min=FORBIDDEN)
    u = (np.arange(400) + 0.5) / 400
    for row, want in zip(log_pi, ([200, 100, 100, 0], [0, 0, 400, 0])):
        drawn = draw(row.repeat(400, 1), u)
        assert torch.bincount(drawn, minlength=4).tolist() == want
        assert (drawn.diff() >= 0).all()
    for u, want in ((0.0, [0, 2]), (1 - 2 ** -53, [2, 2])):  # never a candidate without mass
        assert draw(log_pi, [u, u]).tolist() == want


# --- exact quantities ----------------------------------------------------------------------------

def random_batch(seed, B=50, C=12):
    """log π, log π' and q of states with different numbers of candidates, padded."""
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    trees = [range(int(n)) for n in rng.integers(1, C + 1, B)]
    total = sum(map(len, trees))
    policies = [torch.log_softmax(padded(3 * torch.randn(total, generator=g), trees, FORBIDDEN), -1)
                for _ in range(2)]
    return *policies, padded(torch.rand(total, generator=g), trees, 0.0), trees


@pytest.mark.parametrize("seed", range(3))
def test_entropy_kl_and_expectation_are_sums_over_the_candidates(seed):
    p, q, f, trees = random_batch(seed)
    H, divergence, mean = entropy(p), kl(p, q), expected(p, f)
    for n, tree in enumerate(trees):
        C = len(tree)
        a, b = p[n, :C].double(), q[n, :C].double()
        assert float(H[n]) == pytest.approx(float(-(a.exp() * a).sum()), abs=1e-5)
        assert float(divergence[n]) == pytest.approx(float((a.exp() * (a - b)).sum()), abs=1e-4)
        assert float(mean[n]) == pytest.approx(float((a.exp() * f[n, :C]).sum()), abs=1e-5)
    several = torch.tensor([len(tree) > 1 for tree in trees])
    assert (divergence[several] > 1e-6).all() and (kl(p, p) == 0).all() and (H > -1e-6).all()
    assert (divergence[~several].abs() < 1e-6).all() and not several.all()


@torch.no_grad()
def test_kl_between_models_is_positive_and_0_to_itself():
    sequences, states = some_states(12)
    p, q = (score_states(model, sequences, states, 0.7) for model in (taught(), random_model(1)))
    assert (kl(p, q) > 1e-3).all() and (kl(q, p) > 1e-3).all() and (kl(p, p) == 0).all()
    near = score_states(taught(), sequences, states, 0.71)
    assert ((kl(p, near) > -1e-6) & (kl(p, near) < 0.01)).all()


@pytest.mark.parametrize("beta", (0.03, 0.3, 3.0))
@pytest.mark.parametrize("seed", range(2))
def test_the_tilted_policy_maximises_expected_q_minus_beta_kl(beta, seed):
    log_pi, _, q, trees = random_batch(seed, B=200)
    best = tilt(log_pi, q, beta)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(200))
    assert all((row[len(tree):].exp() == 0).all() for row, tree in zip(best, trees))
    value = lambda p: expected(p.double(), q.double()) - beta * kl(p.double(), log_pi.double())
    maximum = beta * torch.logsumexp(log_pi.double() + q.double() / beta, -1)  # known: β log Z
    torch.testing.assert_close(value(best), maximum, atol=1e-5, rtol=1e-5)
    g = torch.Generator().manual_seed(seed)
    for scale in (0.03, 0.3, 3.0):
        for _ in range(10):
            noise = scale * torch.randn(best.shape, generator=g)
            assert (value(torch.log_softmax(best + noise, -1)) <= maximum + 1e-5).all()
    for other in (log_pi, tilt(log_pi, q, 2 * beta), tilt(log_pi, q, beta / 2)):
        assert (value(other) <= maximum + 1e-5).all()
        assert value(other).mean() < maximum.mean() - 1e-5


def test_an_infinite_beta_leaves_the_policy_and_a_small_one_takes_the_best():
    log_pi, _, q, trees = random_batch(7)
    torch.testing.assert_close(tilt(log_pi, q, float("inf")), log_pi, atol=1e-5, rtol=1e-6)
    greedy = tilt(log_pi, q, 1e-4)
    for row, f, tree in zip(greedy, q, trees):
        assert row.argmax() == f[:len(tree)].argmax()
