"""List, download and write games, and measure the scripted expert.

    python -m fast_alfworld list                                      # which games are found?
    python -m fast_alfworld download                                  # fetch the published games
    python -m fast_alfworld write --split train --n 1000 --out data   # write generated games
    python -m fast_alfworld expert --split valid_seen                 # success of the expert
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from . import games as store
from .cli import Parser, a_seed, at_least_one, between, command_line
from .engine import AlfworldEnv
from .expert import Expert, demonstrate, fit_prior, parse_task
from .gamefile import DataError
from .generate import SPLITS, generate


def parse_args(words):
    """The command line -> argparse.Namespace; `run` is the function of the subcommand."""
    parser = Parser(__doc__, "%(prog)s COMMAND [flags]", prog="python -m fast_alfworld")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser,
                                     prog="python -m fast_alfworld")
    where = "(default: $ALFWORLD_DATA, else alfworld's cache)"
    data = dict(metavar="DIR", default=argparse.SUPPRESS,
                help=f"the folder that holds json_2.1.1 {where}")
    share, seed = between(0, 1), dict(type=a_seed, default=0)

    one = commands.add_parser("list", help="list the games found")
    one.set_defaults(run=list_games)
    one.add_argument("--data", **data)

    one = commands.add_parser("download", help="download the published games (needs internet)")
    one.set_defaults(run=download)
    one.add_argument("--data", metavar="DIR", default=argparse.SUPPRESS,
                     help=f"the folder in which to make json_2.1.1 {where}")

    one = commands.add_parser("write", help="write generated games as files")
    one.set_defaults(run=write)
    one.add_argument("--out", metavar="DIR", required=True, default=argparse.SUPPRESS,
                     help="the games go to DIR/json_2.1.1/SPLIT (required)")
    one.add_argument("--split", default="train", choices=SPLITS, help="which games to generate")
    one.add_argument("--n", type=at_least_one, default=1000, metavar="N", help="number of games")
    one.add_argument("--tiny", action="store_true", help="small games with short tasks")
    one.add_argument("--seed", help="another seed gives other games", **seed)

    one = commands.add_parser("expert", help="measure the scripted expert")
    one.set_defaults(run=expert)
    one.add_argument("--data", **data)
    one.add_argument("--games", default="auto", choices=store.GAMES,
                     help="published games, generated ones, or auto: published if found")
    one.add_argument("--split", default="valid_seen", metavar="NAME",
                     help="train, valid_seen, valid_unseen, or dev, which is held out of train")
    one.add_argument("--n", type=at_least_one, default=1000, metavar="N",
                     help="number of games in a split of generated games")
    one.add_argument("--max-steps", type=at_least_one, default=30, metavar="N",
                     help="actions after which an episode is cut")
    one.add_argument("--mistakes", type=share, default=0.0, metavar="P",
                     help="probability of a random action that is masked from the loss")
    one.add_argument("--noise", type=share, default=0.0, metavar="P",
                     help="probability of a random action that is not masked")
    one.add_argument("--seed", help="seed of the random actions", **seed)
    return parser.parse_args(words)


def list_games(args):
    """Print the folder of the published games and the size of each split."""
    folder = store.find_data(getattr(args, "data", None))
    if folder is None:
        print(f"no ALFWorld games by --data, by $ALFWORLD_DATA or in {store.CACHE}: "
              "games will be generated")
        return
    print(f"ALFWorld games in {folder}:")
    for split in store.splits_of(folder):
        complete = f" of {store.COMPLETE[split]:,}" if split in store.COMPLETE else ""
        print(f"  {split:<13} {len(store.game_files(folder, split)):>5,} games{complete}")


def download(args):
    """Download the published games and list them."""
    args.data = getattr(args, "data", None) or os.environ.get("ALFWORLD_DATA") or store.CACHE
    store.download(Path(os.path.expanduser(args.data)))
    list_games(args)


def write(args):
    """Write generated games as files; refuse to mix them with others."""
    if args.split in store.splits_of(Path(args.out, "json_2.1.1")):
        raise DataError(f"{args.out} has games of {args.split} already: use another --out")
    games = tqdm(generate(args.split, args.n, args.seed, args.tiny), f"write {args.split}", args.n,
                 unit="game", disable=None)
    n = store.write_games(games, args.out, args.split)
    print(f"{n:,} games of {args.split} in {args.out}: read them by --data {args.out}")


def expert(args):
    """Play every game of a split once and print the expert's success."""
    if args.mistakes + args.noise > 1:
        raise DataError("--mistakes and --noise: their sum must be at most 1")
    data = getattr(args, "data", None)
    games, _ = store.games_for(args.games, data, args.split, args.n)
    train, _ = store.split_dev(store.games_for(args.games, data, "train", args.n)[0])
    player, rng, env = Expert(fit_prior(train)), np.random.default_rng(args.seed), AlfworldEnv()
    start = time.perf_counter()
    demos = [demonstrate(env, game, player, rng, args.mistakes, args.noise, args.max_steps)
             for game in games]
    speed = len(demos) / (time.perf_counter() - start)
    masked = np.mean([not step.trained for demo in demos for step in demo.steps])
    print(*table(demos, args.max_steps), sep="\n")
    print(f"{speed:,.0f} demonstrations/s; {masked:.1%} of the actions are masked from the loss")


def table(demos, max_steps):
    """Lines with mean actions and success within so many actions, by kind of task and in all."""
    kinds = [parse_task(demo.task).kind for demo in demos]
    caps = sorted({cap for cap in (20, 30, 50) if cap < max_steps} | {max_steps})
    lines = [f"{'task':6}{'games':>7}{'actions':>9}"
             + "".join(f"{f'won in {cap}':>11}" for cap in caps)]
    for kind in (*sorted(set(kinds)), "all"):
        chosen = [demo for demo, k in zip(demos, kinds) if kind in (k, "all")]
        actions = np.mean([len(demo.steps) for demo in chosen])
        within = [np.mean([demo.won and len(demo.steps) <= cap for demo in chosen]) for cap in caps]
        lines.append(f"{kind:6}{len(chosen):7,}{actions:9.2f}"
                     + "".join(f"{share:11.1%}" for share in within))
    return lines


def main():
    args = parse_args(sys.argv[1:])
    args.run(args)


if __name__ == "__main__":
    command_line(main)
