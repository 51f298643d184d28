"""What the alfworld package says of its rooms: receptacles, kinds of objects, possible tasks.

generate.py makes games of it. The package's files are read, but alfworld itself is never imported:
that would make a cache folder and set $ALFWORLD_DATA.
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

from .gamefile import DataError

# No file of the package says the following, so it is written down from the published train games.

# The receptacle at which the agent cleans, heats and cools. No wanted object is there at the start.
TOOLS = {"pick_clean_then_place_in_recep": ("clean", "SinkBasin"),
         "pick_heat_then_place_in_recep": ("heat", "Microwave"),
         "pick_cool_then_place_in_recep": ("cool", "Fridge")}
# The types of receptacle on which these objects stand, although constants.VAL_RECEPTACLE_OBJECTS
# does not allow anyone to put them there.
STANDS = {"DeskLamp": {"Desk", "Dresser", "Shelf", "SideTable"},
          "Television": {"CoffeeTable", "Dresser", "TVStand"}, "TeddyBear": {"Bed"},
          "HousePlant": {"CoffeeTable", "CounterTop", "Desk", "DiningTable", "Dresser", "Shelf",
                         "SideTable"},
          "PaperTowelRoll": {"CounterTop", "DiningTable", "GarbageCan", "Shelf"}}
# Objects that lie on the floor, where the agent cannot reach them. Floor lamps do too, but no
# published goal names one.
FLOOR = {"BaseballBat", "BasketBall", "Plunger", "TennisRacket"}
# Objects of which a room has only one.
SINGLE = {"Box", "HandTowel", "Towel", "WateringCan", *STANDS}

TINY = 5  # receptacles in a tiny room, and kinds of objects in it
PDDL = str.maketrans({"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_"})


@lru_cache(1)
def package():
    """The package's files -> a namespace: constants (module), goals, domain, grammar, layouts.

    goals: {task type: {"pddl": text, "templates": sentences}}; domain and grammar are texts,
    layouts is a folder. Raises DataError where alfworld is not installed.
    """
    spec = importlib.util.find_spec("alfworld")
    if spec is None:
        raise DataError("generated games are made from the alfworld package: "
                        "pip install alfworld==0.4.2")
    root = Path(spec.origin).parent
    return SimpleNamespace(
        constants=_module(root, "constants"), goals=_module(root, "goal_library").gdict,
        layouts=root / "gen" / "layouts", domain=(root / "data" / "alfred.pddl").read_text(),
        grammar=(root / "data" / "alfred.twl2").read_text())


def _module(root, name):
    """Load one file of alfworld.gen as a module without importing the package."""
    spec = importlib.util.spec_from_file_location(f"alfworld_{name}", root / "gen" / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Layout(NamedTuple):
    """What all games in one room have in common."""

    receptacles: dict  # PDDL id -> type
    where: dict  # PDDL id of a receptacle -> ((x, y, z) in metres, PDDL location to stand at)
    starts: list  # PDDL locations at no receptacle
    spots: dict  # object type -> PDDL ids of the receptacles that it can be in or on
    declared: str  # lines of (:objects …)
    facts: str  # lines of (:init …)


def pddl_id(type_, position):
    """("Mug", (0.5, 0.9, -1)) -> "Mug_bar__plus_00_dot_50_bar_…", as alfworld names objects.

    A basin is named after its sink: Sink|…|SinkBasin.
    """
    basin = f"|{type_}" * type_.endswith("Basin")
    coordinates = "|".join(f"{x:+06.2f}" for x in position)
    return f"{type_.removesuffix('Basin')}|{coordinates}{basin}".translate(PDDL)


def pddl_location(x, z, rotation, horizon):
    """The PDDL id of a location, from x and z in metres and two angles in degrees."""
    step = package().constants.AGENT_STEP_SIZE
    turns = round(rotation / 90) % 4
    return f"loc|{round(x / step)}|{round(z / step)}|{turns}|{round(horizon)}".translate(PDDL)


@lru_cache(None)
def room(scene, tiny=False):
    """The Layout of room number `scene`; a tiny one keeps TINY receptacles and kinds of objects."""
    constants, layouts = package().constants, package().layouts
    rng = random.Random(f"room {scene}")
    floor = np.load(layouts / f"FloorPlan{scene}-layout.npy", allow_pickle=False).tolist()  # [x, z]
    kinds = set(json.loads((layouts / f"FloorPlan{scene}-objects.json").read_text()))
    reachable = json.loads((layouts / f"FloorPlan{scene}-openable.json").read_text())
    receptacles, where, closed = {}, {}, set()
    for name, stand in reachable.items():  # stand: [x, z, rotation, horizon]
        type_, x, y, z, *basin = name.split("|")
        id_ = name.translate(PDDL)
        receptacles[id_] = basin[0] if basin else type_
        where[id_] = (float(x), float(y), float(z)), pddl_location(*stand)
        if receptacles[id_] in constants.OPENABLE_CLASS_SET:
            closed.add(id_)
    # The layouts lack the receptacles that alfworld's planner never had to open. Add, as in the
    # published games, one of each other kind in the room, four burners, and for every five cabinets
    # or drawers one that cannot be opened. Their positions are made up.
    counts = Counter(receptacles.values())
    for type_ in sorted(kinds & constants.RECEPTACLES - constants.MOVABLE_RECEPTACLES_SET):
        lacking = counts[type_] // 5 if type_ in ("Cabinet", "Drawer") else 0
        for _ in range(lacking if counts[type_] else 4 if type_ == "StoveBurner" else 1):
            x, z = rng.choice(floor)
            position = x + rng.uniform(-0.5, 0.5), rng.uniform(0.0, 1.5), z + rng.uniform(-0.5, 0.5)
            id_ = pddl_id(type_, position)
            receptacles[id_] = type_
            where[id_] = position, pddl_location(x, z, 90 * rng.randrange(4), 60)
    if tiny:
        first_of = {type_: id_ for id_, type_ in reversed(receptacles.items())}
        kept = rng.sample(sorted(first_of), min(TINY, len(first_of)))
        receptacles = {first_of[type_]: type_ for type_ in kept}
        where = {id_: where[id_] for id_ in receptacles}
    taken = {location for _, location in where.values()}
    starts = {pddl_location(x, z, turn, 30) for x, z in floor for turn in (0, 90, 180, 270)} - taken
    may_hold = constants.VAL_RECEPTACLE_OBJECTS
    spots = {}
    for o in sorted(kinds - FLOOR):
        at = [id_ for id_, type_ in receptacles.items()
              if o in may_hold.get(type_, ()) or type_ in STANDS.get(o, ())]
        if at:
            spots[o] = at
    if tiny:
        spots = {o: spots[o] for o in sorted(rng.sample(sorted(spots), min(TINY, len(spots))))}
    types = sorted(set(receptacles.values()))
    declared = [*(f"{id_} - receptacle" for id_ in receptacles),
                *(f"{location} - location" for location in sorted(taken)),
                *(f"{o}Type - otype" for o in spots), *(f"{r}Type - rtype" for r in types)]
    facts = [*(f"(receptacleType {id_} {type_}Type)" for id_, type_ in receptacles.items()),
             *(f"(openable {id_})" for id_ in receptacles if id_ in closed),
             *(f"(receptacleAtLocation {id_} {loc})" for id_, (_, loc) in where.items()),
             *(f"(canContain {r}Type {o}Type)"
               for r in types for o in spots if o in may_hold.get(r, ()))]
    return Layout(receptacles, where, sorted(starts), spots, "\n        ".join(declared),
                  "\n        ".join(facts))


@lru_cache(None)
def goals(scene, task_type, tiny=False):
    """The tasks that make sense in a room: {object type: [receptacle types]}.

    The rules are those of the package's task generator (get_filter_crit in
    gen/game_states/task_game_state.py).
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
            types = {here.receptacles[r] for r in here.spots[o]}  # where it can be, and be put
            targets = [r for r in sorted(types) if r != tool and types - {tool or r}]
            if look or targets:
                found[o] = ["DeskLamp"] if look else targets
    return found
