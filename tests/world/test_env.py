"""The engine by itself: what a step does, snapshots, refused files. Parity: test_parity.py."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fast_alfworld
from fast_alfworld import (NOTHING_HAPPENS, TASK_TYPES, AlfworldEnv, Game, GameError, find_data,
                           generate)

ROOT = Path(__file__).resolve().parents[2]
VERBS = (("take", " from "), ("move", " to "), ("heat", " with "), ("clean", " with "),
         ("cool", " with "), ("slice", " with "))


@pytest.fixture(scope="module")
def games(some_games):
    """Generated games and, where there are any, published ones."""
    folder = find_data()
    paths = sorted(folder.glob("*/*/*/game.tw-pddl"))[::60] if folder else []
    return some_games + [Game.load(path) for path in paths]


@pytest.fixture(scope="module")
def data():
    """The content of a game file."""
    pytest.importorskip("alfworld")
    return next(generate("train", 1))[1]


def wander(env, info, rng, steps):
    """Play admissible commands, one in five the walkthrough's next -> [(command, all answers)]."""
    way, played = list(env.game.walkthrough), []
    for _ in range(steps):
        follow = way and rng.random() < 0.2
        command = way.pop(0) if follow else rng.choice(info["admissible_commands"])
        *answer, info = env.step(command)
        played.append((command, answer, info["won"], info["admissible_commands"]))
    return played


def replay(env, played):
    """Play the commands of `wander` again: the answers must be the same."""
    for command, answer, won, admissible in played:
        *again, info = env.step(command)
        assert (again, info["won"], info["admissible_commands"]) == (answer, won, admissible)


# --- the package ----------------------------------------------------------------------------------

def test_it_is_imported_without_torch_alfworld_or_textworld(data, tmp_path):
    """And plays a game from a file."""
    file = tmp_path / "game.tw-pddl"
    file.write_text(json.dumps(data))
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "alfworld", "textworld"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(ROOT)!r})
import fast_alfworld as world
assert all(hasattr(world, name) for name in world.__all__)
env, game = world.AlfworldEnv(), world.Game.load({str(file)!r})
env.reset(game)
assert [env.step(command)[2] for command in game.walkthrough][-1]
top = {{name.split(".")[0] for name in sys.modules}}
own = {{path.stem for path in __import__("pathlib").Path({str(ROOT)!r}).glob("*.py")}}
assert not top & (own | {{"torch", "alfworld", "textworld"}}), top
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_documented():
    for name in fast_alfworld.__all__:
        value = getattr(fast_alfworld, name)
        assert value.__doc__ and name in fast_alfworld.__doc__, name


# --- playing --------------------------------------------------------------------------------------

def test_walkthroughs_win_with_their_last_command(games):
    env = AlfworldEnv()
    assert {game.task_type for game in games} == set(TASK_TYPES)
    for game in games:
        env.reset(game)
        *before, last = [env.step(command) for command in game.walkthrough]
        assert last[1:4] == (1.0, True, False) and last[4]["won"], game.id
        assert all(answer[1:4] == (0.0, False, False) and answer[0] != NOTHING_HAPPENS
                   for answer in before), game.id


def test_all_published_walkthroughs_win(published):
    env = AlfworldEnv()
    for game in published:
        env.reset(game)
        assert [env.step(command)[2] for command in game.walkthrough][-1], game.id


def test_an_episode_is_truncated_but_can_go_on(some_games):
    game = some_games[0]
    env = AlfworldEnv(max_steps=2)
    env.reset(game)
    ends = [env.step("help")[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, True), (False, True)]
    env = AlfworldEnv(max_steps=len(game.walkthrough))
    env.reset(game)
    assert [env.step(c) for c in game.walkthrough][-1][2:4] == (True, False)  # won at the cap
    assert env.step("look")[1:3] == (1.0, True)  # it stays won while nothing undoes it


def test_a_goal_can_be_undone_and_reached_again(some_games):
    game = next(game for game in some_games if game.task_type == "pick_and_place_simple")
    env = AlfworldEnv()
    env.reset(game)
    for command in game.walkthrough:
        env.step(command)
    last = game.walkthrough[-1]
    undo = last.replace("move", "take").replace(" to ", " from ")
    assert [env.step(command)[1:3] for command in (undo, last)] == [(0.0, False), (1.0, True)]


