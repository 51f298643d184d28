"""Games made from the alfworld package alone, for machines without the published ones.

    python games.py --split train --n 1000 --seed 0 --out data                                # write them
    python -c "from generate import generated_split; print(generated_split('train', 1)[0].intro)"

A generated game has the very content of a `game.tw-pddl`: domain, grammar, goals and task sentences are the package's own
files; rooms, their receptacles and the kinds of objects in them come from its precomputed layouts, what may lie where from
its constants. Every one is won once by `plan` before it is handed out. How they differ from published games: an object
is in one receptacle at most, none is inside another object, and every object can be reached.

Tiny games are the same with little in a room and one thing to put somewhere: first experiments on them take seconds.
"""

import importlib.util
import json
import random
from collections import Counter
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from .engine import AlfworldEnv
from .gamefile import DataError, Game

SPLITS = ("train", "valid_seen", "valid_unseen")
UNSEEN_ROOMS = (10, 219, 308, 424)  # the rooms of valid_unseen: nothing that trains may use them


# --- what the alfworld package knows about its world -------------------------------------------------------------------

# Filled in by hand from the published train games, because no file of the package says it:
# how many of them are of which task type and kind of room (where: constants.GOALS_VALID),
TASKS = {"pick_and_place_simple": {"Kitchen": 79, "LivingRoom": 210, "Bedroom": 237, "Bathroom": 264},
         "pick_two_obj_and_place": {"Kitchen": 124, "LivingRoom": 216, "Bedroom": 240, "Bathroom": 233},
         "pick_clean_then_place_in_recep": {"Kitchen": 501, "Bathroom": 149},
         "pick_heat_then_place_in_recep": {"Kitchen": 459},
         "pick_cool_then_place_in_recep": {"Kitchen": 533},
         "look_at_obj_in_light": {"LivingRoom": 51, "Bedroom": 257}}
# the receptacle at which the agent cleans, heats and cools: there the wanted object never is at the start,
TOOLS = {"pick_clean_then_place_in_recep": ("clean", "SinkBasin"), "pick_heat_then_place_in_recep": ("heat", "Microwave"),
         "pick_cool_then_place_in_recep": ("cool", "Fridge")}
# how often an object is in a receptacle of this type rather than in a drawer or cabinet (others: 2),
SPACE = {"HandTowelHolder": 300, "Bed": 20, "StoveBurner": 12, "DiningTable": 10, "BathtubBasin": 9, "CoffeeTable": 8, "Desk": 8,
         "Dresser": 8, "Sofa": 8, "Fridge": 8, "TVStand": 8, "CounterTop": 6, "Cart": 5, "Toilet": 4, "SideTable": 4, "Ottoman": 4,
         "Drawer": 1, "Cabinet": 1, "CoffeeMachine": 0.5}
# objects that stand where constants.VAL_RECEPTACLE_OBJECTS allows nobody to put them, and those that lie on the floor,
# out of all reach (so do floor lamps: no published goal names one),
STANDS = {"DeskLamp": {"Desk", "Dresser", "Shelf", "SideTable"}, "Television": {"CoffeeTable", "Dresser", "TVStand"}, "TeddyBear": {"Bed"},
          "HousePlant": {"CoffeeTable", "CounterTop", "Desk", "DiningTable", "Dresser", "Shelf", "SideTable"},
          "PaperTowelRoll": {"CounterTop", "DiningTable", "GarbageCan", "Shelf"}}
FIXED = {"DeskLamp", "HousePlant", "Television"}
FLOOR = {"BaseballBat", "BasketBall", "Plunger", "TennisRacket"}
# and of what a room has one only.
SINGLE = {"Box", "HandTowel", "Towel", "WateringCan", *STANDS}
TRIALS = 2  # games to a task folder (published: 1 to 3, 2.4 on average)


