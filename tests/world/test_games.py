"""Games: those on disk are found and counted, the generated ones are ALFWorld games that can be won."""

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

import games
from env import TASK_TYPES, AlfworldEnv, Game
from generate import TASKS, TINY, UNSEEN_ROOMS, DataError, package, plan, room

ROOT = Path(games.__file__).parent
SPLITS = ("train", "valid_seen", "valid_unseen")


def base(name):
    return name.rsplit(" ", 1)[0]


def facts(data, predicate):
    init = data["pddl_problem"].partition("(:init")[2].partition("(:goal")[0]
    return re.findall(rf"\({predicate} (\S+) (\S+)\)", init)


def homes(game):
    """[(object, receptacle)] at the start, by name."""
    return [(game.names[o], game.names[r]) for r, held in enumerate(game.start_contents, game.n_objects)
            for o in range(game.n_objects) if held >> o & 1]


@pytest.fixture
def no_data(monkeypatch, tmp_path):
    """A machine without ALFWorld data."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setattr(games, "CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of written games: 40 of train, 4 of valid_unseen."""
    folder = tmp_path_factory.mktemp("written")
    assert games.write_games(games.generate("train", 40, seed=5), folder, "train") == 40
    games.write_games(games.generate("valid_unseen", 4, seed=5), folder, "valid_unseen")
    return folder


# --- generated games ---------------------------------------------------------------------------------------------------

def test_tiny_games_are_small_and_short(no_data, capsys):
    made, unseen = games.generated_split("train", 200, tiny=True), games.generated_split("valid_unseen", 20, tiny=True)
    for game in (*made, *unseen):
        assert game.task_type == "pick_and_place_simple" and len(game.names) - game.n_objects <= TINY and game.n_objects <= TINY
        assert len(plan(game)) <= 6
    assert {game.scene for game in unseen} <= set(UNSEEN_ROOMS) and not {game.scene for game in made} & set(UNSEEN_ROOMS)
    chosen, words = games.games_for("tiny", None, "train", 12)
    assert [game.id for game in chosen] == [game.id for game in made[:12]] and "12 tiny games of train" in words
    assert not {game.id for game in chosen} & {game.id for game in games.generated_split("train", 12)}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("seed", (0, 1, 2))
def test_every_generated_game_is_a_sound_game_won_by_its_walkthrough(split, seed):
    env, ids, types = AlfworldEnv(max_steps=30), set(), set()
    for id_, data in games.generate(split, 120, seed):
        data = json.loads(json.dumps(data))  # exactly what a file would hold
        game = Game.parse(data, id_)
        task_type, wanted, none, target, scene = id_.split("/")[0].split("-")
        assert (game.task_type, game.id, game.scene, none) == (task_type, id_, int(scene), "None")
        ids.add(id_)
        types.add(task_type)
        assert (game.scene in UNSEEN_ROOMS) == (split == "valid_unseen")
        # the state at the start
        places = dict(facts(data, "receptacleAtLocation"))
        assert len(places) == len(facts(data, "receptacleAtLocation")) == len(game.names) - game.n_objects
        (_, start), = facts(data, "atLocation")
        assert start not in places.values()
        assert len(homes(game)) == len({o for o, _ in homes(game)}) == game.n_objects
        allowed = {pair for pair in facts(data, "canContain")}
        assert all(r.endswith("Type") and o.endswith("Type") for r, o in allowed)
        # the task makes sense there
        of_goal = [(o, base(r)) for o, r in homes(game) if base(o) == wanted.lower()]
        needs = {"pick_clean_then_place_in_recep": "sinkbasin", "pick_heat_then_place_in_recep": "microwave",
                 "pick_cool_then_place_in_recep": "fridge", "look_at_obj_in_light": "desklamp"}.get(task_type)
        assert len(of_goal) >= 1 + (task_type == "pick_two_obj_and_place")
        assert not needs or f"{needs} 1" in game.names
        assert target.lower() not in {r for _, r in of_goal} or needs
        assert needs not in {r for _, r in of_goal}
        # and is won by the walkthrough, by admissible commands, not earlier
        observation, info = env.reset(game)
        assert not info["won"] and game.task in observation
        for command in data["walkthrough"]:
            assert not info["won"] and command in info["admissible_commands"]
            observation, reward, terminated, truncated, info = env.step(command)
        assert info["won"] and terminated and reward == 1.0
    assert len(ids) == 120 and types == set(TASK_TYPES)


