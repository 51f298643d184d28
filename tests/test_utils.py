"""RNG keys, files written whole, a training loop that survives kills, the run directory, ranks."""

import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import optim
import utils
from fast_alfworld import DataError, Game, GameError
from fast_alfworld.cli import Parser, UserError, between, command_line
from fast_alfworld.files import lock, read_json, write_file, write_json
from optim import optimise
from rollout import Episode, load_trajectories, save_trajectories
from run import Run
from tiny import ENVIRONMENT, ROOT, games, play, random_model, same, tokenizer
from utils import generator, key, pad, pick_device, read_model, save_model, uniform


# --- random numbers by key -----------------------------------------------------------------------

def test_a_key_gives_one_number_in_any_batch_and_any_process():
    keys = np.random.default_rng(0).integers(2 ** 62, size=(3, 1000))
    together = uniform(*keys)
    assert [uniform(*one) for one in keys.T] == together.tolist()
    assert uniform(*keys[:, ::-1])[::-1].tolist() == together.tolist()
    # whatever the machine or the version
    assert uniform(1, 2, 3) == 0.8029394358323475 and key("a game") == 740802560869577962
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
    code = "from utils import *; print(uniform(5, 6), generator(3, 'x').random(), key('y'))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONHASHSEED": "7"}, check=True).stdout
    assert said.split() == [str(x) for x in (uniform(5, 6), generator(3, "x").random(), key("y"))]


def test_numbers_of_neighbouring_keys_are_uniform_and_independent():
    """Counters, as rollouts use them: (seed, game, episode, step)."""
    a, b = np.meshgrid(np.arange(300), np.arange(300))
    for u in (uniform(0, a, b), uniform(a, 7, b), uniform(a, b)):
        assert 0 <= u.min() and u.max() < 1
        counts = np.histogram(u, 100, (0, 1))[0]
        assert ((counts - 900) ** 2 / 900).sum() < 99 + 4 * 198 ** 0.5
        for v in (u[1:], u[:, 1:]):  # neighbours
            assert abs(np.corrcoef(u[:len(v), :v.shape[1]].ravel(), v.ravel())[0, 1]) < 0.02


def test_pad():
    assert pad([[1, 2], [], [3, 4, 5]], 9).tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    floats = pad([np.array([0.5]), np.array([1.5, 2.5])], 0.0, torch.float32)
    assert floats.tolist() == [[0.5, 0.0], [1.5, 2.5]]


# --- files ---------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep/file.json"
    write_json(file, {"a": 1})

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no room")

    with pytest.raises(OSError, match="file.json: cannot be written .no room"):
        write_file(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n'
    assert [f.name for f in file.parent.iterdir()] == ["file.json"]
    file.write_text('{"a": ')
    with pytest.raises(UserError, match="file.json: not a JSON file, or a damaged one"):
        read_json(file)
    file.write_text("[1]")
    with pytest.raises(UserError, match="file.json: a damaged file"):
        read_json(file)


def test_a_full_disk_is_one_error_of_one_kind(tmp_path):
    """Whatever is written; safetensors has an error of its own. The old file stays."""
    resource = pytest.importorskip("resource")
    model = random_model()
    some = play(model, [Episode(game, 0) for game in games()[:9]])
    writers = {
        "model": lambda: save_model(tmp_path / "model", model, tokenizer()),
        "shard": lambda: save_trajectories(tmp_path / "shard", some),
        "state": lambda: optim._save_state(tmp_path / "state", model, [], 1, [], {}),
        "json": lambda: write_json(tmp_path / "json", {"text": "x" * 50_000})}
    for write in writers.values():
        write()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name, write in writers.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match=f"{name}: cannot be written"):
                write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_in_place_of_a_file_is_refused_at_once(tmp_path):
    save_model(tmp_path / "model", random_model(), tokenizer())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).unlink(), os.mkfifo(tmp_path / "model" / name)
        with pytest.raises(UserError, match=f"{name} is missing"):
            read_model(tmp_path / "model")
        save_model(tmp_path / "model", random_model(), tokenizer())
    os.mkfifo(tmp_path / "pipe")
    for read in (read_json, Game.load, load_trajectories,
                 lambda path: optim._load_state(path, random_model(), [])):
        with pytest.raises((OSError, GameError, UserError), match="no such file"):
            read(tmp_path / "pipe")


