"""`Game.load` turns a `game.tw-pddl` file into the names, tuples and sets that engine.py uses.

A file holds the rules (a PDDL domain), the initial facts and the goal (a PDDL problem), the
sentences (a grammar that includes the task) and a walkthrough; parsing.py reads them.

Objects and receptacles are numbered in the order of their ids, which is the order in which
alfworld lists them. A set of objects or receptacles is an integer whose bit i stands for number i.
A place is a location at which the agent can stand, with one or more receptacles; place -1 is the
middle of the room.
"""

import re
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from sys import intern

from .files import a_file
from .parsing import (TASK_TYPES, DataError, GameError, UnsolvableError, check, decode, one_each,
                      read_can_contain, read_facts, read_goal)

__all__ = ["MIDDLE_OF_ROOM", "TASK_TYPES", "DataError", "Game", "GameError", "Room",
           "UnsolvableError", "join_list", "numbers", "split_intro"]

WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
INTRO = re.compile(
    r"(?:-= Welcome to TextWorld, ALFRED! =-\n\n)?(.*?)\n\nYour task is to: (.*)", re.DOTALL)
OBJECT_SETS = ("(pickupable", "(toggleable", "(sliceable", "(iscool", "(isreceptacleobject",
               "(cleanable", "(heatable", "(coolable")
MIDDLE_OF_ROOM = "You are in the middle of a room. Looking quickly around you, you see {}."


class Game:
    """One game, parsed once and never changed afterwards.

    id            "task folder/trial folder"
    path          Path of the file, or None for a generated game
    task          the task as a sentence; task_type: one of TASK_TYPES
    scene         number of the room in AI2-THOR, or -1 if the id does not say
    walkthrough   commands that win the game
    names         names of the objects, then of the receptacles; index: name -> position there
    n_objects     how many of `names` are objects
    counts        {base name: how many objects and receptacles have it}, such as {"mug": 2}
    """

    __slots__ = (
        "id", "path", "task", "task_type", "scene", "walkthrough", "names", "index", "n_objects",
        "counts",
        "room",  # the Room
        "type_of",  # tuple: the PDDL type of each object
        "pickupable", "toggleable", "sliceable", "blades", "vessels",  # sets of objects
        "treatable",  # {"clean": set of objects, "heat": set, "cool": set}
        "inner",  # {object: set of the objects inside it}
        "start_contents",  # tuple: the set of objects in or on each receptacle
        "start_at",  # tuple: the set of objects that the facts locate at each place, then at -1
        "start_cool",  # set of the objects that are cool
        # The goal; AlfworldEnv._is_won says how it is tested.
        "goal_objects", "goal_receptacles", "lamps", "goal_state", "goal_is_two")

    @classmethod
    def load(cls, path):
        """Parse the `game.tw-pddl` file at `path`. Raises GameError."""
        path = Path(path)
        try:
            with open(a_file(path), "rb") as file:
                data = decode(file.read())
        except OSError as error:
            raise GameError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise GameError(f"{path}: not JSON ({error})") from None
        return cls.parse(data, str(path), path)

    @classmethod
    def parse(cls, data, name, path=None):
        """Build a game from `data`, the decoded JSON of a file. Raises GameError.

        name: the file's path or "task folder/trial folder", used for the id and in errors.
        """
        try:
            return cls(data, name, path)
        except GameError as error:
            raise type(error)(f"{name}: {error}") from None
        except KeyError as error:
            raise GameError(f"{name}: its facts name {str(error)[:80]} but do not say what that is"
                            ) from None

    def __init__(self, data, name, path):
        clean_at, task, problem, walkthrough = check(data)
        folders = name.replace("\\", "/").removesuffix("/game.tw-pddl").split("/")[-2:]
        scene = folders[0].rpartition("-")[2]
        self.path, self.id = path, "/".join(folders)
        self.scene = int(scene) if scene.isdecimal() else -1
        self.task, self.walkthrough = task, tuple(map(intern, walkthrough))
        start, goal = problem.find("(:init"), problem.rfind("(:goal")
        if not 0 <= start < goal:
            raise GameError("its pddl_problem lacks (:init …) or (:goal …)")
        self._read_init(problem[start + len("(:init"):goal].lower(), clean_at)
        self._read_goal(problem[goal:].lower())

    def _read_init(self, init, clean_at):
        """Number all objects and receptacles and turn the facts about them into sets."""
        # The facts of canContain stand together and are the same in all games of a room: they are
        # cut out, so that they are parsed once a room.
        first, last = max(init.find("(cancontain"), 0), init.rfind("(cancontain")
        last = init.find(")", last) + 1 if last >= 0 else 0
        can_contain = init[first:last]
        read_can_contain(can_contain)  # raises GameError here; Room uses the cached result
        facts = read_facts(init[:first] + init[last:])
        object_type = one_each(facts, "(objecttype")
        receptacle_type = one_each(facts, "(receptacletype")
        if not object_type or not receptacle_type:
            raise GameError("its (:init …) is empty")
        for x in facts["(pickupable"][0]:
            object_type.setdefault(x, "")  # two published games have an object without a type
        objects, receptacles = sorted(object_type), sorted(receptacle_type)

        counts, name = {}, {}
        for x in sorted(objects + receptacles, reverse=True):  # in id order: "mug n", …, "mug 1"
            base = x.partition("_bar_")[0]
            if "basin" in x:
                base += "basin"
            counts[base] = n = counts.get(base, 0) + 1
            name[x] = _name(base, n)
        self.counts = {intern(base): n for base, n in counts.items()}
        self.names = tuple([name[x] for x in objects + receptacles])
        self.index = dict(zip(self.names, range(len(self.names))))
        self.n_objects = len(objects)

        number = {x: r for r, x in enumerate(receptacles)}
        openable = 0
        for x in facts["(openable"][0]:
            openable |= 1 << number[x]
        location = one_each(facts, "(receptacleatlocation")
        self.room = room = _room(
            self.names[len(objects):], tuple([receptacle_type[x] for x in receptacles]),
            tuple([location[x] for x in receptacles]), openable, clean_at, can_contain)
        if [x in room.place for x in facts["(atlocation"][1]] != [False]:
            raise GameError("it does not start in the middle of the room")

        bit = {x: 1 << o for o, x in enumerate(objects)}
        pickupable, toggleable, sliceable, cool, vessels, cleanable, heatable, coolable = [
            reduce(or_, map(bit.__getitem__, facts[predicate][0]), 0) for predicate in OBJECT_SETS]
        self.pickupable, self.toggleable, self.sliceable = pickupable, toggleable, sliceable
        self.start_cool, self.vessels, self.inner = cool, vessels, {}
        self.treatable = {"clean": cleanable, "heat": heatable, "cool": coolable}
        for inside, vessel in zip(*facts["(inreceptacleobject"]):
            if inside != vessel:  # alfworld does not list an object within itself
                o = self.index[name[vessel]]
                self.inner[o] = self.inner.get(o, 0) | bit[inside]
        self.type_of = tuple([intern(object_type[x]) for x in objects])
        self.blades = self._of_type("knifetype", "butterknifetype")
        contents, at = [0] * len(receptacles), [0] * len(room.receptacles_at)
        for x, receptacle in zip(*facts["(inreceptacle"]):
            contents[number[receptacle]] |= bit[x]
        for x, location_id in zip(*facts["(objectatlocation"]):
            if location_id in room.place:  # the agent cannot get to any other location
                at[room.place[location_id]] |= bit[x]
        self.start_contents, self.start_at = tuple(contents), tuple(at)

    def _read_goal(self, goal):
        """Set the attributes that define when the game is won."""
        self.task_type, object_type, other_type = read_goal(goal)
        treatment = self.task_type.split("_")[1]
        look = self.task_type == "look_at_obj_in_light"
        self.goal_objects = self._of_type(object_type) & self.treatable.get(treatment, -1)
        self.goal_receptacles = tuple([r for r, t in enumerate(self.room.types) if t == other_type])
        self.lamps = self._of_type(other_type) & self.toggleable if look else 0
        self.goal_state = {"clean": "clean", "heat": "hot", "cool": "cool"}.get(treatment)
        self.goal_is_two = treatment == "two"
        if not self.goal_objects or not (self.lamps if look else self.goal_receptacles):
            raise GameError("nothing in its room can meet its goal")

    def _of_type(self, *types):
        """The set of the objects of these types."""
        return sum([1 << o for o, type_ in enumerate(self.type_of) if type_ in types])

    @property
    def intro(self):
        """The first observation."""
        seen = MIDDLE_OF_ROOM.format(self.room.listing)
        return f"{WELCOME}\n\n{seen}\n\nYour task is to: {self.task}"

    def listing(self, objects):
        """Set of objects -> "a mug 2, and a mug 1" (or "nothing")."""
        return join_list(["a " + self.names[o] for o in numbers(objects)])


