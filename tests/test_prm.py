"""The PRM: losses against naive loops, one pass over a trajectory against a sequence an action."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prm as prms
from prm import (Fit, at_actions, at_start, bce_loss, bce_objective, bt_loss, bt_objective, fit,
                 label_entropy, pair_accuracy, promise_progress_loss, promise_progress_objective,
                 score, validation_metrics)
from qestimate import labels_of, preference_pairs, q_table, returns, td_gae
from tiny import played, random_model, same, taught, tokenizer
from tokenizer import END


def random_labels(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, generator=g), torch.rand(n, generator=g), torch.rand(n, generator=g)


# --- losses --------------------------------------------------------------------------------------

def test_bce_is_the_weighted_sum_over_the_elements():
    f, q_hat, weight = random_labels(100)
    q = f.double().sigmoid()
    want = sum(float(w * -(y * p.log() + (1 - y) * (1 - p).log()))
               for p, y, w in zip(q, q_hat.double(), weight.double()))
    assert float(bce_loss(f, q_hat, weight)) == pytest.approx(want, rel=1e-5)


def test_a_pair_seen_k_times_at_weight_1_over_k_counts_once():
    f, q_hat = torch.tensor([2.0, -1.0]), torch.tensor([0.3, 0.8])
    often = bce_loss(f[[0, 0, 0, 1]], q_hat[[0, 0, 0, 1]], torch.tensor([1 / 3, 1 / 3, 1 / 3, 1]))
    torch.testing.assert_close(often, bce_loss(f, q_hat, torch.ones(2)))


def test_bce_is_minimal_where_q_equals_the_label_and_the_minimum_is_the_entropy():
    _, q_hat, weight = random_labels(100)
    best = torch.logit(q_hat.double()).requires_grad_()
    loss = bce_loss(best, q_hat.double(), weight.double())
    loss.backward()
    assert best.grad.abs().max() < 1e-9
    entropy = float(label_entropy(q_hat.double(), weight.double()))
    assert loss.item() == pytest.approx(entropy, rel=1e-9)
    for seed in range(10):
        other = best.detach() + 0.3 * torch.from_numpy(np.random.default_rng(seed).normal(size=100))
        assert bce_loss(other, q_hat.double(), weight.double()) > entropy + 0.01


def test_the_entropy_of_certain_labels_is_0_and_of_even_ones_log_2():
    assert label_entropy(torch.tensor([0.0, 1.0]), torch.ones(2)) == 0
    entropy = label_entropy(torch.full((3,), 0.5), torch.tensor([1.0, 0.5, 0.5]))
    assert float(entropy) == pytest.approx(2 * np.log(2))


def test_bt_is_a_bernoulli_of_the_difference_with_its_gradient():
    f, g = random_labels(50)[0].requires_grad_(), random_labels(50, 1)[0].requires_grad_()
    want = F.binary_cross_entropy_with_logits(f - g, torch.ones(50), reduction="none")
    torch.testing.assert_close(bt_loss(f, g), want)
    torch.testing.assert_close(bt_loss(f + 3, g + 3), want, atol=1e-5, rtol=1e-4)
    bt_loss(f, g).sum().backward()
    step = torch.sigmoid(f - g).detach() - 1
    torch.testing.assert_close(f.grad, step)
    torch.testing.assert_close(g.grad, -step)


def test_promise_and_progress_on_the_example_of_the_method():
    M = np.array([0.5, 0.6, 0.8])
    q_hat, advantage = td_gae(M, 0.4, 1.0, 0.95, 0.95)
    np.testing.assert_allclose(advantage, [0.4640, 0.4310, 0.4], atol=5e-5)
    np.testing.assert_allclose(q_hat, [0.8640, 0.9310, 1.0], atol=5e-5)
    losses = promise_progress_loss(*map(torch.from_numpy, (M, q_hat, advantage)), 1.0)
    squares = torch.from_numpy((M - q_hat) ** 2)
    torch.testing.assert_close(losses, squares * torch.tensor([1, 2, 2]))  # L_A equals L_Q


@pytest.mark.parametrize("T", (1, 2, 7))
def test_promise_and_progress_against_a_loop_and_finite_differences(T):
    rng, beta = np.random.default_rng(T), 0.7
    m, q_hat, advantage = rng.random((3, T))

    def loop(m):
        return [(m[t] - q_hat[t]) ** 2
                + (beta * (m[t] - m[t - 1] - advantage[t]) ** 2 if t else 0) for t in range(T)]

    M = torch.from_numpy(m).requires_grad_()
    losses = promise_progress_loss(M, torch.from_numpy(q_hat), torch.from_numpy(advantage), beta)
    np.testing.assert_allclose(losses.detach(), loop(m))
    losses.sum().backward()
    h = 1e-6
    numeric = [(sum(loop(m + h * unit)) - sum(loop(m - h * unit))) / (2 * h) for unit in np.eye(T)]
    np.testing.assert_allclose(M.grad, numeric, atol=1e-6)  # also through M_{t−1}


# --- one pass over a trajectory ------------------------------------------------------------------

@torch.no_grad()
def test_q_at_every_action_in_one_pass_equals_one_sequence_for_each_action():
    model, some = random_model(head="score"), [*played()[:6], *played()[-3:]]
    assert len({len(t.ids) for t in some}) > 3
    f = lambda ids: float(model.scores(model(torch.as_tensor(ids, dtype=torch.long)[None]))[0, -1])
    want = [[f(t.ids[:end]) for _, end in t.spans] for t in some]
    assert np.std(sum(want, [])) > 0.1
    for got, alone, row, t in zip(at_actions(model, some), score(model, some, 4), want, some):
        np.testing.assert_allclose(got, row, atol=1e-4)
        np.testing.assert_allclose(alone, row, atol=1e-4)
    start = [f(t.ids[:t.spans[0, 0]]) for t in some]
    np.testing.assert_allclose(at_start(model, some), start, atol=1e-4)


# --- objectives ----------------------------------------------------------------------------------

def with_labels(some, seed=0):
    """Random labels of the right shape: [(q_hat (T,), weight (T,))]."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.random((2, len(t))).astype(np.float32)) for t in some]