def test_a_lock_is_held_until_its_process_ends(tmp_path):
    pytest.importorskip("fcntl")
    script = ("import sys; from fast_alfworld.files import lock; "
              "kept = lock(sys.argv[1], 'busy'); print('held', flush=True); sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "lock")], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"busy .number {other.pid}"):
        lock(tmp_path / "lock", "busy")
    other.kill(), other.wait()
    assert lock(tmp_path / "lock", "busy")


@pytest.mark.parametrize("name, damage", (
    ("model.safetensors", lambda b: b[:len(b) // 2]), ("config.json", lambda b: b[:-9]),
    ("config.json", lambda b: b"{}"), ("tokenizer.json", lambda b: b[:99])))
def test_a_damaged_model_is_named(tmp_path, name, damage):
    save_model(tmp_path, random_model(), tokenizer())
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{tmp_path}.*damaged"):
        read_model(tmp_path)


def test_a_model_that_is_missing_or_of_the_wrong_kind_is_named(tmp_path):
    with pytest.raises(UserError, match="no model there .config.json is missing"):
        read_model(tmp_path)
    for head, other, word in (("lm", "score", "PRM"), ("score", "lm", "policy")):
        save_model(tmp_path, random_model(head=head), tokenizer())
        with pytest.raises(UserError, match=f"that is not a {word}"):
            read_model(tmp_path, head=other)
    save_model(tmp_path, random_model(vocab_size=99), tokenizer())
    with pytest.raises(UserError, match="trained with another tokenizer"):
        read_model(tmp_path)
    model = random_model()
    with torch.no_grad():
        model.model["norm"].weight[3] = float("nan")
    save_model(tmp_path, model, tokenizer())
    with pytest.raises(UserError, match="not all finite"):
        read_model(tmp_path)


@pytest.mark.parametrize("change", (
    {"truncation": {"max_length": 9, "strategy": "LongestFirst", "stride": 0,
                    "direction": "Right"}},
    {"padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}},
    {"normalizer": {"type": "Lowercase"}}), ids=lambda change: next(iter(change)))
def test_a_tokenizer_that_changes_the_text_is_refused(tmp_path, change):
    save_model(tmp_path, random_model(), tokenizer())
    file = tmp_path / "tokenizer.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises(UserError, match="damaged.*cuts, pads or changes the text"):
        read_model(tmp_path)


@pytest.mark.parametrize("name", ("rms_norm_eps", "rope_theta", "hidden_size", "num_hidden_layers"))
@pytest.mark.parametrize("value", (None, True, "8", [8], {}, 0, -1, float("nan"), 1e300))
def test_sizes_that_are_no_sizes_are_refused(tmp_path, name, value):
    save_model(tmp_path, random_model(), tokenizer())
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {name: value})
    with pytest.raises(UserError, match="damaged"):
        read_model(tmp_path)


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64))
def test_weights_that_are_not_floating_point_numbers_are_refused(tmp_path, dtype):
    save_model(tmp_path, random_model(), tokenizer())
    weights = load_file(str(tmp_path / "model.safetensors"))
    save_file({k: v.to(dtype) for k, v in weights.items()}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="damaged.*not floating-point"):
        read_model(tmp_path)


def test_models_are_not_taken_for_what_they_are_not(tmp_path):
    """An output matrix of its own; a tokenizer of another run or program, of equal size."""
    save_model(tmp_path, random_model(), tokenizer())
    config = json.loads((tmp_path / "config.json").read_text())
    for tied in (False, None):
        write_json(tmp_path / "config.json", {**config, "tie_word_embeddings": tied})
        with pytest.raises(UserError, match="not tied to its embedding"):
            read_model(tmp_path)
    write_json(tmp_path / "config.json", config)
    file = tmp_path / "tokenizer.json"
    text = file.read_text()
    for one, other, message in ((" mug", " cup", "trained with another tokenizer"),
                                ("<act>", "<end>", "damaged.*must begin with")):
        swapped = {one: other, other: one}
        file.write_text(re.sub(f'"({one}|{other})"', lambda m: f'"{swapped[m[1]]}"', text))
        with pytest.raises(UserError, match=message):
            read_model(tmp_path)
    file.write_text(text)
    read_model(tmp_path)


# --- odd surroundings ----------------------------------------------------------------------------

@pytest.mark.parametrize("program", ("train.py", "eval.py", "tools/curves.py", "tools/report.py"))
def test_help_where_the_terminal_has_no_greek(program):
    said = subprocess.run([sys.executable, program, *["act"] * ("curves" in program), "--help"],
                          cwd=ROOT, capture_output=True,
                          env=ENVIRONMENT | {"PYTHONIOENCODING": "cp1252"})
    assert said.returncode == 0 and b"--" in said.stdout and len(said.stdout) > 900, said.stderr


def test_imports_without_home_user_and_what_linux_alone_has():
    """Nobody's home; no sched_getaffinity, resource, fcntl or C library, as on other systems."""
    script = """if True:
        import ctypes, os, pwd, sys
        def nobody(*names):
            raise KeyError("nobody")
        pwd.getpwuid = pwd.getpwnam = nobody
        del os.sched_getaffinity
        sys.modules["resource"] = sys.modules["fcntl"] = None
        def no_library(*names):
            raise OSError("no such library")
        import eval, train, utils
        ctypes.CDLL = no_library
        utils.set_up_torch(1)
        from fast_alfworld import games_for
        assert games_for("tiny", None, "train", 8)[0] and utils.cpu_count() >= 1
    """
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("HOME", "ALFWORLD_DATA")}
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert said.returncode == 0, said.stderr