def test_admissible_means_that_something_happens(games):
    rng, env = random.Random(0), AlfworldEnv()
    for game in games[::5]:
        _, info = env.reset(game)
        for _ in range(8):
            admissible = info["admissible_commands"]
            assert admissible == tuple(sorted(set(admissible)))
            state = env.snapshot()
            for command in admissible:
                assert env.step(f" {command}\n")[0] != NOTHING_HAPPENS, command
                env.restore(state)
            names = [rng.choice(game.names) for _ in range(40)]
            others = [f"{verb} {a}{word}{b}"
                      for verb, word in VERBS for a, b in zip(names, reversed(names))]
            others += [f"{verb} {a}" for verb in ("go to", "open", "close", "examine", "use")
                       for a in game.names]
            others += ["", "look around", "go", "LOOK", "help 1", "go to", "take",
                       admissible[0].replace(" ", "  ") + " ?"]
            for command in set(others) - set(admissible):
                observation, _, _, _, info = env.step(command)
                assert observation == NOTHING_HAPPENS, command
                assert env.snapshot()[2:] == state[2:], command  # all but the number of steps
            assert info["admissible_commands"] == admissible
            env.restore(state)
            doing = [c for c in admissible if c.startswith(("take", "move", "open"))]
            info = env.step(rng.choice(doing or admissible))[4]


def test_the_same_commands_give_the_same_answers(games):
    for game in games[::5]:
        first, second = AlfworldEnv(), AlfworldEnv()
        played = wander(first, first.reset(game)[1], random.Random(game.id), 40)
        wander(second, second.reset(games[1])[1], random.Random(1), 30)  # must leave no trace
        observation, info = second.reset(game)
        fresh = AlfworldEnv()
        fresh.reset(game)
        assert (observation, info["won"]) == (game.intro, False)
        assert second.snapshot() == fresh.snapshot()
        replay(second, played)
        assert second.snapshot() == first.snapshot()


# --- snapshots and info ---------------------------------------------------------------------------

def test_a_restored_snapshot_goes_on_as_it_did(games):
    for game in games[::3]:
        rng, env = random.Random(game.id), AlfworldEnv()
        wander(env, env.reset(game)[1], rng, rng.randrange(25))
        info = env.step("look")[4]
        snapshot = env.snapshot()
        played = wander(env, info, rng, 25)
        for _ in range(2):  # a snapshot can be used again
            env.restore(snapshot)
            replay(env, played)
        other = AlfworldEnv()  # and in another environment
        other.restore(snapshot)
        replay(other, played)


def test_admissible_commands_are_computed_when_asked_for(some_games, monkeypatch):
    asked = []
    compute = AlfworldEnv.admissible_commands
    monkeypatch.setattr(AlfworldEnv, "admissible_commands",
                        lambda env: asked.append(1) or compute(env))
    env = AlfworldEnv()
    _, first = env.reset(some_games[0])
    second = env.step("look")[4]
    assert not asked
    assert second["admissible_commands"] is second["admissible_commands"] and len(asked) == 1
    assert "admissible_commands" in first and "won" in first and "nothing" not in first
    assert first.get("nothing", 7) == 7
    third = env.step("look")[4]
    assert third.get("admissible_commands") is third["admissible_commands"] and len(asked) == 2
    # States with the same commands share one tuple, which no caller can change.
    assert type(third["admissible_commands"]) is tuple
    assert third["admissible_commands"] is second["admissible_commands"]


@pytest.mark.parametrize("move_on", (lambda env: env.step("look"), lambda env: env.reset(env.game),
                                     lambda env: env.restore(env.snapshot())))
def test_an_info_of_an_earlier_state_says_so(some_games, move_on):
    env = AlfworldEnv()
    env.reset(some_games[0])
    unread, current = env.step("look")[4], env.step("look")[4]
    with pytest.raises(RuntimeError, match="moved on"):
        unread["admissible_commands"]
    listed = current["admissible_commands"]
    move_on(env)
    assert current["admissible_commands"] is listed and current["won"] is False
    with pytest.raises(KeyError):
        current["score"]


