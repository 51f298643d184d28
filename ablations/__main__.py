"""Run rows of the table of ablations, one run of train.py at a time, and print the table.

    python -m ablations --list                              # the table; runs nothing
    python -m ablations --only plain,rft,grpo --seeds 0,1,2 # runs what is missing
    python -m ablations --flags "--threads 1"               # all of them, on one core

A run lies in OUT/ROW/SEED; the same command continues. A row that does not change π_0 or the first
rollouts takes them from the row `plain` of its seed. The table, OUT/table.md, is rewritten after
each run: success in percent, mean ± standard deviation over seeds; for a single seed, the gain has
its 95 % interval over games.
"""

import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fast_alfworld.cli import Parser, UserError, a_seed, at_least_one, command_line
from fast_alfworld.files import read_json, write_file, write_json
import train


class Row(NamedTuple):
    """flags of train.py; the paper's result; what is shared with the row `plain`: "rollouts" (and
    π_0), "policy" (π_0 alone) or nothing; the share of --rollouts that is played."""
    flags: str
    paper: str = "no number"
    shares: str = "rollouts"
    rollouts: float = 1.0


INVERSE = "--algo inverseprm --iters 2"
PROMISE = "--prm-loss promise-progress"
ROWS = {
    "plain": Row("", "64.9 → 73.9"),
    "three": Row("--iters 3", "64.9 → 88.1"),
    "ref-init": Row("--iters 3 --ref init", "worse than π_{i−1}"),
    "dpo": Row("--improve dpo", "64.9 → 73.9"),
    "dpo-soft": Row("--improve dpo --labels soft"),
    "bt": Row("--prm-loss bt", "about equal to BCE"),
    "rft": Row("--ablation rft"),
    "grpo": Row("--ablation grpo"),
    "implicit": Row("--ablation implicit_prm"),
    "shuffled": Row("--ablation shuffled"),
    "reset": Row("--ablation reset", "73.9 → 82.0 (π_1)", "policy"),
    "steered": Row("--ablation steered", shares=""),
    "shaping": Row("--ablation shaping"),
    "shaping-potential": Row("--ablation shaping --shape potential"),
    "curiosity": Row("--ablation curiosity"),
    "ensemble": Row("--ablation ensemble", "no cure of hacking"),
    "ensemble-min": Row("--ablation ensemble --ensemble-by min", "no cure of hacking"),
    "world-states": Row("--ablation world_states"),
    "promise-mc": Row(PROMISE),
    "promise-td": Row(f"{PROMISE} --targets td-gae", "8 × less compute than forks"),
    "promise-sarsa": Row(f"{PROMISE} --targets td-gae --ablation sarsa"),
    "forks": Row(f"{PROMISE} --ablation forks --forks 4 --prm-epochs 22", shares="policy",
                 rollouts=0.045),  # about as many sampled tokens, and updates
    "inverse": Row(INVERSE, "SFT 63.4 → 82.8 → 86.6"),
    "inverse-hidden": Row(f"{INVERSE} --ablation hidden_ends"),
    "inverse-reset": Row(f"{INVERSE} --ablation reset", shares="policy"),
    **{f"degraded-{p}": Row(f"{INVERSE} --ablation degraded --noise {p / 100}", shares="")
       for p in (10, 25, 50)},
    "without-heat": Row("--ablation without_task", shares=""),
    "one-token": Row("--ablation one_token_names", shares=""),
}


def words_of(args, name, seed):
    """The flags of train.py for a run, as a list."""
    row = ROWS[name]
    n = max(2, round(row.rollouts * args.rollouts))
    return ["--iters", str(args.iters), "--rollouts", str(n), *shlex.split(args.flags),
            *shlex.split(row.flags), "--seed", str(seed), "--out", str(args.out / name / str(seed))]