# --- mistakes of the user ------------------------------------------------------------------------

@pytest.mark.parametrize("error, code, line", (
    (UserError("no\nway"), 2, "error: no\n"), (DataError("bad"), 2, "error: bad\n"),
    (FileNotFoundError("gone"), 2, "error: gone\n"), (KeyboardInterrupt(), 130, "interrupted\n")))
def test_mistakes_are_one_line(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        command_line(main)
    assert left.value.code == code and capsys.readouterr().err == line


@pytest.mark.parametrize("error", (ZeroDivisionError, ValueError, KeyError))
def test_what_is_not_the_users_mistake_keeps_its_traceback(error):
    def main():
        raise error("a bug")

    with pytest.raises(error):
        command_line(main)


def test_flags_out_of_range_are_refused():
    parser = Parser("A program.")
    parser.add_argument("--x", type=between(0, 1), default=0.5, help="a number")
    parser.add_argument("--n", type=between(1, 9, int), default=3, help="a count")
    assert vars(parser.parse_args(["--x", "1", "--n", "9"])) == {"x": 1.0, "n": 9}
    for words in (["--x", "1.01"], ["--x", "nan"], ["--n", "0"], ["--n", "1.5"], ["--y", "1"]):
        with pytest.raises(UserError, match=words[0]):
            parser.parse_args(words)
    assert "(default: 0.5)" in parser.format_help()


def test_a_missing_device_is_named():
    with pytest.raises(UserError, match="--device tpu9"):
        pick_device("tpu9")
    assert pick_device("cpu").type == "cpu"


# --- one training loop ---------------------------------------------------------------------------

STEPS = 24


def toy_model():
    return random_model(scale=0.1, n_layers=1)


def train_toy(state, stop_at=(), steps=STEPS):
    """Predict the next of random tokens; interrupted at each step of `stop_at` and continued with
    fresh objects. -> weights, log, the steps that were taken"""
    stops, calls = list(stop_at), []
    while True:
        model = toy_model()

        def loss_of(step):
            if stops and step >= stops[0]:
                stops.pop(0)
                raise KeyboardInterrupt
            calls.append(step)
            rng = generator("data", step)
            ids = torch.from_numpy(rng.integers(len(tokenizer()), size=(2, 12)))
            log_p = model.logits(model(ids[:, :-1])).log_softmax(-1)
            loss = -log_p.gather(-1, ids[:, 1:, None]).mean()
            rare = {"rare": (step, 1)} if step % 3 == 0 else {}
            return (None if step % 7 == 3 else loss), {"loss": (loss.detach(), 1), **rare}

        watch = lambda: {"size": sum(float(p.detach().abs().sum()) for p in model.parameters())}
        try:
            log = optimise(model, loss_of, steps, lr=3e-3, state=state, name="test", watch=watch)
            return model, log, calls
        except KeyboardInterrupt:
            pass


@pytest.fixture
def save_always(monkeypatch):
    """As if twenty seconds passed between any two looks at the clock: every step is saved."""
    clock = iter(range(0, 10 ** 9, 20))
    monkeypatch.setattr(optim, "time", SimpleNamespace(monotonic=lambda: next(clock)))


def test_training_killed_anywhere_equals_undisturbed_training(tmp_path, save_always):
    whole, log, calls = train_toy(tmp_path / "whole")
    assert calls == list(range(STEPS)) and len(log) == 12 and log[-1]["step"] == STEPS
    stops = sorted(np.random.default_rng(0).choice(range(STEPS), 6, replace=False).tolist())
    again, log_again, calls = train_toy(tmp_path / "stopped", stops)
    assert same(whole, again) and log == log_again
    assert calls == list(range(STEPS))  # nothing is done twice, as every step was saved
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "stopped").read_bytes()
    assert not same(whole, toy_model())