def test_task_sentences_are_the_packages_templates():
    seen = set()
    for game in games.generated_split("train", 400, seed=3):
        _, wanted, _, target, _ = game.id.split("/")[0].lower().split("-")
        templates = package().goals[game.task_type]["templates"]
        matching = [t for t in templates if t.format(obj=wanted, recep=target, toggle=target) + "." == game.task]
        assert len(matching) == 1
        seen.update(matching)
    assert len(seen) == 12  # two for each task type


def test_a_game_depends_on_split_seed_and_index_only():
    ten = list(games.generate("train", 10, seed=4))
    assert ten == list(islice(games.generate("train", 1000, seed=4), 10))
    problems = {data["pddl_problem"] for split in SPLITS for seed in (4, 5) for _, data in games.generate(split, 10, seed)}
    assert len(problems) == 60
    code = "import games, hashlib, json; print(hashlib.sha1(json.dumps(list(games.generate('train', 10, 4))).encode()).hexdigest())"
    runs = {subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": h}, check=True,
                           capture_output=True).stdout for h in "12"}
    assert len(runs) == 1


def test_all_games_of_a_room_share_its_receptacles():
    rooms = defaultdict(set)
    for split in ("train", "valid_seen"):
        for game in games.generated_split(split, 300, seed=6):
            rooms[game.scene].add(game.intro.partition("\n\nYour task")[0])
    assert len(rooms) > 80 and all(len(intros) == 1 for intros in rooms.values())


def test_a_thousand_games_in_ten_seconds():
    start = time.process_time()
    assert len(games.generated_split("train", 1000)) == 1000
    assert time.process_time() - start < 10


def test_stock_alfworld_plays_generated_games_of_all_six_types(tmp_path):
    pytest.importorskip("textworld")
    from stock import StockAlfworldEnv
    chosen = {}
    for id_, data in games.generate("train", 200, seed=7):
        chosen.setdefault(id_.split("-")[0], (id_, data))
    assert set(chosen) == set(TASK_TYPES)
    games.write_games([*chosen.values(), *games.generate("valid_unseen", 1, seed=7)], tmp_path, "train")
    referee, env = StockAlfworldEnv(), AlfworldEnv()
    for game in games.load_split(games.find_data(tmp_path), "train"):
        assert referee.reset(game)[0] == env.reset(game)[0]
        for command in game.walkthrough:
            theirs, ours = referee.step(command), env.step(command)
            assert theirs[0] == ours[0] and theirs[4]["won"] == ours[4]["won"]
            assert sorted(theirs[4]["admissible_commands"]) == ours[4]["admissible_commands"]
        assert theirs[4]["won"], game.id


def test_stock_environment_lists_written_games(written, capsys):
    """AlfredTWEnv takes a game only with a `traj_data.json` beside it."""
    pytest.importorskip("textworld")
    from alfworld.agents.environment.alfred_tw_env import AlfredTWEnv
    config = {"env": {"goal_desc_human_anns_prob": 0, "task_types": [1, 2, 3, 4, 5, 6]},
              "dataset": {"data_path": str(written / "json_2.1.1" / "train"), "num_train_games": -1}}
    assert AlfredTWEnv(config, train_eval="train").num_games == 40


# --- generated against published ---------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published(data_dir):
    return games.load_split(games.find_data(data_dir), "train")


def test_task_counts_are_those_of_the_published_games(published):
    kinds = {scene: kind for kind, scenes in package().constants.SCENE_TYPE.items() for scene in scenes}
    counts = Counter((game.task_type, kinds[game.scene]) for game in published)
    assert counts == {(task_type, kind): n for task_type, by_kind in TASKS.items() for kind, n in by_kind.items()}


def test_generated_rooms_are_those_of_published_games(published):
    """The same kinds of receptacles (but for a bathtub that one layout lacks), nearly as many of each."""
    total, odd = Counter(), []
    for scene, game in {game.scene: game for game in published}.items():
        real = Counter(map(base, game.room.names))
        made = Counter(t.lower() for t in room(scene).receptacles.values())
        odd += [(scene, kind) for kind in set(real) ^ set(made)]
        total.update(real=real.total(), made=made.total(), common=(real & made).total())
    assert odd == [(420, "bathtubbasin")]
    assert total["common"] > 0.93 * max(total["real"], total["made"])


