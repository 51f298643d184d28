"""An exact, pure-Python ALFWorld text world.

Same intro, feedback, admissible commands, score and `won` as alfworld 0.4.2 on TextWorld 1.7, character for character, on
any sequence of commands (tests/test_parity.py plays both side by side), at some microseconds a step. All published games
share one PDDL domain and one text grammar, so the whole engine is written out below as plain Python.

    from env import AlfworldEnv, Game
    env = AlfworldEnv(max_steps=30)
    observation, info = env.reset(Game.load("json_2.1.1/train/.../game.tw-pddl"))
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

Sets of objects are integers: bit i is the i-th object in id order, the order in which the engine lists things.
"""

import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path
from sys import intern

HELP = """\
Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""
NOTHING_HAPPENS = "Nothing happens."

# The six goals of ALFWorld, each recognised by the predicates it names, in order.
GOALS = {
    "inreceptacle objecttype receptacletype": "pick_and_place_simple",
    "objecttype toggleable istoggled receptacleatlocation atlocation inreceptacle objecttype holds": "look_at_obj_in_light",
    "cleanable objecttype receptacletype isclean inreceptacle": "pick_clean_then_place_in_recep",
    "heatable objecttype receptacletype ishot inreceptacle": "pick_heat_then_place_in_recep",
    "coolable objecttype receptacletype iscool inreceptacle": "pick_cool_then_place_in_recep",
    "objecttype receptacletype inreceptacle = objecttype receptacletype inreceptacle": "pick_two_obj_and_place",
}
TASK_TYPES = tuple(GOALS.values())
# The engine below is exact for these texts only, so a game that carries others is refused.
DOMAINS = {  # SHA-1 -> the receptacle types at which an object can be cleaned
    "0efb2ee66134ce3941f539d8d47a7b82e14bd2e6": ("sinktype", "sinkbasintype"),  # in the published games
    "f6b34d1678ff904f31b5ba33c065aa9c6e2e8bf5": ("sinkbasintype",),  # in the alfworld 0.4.2 package
}
GRAMMARS = ("bc79a7414455a5916576efff17f4e912f32edecb", "dcb7088767f67c99c4674b3c1f1ef04a800dd60d")  # published; package (without the task)

FACT = re.compile(r"\((\w+) (\w+)(?: (\w+))?\)")
TASK = re.compile(r'"Your task is to: (.*)"')


class GameError(ValueError):
    """A game file that cannot be played; the message names the file."""


@lru_cache(maxsize=64)
def _sha1(text):
    return hashlib.sha1(text.encode()).hexdigest()  # cached: a few distinct texts serve thousands of games


class Game:
    """One game, parsed once and never changed. `names` holds objects first, then receptacles, each in id order."""

    __slots__ = ("id", "path", "task", "task_type", "scene", "walkthrough", "names", "index", "n_objects", "location", "receptacles_at",
                 "start_contents", "start_at", "start_cool", "flags", "can_contain", "inner", "blades", "goal_objects",
                 "goal_receptacles", "lamps", "intro", "counts", "_listings", "_here")

    @classmethod
    def load(cls, path):
        """Parse a `game.tw-pddl`. Raises GameError with one line that names the file."""
        path = Path(path)
        try:
            data = json.loads(path.read_bytes())
        except OSError as error:
            raise GameError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise GameError(f"{path}: not JSON ({error})") from None
        return cls.parse(data, str(path), path)

    @classmethod
    def parse(cls, data, name, path=None):
        """Build a game from the decoded JSON of a `game.tw-pddl`; `name` is its path, or `<task folder>/<trial>`."""
        try:
            return cls(data, name, path)
        except KeyError as error:
            raise GameError(f"{name}: {error} is missing") from None
        except GameError as error:
            raise GameError(f"{name}: {error}") from None

    def __init__(self, data, name, path=None):
        if not isinstance(data, dict):
            raise GameError("not a JSON object")
        grammar, problem = data["grammar"], data["pddl_problem"]
        clean_at = DOMAINS.get(_sha1(data["pddl_domain"]))
        if clean_at is None:
            raise GameError("its pddl_domain is not that of alfworld 0.4")
        task = TASK.search(grammar)
        if task is None:
            raise GameError("its grammar names no task")
        start, end = task.span(1)
        if _sha1(grammar[:start] + grammar[end:]) not in GRAMMARS:
            old = " (it says `put X in/on Y`: written for alfworld before 0.4; download the data again)" * ("in/on {r}" in grammar)
            raise GameError("its grammar is not that of alfworld 0.4" + old)
        self.path = path
        self.task = json.loads(f'"{task[1]}"')
        self.walkthrough = tuple(data.get("walkthrough") or ())
        parts = Path(name).parts
        parts = parts[:-1] if parts[-1].endswith(".tw-pddl") else parts
        self.id = "/".join(parts[-2:])
        scene = re.search(r"-(\d+)$", parts[-2] if len(parts) > 1 else parts[-1])
        self.scene = int(scene[1]) if scene else -1
        problem = problem.lower()
        init, goal = problem.find("(:init"), problem.find("(:goal")
        if init < 0 or goal < init:
            raise GameError("its pddl_problem lacks (:init …) or (:goal …)")
        facts = {}  # predicate -> [(argument, argument or "")]
        for predicate, a, b in FACT.findall(problem, init, goal):
            facts.setdefault(predicate, []).append((a, b))
        if not facts:
            raise GameError("its (:init …) is empty")
        try:
            self._build(facts, clean_at)
            self._parse_goal(problem[goal:], facts)
        except (KeyError, ValueError, IndexError) as error:
            raise GameError(f"its facts are inconsistent ({type(error).__name__}: {error})") from None
        listing = _join(["a " + self.names[r] for r in range(self.n_objects, len(self.names)) if self.location[r] >= 0])
        self.intro = ("-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
                      f"you see {listing}.\n\nYour task is to: {self.task}")

    def _build(self, facts, clean_at):
        """Number the entities as alfworld does and turn the facts into bit sets."""
        get = lambda predicate: facts.get(predicate, ())
        object_type, receptacle_type = dict(get("objecttype")), dict(get("receptacletype"))
        objects, receptacles = sorted(object_type), sorted(receptacle_type)
        entities = {x for pairs in facts.values() for pair in pairs for x in pair if "_bar_" in x}
        bases = {x: x.split("_bar_", 1)[0] + "basin" * ("basin" in x) for x in sorted(entities)}
        counts = {}
        for base in bases.values():
            counts[base] = counts.get(base, 0) + 1
        left, name = dict(counts), {}
        for x, base in bases.items():  # the n instances of a base name are numbered n, n-1, ..., 1 in id order
            name[x] = intern(f"{base} {left[base]}")
            left[base] -= 1
        self.counts = {intern(b): n for b, n in counts.items() if b != "loc"}
        number = {x: i for i, x in enumerate(objects + receptacles)}
        self.names = tuple(name[x] for x in number)
        self.index = {n: i for i, n in enumerate(self.names)}
        self.n_objects = n = len(objects)
        place = {x: i for i, x in enumerate(sorted({l for _, l in facts["receptacleatlocation"]} | {l for _, l in get("objectatlocation")}))}
        where = dict(facts["receptacleatlocation"])
        # location[i] of receptacle i (objects and unplaced receptacles: -1)
        self.location = tuple(place[where[x]] if x in where else -1 for x in number)
        self.receptacles_at = tuple(tuple(i for i in range(n, len(number)) if self.location[i] == l) for l in range(len(place)))
        contents = [0] * len(receptacles)
        for o, r in get("inreceptacle"):
            contents[number[r] - n] |= 1 << number[o]
        self.start_contents = tuple(contents)
        at = [0] * len(place)
        for o, l in get("objectatlocation"):
            at[place[l]] |= 1 << number[o]
        self.start_at = tuple(at)
        bits = lambda predicate: sum({1 << number[a] for a, _ in get(predicate) if a in number})
        self.flags = {p: bits(p) for p in ("pickupable", "cleanable", "heatable", "coolable", "toggleable", "sliceable", "isreceptacleobject")}
        self.flags["openable"] = bits("openable")  # bits of receptacles, counted on behind the objects
        self.flags["place"] = {p: sum(1 << number[r] for r in receptacles if receptacle_type[r] in types) for p, types in (
            ("clean", clean_at), ("heat", ("microwavetype",)), ("cool", ("fridgetype",)))}
        self.start_cool = bits("iscool")
        for predicate in ("opened", "holds", "ishot", "isclean", "issliced", "istoggled", "not_inreceptacle"):
            if predicate in facts:
                raise GameError(f"a game that starts with ({predicate} …) is not supported")
        self.inner = {}
        for o, outer in get("inreceptacleobject"):
            if o != outer:
                self.inner[number[outer]] = self.inner.get(number[outer], 0) | 1 << number[o]
        self.blades = sum(1 << number[o] for o in objects if object_type[o] in ("knifetype", "butterknifetype"))
        type_of, holds = {}, {}
        for o in objects:
            type_of[object_type[o]] = type_of.get(object_type[o], 0) | 1 << number[o]
        for r_type, o_type in get("cancontain"):
            holds[r_type] = holds.get(r_type, 0) | type_of.get(o_type, 0)
        self.can_contain = tuple(holds.get(receptacle_type[r], 0) for r in receptacles)
        self._listings, self._here = {}, {}

    def _parse_goal(self, goal, facts):
        form = " ".join(re.findall(r"\((\w+|=) \?", goal))
        form = re.sub(r"\b(?:and|exists|not) ?", "", form)
        if form not in GOALS:
            raise GameError(f"its goal is none of ALFWorld's six ({form or 'empty'})")
        self.task_type = GOALS[form]
        types = re.findall(r" (\w+type)\)", goal)
        of = lambda predicate, t: sum({1 << i for i in self._numbers(facts, predicate, t)})
        if self.task_type == "look_at_obj_in_light":
            self.lamps = of("objecttype", types[0]) & self.flags["toggleable"]
            self.goal_objects, self.goal_receptacles = of("objecttype", types[1]), ()
            return
        self.lamps = 0
        self.goal_objects = of("objecttype", types[0])
        self.goal_receptacles = tuple(i - self.n_objects for i in self._numbers(facts, "receptacletype", types[1]))
        needed = {"pick_clean": "cleanable", "pick_heat_": "heatable", "pick_cool_": "coolable"}.get(self.task_type[:10])
        if needed:
            self.goal_objects &= self.flags[needed]

    def _numbers(self, facts, predicate, type_):
        first = 0 if predicate == "objecttype" else self.n_objects
        return [first + i for i, (_, t) in enumerate(sorted(facts[predicate])) if t == type_]

    def listing(self, objects):
        """Bit set of objects -> "a mug 2, and a mug 1" (or "nothing")."""
        text = self._listings.get(objects)
        if text is None:
            text = self._listings[objects] = _join(["a " + self.names[i] for i in _bits(objects)])
        return text

    def commands_here(self, location):
        """The commands that depend only on where the agent is, sorted (-1 is the middle of the room)."""
        commands = self._here.get(location)
        if commands is None:
            commands = ["help", "inventory", "look"]
            for r in range(self.n_objects, len(self.names)):
                if self.location[r] == location >= 0:
                    commands.append("examine " + self.names[r])
                elif self.location[r] >= 0:
                    commands.append("go to " + self.names[r])
            commands = self._here[location] = tuple(map(intern, sorted(commands)))
        return commands


def _bits(mask):
    """Numbers of the set bits, ascending."""
    numbers = []
    while mask:
        low = mask & -mask
        numbers.append(low.bit_length() - 1)
        mask ^= low
    return numbers


def _join(items):
    """TextWorld's list style: "X, and Y" even for two."""
    if len(items) < 2:
        return items[0] if items else "nothing"
    return ", ".join(items[:-1]) + ", and " + items[-1]


