"""Where games come from: published ALFWorld games on disk or, without them, generated ones (generate.py).

    python games.py --list                                             # which data is found, and is it complete?
    python games.py --download                                         # fetch alfworld's own game files (needs internet)
    python games.py --split train --n 1000 --seed 0 --out data         # write generated games, for stock alfworld too
    python games.py --split valid_unseen --n 134 --out data            # ... and in the four held-out rooms
"""

import json
import os
import random
import sys
import tempfile
import urllib.request
import zipfile
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from .gamefile import DataError, Game
from .generate import UNSEEN_ROOMS, generated_split

COMPLETE = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}  # games of the published splits
CACHE = Path("~/.cache/alfworld").expanduser()  # where alfworld-download puts its data
NOT_FOUND = " (no ALFWorld data found)"
URL = "https://github.com/alfworld/alfworld/releases/download/0.4.0/json_2.1.2_tw-pddl.zip"  # alfworld-download's, 0.4.2


# --- games on disk -----------------------------------------------------------------------------------------------------

def find_data(data=None):
    """-> the folder that holds train/, valid_seen/, …: of `data`, else $ALFWORLD_DATA, else alfworld's cache; None without.

    `data` is the folder with `json_2.1.1` or json_2.1.1 itself. Raises DataError where a folder was named but has no games.
    """
    named = data or os.environ.get("ALFWORLD_DATA")
    root = Path(named).expanduser() if named else CACHE
    for folder in (root / "json_2.1.1", root):
        if splits_of(folder):
            return folder
    if data or root != CACHE:  # importing alfworld sets $ALFWORLD_DATA to its cache: that names nothing
        raise DataError(f"{'--data' if data else '$ALFWORLD_DATA'} {named}: no games (expected json_2.1.1/train/*/*/game.tw-pddl)")
    return None


def splits_of(folder):
    """Names of the subfolders of `folder` that hold games."""
    return sorted(path.name for path in folder.glob("*") if next(path.glob("*/*/game.tw-pddl"), None))


def game_files(data_dir, split):
    """-> sorted paths of a split's games. Says on stderr if they are not the complete split; DataError if there are none."""
    splits = splits_of(Path(data_dir))
    if split not in splits:
        raise DataError(f"{data_dir}: no games of split {split!r} (there is {', '.join(splits) or 'nothing'})")
    files = sorted(Path(data_dir, split).glob("*/*/game.tw-pddl"))
    if len(files) != COMPLETE.get(split, len(files)):
        print(f"warning: {data_dir}/{split} has {len(files):,} games; the published split has {COMPLETE[split]:,}", file=sys.stderr)
    return files


def load_split(data_dir, split):
    """-> [Game] of a split, in the order of their paths."""
    return [Game.load(path) for path in tqdm(game_files(data_dir, split), f"load {split}", unit="game", leave=False, disable=None)]


def task_folder(game_id):
    """The folder of a game's task: its trials have the same sentence and room."""
    return game_id.split("/")[0]


def split_dev(games, n=200, seed=0):
    """Hold out about n of the train games by task folder, spread over task types as the games are -> (train, dev).

    A folder is held out as a whole. The choice depends on the games and `seed` alone (leave it: dev is the same for all runs).
    Never more than a fifth of the games.
    """
    n = min(n, len(games) // 5)
    tasks = {}
    for game in games:
        tasks.setdefault((game.task_type, task_folder(game.id)), []).append(game.id)
    order = sorted(tasks)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda task: task[0])  # stable: shuffled within each task type
    held, seen = set(), 0
    for task_type in sorted({task_type for task_type, _ in tasks}):
        mine = [tasks[task] for task in order if task[0] == task_type]
        seen += sum(map(len, mine))
        for ids in mine:  # what one type is short of its share, the next one makes up for
            if len(held) + len(ids) <= round(n * seen / len(games)):
                held.update(ids)
    return [g for g in games if g.id not in held], [g for g in games if g.id in held]


GAMES = ("auto", "alfworld", "generated", "tiny")


def games_for(games="auto", data=None, split="train", n_generated=1000, seed=0):
    """The games a run asked for -> ([Game], what they are, in words); the words also go to stderr.

    games: "alfworld" (on disk, or DataError), "generated", "tiny" (generated, small and short), or "auto" (on disk if found). split: a folder of the
    data or "dev", the held-out part of train (`split_dev`; "train" is all of it). n_generated, seed: for generated games only.
    """
    if games not in GAMES:
        raise DataError(f"--games {games}: it is one of {', '.join(GAMES)}")
    folder = None if games in ("generated", "tiny") else find_data(data)
    if folder is None and games == "alfworld":
        raise DataError(f"no ALFWorld games in {CACHE}: name a folder by --data or $ALFWORLD_DATA, or run `python games.py --download`")
    on_disk = "train" if split == "dev" else split
    chosen = load_split(folder, on_disk) if folder else generated_split(on_disk, n_generated, seed, games == "tiny")
    if on_disk == "train" and any(game.scene in UNSEEN_ROOMS for game in chosen):
        raise DataError(f"{folder}/train has games in rooms {UNSEEN_ROOMS}, which are for valid_unseen only")
    chosen = split_dev(chosen)[1] if split == "dev" else chosen
    if not chosen:
        raise DataError(f"no games of {split}: there are too few")
    why = NOT_FOUND * (games == "auto")
    source = (f"{len(chosen):,} games of {split} from {folder}" if folder else
              f"{len(chosen):,} {games if games == 'tiny' else 'generated'} games of {split}, seed {seed}, alfworld {version('alfworld')}{why}")
    print(f"games: {source}", file=sys.stderr)
    return chosen, source


def write_games(games, out_dir, split):
    """Write pairs (id, data), as `generate` yields them, to out_dir/json_2.1.1/<split>/<id>/ -> how many.

    With the little that stock `AlfredTWEnv` and its expert read from `traj_data.json`. out_dir then is a --data.
    """
    n = 0
    for id_, data in games:
        folder = Path(out_dir, "json_2.1.1", split, id_)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out_dir}: cannot be written to ({error.strerror})") from None
        task_type, o, _, target, scene = task_folder(id_).split("-")
        look = task_type == "look_at_obj_in_light"
        parameters = {"object_target": o, "parent_target": "" if look else target, "toggle_target": target if look else "",
                      "mrecep_target": "", "object_sliced": False}
        trajectory = {"task_type": task_type, "pddl_params": parameters, "scene": {"scene_num": int(scene)}}
        (folder / "traj_data.json").write_text(json.dumps(trajectory))
        (folder / "game.tw-pddl").write_text(json.dumps(data))
        n += 1
    return n


# --- command line ------------------------------------------------------------------------------------------------------

def download(folder):
    """Fetch alfworld's own game files into `folder` (json_2.1.1/…). Raises DataError in one line when that fails."""
    try:
        with tempfile.TemporaryFile() as file:
            with urllib.request.urlopen(URL, timeout=60) as answer, tqdm(
                    total=int(answer.headers.get("Content-Length", 0)) or None, unit="B", unit_scale=True, desc="download") as bar:
                while block := answer.read(1 << 20):
                    file.write(block)
                    bar.update(len(block))
            with zipfile.ZipFile(file) as archive:
                for name in tqdm([name for name in archive.namelist() if name.endswith(".tw-pddl")], "unpack", unit="game"):
                    archive.extract(name, folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot download {URL}: {getattr(error, 'reason', error)}") from None
