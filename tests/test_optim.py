"""Training can be interrupted anywhere, and Muon moves as torch's own does."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

import optim
from checks import train_checks
from common import generator
from dpo import online_dpo
from inverse_prm import Ends, train_inverse_prm
from optim import Muon, optimise, orthogonalised
from prm import actions_of, fit_labels, states_of, train_prm
from sft import train_sft
from tiny import demonstrations, games, played, prior, random_model, taught, tell, tokenizer


# --- one training loop -------------------------------------------------------------------------------------------------------------

STEPS = 40


def train_toy(state, stop_at=(), save_every=0.0, steps=STEPS, averaged=0.0):
    """Predict the next of random tokens; interrupted before each of `stop_at` and continued, in fresh objects each time. -> weights, log"""
    stops, calls = list(stop_at), []
    while True:
        model = random_model(scale=0.1)

        def loss_of(step):
            if stops and step >= stops[0]:
                stops.pop(0)
                raise KeyboardInterrupt
            calls.append(step)
            ids = torch.from_numpy(generator("data", step).integers(len(tokenizer()), size=(2, 12)))
            loss = -model.logits(model(ids[:, :-1])).log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
            return (None if step % 7 == 3 else loss), {"loss": (loss.detach(), 1), **({"sometimes": (step, 1)} if step % 3 == 0 else {})}

        try:
            log = optimise(model, loss_of, steps, 3e-3, state, "test", save_every=save_every, averaged=averaged)
            return torch.cat([p.detach().flatten() for p in model.parameters()]), log, calls
        except KeyboardInterrupt:
            pass


@pytest.mark.parametrize("seed, averaged", ((0, 0.0), (1, 0.5), (2, 0.9)))
def test_training_interrupted_anywhere_equals_undisturbed_training(seed, averaged, tmp_path):
    train = partial(train_toy, averaged=averaged)
    weights, log, calls = train(tmp_path / "whole")
    assert calls == list(range(STEPS)) and len(log) == 20 and log[-1]["step"] == STEPS
    stops = sorted(np.random.default_rng(seed).choice(range(STEPS), 6, replace=False).tolist())
    again, log_again, calls = train(tmp_path / "stopped", stops)
    assert torch.equal(weights, again) and log == log_again
    assert calls == list(range(STEPS))  # nothing done twice, as it was saved after every step
    lost, log_lost, calls = train(tmp_path / "lost", stops, save_every=1e9)  # nothing was ever saved
    assert torch.equal(weights, lost) and log_lost == log and len(calls) > STEPS


def sft(model, state):
    train_sft(model, tokenizer(), games(), prior(), demos=8, updates=5, glanced=4, searched=1, lr=1e-3, batch=4, seed=0, state=state, mistakes=0.1, obs_weight=0.3, max_steps=8,
              exchange=0.5, detours=0.5, sparse=0.5)


def checks(model, state):
    train_checks(model, tokenizer(), demonstrations(), tell(), updates=5, lr=1e-3, batch=4, seed=0, state=state)


def lessons(model, state):
    labels = [(np.linspace(0.2, 0.9, len(t)).astype(np.float32), np.ones(len(t), np.float32)) for t in played()]
    train_prm(model, played(), fit_labels(labels, actions_of(played())), tell(), epochs=0.5, lr=1e-3, batch=4, seed=0, state=state, value=fit_labels(labels, states_of(played())), obs_weight=0.5)


def inverse(model, state):
    train_inverse_prm(model, taught(), demonstrations(), played(), tell(), Ends(0.9), updates=5, lr=1e-3, batch=4, temperature=1.0, seed=0, state=state)


def preferences(model, state):
    by_length = lambda tree: torch.zeros(len(tree.branch_end)).index_add(0, tree.token_branch, torch.ones(len(tree.token_branch)))
    online_dpo(model, taught(), by_length, tokenizer(), played(), tell(), pairs=60, beta=0.1, lr=1e-3, temperature=1.0, trunks=4, states_per_trunk=3, imitate=1.0,
               weigh=lambda some: [np.ones(len(t.ids), np.float32) for t in some], seed=0, state=state)


@pytest.mark.parametrize("training", (sft, checks, lessons, inverse, preferences), ids=lambda training: training.__name__)
def test_every_training_of_the_method_can_be_interrupted(training, tmp_path, monkeypatch):
    """Killed as it is saved for the third time, after every update, and gone on with: the weights are those of an undisturbed one."""
    start = lambda: copy.deepcopy(taught()) if training in (sft, preferences) else taught().with_score_head()
    whole = start()
    training(whole, tmp_path / "whole")
    monkeypatch.setattr("optim.optimise.__kwdefaults__", {**optimise.__kwdefaults__, "save_every": 0.0})
    saves, save = [], optim._save_state

    def interrupted(*a):
        save(*a)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("optim._save_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training(start(), tmp_path / "killed")
    again = start()
    training(again, tmp_path / "killed")
    assert len(saves) > 4 and all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), start().parameters()))


def test_a_finished_training_is_not_repeated(tmp_path):
    first, log, _ = train_toy(tmp_path / "state")
    second, log_second, calls = train_toy(tmp_path / "state")
    assert torch.equal(first, second) and log == log_second and not calls


def test_skipped_steps_leave_the_weights_alone(tmp_path):
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    log = optimise(model, lambda step: (None, {"seen": (1, 1)}), 5, 1.0, tmp_path / "state", "test")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and log[-1] == {"step": 5, "seen": 1.0}


def test_the_log_holds_means_over_stretches(tmp_path):
    model = random_model()
    log = optimise(model, lambda step: (None, {"step number": (2 * step, 2)}), 12, 1e-3, tmp_path / "state", "test", logs=4)
    assert log == [{"step": 3 * (i + 1), "step number": 3 * i + 1.0} for i in range(4)]


def test_gradients_are_clipped_and_the_rate_follows_the_plan(tmp_path):
    """Warm-up, then down to a tenth: weights move by about the learning rate, and one enormous gradient does not spoil it."""
    model, moved = random_model(), []

    def loss_of(step):
        moved.append(model.model["norm"].weight.detach().clone())
        return (1e6 if step == 5 else 1) * model.model["norm"].weight.sum(), {}

    optimise(model, loss_of, 100, 1e-2, tmp_path / "state", "test", warmup=0.1)
    rates = [(a - b).mean().item() for a, b in zip(moved, moved[1:])]
    assert rates[0] == pytest.approx(1e-3, rel=0.1) and max(rates) == pytest.approx(1e-2, rel=0.15) and np.argmax(rates) in (9, 10)
    assert rates[-1] == pytest.approx(1e-3, rel=0.2)


@pytest.mark.parametrize("averaged, first", ((1.0, 0), (0.5, 15), (0.0, 29)))
def test_training_ends_with_the_mean_of_its_last_weights(averaged, first, tmp_path):
    model, after = random_model(), []
    weights = lambda: torch.cat([p.detach().flatten().double() for p in model.parameters()])

    def loss_of(step):
        ids = torch.from_numpy(generator("data", step).integers(len(tokenizer()), size=(2, 12)))
        return model.logits(model(ids)).logsumexp(-1).mean(), {}

    optimise(model, loss_of, 30, 3e-3, tmp_path / "state", "test", averaged=averaged, logs=30, watch=lambda: after.append(weights()) or {})
    assert len(after) == 30
    torch.testing.assert_close(weights(), torch.stack(after[first:]).mean(0), atol=1e-6, rtol=1e-5)
    assert (weights() - after[-1]).norm() > 1e-3 or first == 29


# --- Muon ----------------------------------------------------------------------------------------------------------------------

def test_muon_moves_as_torchs_does():
    """But for the rounding of bfloat16, in which the other one works; wide, tall and square matrices, one of them without a gradient at times."""
    torch.manual_seed(0)
    ours = [torch.randn(shape, requires_grad=True) for shape in ((64, 32), (64, 32), (32, 64), (48, 48))]
    theirs, start = copy.deepcopy(ours), [p.detach().clone() for p in ours]
    a, b = Muon(ours, 0.02, 0.1), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(6):
        for k, (p, q) in enumerate(zip(ours, theirs)):
            p.grad = None if k == step == 1 else torch.randn(p.shape)
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
    for p, q, before in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (p - before).norm()


def test_orthogonalised_matrices_have_singular_values_of_about_one():
    torch.manual_seed(0)
    for shape in ((3, 20, 50), (2, 50, 20), (1, 30, 30)):
        matrices = torch.randn(shape)
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        x = orthogonalised(matrices)
        assert x.shape == matrices.shape and x.dtype == matrices.dtype
        inside = left.mT @ x @ right.mT  # the same directions, of other lengths
        singular = inside.diagonal(dim1=1, dim2=2)
        assert torch.allclose(inside, torch.diag_embed(singular), atol=1e-3) and ((singular > 0) & (singular < 1.3)).all() and singular.median() > 0.65
