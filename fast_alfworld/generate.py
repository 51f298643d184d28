"""Games made from the alfworld package alone, for machines without the published ones.

    python -m fast_alfworld write --split train --n 1000 --seed 0 --out data
    python -c "import fast_alfworld as w; print(w.generated_split('train', 1)[0].intro)"

A generated game has the same content as a `game.tw-pddl` file. Its domain, grammar, goal and task
sentence are the package's own; layouts.py reads the rooms. Each game is won by its walkthrough
before it is handed out. Generated games differ from published ones in that an object is in one
receptacle only, no object is inside another, and every object can be reached.

Tiny games are generated games with few receptacles and objects, and one object to put somewhere.
"""

import random

from tqdm import tqdm

from .engine import AlfworldEnv
from .gamefile import DataError, Game, numbers
from .layouts import SINGLE, TOOLS, goals, package, pddl_id, room

SPLITS = ("train", "valid_seen", "valid_unseen")
UNSEEN_ROOMS = (10, 219, 308, 424)  # the rooms of valid_unseen; no game to train on is in them
TRIALS = 2  # games in a task folder (published: 1 to 3, 2.4 on average)

# The following is written down from the published train games, because no file of the package says
# it. How many games have each task type and kind of room (the kinds of constants.SCENE_TYPE):
TASKS = {"pick_and_place_simple": {"Kitchen": 79, "LivingRoom": 210, "Bedroom": 237,
                                   "Bathroom": 264},
         "pick_two_obj_and_place": {"Kitchen": 124, "LivingRoom": 216, "Bedroom": 240,
                                    "Bathroom": 233},
         "pick_clean_then_place_in_recep": {"Kitchen": 501, "Bathroom": 149},
         "pick_heat_then_place_in_recep": {"Kitchen": 459},
         "pick_cool_then_place_in_recep": {"Kitchen": 533},
         "look_at_obj_in_light": {"LivingRoom": 51, "Bedroom": 257}}
# The relative frequency with which an object is in a receptacle of each type (any other type: 2).
SPACE = {"HandTowelHolder": 300, "Bed": 20, "StoveBurner": 12, "DiningTable": 10, "BathtubBasin": 9,
         "CoffeeTable": 8, "Desk": 8, "Dresser": 8, "Sofa": 8, "Fridge": 8, "TVStand": 8,
         "CounterTop": 6, "Cart": 5, "Toilet": 4, "SideTable": 4, "Ottoman": 4, "Drawer": 1,
         "Cabinet": 1, "CoffeeMachine": 0.5}
FIXED = {"DeskLamp", "HousePlant", "Television"}  # objects that cannot be picked up


def generate(split, n, seed=0, tiny=False):
    """Yield n pairs (game id, decoded JSON of a game.tw-pddl) of one of SPLITS.

    Games of train and valid_seen are in the same rooms, those of valid_unseen in UNSEEN_ROOMS. The
    i-th game depends on (split, seed, i, tiny) and the alfworld package alone. Raises DataError.
    """
    if split not in SPLITS:
        raise DataError(f"no games of split {split!r} can be generated (only {', '.join(SPLITS)})")
    unseen = split == "valid_unseen"
    rooms = {kind: [scene for scene in scenes if (scene in UNSEEN_ROOMS) == unseen]
             for kind, scenes in package().constants.SCENE_TYPE.items()}
    env = AlfworldEnv()
    for i in range(n):
        task = pick_task(random.Random(f"task {split} {seed} {i // TRIALS}"), rooms, tiny)
        trial = f"trial_{'T' if tiny else 'G'}_{split}_{seed}_{i:06d}"
        id_ = "{}-{}-None-{}-{}/".format(*task) + trial
        data = build(random.Random(f"game {split} {seed} {i}"), *task, tiny)
        game = Game.parse(data, id_)
        data["walkthrough"] = plan(game)
        won = [env.reset(game)[1]["won"]]
        won += [env.step(command)[4]["won"] for command in data["walkthrough"]]
        if won != [False] * (len(won) - 1) + [True]:  # only a bug in this file could cause it
            raise RuntimeError(f"{id_}: its walkthrough wins too early, or not at all: "
                               f"{data['walkthrough']}")
        yield id_, data


def generated_split(split, n, seed=0, tiny=False):
    """The games of `generate`, parsed: a list of n Game."""
    pairs = tqdm(generate(split, n, seed, tiny), f"generate {split}", n, unit="game", leave=False,
                 disable=None)
    return [Game.parse(data, id_) for id_, data in pairs]


