"""A demonstrator that reads only what a player reads, and searches receptacles by how likely they hold the wanted object.

    python expert.py --data DIR --split valid_seen --max-steps 30 --mistakes 0.2

It keeps beliefs (where it is, what it holds, what it last saw where) and plans anew from them at every step, so it goes on from
whatever was played before: its own mistakes, or another policy's actions.

It exists to be imitated by a small model that sees the transcript alone. So what it does is a function of the transcript, and as systematic as could
be: for each wanted object a fixed order of receptacle types, within a type the order of the first observation, on from where it was last (so that a
detour changes nothing), and of several wanted objects in view the first. It ignores the list of admissible commands, for a policy that does not see
it could not tell why. What no transcript explains (`order_noise`) is off unless asked for.
"""

import re
import time
from collections import Counter
from functools import lru_cache
from math import exp
from typing import NamedTuple

import numpy as np

from .engine import NOTHING_HAPPENS

# --- reading ----------------------------------------------------------------------------------------------------------

TASKS = [(kind, re.compile(template)) for kind, template in (  # every task sentence of ALFWorld's six task types
    ("look", r"look at (\w+) under the (\w+)"), ("look", r"examine the (\w+) with the (\w+)"),
    ("clean", r"put a clean (\w+) in (\w+)"), ("clean", r"clean some (\w+) and put it in (\w+)"),
    ("heat", r"put a hot (\w+) in (\w+)"), ("heat", r"heat some (\w+) and put it in (\w+)"),
    ("cool", r"put a cool (\w+) in (\w+)"), ("cool", r"cool some (\w+) and put it in (\w+)"),
    ("two", r"put two (\w+) in (\w+)"), ("two", r"find two (\w+) and put them in (\w+)"),
    ("put", r"put a (\w+) in (\w+)"), ("put", r"put some (\w+) on (\w+)"))]
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
OPENABLE = ("cabinet", "drawer", "fridge", "microwave", "safe")  # that is, most of them
NAME = re.compile(r"\w+ \d+")
VIEW = re.compile(r"(?:On the|The) (\w+ \d+)(?:, you see (.*)| is (open)\. In it, you see (.*)| is (closed))\.$")


class Task(NamedTuple):
    kind: str  # put, clean, heat, cool, two or look
    object: str
    place: str  # where to put it; for look: the lamp


@lru_cache(maxsize=None)  # every telling of a demonstration asks for the tasks of all games
def parse_task(sentence):
    """"put a clean mug in desk." -> Task("clean", "mug", "desk"). Raises ValueError for what is no task of ALFWorld."""
    for kind, template in TASKS:
        match = template.fullmatch(sentence.strip().rstrip("."))
        if match:
            return Task(kind, *match.groups())
    raise ValueError(f"not a task of ALFWorld: {sentence!r}")


@lru_cache(1 << 16)
def names(text):
    """"a mug 2, and a mug 1" -> ("mug 2", "mug 1"), cached: games and episodes repeat their texts."""
    return tuple(NAME.findall(text))


def base(name):
    """"mug 2" -> "mug"."""
    return name.partition(" ")[0]


# --- the prior --------------------------------------------------------------------------------------------------------

def fit_prior(games):
    """{object: {receptacle: how many such objects one such receptacle holds at the start, on average}}.

    The average is over the games in which the object occurs: a task asks for what is there, so to look for a soapbar is to be in
    a bathroom. Plain data: write it as JSON.
    """
    found, searched = Counter(), Counter()
    for game in games:
        receptacles = [base(name) for name in game.names[game.n_objects:]]
        contents = [[base(name) for name in names(game.listing(objects))] for objects in game.start_contents]
        for receptacle, things in zip(receptacles, contents):
            found.update((thing, receptacle) for thing in things)
        searched.update((thing, receptacle) for thing in set().union(*contents) for receptacle in receptacles)
    prior = {}
    for (thing, receptacle), n in sorted(found.items()):
        prior.setdefault(thing, {})[receptacle] = round(n / searched[thing, receptacle], 4)
    return prior


# --- the expert -------------------------------------------------------------------------------------------------------