@lru_cache(1)
def package():
    """-> constants (module), goals {task type: {"pddl", "templates"}}, domain, grammar (texts), layouts (folder) of alfworld.

    Read from its files: importing alfworld itself makes a cache folder and sets $ALFWORLD_DATA.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None:
        raise DataError("generated games are made from the alfworld package: pip install alfworld==0.4.2")
    root = Path(spec.origin).parent

    def module(name):
        spec = importlib.util.spec_from_file_location(f"alfworld_{name}", root / "gen" / f"{name}.py")
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    return SimpleNamespace(
        constants=module("constants"), goals=module("goal_library").gdict, layouts=root / "gen" / "layouts",
        domain=(root / "data" / "alfred.pddl").read_text(), grammar=(root / "data" / "alfred.twl2").read_text())


class Room(NamedTuple):
    """What all games in one room share."""
    receptacles: dict  # PDDL id -> type
    where: dict  # PDDL id of a receptacle -> ((x, y, z) in metres, PDDL location of one who stands at it)
    starts: list  # PDDL locations at no receptacle
    spots: dict  # object type -> PDDL ids of the receptacles that it can lie in or on
    declared: str  # lines of (:objects …)
    facts: str  # lines of (:init …)


PDDL = str.maketrans({"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_"})  # the package's fix_pddl_str_chars


def pddl_id(type_, position):
    """("Mug", (0.5, 0.9, -1)) -> "Mug_bar__plus_00_dot_50_bar_…"; a basin is named after its sink: Sink|…|SinkBasin."""
    basin = f"|{type_}" * type_.endswith("Basin")
    return f"{type_.removesuffix('Basin')}|{'|'.join(f'{x:+06.2f}' for x in position)}{basin}".translate(PDDL)


TINY = 5  # receptacles in a tiny room, and kinds of objects


@lru_cache(None)
def room(scene, tiny=False):
    """-> Room `scene`, from its layout files: reachable points, receptacles with where to stand, kinds of things in it."""
    constants, layouts = package().constants, package().layouts
    rng = random.Random(f"room {scene}")
    floor = np.load(layouts / f"FloorPlan{scene}-layout.npy", allow_pickle=False).tolist()  # [[x, z]] in metres
    layout = json.loads((layouts / f"FloorPlan{scene}-openable.json").read_text())  # receptacle -> [x, z, rotation, horizon]
    kinds = set(json.loads((layouts / f"FloorPlan{scene}-objects.json").read_text()))

    def location(x, z, rotation, horizon):  # in steps of the agent and quarter turns
        step = constants.AGENT_STEP_SIZE
        return f"loc|{round(x / step)}|{round(z / step)}|{round(rotation / 90) % 4}|{round(horizon)}".translate(PDDL)
    receptacles, where, closed = {}, {}, set()
    for name, stand in layout.items():
        type_, x, y, z, *basin = name.split("|")
        id_ = name.translate(PDDL)
        receptacles[id_] = basin[0] if basin else type_
        where[id_] = (float(x), float(y), float(z)), location(*stand)
        if receptacles[id_] in constants.OPENABLE_CLASS_SET:
            closed.add(id_)
    # The layouts lack receptacles the planner never had to open. As in the published games: one of each other kind the room
    # has, four burners, and for every five cabinets or drawers one more that does not open. Their places are made up.
    counts = Counter(receptacles.values())
    for type_ in sorted(kinds & constants.RECEPTACLES - constants.MOVABLE_RECEPTACLES_SET):
        lacking = counts[type_] // 5 if type_ in ("Cabinet", "Drawer") else 0
        for _ in range(lacking if counts[type_] else 4 if type_ == "StoveBurner" else 1):
            x, z = rng.choice(floor)
            position = x + rng.uniform(-0.5, 0.5), rng.uniform(0.0, 1.5), z + rng.uniform(-0.5, 0.5)
            id_ = pddl_id(type_, position)
            receptacles[id_] = type_
            where[id_] = position, location(x, z, 90 * rng.randrange(4), 60)
    if tiny:
        first_of = {type_: id_ for id_, type_ in reversed(receptacles.items())}
        receptacles = {first_of[type_]: type_ for type_ in rng.sample(sorted(first_of), min(TINY, len(first_of)))}
        where = {id_: where[id_] for id_ in receptacles}
    taken = {loc for _, loc in where.values()}
    starts = sorted({location(x, z, turn, 30) for x, z in floor for turn in (0, 90, 180, 270)} - taken)
    may_hold = constants.VAL_RECEPTACLE_OBJECTS
    spots = {}
    for o in sorted(kinds - FLOOR):
        at = [id_ for id_, type_ in receptacles.items() if o in may_hold.get(type_, ()) or type_ in STANDS.get(o, ())]
        if at:
            spots[o] = at
    if tiny:
        spots = {o: spots[o] for o in sorted(rng.sample(sorted(spots), min(TINY, len(spots))))}
    types = sorted(set(receptacles.values()))
    declared = [*(f"{id_} - receptacle" for id_ in receptacles), *(f"{loc} - location" for loc in sorted(taken)),
                *(f"{o}Type - otype" for o in spots), *(f"{r}Type - rtype" for r in types)]
    facts = [*(f"(receptacleType {id_} {type_}Type)" for id_, type_ in receptacles.items()),
             *(f"(openable {id_})" for id_ in receptacles if id_ in closed),
             *(f"(receptacleAtLocation {id_} {loc})" for id_, (_, loc) in where.items()),
             *(f"(canContain {r}Type {o}Type)" for r in types for o in spots if o in may_hold.get(r, ()))]
    return Room(receptacles, where, starts, spots, "\n        ".join(declared), "\n        ".join(facts))


@lru_cache(None)
def goals(scene, task_type, tiny=False):
    """-> {object type: [receptacle types]} of the sensible tasks in a room, by the rules of the package's task generator.

    (gen/game_states/task_game_state.py: get_filter_crit.)
    """
    constants, here = package().constants, room(scene, tiny)
    verb, tool = TOOLS.get(task_type, (None, None))
    look, two = task_type == "look_at_obj_in_light", task_type == "pick_two_obj_and_place"
    if tool and tool not in here.receptacles.values() or look and "DeskLamp" not in here.spots:
        return {}
    able = constants.VAL_ACTION_OBJECTS[f"{verb.capitalize()}able"] if verb else here.spots
    found = {}
    for o in here.spots:
        if o in able and o not in STANDS and not (two and o in SINGLE):
            types = {here.receptacles[r] for r in here.spots[o]}  # where it can be at the start, and where it can go
            targets = [r for r in sorted(types) if r != tool and types - {tool or r}]
            if look or targets:
                found[o] = ["DeskLamp"] if look else targets
    return found


# --- generated games ---------------------------------------------------------------------------------------------------

def generate(split, n, seed=0, tiny=False):
    """Yield n pairs (game id, decoded JSON of a game.tw-pddl) of a split: "train", "valid_seen" or "valid_unseen".

    train and valid_seen are games in the same rooms, valid_unseen only in UNSEEN_ROOMS. The i-th game depends on (split,
    seed, i) and the package alone. Each has been won by its walkthrough in `AlfworldEnv`.
    """
    if split not in SPLITS:
        raise DataError(f"no games of split {split!r} can be generated (only {', '.join(SPLITS)})")
    unseen = split == "valid_unseen"
    rooms = {kind: [s for s in scenes if (s in UNSEEN_ROOMS) == unseen] for kind, scenes in package().constants.SCENE_TYPE.items()}
    env = AlfworldEnv()
    for i in range(n):
        task = pick_task(random.Random(f"task {split} {seed} {i // TRIALS}"), rooms, tiny)
        id_ = "{}-{}-None-{}-{}".format(*task) + f"/trial_{'T' if tiny else 'G'}_{split}_{seed}_{i:06d}"
        data = build(random.Random(f"game {split} {seed} {i}"), *task, tiny)
        game = Game.parse(data, id_)
        data["walkthrough"] = plan(game)
        won = [env.reset(game)[1]["won"], *(env.step(command)[4]["won"] for command in data["walkthrough"])]
        if won != [False] * (len(won) - 1) + [True]:  # cannot be: it would be a mistake in this file
            raise RuntimeError(f"{id_}: its walkthrough wins too early, or not at all: {data['walkthrough']}")
        yield id_, data


def generated_split(split, n, seed=0, tiny=False):
    """-> [Game]: the games of `generate`, parsed."""
    pairs = tqdm(generate(split, n, seed, tiny), f"generate {split}", n, unit="game", leave=False, disable=None)
    return [Game.parse(data, id_) for id_, data in pairs]


def pick_task(rng, rooms, tiny):
    """-> (task type, object type, receptacle type, room). rooms: {kind of room: [room]}."""
    counts = {(task_type, kind): n for task_type, kinds in TASKS.items() for kind, n in kinds.items()
              if not tiny or task_type == "pick_and_place_simple"}
    scenes = []
    while not scenes:  # the living room of valid_unseen has no desk lamp, for one
        (task_type, kind), = rng.choices(list(counts), counts.values())
        scenes = [scene for scene in rooms[kind] if goals(scene, task_type, tiny)]
    scene = rng.choice(scenes)
    wanted, targets = rng.choice(list(goals(scene, task_type, tiny).items()))
    return task_type, wanted, rng.choice(targets), scene


def build(rng, task_type, wanted, target, scene, tiny=False):
    """Fill a room with objects -> decoded JSON of a game.tw-pddl, but for the walkthrough."""
    alfworld, here = package(), room(scene, tiny)
    constants = alfworld.constants
    declared, facts, used = [], [], set()
    for o, spots in here.spots.items():
        n = rng.randint(1, constants.MAX_NUM_OF_OBJ_INSTANCES)
        if o == wanted:
            n = rng.randint(2 if task_type == "pick_two_obj_and_place" else 1, constants.PICKUP_REPEAT_MAX)
            done = TOOLS[task_type][1] if task_type in TOOLS else target  # nothing is done already
            spots = [r for r in spots if here.receptacles[r] != done]
        traits = [trait.lower() for trait, types in constants.VAL_ACTION_OBJECTS.items() if o in types]
        traits += ["pickupable"] * (o not in FIXED) + ["isReceptacleObject"] * (o in constants.MOVABLE_RECEPTACLES_SET)
        for r in rng.choices(spots, [SPACE.get(here.receptacles[r], 2) for r in spots], k=1 if tiny or o in SINGLE else n):
            (x, y, z), location = here.where[r]
            id_ = ""
            while not id_ or id_ in used:  # near its receptacle: ids, sorted, make the numbers in the names
                id_ = pddl_id(o, (x + rng.uniform(-0.4, 0.4), y + rng.uniform(0.0, 0.2), z + rng.uniform(-0.4, 0.4)))
            used.add(id_)
            declared.append(f"{id_} - object")
            facts += [f"(objectType {id_} {o}Type)", f"(inReceptacle {id_} {r})", f"(objectAtLocation {id_} {location})"]
            facts += [f"({trait} {id_})" for trait in traits]
            if o == wanted and here.receptacles[r] == "Fridge":
                facts.append(f"(isCool {id_})")
    start = rng.choice(here.starts)
    names = {"obj": wanted, "recep": target, "toggle": target}
    goal = alfworld.goals[task_type]["pddl"].format(**names).replace("#", "-")
    sentence = rng.choice(alfworld.goals[task_type]["templates"]).format(**{k: v.lower() for k, v in names.items()})
    problem = "\n        ".join((
        "\n(define (problem plan_generated)\n(:domain alfred)\n(:objects\n        agent1 - agent", here.declared, *declared,
        f"{start} - location\n        )\n\n(:init", here.facts, *facts, f"(atLocation agent1 {start})\n        )\n{goal}"))
    return {"pddl_domain": alfworld.domain, "grammar": alfworld.grammar.replace("UNKNOWN GOAL", sentence), "pddl_problem": problem,
            "solvable": True, "walkthrough": None}


def plan(game):
    """The commands that win a game for one who knows where everything is."""
    n = game.n_objects
    lies_in = {o: r for r, held in enumerate(game.start_contents, n) for o in range(n) if held >> o & 1}
    wanted, lamps = ([o for o in lies_in if goal >> o & 1] for goal in (game.goal_objects, game.lamps))
    commands, opened, here = [], set(), -1

    def go(r, inside=True):
        nonlocal here
        if game.room.place_of[r - n] != here:
            commands.append(f"go to {game.names[r]}")
            here = game.room.place_of[r - n]
        if inside and game.room.openable >> r - n & 1 and r not in opened:
            commands.append(f"open {game.names[r]}")
            opened.add(r)

    verb, tool = TOOLS.get(game.task_type, (None, ""))
    for o in wanted[:2 if game.task_type == "pick_two_obj_and_place" else 1]:
        name, r = game.names[o], lies_in[o]
        go(r)
        commands.append(f"take {name} from {game.names[r]}")
        if lamps:
            go(lies_in[lamps[0]], inside=False)
            return [*commands, f"use {game.names[lamps[0]]}"]
        if verb:
            r = next(r for r, other in enumerate(game.names) if r >= n and other.startswith(tool.lower() + " "))
            go(r, inside=False)
            commands.append(f"{verb} {name} with {game.names[r]}")
        r = n + game.goal_receptacles[0]
        go(r)
        commands.append(f"move {name} to {game.names[r]}")
    return commands