class Info(dict):
    """What a step reports besides the observation: `won`, and `admissible_commands`, computed when first asked for."""

    __slots__ = ("env", "moment")

    def __missing__(self, key):
        if key != "admissible_commands":
            raise KeyError(key)
        if self.env.moment != self.moment:
            raise RuntimeError("the world has moved on: ask for admissible_commands before the next step, reset or restore")
        self[key] = commands = self.env.admissible_commands()
        return commands


class AlfworldEnv:
    """The world, with gymnasium's signature. An episode is cut after `max_steps` actions; stepping on is allowed, as in stock."""

    def __init__(self, max_steps=50):
        self.max_steps = max_steps
        self.moment = 0

    def reset(self, game):
        """-> (observation, info). Costs no parsing."""
        self.game = game
        self.steps = 0
        self.here = -1  # the agent's location; -1: the middle of the room
        self.held = -1  # the object in hand, or -1
        self.opened = self.hot = self.clean = self.sliced = self.toggled = 0
        self.cool = game.start_cool
        self.contents = list(game.start_contents)  # per receptacle: what is in or on it
        self.at = list(game.start_at)  # per location: what the engine believes to be there
        self.taken = {}  # receptacle -> what was taken from it and not put back
        self.won = False
        return game.intro, self._info()

    def snapshot(self):
        """The whole state, to `restore` later; some microseconds."""
        return (self.game, self.steps, self.here, self.held, self.opened, self.hot, self.cool, self.clean, self.sliced,
                self.toggled, self.won, self.contents.copy(), self.at.copy(), self.taken.copy())

    def restore(self, snapshot):
        """Go back to a snapshot (which stays valid)."""
        (self.game, self.steps, self.here, self.held, self.opened, self.hot, self.cool, self.clean, self.sliced,
         self.toggled, self.won, contents, at, taken) = snapshot
        self.contents, self.at, self.taken = contents.copy(), at.copy(), taken.copy()
        self.moment += 1

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info). An inadmissible action says so and changes nothing."""
        verb, _, rest = action.strip().partition(" ")
        act = self.VERBS.get(verb)
        observation = act(self, rest) if act else None
        if observation is None:
            observation = NOTHING_HAPPENS
        else:
            self.won = self._is_won()
        self.steps += 1
        return observation, float(self.won), self.won, not self.won and self.steps >= self.max_steps, self._info()

    def _info(self):
        self.moment += 1
        info = Info(won=self.won)
        info.env, info.moment = self, self.moment
        return info

    def _is_won(self):
        game = self.game
        if game.lamps:  # the type in hand, where a lamp that was switched on stands
            if self.held < 0 or not game.goal_objects >> self.held & 1:
                return False
            lit = game.lamps & self.toggled
            return any(self.contents[r - game.n_objects] & lit for r in game.receptacles_at[self.here]) if self.here >= 0 else False
        goal = game.goal_objects & {"pick_clean": self.clean, "pick_heat_": self.hot, "pick_cool_": self.cool}.get(game.task_type[:10], -1)
        needed = 2 if game.task_type == "pick_two_obj_and_place" else 1
        return any((self.contents[r] & goal).bit_count() >= needed for r in game.goal_receptacles)

    # --- what a command needs ---------------------------------------------------------------------------------------

    def _receptacle(self, name):
        """Number of the receptacle of that name if it is at the agent's location, else -1."""
        r = self.game.index.get(name, -1)
        return r if r >= self.game.n_objects and self.game.location[r] == self.here >= 0 else -1

    def _is_shut(self, r):
        return self.game.flags["openable"] >> r & 1 and not self.opened >> r & 1

    def _object_and_receptacle(self, rest, word):
        """"X <word> Y" -> numbers of the object X and of the receptacle Y here, or (-1, -1)."""
        first, _, second = rest.partition(word)
        o, r = self.game.index.get(first, -1), self._receptacle(second)
        return (o, r) if 0 <= o < self.game.n_objects and r >= 0 else (-1, -1)

    # --- the commands: each returns the feedback, or None where it is not admissible ----------------------------------

    def _look(self, rest):
        if rest:
            return None
        game = self.game
        if self.here < 0:
            return game.intro.split("\n\n")[1]
        receptacles = game.receptacles_at[self.here]
        if not receptacles:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        facing = _join([game.names[r] for r in receptacles])
        beside = ["a " + game.names[o] for o in _bits(self.at[self.here]) for r in receptacles if self.taken.get(r, 0) >> o & 1]
        return f"You are facing the {facing}. Next to it, you see {_join(beside)}."

    def _inventory(self, rest):
        if rest:
            return None
        return f"You are carrying: a {self.game.names[self.held]}." if self.held >= 0 else "You are not carrying anything."

    def _help(self, rest):
        return None if rest else HELP

    def _goto(self, rest):
        to, _, name = rest.partition(" ")
        game = self.game
        r = game.index.get(name, -1)
        if to != "to" or r < game.n_objects or game.location[r] < 0 or game.location[r] == self.here:
            return None
        self.here = game.location[r]
        return f"You arrive at {name}. {self._describe(r)}"

    def _describe(self, r):
        game = self.game
        listing = game.listing(self.contents[r - game.n_objects])
        if not game.flags["openable"] >> r & 1:
            return f"On the {game.names[r]}, you see {listing}."
        if self.opened >> r & 1:
            return f"The {game.names[r]} is open. In it, you see {listing}."
        return f"The {game.names[r]} is closed."

    def _open(self, rest):
        r = self._receptacle(rest)
        if r < 0 or not self._is_shut(r):
            return None
        self.opened |= 1 << r
        return f"You open the {rest}. {self._describe(r)}"

    def _close(self, rest):
        r = self._receptacle(rest)
        if r < 0 or not self.opened >> r & 1:
            return None
        self.opened ^= 1 << r
        return f"You close the {rest}."

    def _take(self, rest):
        o, r = self._object_and_receptacle(rest, " from ")
        slot = r - self.game.n_objects
        if o < 0 or self.held >= 0 or self._is_shut(r) or not (self.contents[slot] & self.game.flags["pickupable"]) >> o & 1:
            return None
        self.held = o
        self.contents[slot] &= ~(1 << o)
        self.at[self.here] &= ~(1 << o)
        self.taken[r] = self.taken.get(r, 0) | 1 << o
        return f"You pick up the {self.game.names[o]} from the {self.game.names[r]}."

    def _move(self, rest):
        o, r = self._object_and_receptacle(rest, " to ")
        slot = r - self.game.n_objects
        if o < 0 or o != self.held or self._is_shut(r) or not self.game.can_contain[slot] >> o & 1:
            return None
        self.held = -1
        self.contents[slot] |= 1 << o
        self.at[self.here] |= 1 << o
        if r in self.taken:
            self.taken[r] &= ~(1 << o)
        return f"You move the {self.game.names[o]} to the {self.game.names[r]}."

    def _treat(self, rest, verb, flag):
        o, r = self._object_and_receptacle(rest, " with ")
        if o < 0 or o != self.held or not self.game.flags[flag] >> o & 1 or not self.game.flags["place"][verb] >> r & 1:
            return None
        if verb == "clean":
            self.clean |= 1 << o
        elif verb == "heat":
            self.hot, self.cool = self.hot | 1 << o, self.cool & ~(1 << o)
        else:
            self.cool, self.hot = self.cool | 1 << o, self.hot & ~(1 << o)
        return f"You {verb} the {self.game.names[o]} using the {self.game.names[r]}."

    def _slice(self, rest):
        first, _, second = rest.partition(" with ")
        o, knife = self.game.index.get(first, -1), self.game.index.get(second, -1)
        if knife < 0 or knife != self.held or not self._is_sliceable(o):
            return None
        self.sliced |= 1 << o
        return f"You sliced the {first} with the {second}."

    def _is_sliceable(self, o):
        game = self.game
        return (self.here >= 0 and self.held >= 0 and game.blades >> self.held & 1 and 0 <= o < game.n_objects
                and game.flags["sliceable"] & self.at[self.here] & 1 << o)

    def _use(self, rest):
        o = self.game.index.get(rest, -1)
        if o not in self._usable():
            return None
        self.toggled |= 1 << o
        return f"You turn on the {rest}."

    def _usable(self):
        if self.here < 0:
            return ()
        here = 0
        for r in self.game.receptacles_at[self.here]:
            here |= self.contents[r - self.game.n_objects]
        return _bits(here & self.game.flags["toggleable"])

    def _examine(self, rest):
        game, o = self.game, self.game.index.get(rest, -1)
        if o >= game.n_objects:
            return self._describe(o) if game.location[o] == self.here >= 0 else None
        if o < 0 or o != self.held:
            return None
        if game.flags["isreceptacleobject"] >> o & 1:
            return f"This is a normal {rest}. In it, you see {game.listing(game.inner.get(o, 0))}."
        hot, cool, clean, cut = (x >> o & 1 for x in (self.hot, self.cool, self.clean, self.sliced))
        sliced = "sliced " if cut else ""
        if clean and (hot or cool):
            return f"This is a {'hot' if hot else 'cool'} and clean {sliced}{rest}."
        if cut and (clean or hot or cool):
            return f"This is a {'clean' if clean else 'hot' if hot else 'cool'} sliced {rest}."
        if hot or clean or cool:
            return f"This is a {'hot' if hot else 'clean' if clean else 'cold'} {rest}."
        if game.flags["toggleable"] >> o & 1:
            return f"This {rest} is {'on' if self.toggled >> o & 1 else 'off'}."
        return f"This is a sliced {rest}." if cut else f"There's nothing special about {rest}."

    VERBS = {"look": _look, "inventory": _inventory, "help": _help, "go": _goto, "open": _open, "close": _close,
             "take": _take, "move": _move, "slice": _slice, "use": _use, "examine": _examine,
             "clean": lambda self, rest: self._treat(rest, "clean", "cleanable"),
             "heat": lambda self, rest: self._treat(rest, "heat", "heatable"),
             "cool": lambda self, rest: self._treat(rest, "cool", "coolable")}

    def admissible_commands(self):
        """Every command that changes or tells something here and now, sorted, each once."""
        game, names, held = self.game, self.game.names, self.held
        commands = list(game.commands_here(self.here))
        if held >= 0:
            commands.append("examine " + names[held])
        for r in game.receptacles_at[self.here] if self.here >= 0 else ():
            name, slot = names[r], r - game.n_objects
            if game.flags["openable"] >> r & 1:
                commands.append(("close " if self.opened >> r & 1 else "open ") + name)
            if not self._is_shut(r):
                if held < 0:
                    commands += [f"take {names[o]} from {name}" for o in _bits(self.contents[slot] & game.flags["pickupable"])]
                elif game.can_contain[slot] >> held & 1:
                    commands.append(f"move {names[held]} to {name}")
            if held >= 0:
                commands += [f"{verb} {names[held]} with {name}" for verb, places in game.flags["place"].items()
                             if places >> r & 1 and game.flags[verb + "able"] >> held & 1]
        commands += ["use " + names[o] for o in self._usable()]
        if held >= 0 and game.blades >> held & 1 and self.here >= 0:
            commands += [f"slice {names[o]} with {names[held]}" for o in _bits(game.flags["sliceable"] & self.at[self.here])]
        commands.sort()
        return commands
