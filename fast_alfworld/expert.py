"""A scripted expert that reads only the observations and the admissible commands.

    python -m fast_alfworld expert --split valid_seen --max-steps 30

It searches the receptacles in the order of how likely they hold the wanted object (`fit_prior`). It
keeps beliefs (what it holds, what it last saw where) and plans anew from them at every step, so it
can go on after actions that it did not choose.

Small models are trained to imitate it. Hence its actions are a deterministic function of the
transcript and the admissible commands, and as regular as possible: for each wanted object a fixed
order of receptacle types, within a type the order of the first observation, and of several wanted
objects in view the first.
"""

import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from .engine import NOTHING_HAPPENS
from .gamefile import DataError

TASKS = [(kind, re.compile(template)) for kind, template in (  # all task sentences of ALFWorld
    ("look", r"look at (\w+) under the (\w+)"), ("look", r"examine the (\w+) with the (\w+)"),
    ("clean", r"put a clean (\w+) in (\w+)"), ("clean", r"clean some (\w+) and put it in (\w+)"),
    ("heat", r"put a hot (\w+) in (\w+)"), ("heat", r"heat some (\w+) and put it in (\w+)"),
    ("cool", r"put a cool (\w+) in (\w+)"), ("cool", r"cool some (\w+) and put it in (\w+)"),
    ("two", r"put two (\w+) in (\w+)"), ("two", r"find two (\w+) and put them in (\w+)"),
    ("put", r"put a (\w+) in (\w+)"), ("put", r"put some (\w+) on (\w+)"))]
TOOLS = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
OPENABLE = ("cabinet", "drawer", "fridge", "microwave", "safe")  # types that mostly have a door
NAME = re.compile(r"\w+ \d+")
VIEW = re.compile(r"(?:On the|The) (\w+ \d+)"
                  r"(?:, you see (.*)| is (open)\. In it, you see (.*)| is (closed))\.$")
TRIES = 100  # at most so many plans are made for one action


class Task(NamedTuple):
    kind: str  # put, clean, heat, cool, two or look
    object: str
    place: str  # the receptacle type to put it in or on; for look: the lamp


@lru_cache(maxsize=None)
def parse_task(sentence):
    """"put a clean mug in desk." -> Task("clean", "mug", "desk").

    Raises DataError for a sentence that is not a task of ALFWorld.
    """
    for kind, template in TASKS:
        match = template.fullmatch(sentence.strip().rstrip("."))
        if match:
            return Task(kind, *match.groups())
    raise DataError(f"not a task of ALFWorld: {sentence[:80]!r}")


@lru_cache(1 << 16)  # games and episodes repeat their texts
def names(text):
    """"a mug 2, and a mug 1" -> ("mug 2", "mug 1")."""
    return tuple(NAME.findall(text))


def base(name):
    """"mug 2" -> "mug"."""
    return name.partition(" ")[0]


def fit_prior(games):
    """{object: {receptacle: mean number of such objects in one such receptacle at the start}}.

    Objects and receptacles are base names ("mug", "desk"). The mean is over the games in which the
    object occurs, because a task only asks for objects that are there. The result can be written as
    JSON.
    """
    found, searched = Counter(), Counter()
    for game in games:
        receptacles = [base(name) for name in game.room.names]
        contents = [[base(name) for name in names(game.listing(objects))]
                    for objects in game.start_contents]
        for receptacle, things in zip(receptacles, contents):
            found.update((thing, receptacle) for thing in things)
        searched.update((thing, receptacle)
                        for thing in set().union(*contents) for receptacle in receptacles)
    prior = {}
    for (thing, receptacle), n in sorted(found.items()):
        prior.setdefault(thing, {})[receptacle] = round(n / searched[thing, receptacle], 4)
    return prior


