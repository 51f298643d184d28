"""Games on disk are found, counted and split; generated games are sound and can be won."""

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from fast_alfworld import (COMPLETE, TASK_TYPES, AlfworldEnv, DataError, Game, find_data, games,
                           games_for, generate, generated_split, split_dev, write_games)
from fast_alfworld.games import download, game_files, load_split, splits_of
from fast_alfworld.generate import SPLITS, TASKS, UNSEEN_ROOMS, plan
from fast_alfworld.layouts import TINY, package, room

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("alfworld")


def base(name):
    return name.rsplit(" ", 1)[0]


def facts(data, predicate):
    """The pairs of arguments of a predicate in the initial facts."""
    init = data["pddl_problem"].partition("(:init")[2].partition("(:goal")[0]
    return re.findall(rf"\({predicate} (\S+) (\S+)\)", init)


def homes(game):
    """[(object, receptacle)] at the start, by name."""
    return [(game.names[o], game.names[r]) for r, held in enumerate(game.start_contents,
                                                                    game.n_objects)
            for o in range(game.n_objects) if held >> o & 1]


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A machine without ALFWorld data."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setattr(games, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of written games: 40 of train, 4 of valid_unseen."""
    folder = tmp_path_factory.mktemp("written")
    assert write_games(generate("train", 40, seed=5), folder, "train") == 40
    write_games(generate("valid_unseen", 4, seed=5), folder, "valid_unseen")
    return folder


# --- generated games ------------------------------------------------------------------------------

def test_tiny_games_are_small_and_short(no_data, capsys):
    made = generated_split("train", 100, tiny=True)
    unseen = generated_split("valid_unseen", 20, tiny=True)
    for game in (*made, *unseen):
        assert game.task_type == "pick_and_place_simple" and len(plan(game)) <= 6
        assert game.n_objects <= TINY and len(game.room.names) <= TINY
    assert {game.scene for game in unseen} <= set(UNSEEN_ROOMS)
    assert not {game.scene for game in made} & set(UNSEEN_ROOMS)
    chosen, source = games_for("tiny", None, "train", 12)
    assert [game.id for game in chosen] == [game.id for game in made[:12]]
    assert "12 tiny games of train" in source
    assert not {game.id for game in chosen} & {id_ for id_, _ in generate("train", 12)}


@pytest.mark.parametrize("split, seed", tuple(zip(SPLITS, (0, 1, 2))))
def test_every_generated_game_is_a_sound_game_won_by_its_walkthrough(split, seed):
    env, ids, types = AlfworldEnv(max_steps=30), set(), set()
    for id_, data in generate(split, 200, seed):
        data = json.loads(json.dumps(data))  # exactly what a file would hold
        game = Game.parse(data, id_)
        task_type, wanted, none, target, scene = id_.split("/")[0].split("-")
        assert (game.task_type, game.id, game.scene, none) == (task_type, id_, int(scene), "None")
        ids.add(id_)
        types.add(task_type)
        assert (game.scene in UNSEEN_ROOMS) == (split == "valid_unseen")
        # The state at the start: one location per receptacle, one receptacle per object.
        places = dict(facts(data, "receptacleAtLocation"))
        assert len(places) == len(facts(data, "receptacleAtLocation")) == len(game.room.names)
        (_, start), = facts(data, "atLocation")
        assert start not in places.values()
        assert len(homes(game)) == len({o for o, _ in homes(game)}) == game.n_objects
        assert all(r.endswith("Type") and o.endswith("Type") for r, o in facts(data, "canContain"))
        # The task makes sense there.
        of_goal = [(o, base(r)) for o, r in homes(game) if base(o) == wanted.lower()]
        needs = {"pick_clean_then_place_in_recep": "sinkbasin",
                 "pick_heat_then_place_in_recep": "microwave",
                 "pick_cool_then_place_in_recep": "fridge",
                 "look_at_obj_in_light": "desklamp"}.get(task_type)
        assert len(of_goal) >= 1 + (task_type == "pick_two_obj_and_place")
        assert not needs or f"{needs} 1" in game.names
        assert target.lower() not in {r for _, r in of_goal} or needs
        assert needs not in {r for _, r in of_goal}
        # It is won by admissible commands, and not before the last of them.
        observation, info = env.reset(game)
        assert not info["won"] and game.task in observation
        for command in data["walkthrough"]:
            assert not info["won"] and command in info["admissible_commands"]
            observation, reward, terminated, truncated, info = env.step(command)
        assert info["won"] and terminated and reward == 1.0
    assert len(ids) == 200 and types == set(TASK_TYPES)


