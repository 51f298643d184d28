"""A run that was killed, damaged, continued or shared by two processes ends as any other."""

import json
from fast_alfworld.files import write_json
import random
import shutil
import sys

import numpy as np
import pytest

import train as train_py
from kill_test import differences, files, finish, kill, moments
from tiny import TINY, assert_refused, in_process, read, train

# Same flags, same name of the folder: then even config.json is equal byte for byte.

def copy_of(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "copy/run")
    return tmp_path / "copy/run"


def mended(run, folder, *lost):
    """Delete some files, continue, and compare all with the undisturbed run."""
    for path in lost:
        path = folder / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = train(folder, *TINY)
    assert done.returncode == 0, done.stderr
    return done, differences(run[0], folder)


def test_the_same_seed_gives_the_same_files_byte_for_byte(run, tmp_path):
    folder = tmp_path / "other/run"
    done = train(folder, *TINY)
    assert done.returncode == 0 and done.stdout == run[1].stdout, done.stderr
    assert differences(run[0], folder) == []


def test_a_run_that_was_killed_at_random_moments_ends_as_an_undisturbed_one(run, tmp_path):
    """A sample of tests/kill_test.py."""
    folder = tmp_path / "killed/run"
    plan, ways = moments(run[0], run[2], 3, random.Random(0)), ("SIGINT", "two at once", "SIGKILL")
    assert any([kill(folder, TINY, *moment, way) for moment, way in zip(plan, ways)])
    finish(folder, TINY)
    assert [d for d in differences(run[0], folder)
            if not d.startswith(("config.json", "best/run.json", "result.json"))] == []
    commands = [read(folder / name) for name in ("config.json", "best/run.json", "result.json")]
    wanted = [read(run[0] / name) for name in ("config.json", "best/run.json", "result.json")]
    for ours, theirs in zip(commands, wanted):  # started by `python -c` here
        assert {k: v for k, v in ours.items() if k != "command"} == {
            k: v for k, v in theirs.items() if k != "command"}


@pytest.mark.parametrize("lost", (
    ("iter2/dpo.json", "iter2/policy", "iter2/eval-dev.json", "result.json"),
    ("iter1/rollouts/00000.safetensors", "iter1/prm.json", "iter1/prm", "best"),
), ids=" ".join)
def test_whatever_is_missing_is_made_again_and_equal(run, lost, tmp_path):
    assert mended(run, copy_of(run, tmp_path), *lost)[1] == []


def test_a_run_killed_between_a_record_and_its_line_in_metrics_ends_whole(run, tmp_path):
    folder = copy_of(run, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    (folder / "iter1/prm.state.safetensors").write_bytes(b"left over")
    done, different = mended(run, folder)
    assert done.stdout == run[1].stdout and different == []  # and all the rest is left as it is


def test_a_damaged_file_is_named_and_made_again_once_it_is_deleted(run, tmp_path):
    folder = copy_of(run, tmp_path)
    shard = folder / "iter2/rollouts/00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    (folder / "iter2/prm.json").unlink()
    done = train(folder, *TINY)
    assert done.returncode == 2 and "00000.safetensors" in done.stderr, done.stderr
    assert "delete it" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert mended(run, folder, "iter2/rollouts/00000.safetensors")[1] == []


@pytest.fixture
def start(monkeypatch, capsys):
    """start(folder, *flags): train.py within this process."""
    return lambda folder, *flags: in_process(train_py.main, [*TINY, *flags, "--out", folder],
                                             monkeypatch, capsys)


def test_other_flags_or_games_are_refused_with_the_difference(run, tmp_path, start):
    folder = copy_of(run, tmp_path)
    before = files(folder)
    for flags, parts in ((("--beta", "0.5", "--seed", "3"),
                          ("--beta 0.1 -> 0.5", "--seed 0 -> 3", "another --out")),
                         (("--n-generated", "45"), ("train", "games, ", "another --out"))):
        assert_refused(start(folder, *flags), *parts)
        assert files(folder) == before
    config = read(folder / "config.json")  # as many games, but others
    count = config["games"]["train"].split(",")[0]
    write_json(folder / "config.json", config | {
        "games": config["games"] | {"train": f"{count}, 0123456789ab"}})
    assert_refused(start(folder), "train", "0123456789ab", "another --out")


def test_more_iterations_continue_a_finished_run(run, tmp_path):
    """What --iters 2 does at once equals --iters 1 and then --iters 2."""
    folder = copy_of(run, tmp_path)
    config = read(folder / "config.json")
    config["flags"]["iters"] = 1
    write_json(folder / "config.json", config)
    shutil.rmtree(folder / "iter2")
    assert mended(run, folder)[1] == []


@pytest.mark.parametrize("kind", ("a policy", "other files", "a file"))
def test_an_out_that_is_no_run_is_refused_and_left_alone(run, kind, tmp_path, start):
    folder = tmp_path / "run"
    if kind == "a policy":
        shutil.copytree(run[0] / "best/policy", folder)
    elif kind == "other files":
        shutil.copytree(run[0] / "best", folder)
    else:
        folder.write_text("mine")
    before = files(tmp_path)
    assert_refused(start(folder), "run" if kind == "a file" else "holds no run")
    assert files(tmp_path) == before


def numbers(value):
    """All numbers in nested records, in order."""
    if isinstance(value, dict):
        return [x for v in value.values() for x in numbers(v)]
    if isinstance(value, list):
        return [x for v in value for x in numbers(v)]
    return [float(value)] if isinstance(value, (int, float)) else []


def test_two_processes_have_the_losses_of_one_up_to_rounding(run, tmp_path):
    folder = tmp_path / "two/run"
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2")
    done = train(folder, *TINY, "--iters", "1", program=torchrun)
    assert done.returncode == 0 and done.stdout.count("π_1") == 1, done.stderr
    rollouts = [read(where / "iter1/rollouts.json") for where in (run[0], folder)]
    assert rollouts[0] == rollouts[1]
    for stage in ("iter0/sft", "iter1/prm", "iter1/dpo"):
        ours, theirs = (read(where / f"{stage}.json")["log"] for where in (folder, run[0]))
        assert len(ours) == len(theirs) and [e.keys() for e in ours] == [e.keys() for e in theirs]
        np.testing.assert_allclose(numbers(ours), numbers(theirs), rtol=5e-3, atol=2e-4,
                                   err_msg=stage)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
