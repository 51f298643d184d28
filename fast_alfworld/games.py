"""Find, load, split, download and write games: published ones, or generated ones without them."""

import hashlib
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

from .gamefile import DataError, Game, UnsolvableError
from .generate import UNSEEN_ROOMS, generated_split

COMPLETE = {"train": 3553, "valid_seen": 140, "valid_unseen": 134}  # games in the published splits
GAMES = ("auto", "alfworld", "generated", "tiny")  # the values of `games_for(games=…)`
CACHE = Path(os.path.expanduser("~/.cache/alfworld"))  # where `alfworld-download` puts its data
URL = ("https://github.com/alfworld/alfworld/releases/download/0.4.0/"
       "json_2.1.2_tw-pddl.zip")  # what `alfworld-download` of alfworld 0.4.2 fetches


def find_data(data=None):
    """The folder that holds train/, valid_seen/, …, as a Path, or None if there is none.

    data: a folder that contains json_2.1.1, or json_2.1.1 itself. Without it, $ALFWORLD_DATA and
    then alfworld's cache are looked at. Raises DataError where a folder was named but has no games.
    """
    named = data or os.environ.get("ALFWORLD_DATA")
    root = Path(os.path.expanduser(named)) if named else CACHE
    for folder in (root / "json_2.1.1", root):
        if splits_of(folder):
            return folder
    # Importing alfworld sets $ALFWORLD_DATA to its cache, so that value is not the user's choice.
    if data or root != CACHE:
        raise DataError(f"{'--data' if data else '$ALFWORLD_DATA'} {named}: no games "
                        "(expected json_2.1.1/train/*/*/game.tw-pddl)")
    return None


def splits_of(folder):
    """The names of the subfolders of `folder` that hold games, sorted."""
    return sorted(path.name for path in folder.glob("*")
                  if next(path.glob("*/*/game.tw-pddl"), None))


def game_files(data_dir, split):
    """The sorted paths of a split's games.

    Warns on stderr if a published split is not complete. Raises DataError if there are no games.
    """
    splits = splits_of(Path(data_dir))
    if split not in splits:
        raise DataError(f"{data_dir}: no games of split {split!r} "
                        f"(there is {', '.join(splits) or 'nothing'})")
    files = sorted(Path(data_dir, split).glob("*/*/game.tw-pddl"))
    if len(files) != COMPLETE.get(split, len(files)):
        print(f"warning: {data_dir}/{split} has {len(files):,} games; "
              f"the published split has {COMPLETE[split]:,}", file=sys.stderr)
    return files


def load_split(data_dir, split):
    """The games of a split, a list of Game in the order of their paths.

    Left out, as alfworld does: games that are marked as not solvable, and tasks with movable
    receptacles or sliced objects. A line to stderr says how many.
    """
    files, games = game_files(data_dir, split), []
    for path in tqdm(files, f"load {split}", unit="game", leave=False, disable=None):
        if "movable" in path.parts[-3] or "Sliced" in path.parts[-3]:
            continue
        try:
            games.append(Game.load(path))
        except UnsolvableError:
            pass
    if len(games) < len(files):
        print(f"{data_dir}/{split}: {len(files) - len(games):,} games left out (not solvable, "
              "movable receptacles, or sliced objects), as alfworld does", file=sys.stderr)
    return games


def task_folder(game_id):
    """The folder of a game's task; the games in it share the task sentence and the room."""
    return game_id.split("/")[0]


def split_dev(games, n=200, seed=0):
    """Hold out about n of the train games -> (train, dev), two lists of Game.

    Whole task folders are held out, and every task type has the same share in dev as in `games`.
    At most a fifth of the games is held out. The choice depends on the games and the seed alone;
    keep the default seed, so that all experiments have the same dev.
    """
    n = min(n, len(games) // 5)
    tasks = {}
    for game in games:
        tasks.setdefault((game.task_type, task_folder(game.id)), []).append(game.id)
    order = sorted(tasks)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda task: task[0])  # a stable sort: shuffled within each task type
    held, seen = set(), 0
    for task_type in sorted({task_type for task_type, _ in tasks}):
        folders = [tasks[task] for task in order if task[0] == task_type]
        seen += sum(map(len, folders))
        for ids in folders:  # the target is cumulative: a later type makes up for a shortage
            if len(held) + len(ids) <= round(n * seen / len(games)):
                held.update(ids)
    return [g for g in games if g.id not in held], [g for g in games if g.id in held]