def test_task_sentences_and_rooms_of_generated_games(some_games):
    """Sentences fill the package's templates; games of a room share its receptacles."""
    seen, rooms = set(), defaultdict(set)
    for game in [*some_games, *generated_split("train", 400, seed=3),
                 *generated_split("valid_seen", 200, seed=6)]:
        _, wanted, _, target, _ = game.id.split("/")[0].lower().split("-")
        matching = [template for template in package().goals[game.task_type]["templates"]
                    if template.format(obj=wanted, recep=target, toggle=target) + "." == game.task]
        assert len(matching) == 1
        seen.update(matching)
        rooms[game.scene].add(game.room)
    assert len(seen) == 12  # two for each task type
    assert len(rooms) > 80 and all(len(same) == 1 for same in rooms.values())


def test_a_game_depends_on_split_seed_and_index_only():
    ten = list(generate("train", 10, seed=4))
    assert ten == list(islice(generate("train", 1000, seed=4), 10))
    problems = {data["pddl_problem"] for split in SPLITS for seed in (4, 5)
                for _, data in generate(split, 10, seed)}
    assert len(problems) == 60
    code = ("import hashlib, json; from fast_alfworld import generate; "
            "text = json.dumps([list(generate(s, 10, 0, t)) for s, t in (('train', 0), "
            "('valid_unseen', 1))]); print(hashlib.sha1(text.encode()).hexdigest())")
    hashes = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True,
                             env={**os.environ, "PYTHONHASHSEED": h}, capture_output=True).stdout
              for h in "12"}
    assert hashes == {"c240572a6b31b315680bbf5a1906462c26d83d93\n"}  # generated games never change


def test_a_game_is_generated_in_ten_milliseconds():
    start = time.process_time()
    assert sum(1 for _ in generate("train", 300)) == 300
    assert time.process_time() - start < 3


def test_alfworlds_environment_lists_written_games(folder):
    """AlfredTWEnv takes a game only with a `traj_data.json` beside it."""
    pytest.importorskip("textworld")
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
    path = str(folder / "json_2.1.1" / "train")
    config = {"env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
              "dataset": {"data_path": path, "num_train_games": -1}}
    assert AlfredTWEnv(config, train_eval="train").num_games == 40


# --- generated against published ------------------------------------------------------------------

def test_task_counts_are_those_of_the_published_games(published):
    kinds = {scene: kind for kind, scenes in package().constants.SCENE_TYPE.items()
             for scene in scenes}
    counts = Counter((game.task_type, kinds[game.scene]) for game in published)
    assert counts == {(task_type, kind): n for task_type, by_kind in TASKS.items()
                      for kind, n in by_kind.items()}


def test_generated_rooms_are_those_of_published_games(published):
    """The same kinds of receptacles (but for one bathtub), nearly as many of each."""
    total, odd = Counter(), []
    for scene, game in {game.scene: game for game in published}.items():
        real = Counter(map(base, game.room.names))
        made = Counter(type_.lower() for type_ in room(scene).receptacles.values())
        odd += [(scene, kind) for kind in set(real) ^ set(made)]
        total.update(real=real.total(), made=made.total(), common=(real & made).total())
    assert odd == [(420, "bathtubbasin")]
    assert total["common"] > 0.93 * max(total["real"], total["made"])


def profile(chosen):
    """{(kind of room, quantity): mean over the games}."""
    values = defaultdict(list)
    for game in chosen:
        here, kind = homes(game), game.scene // 100
        shut = {name for r, name in enumerate(game.room.names) if game.room.openable >> r & 1}
        values[kind, "objects"].append(len(here))
        values[kind, "kinds of objects"].append(len({base(o) for o, _ in here}))
        values[kind, "share behind doors"].append(sum(r in shut for _, r in here) / len(here))
        values[kind, "length of the walkthrough"].append(len(game.walkthrough))
    return {key: sum(of) / len(of) for key, of in values.items()}


def test_generated_games_are_like_published_ones(published):
    made, real = profile(generated_split("train", 600)), profile(published[::3])
    assert made.keys() == real.keys()
    for key in real:
        assert made[key] == pytest.approx(real[key], rel=0.15, abs=0.05), key


def fitting(chosen):
    """Pairs (receptacle, object) of base names that fit in some game, and those that do not."""
    may, may_not = set(), set()
    for game in chosen:
        fits = {(base(r), base(game.names[o])): type_ in accepted
                for r, accepted in zip(game.room.names, game.room.accepts)
                for o, type_ in enumerate(game.type_of) if type_}
        may |= {pair for pair, fit in fits.items() if fit}
        may_not |= {pair for pair, fit in fits.items() if not fit}
    return may, may_not


