"""fast_alfworld and alfworld's own engine play the same commands; no character may differ.

    python tests/world/test_parity.py --episodes 200 --steps 40 --seed 0 --generated 50 --workers 2

Episodes mix the walkthrough, the expert, random admissible commands and malformed commands, over
all six task types. They are played in published games (where there are any), in generated games,
and in odd games: generated ones with added facts that are rare or absent in published games, such
as an object in two receptacles or within itself. pytest plays a small sample, and one script for
each case in which engines are known to differ.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a command there is no conftest.py

from fast_alfworld import (TASK_TYPES, AlfworldEnv, DataError, Expert, Game, find_data, generate,
                           write_games)
from fast_alfworld.gamefile import numbers
from fast_alfworld.reference import ReferenceEnv, alfworld_version

PRIOR = {}  # for the expert, which then searches the room as listed


# --- both engines side by side --------------------------------------------------------------------

def difference(ours, theirs):
    """None where two answers (observation, reward, terminated, truncated, info) are equal."""
    for what, a, b in zip(("observation", "reward", "terminated", "truncated"), ours, theirs):
        if a != b:
            return f"{what}: ours {a!r}, alfworld's {b!r}"
    a, b = ours[-1]["admissible_commands"], theirs[-1]["admissible_commands"]
    if a != b:
        return (f"admissible commands: only ours {sorted(set(a) - set(b))}, "
                f"only alfworld's {sorted(set(b) - set(a))}, or the order")
    a, b = ours[-1]["won"], theirs[-1]["won"]
    return f"won: ours {a}, alfworld's {b}" if a != b else None


@lru_cache(1)
def reference():
    """One engine for all tests, because it need not load a game twice in succession."""
    return ReferenceEnv()


class Both:
    """Both engines in the same state; a difference is an AssertionError that says how to get it."""

    def __init__(self, game, max_steps=50):
        self.game, self.played = game, []
        self.ours, self.theirs = AlfworldEnv(max_steps), reference()
        self.theirs.max_steps = max_steps
        first, info = self.ours.reset(game)
        their_first, their_info = self.theirs.reset(game)
        self.check((first, 0.0, info["won"], False, info),
                   (their_first, 0.0, their_info["won"], False, their_info))

    def step(self, command):
        """-> (observation, admissible commands, won)."""
        self.played.append(command)
        return self.check(self.ours.step(command), self.theirs.step(command))

    def check(self, ours, theirs):
        found = difference(ours, theirs)
        assert found is None, f"{self.game.path} after {self.played}: {found}"
        self.observation, self.won = ours[0], ours[-1]["won"]
        self.admissible = ours[-1]["admissible_commands"]
        return self.observation, self.admissible, self.won


def play(path, steps, seed):
    """One mixed episode -> the number of steps compared."""
    game = Game.load(path)
    rng, both = random.Random(f"{seed} {game.id}"), Both(game, max_steps=steps // 2)
    expert, walkthrough = Expert(PRIOR), list(game.walkthrough)
    expert.reset(game.task, both.observation)
    for _ in range(steps):
        command = choose(rng, game, both.admissible, walkthrough, expert)
        expert.observe(command, both.step(command)[0])
    return len(both.played)


def choose(rng, game, admissible, walkthrough, expert):
    """The next command; admissible ones that do something are preferred to the many that go."""
    way = rng.random()
    idle = ("go to ", "examine ", "help", "look", "inventory")
    doing = [command for command in admissible if not command.startswith(idle)]
    if way < 0.2 and walkthrough:
        return walkthrough.pop(0)
    if way < 0.35:
        return expert.act(admissible)
    if way < 0.6 and doing:
        return rng.choice(doing)
    return rng.choice(admissible) if way < 0.85 else malformed(rng, game, admissible)


def malformed(rng, game, admissible):
    """Commands that a model may produce: nearly right, badly spaced, about absent things."""
    good = rng.choice(admissible)
    a, b = rng.choice(game.names), rng.choice(game.names)
    verb, word = rng.choice((("take", "from"), ("move", "to"), ("heat", "with"), ("clean", "with"),
                             ("cool", "with"), ("slice", "with")))
    alone = rng.choice(("go to", "open", "close", "use", "examine"))
    return rng.choice((
        f" {good}\n", f"{good} ", good.replace(" ", "  ", 1), good.replace(" ", "\t", 1),
        good.upper(), f"{good} now", good[:-1], good + ".", f"{verb} {a} {word} {b}", f"{verb} {a}",
        f"{verb} {a} {word} {b} {word} {b}", f"{alone} {a}", f"put {a} in/on {b}", "", " ", "\n",
        "go", "go to", "go to nowhere 1", "take", "help me", "look around", "inventory 1",
        "examine", "use", "\x00", "é"))


# --- games ----------------------------------------------------------------------------------------

def add_odd_facts(rng, data):
    """A generated game with odd facts added; the goal stays, the walkthrough may fail."""
    problem = data["pddl_problem"]
    objects, receptacles = (re.findall(rf"\({kind}Type (\w+) \w+\)", problem)
                            for kind in ("object", "receptacle"))
    location = dict(re.findall(r"\(receptacleAtLocation (\w+) (\w+)\)", problem))

    def some(things, n):
        return [rng.choice(things) for _ in range(n)]

    facts = [f"(inReceptacle {o} {r})" for o, r in zip(some(objects, 12), some(receptacles, 12))]
    facts += [f"(objectAtLocation {o} {location[r]})"
              for o, r in zip(some(objects, 6), some(receptacles, 6))]
    vessels = some(objects, 3)
    facts += [f"(isReceptacleObject {v})" for v in vessels]
    facts += [f"(inReceptacleObject {v} {v})" for v in vessels[:2]]
    facts += [f"(inReceptacleObject {o} {v})" for o, v in zip(some(objects, 4), some(vessels, 4))]
    facts += [f"(openable {r})" for r in some(receptacles, 3)]
    facts += [f"({p} {o})" for p in ("isCool", "toggleable", "sliceable", "heatable", "coolable",
                                     "cleanable", "pickupable") for o in some(objects, 4)]
    for r, other in zip(some(receptacles, 4), some(receptacles, 4)):  # move to the same location
        problem = problem.replace(f"(receptacleAtLocation {r} {location[r]})",
                                  f"(receptacleAtLocation {r} {location[other]})")
        location[r] = location[other]
    start = problem.index("(atLocation agent1")
    added = "\n        ".join([*dict.fromkeys(facts), ""])
    return {**data, "pddl_problem": problem[:start] + added + problem[start:]}


def write_odd(folder, n, seed):
    """-> paths of n odd games."""
    games = [(id_, add_odd_facts(random.Random(f"odd {seed} {id_}"), data))
             for id_, data in generate("valid_seen", n, seed)]
    return written(games, folder, "odd")


def written(games, folder, split):
    """Write games as `generate` yields them -> their paths."""
    write_games(games, folder, split)
    return [Path(folder, "json_2.1.1", split, id_, "game.tw-pddl") for id_, _ in games]


def spread(paths, n, seed):
    """n of the paths of game files, in turn one of each task type."""
    paths = sorted(paths)
    by_type = [[p for p in paths if p.parent.parent.name.startswith(t)] for t in TASK_TYPES]
    for group in by_type:
        random.Random(seed).shuffle(group)
    longest = max(map(len, by_type))
    return [group[i] for i in range(longest) for group in by_type if i < len(group)][:n]


# --- known differences: what an engine that looks right gets wrong --------------------------------
# Each function takes a game and yields scripts that may show the case. SCRIPTS names the game, the
# number of the script and what its transcript must show. Commands that are not admissible do no
# harm, so that a script can open what may have no door and take what may be gone.

def located(game, objects):
    """[(object, receptacle)] of a set of objects at the start, as numbers."""
    return [(o, r) for r, contents in enumerate(game.start_contents)
            for o in numbers(contents & objects)]


def fetch(game, o, r):
    place = game.room.names[r]
    return [f"go to {place}", f"open {place}", f"take {game.names[o]} from {place}"]


def treat(game, o, *verbs):
    """Heat, cool or clean the object in hand, and examine it."""
    for verb in verbs:
        tool = next((name for name, use in zip(game.room.names, game.room.treats) if use == verb),
                    "nothing 1")
        yield from (f"go to {tool}", f"{verb} {game.names[o]} with {tool}",
                    f"examine {game.names[o]}")


def in_two_receptacles(game):
    for o, r in located(game, game.pickupable):
        for _, other in located(game, 1 << o):
            a, b, thing = game.room.names[r], game.room.names[other], game.names[o]
            yield [*fetch(game, o, r), "look", f"go to {b}", f"open {b}", f"examine {b}",
                   f"move {thing} to {b}", "look", *fetch(game, o, other), "look", f"go to {a}",
                   f"examine {a}", f"move {thing} to {a}", "look"] if other != r else []


def listed_twice(game):
    for o, r in located(game, game.pickupable):
        others = [k for k in game.room.receptacles_at[game.room.place_of[r]] if k != r]
        a, b, c = [game.room.names[k] for k in (r, *others, r, r)][:3]
        thing = game.names[o]
        yield [*fetch(game, o, r), f"open {b}", f"move {thing} to {b}", "look",
               f"take {thing} from {b}", "look", f"open {c}", f"move {thing} to {c}", "look",
               f"go to {b}", f"examine {b}", f"close {b}", f"examine {b}",
               f"take {thing} from {c}", f"move {thing} to {a}", "look"]


def located_elsewhere(game):
    for knife, home in located(game, game.blades & game.pickupable)[:1]:
        for o, r in located(game, game.sliceable):
            cut = f"slice {game.names[o]} with {game.names[knife]}"
            for place, objects in enumerate(game.start_at):
                if objects >> o & 1 and place != game.room.place_of[r]:
                    other = game.room.names[game.room.receptacles_at[place][0]]
                    yield [*fetch(game, knife, home), f"go to {game.room.names[r]}", cut,
                           f"go to {other}", cut, cut]


def holds_something(game):
    for o, r in located(game, game.pickupable & sum(1 << o for o in game.inner)):
        yield [*fetch(game, o, r), f"examine {game.names[o]}", *treat(game, o, "clean", "heat")]


def holds_itself(game):
    problem = json.loads(game.path.read_text())["pddl_problem"].lower()
    for id_ in re.findall(r"\(inreceptacleobject (\w+) \1\)", problem):
        alike = [(o, r) for o, r in located(game, game.pickupable & game.vessels)
                 if game.names[o].startswith(id_.split("_bar_")[0] + " ")]
        yield [c for o, r in alike[:4]
               for c in (*fetch(game, o, r), f"examine {game.names[o]}",
                         f"move {game.names[o]} to {game.room.names[r]}")]


def cool_at_the_start(game):
    for o, r in located(game, game.start_cool & game.pickupable & ~game.vessels):
        yield [*fetch(game, o, r), f"examine {game.names[o]}",
               *treat(game, o, "heat", "cool", "clean", "heat")]


def sliced_and_treated(game):
    for knife, home in located(game, game.blades & game.pickupable)[:1]:
        for o, r in located(game, game.sliceable & game.pickupable):
            here, blade, thing = game.room.names[r], game.names[knife], game.names[o]
            yield [*fetch(game, knife, home), f"examine {blade}", f"go to {here}",
                   f"slice {thing} with {blade}", f"move {blade} to {here}", f"open {here}",
                   f"take {thing} from {here}", f"examine {thing}",
                   *treat(game, o, "cool", "heat", "clean", "cool", "heat")]


def clean_first(game):
    for o, r in located(game, game.pickupable & ~game.vessels):
        yield [*fetch(game, o, r), *treat(game, o, "clean", "heat", "cool")]


def lamp_behind_a_door(game):
    for o, r in located(game, game.toggleable):
        here, lamp = game.room.names[r], game.names[o]
        yield [f"use {lamp}", f"go to {here}", f"use {lamp}", f"use {lamp}", f"open {here}",
               f"use {lamp}", f"take {lamp} from {here}", f"examine {lamp}"]


def lamp_in_hand(game):
    for o, r in located(game, game.toggleable & game.pickupable):
        here, lamp = game.room.names[r], game.names[o]
        yield [*fetch(game, o, r), f"examine {lamp}", f"use {lamp}", f"move {lamp} to {here}",
               f"use {lamp}", f"take {lamp} from {here}", f"examine {lamp}"]


def won_and_lost_again(game):
    last = game.walkthrough[-1]
    undone = last.replace("move ", "take ").replace(" to ", " from ")
    yield [*game.walkthrough, "look", undone, "go to nowhere 1", last,
           f"go to {game.room.names[0]}", game.walkthrough[-2], "help"]


def an_object_without_a_type(game):
    if "" in game.type_of:
        yield ["go to countertop 1",
               *(f"{verb} egg {n}" for n in (1, 2, 3) for verb in ("examine", "use")),
               "go to fridge 1", "open fridge 1", "look"]


def not_in_a_bathtub(game):
    for o, r in located(game, game.pickupable & game.treatable["clean"]):
        yield [*fetch(game, o, r), "go to bathtubbasin 1",
               f"clean {game.names[o]} with bathtubbasin 1", *treat(game, o, "clean")]


LAMP_GAME = "pick_heat_then_place_in_recep-Potato-None-Fridge-29/trial_G_valid_seen_0_000000"
BOWL_GAME = "look_at_obj_in_light-Bowl-None-DeskLamp-301/trial_T20190909_150719_492274"
EGG_GAME = "pick_and_place_simple-Egg-None-Microwave-4/trial_T20190906_234406_356490"
SCRIPTS = {  # what the transcript shows, a game (published or odd), and which of its scripts
    in_two_receptacles: (
        r"You pick up the (.*) from the (.*)\.(?s:.*)You arrive at .* \1.*"
        r"(?s:.*)You pick up the \1 from the (?!\2\.)",
        "look_at_obj_in_light-AlarmClock-None-DeskLamp-323/trial_T20190909_044715_250790", 24),
    located_elsewhere: (
        r"> slice .*\nNothing happens\.(?s:.*)You sliced",
        "pick_and_place_simple-Pan-None-CounterTop-8/trial_T20190908_105520_133293", 0),
    holds_something: (
        r"This is a normal .*, you see a (?s:.*)You (clean|heat)",
        "pick_and_place_simple-Knife-None-SideTable-3/trial_T20190918_184236_557252", 0),
    holds_itself: (
        r"This is a normal .*, you see nothing",
        "pick_clean_then_place_in_recep-Knife-None-Drawer-22/trial_T20190907_224751_540006", 0),
    cool_at_the_start: (
        r"This is a cold (?s:.*)You heat",
        "pick_and_place_simple-Tomato-None-Microwave-13/trial_T20190908_124829_632660", 0),
    sliced_and_treated: (
        r"cool sliced(?s:.*)hot sliced(?s:.*)hot and clean sliced(?s:.*)cool and clean sliced",
        EGG_GAME, 0),
    clean_first: (
        r"This is a clean (?s:.*)This is a hot and clean (?s:.*)This is a cool and clean ",
        EGG_GAME, 3),
    lamp_behind_a_door: (r"is closed\.\n.*\nYou turn on", LAMP_GAME, 2),
    lamp_in_hand: (r"There's nothing special(?s:.*)This .* is on\.", LAMP_GAME, 0),
    listed_twice: (r"Next to it, you see a (\w+ \d+), and a \1\.", BOWL_GAME, 7),
    won_and_lost_again: (r"\[won\](?s:.*)\[lost\](?s:.*)\[won\]", BOWL_GAME, 0),
    an_object_without_a_type: (
        r"> use egg",
        "pick_cool_then_place_in_recep-Apple-None-GarbageCan-19/trial_T20190908_121626_855247", 0),
    not_in_a_bathtub: (
        r"> clean .* with bathtubbasin 1\nNothing happens\.(?s:.*)You clean",
        "pick_and_place_simple-Candle-None-Cart-401/trial_T20190909_081908_677973", 0),
}


def transcript(game, script):
    """What both engines answer to a script."""
    both, lines, won = Both(game), [], False
    for command in script:
        observation, _, now = both.step(command)
        lines += [f"> {command}", observation]
        lines += ["[won]"] * (now and not won) + ["[lost]"] * (won and not now)
        won = now
    return "\n".join(lines)


# --- the tests ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def engine():
    pytest.importorskip("alfworld")
    pytest.importorskip("textworld")


@pytest.fixture(scope="module")
def odd(engine, tmp_path_factory):
    return write_odd(tmp_path_factory.mktemp("odd"), 40, seed=0)


@pytest.fixture(scope="module")
def games(engine, tmp_path_factory):
    """The published games of train and valid_seen or, without them, generated ones."""
    folder = find_data()
    if folder:
        return [path for split in ("valid_seen", "train")
                for path in sorted(folder.glob(f"{split}/*/*/game.tw-pddl"))]
    made = list(generate("train", 120, seed=0))
    return written(made, tmp_path_factory.mktemp("generated"), "train")


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_an_episode_of_each_task_type(games, task_type):
    of_type = [path for path in games if path.parent.parent.name.startswith(task_type)]
    assert play(spread(of_type, 1, seed=1)[0], 20, seed=1) == 20


def test_generated_games_are_won_by_their_walkthroughs_in_both_engines(engine, tmp_path):
    """The smallest of some games of each task type, because alfworld's engine is slow."""
    chosen = {}
    made = [*generate("train", 150, seed=7), *generate("valid_unseen", 50, seed=7)]
    for id_, data in sorted(made, key=lambda pair: len(pair[1]["pddl_problem"])):
        chosen.setdefault(id_.split("-")[0], (id_, data))
    assert set(chosen) == set(TASK_TYPES)
    for path in written(list(chosen.values()), tmp_path, "train"):
        game = Game.load(path)
        assert transcript(game, game.walkthrough).endswith("[won]")


