"""What an ALFWorld game file says: `Game.load` turns a `game.tw-pddl` into the names, tuples and sets that env.py plays with.

A file holds the rules (a PDDL domain), what is where and what is to be done (a PDDL problem), all sentences (a grammar, with
the task in it) and a walkthrough. Rules and sentences are the same in all files, in two known versions, and env.py is both in
Python. So a file with others is refused, and only the task, the facts and the goal are read.

Objects and receptacles are numbered in id order, the order in which alfworld lists things. Sets of them are integers: bit i
stands for number i. A place is where one can stand, before one or several receptacles; -1 is the middle of the room.
"""

import hashlib
import json
import re
from collections import deque
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path
from sys import intern

DOMAINS = {  # SHA-1 of the text -> the types of receptacle at which things are cleaned
    "0efb2ee66134ce3941f539d8d47a7b82e14bd2e6": ("sinktype", "sinkbasintype"),  # in the published games
    "f6b34d1678ff904f31b5ba33c065aa9c6e2e8bf5": ("sinkbasintype",),  # in the alfworld 0.4.2 package
}
GRAMMARS = ("bc79a7414455a5916576efff17f4e912f32edecb",  # SHA-1 of the text less the task: in the published games
            "dcb7088767f67c99c4674b3c1f1ef04a800dd60d")  # and in the alfworld 0.4.2 package
TASK = re.compile(r'"Your task is to: ([\w ,.!?\'()/-]+)"')  # no character that would mean something to the grammar

GOALS = {  # the predicates of the goal, in order -> task type
    "inreceptacle objecttype receptacletype": "pick_and_place_simple",
    "objecttype toggleable istoggled receptacleatlocation atlocation inreceptacle objecttype holds": "look_at_obj_in_light",
    "cleanable objecttype receptacletype isclean inreceptacle": "pick_clean_then_place_in_recep",
    "heatable objecttype receptacletype ishot inreceptacle": "pick_heat_then_place_in_recep",
    "coolable objecttype receptacletype iscool inreceptacle": "pick_cool_then_place_in_recep",
    "objecttype receptacletype inreceptacle = objecttype receptacletype inreceptacle": "pick_two_obj_and_place",
}
TASK_TYPES = tuple(GOALS.values())

# What (:init …) may state, and of how many things. No game starts with something held, open, toggled, sliced, hot or clean.
ARITY = dict.fromkeys(("(pickupable", "(cleanable", "(heatable", "(coolable", "(toggleable", "(sliceable", "(openable",
                       "(isreceptacleobject", "(iscool"), 1)
ARITY |= dict.fromkeys(("(objecttype", "(receptacletype", "(objectatlocation", "(receptacleatlocation", "(atlocation",
                        "(inreceptacle", "(inreceptacleobject", "(cancontain"), 2)

MIDDLE_OF_ROOM = "You are in the middle of a room. Looking quickly around you, you see {}."


class DataError(ValueError):
    """Games that were asked for are missing or unusable; the message is one line."""


class GameError(ValueError):
    """A game file that cannot be played; the message is one line and names the file."""