def test_what_fits_where_is_as_in_published_games(published):
    may, may_not = fitting(published[::10])
    made_may, made_may_not = fitting(generated_split("train", 300, seed=8))
    assert not may & made_may_not and not made_may & may_not and len(may & made_may) > 300


# --- games on disk --------------------------------------------------------------------------------

def test_written_games_come_back_the_same(folder):
    loaded = {game.id: game for game in load_split(find_data(folder), "train")}
    for game in generated_split("train", 40, seed=5):
        again = loaded[game.id]
        assert (again.intro, again.walkthrough) == (game.intro, game.walkthrough)


def test_data_is_looked_for_in_order(folder, no_data, monkeypatch, tmp_path):
    assert find_data() is None
    monkeypatch.setenv("ALFWORLD_DATA", str(games.CACHE))  # as importing alfworld leaves it
    assert find_data() is None
    write_games(generate("train", 1), games.CACHE, "train")
    assert find_data() == games.CACHE / "json_2.1.1"
    write_games(generate("train", 1), tmp_path / "env", "train")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "env"))
    assert find_data() == tmp_path / "env" / "json_2.1.1"
    for named in (folder, folder / "json_2.1.1", str(folder)):
        assert find_data(named) == folder / "json_2.1.1"


def test_a_named_folder_without_games_is_an_error(no_data, monkeypatch, tmp_path):
    for named in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="--data .*no games"):
            find_data(named)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"\$ALFWORLD_DATA .*no games"):
        find_data()


def test_an_incomplete_split_is_reported_and_an_empty_one_refused(folder, capsys):
    data_dir = find_data(folder)
    files = game_files(data_dir, "train")
    assert len(files) == 40 and files == sorted(files)
    assert re.fullmatch(r"warning: .*train has 40 games; the published split has 3,553\n",
                        capsys.readouterr().err)
    (data_dir / "valid_seen").mkdir(exist_ok=True)
    for split in ("valid_seen", "nonsense", "../json_2.1.1/train"):
        with pytest.raises(DataError, match="no games of split .*there is train, valid_unseen"):
            game_files(data_dir, split)
    with pytest.raises(DataError, match="nonsense"):
        next(generate("nonsense", 1))


def test_what_alfworld_leaves_out_is_left_out_and_counted(tmp_path, capsys):
    write_games(generate("valid_seen", 12, seed=2), tmp_path, "valid_seen")
    folders = sorted((tmp_path / "json_2.1.1/valid_seen").iterdir())
    for folder, part in zip(folders, ("pick_place_with_movable_recep", "AppleSliced")):
        parts = folder.name.split("-")
        folder.rename(folder.with_name("-".join([f"{parts[0]}_{part}", *parts[1:]])))
    file = next(folders[2].glob("*/game.tw-pddl"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"solvable": False}))
    capsys.readouterr()
    kept = load_split(find_data(tmp_path), "valid_seen")
    left = len(list(tmp_path.rglob("game.tw-pddl"))) - len(kept)
    assert left >= 3 and not any("movable" in g.id or "Sliced" in g.id for g in kept)
    assert f": {left} games left out" in capsys.readouterr().err


def test_published_splits_are_complete(data_dir, capsys):
    for split in splits_of(data_dir):
        if split in COMPLETE:
            assert len(game_files(data_dir, split)) == COMPLETE[split]
    assert capsys.readouterr().err == ""


def check_dev(train, dev, of, n):
    """Whole folders in proportion to the task types, whatever the order of the games."""
    ids = [{game.id for game in part} for part in (train, dev)]
    assert [g.id for g in of if g.id in ids[0]] == [g.id for g in train]
    assert [g.id for g in of if g.id in ids[1]] == [g.id for g in dev]
    assert not ids[0] & ids[1] and len(train) + len(dev) == len(of)
    folders = [{id_.split("/")[0] for id_ in part} for part in ids]
    assert not folders[0] & folders[1]
    assert abs(len(dev) - n) <= 1
    for task_type in TASK_TYPES:
        share = [sum(game.task_type == task_type for game in part) / len(part)
                 for part in (dev, of)]
        assert abs(share[0] - share[1]) <= 3 / n
    shuffled = random.Random(0).sample(of, len(of))
    assert {game.id for game in split_dev(shuffled, n)[1]} == ids[1]


def test_dev_of_the_published_games(published):
    train, dev = split_dev(published)
    check_dev(train, dev, published, 200)
    ids = json.dumps([game.id for game in dev]).encode()
    assert hashlib.sha1(ids).hexdigest()[:12] == "9e66f5591d35"  # dev never changes


