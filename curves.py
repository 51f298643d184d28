"""Success against N: Best-of-N by the PRMs of a run, as a table and as JSON.

    python curves.py --run runs/default --best-of 1,2,4,8,16,32,64             # over actions, on dev
    python curves.py --run runs/default --best-of-episodes 1,2,4,8,16,32,64    # over whole episodes

Each π_k of the run acts by Q_k and by Q_{k+1}, the PRM trained on its own rollouts (the paper counts from zero: its (π_0, Q_0),
(π_1, Q_0), (π_1, Q_1), … are π_0 by Q_1, π_1 by Q_1, π_1 by Q_2, … here). Cap and games are those of the run. What stands in the
JSON file is not played again: an interrupted command goes on where it stopped, and one with more N adds to it.
"""

from pathlib import Path

from common import (RESUMED, Parser, UserError, a_seed, a_temperature, command_line, pick_device, read_json, read_model, same_settings, set_up_torch,
                    whole_numbers, write_json)
from eval import evaluate_policy, judge_best_episodes, paired_bootstrap, play
from games import games_of_run
from rollout import rollout, slots_for
from search import best_of_n, last_scores, read_prm
from stock import alfworld_version


def pairs_of_run(run, policies):
    """π_k with Q_k and with Q_{k+1}, as far as the run has them; policies: which k, or None for all. -> [(k, number of the PRM)]"""
    there = lambda i, kind: (run / f"iter{i}/{kind}/config.json").exists()
    found = [k for k in range(1000) if there(k, "policy") and (policies is None or k in policies)]
    return [(k, i) for k in found for i in (k, k + 1) if there(i, "prm")]


def find(rows, k, i, over, n):
    """The row of Best-of-`n` over actions or episodes by π_k and Q_i, or None; n = 1 leaves no choice, so one row serves all PRMs."""
    wanted = {"policy": k, "prm": i if n > 1 else None, "over": over, "n": n}
    return next((row for row in rows if row.items() >= wanted.items()), None)


def row(k, i, over, n, result):
    return {"policy": k, "prm": i if n > 1 else None, "over": over, "n": n, **result}


def over_actions(rows, run, pairs, numbers, games, device, episodes_per_game, options):
    """Yield each missing row of Best-of-N over actions."""
    for k, i in pairs:
        policy, tokenizer = read_model(run / f"iter{k}/policy", device)
        prm = read_prm(run / f"iter{i}/prm", tokenizer, device, one_state=True)
        for n in numbers:
            if not find(rows, k, i, "actions", n):
                yield row(k, i, "actions", n, evaluate_policy(
                    policy, tokenizer, games, episodes_per_game=episodes_per_game, slots=slots_for(policy, n),
                    choose=best_of_n(prm, n) if n > 1 else None, name=f"π_{k}, best of {n}" + f" by Q_{i}" * (n > 1), **options))