class Room:
    """The receptacles, and all that depends on them alone.

    Games share it: the 3,553 train games have 109 different rooms.
    """

    __slots__ = (
        "names", "types",  # tuples: name and PDDL type of each receptacle
        "openable",  # set of receptacles
        "place",  # {PDDL location: place}
        "place_of",  # tuple: the place of each receptacle
        "receptacles_at",  # tuple: the receptacles at each place, then () for place -1
        "commands_at",  # tuple: the commands admissible at each place whatever the state
        "treats",  # tuple: "heat", "cool", "clean" or None, what each receptacle is used for
        "accepts",  # tuple: the PDDL types of objects that each receptacle can hold
        "listing")  # all receptacles as the first observation lists them

    def __init__(self, names, types, locations, openable, clean_at, can_contain):
        self.names, self.types, self.openable = names, types, openable
        self.place = {}
        self.place_of = tuple([self.place.setdefault(x, len(self.place)) for x in locations])
        places = [*range(len(self.place)), -1]  # the last entry has index -1 in the tuples below
        self.receptacles_at = tuple(
            [tuple([r for r, p in enumerate(self.place_of) if p == place]) for place in places])
        examine, go_to = ["examine " + name for name in names], ["go to " + name for name in names]
        self.commands_at = tuple(
            [sorted(["help", "inventory", "look"]
                    + [(examine if p == place else go_to)[r] for r, p in enumerate(self.place_of)])
             for place in places])
        treats = {"microwavetype": "heat", "fridgetype": "cool", **dict.fromkeys(clean_at, "clean")}
        self.treats = tuple([treats.get(type_) for type_ in types])
        accepted = read_can_contain(can_contain)
        self.accepts = tuple([accepted.get(type_, ()) for type_ in types])
        self.listing = join_list(["a " + name for name in names])


_room = lru_cache(maxsize=1024)(Room)


@lru_cache(maxsize=4096)  # looking a name up is faster than formatting it, and games share the text
def _name(base, n):
    return f"{base} {n}"


def numbers(mask):
    """The numbers in a set, ascending, as a list."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def join_list(items):
    """Join texts as TextWorld does: "X, and Y" even for two, "nothing" for none."""
    *items, last = items or ["nothing"]
    return ", ".join(items) + ", and " + last if items else last


def split_intro(intro):
    """The game's first text -> (task, first observation)."""
    observation, task = INTRO.fullmatch(intro).groups()
    return task, observation
