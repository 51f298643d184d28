"""Every speed claim, side by side with what it is compared to, in one run.

    python bench.py env                     # the text world against alfworld's own engine and against json.load
    python bench.py env --json bench.json   # the same, for machines too
    python bench.py rollout --policy DIR    # episodes and decoding against transformers' generate on alfworld's engine
    python bench.py prm --policy DIR        # labels of a trajectory in one pass against a sequence for each (s, a)
    python bench.py dpo --policy DIR        # pairs as trees against TRL's DPOTrainer
    python bench.py muon --policy DIR       # a step of the optimiser against torch.optim.Muon's
    python bench.py floor --policy DIR      # what share of the machine's peak they reach

A ratio above 1 says that this repository is that many times better. Times are CPU times of one thread, so that what else runs
on the machine matters little. Between machines compare ratios.
"""

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import tracemalloc
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import process_time

from tqdm import tqdm

import env
from bench_learning import bench_dpo, bench_floor, bench_muon, bench_prm, bench_rollout
from common import Parser, command_line, write_json
from env import TASK_TYPES, AlfworldEnv, Game
from games import find_data, game_files, generate, write_games
from stock import StockAlfworldEnv

PER_TYPE = 2  # games of each task type that alfworld's engine plays; they take half a minute


# --- the text world ---------------------------------------------------------------------------------------------------

def bench_env(args):
    """-> rows. Every step and reset asks for the admissible commands, as alfworld's engine computes them anyway."""
    with tempfile.TemporaryDirectory() as made:
        files = train_files(args.data, made)
        by_type = [[path for path in files if path.parent.parent.name.startswith(task_type)] for task_type in TASK_TYPES]
        chosen = [group[i * len(group) // PER_TYPE] for group in by_type if group for i in range(PER_TYPE)]
        games = [Game.load(path) for path in chosen]
        load, start, step = stock_times(games)
        against_stock = partial(row, other_name="alfworld")
        yield against_stock("env.step", "us", cold_step(games), step)
        yield against_stock("env.step_warm", "us", warm_step(games), step)
        yield against_stock("env.reset", "us", median(lambda: [reset(AlfworldEnv(), game) for game in games]) / len(games), start)
        yield against_stock("env.load", "us", median(lambda: [Game.load(path) for path in chosen]) / len(games), load)
        yield against_stock("env.memory_per_game", "KB", memory(Game.load, files[::10]) / 1e3, memory(stock_loaded, chosen[:3]) / 1e3)
        yield row("env.load_all", "s", *load_all(files), f"json.load of all {len(files):,} files")
        if Path("/proc/self/status").exists():
            keep = "import json, sys; from pathlib import Path; from gamefile import Game; kept = [{} for path in sys.stdin.read().splitlines()]"
            ours, other = (peak(keep.format(what), files) for what in ("Game.load(path)", "json.loads(Path(path).read_bytes())"))
            yield row("env.load_all_peak", "MB", ours, other, "a process that keeps the decoded JSON")


def train_files(data, made):
    """The files of the train games or, where there are none, of generated games written to the folder `made`."""
    folder = find_data(data)
    if folder is None:
        write_games(generate("train", 600), made, "train")
        folder = Path(made, "json_2.1.1")
    return game_files(folder, "train")


def reset(world, game):
    return world.reset(game)[1]["admissible_commands"]


def walk(world, game):
    for command in game.walkthrough:
        world.step(command)[4]["admissible_commands"]


def cold_step(games):
    """Seconds a step, reset included, of episodes in one game after the other, with nothing remembered of earlier ones."""
    def play_each():
        env.commands.cache_clear(), env.describe.cache_clear()
        world = AlfworldEnv()
        for game in games:
            reset(world, game)
            walk(world, game)
    return median(play_each, 100) / sum(len(game.walkthrough) for game in games)


def warm_step(games):
    """Seconds a step, reset included, of the same episode again and again."""
    world = AlfworldEnv()
    def again(game):
        for _ in range(100):
            reset(world, game)
            walk(world, game)
    return sum(median(partial(again, game)) / 100 for game in games) / sum(len(game.walkthrough) for game in games)


def stock_times(games):
    """-> mean seconds of alfworld's engine for a load, a reset and a step."""
    world, load, start, step = StockAlfworldEnv(), 0, 0, 0
    for game in tqdm(games, "alfworld's engine", unit="game", leave=False):
        load -= process_time()
        world.load(game)
        now = process_time()
        world.reset(game)
        load, start, now = load + now, start + process_time() - now, process_time()
        walk(world, game)
        step += process_time() - now
    return load / len(games), start / len(games), step / sum(len(game.walkthrough) for game in games)


def stock_loaded(path):
    world = StockAlfworldEnv()
    world.load(Game.load(path))
    return world


def load_all(files):
    """-> seconds for all games and for json.load of their files, medians of turns, all files being in the page cache."""
    ours, other = [], []
    for turn in tqdm(range(6), "load all games", leave=False):
        start = process_time()
        for path in files:
            with open(path) as file:
                json.load(file)
        middle = process_time()
        kept = [Game.load(path) for path in files]
        end = process_time()
        if turn:  # the first one warms up
            ours.append(end - middle), other.append(middle - start)
        del kept
    return statistics.median(ours), statistics.median(other)


def memory(load, paths):
    """Bytes of Python objects a loaded game keeps."""
    kept = [load(paths[0])]  # what all share
    tracemalloc.start()
    kept += [load(path) for path in paths[1:]]
    gc.collect()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return size / (len(paths) - 1)


def peak(code, files):
    """Peak MB of a fresh Python process that runs `code` with the files on stdin."""
    tell = "; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"  # in KB
    run = subprocess.run([sys.executable, "-c", code + tell], input="\n".join(str(Path(file).resolve()) for file in files),
                         capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return int(run.stdout) / 1e3


# --- what all parts share ------------------------------------------------------------------------------------------------

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
    return {"what": what, "unit": unit, "ours": ours * scale, "other": other * scale, "other_name": other_name, "ratio": other / ours}


def machine():
    """The settings that stand above every table."""
    try:
        cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = "".join(f", {name} {version(name)}" for name in ("alfworld", "textworld", "torch") if find_spec(name))
    return f"{cpu}, {cores} cores, Python {platform.python_version()}{packages}"


BENCHES = {"env": bench_env, "rollout": partial(bench_rollout, row=row), "prm": partial(bench_prm, row=row), "dpo": partial(bench_dpo, row=row),
           "muon": partial(bench_muon, row=row), "floor": partial(bench_floor, row=row)}


def main():
    parser = Parser(__doc__, "%(prog)s PART [flags]")
    parser.add_argument("part", choices=BENCHES, help="what to measure")
    parser.add_argument("--data", metavar="DIR",
                        help="folder with json_2.1.1 (default: $ALFWORLD_DATA or ~/.cache/alfworld, else games are generated)")
    parser.add_argument("--policy", metavar="DIR", help="a trained policy, for all parts but env")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    gc.collect()
    gc.freeze()  # what was imported is no part of what is measured
    print(machine())
    print(f"{'':22}{'unit':>5}{'ours':>14}{'other':>16}{'ratio':>11}  other")
    rows = []
    for r in BENCHES[args.part](args):
        rows.append(r)
        print(f"{r['what']:22}{r['unit']:>5}{r['ours']:>14,.2f}{r['other']:>16,.2f}{r['ratio']:>11,.2f}  {r['other_name']}", flush=True)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    command_line(main)