class Game:
    """One game, parsed once and never changed.

    `id` is "task folder/trial folder"; `names` are those of the objects, then of the receptacles, and `index` gives their numbers
    in it; `n_objects` is how many are objects; `counts` says how many things share a base name: {"mug": 2}.
    """

    __slots__ = ("id", "path", "task", "task_type", "scene", "walkthrough", "names", "index", "n_objects", "counts",
                 "room",  # a Room: the receptacles
                 "type_of", "pickupable", "toggleable", "sliceable", "blades", "vessels",  # the objects: a tuple of types, and sets
                 "treatable",  # {"clean": set of objects, "heat": …, "cool": …}
                 "inner",  # object -> set of the objects within it
                 "start_contents", "start_at", "start_cool",  # sets of objects, by receptacle and by place, and one set
                 "goal_objects", "goal_receptacles", "lamps", "goal_state", "goal_is_two")  # see AlfworldEnv._is_won

    @classmethod
    def load(cls, path):
        """Parse a `game.tw-pddl`. Raises GameError."""
        path = Path(path)
        try:
            with open(path, "rb") as file:
                data = _decode(file.read())
        except OSError as error:
            raise GameError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise GameError(f"{path}: not JSON ({error})") from None
        return cls.parse(data, str(path), path)

    @classmethod
    def parse(cls, data, name, path=None):
        """Build a game from the decoded JSON of a `game.tw-pddl`; `name` is its path, or "task folder/trial folder". Raises GameError."""
        try:
            return cls(data, name, path)
        except GameError as error:
            raise GameError(f"{name}: {error}") from None
        except KeyError as error:
            raise GameError(f"{name}: its facts name {error} but do not say what that is") from None

    def __init__(self, data, name, path):
        clean_at, task, problem, walkthrough = _check(data)
        folders = name.replace("\\", "/").removesuffix("/game.tw-pddl").split("/")[-2:]
        scene = folders[0].rpartition("-")[2]
        self.path, self.id = path, "/".join(folders)
        self.scene = int(scene) if scene.isdecimal() else -1  # the room's number in AI2-THOR
        self.task, self.walkthrough = task, tuple(map(intern, walkthrough))
        start, goal = problem.find("(:init"), problem.rfind("(:goal")
        if not 0 <= start < goal:
            raise GameError("its pddl_problem lacks (:init …) or (:goal …)")
        self._build(problem[start + len("(:init"):goal].lower(), clean_at)
        self._aim(problem[goal:].lower())

    def _build(self, init, clean_at):
        """Number all things, and turn the facts about them into sets of numbers."""
        # the facts of canContain stand together, and are the same in all games of a room
        first, last = max(init.find("(cancontain"), 0), init.rfind("(cancontain")
        last = init.find(")", last) + 1 if last >= 0 else 0
        containable = init[first:last]
        _accepted(containable)  # raises what is wrong with it; Room makes use of it
        facts = _facts(init[:first] + init[last:])
        object_type, receptacle_type = _one_each(facts, "(objecttype"), _one_each(facts, "(receptacletype")
        if not object_type or not receptacle_type:
            raise GameError("its (:init …) is empty")
        for x in facts["(pickupable"][0]:
            object_type.setdefault(x, "")  # two published games have an object without a type
        objects, receptacles = sorted(object_type), sorted(receptacle_type)

        counts, name = {}, {}
        for x in sorted(objects + receptacles, reverse=True):  # so that in id order they are "mug n", …, "mug 1"
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
        location = _one_each(facts, "(receptacleatlocation")
        self.room = room = _room(self.names[len(objects):], tuple([receptacle_type[x] for x in receptacles]),
                                 tuple([location[x] for x in receptacles]), openable, clean_at, containable)
        if [x in room.place for x in facts["(atlocation"][1]] != [False]:
            raise GameError("it does not start in the middle of the room")

        bit = {x: 1 << o for o, x in enumerate(objects)}
        union = lambda predicate: reduce(or_, map(bit.__getitem__, facts[predicate][0]), 0)
        self.pickupable, self.toggleable, self.sliceable = union("(pickupable"), union("(toggleable"), union("(sliceable")
        self.treatable = {"clean": union("(cleanable"), "heat": union("(heatable"), "cool": union("(coolable")}
        self.start_cool, self.vessels, self.inner = union("(iscool"), union("(isreceptacleobject"), {}
        for inside, vessel in zip(*facts["(inreceptacleobject"]):
            if inside != vessel:  # the engine leaves out an object within itself
                o = self.index[name[vessel]]
                self.inner[o] = self.inner.get(o, 0) | bit[inside]
        self.type_of = tuple([intern(object_type[x]) for x in objects])
        self.blades = self._of_type("knifetype", "butterknifetype")
        contents, at = [0] * len(receptacles), [0] * len(room.receptacles_at)
        for x, receptacle in zip(*facts["(inreceptacle"]):
            contents[number[receptacle]] |= bit[x]
        for x, spot in zip(*facts["(objectatlocation"]):
            if spot in room.place:  # elsewhere no agent gets
                at[room.place[spot]] |= bit[x]
        self.start_contents, self.start_at = tuple(contents), tuple(at)

    def _aim(self, goal):
        """What it takes to win."""
        self.task_type, object_type, other_type = _goal(goal)
        treatment = self.task_type.split("_")[1]
        self.goal_objects = self._of_type(object_type) & self.treatable.get(treatment, -1)
        self.goal_receptacles = tuple([r for r, type_ in enumerate(self.room.types) if type_ == other_type])
        self.lamps = self._of_type(other_type) & self.toggleable if self.task_type == "look_at_obj_in_light" else 0
        self.goal_state = {"clean": "clean", "heat": "hot", "cool": "cool"}.get(treatment)
        self.goal_is_two = treatment == "two"

    def _of_type(self, *types):
        return sum([1 << o for o, type_ in enumerate(self.type_of) if type_ in types])

    @property
    def intro(self):
        """The first observation."""
        return f"-= Welcome to TextWorld, ALFRED! =-\n\n{MIDDLE_OF_ROOM.format(self.room.listing)}\n\nYour task is to: {self.task}"

    def listing(self, objects):
        """Set of objects -> "a mug 2, and a mug 1" (or "nothing")."""
        return join_list(["a " + self.names[o] for o in numbers(objects)])


