"""Kill a training run at random moments, continue it, and compare it with an undisturbed one.

    python tests/kill_test.py --kills 100    # train.py --smoke; long

The whole process group gets SIGKILL, SIGTERM or SIGINT (Ctrl-C), in turn; or the disk is full from
then on; or a second process is started in the same folder, which must be refused, and then the
first is killed. Afterwards every file of both runs must be equal, byte for byte: records, rollouts,
weights. Only state.json, the clock, may differ.
Trainings save their place every half second here instead of every ten, so that kills fall between
two saves too.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("SIGKILL", "SIGTERM", "SIGINT", "full disk", "two at once")
ROOT = Path(__file__).parent.parent
TRAIN = ("import optim, train; from fast_alfworld.cli import command_line; "
         "optim.SAVE_EVERY = 0.5; command_line(train.main)")
# Both runs have the same command line, --out included, and no git commit.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GIT_DIR": "/nowhere"}


def start(out, flags):
    """-> the process of a run, and the file that gets its output"""
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    output = tempfile.TemporaryFile("w+")
    words = [sys.executable, "-c", TRAIN, *flags, "--out", Path(out).name]
    return subprocess.Popen(words, cwd=Path(out).parent, start_new_session=True, env=ENVIRONMENT,
                            stdout=output, stderr=output), output


def last_line(process, output):
    """The last line of an ended process; SystemExit with all of its output if it failed."""
    output.seek(0)
    text, code = output.read(), process.returncode
    full = code == 2 and "cannot be written" in text
    early = code == -signal.SIGINT  # Ctrl-C while Python still imports
    if (code not in (0, 130, -signal.SIGKILL, -signal.SIGTERM) and not full and not early
            or "Traceback" in text and not early):
        raise SystemExit(f"train.py ended with {process.returncode}:\n{text}")
    return (text.replace("\r", "\n").strip().splitlines() or ["nothing yet"])[-1]


def finish(out, flags):
    """Run to the end. -> seconds"""
    began, (process, output) = time.monotonic(), start(out, flags)
    process.wait()
    last_line(process, output)
    return time.monotonic() - began


def records(out):
    """When the stages of a run were finished, seconds of the system's clock, in order."""
    return sorted(f.stat().st_mtime for f in Path(out).glob("iter*/*.json"))


def moments(out, began, kills, rng):
    """Random moments of a finished run, sorted: (stages finished, seconds since the last one)"""
    finished = [m - began for m in records(out)]
    drawn = sorted(rng.uniform(0, finished[-1]) for _ in range(kills))
    done = [sum(f <= m for f in finished) for m in drawn]
    return [(n, m - (finished[n - 1] if n else 0)) for n, m in zip(done, drawn)]


def stop(process, out, flags, way):
    """Stop a running process in one of WAYS."""
    if way == "full disk":  # for this process: no weights can be written
        try:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
            return process.wait(60)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            way = "SIGKILL"
    if way == "two at once":
        second, output = start(out, flags)
        second.wait()
        output.seek(0)
        text = output.read()
        if process.poll() is None and (second.returncode != 2 or "another train.py" not in text):
            raise SystemExit(f"a second process was not refused:\n{text}")
        way = "SIGKILL"
    if process.poll() is None:
        os.killpg(process.pid, getattr(signal, way))


def kill(out, flags, stages, seconds, way="SIGKILL"):
    """Start or continue a run and stop it in one of WAYS.

    That happens `seconds` after it has finished so many stages, or when it has finished one more.
    -> the last line of its output; None if it ended before.
    """
    (process, output), deadline = start(out, flags), None
    while (process.poll() is None and (done := len(records(out))) <= stages
           and (deadline is None or time.monotonic() < deadline)):
        if done == stages and deadline is None:
            deadline = time.monotonic() + seconds
        time.sleep(0.005)
    if process.poll() is None:
        stop(process, out, flags, way)
    process.wait()
    line = last_line(process, output)
    return line if process.returncode else None


def files(out):
    """{path within the run: content} of everything that must not depend on interruptions."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(Path(out).rglob("*"))
            if f.is_file() and f.suffix != ".tmp" and f.name not in ("state.json", ".lock")}


def differences(a, b):
    """-> what two runs do not have in common, a line each."""
    a, b = files(a), files(b)
    return [f"{name}: {'differs' if name in a and name in b else 'is missing in one of them'}"
            for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole/run"), Path(folder, "killed/run")
        flags = ["--smoke", "--threads", "1"]
        began = time.time()
        duration = finish(whole, flags)
        plan = moments(whole, began, args.kills, random.Random(args.seed))
        before = files(whole)
        startup = finish(whole, flags)  # nothing is left to do
        if files(whole) != before:
            raise SystemExit("the same command on a finished run changed it")
        print(f"undisturbed: {duration:.0f} s; the same command again: {startup:.0f} s, "
              "nothing changed", flush=True)
        fell, runs, wrong = 0, 0, []
        while fell < len(plan):
            stages, seconds = plan[fell]
            done, way = len(records(killed)), WAYS[fell % len(WAYS)]
            line = kill(killed, flags, max(stages, done),
                        seconds if done < stages else startup + seconds, way)
            fell += line is not None
            if line is not None:
                print(f"{way} with {len(records(killed))} of {len(records(whole))} stages done, "
                      f"at: {line[:60]}", flush=True)
            if line is None or fell == len(plan):  # it ended before: compare, and start another
                finish(killed, flags)
                wrong += differences(whole, killed)
                runs += 1
                print(f"run {runs} ended; files that differ: {len(wrong)}", flush=True)
                shutil.rmtree(killed)
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        print(f"{'FAILED' if wrong else 'EQUAL'}: after {fell} kills in {runs} runs, the "
              f"{len(before)} files of each are byte for byte those of the undisturbed run")
        return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