@pytest.mark.parametrize("n", (20, 61))
def test_dev_of_generated_games(n):
    made = generated_split("train", 400, seed=9)
    check_dev(*split_dev(made, n), made, n)
    assert {g.id for g in split_dev(made, n, seed=1)[1]} != {g.id for g in split_dev(made, n)[1]}
    assert 8 <= len(split_dev(made[:50], 200)[1]) <= 10  # never more than a fifth


def test_games_for_takes_what_there_is_and_says_so(folder, no_data, capsys):
    made, source = games_for(n_generated=12, seed=3)
    assert [g.id for g in made] == [id_ for id_, _ in generate("train", 12, 3)]
    assert "12 generated games of train, seed 3" in source and "no ALFWorld data" in source
    assert capsys.readouterr().err == f"games: {source}\n"
    found, source = games_for(data=folder, n_generated=12)
    assert len(found) == 40 and source == f"40 games of train from {folder / 'json_2.1.1'}"
    assert len(games_for("generated", folder, n_generated=12)[0]) == 12
    dev, _ = games_for("auto", folder, "dev")
    assert [g.id for g in dev] == [g.id for g in split_dev(found)[1]] and 6 <= len(dev) <= 8
    for kind, message in (("alfworld", "no ALFWorld games"), ("fake", "--games fake")):
        with pytest.raises(DataError, match=message):
            games_for(kind)


def test_rooms_of_valid_unseen_are_not_accepted_in_train(no_data, tmp_path):
    write_games(generate("valid_unseen", 3), tmp_path, "train")
    for split in ("train", "dev"):
        with pytest.raises(DataError, match="rooms"):
            games_for("alfworld", tmp_path, split)


def test_download_unpacks_the_games_or_fails_in_one_line(folder, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "games.zip", "w") as archive:
        for path in folder.rglob("*"):
            archive.write(path, path.relative_to(folder))
    monkeypatch.setattr(games, "URL", (tmp_path / "games.zip").as_uri())
    download(tmp_path / "to")
    assert len(game_files(find_data(tmp_path / "to"), "train")) == 40
    assert not list((tmp_path / "to").rglob("*.json"))  # only the files that a game needs
    (tmp_path / "broken.zip").write_text("no zip")
    for url in ("http://127.0.0.1:9/games.zip", (tmp_path / "broken.zip").as_uri()):
        monkeypatch.setattr(games, "URL", url)
        with pytest.raises(DataError, match="cannot download .*") as error:
            download(tmp_path / "to")
        assert "\n" not in str(error.value)


# --- command line ---------------------------------------------------------------------------------

def run(*args, **env):
    command = [sys.executable, "-m", "fast_alfworld", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **env})


@pytest.mark.parametrize("args", (
    [], ["play"], ["list", "--data", "missing"], ["write"], ["write", "--out", "x", "--n", "0"],
    ["write", "--out", "x", "--n", "many"], ["write", "--out", "x", "--split", "dev"],
    ["write", "--out", "README.md"], ["expert", "--mistakes", "2"], ["expert", "--noise", "some"],
    ["expert", "--mistakes", "0.7", "--noise", "0.7"], ["expert", "--games", "chess"],
    ["expert", "--data", "/nowhere"]))
def test_bad_input_is_one_line_and_exit_code_2(args):
    result = run(*args)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: .+\n", result.stderr), result


def test_the_command_line_writes_and_lists(tmp_path):
    where = ("--out", tmp_path, "--split", "valid_unseen")
    result = run("write", *where, "--n", 7, "--seed", 2)
    assert result.returncode == 0 and "7 games of valid_unseen" in result.stdout
    found = load_split(find_data(tmp_path), "valid_unseen")
    assert {game.id for game in found} == {id_ for id_, _ in generate("valid_unseen", 7, 2)}
    again = run("write", *where, "--n", 2)
    assert again.returncode == 2 and "has games of valid_unseen already" in again.stderr
    for result in (run("list", "--data", tmp_path), run("list", ALFWORLD_DATA=str(tmp_path))):
        assert result.returncode == 0
        assert re.search(r"valid_unseen +7 games of 134", result.stdout)


def test_the_command_line_measures_the_expert():
    result = run("expert", "--games", "tiny", "--n", 20, "--split", "train", "--max-steps", 25)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == "task games actions won in 20 won in 25".split()
    assert lines[-2].split()[:2] == ["all", "20"] and lines[-2].endswith("100.0%")


@pytest.mark.parametrize("command, n", (("list", 1), ("download", 1), ("write", 5), ("expert", 8)))
def test_help_explains_every_flag_with_its_default(command, n):
    text = re.sub(r"\s+", " ", run(command, "--help").stdout.partition("message and exit")[2])
    flags = re.split(r" (?=--\w)", text)[1:]
    assert len(flags) == n
    assert all("(default: " in flag or "(required)" in flag for flag in flags), flags