def test_it_is_fast(games):
    """With a tenfold margin."""
    env, steps, start = AlfworldEnv(), 0, time.process_time()
    for game in games:
        env.reset(game)
        for command in game.walkthrough * 5:
            env.step(command)[4]["admissible_commands"]
        steps += 5 * len(game.walkthrough)
    assert (time.process_time() - start) / steps < 100e-6


# --- game files -----------------------------------------------------------------------------------

def test_the_attributes_of_a_game_agree(some_games):
    for game in some_games:
        parts = game.id.split("/")[0].split("-")
        assert parts[0] == game.task_type and game.scene == int(parts[-1])
        assert game.task in game.intro
        assert [game.index[name] for name in game.names] == list(range(len(game.names)))
        assert sum(game.counts.values()) == len(game.names)
        for base, n in game.counts.items():
            found = sorted(name for name in game.names if re.fullmatch(rf"{base} \d+", name))
            assert found == sorted(f"{base} {i}" for i in range(1, n + 1))


def same(a, b):
    return a.room is b.room and all(getattr(a, key) == getattr(b, key)
                                    for key in Game.__slots__ if key not in ("path", "room"))


def test_the_layout_of_the_file_does_not_matter(data, tmp_path):
    """The loader skips what it has decoded before, and still reads what the file says."""
    path = tmp_path / "pick-Mug-None-Desk-301" / "trial" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    other = next(other for _, other in generate("train", 500, seed=9)
                 if other["grammar"] != data["grammar"])
    for content in (data, other, {**data, "walkthrough": None},
                    {key: data[key] for key in reversed(data)},
                    {"solvable": True, **data, "extra": [1]}):
        for options in ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}):
            path.write_text(json.dumps(content, **options))
            assert same(Game.load(path), Game.parse(content, str(path)))
            assert same(Game.load(path), Game.load(str(path)))


def without(data, key):
    return {k: value for k, value in data.items() if k != key}


def replaced(data, key, pattern, by):
    """The file with the matches of a regular expression replaced in one of its texts."""
    return {**data, key: re.sub(pattern, by, data[key])}


def facts(data, change):
    """The file with its initial facts changed."""
    problem = data["pddl_problem"]
    start, end = problem.index("(:init"), problem.index("(:goal")
    return {**data, "pddl_problem": problem[:start] + change(problem[start:end]) + problem[end:]}


def add(data, line):
    return facts(data, lambda init: init.replace("(atLocation agent1",
                                                 f"{line}\n(atLocation agent1"))


def argument(data, predicate, i=0):
    """An argument of the first fact of a predicate."""
    return re.search(rf"\({predicate} (\S+) (\S+)\)", data["pddl_problem"])[1 + i]


def start_at(data, location):
    return facts(data, lambda init: re.sub(r"\(atLocation agent1 \S+\)", location, init))


