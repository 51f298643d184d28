"""The text world by itself: what a step means, snapshots, and game files that are refused. Parity is in test_parity.py."""

import json
import random
import re
import time

import pytest

from env import NOTHING_HAPPENS, TASK_TYPES, AlfworldEnv, Game, GameError
from games import find_data, generate

VERBS = (("take", " from "), ("move", " to "), ("heat", " with "), ("clean", " with "), ("cool", " with "), ("slice", " with "))


@pytest.fixture(scope="module")
def worlds(some_games):
    """Generated games and, where there are any, published ones."""
    folder = find_data()
    return some_games + [Game.load(path) for path in sorted(folder.glob("*/*/*/game.tw-pddl"))[::60]] if folder else some_games


@pytest.fixture(scope="module")
def data(some_games):
    """A game file's content."""
    return next(generate("train", 1))[1]


def wander(env, info, rng, steps):
    """Play admissible commands, one in five being the walkthrough's next -> [(command, all that came back)]."""
    way, played = list(env.game.walkthrough), []
    for _ in range(steps):
        command = way.pop(0) if way and rng.random() < 0.2 else rng.choice(info["admissible_commands"])
        *answer, info = env.step(command)
        played.append((command, answer, info["won"], info["admissible_commands"]))
    return played


def replay(env, played):
    for command, answer, won, admissible in played:
        *again, info = env.step(command)
        assert (again, info["won"], info["admissible_commands"]) == (answer, won, admissible)


# --- playing ----------------------------------------------------------------------------------------------------------

def test_walkthroughs_win_with_their_last_command(worlds):
    env = AlfworldEnv()
    assert {game.task_type for game in worlds} == set(TASK_TYPES)
    for game in worlds:
        env.reset(game)
        *before, last = [env.step(command) for command in game.walkthrough]
        assert last[1:4] == (1.0, True, False) and last[4]["won"], game.id
        assert all(answer[1:4] == (0.0, False, False) and answer[0] != NOTHING_HAPPENS for answer in before), game.id


def test_all_published_walkthroughs_win(data_dir):
    env = AlfworldEnv()
    for path in data_dir.glob("*/*/*/game.tw-pddl"):
        game = Game.load(path)
        env.reset(game)
        assert [env.step(command)[2] for command in game.walkthrough][-1], game.id


def test_an_episode_is_cut_but_can_go_on(some_games):
    game = some_games[0]
    env = AlfworldEnv(max_steps=2)
    env.reset(game)
    assert [env.step("help")[2:4] for _ in range(3)] == [(False, False), (False, True), (False, True)]
    env = AlfworldEnv(max_steps=len(game.walkthrough))
    env.reset(game)
    assert [env.step(command) for command in game.walkthrough][-1][2:4] == (True, False)  # won at the cap is not cut
    assert env.step("look")[1:3] == (1.0, True)  # a state that is won stays won while nothing undoes it


def test_a_goal_can_be_undone_and_reached_again(some_games):
    game = next(game for game in some_games if game.task_type == "pick_and_place_simple")
    env = AlfworldEnv()
    env.reset(game)
    for command in game.walkthrough:
        env.step(command)
    undo = game.walkthrough[-1].replace("move", "take").replace(" to ", " from ")
    assert [env.step(command)[1:3] for command in (undo, game.walkthrough[-1])] == [(0.0, False), (1.0, True)]


def test_admissible_means_that_something_happens(worlds):
    rng, env = random.Random(0), AlfworldEnv()
    for game in worlds[::4]:
        _, info = env.reset(game)
        for _ in range(8):
            admissible = info["admissible_commands"]
            assert admissible == sorted(set(admissible))
            state = env.snapshot()
            for command in admissible:
                assert env.step(f" {command}\n")[0] != NOTHING_HAPPENS, command
                env.restore(state)
            names = [rng.choice(game.names) for _ in range(40)]
            others = [f"{verb} {a}{word}{b}" for verb, word in VERBS for a, b in zip(names, reversed(names))]
            others += [f"{verb} {a}" for verb in ("go to", "open", "close", "examine", "use") for a in game.names]
            others += ["", "look around", "go", "LOOK", "help 1", "go to", "take", admissible[0].replace(" ", "  ") + " ?"]
            for command in set(others) - set(admissible):
                observation, _, _, _, info = env.step(command)
                assert observation == NOTHING_HAPPENS, command
                assert env.snapshot()[2:] == state[2:], command  # but for the step, which counts
            assert info["admissible_commands"] == admissible
            env.restore(state)
            info = env.step(rng.choice([c for c in admissible if c.startswith(("take", "move", "open"))] or admissible))[4]


def test_the_same_commands_give_the_same_answers(worlds):
    for game in worlds[::5]:
        first, second = AlfworldEnv(), AlfworldEnv()
        played = wander(first, first.reset(game)[1], random.Random(game.id), 40)
        second.reset(worlds[0])
        wander(second, second.reset(worlds[1])[1], random.Random(1), 30)  # what was played before leaves no trace
        observation, info = second.reset(game)
        fresh = AlfworldEnv()
        fresh.reset(game)
        assert (observation, info["won"]) == (game.intro, False) and second.snapshot() == fresh.snapshot()
        replay(second, played)
        assert second.snapshot() == first.snapshot()


