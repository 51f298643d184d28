"""Speed, side by side with what it is compared to, in one run.

    python tools/bench.py env                    # the text world against alfworld's own engine
    python tools/bench.py rollout --json FILE    # episodes and decoding against transformers
    python tools/bench.py prm                    # labels in one pass against a sequence for each
    python tools/bench.py dpo                    # pairs as prefix trees against TRL's DPOTrainer

A ratio above 1 says that this repository is that many times better. Times are CPU times of one
thread, so that what else runs on the machine matters little; compare ratios between machines.
"""

import argparse
import gc
import statistics
import sys
import tempfile
from pathlib import Path
from time import process_time

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fast_alfworld import (TASK_TYPES, AlfworldEnv, Game, engine, find_data, generate, write_games)
from fast_alfworld.cli import Parser, command_line
from fast_alfworld.files import provenance, write_json
from fast_alfworld.games import game_files
from fast_alfworld.reference import ReferenceEnv
from tools.bench_models import bench_dpo, bench_prm, bench_rollout, load_policy
from tools.experiment import adder
from utils import generator, read_model, set_up_torch

PER_TYPE = 2  # games of each task type that alfworld's engine plays


# --- the text world ------------------------------------------------------------------------------

def bench_env(files):
    """The world on some games -> rows. Every step and reset asks for the admissible commands, which
    alfworld's engine computes anyway."""
    by_type = [[f for f in files if f.parent.parent.name.startswith(t)] for t in TASK_TYPES]
    chosen = [group[i * len(group) // PER_TYPE] for group in by_type if group
              for i in range(PER_TYPE)]
    games = [Game.load(path) for path in chosen]
    load, start, step = stock_times(games)
    yield row("env.step", "us", cold_step(games), step, "alfworld")
    resets = median(lambda: [reset(AlfworldEnv(), game) for game in games]) / len(games)
    yield row("env.reset", "us", resets, start, "alfworld")
    loads = median(lambda: [Game.load(path) for path in chosen]) / len(games)
    yield row("env.load", "us", loads, load, "alfworld")


def reset(world, game):
    return world.reset(game)[1]["admissible_commands"]


def walk(world, game):
    for command in game.walkthrough:
        world.step(command)[4]["admissible_commands"]


def cold_step(games):
    """Seconds a step, reset included, in one game after the other, with empty caches."""
    def play_each():
        engine.commands.cache_clear(), engine.describe.cache_clear()
        world = AlfworldEnv()
        for game in games:
            reset(world, game)
            walk(world, game)

    return median(play_each, 50) / sum(len(game.walkthrough) for game in games)


def stock_times(games):
    """-> mean seconds of alfworld's engine for a load, a reset and a step"""
    world, load, start, step = ReferenceEnv(), 0, 0, 0
    for game in tqdm(games, "alfworld's engine", unit="game", leave=False):
        load -= process_time()
        world.load(game)
        now = process_time()
        world.reset(game)
        load, start, now = load + now, start + process_time() - now, process_time()
        walk(world, game)
        step += process_time() - now
    return load / len(games), start / len(games), step / sum(len(g.walkthrough) for g in games)


# --- what all parts share ------------------------------------------------------------------------

def median(run, turns=7):
    """Median seconds of run()."""
    times = []
    for _ in range(turns):
        start = process_time()
        run()
        times.append(process_time() - start)
    return statistics.median(times)


def row(what, unit, ours, other, other_name):
    """One comparison; seconds become the unit. Less is better."""
    scale = {"us": 1e6, "ms": 1e3}.get(unit, 1)
    return {"what": what, "unit": unit, "ours": ours * scale, "other": other * scale,
            "other_name": other_name, "ratio": other / ours}


def train_files(data, made):
    """Files of train games or, where there are none, of generated ones written to `made`."""
    folder = find_data(data)
    if folder is None:
        write_games(generate("train", 120), made, "train")
        folder = Path(made, "json_2.1.1")
    return game_files(folder, "train")


PARTS = {"env": None, "rollout": bench_rollout, "prm": bench_prm, "dpo": bench_dpo}


def main():
    parser = Parser(__doc__, "%(prog)s PART [flags]")
    add = adder(parser)
    parser.add_argument("part", choices=PARTS, help="what to measure",
                        default=argparse.SUPPRESS)
    add("--policy", "checkpoints/policy", "folder of a policy, for all parts but env; where this "
        "default does not open, a random one", metavar="DIR")
    add("--episodes", 384, "episodes of ours that are timed in rollout; a sixteenth as many games",
        type=int, metavar="N")
    add("--stock-episodes", 12, "episodes on alfworld's own engine in rollout", type=int,
        metavar="N")
    add("--data", None, "folder with json_2.1.1 (default: $ALFWORLD_DATA or alfworld's cache, else "
        "games are generated)", type=str, metavar="DIR")
    add("--json", None, "write the rows there too", type=str, metavar="FILE")
    args = parser.parse_args()
    set_up_torch(1)
    default = parser.get_default("policy")
    if args.part != "env" and args.policy != default:
        read_model(args.policy)  # a mistake is reported before any work
    gc.collect()
    gc.freeze()  # what was imported is no part of what is measured
    rows, where = [], provenance()
    print(where["machine"], *(f"{k} {v}" for k, v in where["versions"].items()), sep=", ")
    print(f"{'':22}{'unit':>5}{'ours':>12}{'other':>14}{'ratio':>11}  other")
    with tempfile.TemporaryDirectory() as made:
        files = train_files(args.data, made)
        if args.part == "env":
            found = bench_env(files)
        else:
            order = generator("bench").permutation(len(files))[:max(64, args.episodes // 16)]
            games = [Game.load(files[i]) for i in order]
            policy = load_policy(args.policy, games, made, default)
            found = PARTS[args.part](row, *policy, games, args)
        for r in found:
            rows.append(r)
            print(f"{r['what']:22}{r['unit']:>5}{r['ours']:12,.2f}{r['other']:14,.2f}"
                  f"{r['ratio']:11,.2f}  {r['other_name']}", flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    command_line(main)