class Room:
    """The receptacles, and what depends on them alone. Games share it: the 3,553 train games have 109."""

    __slots__ = ("names", "types", "openable", "place", "place_of", "receptacles_at", "commands_at", "treats", "accepts", "listing")

    def __init__(self, names, types, locations, openable, clean_at, containable):
        self.names, self.types, self.openable = names, types, openable
        self.place = {}  # location id -> place, numbered as they come
        self.place_of = tuple([self.place.setdefault(location, len(self.place)) for location in locations])
        everywhere = [*range(len(self.place)), -1]  # the entry behind those of the places is also number -1
        self.receptacles_at = tuple([tuple([r for r, p in enumerate(self.place_of) if p == place]) for place in everywhere])
        examine, go_to = ["examine " + name for name in names], ["go to " + name for name in names]
        self.commands_at = tuple([sorted(["help", "inventory", "look"] + [(examine if p == place else go_to)[r] for r, p in enumerate(self.place_of)])
                                  for place in everywhere])  # those that depend on the place alone
        treats = {"microwavetype": "heat", "fridgetype": "cool", **dict.fromkeys(clean_at, "clean")}
        self.treats = tuple([treats.get(type_) for type_ in types])  # "heat", "cool", "clean" or None
        accepted = _accepted(containable)
        self.accepts = tuple([accepted.get(type_, ()) for type_ in types])  # the types of object that can be put there
        self.listing = join_list(["a " + name for name in names])


_room = lru_cache(maxsize=1024)(Room)


# --- parsing ----------------------------------------------------------------------------------------------------------

_heads = deque(maxlen=2)  # of the files last decoded: bytes before the task, bytes from there to the problem, and what these say


def _decode(raw):
    """json.loads(raw) for the bytes of a game file, in two thirds of the time: the rules, the same in all files, are decoded once."""
    for before, after, rules, opening, closing in _heads:
        if raw.startswith(before):
            start, end = len(before), raw.find(b"\\", len(before))
            if raw.startswith(after, end):
                task = raw[start:end].decode()
                return {**rules, "grammar": opening + task + closing, **json.loads(b"{" + raw[end + len(after):])}
    data = json.loads(raw)
    before, mark, rest = raw.partition(b"Your task is to: ")
    task, quote, rest = rest.partition(b"\\")
    after, key, rest = rest.partition(b'"pddl_problem"')
    try:
        rules = json.loads(before + mark + task + quote + after.rstrip(b", ") + b"}")
        opening, closing = rules["grammar"].split(task.decode())
        _heads.appendleft((before + mark, quote + after, rules, opening, closing))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # this file is laid out in another way
    return data


