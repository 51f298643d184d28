"""Kill a training run at random moments, continue it each time, and compare what comes out with an undisturbed run.

    python tests/kill_test.py --kills 10     # train.py --smoke, some minutes

The whole process group gets SIGKILL: nothing can be tidied up. Afterwards every file of both runs must be equal, byte for byte:
metrics, labels' statistics, rollouts, weights. Only the clock (state.json) and the command line (config.json) may differ.
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


def train(out, flags, seconds=None):
    """Run train.py, killed after so many seconds. -> (exit code, seconds it ran, its output)"""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "train.py", *flags, "--out", str(out)], cwd=ROOT, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return process.returncode, time.monotonic() - start, output


def must(out, flags):
    """Run to the end. -> seconds"""
    code, seconds, output = train(out, flags)
    if code:
        raise SystemExit(f"train.py ended with {code}:\n{output}")
    return seconds


def files(out):
    """{path within the run: content} of everything that must not depend on interruptions."""
    content = {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file() and f.suffix != ".tmp" and f.name != "state.json"}
    flags = json.loads(content["config.json"])["flags"]
    content["config.json"] = {k: v for k, v in flags.items() if k != "out"}
    return content


def differences(a, b):
    """-> names of files that two runs do not share, or that differ."""
    a, b = files(a), files(b)
    return [f"{name}: {'differs' if name in a and name in b else 'is missing in one of them'}" for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def kill_and_continue(out, flags, kills, duration, startup, rng):
    """Train with `kills` interruptions spread over the work. -> where each one fell"""
    gaps = [rng.random() for _ in range(kills + 1)]
    fell = []
    for gap in gaps[:kills]:
        delay = startup * rng.uniform(0.7, 1) + duration * gap / sum(gaps)
        code, seconds, output = train(out, flags, delay)
        if code != -signal.SIGKILL:
            if code:
                raise SystemExit(f"train.py ended with {code}:\n{output}")
            break  # finished before
        done = sorted(f"{f.parent.name}/{f.stem}" for f in out.glob("iter*/*.json"))
        fell.append(f"{seconds:5.1f} s, {len(done)} stages done, at: {output.replace(chr(13), chr(10)).strip().splitlines()[-1][:60] if output.strip() else 'the start'}")
    must(out, flags)
    return fell


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, help="how often to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder, "whole"), Path(folder, "killed")
        flags = ["--smoke"]
        duration = must(whole, flags)
        before = files(whole)
        startup = must(whole, flags)  # nothing left to do
        if files(whole) != before:
            raise SystemExit("running the same command on a finished run changed it")
        print(f"undisturbed: {duration:.1f} s, of which {startup:.1f} s to start; again on the finished run: nothing changed", flush=True)
        for line in kill_and_continue(killed, flags, args.kills, duration - startup, startup, random.Random(args.seed)):
            print("killed after", line)
        wrong = differences(whole, killed)
        left = [f.name for f in killed.rglob("*.tmp")]
        print(*wrong, sep="\n", end="\n" * bool(wrong))
        print(f"{'FAILED' if wrong else 'EQUAL'}: {len(before) - len(wrong)} of {len(before)} files are byte for byte those of the undisturbed run; "
              f"{len(left)} temporary files left behind")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