class Expert:
    """Call `reset`, then in turn `act` and `observe`; `observe` also takes actions of others.

    prior: the result of `fit_prior`; with an empty dict it searches the room as listed.
    first: a receptacle type ("desk") to search before all others, or None.
    """

    def __init__(self, prior, first=None):
        self.prior = prior
        self.first = first

    def reset(self, task, observation):
        """Begin an episode: the task sentence and the first observation."""
        self.task = parse_task(task)
        self.receptacles = names(observation.partition("Your task is to:")[0])  # as listed
        self.unseen = set(self.receptacles)  # those whose contents were never seen
        self.last_of = {}  # receptacle type -> the receptacle of that type visited last
        self.contents = {}  # receptacle -> list of the objects believed to be in or on it
        self.is_open = {}  # receptacle -> bool, where an observation said so
        self.here = ()  # the receptacles at the agent's location, which several can share
        self.held = None
        self.origin = None  # the receptacle from which the held object was taken
        self.ready = set()  # objects that are clean, hot or cool, as the task wants them
        self.refused = set()  # pairs of base names: objects that do not fit into receptacles
        self.orders = {}  # the results of _order

    def act(self, admissible):
        """The next command, one of `admissible` (a sequence of str).

        Where a planned command is not admissible, the beliefs are updated as if the world had
        answered "Nothing happens.", and the expert plans again without spending a step. If that
        changes nothing, it returns the first admissible command.
        """
        # A receptacle can be examined exactly where the agent is.
        self.here = [r for r in self.receptacles if f"examine {r}" in admissible]
        previous = None
        for _ in range(TRIES):
            command = self._plan()
            if command in admissible:
                return command
            if command == previous:  # no belief has changed, so no other plan will be found
                break
            previous = command
            self.observe(command, NOTHING_HAPPENS)
        return admissible[0]

    def observe(self, action, observation):
        """Update the beliefs by an action, whoever chose it, and the answer to it."""
        action = action.strip()
        verb, *words = action.split(" ")
        # "take mug 1 from desk 2" -> "mug 1", "desk 2"
        first, last = " ".join(words[:2]), " ".join(words[-2:])
        if observation == NOTHING_HAPPENS:
            if action == f"open {last}" and last in self.here and last not in self.is_open:
                self.is_open[last] = True  # or it has no door
            elif action == f"move {self.held} to {last}" and self._reach(last) is None:
                self.refused.add((base(self.held), base(last)))
            return
        if verb == "go":
            self.last_of[base(last)] = last
        elif verb == "take":
            self.held, self.origin = first, last
            if first in self.contents.get(last, ()):
                self.contents[last].remove(first)
        elif verb == "move":
            self.held = None
            things = self.contents.setdefault(last, [])
            things += [first] * (first not in things)  # an object can be in several receptacles
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

    def _plan(self):
        """The next command towards the goal, from the beliefs alone."""
        kind, wanted, place = self.task
        if self.held is None:
            return self._fetch(wanted)
        if base(self.held) != wanted:
            return self._put_away()
        if kind == "look":
            lamps = self._seen(place)
            if not lamps:
                return self._search(place)
            lamp, receptacle = min(lamps, key=lambda found: found[1] not in self.here)
            return f"use {lamp}" if receptacle in self.here else f"go to {receptacle}"
        if kind in TOOLS and self.held not in self.ready:
            tools = [r for r in self.receptacles if base(r) == TOOLS[kind]]
            tool = min(tools, key=lambda r: r not in self.here)
            return f"{kind} {self.held} with {tool}" if tool in self.here else f"go to {tool}"
        target = self._target()
        return self._reach(target) or f"move {self.held} to {target}"

    def _fetch(self, wanted):
        """Take a wanted object that was seen (preferably treated or within reach) or search."""
        found = self._seen(wanted)
        if self.task.kind == "two":  # both must end up in the same receptacle
            there = self.contents.get(self._target(), ())
            found = [(thing, r) for thing, r in found if thing not in there]
        if not found:
            return self._search(wanted)
        thing, receptacle = min(
            found, key=lambda found: (found[0] not in self.ready, found[1] not in self.here))
        return self._reach(receptacle) or f"take {thing} from {receptacle}"

    def _put_away(self):
        """Put a held object that is not wanted back, or where such objects are usually found."""
        options = (self.origin, *self._order(base(self.held)))
        fits = (r for r in options if (base(self.held), base(r)) not in self.refused)
        receptacle = next(fits, self.origin)
        return self._reach(receptacle) or f"move {self.held} to {receptacle}"

    def _seen(self, word):
        """[(object, receptacle)] of the objects called `word`, in the order they were seen."""
        word += " "
        return [(thing, receptacle) for receptacle, things in self.contents.items()
                for thing in things if thing.startswith(word)]

    def _target(self):
        """The receptacle to fill: where the first of two is, else one within reach, else an open
        one, else the first.
        """
        first = {}
        if self.task.kind == "two":
            first = Counter(r for _, r in self._seen(self.task.object))
        targets = [r for r in self.receptacles if base(r) == self.task.place]
        return max(targets, key=lambda r: (first.get(r, 0), r in self.here,
                                           self.is_open.get(r, False)))

    def _reach(self, receptacle):
        """The command needed before an object can be put there or taken out, or None."""
        if receptacle not in self.here:
            return f"go to {receptacle}"
        # Where no observation said whether it is open:
        looks_open = receptacle not in self.unseen or base(receptacle) not in OPENABLE
        return None if self.is_open.get(receptacle, looks_open) else f"open {receptacle}"

    def _search(self, word):
        """Search the likeliest receptacle type not fully seen, onwards from the last one visited.

        Within a type the receptacles are searched in the order of the first observation.
        """
        if not self.unseen:  # some belief must be wrong: look everywhere again
            self.unseen = set(self.receptacles)
        left = [r for r in self._order(word) if r in self.unseen]
        left = [r for r in left if base(r) == base(left[0])]
        last = self.last_of.get(base(left[0]), left[0])
        after = (r for r in left if self.receptacles.index(r) >= self.receptacles.index(last))
        receptacle = next(after, left[0])
        return self._reach(receptacle) or f"examine {receptacle}"

    def _order(self, word):
        """All receptacles, by the expected number of objects called `word` per action to look."""
        if word not in self.orders:
            likely, score = self.prior.get(word, {}), {}
            for kind in dict.fromkeys(map(base, self.receptacles)):
                score[kind] = likely.get(kind, 0) / (2 if kind in OPENABLE else 1)
            if word == self.task.object:  # no wanted object is where it is to be treated or put
                score[TOOLS.get(self.task.kind, self.task.place)] = -1
            if self.first in score:
                score[self.first] = float("inf")
            self.orders[word] = sorted(self.receptacles, key=lambda r: -score[base(r)])
        return self.orders[word]