class Expert:
    """Call `reset`, then `act` with each observation; `observe` tells it of actions that it did not choose.

    `order_noise` is the standard deviation, in log units, of a disturbance of its ranking of receptacle types, drawn anew each
    episode: 0.5 swaps neighbours now and then. `first`: a receptacle type to look at before all others. An empty prior makes a
    searcher that goes through the room as listed.
    """

    def __init__(self, prior, rng=None, order_noise=0.0, first=None):
        self.first = first
        self.prior = prior
        self.rng = rng or np.random.default_rng(0)
        self.order_noise = order_noise

    def reset(self, task, observation):
        """Begin an episode: the task sentence and the first observation."""
        self.task = parse_task(task)
        self.rooms = names(observation.partition("Your task is to:")[0])  # all receptacles, as listed
        self.unseen = set(self.rooms)  # receptacles whose contents were never seen
        self.last_of = {}  # kind of receptacle -> the one of them gone to last
        self.contents = {}  # receptacle -> what it is believed to hold
        self.is_open = {}  # receptacle -> bool, where that was said
        self.place = {}  # receptacle -> its location, known by the first receptacle met there: several can share one
        self.here = ""  # where the player stands, in the same terms; "" is the middle of the room
        self.held = None
        self.origin = None  # where the held object was taken from
        self.ready = set()  # objects that are clean, hot or cool as the task wants them
        self.refused = set()  # (object, receptacle) base names that do not go together
        self.orders = {}
        self.chosen = None  # the action proposed and not yet answered

    def act(self, observation=None):
        """-> the next command. `observation` answers the command given before."""
        if self.chosen is not None:
            self.observe(self.chosen, observation)
        self.chosen = self._plan()
        return self.chosen

    def observe(self, action, observation):
        """Take in an action, whoever chose it, and what the world answered."""
        self.chosen = None
        action = action.strip()
        verb, *words = action.split(" ")
        first, last = " ".join(words[:2]), " ".join(words[-2:])  # "take mug 1 from desk 2" -> "mug 1", "desk 2"
        if observation == NOTHING_HAPPENS:
            if action == f"go to {last}" and last in self.rooms:  # one cannot go to where one is
                self.place[last] = self.here
            elif action == f"open {last}" and self._is_here(last) and last not in self.is_open:
                self.is_open[last] = True  # or it has no door
            elif action == f"move {self.held} to {last}" and self._reach(last) is None:
                self.refused.add((base(self.held), base(last)))
            return
        if verb == "go":
            self.here = self.place.setdefault(last, last)
            self.last_of[base(last)] = last
        elif verb == "look" and self.here:
            self.place.update(dict.fromkeys(names(observation.partition(".")[0]), self.here))
        elif last in self.rooms:  # what can be handled is within reach
            self.place[last] = self.here
        if verb == "take":
            self.held, self.origin = first, last
            if first in self.contents.get(last, ()):
                self.contents[last].remove(first)
        elif verb == "move":
            self.held = None
            things = self.contents.setdefault(last, [])
            things += [first] * (first not in things)  # some objects are listed in several receptacles
        elif verb == "close":
            self.is_open[last] = False
        elif verb in TOOLS and verb == self.task.kind:
            self.ready.add(first)
        elif {verb, self.task.kind} == {"heat", "cool"}:
            self.ready.discard(first)
        view = VIEW.search(observation)
        if view:
            name, on, opened, inside, closed = view.groups()
            if opened or closed:
                self.is_open[name] = bool(opened)
            if not closed:
                self.contents[name] = list(names(on or inside))
                self.unseen.discard(name)

    def _is_here(self, receptacle):
        return self.place.get(receptacle) == self.here

    def _plan(self):
        """The next command towards the goal, from beliefs alone."""
        kind, wanted, place = self.task
        if self.held is None:
            return self._fetch(wanted)
        if base(self.held) != wanted:  # the wrong thing in hand goes back to where it was, or to where its like are found
            fits = (r for r in (self.origin, *self._order(base(self.held))) if (base(self.held), base(r)) not in self.refused)
            receptacle = next(fits, self.origin)
            return self._reach(receptacle) or f"move {self.held} to {receptacle}"
        if kind == "look":
            lamps = self._seen(place)
            if not lamps:
                return self._search(place)
            lamp, receptacle = min(lamps, key=lambda found: not self._is_here(found[1]))
            return f"use {lamp}" if self._is_here(receptacle) else f"go to {receptacle}"
        if kind in TOOLS and self.held not in self.ready:
            tool = min((r for r in self.rooms if base(r) == TOOLS[kind]), key=lambda r: not self._is_here(r))
            return f"{kind} {self.held} with {tool}" if self._is_here(tool) else f"go to {tool}"
        target = self._target()
        return self._reach(target) or f"move {self.held} to {target}"

    def _fetch(self, wanted):
        """Take a wanted object that was seen (one already treated first, then one within reach), or search for one."""
        found = self._seen(wanted)
        if self.task.kind == "two":  # both have to end up in one receptacle
            there = self.contents.get(self._target(), ())
            found = [(thing, r) for thing, r in found if thing not in there]
        if not found:
            return self._search(wanted)
        thing, receptacle = min(found, key=lambda found: (found[0] not in self.ready, not self._is_here(found[1])))
        return self._reach(receptacle) or f"take {thing} from {receptacle}"

    def _seen(self, word):
        """[(object, receptacle)] of the objects called `word`, in the order in which they were seen."""
        word += " "
        return [(thing, receptacle) for receptacle, things in self.contents.items() for thing in things if thing.startswith(word)]

    def _target(self):
        """The receptacle to fill: where the first of two already is, else one within reach, else an open one, else the first."""
        first = Counter(r for _, r in self._seen(self.task.object)) if self.task.kind == "two" else {}
        targets = [r for r in self.rooms if base(r) == self.task.place]
        return max(targets, key=lambda r: (first.get(r, 0), self._is_here(r), self.is_open.get(r, False)))

    def _reach(self, receptacle):
        """The command on the way to put something there or take it out, or None if that can be done now."""
        if not self._is_here(receptacle):
            return f"go to {receptacle}"
        looks_open = receptacle not in self.unseen or base(receptacle) not in OPENABLE  # where it was not said
        return None if self.is_open.get(receptacle, looks_open) else f"open {receptacle}"

    def _search(self, word):
        """Look into the likeliest kind of receptacle not yet seen, as listed, on from the one of them gone to last."""
        if not self.unseen:  # beliefs must be wrong somewhere: look again
            self.unseen = set(self.rooms)
        left = [r for r in self._order(word) if r in self.unseen]
        left = [r for r in left if base(r) == base(left[0])]
        last = self.last_of.get(base(left[0]), left[0])
        receptacle = next((r for r in left if self.rooms.index(r) >= self.rooms.index(last)), left[0])
        return self._reach(receptacle) or f"examine {receptacle}"

    def _order(self, word):
        """All receptacles, by the number of objects called `word` to be found in each per action spent on looking."""
        if word not in self.orders:
            likely, score = self.prior.get(word, {}), {}
            for kind in dict.fromkeys(map(base, self.rooms)):
                score[kind] = likely.get(kind, 0) / (2 if kind in OPENABLE else 1)
                if self.order_noise:
                    score[kind] *= exp(self.rng.normal(0, self.order_noise))
            if word == self.task.object:  # games begin with nothing done: no wanted object where it is to be treated, or to be put
                score[TOOLS.get(self.task.kind, self.task.place)] = -1
            if self.first in score:
                score[self.first] = float("inf")
            self.orders[word] = sorted(self.rooms, key=lambda r: -score[base(r)])
        return self.orders[word]