def pick_task(rng, rooms, tiny):
    """Draw a task -> (task type, object type, receptacle type, room number).

    rng: a random.Random. rooms: {kind of room: [room number]}, the rooms to choose from.
    """
    counts = {(task_type, kind): n for task_type, kinds in TASKS.items()
              for kind, n in kinds.items() if not tiny or task_type == "pick_and_place_simple"}
    scenes = []
    while not scenes:  # some kinds of room cannot have every task: one has no desk lamp, say
        (task_type, kind), = rng.choices(list(counts), counts.values())
        scenes = [scene for scene in rooms[kind] if goals(scene, task_type, tiny)]
    scene = rng.choice(scenes)
    wanted, targets = rng.choice(list(goals(scene, task_type, tiny).items()))
    return task_type, wanted, rng.choice(targets), scene


def build(rng, task_type, wanted, target, scene, tiny=False):
    """Fill a room with objects -> decoded JSON of a game.tw-pddl, its walkthrough still None."""
    alfworld, here = package(), room(scene, tiny)
    declared, facts = place_objects(rng, task_type, wanted, target, scene, tiny)
    start = rng.choice(here.starts)
    names = {"obj": wanted, "recep": target, "toggle": target}
    goal = alfworld.goals[task_type]["pddl"].format(**names).replace("#", "-")
    template = rng.choice(alfworld.goals[task_type]["templates"])
    sentence = template.format(**{key: name.lower() for key, name in names.items()})
    problem = "\n        ".join((
        "\n(define (problem plan_generated)\n(:domain alfred)\n(:objects\n        agent1 - agent",
        here.declared, *declared, f"{start} - location\n        )\n\n(:init", here.facts, *facts,
        f"(atLocation agent1 {start})\n        )\n{goal}"))
    return {"pddl_domain": alfworld.domain,
            "grammar": alfworld.grammar.replace("UNKNOWN GOAL", sentence), "pddl_problem": problem,
            "solvable": True, "walkthrough": None}


def place_objects(rng, task_type, wanted, target, scene, tiny):
    """Draw objects and their receptacles -> (lines of (:objects …), lines of (:init …))."""
    constants, here = package().constants, room(scene, tiny)
    declared, facts, used = [], [], set()
    for o, spots in here.spots.items():
        n = rng.randint(1, constants.MAX_NUM_OF_OBJ_INSTANCES)
        if o == wanted:
            two = task_type == "pick_two_obj_and_place"
            n = rng.randint(2 if two else 1, constants.PICKUP_REPEAT_MAX)
            done = TOOLS[task_type][1] if task_type in TOOLS else target  # no part is done already
            spots = [r for r in spots if here.receptacles[r] != done]
        traits = [t.lower() for t, types in constants.VAL_ACTION_OBJECTS.items() if o in types]
        traits += ["pickupable"] * (o not in FIXED)
        traits += ["isReceptacleObject"] * (o in constants.MOVABLE_RECEPTACLES_SET)
        weights = [SPACE.get(here.receptacles[r], 2) for r in spots]
        for r in rng.choices(spots, weights, k=1 if tiny or o in SINGLE else n):
            (x, y, z), location = here.where[r]
            id_ = ""
            while not id_ or id_ in used:  # a position near the receptacle's; ids order the names
                id_ = pddl_id(o, (x + rng.uniform(-0.4, 0.4), y + rng.uniform(0.0, 0.2),
                                  z + rng.uniform(-0.4, 0.4)))
            used.add(id_)
            declared.append(f"{id_} - object")
            facts += [f"(objectType {id_} {o}Type)", f"(inReceptacle {id_} {r})",
                      f"(objectAtLocation {id_} {location})"]
            facts += [f"({trait} {id_})" for trait in traits]
            if o == wanted and here.receptacles[r] == "Fridge":
                facts.append(f"(isCool {id_})")
    return declared, facts


def plan(game):
    """A list of commands that wins a generated game, made with full knowledge of it."""
    names, n = game.names, game.n_objects
    home = {o: r for r, held in enumerate(game.start_contents, n) for o in numbers(held)}
    wanted = [o for o in home if game.goal_objects >> o & 1]
    lamps = [o for o in home if game.lamps >> o & 1]
    verb, tool = TOOLS.get(game.task_type, (None, ""))
    legs = []  # (receptacle, whether it must be open, the command to give there)
    for o in wanted[:2 if game.task_type == "pick_two_obj_and_place" else 1]:
        legs.append((home[o], True, f"take {names[o]} from {names[home[o]]}"))
        if lamps:
            legs.append((home[lamps[0]], False, f"use {names[lamps[0]]}"))
            break
        if verb:
            r = next(r for r in range(n, len(names)) if names[r].startswith(tool.lower() + " "))
            legs.append((r, False, f"{verb} {names[o]} with {names[r]}"))
        r = n + game.goal_receptacles[0]
        legs.append((r, True, f"move {names[o]} to {names[r]}"))
    commands, opened, place = [], set(), -1
    for r, must_open, command in legs:
        if game.room.place_of[r - n] != place:
            commands.append(f"go to {names[r]}")
            place = game.room.place_of[r - n]
        if must_open and game.room.openable >> r - n & 1 and r not in opened:
            commands.append(f"open {names[r]}")
            opened.add(r)
        commands.append(command)
    return commands