def gradient(model, losses):
    model.zero_grad()
    sum(losses).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_bce_objective_is_a_loop_over_the_actions():
    model, some = random_model(head="score"), played()[:12]
    labels, picked = with_labels(some), [7, 2, 5]
    objective = bce_objective(some, labels)
    loss, metrics = objective(model, picked, 3, 0)
    mean = np.mean([w.sum() for _, w in labels])
    total = entropy = 0
    for i in picked:
        for f, y, w in zip(score(model, [some[i]])[0], *labels[i]):
            total += w * F.softplus(torch.tensor(f)).item() - w * y * f
            entropy -= w * (y * np.log(y) + (1 - y) * np.log(1 - y))
    assert loss.item() == pytest.approx(total / (3 * mean), rel=1e-4)
    assert metrics["loss"][0].item() == loss.item()
    assert float(metrics["excess"][0]) == pytest.approx((total - entropy) / (3 * mean), rel=1e-3)


def pairs_of(some):
    """Each action of `look around` type against another one: [(k, ids of a⁻)] a trajectory."""
    look = np.array([*tokenizer().encode("look"), END], np.int32)
    other = np.array([*tokenizer().encode("inventory"), END], np.int32)
    found = [[(k, look if k % 2 else other) for k in range(0, len(t), 1 + i % 3)] if i % 4 else []
             for i, t in enumerate(some)]
    return [[(k, a) for k, a in pairs if t.ids[slice(*t.spans[k])].tolist() != a.tolist()]
            for t, pairs in zip(some, found)]