MIDDLE = "does not start in the middle"
BREAKAGES = [  # what the message says, and the broken content: bytes, or a value written as JSON
    ("not JSON (Expecting", lambda data: b""),
    ("not JSON (Expecting", lambda data: b"not json"),
    ("not JSON (Unterminated", lambda data: json.dumps(data).encode()[:9999]),
    ("not JSON (Expecting ',' delimiter", lambda data: json.dumps(data).encode()[:-1]),
    ("not JSON ('utf-8' codec",
     lambda data: json.dumps(data).encode().replace(b"agent", b"\xff\xfe", 1)),
    ("not JSON (", lambda data: b"[" * 100_000),
    ("not a JSON object", lambda data: [data]),
    ("its pddl_domain is missing", lambda data: without(data, "pddl_domain")),
    ("its grammar is missing", lambda data: without(data, "grammar")),
    ("its pddl_problem is not a text", lambda data: {**data, "pddl_problem": None}),
    ("its grammar is not a text", lambda data: {**data, "grammar": [data["grammar"]]}),
    ("its walkthrough is not a list of texts", lambda data: {**data, "walkthrough": [1, "look"]}),
    ("its walkthrough is not a list of texts", lambda data: {**data, "walkthrough": "look"}),
    ("its pddl_domain is not that of alfworld 0.4",
     lambda data: {**data, "pddl_domain": data["pddl_domain"] + " "}),
    ("its grammar is not that of alfworld 0.4",
     lambda data: replaced(data, "grammar", "You open", "One opens")),
    ("games of older releases say `put X in/on Y`",
     lambda data: replaced(data, "grammar", "move {o} to {r}", "put {o} in/on {r}")),
    ("its grammar names no task",
     lambda data: replaced(data, "grammar", "is to: .*\"", "is to: {__import__('os')}\"")),
    ("its grammar names no task", lambda data: {**data, "grammar": ""}),
    ("lacks (:init …) or (:goal …)", lambda data: {**data, "pddl_problem": ""}),
    ("lacks (:init …) or (:goal …)",
     lambda data: replaced(data, "pddl_problem", r"\(:goal", "(:gaol")),
    ("its (:init …) is empty", lambda data: facts(data, lambda init: "(:init )")),
    ("is none of ALFWorld's six (empty)",
     lambda data: replaced(data, "pddl_problem", r"(?s)\(:goal.*", "(:goal ())")),
    ("is none of ALFWorld's six (",
     lambda data: replaced(data, "pddl_problem", r"\(inReceptacle \?", "(inHand ?")),
    ("is none of ALFWorld's six (",
     lambda data: replaced(data, "pddl_problem", r"Type\)\n", "Typ)\n")),
    ("states receptacleatlocation twice",
     lambda data: add(data, f"(receptacleAtLocation {argument(data, 'receptacleType')} loc_9)")),
    ("states objecttype twice",
     lambda data: add(data, f"(objectType {argument(data, 'objectType')} MugType)")),
    (MIDDLE, lambda data: add(data, "(atLocation agent1 loc_bar_0)")),
    (MIDDLE, lambda data: start_at(data, "")),
    (MIDDLE, lambda data: start_at(
        data, f"(atLocation agent1 {argument(data, 'receptacleAtLocation', 1)})")),
    ("states '(opened', which no game does",
     lambda data: add(data, f"(opened {argument(data, 'receptacleType')})")),
    ("states '(holds'",
     lambda data: add(data, f"(holds agent1 {argument(data, 'objectType')})")),
    ("breaks off in a fact of '(inreceptacle'",
     lambda data: facts(data, lambda init: init.rstrip(" )\n") + ") (inReceptacle a")),
    ("name 'mug_bar_1' but do not say what", lambda data: add(data, "(heatable Mug_bar_1)")),
    ("name 'desk_bar_1' but do not say what",
     lambda data: add(data, f"(inReceptacle {argument(data, 'objectType')} Desk_bar_1)")),
    ("it is marked as not solvable", lambda data: {**data, "solvable": False}),
    ("nothing in its room can meet its goal",
     lambda data: replaced(data, "pddl_problem", r"(?s)(?<=\(:goal).*",
                           lambda goal: re.sub(r"\w+Type\)", "BathtubType)", goal[0]))),
    ("other facts stand between",
     lambda data: facts(data, lambda init: init + "(canContain DeskType MugType)")),
]


@pytest.mark.parametrize("message, broken", BREAKAGES)
def test_a_broken_file_is_refused_in_one_line(data, tmp_path, message, broken):
    content, path = broken(data), tmp_path / "game.tw-pddl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(GameError) as error:
        Game.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text
    assert "\n" not in text and len(text) < 400


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(GameError, match=f"^{re.escape(str(path))}: cannot be read"):
            Game.load(path)


def test_corrupted_bytes_are_refused_or_make_a_game_that_can_be_played(data, tmp_path):
    rng, env, path = random.Random(0), AlfworldEnv(), tmp_path / "game.tw-pddl"
    good = json.dumps(data).encode()
    start, loaded = good.index(b"(:init"), 0
    for trial in range(400):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 10))):
            # every second time only in the facts, the goal and the walkthrough
            i = rng.randrange(start if trial % 2 else 0, len(raw))
            j = i + rng.choice((1, 1, 5, 500))
            raw[i:j] = rng.choice((b"", bytes([rng.randrange(256)]), raw[j:j + 9], raw[i:j] * 2))
        path.write_bytes(raw)
        try:
            game = Game.load(path)
        except GameError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            continue
        loaded += 1
        wander(env, env.reset(game)[1], rng, 10)
    assert 20 < loaded < 380