# --- snapshots and info -------------------------------------------------------------------------------------------------

def test_a_restored_snapshot_goes_on_as_it_did(worlds):
    for game in worlds[::3]:
        rng, env = random.Random(game.id), AlfworldEnv()
        wander(env, env.reset(game)[1], rng, rng.randrange(25))
        snapshot = env.snapshot()
        played = wander(env, env._info(), rng, 25)
        for _ in range(2):  # a snapshot can be used again, and in another world
            env.restore(snapshot)
            replay(env, played)
        other = AlfworldEnv()
        other.restore(snapshot)
        replay(other, played)


def test_admissible_commands_are_computed_when_asked_for(some_games, monkeypatch):
    asked = []
    compute = AlfworldEnv.admissible_commands
    monkeypatch.setattr(AlfworldEnv, "admissible_commands", lambda env: asked.append(1) or compute(env))
    env = AlfworldEnv()
    _, first = env.reset(some_games[0])
    second = env.step("look")[4]
    assert not asked and second["admissible_commands"] is second["admissible_commands"] and len(asked) == 1
    assert "admissible_commands" in first and "won" in first and "nothing" not in first and first.get("nothing", 7) == 7
    third = env.step("look")[4]
    assert third.get("admissible_commands") == third["admissible_commands"] and len(asked) == 2
    second = env.step("look")[4]
    second["admissible_commands"].clear()  # the caller's own list
    assert env.step("look")[4]["admissible_commands"]


@pytest.mark.parametrize("move_on", (lambda env: env.step("look"), lambda env: env.reset(env.game), lambda env: env.restore(env.snapshot())))
def test_an_info_of_the_past_says_so(some_games, move_on):
    env = AlfworldEnv()
    env.reset(some_games[0])
    known, unknown = env.step("look")[4], env.step("look")[4]
    with pytest.raises(RuntimeError, match="moved on"):
        known["admissible_commands"]
    listed = unknown["admissible_commands"]
    move_on(env)
    assert unknown["admissible_commands"] is listed and unknown["won"] is False
    with pytest.raises(KeyError):
        unknown["score"]


def test_it_is_fast(worlds):
    """With a tenfold margin; `bench.py env` measures."""
    env, steps, start = AlfworldEnv(), 0, time.process_time()
    for game in worlds:
        env.reset(game)
        for command in game.walkthrough * 5:
            env.step(command)[4]["admissible_commands"]
        steps += 5 * len(game.walkthrough)
    assert (time.process_time() - start) / steps < 100e-6


# --- game files ---------------------------------------------------------------------------------------------------------

def test_what_a_game_says_of_itself(some_games):
    for game in some_games:
        assert game.id.split("/")[0].split("-")[0] == game.task_type and game.scene == int(game.id.split("/")[0].split("-")[-1])
        assert game.task in game.intro and [game.index[name] for name in game.names] == list(range(len(game.names)))
        assert sum(game.counts.values()) == len(game.names)
        for base, n in game.counts.items():
            assert sorted(name for name in game.names if re.fullmatch(rf"{base} \d+", name)) == sorted(f"{base} {i}" for i in range(1, n + 1))


def same(a, b):
    return all(getattr(a, k) == getattr(b, k) for k in Game.__slots__ if k not in ("path", "room")) and a.room is b.room


def test_the_layout_of_the_file_does_not_matter(data, tmp_path):
    """The loader skips what it has decoded before: not at the price of reading something else."""
    path = tmp_path / "pick-Mug-None-Desk-301" / "trial" / "game.tw-pddl"
    path.parent.mkdir(parents=True)
    other = next(other for _, other in generate("train", 500, seed=9) if other["grammar"] != data["grammar"])
    for content in (data, other, {**data, "walkthrough": None}, {k: data[k] for k in reversed(data)}, {"solvable": True, **data, "extra": [1]}):
        for options in ({}, {"indent": 1}, {"separators": (",", ":")}, {"ensure_ascii": False}):
            path.write_text(json.dumps(content, **options))
            assert same(Game.load(path), Game.parse(content, str(path))) and same(Game.load(path), Game.load(str(path)))


def fact(data, change):
    """The file with its facts changed."""
    start, end = data["pddl_problem"].index("(:init"), data["pddl_problem"].index("(:goal")
    return {**data, "pddl_problem": data["pddl_problem"][:start] + change(data["pddl_problem"][start:end]) + data["pddl_problem"][end:]}


def add(data, line):
    return fact(data, lambda facts: facts.replace("(atLocation agent1", f"{line}\n(atLocation agent1"))


def names_in(data, predicate):
    """The arguments of the first fact of a predicate."""
    return re.search(rf"\({predicate} (\S+) (\S+)\)", data["pddl_problem"]).groups()


