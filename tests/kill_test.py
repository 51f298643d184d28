"""Kill a training run at random moments, continue it each time, and compare what comes out with an undisturbed run.

    python tests/kill_test.py --kills 10     # train.py --smoke; some minutes

The whole process group gets SIGKILL: nothing can be tidied up. Afterwards every file of both runs must be equal, byte for byte:
metrics, rollouts, weights. Only the clock (state.json) and the command line (in config.json, best/run.json) may differ. The stages of a smoke
run last seconds, so that training saves its place every half second here instead of every ten: kills fall between two saves, too.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = "import sys, common, optim, train; optim.optimise.__kwdefaults__['save_every'] = 0.5; sys.exit(common.command_line(train.main))"


def start(out, flags):
    """-> the process of a run, and the file that gets what it says"""
    said = tempfile.TemporaryFile("w+")
    return subprocess.Popen([sys.executable, "-c", TRAIN, *flags, "--out", str(out)], cwd=ROOT, start_new_session=True, stdout=said, stderr=said), said


def last_words(process, said):
    """What an ended process said last; SystemExit with all of it if it failed."""
    said.seek(0)
    output = said.read()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"train.py ended with {process.returncode}:\n{output}")
    return (output.replace("\r", "\n").strip().splitlines() or ["nothing yet"])[-1]


def finish(out, flags):
    """Run to the end. -> seconds"""
    began, (process, said) = time.monotonic(), start(out, flags)
    process.wait()
    last_words(process, said)
    return time.monotonic() - began


def records(out):
    """Moments at which the stages of a run were finished (seconds of the system's clock), in order."""
    return sorted(f.stat().st_mtime for f in out.glob("iter*/*.json"))


def moments(out, began, kills, rng):
    """Random moments of a finished run. -> sorted list of (stages finished by then, seconds since the last of them)"""
    finished = [m - began for m in records(out)]
    drawn = sorted(rng.uniform(0, finished[-1]) for _ in range(kills))
    done = [sum(f <= m for f in finished) for m in drawn]
    return [(n, m - (finished[n - 1] if n else 0)) for n, m in zip(done, drawn)]


def kill(out, flags, stages, seconds):
    """Start or continue a run and kill it `seconds` after it has finished so many stages, or when it has finished one more.

    -> what it said last; None if it ended before.
    """
    (process, said), deadline = start(out, flags), None
    while process.poll() is None and (done := len(records(out))) <= stages and (deadline is None or time.monotonic() < deadline):
        if done == stages and deadline is None:
            deadline = time.monotonic() + seconds
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    words = last_words(process, said)
    return words if process.returncode else None


def files(out):
    """{path within the run: content} of everything that must not depend on interruptions."""
    content = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file() and f.suffix != ".tmp" and f.name != "state.json"}
    for name in {"config.json", "best/run.json"} & content.keys():
        told = json.loads(content[name])
        content[name] = {**told["flags"], "out": None, "data": told.get("data"), "metrics": told.get("metrics")}
    return content


def differences(a, b):
    """-> what two runs do not have in common, a line each."""
    a, b = files(a), files(b)
    return [f"{name}: {'differs' if name in a and name in b else 'is missing in one of them'}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, flags = Path(folder, "whole"), Path(folder, "killed"), ["--smoke"]
        began = time.time()
        duration = finish(whole, flags)
        plan, before = moments(whole, began, args.kills, random.Random(args.seed)), files(whole)
        startup = finish(whole, flags)  # nothing is left to do
        if files(whole) != before:
            raise SystemExit("the same command on a finished run changed it")
        print(f"undisturbed: {duration:.0f} s; the same command again: {startup:.0f} s, nothing changed", flush=True)
        fell = 0
        for stages, seconds in plan:
            done = len(records(killed))
            said = kill(killed, flags, max(stages, done), seconds if done < stages else startup + seconds)
            fell += said is not None
            print(f"killed with {len(records(killed)):2} of {len(records(whole))} stages done, while it said: {said[:70]}" if said else "ended before", flush=True)
        finish(killed, flags)
        wrong, left = differences(whole, killed), list(killed.rglob("*.tmp"))
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        print(f"{'FAILED' if wrong or fell < args.kills else 'EQUAL'}: after {fell} kills, {len(before) - len(wrong)} of {len(before)} files are byte for byte "
              f"those of the undisturbed run; temporary files left behind: {len(left)}")
        return 1 if wrong or fell < args.kills else 0


if __name__ == "__main__":
    sys.exit(main())