@pytest.mark.parametrize("i", (0, 22))
def test_an_odd_game(odd, i):
    assert play(odd[i], 25, seed=i) == 25


@pytest.mark.parametrize("case", SCRIPTS, ids=lambda case: case.__name__)
def test_a_known_difference(games, odd, case):
    """Games and scripts are fixed beforehand: searching for them with the engine under test could
    miss just the games that it gets wrong.
    """
    shows, id_, i = SCRIPTS[case]
    found = (path for path in [*games, *odd] if str(path).endswith(f"{id_}/game.tw-pddl"))
    path = next(found, None)
    if path is None and not find_data():
        pytest.skip("no published games")
    game = Game.load(path)
    assert re.search(shows, transcript(game, list(case(game))[i]))


def test_won_before_the_first_step(engine, tmp_path):
    """A tiny game with the wanted object already where it should be."""
    id_, data = next(generate("train", 1, tiny=True))
    game, problem = Game.parse(data, id_), data["pddl_problem"]
    objects, receptacles = (sorted(re.findall(rf"\({kind}Type (\w+) ", problem))
                            for kind in ("object", "receptacle"))
    wanted, target = objects[numbers(game.goal_objects)[0]], receptacles[game.goal_receptacles[0]]
    data["pddl_problem"] = problem.replace(
        "(atLocation agent1", f"(inReceptacle {wanted} {target})\n(atLocation agent1")
    both = Both(Game.load(written([(id_, data)], tmp_path, "won")[0]))
    assert both.won and both.step("look")[2] and both.step("go to nowhere 1")[2]


