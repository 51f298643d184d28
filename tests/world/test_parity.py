"""Parity: this repository's world and alfworld's own engine play the same commands, and no character may differ.

    python tests/test_parity.py --episodes 200 --steps 40 --seed 0 --generated 50 --workers 2

Episodes mix the file's walkthrough, the expert, random admissible commands and nonsense, over all six task types. Besides
episodes in published games (where there are any) and generated ones, there are odd games: generated ones into which facts
were strewn that are rare or absent in published games, such as an object in two receptacles or within itself.
pytest plays a small sample, and a script for each known trap.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a command there is no conftest.py

from common import command_line
from env import TASK_TYPES, AlfworldEnv, Game
from expert import Expert
from gamefile import numbers
from games import find_data, generate, write_games
from stock import StockAlfworldEnv, alfworld_version

PRIOR = {}  # for the expert: to search the room as listed will do


# --- side by side -----------------------------------------------------------------------------------------------------

def look_alike(ours, theirs):
    """None where two answers (observation, reward, terminated, truncated, info) are equal, else what differs."""
    for what, a, b in zip(("observation", "reward", "terminated", "truncated"), ours, theirs):
        if a != b:
            return f"{what}: ours {a!r}, alfworld's {b!r}"
    a, b = ours[-1]["admissible_commands"], theirs[-1]["admissible_commands"]
    if a != b:
        return f"admissible commands: only ours {sorted(set(a) - set(b))}, only alfworld's {sorted(set(b) - set(a))}, or the order"
    return f"won: ours {ours[-1]['won']}, alfworld's {theirs[-1]['won']}" if ours[-1]["won"] != theirs[-1]["won"] else None


class Both:
    """The two worlds in step; any difference is an AssertionError that says how to come by it."""

    def __init__(self, game, max_steps=50):
        self.game, self.played = game, []
        self.ours, self.theirs = AlfworldEnv(max_steps), StockAlfworldEnv(max_steps)
        first, info = self.ours.reset(game)
        stock_first, stock_info = self.theirs.reset(game)
        self.check((first, 0.0, info["won"], False, info), (stock_first, 0.0, stock_info["won"], False, stock_info))

    def step(self, command):
        """-> (observation, admissible commands, won)."""
        self.played.append(command)
        return self.check(self.ours.step(command), self.theirs.step(command))

    def check(self, ours, theirs):
        difference = look_alike(ours, theirs)
        assert difference is None, f"{self.game.path} after {self.played}: {difference}"
        self.observation, self.admissible, self.won = ours[0], ours[-1]["admissible_commands"], ours[-1]["won"]
        return self.observation, self.admissible, self.won


def play(path, steps, seed):
    """One mixed episode -> how many steps were compared."""
    game = Game.load(path)
    rng, both, expert = random.Random(f"{seed} {game.id}"), Both(game, max_steps=steps // 2), Expert(PRIOR)
    expert.reset(game.task, both.observation)
    walkthrough = list(game.walkthrough)
    for _ in range(steps):
        command = choose(rng, game, both.admissible, walkthrough, expert)
        expert.observe(command, both.step(command)[0])
    return len(both.played)


def choose(rng, game, admissible, walkthrough, expert):
    """Of admissible commands rather those that do something than the many that go somewhere."""
    way = rng.random()
    doing = [c for c in admissible if not c.startswith(("go to ", "examine ", "help", "look", "inventory"))]
    if way < 0.2 and walkthrough:
        return walkthrough.pop(0)
    if way < 0.35:
        return expert.act()
    if way < 0.6 and doing:
        return rng.choice(doing)
    return rng.choice(admissible) if way < 0.85 else nonsense(rng, game, admissible)


def nonsense(rng, game, admissible):
    """Commands a model may produce: nearly right, badly spaced, about things that are not here."""
    good = rng.choice(admissible)
    a, b = rng.choice(game.names), rng.choice(game.names)
    verb, word = rng.choice((("take", "from"), ("move", "to"), ("heat", "with"), ("clean", "with"), ("cool", "with"), ("slice", "with")))
    return rng.choice((
        f" {good}\n", f"{good} ", good.replace(" ", "  ", 1), good.replace(" ", "\t", 1), good.upper(), f"{good} now", good[:-1], good + ".",
        f"{verb} {a} {word} {b}", f"{verb} {a}", f"{verb} {a} {word} {b} {word} {b}", f"{rng.choice(('go to', 'open', 'close', 'use', 'examine'))} {a}",
        f"put {a} in/on {b}", "", " ", "\n", "go", "go to", "go to nowhere 1", "take", "help me", "look around", "inventory 1", "examine", "use", "\x00", "é"))


# --- games --------------------------------------------------------------------------------------------------------------

def strew(rng, data):
    """A generated game with odd facts strewn in: the goal stays as it was, the walkthrough may fail."""
    problem = data["pddl_problem"]
    objects, receptacles = (re.findall(rf"\({kind}Type (\w+) \w+\)", problem) for kind in ("object", "receptacle"))
    location = dict(re.findall(r"\(receptacleAtLocation (\w+) (\w+)\)", problem))
    some = lambda things, n: [rng.choice(things) for _ in range(n)]
    facts = [f"(inReceptacle {o} {r})" for o, r in zip(some(objects, 12), some(receptacles, 12))]
    facts += [f"(objectAtLocation {o} {location[r]})" for o, r in zip(some(objects, 6), some(receptacles, 6))]
    vessels = some(objects, 3)
    facts += [f"(isReceptacleObject {v})" for v in vessels] + [f"(inReceptacleObject {v} {v})" for v in vessels[:2]]
    facts += [f"(inReceptacleObject {o} {v})" for o, v in zip(some(objects, 4), some(vessels, 4))]
    facts += [f"(openable {r})" for r in some(receptacles, 3)]
    facts += [f"({p} {o})" for p in ("isCool", "toggleable", "sliceable", "heatable", "coolable", "cleanable", "pickupable") for o in some(objects, 4)]
    for r, other in zip(some(receptacles, 4), some(receptacles, 4)):  # move next to one another
        problem = problem.replace(f"(receptacleAtLocation {r} {location[r]})", f"(receptacleAtLocation {r} {location[other]})")
        location[r] = location[other]
    start = problem.index("(atLocation agent1")
    return {**data, "pddl_problem": problem[:start] + "\n        ".join([*dict.fromkeys(facts), ""]) + problem[start:]}


def write_odd(folder, n, seed):
    """-> paths of n generated games, each with odd facts."""
    games = [(id_, strew(random.Random(f"odd {seed} {id_}"), data)) for id_, data in generate("valid_seen", n, seed)]
    return written(games, folder, "odd")


def written(games, folder, split):
    """-> paths of games as `generate` yields them."""
    write_games(games, folder, split)
    return [Path(folder, "json_2.1.1", split, id_, "game.tw-pddl") for id_, _ in games]


def spread(paths, n, seed):
    """n of the paths of game files, in turn one of each task type."""
    paths = sorted(paths)
    by_type = [[p for p in paths if p.parent.parent.name.startswith(task_type)] for task_type in TASK_TYPES]
    for group in by_type:
        random.Random(seed).shuffle(group)
    in_turn = [group[i] for i in range(max(map(len, by_type))) for group in by_type if i < len(group)]
    return in_turn[:n]


# --- traps: what an engine that looks right gets wrong ------------------------------------------------------------------
# Each takes a game and yields scripts that may step into the trap; what they then show is beside them in TRAPS. Commands that
# are not admissible do no harm, so a script opens what may have no door and takes what may be gone.

def lying(game, objects):
    """[(object, receptacle)] of the objects in a set that lie somewhere at the start, as numbers."""
    return [(o, r) for r, contents in enumerate(game.start_contents) for o in numbers(contents & objects)]


def fetch(game, o, r):
    place = game.room.names[r]
    return [f"go to {place}", f"open {place}", f"take {game.names[o]} from {place}"]


def treat(game, o, *verbs):
    """Heat, cool or clean what is in hand, and look at it."""
    for verb in verbs:
        tool = next((name for name, use in zip(game.room.names, game.room.treats) if use == verb), "nothing 1")
        yield from (f"go to {tool}", f"{verb} {game.names[o]} with {tool}", f"examine {game.names[o]}")


def in_two_receptacles(game):
    for o, r in lying(game, game.pickupable):
        for _, other in lying(game, 1 << o):
            a, b, thing = game.room.names[r], game.room.names[other], game.names[o]
            yield [*fetch(game, o, r), "look", f"go to {b}", f"open {b}", f"examine {b}", f"move {thing} to {b}", "look", *fetch(game, o, other), "look",
                   f"go to {a}", f"examine {a}", f"move {thing} to {a}", "look"] if other != r else []


def listed_twice(game):
    for o, r in lying(game, game.pickupable):
        a, b, c = [game.room.names[k] for k in (r, *[k for k in game.room.receptacles_at[game.room.place_of[r]] if k != r], r, r)][:3]
        thing = game.names[o]
        yield [*fetch(game, o, r), f"open {b}", f"move {thing} to {b}", "look", f"take {thing} from {b}", "look", f"open {c}", f"move {thing} to {c}", "look",
               f"go to {b}", f"examine {b}", f"close {b}", f"examine {b}", f"take {thing} from {c}", f"move {thing} to {a}", "look"]


def believed_elsewhere(game):
    for knife, home in lying(game, game.blades & game.pickupable)[:1]:
        for o, r in lying(game, game.sliceable):
            cut = f"slice {game.names[o]} with {game.names[knife]}"
            for place in [p for p, objects in enumerate(game.start_at) if objects >> o & 1 and p != game.room.place_of[r]]:
                yield [*fetch(game, knife, home), f"go to {game.room.names[r]}", cut, f"go to {game.room.names[game.room.receptacles_at[place][0]]}", cut, cut]


def holds_something(game):
    for o, r in lying(game, game.pickupable & sum(1 << o for o in game.inner)):
        yield [*fetch(game, o, r), f"examine {game.names[o]}", *treat(game, o, "clean", "heat")]


def holds_itself(game):
    for id_ in re.findall(r"\(inreceptacleobject (\w+) \1\)", json.loads(game.path.read_text())["pddl_problem"].lower()):
        alike = [(o, r) for o, r in lying(game, game.pickupable & game.vessels) if game.names[o].startswith(id_.split("_bar_")[0] + " ")]
        yield [c for o, r in alike[:4] for c in (*fetch(game, o, r), f"examine {game.names[o]}", f"move {game.names[o]} to {game.room.names[r]}")]


def cool_at_the_start(game):
    for o, r in lying(game, game.start_cool & game.pickupable & ~game.vessels):
        yield [*fetch(game, o, r), f"examine {game.names[o]}", *treat(game, o, "heat", "cool", "clean", "heat")]


def sliced_and_treated(game):
    for knife, home in lying(game, game.blades & game.pickupable)[:1]:
        for o, r in lying(game, game.sliceable & game.pickupable):
            here, blade, thing = game.room.names[r], game.names[knife], game.names[o]
            yield [*fetch(game, knife, home), f"examine {blade}", f"go to {here}", f"slice {thing} with {blade}", f"move {blade} to {here}", f"open {here}",
                   f"take {thing} from {here}", f"examine {thing}", *treat(game, o, "cool", "heat", "clean", "cool", "heat")]


def clean_first(game):
    for o, r in lying(game, game.pickupable & ~game.vessels):
        yield [*fetch(game, o, r), *treat(game, o, "clean", "heat", "cool")]


def lamp_behind_a_door(game):
    for o, r in lying(game, game.toggleable):
        here, lamp = game.room.names[r], game.names[o]
        yield [f"use {lamp}", f"go to {here}", f"use {lamp}", f"use {lamp}", f"open {here}", f"use {lamp}", f"take {lamp} from {here}", f"examine {lamp}"]


def lamp_in_hand(game):
    for o, r in lying(game, game.toggleable & game.pickupable):
        here, lamp = game.room.names[r], game.names[o]
        yield [*fetch(game, o, r), f"examine {lamp}", f"use {lamp}", f"move {lamp} to {here}", f"use {lamp}", f"take {lamp} from {here}", f"examine {lamp}"]


def won_and_lost_again(game):
    last = game.walkthrough[-1]
    undone = last.replace("move ", "take ").replace(" to ", " from ")
    yield [*game.walkthrough, "look", undone, "go to nowhere 1", last, f"go to {game.room.names[0]}", game.walkthrough[-2], "help"]


def a_thing_without_a_type(game):
    if "" in game.type_of:
        yield ["go to countertop 1", *(f"{verb} egg {n}" for n in (1, 2, 3) for verb in ("examine", "use")), "go to fridge 1", "open fridge 1", "look"]


def not_in_a_bathtub(game):
    for o, r in lying(game, game.pickupable & game.treatable["clean"]):
        yield [*fetch(game, o, r), "go to bathtubbasin 1", f"clean {game.names[o]} with bathtubbasin 1", *treat(game, o, "clean")]


TRAPS = {  # what the transcript shows, a game (published, or an odd one) and which of its scripts steps into it
    in_two_receptacles: (r"You pick up the (.*) from the (.*)\.(?s:.*)You arrive at .* \1.*(?s:.*)You pick up the \1 from the (?!\2\.)",
        "look_at_obj_in_light-AlarmClock-None-DeskLamp-323/trial_T20190909_044715_250790", 24),
    listed_twice: (r"Next to it, you see a (\w+ \d+), and a \1\.",
        "look_at_obj_in_light-Bowl-None-DeskLamp-301/trial_T20190909_150719_492274", 7),
    believed_elsewhere: (r"> slice .*\nNothing happens\.(?s:.*)You sliced",
        "pick_and_place_simple-Pan-None-CounterTop-8/trial_T20190908_105520_133293", 0),
    holds_something: (r"This is a normal .*, you see a (?s:.*)You (clean|heat)",
        "pick_and_place_simple-Knife-None-SideTable-3/trial_T20190918_184236_557252", 0),
    holds_itself: (r"This is a normal .*, you see nothing",
        "pick_clean_then_place_in_recep-Knife-None-Drawer-22/trial_T20190907_224751_540006", 0),
    cool_at_the_start: (r"This is a cold (?s:.*)You heat",
        "pick_and_place_simple-Tomato-None-Microwave-13/trial_T20190908_124829_632660", 0),
    sliced_and_treated: (r"cool sliced(?s:.*)hot sliced(?s:.*)hot and clean sliced(?s:.*)cool and clean sliced",
        "pick_and_place_simple-Egg-None-Microwave-4/trial_T20190906_234406_356490", 0),
    clean_first: (r"This is a clean (?s:.*)This is a hot and clean (?s:.*)This is a cool and clean ",
        "pick_and_place_simple-Egg-None-Microwave-4/trial_T20190906_234406_356490", 3),
    lamp_behind_a_door: (r"is closed\.\n.*\nYou turn on",
        "pick_heat_then_place_in_recep-Potato-None-Fridge-29/trial_G_valid_seen_0_000000", 2),
    lamp_in_hand: (r"There's nothing special(?s:.*)This .* is on\.",
        "pick_heat_then_place_in_recep-Potato-None-Fridge-29/trial_G_valid_seen_0_000000", 0),
    won_and_lost_again: (r"\[won\](?s:.*)\[lost\](?s:.*)\[won\]",
        "look_at_obj_in_light-Bowl-None-DeskLamp-301/trial_T20190909_150719_492274", 0),
    a_thing_without_a_type: (r"> use egg",
        "pick_cool_then_place_in_recep-Apple-None-GarbageCan-19/trial_T20190908_121626_855247", 0),
    not_in_a_bathtub: (r"> clean .* with bathtubbasin 1\nNothing happens\.(?s:.*)You clean",
        "pick_and_place_simple-Candle-None-Cart-401/trial_T20190909_081908_677973", 0),
}


def transcript(game, script):
    """What both worlds answer."""
    both, lines, won = Both(game), [], False
    for command in script:
        observation, _, now = both.step(command)
        lines += [f"> {command}", observation] + ["[won]"] * (now and not won) + ["[lost]"] * (won and not now)
        won = now
    return "\n".join(lines)


# --- the tests ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def stock():
    pytest.importorskip("alfworld")


@pytest.fixture(scope="module")
def odd(stock, tmp_path_factory):
    return write_odd(tmp_path_factory.mktemp("odd"), 40, seed=0)


@pytest.fixture(scope="module")
def games(stock, tmp_path_factory):
    """The published games of train and valid_seen or, where there are none, generated ones."""
    folder = find_data()
    if folder:
        return [path for split in ("valid_seen", "train") for path in sorted(folder.glob(f"{split}/*/*/game.tw-pddl"))]
    return written(list(generate("train", 120, seed=0)), tmp_path_factory.mktemp("generated"), "train")


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_an_episode_of_each_task_type(games, task_type):
    assert play(spread([p for p in games if p.parent.parent.name.startswith(task_type)], 1, seed=1)[0], 30, seed=1) == 30


@pytest.mark.parametrize("i", (0, 1))
def test_a_generated_game(stock, tmp_path, i):
    assert play(written(list(generate("valid_unseen", 2, seed=3)), tmp_path, "valid_unseen")[i], 25, seed=i) == 25


@pytest.mark.parametrize("i", (0, 9, 22))
def test_an_odd_game(odd, i):
    assert play(odd[i], 40, seed=i) == 40


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_a_trap(games, odd, trap):
    """The script is named beforehand, and not looked for with the world that is tested: a bug would hide the games it is about."""
    shows, id_, number = TRAPS[trap]
    path = next((path for path in [*games, *odd] if str(path).endswith(f"{id_}/game.tw-pddl")), None)
    if path is None and not find_data():
        pytest.skip("no published games")
    game = Game.load(path)
    assert re.search(shows, transcript(game, list(trap(game))[number]))


def test_won_before_the_first_step(stock, tmp_path):
    """A cool thing that already is where it should be."""
    id_, data = next((id_, data) for id_, data in generate("train", 500) if id_.startswith("pick_cool"))
    game, problem = Game.parse(data, id_), data["pddl_problem"]
    wanted = sorted(re.findall(r"\(objectType (\w+) ", problem))[numbers(game.goal_objects)[0]]
    target = sorted(re.findall(r"\(receptacleType (\w+) ", problem))[game.goal_receptacles[0]]
    data["pddl_problem"] = problem.replace("(atLocation agent1", f"(isCool {wanted})\n(inReceptacle {wanted} {target})\n(atLocation agent1")
    both = Both(Game.load(written([(id_, data)], tmp_path, "won")[0]))
    assert both.won and both.step("look")[2] and both.step("go to nowhere 1")[2]


def test_a_difference_is_told():
    info = {"won": False, "admissible_commands": ["help", "look"]}
    answer = ("You see nothing.", 0.0, False, False, info)
    assert look_alike(answer, answer) is None
    for other in (("You see nothing. ", *answer[1:]), (answer[0], 1.0, *answer[2:]), (*answer[:4], {**info, "won": True}),
                  (*answer[:4], {**info, "admissible_commands": ["look", "help"]}), (*answer[:4], {**info, "admissible_commands": ["help"]})):
        assert look_alike(answer, other)


# --- the command --------------------------------------------------------------------------------------------------------

def outcome(job):
    """-> (path, steps compared, the difference or None)."""
    path, steps, seed = job
    try:
        return path, play(path, steps, seed), None
    except AssertionError as difference:
        return path, 0, str(difference)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", metavar="DIR", help="the folder that holds json_2.1.1; without it $ALFWORLD_DATA or alfworld's cache")
    parser.add_argument("--episodes", type=int, default=200, help="how many, the generated and the odd ones included")
    parser.add_argument("--steps", type=int, default=40, help="commands in each")
    parser.add_argument("--generated", type=int, default=50, help="so many in generated games; all, where there are no published ones")
    parser.add_argument("--odd", type=int, default=20, help="so many in generated games with odd facts")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of games and commands")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    args = parser.parse_args()
    folder = find_data(args.data)
    n = max(0, args.episodes - args.generated - args.odd)
    published = spread(folder.glob("*/*/*/game.tw-pddl"), n, args.seed) if folder else []
    with tempfile.TemporaryDirectory() as made, ProcessPoolExecutor(args.workers) as pool:
        n = args.episodes - len(published) - args.odd
        generated = spread(written(list(generate("train", 4 * n, args.seed)), made, "train"), n, args.seed)
        odd = write_odd(made, args.odd, args.seed)
        jobs = [(path, args.steps, args.seed) for path in (*published, *generated, *odd)]
        results = list(tqdm(pool.map(outcome, jobs), "episodes", len(jobs), unit="episode"))
    differences = [difference for _, _, difference in results if difference]
    types = {t: sum(path.parent.parent.name.startswith(t) for path, _, _ in results) for t in TASK_TYPES}
    for difference in differences:
        print(difference)
    print(f"{len(published)} published, {len(generated)} generated and {len(odd)} odd games ({', '.join(f'{n} {t}' for t, n in types.items())}), "
          f"{sum(steps for _, steps, _ in results):,} steps: {len(differences) or 'no'} differences from alfworld {alfworld_version()}")
    sys.exit(bool(differences))


if __name__ == "__main__":
    command_line(main)