class Human:
    """A person at the terminal, with the methods of Expert; EOFError at `quit`."""

    def reset(self, task, observation):
        print("\n? lists the candidates, quit ends\n", observation, sep="\n")

    def act(self, admissible):
        while (action := input("> ").strip()) in ("?", ""):
            print(*admissible, sep="\n")
        if action in ("quit", "exit"):
            raise EOFError
        return action

    def observe(self, action, observation):
        print(observation)


class Step(NamedTuple):
    action: str
    observation: str  # the answer to the action
    trained: bool  # False: a mistake, to be masked from the loss


class Demonstration(NamedTuple):
    task: str
    observation: str  # the first one
    steps: list  # of Step
    won: bool


def demonstrate(env, game, expert, rng, mistakes=0.0, noise=0.0, max_steps=30):
    """Play an episode of at most `max_steps` actions -> Demonstration.

    With probability `mistakes` a uniformly random admissible command is played instead of the
    expert's and marked trained=False (DART: shown, but masked from the loss); the expert then goes
    on from where that leads. With probability `noise` such a command is played and marked
    trained=True (a degraded demonstrator). Their sum is at most 1. rng: a numpy Generator.
    """
    first, info = env.reset(game)
    expert.reset(game.task, first)
    steps, won = [], False
    while not won and len(steps) < max_steps:
        admissible = info["admissible_commands"]
        action, trained = expert.act(admissible), True
        draw = rng.random() if mistakes or noise else 1.0
        if draw < mistakes + noise:
            action, trained = admissible[int(rng.random() * len(admissible))], draw >= mistakes
        observation, _, won, _, info = env.step(action)
        expert.observe(action, observation)
        steps.append(Step(action, observation, trained))
    return Demonstration(game.task, first, steps, won)