BREAKAGES = [  # what the message says, and the broken content: bytes, or something to be written as JSON
    ("not JSON (Expecting", lambda data: b""),
    ("not JSON (Expecting", lambda data: b"not json"),
    ("not JSON (Unterminated", lambda data: json.dumps(data).encode()[:9999]),
    ("not JSON (Expecting ',' delimiter", lambda data: json.dumps(data).encode()[:-1]),
    ("not JSON ('utf-8' codec", lambda data: json.dumps(data).encode().replace(b"agent", b"\xff\xfe", 1)),
    ("not JSON (", lambda data: b"[" * 100_000),
    ("not a JSON object", lambda data: [data]),
    ("its pddl_domain is missing", lambda data: {k: v for k, v in data.items() if k != "pddl_domain"}),
    ("its grammar is missing", lambda data: {"pddl_domain": "", "pddl_problem": ""}),
    ("its pddl_problem is not a text", lambda data: {**data, "pddl_problem": None}),
    ("its grammar is not a text", lambda data: {**data, "grammar": [data["grammar"]]}),
    ("its walkthrough is not a list of texts", lambda data: {**data, "walkthrough": [1, "look"]}),
    ("its walkthrough is not a list of texts", lambda data: {**data, "walkthrough": "look"}),
    ("its pddl_domain is not that of alfworld 0.4", lambda data: {**data, "pddl_domain": data["pddl_domain"] + " "}),
    ("its grammar is not that of alfworld 0.4", lambda data: {**data, "grammar": data["grammar"].replace("You open", "One opens")}),
    ("written for alfworld before 0.4", lambda data: {**data, "grammar": data["grammar"].replace("move {o} to {r}", "put {o} in/on {r}")}),
    ("its grammar names no task", lambda data: {**data, "grammar": re.sub("is to: .*\"", "is to: {__import__('os')}\"", data["grammar"])}),
    ("its grammar names no task", lambda data: {**data, "grammar": ""}),
    ("lacks (:init …) or (:goal …)", lambda data: {**data, "pddl_problem": ""}),
    ("lacks (:init …) or (:goal …)", lambda data: {**data, "pddl_problem": data["pddl_problem"].replace("(:goal", "(:gaol")}),
    ("its (:init …) is empty", lambda data: fact(data, lambda facts: "(:init )")),
    ("is none of ALFWorld's six (empty)",
     lambda data: {**data, "pddl_problem": re.sub(r"(?s)\(:goal.*", "(:goal ())", data["pddl_problem"])}),
    ("is none of ALFWorld's six (", lambda data: {**data, "pddl_problem": re.sub(r"\(inReceptacle \?", "(inHand ?", data["pddl_problem"])}),
    ("is none of ALFWorld's six (", lambda data: {**data, "pddl_problem": data["pddl_problem"].replace("Type)\n", "Typ)\n")}),
    ("states receptacleatlocation twice",
     lambda data: add(data, "(receptacleAtLocation {} loc_bar_9)".format(names_in(data, "receptacleAtLocation")[0]))),
    ("states objecttype twice", lambda data: add(data, "(objectType {} MugType)".format(names_in(data, "objectType")[0]))),
    ("does not start in the middle", lambda data: add(data, "(atLocation agent1 loc_bar_0)")),
    ("does not start in the middle", lambda data: fact(data, lambda facts: re.sub(r"\(atLocation .*", ")", facts))),
    ("does not start in the middle",
     lambda data: fact(data, lambda facts: re.sub(r"\(atLocation agent1 \S+\)", f"(atLocation agent1 {names_in(data, 'receptacleAtLocation')[1]})", facts))),
    ("states '(opened', which no game does", lambda data: add(data, "(opened {})".format(names_in(data, "receptacleType")[0]))),
    ("states '(holds'", lambda data: add(data, "(holds agent1 {})".format(names_in(data, "objectType")[0]))),
    ("breaks off in a fact of '(inreceptacle'", lambda data: fact(data, lambda facts: facts.rstrip(" )\n") + ") (inReceptacle a")),
    ("name 'mug_bar_1' but do not say what", lambda data: add(data, "(heatable Mug_bar_1)")),
    ("name 'desk_bar_1' but do not say what",
     lambda data: add(data, "(inReceptacle {} Desk_bar_1)".format(names_in(data, "objectType")[0]))),
    ("other facts stand between", lambda data: fact(data, lambda facts: facts + "(canContain DeskType MugType)")),
]


@pytest.mark.parametrize("message, broken", BREAKAGES)
def test_a_broken_file_is_refused_in_one_line(data, tmp_path, message, broken):
    content, path = broken(data), tmp_path / "game.tw-pddl"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(GameError) as error:
        Game.load(path)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and message in text and "\n" not in text and len(text) < 400


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(GameError, match=f"^{re.escape(str(path))}: cannot be read"):
            Game.load(path)


def test_corrupted_bytes_load_or_are_refused(data, tmp_path):
    """And nothing else: what loads can be played."""
    rng, env, good, path = random.Random(0), AlfworldEnv(), json.dumps(data).encode(), tmp_path / "game.tw-pddl"
    start, loaded = good.index(b"(:init"), 0
    for trial in range(400):
        raw = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 10))):
            i = rng.randrange(start if trial % 2 else 0, len(raw))  # half of them in the facts, the goal and the walkthrough
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
