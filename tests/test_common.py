"""Files written whole, randomness by name, mistakes told in one line, and training that can be interrupted anywhere."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import (Muon, UserError, command_line, generator, key, optimise, orthogonalised, pad, pick_device, read_model, save_model, set_up_torch, uniform, write_file,
                    write_json)
from tiny import random_model, tokenizer


# --- randomness by name --------------------------------------------------------------------------------------------------------

def test_a_name_gives_one_number_in_any_batch_and_any_process():
    names = np.random.default_rng(0).integers(2 ** 62, size=(3, 1000))
    together = uniform(*names)
    assert [uniform(*name) for name in names.T] == together.tolist() and together.tolist() == uniform(*names[:, ::-1])[::-1].tolist()
    assert uniform(1, 2, 3) == 0.8029394358323475 and key("a game") == 740802560869577962  # whatever the machine or the version
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
    code = "from common import uniform, generator; print(uniform(5, 6), generator(3, 'x').random())"
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}) == 1


def test_numbers_of_neighbouring_names_are_uniform_and_independent():
    """Counters, as rollouts use them: (seed, game, episode, step, token)."""
    a, b = np.meshgrid(np.arange(300), np.arange(300))
    for u in (uniform(0, a, b), uniform(a, 7, b), uniform(a, b)):
        assert 0 <= u.min() and u.max() < 1
        counts = np.histogram(u, 100, (0, 1))[0]
        assert ((counts - 900) ** 2 / 900).sum() < 99 + 4 * 198 ** 0.5
        for v in (u[1:], u[:, 1:]):  # neighbours
            assert abs(np.corrcoef(u[:len(v), :v.shape[1]].ravel(), v.ravel())[0, 1]) < 0.02


# --- files ---------------------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep/file.json"
    write_json(file, {"a": 1})

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        write_file(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n'


def test_pad():
    assert pad([[1, 2], [], [3, 4, 5]], 9).tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert pad([np.array([0.5]), np.array([1.5, 2.5])], 0.0, torch.float32).tolist() == [[0.5, 0.0], [1.5, 2.5]]


# --- mistakes of the user ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code, line", ((UserError("no\nway"), 2, "error: no\n"), (ValueError("bad"), 2, "error: bad\n"), (KeyboardInterrupt(), 130, "interrupted")))
def test_mistakes_are_one_line(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        command_line(main)
    assert left.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_what_is_not_the_users_mistake_is_shown_in_full():
    with pytest.raises(ZeroDivisionError):
        command_line(lambda: 1 / 0)


def test_a_missing_model_or_device_is_named(tmp_path):
    with pytest.raises(UserError, match="no model there .config.json is missing"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="--device tpu9"):
        pick_device("tpu9")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--threads 0"):
        set_up_torch(0)


@pytest.mark.parametrize("name, damage", (("model.safetensors", lambda b: b[:len(b) // 2]), ("config.json", lambda b: b[:-9]), ("config.json", lambda b: b"{}"),
                                          ("tokenizer.json", lambda b: b[:99])))
def test_a_damaged_model_is_named(tmp_path, name, damage):
    save_model(tmp_path, random_model(), tokenizer())
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{tmp_path}.*damaged"):
        read_model(tmp_path)


# --- one training loop -------------------------------------------------------------------------------------------------------------

STEPS = 40


def train(state, stop_at=(), save_every=0.0, steps=STEPS):
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
            log = optimise(model, loss_of, steps, 3e-3, state, "test", save_every=save_every)
            return torch.cat([p.detach().flatten() for p in model.parameters()]), log, calls
        except KeyboardInterrupt:
            pass


@pytest.mark.parametrize("seed", range(3))
def test_training_interrupted_anywhere_equals_undisturbed_training(seed, tmp_path):
    weights, log, calls = train(tmp_path / "whole")
    assert calls == list(range(STEPS)) and len(log) == 20 and log[-1]["step"] == STEPS
    stops = sorted(np.random.default_rng(seed).choice(range(STEPS), 6, replace=False).tolist())
    again, log_again, calls = train(tmp_path / "stopped", stops)
    assert torch.equal(weights, again) and log == log_again
    assert calls == list(range(STEPS))  # nothing done twice, as it was saved after every step
    lost, log_lost, calls = train(tmp_path / "lost", stops, save_every=1e9)  # nothing was ever saved
    assert torch.equal(weights, lost) and log_lost == log and len(calls) > STEPS


def test_a_finished_training_is_not_repeated(tmp_path):
    first, log, _ = train(tmp_path / "state")
    second, log_second, calls = train(tmp_path / "state")
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