def games_for(games="auto", data=None, split="train", n_generated=1000, seed=0):
    """The games that a command asks for -> (list of Game, their source in words).

    games: "alfworld": published games (DataError without them); "generated"; "tiny": generated,
    small and with short tasks; "auto": published games if found, else generated ones.
    data: see `find_data`. split: a folder of the data, or "dev", the part of train that `split_dev`
    holds out; "train" is all of train. n_generated, seed: of generated games only.

    The source is also printed to stderr. Raises DataError where there are no such games, and
    GameError for a file that cannot be played.
    """
    if games not in GAMES:
        raise DataError(f"--games {games}: it is one of {', '.join(GAMES)}")
    folder = None if games in ("generated", "tiny") else find_data(data)
    if folder is None and games == "alfworld":
        raise DataError(f"no ALFWorld games in {CACHE}: name a folder by --data or $ALFWORLD_DATA, "
                        "or run `python -m fast_alfworld download`")
    of = "train" if split == "dev" else split
    if folder:
        chosen = load_split(folder, of)
    else:
        chosen = generated_split(of, n_generated, seed, tiny=games == "tiny")
    if of == "train" and any(game.scene in UNSEEN_ROOMS for game in chosen):
        raise DataError(f"{folder}/train has games in rooms {UNSEEN_ROOMS}, "
                        "which are for valid_unseen only")
    chosen = split_dev(chosen)[1] if split == "dev" else chosen
    if not chosen:
        raise DataError(f"no games of {split}: there are too few")
    if folder:
        source = f"{len(chosen):,} games of {split} from {folder}"
    else:
        kind = "tiny" if games == "tiny" else "generated"
        why = " (no ALFWorld data found)" * (games == "auto")
        source = (f"{len(chosen):,} {kind} games of {split}, seed {seed}, "
                  f"alfworld {version('alfworld')}{why}")
    print(f"games: {source}", file=sys.stderr)
    return chosen, source


def training_games(games, data, n_generated, test_splits, keep=lambda some: some):
    """What a training needs -> the train games, dev (held out of them), {test split: games}.

    games, data, n_generated: see `games_for`; a test split has a twentieth as many generated games.
    keep(list of Game) -> those of train and of dev that are used. Test splits without games are
    left out, with a line to stderr.
    """
    everything, _ = games_for(games, data, "train", n_generated)
    train, dev = map(keep, split_dev(everything))
    if not train or not dev:
        raise DataError(f"of {len(everything)} train games, {len(train)} are left to train on and "
                        f"{len(dev)} held out as dev: both must be more than 0")
    test = {}
    for split in test_splits:
        try:
            test[split], _ = games_for(games, data, split, max(8, n_generated // 20))
        except DataError:
            print(f"no games of {split}: not evaluated", file=sys.stderr)
    return train, dev, test


def name_counts(games):
    """All base names of objects and receptacles in some games -> {name: its highest number}"""
    counts = {}
    for game in games:
        for name, n in game.counts.items():
            counts[name] = max(n, counts.get(name, 0))
    return counts


def fingerprint(games):
    """A text that is equal for equal lists of games: their number and a hash of their ids."""
    ids = "\n".join(game.id for game in games)
    return f"{len(games)} games, {hashlib.sha256(ids.encode()).hexdigest()[:12]}"


def write_games(games, out_dir, split):
    """Write pairs (game id, data), as `generate` yields them -> how many were written.

    Each goes to out_dir/json_2.1.1/<split>/<game id>/game.tw-pddl, beside a traj_data.json with
    what alfworld's own environment and expert read of it. Raises DataError where that fails.
    """
    n = 0
    for game_id, data in games:
        folder = Path(out_dir, "json_2.1.1", split, game_id)
        task_type, wanted, _, target, scene = task_folder(game_id).split("-")
        look = task_type == "look_at_obj_in_light"
        trajectory = {"task_type": task_type, "scene": {"scene_num": int(scene)}, "pddl_params": {
            "object_target": wanted, "parent_target": "" if look else target, "mrecep_target": "",
            "toggle_target": target if look else "", "object_sliced": False}}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "traj_data.json").write_text(json.dumps(trajectory))
            (folder / "game.tw-pddl").write_text(json.dumps(data))
        except OSError as error:
            raise DataError(f"{out_dir}: cannot be written to ({error.strerror})") from None
        n += 1
    return n


def download(folder):
    """Fetch alfworld's game files into `folder`/json_2.1.1. Raises DataError where that fails."""
    try:
        with tempfile.TemporaryFile() as file:
            with urllib.request.urlopen(URL, timeout=60) as answer:
                size = int(answer.headers.get("Content-Length", 0)) or None
                with tqdm(total=size, unit="B", unit_scale=True, desc="download") as bar:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.endswith(".tw-pddl")]
                for name in tqdm(names, "unpack", unit="game"):
                    archive.extract(name, folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot download {URL}: {getattr(error, 'reason', error)}") from None