def _check(data):
    """The decoded JSON -> (where things are cleaned, task, problem, walkthrough), if env.py can play it."""
    if not isinstance(data, dict):
        raise GameError("not a JSON object")
    for key in ("pddl_domain", "grammar", "pddl_problem"):
        if not isinstance(data.get(key), str):
            raise GameError(f"its {key} is {'not a text' if key in data else 'missing'}")
    walkthrough = data.get("walkthrough") or []
    if not isinstance(walkthrough, list) or not all([isinstance(command, str) for command in walkthrough]):
        raise GameError("its walkthrough is not a list of texts")
    clean_at = DOMAINS.get(_sha1(data["pddl_domain"]))
    if clean_at is None:
        raise GameError("its pddl_domain is not that of alfworld 0.4")
    grammar = data["grammar"]
    task = TASK.search(grammar)
    if task is None:
        raise GameError("its grammar names no task")
    if _sha1(grammar[:task.start(1)] + grammar[task.end(1):]) not in GRAMMARS:
        older = " (it says `put X in/on Y`: written for alfworld before 0.4)" * ("in/on {r}" in grammar)
        raise GameError("its grammar is not that of alfworld 0.4" + older)
    return clean_at, task[1], data["pddl_problem"], walkthrough


@lru_cache(maxsize=64)  # a few distinct texts serve thousands of games
def _sha1(text):
    return hashlib.sha1(text.encode(errors="replace")).hexdigest()


def _facts(text):
    """"(openable a) (atlocation b c)" -> {"(openable": [["a"]], "(atlocation": [["b"], ["c"]], …}: columns of arguments."""
    facts = {predicate: [[] for _ in range(arity)] for predicate, arity in ARITY.items()}
    words = text.replace(")", " ").split()
    words.append("")
    start = 0
    while words[start]:
        predicate, columns = words[start], facts.get(words[start])
        if columns is None:
            raise GameError(f"its (:init …) states {predicate[:40]!r}, which no game does")
        step = 1 + len(columns)
        end = start + step
        while end < len(words) and words[end] == predicate:  # the facts of a kind stand together: take them at one stroke
            end += step
        if end >= len(words):
            raise GameError(f"its (:init …) breaks off in a fact of {predicate!r}")
        columns[0] += words[start + 1:end:step]
        if step == 3:
            columns[1] += words[start + 2:end:step]
        start = end
    return facts


@lru_cache(maxsize=1024)
def _accepted(text):
    """"(cancontain desktype mugtype) …" -> {"desktype": {"mugtype"}}."""
    facts, accepted = _facts(text), {}
    for receptacle_type, object_type in zip(*facts.pop("(cancontain")):
        accepted.setdefault(receptacle_type, set()).add(object_type)
    if any(columns[0] for columns in facts.values()):
        raise GameError("other facts stand between those of canContain")
    return accepted


def _one_each(facts, predicate):
    """{first argument: second argument}, where nothing may have two."""
    firsts, seconds = facts[predicate]
    found = dict(zip(firsts, seconds))
    if len(found) < len(firsts):
        raise GameError(f"its (:init …) states {predicate[1:]} twice of one thing")
    return found


@lru_cache(maxsize=1024)
def _goal(text):
    """"(:goal …)" -> (task type, type of the objects wanted, type of the receptacle or lamp)."""
    form = re.sub(r"\b(?:and|exists|not) ?", "", " ".join(re.findall(r"\((\w+|=) \?", text)))
    types = re.findall(r" (\w+type)\)", text)
    if form not in GOALS or len(types) < 2 or types != types[:2] * (len(types) // 2):
        raise GameError(f"its goal is none of ALFWorld's six ({form[:200] or 'empty'})")
    object_type, other_type = types[1::-1] if GOALS[form] == "look_at_obj_in_light" else types[:2]
    return GOALS[form], object_type, other_type


@lru_cache(maxsize=4096)  # faster than to make it, and all games share it
def _name(base, n):
    return f"{base} {n}"


def numbers(mask):
    """The numbers in a set, ascending."""
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def join_list(items):
    """TextWorld's way: "X, and Y" even for two."""
    *items, last = items or ["nothing"]
    return ", ".join(items) + ", and " + last if items else last
