"""How good are the labels Q̂ of a run? Checks on its rollouts, which train nothing.

    python tools/q_checks.py --run runs/default                # Q̂_1: the rollouts of π_0
    python tools/q_checks.py --run runs/default --iteration 2

Prints, and writes to RUN/q-checks/I.json: how many (s, a) there are, the variance of single returns
around Q̂ where (s, a) was revisited, the same by number of visits, the correlation of Q̂ from one
half of the rollouts with the returns of the other half at the same (s, a), and how often won and
lost episodes go back to a place where they have been.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_alfworld.cli import Parser, UserError, command_line
from fast_alfworld.files import write_json
from qestimate import history_keys, pearson, q_table
from rollout import SHARDS, load_trajectories
from tools.experiment import adder, open_run
from utils import read_model


def visit_statistics(table):
    """How often (s, a) are visited, and the variance of single returns around Q̂ where revisited.

    `by_visits`: of pairs with at least 1, 2, 4, … visits but fewer than the next number: how many,
    mean Q̂ (each pair weighs 1), and variance of the returns (Bessel's; each visit weighs 1).
    """
    count, again = table["count"], table["count"] > 1
    error = (table["returns"] - table["q_hat"]) ** 2 * count / np.maximum(1, count - 1)
    edges, by_visits = (1, 2, 4, 8, 16, 32, 64, np.inf), {}
    for low, high in zip(edges, edges[1:]):
        here = (count >= low) & (count < high)
        if here.any():
            weight, q_hat = 1 / count[here], table["q_hat"][here]
            by_visits[f"{low}+"] = {"pairs": int(weight.sum().round()),
                                    "q_hat": float(np.average(q_hat, weights=weight)),
                                    "variance": float(error[here].mean()) if low > 1 else None}
    return {"actions": len(count), "distinct_pairs": len(np.unique(table["pair"])),
            "distinct_states": len(np.unique(table["state"])), "by_visits": by_visits,
            "label_variance_where_revisited": float(error[again].mean()) if again.any() else None}


def held_out_check(trajectories, tokenizer, gamma, keys=history_keys):
    """Correlate Q̂ from half of the rollouts with the returns of the others, at the same (s, a)."""
    if len(trajectories) < 2:
        return {"pairs": 0, "pearson": None}
    even, odd = (q_table(trajectories[i::2], tokenizer, gamma, keys) for i in (0, 1))
    known = dict(zip(even["pair"].tolist(), even["q_hat"]))
    both = [(known[p], g) for p, g in zip(odd["pair"].tolist(), odd["returns"]) if p in known]
    return {"pairs": len(both), "pearson": pearson(*np.array(both).reshape(-1, 2).T)}


def repeats(trajectories, tokenizer):
    """Mean number of actions `go to X` after an earlier `go to X`, of won and of lost episodes."""
    found = {"won": [], "lost": []}
    for t in trajectories:
        places = [a for a in tokenizer.actions(t.ids) if a.startswith("go to ")]
        found["won" if t.won else "lost"].append(len(places) - len(set(places)))
    return {how: float(np.mean(some)) if some else None for how, some in found.items()}


def main():
    parser = Parser(__doc__)
    add = adder(parser)
    add("--run", "runs/default", "a run directory of train.py", metavar="DIR")
    add("--iteration", 1, "of whose rollouts", metavar="N")
    args = parser.parse_args()
    run, config = open_run(args.run)
    files = sorted(run.path.glob(f"iter{args.iteration}/rollouts/{SHARDS}"))
    if not files:
        raise UserError(f"{args.run}: no rollouts of iteration {args.iteration}")
    tokenizer, gamma = read_model(run.path / "iter0/policy")[1], config["flags"]["gamma"]
    played = [t for file in files for t in load_trajectories(file)]
    result = {"episodes": len(played), **visit_statistics(q_table(played, tokenizer, gamma)),
              "other_half": held_out_check(played, tokenizer, gamma),
              "go_to_repeated": repeats(played, tokenizer)}
    for name, value in result.items():
        print(f"{name}: {value}")
    write_json(run.path / f"q-checks/{args.iteration}.json", result)


if __name__ == "__main__":
    command_line(main)