def test_generated_games_are_like_published_ones(published):
    """Means over the games in one kind of room; what each is, is said by its name."""
    def profile(chosen):
        of_kind = defaultdict(lambda: defaultdict(list))
        for game in chosen:
            here = homes(game)
            shut = {name for r, name in enumerate(game.room.names) if game.room.openable >> r & 1}
            for name, value in (("objects in sight or hidden", len(here)), ("their kinds", len({base(o) for o, _ in here})),
                                ("share behind doors", sum(r in shut for _, r in here) / len(here)),
                                ("walkthrough", len(game.walkthrough))):
                of_kind[game.scene // 100][name].append(value)
        return {(kind, name): sum(values) / len(values) for kind, by in of_kind.items() for name, values in by.items()}
    made, real = profile([Game.parse(data, id_) for id_, data in games.generate("train", 600)]), profile(published[::3])
    assert made.keys() == real.keys()
    for key in real:
        assert made[key] == pytest.approx(real[key], rel=0.15, abs=0.05), key


def test_what_fits_where_is_as_in_published_games(published):
    """No pair of types that a published game allows is refused, or the other way round, where both have the types."""
    def pairs(game):
        may, may_not = set(), set()
        for r, accepted in zip(game.room.names, game.room.accepts):
            for o, type_ in enumerate(game.type_of):
                (may if type_ in accepted else may_not).add((base(r), base(game.names[o])))
        return may, may_not - may  # two published games have an object without a type, which fits nowhere
    may, may_not, made_may, made_may_not = set(), set(), set(), set()
    for game in published[::10]:
        may |= pairs(game)[0]
        may_not |= pairs(game)[1]
    for game in games.generated_split("train", 300, seed=8):
        made_may |= pairs(game)[0]
        made_may_not |= pairs(game)[1]
    assert not may & made_may_not and not made_may & may_not and len(may & made_may) > 300


# --- games on disk -----------------------------------------------------------------------------------------------------

def test_written_games_come_back_the_same(written):
    loaded = {game.id: game for game in games.load_split(games.find_data(written), "train")}
    for game in games.generated_split("train", 40, seed=5):
        assert (loaded[game.id].intro, loaded[game.id].walkthrough) == (game.intro, game.walkthrough)


def test_data_is_looked_for_in_order(written, no_data, monkeypatch, tmp_path):
    assert games.find_data() is None
    monkeypatch.setenv("ALFWORLD_DATA", str(games.CACHE))  # as importing alfworld leaves it
    assert games.find_data() is None
    games.write_games(games.generate("train", 1), games.CACHE, "train")
    assert games.find_data() == games.CACHE / "json_2.1.1"
    games.write_games(games.generate("train", 1), tmp_path / "env", "train")
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path / "env"))
    assert games.find_data() == tmp_path / "env" / "json_2.1.1"
    for named in (written, written / "json_2.1.1", str(written)):
        assert games.find_data(named) == written / "json_2.1.1"


def test_a_named_folder_without_games_is_an_error(no_data, monkeypatch, tmp_path):
    for named in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="--data .*no games"):
            games.find_data(named)
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"\$ALFWORLD_DATA .*no games"):
        games.find_data()


def test_an_incomplete_split_is_said_and_an_empty_one_refused(written, capsys):
    folder = games.find_data(written)
    files = games.game_files(folder, "train")
    assert len(files) == 40 and files == sorted(files)
    assert re.fullmatch(r"warning: .*train has 40 games; the published split has 3,553\n", capsys.readouterr().err)
    (folder / "valid_seen").mkdir(exist_ok=True)
    for split in ("valid_seen", "nonsense", "../json_2.1.1/train"):
        with pytest.raises(DataError, match="no games of split .*there is train, valid_unseen"):
            games.game_files(folder, split)
    with pytest.raises(DataError, match="nonsense"):
        next(games.generate("nonsense", 1))


def test_published_splits_are_complete(data_dir, capsys):
    folder = games.find_data(data_dir)
    for split in games.splits_of(folder):
        if split in games.COMPLETE:
            assert len(games.game_files(folder, split)) == games.COMPLETE[split]
    assert capsys.readouterr().err == ""


def check_dev(train, dev, of, n):
    assert [g for g in of if g in train] == train and [g for g in of if g in dev] == dev and len(train) + len(dev) == len(of)
    folders = [{game.id.split("/")[0] for game in part} for part in (train, dev)]
    assert not folders[0] & folders[1]
    assert abs(len(dev) - n) <= 1
    for task_type in TASK_TYPES:
        share = [sum(game.task_type == task_type for game in part) / len(part) for part in (dev, of)]
        assert abs(share[0] - share[1]) <= 3 / n
    assert {game.id for game in games.split_dev(of[::-1], n)[1]} == {game.id for game in dev}


def test_dev_holds_out_whole_folders_in_proportion(published):
    check_dev(*games.split_dev(published), published, 200)


