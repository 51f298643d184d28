"""The PRM: its loss against torch's, one pass over a trajectory against a sequence for every action, and that it learns."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import prm as prm_module
from common import pad
from prm import (Objective, actions_of, answers_loss, batches, bce_loss, bt_loss, fit_labels, label_entropy, pair_gaps, prefer, promise_and_progress,
                 promise_progress_loss, report, score, scores_at, share_right, states_of, train_prm)
from qestimate import labels_of, preference_pairs, q_table, state_labels, td_gae
from tiny import as_it_is, tell, expert_trajectories, played, random_model, taught, tokenizer
from tokenizer import END


def random_labels(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g) * 3, torch.rand(n, generator=g), torch.rand(n, generator=g) + 0.1


# --- the loss ------------------------------------------------------------------------------------------------------------------

def test_bce_is_torchs_weighted_mean():
    f, q_hat, weight = random_labels(100)
    each = F.binary_cross_entropy(f.double().sigmoid(), q_hat.double(), reduction="none")
    assert float(bce_loss(f, q_hat, weight)) == pytest.approx(float((each * weight).sum() / weight.sum()), rel=1e-5)
    assert float(bce_loss(f, q_hat, torch.ones(100))) == pytest.approx(float(F.binary_cross_entropy_with_logits(f, q_hat)), rel=1e-6)
    assert float(bce_loss(f, q_hat, weight)) == pytest.approx(float(bce_loss(f, q_hat, 7 * weight)), rel=1e-5)


def test_an_action_seen_k_times_weighs_as_one_seen_once():
    f, q_hat = torch.tensor([2.0, -1.0]), torch.tensor([0.3, 0.8])
    once = bce_loss(f, q_hat, torch.ones(2))
    torch.testing.assert_close(bce_loss(f[[0, 0, 0, 1]], q_hat[[0, 0, 0, 1]], torch.tensor([1, 1, 1, 3]) / 3), once)


def test_the_labels_entropy_is_the_least_loss_there_is():
    f, q_hat, weight = random_labels(100)
    q_hat[:2] = torch.tensor([0.0, 1.0])
    entropy = float(label_entropy(q_hat, weight))
    best = torch.logit(q_hat, eps=1e-7)
    assert float(bce_loss(best, q_hat, weight)) == pytest.approx(entropy, abs=1e-5)
    for seed in range(20):
        assert bce_loss(best + 0.5 * random_labels(100, seed)[0], q_hat, weight) > entropy + 0.01
    assert label_entropy(torch.tensor([0.0, 1.0]), torch.ones(2)) == 0
    assert float(label_entropy(torch.full((3,), 0.5), torch.ones(3))) == pytest.approx(np.log(2))


def test_the_relative_loss_is_a_bernoulli_of_the_difference():
    f, g = random_labels(50)[0], random_labels(50, 1)[0]
    torch.testing.assert_close(bt_loss(f, g), F.binary_cross_entropy_with_logits(f - g, torch.ones(50), reduction="none"))
    torch.testing.assert_close(bt_loss(f + 3, g + 3), bt_loss(f, g), atol=1e-5, rtol=1e-4)  # a constant of the state does not matter


def test_promise_and_progress_written_out():
    rng = np.random.default_rng(0)
    for T in (1, 2, 7):
        M, q_hat, advantage = (torch.from_numpy(rng.random(T)) for _ in range(3))
        M.requires_grad_()
        ours = promise_progress_loss(M, q_hat, advantage, 0.7)
        expected = [(M[t] - q_hat[t]) ** 2 + (0.7 * (M[t] - M[t - 1] - advantage[t]) ** 2 if t else 0) for t in range(T)]
        torch.testing.assert_close(ours, torch.stack(expected))
        ours.sum().backward()
        step = [2 * (M[t] - q_hat[t]) + (1.4 * (M[t] - M[t - 1] - advantage[t]) if t else 0) - (1.4 * (M[t + 1] - M[t] - advantage[t + 1]) if t + 1 < T else 0)
                for t in range(T)]
        torch.testing.assert_close(M.grad, torch.stack(step).detach())  # through M_{t−1} too
    # with labels that bootstrap on M itself the two losses are equal in value at t > 0
    M = torch.from_numpy(rng.random(6))
    q_hat, advantage = map(torch.from_numpy, td_gae(M.numpy(), 0.2, 1.0, 0.95, 0.95))
    losses = promise_progress_loss(M, q_hat, advantage, 1.0)
    torch.testing.assert_close(losses[1:], 2 * (M - q_hat)[1:] ** 2)


# --- scores ----------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_one_pass_over_a_batch_scores_as_one_sequence_for_every_action():
    """The public code encodes prefix and action anew for every action; the score at the <end> of each must be the same."""
    model, trajectories = random_model(head="score"), [*played()[:6], *expert_trajectories()[:6]]
    scores = lambda part: scores_at(model, model(pad([t.ids for t in part])), actions_of(part))
    batch, alone = scores(trajectories), torch.cat([scores([t]) for t in trajectories])
    separate = torch.stack([model.scores(model(torch.as_tensor(t.ids[:end], dtype=torch.long)[None]))[0, -1] for t in trajectories for _, end in t.spans])
    assert separate.std() > 0.1
    torch.testing.assert_close(batch, separate, atol=1e-4, rtol=0)
    torch.testing.assert_close(alone, separate, atol=1e-4, rtol=0)
    for batch_size in (1, 5, 64):
        parts = score(model, trajectories, batch_size)
        assert [len(p) for p in parts] == [len(t) for t in trajectories]
        np.testing.assert_allclose(np.concatenate(parts), separate, atol=1e-4)


def test_a_batch_has_the_gradient_of_its_parts():
    """Split in two, each half weighing by its labels' weights: the same gradient."""
    trajectories, model = played()[:8], random_model(head="score")
    labels = labels_of(trajectories, q_table(trajectories, tokenizer(), 0.95))
    labels = [(np.random.default_rng(i).random(len(q)).astype(np.float32), w) for i, (q, w) in enumerate(labels)]

    def gradient(parts):
        model.zero_grad()
        total = sum(float(w.sum()) for _, w in labels)
        for part in parts:
            q_hat, weight = (torch.from_numpy(np.concatenate([labels[i][k] for i in part])) for k in (0, 1))
            f = scores_at(model, model(pad([trajectories[i].ids for i in part])), actions_of([trajectories[i] for i in part]))
            (bce_loss(f, q_hat, weight) * weight.sum() / total).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient([range(8)])
    assert whole.norm() > 0.01
    for parts in ([range(3), range(3, 8)], [[i] for i in range(8)]):
        torch.testing.assert_close(gradient(parts), whole, atol=1e-4 * float(whole.abs().max()), rtol=1e-3)