def over_episodes(rows, run, pairs, numbers, games, device, options):
    """Yield each missing row of Best-of-N over episodes. The largest N of each game are played once, for every N and every PRM."""
    for k in sorted({k for k, _ in pairs}):
        missing = [(i, n) for j, i in pairs for n in numbers if j == k and not find(rows, k, i, "episodes", n)]
        if missing:
            policy, tokenizer = read_model(run / f"iter{k}/policy", device)
            prms = {i: read_prm(run / f"iter{i}/prm", tokenizer, device) for i in {i for i, _ in missing}}  # before playing, to tell what cannot
            played = play(lambda todo: rollout(policy, tokenizer, todo, **options), games, max(numbers), f"π_{k}, {max(numbers)} episodes a game")
            q = {i: last_scores(prm, played) for i, prm in prms.items()}
        for i, n in missing:
            whole = [x for x, t in enumerate(played) if t.episode < max(numbers) // n * n]  # those that make up groups of n
            if not find(rows, k, i, "episodes", n):
                yield row(k, i, "episodes", n, judge_best_episodes([played[x] for x in whole], q[i][whole], n, games))


def table(rows, pairs, over, numbers):
    """-> lines of text: success by pair and N, and what the largest N gains over the smallest, with its 95 % interval in points."""
    lines = [f"{f'best of N {over}':26}" + "".join(f"{f'N = {n}':>8}" for n in numbers)]
    for k, i in pairs:
        mine = [find(rows, k, i, over, n) for n in numbers]
        gap, low, high = (100 * x for x in paired_bootstrap(mine[0]["episodes"], mine[-1]["episodes"]))
        lines.append(f"{f'π_{k} by Q_{i}':26}" + "".join(f"{r['success']:8.1%}" for r in mine) + f"   {gap:+.1f} ({low:+.1f} … {high:+.1f})")
        if over == "episodes":
            lines.append(f"{'  one of the N won (oracle)':26}" + "".join(f"{r['oracle']:8.1%}" for r in mine))
    return lines


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", default="runs/default", help="a run directory of train.py", metavar="DIR")
    add("--best-of", type=whole_numbers, default=[], metavar="N,N,…",
        help="curve over actions for these N (default: 1,2,4,8,16,32,64, or none with --best-of-episodes)")
    add("--best-of-episodes", type=whole_numbers, default=[], help="curve over whole episodes for these N (default: none)", metavar="N,N,…")
    add("--policies", type=whole_numbers, help="only these π_k (default: all)", metavar="K,K,…")
    add("--split", default="dev", help="dev (what the run held out of train), or a folder of the data: train, valid_seen, valid_unseen")
    add("--data", help="folder that holds json_2.1.1 (default: the run's)", metavar="DIR")
    add("--temperature", type=a_temperature, help="sampling temperature (default: that of the run's evaluation)", metavar="X")
    add("--episodes-per-game", type=int, default=1, help="episodes a game, over actions", metavar="N")
    add("--seed", type=a_seed, default=0, help="names all randomness")
    add("--threads", type=int, help="CPU threads (default: all cores)", metavar="N")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--json", help="the results so far, to be added to (default: curves-SPLIT.json in the run)", metavar="FILE")
    args = parser.parse_args()
    run, asked = Path(args.run), {"actions": args.best_of, "episodes": args.best_of_episodes}
    if not any(asked.values()):
        asked["actions"] = [1, 2, 4, 8, 16, 32, 64]
    if 0 in asked["actions"] + asked["episodes"] or args.episodes_per_game < 1:
        raise UserError("--best-of, --best-of-episodes and --episodes-per-game are at least 1")
    if not (run / "data.json").exists():
        raise UserError(f"{run}: no run of train.py there (data.json is missing)")
    pairs = pairs_of_run(run, args.policies)
    if not pairs:
        raise UserError(f"{run}: no policy with a PRM" + f" among π_{args.policies}" * bool(args.policies))
    set_up_torch(args.threads)
    device, flags = pick_device(args.device), read_json(run / "config.json")["flags"]
    games, source = games_of_run(run, args.split, args.data)
    temperature = flags["eval_temperature"] if args.temperature is None else args.temperature
    if not temperature and max(asked["actions"] + asked["episodes"]) > 1:
        raise UserError("at temperature 0 all samples are the same: --temperature X")
    options = {"temperature": temperature, "max_steps": flags["max_steps"], "seed": args.seed}
    settings = {"run": run.resolve().name, "split": args.split, "data": source, "engine": "fast", "alfworld": alfworld_version(),
                "episodes_per_game": args.episodes_per_game, **options}
    file = Path(args.json or run / f"curves-{args.split}.json")
    result = read_json(file) if file.exists() else {**settings, "rows": []}
    if not isinstance(result, dict):
        raise UserError(f"{file} holds no results of curves.py: name another --json")
    same_settings(file, result, settings, "name another --json")
    write_json(file, result)  # what cannot be written is told before playing
    for over, missing in (("actions", over_actions(result["rows"], run, pairs, asked["actions"], games, device, args.episodes_per_game, options)),
                          ("episodes", over_episodes(result["rows"], run, pairs, asked["episodes"], games, device, options))):
        for one in missing if asked[over] else ():
            result["rows"].append(one)
            write_json(file, result)
    print(f"{source}, cap {options['max_steps']}, temperature {options['temperature']}; "
          "behind the rows: largest N over smallest, points (95 % interval)")
    for over in (over for over in asked if asked[over]):
        print(*table(result["rows"], pairs, over, asked[over]), sep="\n")
    print(f"written to {file}")


if __name__ == "__main__":
    command_line(main, RESUMED)