def test_the_reference_needs_a_file(engine):
    id_, data = next(generate("train", 1))
    with pytest.raises(DataError, match=f"{id_} has no file"):
        ReferenceEnv().reset(Game.parse(data, id_))


def test_the_reference_needs_no_home_that_can_be_written_to():
    """alfworld makes a cache folder when it is imported; generated games need none."""
    code = ("import os; from fast_alfworld.reference import ReferenceEnv; ReferenceEnv(); "
            "print(os.environ.get('ALFWORLD_DATA'))")
    bare = {k: v for k, v in os.environ.items() if k != "ALFWORLD_DATA"} | {"HOME": "/proc/none"}
    for environment, said in ((bare, "None"), (bare | {"ALFWORLD_DATA": "/nowhere"}, "/nowhere")):
        done = subprocess.run([sys.executable, "-c", code], env=environment, text=True,
                              capture_output=True, cwd=Path(__file__).resolve().parents[2])
        assert done.stdout == f"{said}\n", done.stderr


def test_a_difference_is_found():
    info = {"won": False, "admissible_commands": ("help", "look")}
    answer = ("You see nothing.", 0.0, False, False, info)
    assert difference(answer, answer) is None
    for other in (("You see nothing. ", *answer[1:]), (answer[0], 1.0, *answer[2:]),
                  (*answer[:4], {**info, "won": True}),
                  (*answer[:4], {**info, "admissible_commands": ("look", "help")}),
                  (*answer[:4], {**info, "admissible_commands": ("help",)})):
        assert difference(answer, other)