def naive_gaps(model, t, pairs):
    """f(s, a⁺) − f(s, a⁻), each action as a sequence of its own."""
    f = lambda ids: model.scores(model(torch.as_tensor(ids, dtype=torch.long)[None]))[0, -1]
    return [f(t.ids[:t.spans[k, 1]]) - f(np.concatenate([t.ids[:t.spans[k, 0]], worse]))
            for k, worse in pairs]


def test_the_bt_objective_is_a_loop_over_the_pairs_with_its_gradient():
    model, some = random_model(head="score"), played()[:12]
    pairs, picked = pairs_of(some), [1, 4, 6, 3]
    loss, metrics = bt_objective(some, pairs, tokenizer())(model, picked, 4, 0)
    mean = np.mean([len(found) for found in pairs])
    gaps = torch.stack([gap for i in picked for gap in naive_gaps(model, some[i], pairs[i])])
    assert len(gaps) > 8 and 0 < (gaps > 0).float().mean() < 1
    want = -F.logsigmoid(gaps).sum() / (4 * mean)
    assert loss.item() == pytest.approx(float(want), rel=1e-4)
    right, n = metrics["accuracy"]
    assert (int(right), n) == (int((gaps > 0).sum()), len(gaps))
    ours, naive = gradient(model, [loss]), gradient(model, [want])
    torch.testing.assert_close(ours, naive, atol=1e-4 * float(naive.abs().max()), rtol=1e-3)


def test_a_batch_without_pairs_has_no_loss():
    loss, metrics = bt_objective(played()[:4], [[]] * 4, tokenizer())(random_model(head="score"),
                                                                     [0, 1], 2, 0)
    assert loss is None and metrics.get("loss", (0,))[0] == 0


def test_the_promise_objective_is_a_loop_with_labels_of_the_current_prm():
    model, some, picked = random_model(head="score", scale=0.1), played()[:12], [7, 2, 5]
    seen = []

    def targets(i, M, v_0):
        seen.append((i, M, v_0))
        return td_gae(M, v_0, some[i].reward, 0.95, 0.95)

    loss, _ = promise_progress_objective(some, targets, beta=0.5)(model, picked, 3, 0)
    sigmoid, total = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64))), 0
    for i, (number, M, v_0) in zip(picked, seen):
        want = sigmoid(score(model, [some[i]])[0])
        with torch.no_grad():
            start = sigmoid(at_start(model, [some[i]]))[0]
        assert number == i and v_0 == pytest.approx(start, abs=1e-5)
        np.testing.assert_allclose(M, want, atol=1e-5)
        q_hat, advantage = td_gae(want, start, some[i].reward, 0.95, 0.95)
        for t, m in enumerate(want):
            total += (m - q_hat[t]) ** 2
            total += 0.5 * (m - want[t - 1] - advantage[t]) ** 2 if t else 0
    assert loss.item() == pytest.approx(total / (3 * np.mean([len(t) for t in some])), rel=1e-4)
    assert loss.requires_grad  # while the labels are constants: M was detached


@pytest.mark.parametrize("make", ("bce", "bt", "promise"))
def test_the_parts_of_a_batch_add_up_to_it(make):
    """Ranks share a batch: loss, gradient and logged mean are those of the whole."""
    model, some = random_model(head="score"), played()[:12]
    if make == "bce":
        objective = bce_objective(some, with_labels(some))
    elif make == "bt":
        objective = bt_objective(some, pairs_of(some), tokenizer())
    else:
        objective = promise_progress_objective(some, lambda i, M, v_0: with_labels(some)[i])
    picked = [3, 9, 1, 6, 4]
    whole, metrics = objective(model, picked, 5, 0)
    parts = [objective(model, picked[:2], 5, 0), objective(model, picked[2:], 5, 0)]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-4)
    for name, (total, n) in metrics.items():
        gathered = [sum(float(m[name][k]) for _, m in parts) for k in (0, 1)]
        assert gathered[0] / gathered[1] == pytest.approx(float(total) / float(n), rel=1e-4), name
    a, b = gradient(model, [whole]), gradient(model, [loss for loss, _ in parts])
    torch.testing.assert_close(b, a, atol=1e-4 * float(a.abs().max()), rtol=1e-3)