@pytest.mark.parametrize("n", (20, 50, 61))
def test_dev_of_generated_games(n):
    made = games.generated_split("train", 500, seed=9)
    check_dev(*games.split_dev(made, n), made, n)
    assert {g.id for g in games.split_dev(made, n, seed=1)[1]} != {g.id for g in games.split_dev(made, n)[1]}
    train, dev = games.split_dev(made[:50], 200)
    assert 8 <= len(dev) <= 10  # never more than a fifth


def test_games_for_takes_what_there_is_and_says_so(written, no_data, capsys):
    made, source = games.games_for(n_generated=12, seed=3)
    assert [g.id for g in made] == [id_ for id_, _ in games.generate("train", 12, 3)] and "12 generated games of train, seed 3" in source
    assert capsys.readouterr().err == f"games: {source}\n"
    found, source = games.games_for(data=written, n_generated=12)
    assert len(found) == 40 and source == f"40 games of train from {written / 'json_2.1.1'}"
    assert len(games.games_for("generated", written, n_generated=12)[0]) == 12
    dev, _ = games.games_for("auto", written, "dev")
    assert [g.id for g in dev] == [g.id for g in games.split_dev(found)[1]] and 6 <= len(dev) <= 8
    for kind, message in (("alfworld", "no ALFWorld games"), ("fake", "--games fake")):
        with pytest.raises(DataError, match=message):
            games.games_for(kind)


def test_rooms_of_valid_unseen_never_train(no_data, tmp_path):
    games.write_games(games.generate("valid_unseen", 3), tmp_path, "train")
    for split in ("train", "dev"):
        with pytest.raises(DataError, match="rooms"):
            games.games_for("alfworld", tmp_path, split)


def test_download_unpacks_the_games_or_fails_in_one_line(written, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "games.zip", "w") as archive:
        for path in written.rglob("*"):
            archive.write(path, path.relative_to(written))
    monkeypatch.setattr(games, "URL", (tmp_path / "games.zip").as_uri())
    games.download(tmp_path / "to")
    assert len(games.game_files(games.find_data(tmp_path / "to"), "train")) == 40
    assert not list((tmp_path / "to").rglob("*.json"))  # of the archive only what a game needs
    (tmp_path / "broken.zip").write_text("no zip")
    for url in ("http://127.0.0.1:9/games.zip", (tmp_path / "broken.zip").as_uri()):
        monkeypatch.setattr(games, "URL", url)
        with pytest.raises(DataError, match="cannot download .*") as error:
            games.download(tmp_path / "to")
        assert "\n" not in str(error.value)


# --- command line ------------------------------------------------------------------------------------------------------

def run(*args, **env):
    command = [sys.executable, "games.py", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize("args", (["--list", "--data", "missing"], ["--out", "x", "--n", "0"], ["--out", "x", "--n", "many"],
                                  ["--out", "x", "--split", "dev"], ["--out", "games.py"], []))
def test_a_bad_value_is_one_line_and_exit_code_2(args):
    result = run(*args)
    assert result.returncode == 2 and result.stdout == "" and re.fullmatch(r"error: .+\n", result.stderr), result


def test_command_line_writes_and_lists(tmp_path):
    result = run("--out", tmp_path, "--n", 7, "--split", "valid_unseen", "--seed", 2)
    assert result.returncode == 0 and "7 games of valid_unseen" in result.stdout
    found = games.load_split(games.find_data(tmp_path), "valid_unseen")
    assert {game.id for game in found} == {id_ for id_, _ in games.generate("valid_unseen", 7, 2)}
    again = run("--out", tmp_path, "--n", 2, "--split", "valid_unseen")
    assert again.returncode == 2 and "has games of valid_unseen already" in again.stderr
    for result in (run("--list", "--data", tmp_path), run("--list", ALFWORLD_DATA=str(tmp_path))):
        assert result.returncode == 0 and re.search(r"valid_unseen +7 games of 134", result.stdout)


def test_help_explains_every_flag_with_its_default():
    text = run("--help").stdout.partition("options:")[2].partition("help message and exit")[2]
    flags = re.findall(r"^  --\w+", text, re.M)
    assert len(flags) == 7 == text.count("(default:")


def test_the_same_games_may_lie_in_another_folder_but_not_be_others():
    assert games.same_games("3,553 games of train from /here", "3,553 games of train from /there")
    assert not games.same_games("3,553 games of train from /here", "140 games of train from /here")
    assert not games.same_games("200 generated games of train, seed 0", "200 generated games of train, seed 1")