# --- the command ----------------------------------------------------------------------------------

def outcome(job):
    """-> (path, steps compared, the difference or None)."""
    path, steps, seed = job
    try:
        return path, play(path, steps, seed), None
    except AssertionError as found:
        return path, 0, str(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="DIR", default=argparse.SUPPRESS, help="the folder that holds json_2.1.1 "
        "(default: $ALFWORLD_DATA, else alfworld's cache)")
    add("--episodes", type=int, default=200, help="all, the generated and odd ones included")
    add("--steps", type=int, default=40, help="commands in an episode")
    add("--generated", type=int, default=50, help="episodes in generated games; these also replace "
        "episodes in published games where there are none")
    add("--odd", type=int, default=20, help="episodes in generated games with odd facts")
    add("--seed", type=int, default=0, help="seed of the choice of games and commands")
    add("--workers", type=int, default=1, help="number of processes")
    args = parser.parse_args()
    try:
        folder = find_data(getattr(args, "data", None))
    except DataError as error:
        parser.error(str(error))
    n = max(0, args.episodes - args.generated - args.odd)
    published = spread(folder.glob("*/*/*/game.tw-pddl"), n, args.seed) if folder else []
    with tempfile.TemporaryDirectory() as made, ProcessPoolExecutor(args.workers) as pool:
        n = args.episodes - len(published) - args.odd
        candidates = written(list(generate("train", 4 * n, args.seed)), made, "train") if n else []
        generated = spread(candidates, n, args.seed)
        odd = write_odd(made, args.odd, args.seed)
        jobs = [(path, args.steps, args.seed) for path in (*published, *generated, *odd)]
        results = list(tqdm(pool.map(outcome, jobs), "episodes", len(jobs), unit="episode"))
    differences = [found for _, _, found in results if found]
    types = [sum(path.parent.parent.name.startswith(t) for path, _, _ in results)
             for t in TASK_TYPES]
    print(*differences, sep="\n", end="\n" * bool(differences))
    print(f"{len(published)} published, {len(generated)} generated and {len(odd)} odd games "
          f"({', '.join(f'{n} {t}' for n, t in zip(types, TASK_TYPES))}), "
          f"{sum(steps for _, steps, _ in results):,} steps: {len(differences) or 'no'} "
          f"differences from alfworld {alfworld_version()}")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