def run(args, name, seed):
    """Run train.py, unless there is a result with the same flags. UserError if it fails."""
    folder, words = args.out / name / str(seed), words_of(args, name, seed)
    flags = vars(train.parse(words)[0])
    if (folder / "result.json").exists() and read_json(folder / "result.json")["flags"] == flags:
        return
    if ROWS[name].shares and name != "plain":
        run(args, "plain", seed)
        share(args.out / "plain" / str(seed), folder, flags, ROWS[name].shares == "rollouts")
    command = [sys.executable, str(Path(train.__file__)), *words]
    print("$", shlex.join(command), file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=sys.stderr).returncode
    if code:
        raise UserError(f"{folder}: train.py ended with exit code {code}")


def share(plain, folder, flags, rollouts):
    """Start a run with π_0 of the run `plain`, its evaluations and, if asked, its rollouts."""
    if folder.exists():
        return
    new = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    shutil.copytree(plain / "iter0", new / "iter0")
    if rollouts:
        shutil.copytree(plain / "iter1/rollouts", new / "iter1/rollouts")
        shutil.copy(plain / "iter1/rollouts.json", new / "iter1")
    write_json(new / "config.json", {**read_json(plain / "config.json"), "flags": flags})
    new.rename(folder)


def spread(values, sign=""):
    """Mean ± standard deviation in text."""
    error = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.1f}{error}"


def cells(results, split):
    """Results of the seeds of a row -> π_0, π_N and the gain on a split, texts."""
    rows = [(r["rows"][0][split], r["rows"][-1][split]) for r in results if split in r["rows"][0]]
    if not rows:
        return ["–"] * 3
    first, last = 100 * np.array([[row["success"] for row in pair] for pair in rows]).T
    gain = spread(last - first, "+")
    if len(rows) == 1:
        gain += " ({:+.1f} … {:+.1f})".format(*(100 * x for x in rows[0][1]["gain"][1:]))
    return [spread(first), spread(last), gain]


def table(args):
    """The rows of --only, and what their finished runs came to -> Markdown."""
    lines, found = [], {name: {} for name in args.only}
    for name, seed in product(args.only, args.seeds):
        if (file := args.out / name / str(seed) / "result.json").exists():
            found[name][seed] = read_json(file)
    splits = list(dict.fromkeys(k for done in found.values() for r in done.values()
                                for k, v in r["rows"][0].items() if isinstance(v, dict)))
    for name, done in found.items():
        command = shlex.join(words_of(args, name, 0)[:-4])
        lines.append([name, f"`train.py {command}`", ",".join(map(str, done)),
                      *(x for s in splits for x in cells(done.values(), s)), ROWS[name].paper])
    head = ["row", "command", "seeds", *(f"{s} {what}" for s in splits
                                         for what in ("π_0", "π_N", "gain")), "paper"]
    lines = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), default=list(ROWS), metavar="NAMES",
        help="rows, separated by commas (default: all)")
    add("--seeds", type=lambda text: list(map(a_seed, text.split(","))), default=[0],
        metavar="N,N", help="seeds (default: 0)")
    add("--iters", type=at_least_one, default=1, help="iterations where a row does not say")
    add("--rollouts", type=at_least_one, default=4000, help="episodes an iteration")
    add("--flags", default="", help="more flags of train.py for every run (default: none)")
    add("--out", type=Path, default=Path("runs/ablations"), metavar="DIR", help="folder of runs")
    add("--list", action="store_true", help="print the table and run nothing")
    args = parser.parse_args()
    if unknown := [name for name in args.only if name not in ROWS]:
        raise UserError(f"--only {unknown[0]}: must be among {', '.join(ROWS)}")
    failed = []
    for seed, name in product([] if args.list else args.seeds, args.only):
        try:
            run(args, name, seed)
        except UserError as error:  # the other rows go on
            failed.append(str(error))
            print(f"error: {error}", file=sys.stderr)
        write_file(args.out / "table.md", lambda path: path.write_text(table(args)))
    print(table(args), end="")
    if failed:
        raise UserError(f"{len(failed)} runs failed, the first: {failed[0]}")


if __name__ == "__main__":
    command_line(main, "interrupted; the same command continues where it stopped")
