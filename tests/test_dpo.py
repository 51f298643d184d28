"""Stage 3: losses against trl and the closed form, and policies that move where the judge says."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
from candidates import expected, kl, score_states, tilt
from dpo import Batch, Improve, dpo_loss, exact_loss, improve, policy_loss, prm_judge
from rollout import replay
from tiny import (brute_force, by_id, played, prm, random_model, same, some_states, taught,
                  tokenizer)
from tokenizer import END
from utils import pad, save_model


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- losses --------------------------------------------------------------------------------------

def test_the_loss_is_the_papers_formula_term_by_term():
    a, b, c, d = -random_logits(4, 30).abs().double()
    for beta in (0.03, 0.1, 1.0):
        margin = beta * ((a - c) - (b - d))
        torch.testing.assert_close(dpo_loss(a, b, c, d, beta), torch.log1p((-margin).exp()))
    torch.testing.assert_close(dpo_loss(a, b, a, b, 0.1), torch.full((30,), np.log(2)).double())


def test_a_soft_label_is_the_cross_entropy_and_its_gradient_vanishes_where_margin_is_its_logit():
    a, b, c, d = random_logits(4, 30).double()
    label = torch.rand(30, generator=torch.Generator().manual_seed(1)).double()
    want = torch.nn.functional.binary_cross_entropy_with_logits(
        0.3 * ((a - c) - (b - d)), label, reduction="none")
    torch.testing.assert_close(dpo_loss(a, b, c, d, 0.3, label), want)
    a = (torch.logit(label) / 0.3 + (b - d) + c).requires_grad_()
    dpo_loss(a, b, c, d, 0.3, label).sum().backward()
    assert a.grad.abs().max() < 1e-9


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl about transformers
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_hard_and_soft_labels_are_trls_loss_and_gradient(smoothing, tmp_path):
    """trl's DPOTrainer on our saved models and padded pairs; its label smoothing is a soft label.

    Its loss "robust" is the smoothed loss, (1−ε)·L(+) − ε·L(−), over 1 − 2ε; "sigmoid" has none.
    """
    trl, transformers, datasets = (pytest.importorskip(name)
                                   for name in ("trl", "transformers", "datasets"))
    policy, reference = random_model(0), random_model(1)
    for name, model in (("policy", policy), ("reference", reference)):
        save_model(tmp_path / name, model, tokenizer())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    words.pad_token, words.eos_token = "<pad>", "<end>"
    load = transformers.AutoModelForCausalLM.from_pretrained
    trainer = trl.DPOTrainer(
        *(load(tmp_path / name) for name in ("policy", "reference")), processing_class=words,
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.1, report_to="none", use_cpu=True,
                           loss_type="robust" if smoothing else "sigmoid", bf16=False,
                           label_smoothing=smoothing),
        train_dataset=datasets.Dataset.from_list([{"prompt": "go", "chosen": " to",
                                                   "rejected": " on"}]))
    sequences, states = some_states(8)
    rows, starts = [], []
    for k in (0, 1):  # the first two candidates of each state
        for b, start, tree in states:
            ids = [*tokenizer().encode(tree.commands[k]), END]
            rows.append([*sequences[b][:start].tolist(), *ids])
            starts.append(start)
    batch = {"input_ids": pad(rows), "attention_mask": pad([[1] * len(row) for row in rows]),
             "completion_mask": pad([[0] * start + [1] * (len(row) - start)
                                     for row, start in zip(rows, starts)])}
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    def likelihood(model):
        """log p of the two commands of each state, without a softmax over candidates: (2, N)"""
        out = []
        for row, start in zip(rows, starts):
            log_p = model.logits(model(torch.tensor(row)[None])[0]).log_softmax(-1)
            out.append(log_p[torch.arange(start - 1, len(row) - 1), row[start:]].sum())
        return torch.stack(out).view(2, -1)

    pi = likelihood(policy)
    with torch.no_grad():
        ref = likelihood(reference)
    hard = dpo_loss(pi[0], pi[1], ref[0], ref[1], 0.1)
    if smoothing:  # by the soft label: (1−ε) L(+) − ε L(−) = L(label) − 2ε L(−)
        soft = dpo_loss(pi[0], pi[1], ref[0], ref[1], 0.1, torch.tensor(1 - smoothing))
        flipped = dpo_loss(pi[0], pi[1], ref[0], ref[1], 0.1, 0.0)
        ours = ((soft - 2 * smoothing * flipped) / (1 - 2 * smoothing)).mean()
        torch.testing.assert_close(soft, (1 - smoothing) * hard + smoothing * flipped)
    else:
        ours = hard.mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    assert abs(ours.item() - np.log(2)) > 0.01
    ours.backward()
    theirs = dict(trainer.model.named_parameters())
    for name, p in policy.named_parameters():
        scale = float(p.grad.abs().max())
        torch.testing.assert_close(theirs[name].grad, p.grad, atol=1e-3 * scale, rtol=1e-2)


def test_the_distance_to_the_closed_form_is_0_there_and_positive_elsewhere():
    log_ref = random_logits(40, 7).log_softmax(-1).double()
    q = torch.rand(40, 7, generator=torch.Generator().manual_seed(2)).double()
    for beta in (0.03, 0.3):
        best = tilt(log_ref, q, beta)
        assert exact_loss(best, log_ref, q, beta).abs().max() < 1e-12
        for seed, scale in enumerate((0.01, 0.1, 1, 10)):
            other = (best + scale * random_logits(40, 7, seed=seed)).log_softmax(-1)
            assert (exact_loss(other, log_ref, q, beta) > 0).all()
        cross = -(best.exp() * log_ref).sum(-1) + (best.exp() * best).sum(-1)
        torch.testing.assert_close(exact_loss(log_ref, log_ref, q, beta), cross)
    even = torch.full((40, 7), 0.5).double()  # nothing to prefer: the reference itself
    assert exact_loss(log_ref, log_ref, even, 0.1).abs().max() < 1e-6


# --- two states, a table of logits ---------------------------------------------------------------

REF = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double().log()
Q = torch.tensor([[0.2, 0.9, 0.4], [0.7, 0.1, 0.6]]).double()


def optimum(loss_of, steps=400):
    """The log-policy (2, 3) to which gradient descent on a table of logits converges."""
    logits = REF.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", max_iter=steps,
                                  tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(logits.log_softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


def all_pairs(log_pi, how, labels, beta):
    """`policy_loss` in expectation over its two samples a and b, of fixed probabilities."""
    total = 0
    for a in range(3):
        for b in range(3):
            with pytest.MonkeyPatch.context() as patch:
                drawn = iter((a, b))
                patch.setattr(dpo, "draw", lambda log_p, u: torch.full((2,), next(drawn)))
                batch = Batch(log_pi, REF, Q, None, None, None, (0, np.arange(2)))
                total += policy_loss(batch, Improve(how, labels, beta))[0].sum()
    return total


@pytest.mark.parametrize("beta", (0.1, 0.5, 2.0))
def test_soft_labels_and_the_exact_loss_have_the_closed_form_as_their_optimum(beta):
    best = tilt(REF, Q, beta)
    exact = optimum(lambda log_pi: exact_loss(log_pi, REF, Q, beta).sum())
    soft = optimum(lambda log_pi: all_pairs(log_pi, "dpo", "soft", beta))
    torch.testing.assert_close(exact, best, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft, best, atol=1e-4, rtol=0)


def test_hard_labels_have_no_optimum_short_of_certainty():
    """Why they need a small learning rate: the log-ratio that they ask for is unbounded."""
    hard = optimum(lambda log_pi: all_pairs(log_pi, "dpo", "hard", 0.5))
    best = tilt(REF, Q, 0.5)
    for row, target, q in zip(hard, best, Q):
        assert row.argmax() == q.argmax() and row.max() > -1e-2 > target.max()


# --- the loss of an update -----------------------------------------------------------------------

def random_batch(B=2000, C=5, seed=0):
    log_pi, log_ref = (random_logits(B, C, seed=s).log_softmax(-1) for s in (seed, seed + 1))
    q = torch.randint(0, 10, (B, C), generator=torch.Generator().manual_seed(seed + 2)) / 10
    return Batch(log_pi, log_ref, q, None, None, None, (seed, 3, np.arange(B)))


@pytest.mark.parametrize("labels", ("hard", "soft"))
@pytest.mark.parametrize("min_gap", (0.0, 0.25))
def test_of_two_samples_the_one_of_higher_q_is_chosen(labels, min_gap, monkeypatch):
    batch, asked = random_batch(), []
    monkeypatch.setattr(dpo, "dpo_loss", lambda *a: asked.append(a) or dpo_loss(*a))
    settings = Improve("dpo", labels, beta=0.4, min_gap=min_gap)
    losses, metrics = policy_loss(batch, settings)
    (chosen, rejected, ref_chosen, ref_rejected, beta, label), = asked
    assert beta == 0.4
    pairs = gaps = 0
    for n in range(len(losses)):
        pick = lambda table, log_p, ref, r: [c for c in range(5) if table[n, c] == log_p[n]
                                             and r[n, c] == ref[n]][0]
        a = pick(batch.log_pi, chosen, ref_chosen, batch.log_ref)
        b = pick(batch.log_pi, rejected, ref_rejected, batch.log_ref)
        gap = float(batch.q[n, a] - batch.q[n, b])
        assert gap >= 0
        if a == b or gap <= min_gap + 1e-6:
            assert losses[n] == 0
            continue
        pairs, gaps = pairs + 1, gaps + gap
        p = 1 / (1 + np.exp(-gap)) if labels == "soft" else 1.0
        z = 0.4 * float((chosen - ref_chosen - rejected + ref_rejected)[n])
        want = p * np.log1p(np.exp(-z)) + (1 - p) * np.log1p(np.exp(z))
        assert float(losses[n]) == pytest.approx(want, rel=1e-4)
    assert 100 < pairs < 1900
    assert (int(metrics["pairs"][0]), metrics["pairs"][1]) == (pairs, 2000)
    assert float(metrics["gap"][0] / metrics["gap"][1]) == pytest.approx(gaps / pairs, rel=1e-4)


def test_both_samples_are_drawn_from_the_current_policy_independently(monkeypatch):
    C, B = 4, 20_000
    log_pi = random_logits(1, C).log_softmax(-1).repeat(B, 1)
    log_ref = random_logits(1, C, seed=9).log_softmax(-1).repeat(B, 1)
    q, drawn = torch.arange(C).float().repeat(B, 1), []
    real = dpo.draw
    monkeypatch.setattr(dpo, "draw", lambda *a: drawn.append(real(*a)) or drawn[-1])
    policy_loss(Batch(log_pi, log_ref, q, None, None, None, (1, np.arange(B))),
                Improve("dpo", "hard"))
    counts = torch.zeros(C, C)
    for a, b in zip(*drawn):
        counts[a, b] += 1
    p = log_pi[0].exp()
    torch.testing.assert_close(counts / B, p[:, None] * p, atol=0.015, rtol=0)


# --- training on the tiny world ------------------------------------------------------------------

def prefers(word):
    """A judge that gives Q = 1 to the candidates that begin with a word, 0 to all others."""
    def judge(sequences, states):
        rows = [torch.tensor([float(c.startswith(word)) for c in tree.commands])
                for *_, tree in states]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return judge


def run(tmp_path, judge, how="exact", labels="hard", reference=None, loss=policy_loss, seed=0,
        **options):
    """-> the improved policy and the log"""
    options = dict(beta=0.1, lr=3e-3, updates=12, trajectories=4, states=4,
                   temperature=1.0) | options
    policy = copy.deepcopy(taught())
    log = improve(policy, reference or copy.deepcopy(taught()), judge, tokenizer(), played(),
                  by_id(), Improve(how, labels, **options), seed=seed, loss=loss,
                  state=tmp_path / f"{how}{labels}{seed}{len(list(tmp_path.glob('*')))}")
    return policy, log


@torch.no_grad()
def measured(policy, judge):
    """E_π[Q] − E_ref[Q], KL(π ‖ ref), KL(π* ‖ π): means over states of the rollouts."""
    sequences, states = some_states(60, trajectories=played()[::3])
    log_pi, log_ref = (score_states(model, sequences, states) for model in (policy, taught()))
    q = judge(sequences, states)
    gain = expected(log_pi, q) - expected(log_ref, q)
    return [float(x.mean()) for x in (gain, kl(log_pi, log_ref),
                                      exact_loss(log_pi, log_ref, q, 0.1))]


KINDS = (("exact", "hard"), ("dpo", "hard"), ("dpo", "soft"))


@pytest.mark.parametrize("how, labels", KINDS)
def test_with_a_judge_that_prefers_a_command_expected_q_rises(how, labels, tmp_path):
    judge, reference = prefers("go to"), copy.deepcopy(taught())
    policy, log = run(tmp_path, judge, how, labels, reference)
    gain, divergence, distance = measured(policy, judge)
    assert gain > 0.1 and divergence > 0.01
    assert log[-1]["gain"] > 0.05 and same(reference, taught())
    assert log[0]["kl"] == pytest.approx(0, abs=1e-5) and log[0]["gain"] == 0
    assert not reference.training and all(p.grad is None for p in reference.parameters())
    # the distillation loss ends below its start
    start = measured(reference, judge)[2]
    assert distance < (0.5 if how == "exact" else 0.8) * start
    assert log[-1]["distillation"] < (0.5 if how == "exact" else 0.9) * log[0]["distillation"]


def test_kl_holds_the_policy_near_its_reference(tmp_path):
    judge, moved = prefers("go to"), []
    for weight in (0.0, 10.0):
        policy, log = run(tmp_path, judge, "dpo", kl=weight)
        moved.append((measured(policy, judge)[1], log[-1]["kl"]))
    (free, logged), (held, logged_held) = moved
    assert held < 0.3 * free and logged_held < 0.5 * logged


def test_all_that_is_logged_is_exact(tmp_path, monkeypatch):
    """The first update's metrics, by brute force: one sequence for each candidate."""
    told, reference, judge = [], random_model(7), prm_judge(prm())
    monkeypatch.setattr(dpo, "optimise", lambda policy, loss_of, *a, **k: loss_of(0))
    spy = lambda batch, settings: told.append(batch) or policy_loss(batch, settings)
    policy = taught()
    settings = Improve("exact", beta=0.3, kl=0.7, trajectories=3, states=4, temperature=0.5)
    loss, metrics = improve(policy, reference, judge, tokenizer(), played(), by_id(), settings,
                            seed=1, state=None, loss=spy)
    batch, = told
    sequences = [t.ids for t in batch.trajectories]
    states = []
    for n, (t, k) in enumerate(zip(batch.trajectories, batch.steps)):
        commands = replay(t, by_id()[t.game], tokenizer())[k]
        assert commands[batch.choice[n]] == tokenizer().decode(t.ids[slice(*t.spans[k])])
        states.append((n, int(t.spans[k, 0]), SimpleNamespace(commands=commands)))
    assert len(states) == 12 == len({(t.game, t.episode, k) for t, k in
                                     zip(batch.trajectories, batch.steps)})
    total = dict.fromkeys(metrics, 0.0)
    for pi, ref, f in zip(brute_force(policy, sequences, states, 0.5),
                          brute_force(reference, sequences, states, 0.5),
                          brute_force(prm(), sequences, states)):
        p, r, q = pi.double().exp(), ref.double().exp(), f.double().sigmoid()
        best = r * (q / 0.3).exp()
        best /= best.sum()
        total["kl"] += float((p * (p / r).log()).sum())
        total["gain"] += float((p * q).sum() - (r * q).sum())
        total["distillation"] += float((best * (best / p).log()).sum())
        total["entropy"] -= float((p * p.log()).sum())
    total["loss"] = total["distillation"]
    for name, (value, n) in metrics.items():
        assert n == 12 and float(value) == pytest.approx(total[name], rel=1e-3, abs=1e-3), name
    want = (total["loss"] + 0.7 * total["kl"]) / 12
    assert loss.item() == pytest.approx(want, rel=1e-3)