def test_training_killed_between_two_saves_repeats_some_steps_and_ends_the_same(
        tmp_path, monkeypatch):
    whole, log, _ = train_toy(tmp_path / "whole")
    clock = iter(range(0, 10 ** 9))  # a second a step: saved every eleventh
    monkeypatch.setattr(optim, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    again, log_again, calls = train_toy(tmp_path / "stopped", (8, 17, 22))
    assert same(whole, again) and log == log_again
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "stopped").read_bytes()
    assert STEPS < len(calls) < STEPS + 30 and calls[8] == 0 and 0 not in calls[9:]


def test_a_finished_training_is_not_repeated_and_a_damaged_state_is_named(tmp_path):
    first, log, _ = train_toy(tmp_path / "state", steps=5)
    second, log_again, calls = train_toy(tmp_path / "state", steps=5)
    assert same(first, second) and log == log_again and not calls
    file = tmp_path / "state"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file}: damaged"):
        train_toy(file, steps=5)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_loss_that_is_no_finite_number_ends_training(bad, tmp_path):
    model = toy_model()

    def loss_of(step):
        return model.model["norm"].weight.sum() * (bad if step == 2 else 1), {}

    with pytest.raises(UserError, match="toy: the loss is .* at update 2; try a smaller learning"):
        optimise(model, loss_of, 5, lr=1e-3, state=tmp_path / "state", name="toy")
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_without_a_loss_is_one_of_gradient_0(tmp_path):
    """So that a rank whose part of a batch is empty does what the others do."""
    models = [toy_model() for _ in range(2)]
    for number, model in enumerate(models):
        size = lambda: sum(p.sum() for p in model.parameters())
        loss_of = lambda step: (size() if step % 3 else 0 * size() if number else None,
                                {"seen": (1, 1)})
        log = optimise(model, loss_of, 6, lr=1e-3, state=tmp_path / str(number), name="test")
        assert log[-1] == {"step": 6, "seen": 1.0} and not model.training
    assert same(*models) and not same(models[0], toy_model())


def test_the_log_holds_means_over_stretches(tmp_path):
    log = optimise(toy_model(), lambda step: (None, {"number": (2.0 * step, 2)}), 60, lr=1e-3,
                   state=tmp_path / "state", name="test")
    assert log == [{"step": 3 * (i + 1), "number": 3 * i + 1.0} for i in range(20)]


def test_gradients_are_clipped_and_the_rate_rises_then_falls(tmp_path):
    """Weights move by about the learning rate, and one enormous gradient does not spoil it."""
    model, at = toy_model(), []

    def loss_of(step):
        at.append(model.model["norm"].weight.detach().clone())
        return (1e6 if step == 50 else 1) * model.model["norm"].weight.sum(), {}

    optimise(model, loss_of, 100, lr=1e-2, state=tmp_path / "state", name="test")
    rates = [(a - b).mean().item() for a, b in zip(at, [*at[1:], model.model["norm"].weight])]
    assert rates[0] == pytest.approx(2e-3, rel=0.1) and np.argmax(rates) in (4, 5)
    assert max(rates) == pytest.approx(1e-2, rel=0.15)
    assert rates[50] == pytest.approx(5e-3, rel=0.2) and 0 < rates[-1] < 3e-4


# --- the run directory ---------------------------------------------------------------------------

def test_the_time_of_a_stage_within_another_is_counted_once(tmp_path):
    run = Run(tmp_path / "run", {}, {})

    def outer(state):
        for name in ("iter1/prm2", "iter1/prm3"):
            run.once(name, lambda state: time.sleep(0.4) or {})
        return time.sleep(0.1) or {}

    run.once("iter1/dpo", outer)
    run.once("iter1/next", lambda state: {})
    seconds = {name: cost["seconds"] for name, cost in run.costs().items()}
    assert seconds["iter1/prm2"] >= 0.4 and seconds["iter1/prm3"] >= 0.4
    assert 0.1 <= seconds["iter1/dpo"] < 0.4 and seconds["iter1/next"] < 0.1


