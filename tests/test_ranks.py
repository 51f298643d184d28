"""Several processes, one job: torchrun against a single process, on the real command line."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from common import save_model
from tiny import ROOT, command, taught, tokenizer

TINY = ["--smoke", "--iters", "1", "--n-generated", "40", "--dev-games", "6", "--rollouts", "48", "--min-games", "12", "--shard", "12", "--pairs", "64",
        "--states-per-trajectory", "4", "--dpo-batch", "5", "--max-steps", "8", "--checks", "1", "--test-splits", "valid_seen", "--threads", "1"]  # of more checks rounding would grow before the PRM begins
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={20000 + os.getpid() % 20000}", "train.py"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """The flags of a run from a policy that speaks."""
    folder = tmp_path_factory.mktemp("init")
    save_model(folder, taught(), tokenizer())
    return [*TINY, "--init", folder, "--context", "1024"]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = command("train.py", *flags, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def start(flags, folder):
    return subprocess.Popen([*TORCHRUN, *map(str, flags), "--out", str(folder)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def read(file):
    return json.loads(file.read_text())


def assert_equal(folder, alone):
    """The same rollouts, the same updates up to rounding, the same games won."""
    shards = sorted((alone / "iter1/rollouts").iterdir())
    assert len(shards) == 4
    assert all((folder / "iter1/rollouts" / shard.name).read_bytes() == shard.read_bytes() for shard in shards)
    (ours,), (theirs,) = (read(run / "iter1/checks.json")["log"] for run in (folder, alone))
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    for stage in ("prm", "dpo"):
        logs = [read(run / f"iter1/{stage}.json")["log"] for run in (folder, alone)]
        assert len(logs[0]) == len(logs[1]) > 2
        for ours, theirs in zip(*logs):
            assert ours.keys() == theirs.keys()
            for log in (ours, theirs):
                log.pop("rewards/accuracies", None)  # at first π is its reference: rounding decides on which side of 0 a margin is
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
        assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-5, abs=1e-5)
    ours, theirs = (read(run / "result.json")["rows"][1]["dev"] for run in (folder, alone))
    assert ours["games"] == theirs["games"] and abs(ours["success"] - theirs["success"]) < 0.2


def test_two_ranks_do_what_one_does(flags, alone, tmp_path):
    process = start(flags, tmp_path / "run")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert said.count("π_1 *") + said.count("π_0 *") == 1  # one table
    assert_equal(tmp_path / "run", alone)
    assert not list((tmp_path / "run").rglob("*.state.safetensors"))
    memory, of_one = (read(run / "state.json")["peak_mb"]["iter1/dpo"] for run in (tmp_path / "run", alone))
    assert memory > 1.3 * of_one  # of both


def test_two_ranks_learn_the_reward_of_inverseprm_as_one_does(flags, tmp_path):
    flags = [*flags, "--algo", "inverseprm", "--rest", "--demos", "30", "--inverse-updates", "4", "--prm-batch", "6", "--checks", "0", "--pairs", "8"]
    process = start(flags, tmp_path / "two")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    done = command("train.py", *flags, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    two, one = (read(tmp_path / name / "iter1/prm.json") for name in ("two", "one"))
    assert len(two["log"]) == len(one["log"]) == 4 and {"reward/expert", "reward/learner", "accuracy"} <= two["log"][0].keys()
    assert two["log"][0] == pytest.approx(one["log"][0], rel=1e-5, abs=1e-5) and two["rest"] == pytest.approx(one["rest"])
    for ours, theirs in zip(two["log"], one["log"]):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)


def test_a_rank_that_dies_ends_the_job_and_the_run_continues(flags, alone, tmp_path):
    folder = tmp_path / "run"
    process = start(flags, folder)
    deadline = time.monotonic() + 200
    while not (folder / "iter1/rollouts").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode and "signal 9" in said.lower(), said
    done = command("train.py", *flags, "--out", folder)  # one process may go on where two were
    assert done.returncode == 0, done.stderr
    assert_equal(folder, alone)