# --- batches ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, batch", ((1, 4), (7, 3), (100, 8), (1000, 4), (33, 32), (256, 32), (257, 32)))
def test_every_epoch_takes_each_trajectory_once(n, batch):
    stream, order = batches(n, batch, np.random.default_rng(1)), []
    for _ in range(3):
        epoch = [next(stream) for _ in range(-(-n // batch))]
        assert sorted(np.concatenate(epoch).tolist()) == list(range(n))
        assert max(map(len, epoch)) <= batch
        order.append(np.concatenate(epoch).tolist())
    assert n < 5 or order[0] != order[1]
    together = [{frozenset(b.tolist()) for b in epoch} for epoch in ([next(stream) for _ in range(-(-n // batch))] for _ in range(2))]
    assert n < 2 * batch or together[0] != together[1]  # not the same ones side by side every time


# --- learning ----------------------------------------------------------------------------------------------------------------------

def toy():
    """Episodes of the expert: the nearer the end, the higher the label."""
    trajectories = expert_trajectories()
    return trajectories, labels_of(trajectories, q_table(trajectories, tokenizer(), 0.95))


def first_action_decides():
    """Each episode of the expert, and one in its place that looks around at once and is lost."""
    trajectories = []
    for t in (t for t in expert_trajectories() if len(t) > 2):
        look = np.array([*tokenizer().encode("look"), END], np.int32)
        start, end = t.spans[0]
        lost = copy.copy(t)
        lost.ids, lost.spans = np.concatenate([t.ids[:start], look]), np.array([[start, start + len(look)]])
        lost.won, lost.reward, lost.inadmissible = False, 0.0, t.inadmissible[:1]
        trajectories += [t, lost]
    return trajectories


def fit(tmp_path, seed=0, epochs=8, **options):
    trajectories, labels = toy()
    model = taught().with_score_head()
    log = train_prm(model, trajectories, fit_labels(labels, actions_of(trajectories)), tell(), epochs=epochs, lr=1e-2, batch=16, seed=seed, state=tmp_path / f"{seed}", **options)
    return model, log


def test_training_drives_the_excess_loss_down_and_orders_the_actions(tmp_path):
    model, log = fit(tmp_path)
    assert np.median([entry["excess"] for entry in log[-5:]]) < 0.4 * log[0]["excess"]  # one entry may be of a few odd episodes
    assert all(abs(entry["loss"] - entry["excess"]) < 1 for entry in log)
    trajectories, labels = toy()
    table = q_table(trajectories, tokenizer(), 0.95)
    told = report(model, trajectories, labels, table, [])
    assert told["pearson_returns"] > 0.6 and told["excess_bce"] < 0.15 and told["ece"] < 0.1
    # nearer the win, the higher
    wins = [f for f, t in zip(score(model, trajectories), trajectories) if t.won and len(t) > 4]
    assert np.mean([f[-1] > f[0] for f in wins]) > 0.9


def test_the_same_head_learns_the_values_of_states_from_the_tokens_before_the_action(tmp_path):
    """Of episodes that are won by one first action and lost by another, Q knows which, and V that it is half and half."""
    trajectories = first_action_decides()
    table = q_table(trajectories, tokenizer(), 0.95)
    values = state_labels(trajectories, table)
    model = taught().with_score_head()
    log = train_prm(model, trajectories, fit_labels(labels_of(trajectories, table), actions_of(trajectories)), tell(), epochs=8, lr=5e-3, batch=16, seed=0,
                    state=tmp_path / "state", value=fit_labels(values, states_of(trajectories)))
    assert log[-1]["value/excess"] < 0.4 * log[0]["value/excess"] and log[-1]["excess"] < 0.4 * log[0]["excess"]
    q, v = ([1 / (1 + np.exp(-f[0])) for f in score(model, trajectories, places=places)] for places in (actions_of, states_of))
    wins, losses = range(0, len(q), 2), range(1, len(q), 2)
    between = [q[lost] < v[won] < q[won] for won, lost in zip(wins, losses) if trajectories[won].won]
    assert np.mean(between) > 0.9
    assert all(v[won] == pytest.approx(v[lost], abs=1e-4) for won, lost in zip(wins, losses))  # the action is not seen yet


def test_the_seed_names_the_training(tmp_path):
    (a, log_a), (b, log_b), (c, _) = (fit(tmp_path / str(i), seed, epochs=1) for i, seed in enumerate((1, 1, 2)))
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and log_a == log_b and not torch.equal(weights[0], weights[2])


def test_an_action_weighs_the_same_in_a_batch_of_short_episodes_and_in_one_of_long_ones(tmp_path):
    trajectories, batch, losses = expert_trajectories()[:48], 4, []
    assert min(map(len, trajectories)) < max(map(len, trajectories)) / 2
    model = random_model(head="score")

    def mean(f, picked, total):
        losses.append(float(torch.cat(f).detach().sum() / total))
        return torch.cat(f).sum() / total, {}

    expected = np.concatenate(score(model, trajectories)).mean()
    objective = Objective(mean, actions_of(trajectories), [len(t) for t in trajectories])
    train_prm(model, trajectories, objective, as_it_is, epochs=1, lr=1e-12, batch=batch, seed=0, state=tmp_path / "state")
    assert len(losses) == len(trajectories) // batch and np.mean(losses) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_pairs_are_scored_as_separate_sequences_are(tmp_path):
    """What `prefer` reads behind a trajectory and its branches, against one sequence for every action of a pair."""
    model, trajectories, rng = random_model(head="score"), played()[:6], np.random.default_rng(0)
    pairs = [[(int(k), rng.integers(6, len(tokenizer()), rng.integers(1, 6))) for k in rng.choice(len(t), n)] for t, n in zip(trajectories, (2, 0, 1, 3, 0, 5))]
    f = lambda ids: model.scores(model(torch.as_tensor(ids, dtype=torch.long)[None]))[0, -1]
    expected = torch.stack([bt_loss(f(t.ids[:t.spans[k, 1]]), f(np.concatenate([t.ids[:t.spans[k, 0]], other])))
                            for t, found in zip(trajectories, pairs) for k, other in found]).mean()
    seen = []
    objective = prefer(trajectories, pairs)
    loss = objective.loss
    objective.loss = lambda *a: seen.append(loss(*a)) or (torch.zeros((), requires_grad=True), {})
    with torch.enable_grad():
        train_prm(model, trajectories, objective, as_it_is, epochs=1, lr=1e-9, batch=6, seed=0, state=tmp_path / "state", obs_weight=0)
    torch.testing.assert_close(seen[0][0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("head", ("score", "relative"))
def test_a_gap_is_the_difference_of_q_or_of_f_each_action_read_by_itself(head):
    model, trajectories, look = random_model(head=head), played()[:4], np.array([*tokenizer().encode("look"), END])
    pairs = [[(k, look) for k in range(0, len(t), 2)] for t in trajectories]
    expected = []
    for t, found in zip(trajectories, pairs):
        for k, worse in found:
            start, end = t.spans[k]
            with torch.no_grad():
                better, worse = (float(model.scores(model(torch.from_numpy(np.concatenate([t.ids[:start], action])[None].astype(np.int64)))[0, -1])) for action in (t.ids[start:end], worse))
            expected.append(better - worse if head == "relative" else 1 / (1 + math.exp(-better)) - 1 / (1 + math.exp(-worse)))
    gaps = pair_gaps(model, trajectories, pairs)
    assert gaps == pytest.approx(expected, abs=1e-4) and max(gaps) > 0.01 and min(gaps) < -0.01
    assert share_right(gaps) == np.mean([gap > 0 for gap in expected]) and share_right(gaps[:0]) is None


@pytest.mark.parametrize("kind", ("bt", "td-gae"))
def test_other_objectives_learn_too(tmp_path, kind):
    """Won or lost by the first action: the PRM learns which is better, by preferences or by labels of its own."""
    trajectories = first_action_decides()
    table = q_table(trajectories, tokenizer(), 0.95)
    if kind == "bt":
        pairs, told = preference_pairs(trajectories, table, 0.03)
        assert told["pairs"] > 20
        objective = prefer(trajectories, pairs)
        assert share_right(pair_gaps(taught().with_score_head(), trajectories, pairs)) < 0.1 and share_right(pair_gaps(taught().with_score_head(), trajectories, [[]])) is None
    else:
        objective = promise_and_progress(trajectories, lambda i, M: td_gae(M, 0.0, trajectories[i].reward, 0.95, 0.95), 1.0)
    model = taught().with_score_head()
    log = train_prm(model, trajectories, objective, tell(), epochs=4, lr=5e-3, batch=16, seed=0, state=tmp_path / "state")
    if kind == "bt":
        assert share_right(pair_gaps(model, trajectories, pairs)) > 0.8
    f = score(model, trajectories)
    assert np.mean([a[0] > b[0] for a, b, t in zip(f[0::2], f[1::2], trajectories[0::2]) if t.won]) > 0.9
    if kind == "td-gae":
        assert log[-1]["promise"] < 0.3 * log[0]["promise"]
        assert abs(np.mean([1 / (1 + np.exp(-x[-1])) for x, t in zip(f, trajectories) if t.won]) - 1) < 0.25


@torch.no_grad()
def test_the_loss_on_answers_is_the_mean_over_what_the_world_said():
    model, trajectories = random_model(head="score"), played()[:5]
    ids = pad([t.ids for t in trajectories])
    loss = answers_loss(model, model(ids), ids, [t.spans for t in trajectories])
    said = []
    for t in trajectories:
        one = torch.as_tensor(t.ids, dtype=torch.long)
        logp = model.logits(model(one[None]))[0].log_softmax(-1)
        mine = {place for start, end in t.spans for place in range(start, end)}
        said += [-logp[place - 1, one[place]] for place in range(int(t.spans[0, 0]), len(one)) if place not in mine]
    torch.testing.assert_close(loss, torch.stack(said).mean())


def test_every_pass_tells_other_numbers(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(prm_module, "pad", lambda ids: seen.append([tuple(i) for i in ids]) or pad(ids))
    trajectories, labels = toy()
    for name, telling, times in (("anew", tell(), 6), ("as it is", as_it_is, 1)):
        seen.clear()
        train_prm(taught().with_score_head(), trajectories[:4], fit_labels(labels[:4], actions_of(trajectories[:4])), telling, epochs=6, lr=1e-3, batch=4, seed=0,
                  state=tmp_path / name)
        told = Counter(ids for batch in seen for ids in batch)
        assert len(seen) == 6 and len(told) == 4 * times


# --- the report card -----------------------------------------------------------------------------------------------------------------

def test_report_on_a_prm_that_knows_the_labels(monkeypatch):
    trajectories, labels = toy()
    table = q_table(trajectories, tokenizer(), 0.95)
    monkeypatch.setattr(prm_module, "score", lambda *_: [np.float32(torch.logit(torch.from_numpy(q), eps=1e-7)) for q, _ in labels])
    told = report(taught().with_score_head(), trajectories, labels, table, [], bins=50)
    assert told["excess_bce"] == pytest.approx(0, abs=1e-5) and told["pearson_q_hat"] == pytest.approx(1)
    assert told["ece"] < 0.02 and told["mean_q"] == pytest.approx(told["mean_return"], abs=1e-5)
    assert told["actions"] == sum(n for *_, n in told["calibration"]) == sum(map(len, trajectories))


def test_report_on_a_prm_that_always_says_the_same():
    """Q = 0.7 everywhere: one bin, and the gap to the mean return is the calibration error."""
    trajectories, labels = toy()
    table = q_table(trajectories, tokenizer(), 0.95)
    model = taught().with_score_head()
    model.score.bias.data.fill_(float(torch.logit(torch.tensor(0.7))))
    told, G = report(model, trajectories, labels, table, []), table["returns"]
    assert told["calibration"] == [(pytest.approx(0.7), pytest.approx(G.mean()), len(G))]
    assert told["ece"] == pytest.approx(abs(0.7 - G.mean()), abs=1e-5) and told["mean_q"] == pytest.approx(0.7)
    assert told["pearson_returns"] is None
    q, w = (np.concatenate(part) for part in zip(*labels))
    assert told["bce"] == pytest.approx(-(w * (q * np.log(0.7) + (1 - q) * np.log(0.3))).sum() / w.sum(), rel=1e-4)
    assert told["bce"] - told["label_entropy"] == pytest.approx(told["excess_bce"])


def test_report_by_bins(monkeypatch):
    """Two bins by hand, against returns: Q 0.1 where half is won, Q 0.9 where all is won."""
    t = copy.copy(played()[0])
    t.spans = t.spans[:4]
    table = {"returns": np.array([0.0, 1.0, 1.0, 1.0])}
    labels = [(np.array([0.2, 0.2, 0.7, 0.7], np.float32), np.ones(4, np.float32))]
    monkeypatch.setattr(prm_module, "score", lambda *_: [np.float32(torch.logit(torch.tensor([0.1, 0.1, 0.9, 0.9])))])
    told = report(taught().with_score_head(), [t], labels, table, [])
    assert told["calibration"] == [(pytest.approx(0.1), 0.5, 2), (pytest.approx(0.9), 1.0, 2)]
    assert told["ece"] == pytest.approx((0.4 * 2 + 0.1 * 2) / 4)