def test_a_stage_is_run_once_and_continued_after_a_kill(tmp_path):
    made, folder = [], tmp_path / "run"

    def make(state):
        made.append(state.exists())
        write_file(state, lambda path: path.write_text("half"))
        if len(made) == 1:
            raise KeyboardInterrupt
        return {"value": len(made)}

    with pytest.raises(KeyboardInterrupt):
        Run(folder, {"x": 1}, {"train": "3 games"}).once("iter1/prm", make)
    assert not (folder / "iter1/prm.json").exists()
    for _ in range(2):
        run = Run(folder, {"x": 1}, {"train": "3 games"})
        assert run.once("iter1/prm", make)["value"] == 2
    assert made == [False, True]  # the second time it found its state, the third it did not run
    assert not list(folder.rglob("*.safetensors"))
    run.once("iter0/sft", lambda state: {"value": 7})
    run.once("iter10/dpo", lambda state: {"value": 8})
    assert {name: record["value"] for name, record in run.records().items()} == {
        (0, "sft"): 7, (1, "prm"): 2, (10, "dpo"): 8}
    assert list(run.records()) == sorted(run.records())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["value"] for line in lines] == [7, 2, 8]
    (folder / "metrics.jsonl").write_text(lines[0] + "\n")  # killed before it was written whole
    Run(folder, {"x": 1}, {"train": "3 games"})
    assert (folder / "metrics.jsonl").read_text().splitlines() == lines
    costs = json.loads((folder / "state.json").read_text())
    assert costs.keys() == {"iter1/prm", "iter0/sft", "iter10/dpo"}
    assert all(cost["peak_mb"] > 50 for cost in costs.values())


def test_a_stage_whose_files_were_deleted_is_run_again(tmp_path):
    run, made = Run(tmp_path / "run", {}, {}), []
    files = [tmp_path / "run/iter1/a", tmp_path / "run/iter1/b"]

    def make(state):
        made.append(1)
        for file in files:
            write_json(file, len(made))
        return {"n": len(made)}

    assert [run.once("iter1/prm", make, files)["n"] for _ in range(2)] == [1, 1]
    files[1].unlink()
    assert run.once("iter1/prm", make, files)["n"] == 2 and files[1].read_text() == "2\n"


def test_other_flags_or_games_are_refused_with_the_difference(tmp_path):
    folder = tmp_path / "run"
    flags, games = {"beta": 0.1, "threads": 1}, {"train": "3 games"}
    Run(folder, flags, games)
    Run(folder, flags | {"beta": 0.2}, games)  # nothing has been made yet
    Run(folder, flags, games, free=("threads",)).once("iter0/sft", lambda state: {})
    Run(folder, flags | {"threads": 2}, games, free=("threads",))
    with pytest.raises(UserError, match="--beta 0.1 -> 0.3"):
        Run(folder, flags | {"beta": 0.3, "threads": 2}, games, free=("threads",))
    with pytest.raises(UserError, match="train 3 games -> 4 games"):
        Run(folder, flags | {"threads": 2}, {"train": "4 games"})
    for name, text in (("file", "mine"), ("config.json", '{"mine": 1}')):
        write_file(tmp_path / name / name, lambda path: path.write_text(text))
        with pytest.raises(UserError, match="is not empty and holds no run"):
            Run(tmp_path / name, flags, games)
        assert (tmp_path / name / name).read_text() == text


# --- ranks ---------------------------------------------------------------------------------------

TWO_RANKS = """
import sys, torch
from pathlib import Path
from tiny import random_model, tokenizer
from optim import optimise
from run import Run
from utils import *
out = Path(sys.argv[1])
join_ranks("cpu")
model, run = random_model(scale=0.1, n_layers=1), Run(out, {}, {})
examples = torch.from_numpy(generator("data").integers(len(tokenizer()), size=(12, 6, 9)))
def loss_of(step):
    rows = mine(list(examples[step]))  # of 6 each step
    nll = sum(-model.logits(model(r[None, :-1])).log_softmax(-1)[0].gather(1, r[1:, None]).sum()
              for r in rows)
    return nll / 48, {"nll": (nll.detach(), 8 * len(rows))}
def make(state):
    return {"log": optimise(model, loss_of, 12, lr=3e-3, state=state, name="t"),
            "ranks": all_gather(rank())}
record = run.once("iter0/toy", make)
assert all(x == record for x in all_gather(record))
weights = [p.detach() for p in model.parameters()]
assert all(torch.equal(a, b) for other in all_gather(weights) for a, b in zip(weights, other))
save_model(out / "model", model, tokenizer())
wait_for_ranks()
"""


def test_two_ranks_do_what_one_does(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    monkeypatch.setattr(sys, "argv", ["script.py", str(tmp_path / "one")])
    exec(TWO_RANKS, {})  # in this process, without ranks
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           f"--master_port={20000 + os.getpid() % 20000}", script,
                           tmp_path / "two"], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    one, two = (read_json(tmp_path / name / "iter0/toy.json") for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == ([0], [0, 1])
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert one["log"][0] == pytest.approx(two["log"][0], rel=1e-5)
    a, b = (read_model(tmp_path / name / "model")[0] for name in ("one", "two"))
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)