# --- training ------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch, epochs", ((64, 16, 1), (17, 16, 5), (5, 16, 3), (100, 8, 0.3)))
def test_every_update_gets_a_batch_and_an_epoch_sees_each_trajectory_once(n, batch, epochs,
                                                                          monkeypatch):
    seen, model = [], random_model(head="score")
    monkeypatch.setattr(prms, "optimise", lambda prm, loss_of, updates, **_: [
        loss_of(step) for step in range(updates)])
    fit(model, n, lambda prm, picked, share, step: seen.append(list(picked)) or (share, step),
        Fit(batch=batch, epochs=epochs), 0, None)
    assert len(seen) == max(1, round(epochs * -(-n // batch)))
    assert all(0 < len(picked) <= batch for picked in seen)
    flat = sum(seen, [])
    for k in range(0, len(flat) - n + 1, n):
        assert sorted(flat[k:k + n]) == list(range(n))


def first_action_decides():
    """Pairs of episodes that differ in the first action alone: won by one, lost by the other."""
    out, look = [], np.array([*tokenizer().encode("look"), END], np.int32)
    for t in played():
        start, end = t.spans[0]
        if t.ids[start:end].tolist() == look.tolist():
            continue
        for action, won in ((t.ids[start:end], True), (look, False)):
            one = copy.copy(t)
            one.ids = np.concatenate([t.ids[:start], action])
            one.spans = np.array([[start, start + len(action)]], np.int32)
            one.won, one.reward, one.truncated = won, float(won), not won
            out.append(one)
    return out


def test_fitting_lowers_the_excess_on_trajectories_that_were_held_out(tmp_path):
    """Of games that the PRM has not seen, it learns that looking around does not win."""
    everything = first_action_decides()
    held = {t.game for t in everything[-16:]}
    train, test = ([t for t in everything if (t.game in held) == out] for out in (False, True))
    labels, table = {}, q_table(test, tokenizer(), 0.95)
    for name, some in (("train", train), ("test", test)):
        labels[name] = labels_of(some, q_table(some, tokenizer(), 0.95))
    gained = np.concatenate([returns(t, 0.95) for t in test])
    start, pairs = taught().with_score_head(), preference_pairs(test, table, 0.03)
    model = copy.deepcopy(start)
    log = fit(model, len(train), bce_objective(train, labels["train"]), Fit(lr=1e-2, epochs=6), 0,
              tmp_path / "state")
    before, after = (validation_metrics(one, test, labels["test"], gained)
                     for one in (start, model))
    assert before["excess_bce"] == pytest.approx(np.log(2) - before["label_entropy"], abs=1e-5)
    assert after["excess_bce"] < 0.3 * before["excess_bce"] and after["pearson_returns"] > 0.8
    assert log[-1]["excess"] < 0.5 * log[0]["excess"]
    assert pair_accuracy(start, test, pairs, tokenizer()) == 0  # ties are no correct ranking
    assert pair_accuracy(model, test, pairs, tokenizer()) > 0.9


def test_the_seed_decides_the_training(tmp_path):
    some, runs = first_action_decides()[:24], []
    for k, seed in enumerate((1, 1, 2)):
        model = taught().with_score_head()
        objective = bce_objective(some, with_labels(some))
        runs.append((model, fit(model, 24, objective, Fit(batch=8), seed, tmp_path / str(k))))
    (a, log_a), (b, log_b), (c, _) = runs
    assert same(a, b) and log_a == log_b and not same(a, c)


@pytest.mark.parametrize("kind", ("bt", "td-gae"))
def test_the_other_objectives_learn_to_rank_too(kind, tmp_path):
    some = first_action_decides()
    pairs = preference_pairs(some, q_table(some, tokenizer(), 0.95), 0.03)
    objective = bt_objective(some, pairs, tokenizer()) if kind == "bt" else \
        promise_progress_objective(some, lambda i, M, v_0: td_gae(M, v_0, some[i].reward, 1, 0.95))
    model = taught().with_score_head()
    fit(model, len(some), objective, Fit(lr=5e-3, epochs=3), 0, tmp_path / "state")
    assert pair_accuracy(model, some, pairs, tokenizer()) > 0.8


# --- validation ----------------------------------------------------------------------------------

@torch.no_grad()
def test_pair_accuracy_counts_the_pairs_that_f_ranks_as_q_hat_does():
    model, some = random_model(head="score"), played()[:12]
    pairs = pairs_of(some)
    gaps = [float(gap) for t, found in zip(some, pairs) for gap in naive_gaps(model, t, found)]
    share = np.mean([gap > 0 for gap in gaps])
    assert 0.1 < share < 0.9 and len(gaps) > 20
    assert pair_accuracy(model, some, pairs, tokenizer()) == pytest.approx(share)
    assert pair_accuracy(model, some, [[]] * 12, tokenizer()) is None


def metrics_of(monkeypatch, q, q_hat, gained, weight=None, bins=10):
    """validation_metrics of a PRM that says q."""
    q = np.array(q)
    monkeypatch.setattr(prms, "score", lambda prm, some: [np.log(q / (1 - q)).astype(np.float32)])
    weight = np.ones(len(q)) if weight is None else np.array(weight)
    labels = [(np.array(q_hat, np.float32), weight.astype(np.float32))]
    return validation_metrics(None, None, labels, np.array(gained, np.float64), bins)


def test_a_prm_that_says_the_labels_has_no_excess_and_is_calibrated(monkeypatch):
    q = np.random.default_rng(0).uniform(0.01, 0.99, 200)
    told = metrics_of(monkeypatch, q, q, q)
    assert told["excess_bce"] == pytest.approx(0, abs=1e-6) and told["ece"] < 1e-6
    assert told["pearson_q_hat"] == pytest.approx(1) and told["actions"] == 200
    assert told["mean_q"] == pytest.approx(told["mean_return"])


def test_calibration_by_hand(monkeypatch):
    """Four actions in two bins, gaps of 0.05 and 0.4."""
    told = metrics_of(monkeypatch, [0.1, 0.2, 0.7, 0.9], [0, 0, 1, 1], [0, 0.4, 0.8, 0], bins=2)
    assert told["calibration"] == [(pytest.approx(0.15), pytest.approx(0.2), 2),
                                   (pytest.approx(0.8), pytest.approx(0.4), 2)]
    assert told["ece"] == pytest.approx((0.05 + 0.4) / 2)
    bce = -np.mean(np.log([0.9, 0.8, 0.7, 0.9]))
    assert told["bce"] == pytest.approx(bce, rel=1e-5) and told["label_entropy"] == 0
    assert told["excess_bce"] == told["bce"]


def test_weights_count_in_the_loss_alone(monkeypatch):
    told = metrics_of(monkeypatch, [0.1, 0.5], [0, 1], [0, 1], weight=[3, 1])
    assert told["bce"] == pytest.approx(-(3 * np.log(0.9) + np.log(0.5)) / 4, rel=1e-5)
    assert told["mean_q"] == pytest.approx(0.3)


def test_q_of_1_falls_into_the_last_bin_and_constant_q_has_no_correlation(monkeypatch):
    told = metrics_of(monkeypatch, [1 - 1e-9] * 4, [1, 1, 1, 0], [1, 1, 1, 0])
    assert [n for *_, n in told["calibration"]] == [4] and told["pearson_returns"] is None