def test_states_without_a_preference_leave_the_policy_as_it_is(tmp_path):
    none = lambda sequences, states: torch.zeros(len(states), max(len(t) for *_, t in states))
    for labels in ("hard", "soft"):
        policy, log = run(tmp_path, none, "dpo", labels, updates=3)
        assert same(policy, taught()) and log[-1]["pairs"] == 0
    policy, log = run(tmp_path, prefers("open"), "dpo", min_gap=1.0, updates=3)
    assert same(policy, taught()) and log[-1]["pairs"] == 0  # a gap of 1 is not more than 1


def test_the_seed_decides_the_training(tmp_path):
    runs = [run(tmp_path, prefers("open"), "dpo", updates=3, seed=seed) for seed in (1, 1, 2)]
    (a, log_a), (b, log_b), (c, _) = runs
    assert same(a, b) and log_a == log_b and not same(a, c)


def test_the_parts_of_ranks_add_up_to_the_update(tmp_path, monkeypatch):
    """Two ranks: parts of the trajectories, the same samples, gradients that add up."""
    monkeypatch.setattr(dpo, "optimise", lambda policy, loss_of, *a, **k: loss_of(2))

    def update(part):
        monkeypatch.setattr(dpo, "mine", part)
        return improve(copy.deepcopy(taught()), random_model(7), prefers("go"), tokenizer(),
                       played(), by_id(), Improve("dpo", trajectories=5, temperature=1.0),
                       seed=3, state=None)

    whole, metrics = update(lambda items: items)
    parts = [update(lambda items, r=r: items[r::2]) for r in (0, 1)]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-4)
    for name, (total, n) in metrics.items():
        assert sum(float(m[name][1]) for _, m in parts) == float(n)
        assert sum(float(m[name][0]) for _, m in parts) == pytest.approx(float(total), rel=1e-3)


def test_an_unbounded_judge_is_f_and_a_bounded_one_its_sigmoid():
    sequences, states = some_states(6)
    with torch.no_grad():
        f, q = (prm_judge(prm(), bounded)(sequences, states) for bounded in (False, True))
        want = score_states(prm(), sequences, states)
    torch.testing.assert_close(f, want)
    torch.testing.assert_close(q, want.sigmoid())