# --- demonstrations ---------------------------------------------------------------------------------------------------

BURST = 0.3  # the chance that a mistake is followed by another one


class Step(NamedTuple):
    action: str
    observation: str  # the answer
    trained: bool  # False: a mistake, shown but not to be imitated


class Demonstration(NamedTuple):
    task: str
    observation: str  # the first one
    steps: list
    won: bool


def demonstrate(env, game, expert, rng, mistakes=0.0, max_steps=30, noise=0.0):
    """Play a whole episode, cut after `max_steps` actions.

    With probability `mistakes` a mistake is played instead of the expert's action, perhaps with more behind it. The expert
    goes on from what it has seen by then, which shows the recovery. With probability `noise` any admissible action is played, as if
    it were the expert's own: a poor demonstrator. `rng` is a numpy Generator.
    """
    first, info = env.reset(game)
    expert.reset(game.task, first)
    steps, won, wrong = [], False, None  # wrong: the mistake just made
    while not won and len(steps) < max_steps:
        action = expert.act()
        if mistakes and rng.random() < (BURST if wrong else mistakes):
            action = wrong = mistake(expert, action, wrong or action, rng)
        else:
            wrong = None
            if noise and rng.random() < noise:
                action = str(rng.choice(info["admissible_commands"]))
        observation, _, won, _, info = env.step(action)
        expert.observe(action, observation)
        steps.append(Step(action, observation, wrong is None))
    return Demonstration(game.task, first, steps, won)


def mistake(expert, right, before, rng):
    """A command other than the `right` one, such as a learner might give: many kinds, equally often.

    `before` is the mistake just made, if any: a learner tries again what failed, or tries it with another number.
    """
    pick = lambda things: things[int(rng.random() * len(things))]  # ten times as fast as rng.choice
    number = lambda command: re.sub(r"\d+", lambda _: pick("123456789"), command, count=pick((0, 1)))  # one number or all (0)
    task, rooms = expert.task, expert.rooms
    near = pick([r for r in rooms if expert._is_here(r)] or rooms)
    far = pick(rooms)
    onward = next((r for r in expert._order(task.object) if r in expert.unseen), far)  # on, past what is wanted
    wanted = f"{task.object} {pick('1234')}"
    hand = expert.held or wanted
    thing = pick(expert.contents.get(near) or [wanted])
    tool = TOOLS.get(task.kind, task.place) + " 1"
    return pick([command for command in (
        before, number(before), number(right),
        f"go to {near}", f"go to {far}", f"go to {onward}",
        f"take {wanted} from {near}", f"take {wanted} from {far}", f"take {thing} from {near}",
        f"move {hand} to {near}", f"move {hand} to {far}",
        f"open {near}", f"close {near}", f"examine {near}", f"examine {hand}", pick(("look", "inventory")),
        f"use {tool}" if task.kind == "look" else f"{pick(tuple(TOOLS))} {hand} with {tool}",
    ) if command != right])
