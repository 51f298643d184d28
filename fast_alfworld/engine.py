"""An exact, pure-Python ALFWorld text world.

Same intro, feedback, admissible commands, score and `won` as alfworld 0.4.2 on TextWorld 1.7, character for character, on
any sequence of commands (tests/test_parity.py plays both side by side), at a few microseconds a step. All published games
share one PDDL domain and one text grammar, so the whole engine is written out below as plain Python.

    from env import AlfworldEnv, Game
    env = AlfworldEnv(max_steps=30)
    observation, info = env.reset(Game.load("json_2.1.1/train/.../game.tw-pddl"))
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

gamefile.py says what is in a game and how it is numbered. Sets are integers: bit i stands for number i.
"""

from functools import lru_cache

from .gamefile import MIDDLE_OF_ROOM, TASK_TYPES, Game, GameError, join_list, numbers

__all__ = ["HELP", "NOTHING_HAPPENS", "TASK_TYPES", "AlfworldEnv", "Game", "GameError", "Info"]

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
DECISIVE = frozenset(("take", "move", "clean", "heat", "cool", "use"))  # what can reach or undo a goal, besides "go" to a lamp


@lru_cache(maxsize=1 << 13)  # the few games at hand; some MB at most
def describe(game, r, is_open, contents):
    """What one sees of a receptacle: "On the desk 1, you see a mug 1."."""
    room = game.room
    if not room.openable >> r & 1:
        return f"On the {room.names[r]}, you see {game.listing(contents)}."
    return f"The {room.names[r]} is open. In it, you see {game.listing(contents)}." if is_open else f"The {room.names[r]} is closed."


@lru_cache(maxsize=1 << 13)
def commands(game, here, held, opened, at, contents):
    """The admissible commands, sorted, as a function of all that decides on them: the agent's place, the object in hand (or -1),
    the open receptacles, the objects at that place, and the contents of the receptacles there."""
    room, names, in_hand = game.room, game.names, held >= 0 and game.names[held]
    found = list(room.commands_at[here])
    within_reach = 0
    for r, inside in zip(room.receptacles_at[here], contents):
        name, is_shut = room.names[r], (room.openable & ~opened) >> r & 1
        within_reach |= inside
        if room.openable >> r & 1:
            found.append(("open " if is_shut else "close ") + name)
        if in_hand and not is_shut and game.type_of[held] in room.accepts[r]:
            found.append(f"move {in_hand} to {name}")
        elif not in_hand and not is_shut:
            found += [f"take {names[o]} from {name}" for o in numbers(inside & game.pickupable)]
        if in_hand and room.treats[r] and game.treatable[room.treats[r]] >> held & 1:
            found.append(f"{room.treats[r]} {in_hand} with {name}")
    if in_hand:
        found.append("examine " + in_hand)
        if game.blades >> held & 1:
            found += [f"slice {names[o]} with {in_hand}" for o in numbers(at & game.sliceable)]
    if within_reach & game.toggleable:
        found += ["use " + names[o] for o in numbers(within_reach & game.toggleable)]
    return tuple(sorted(found))  # a tuple, because to keep many lists slows Python's garbage collection down


class Info(dict):
    """What a step reports besides the observation: `won`, and `admissible_commands`, computed when first asked for."""

    __slots__ = ("env", "moment")

    def __contains__(self, key):
        return key == "admissible_commands" or super().__contains__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

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
        self.here = -1  # where the agent is
        self.held = -1  # the object in hand, or -1
        self.opened = 0  # receptacles
        self.hot = self.clean = self.sliced = self.toggled = 0  # objects
        self.cool = game.start_cool
        self.contents = list(game.start_contents)  # per receptacle: what is in or on it
        self.at = list(game.start_at)  # per place: what the engine believes to be there; not always what its receptacles hold
        self.taken = {}  # receptacle -> what was taken from it and not put back
        self.won = self._is_won()
        return game.intro, self._info()

    def snapshot(self):
        """The whole state, to `restore` later; about a microsecond."""
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
        elif verb in DECISIVE:
            self.won = self._is_won()
        self.steps += 1
        won = self.won
        return observation, float(won), won, not won and self.steps >= self.max_steps, self._info()

    def admissible_commands(self):
        """Every command that would not say "Nothing happens.", sorted, each once."""
        game, here, contents = self.game, self.here, self.contents
        return list(commands(game, here, self.held, self.opened, self.at[here], tuple([contents[r] for r in game.room.receptacles_at[here]])))

    def _info(self):
        self.moment += 1
        info = Info(won=self.won)
        info.env, info.moment = self, self.moment
        return info

    # --- what commands need -------------------------------------------------------------------------------------------

    def _receptacle(self, name):
        """The number of the receptacle of that name if one stands before it, else -1."""
        r = self.game.index.get(name, -1) - self.game.n_objects
        return r if r >= 0 and self.game.room.place_of[r] == self.here else -1

    def _is_shut(self, r):
        return (self.game.room.openable & ~self.opened) >> r & 1

    def _is_in_hand(self, name):
        return self.held >= 0 and self.game.names[self.held] == name

    def _within_reach(self):
        """All that is in or on the receptacles here, open or not."""
        objects = 0
        for r in self.game.room.receptacles_at[self.here]:
            objects |= self.contents[r]
        return objects

    def _is_won(self):
        game = self.game
        if game.lamps:  # one of the objects in hand, before a lamp that was switched on
            return self.held >= 0 and bool(game.goal_objects >> self.held & 1 and self._within_reach() & game.lamps & self.toggled)
        goal = game.goal_objects & getattr(self, game.goal_state) if game.goal_state else game.goal_objects
        for r in game.goal_receptacles:
            there = self.contents[r] & goal
            if there and (not game.goal_is_two or there & there - 1):  # x & x - 1 is x less one element
                return True
        return False

    # --- the commands: each returns the feedback, or None where it is not admissible ----------------------------------

    def _look(self, rest):
        if rest:
            return None
        game, here = self.game, self.game.room.receptacles_at[self.here]
        if not here:
            return MIDDLE_OF_ROOM.format("nothing")  # unlike the intro
        beside = [o for o in numbers(self.at[self.here]) for r in here if self.taken.get(r, 0) >> o & 1]
        return (f"You are facing the {join_list([game.room.names[r] for r in here])}. "
                f"Next to it, you see {join_list(['a ' + game.names[o] for o in beside])}.")

    def _inventory(self, rest):
        if rest:
            return None
        return f"You are carrying: a {self.game.names[self.held]}." if self.held >= 0 else "You are not carrying anything."

    def _help(self, rest):
        return None if rest else HELP

    def _go(self, rest):
        game, to, name = self.game, rest[:3], rest[3:]
        r = game.index.get(name, -1) - game.n_objects
        if to != "to " or r < 0 or game.room.place_of[r] == self.here:
            return None
        self.here = game.room.place_of[r]
        if game.lamps:
            self.won = self._is_won()
        return f"You arrive at {name}. {describe(game, r, self.opened >> r & 1, self.contents[r])}"

    def _open(self, rest):
        r = self._receptacle(rest)
        if r < 0 or not self._is_shut(r):
            return None
        self.opened |= 1 << r
        return f"You open the {rest}. {describe(self.game, r, 1, self.contents[r])}"

    def _close(self, rest):
        r = self._receptacle(rest)
        if r < 0 or not self.opened >> r & 1:
            return None
        self.opened ^= 1 << r
        return f"You close the {rest}."

    def _take(self, rest):
        name, _, receptacle = rest.partition(" from ")
        o, r = self.game.index.get(name, -1), self._receptacle(receptacle)
        if o < 0 or r < 0 or self.held >= 0 or self._is_shut(r) or not (self.contents[r] & self.game.pickupable) >> o & 1:
            return None
        self.held = o
        self.contents[r] ^= 1 << o  # from this one only, should several hold it
        self.at[self.here] &= ~(1 << o)
        self.taken[r] = self.taken.get(r, 0) | 1 << o
        return f"You pick up the {name} from the {receptacle}."

    def _move(self, rest):
        name, _, receptacle = rest.partition(" to ")
        o, r = self.held, self._receptacle(receptacle)
        if r < 0 or not self._is_in_hand(name) or self._is_shut(r) or self.game.type_of[o] not in self.game.room.accepts[r]:
            return None
        self.held = -1
        self.contents[r] |= 1 << o
        self.at[self.here] |= 1 << o
        if r in self.taken:
            self.taken[r] &= ~(1 << o)
        return f"You move the {name} to the {receptacle}."

    def _treat(self, verb, rest):
        name, _, receptacle = rest.partition(" with ")
        r = self._receptacle(receptacle)
        if r < 0 or self.game.room.treats[r] != verb or not self._is_in_hand(name) or not self.game.treatable[verb] >> self.held & 1:
            return None
        held = 1 << self.held
        if verb == "clean":
            self.clean |= held
        elif verb == "heat":
            self.hot, self.cool = self.hot | held, self.cool & ~held
        else:
            self.cool, self.hot = self.cool | held, self.hot & ~held
        return f"You {verb} the {name} using the {receptacle}."

    def _slice(self, rest):
        name, _, blade = rest.partition(" with ")
        o, game = self.game.index.get(name, -1), self.game
        if o < 0 or not self._is_in_hand(blade) or not game.blades >> self.held & 1 or not game.sliceable & self.at[self.here] & 1 << o:
            return None
        self.sliced |= 1 << o
        return f"You sliced the {name} with the {blade}."

    def _use(self, rest):
        o = self.game.index.get(rest, -1)
        if o < 0 or not (self._within_reach() & self.game.toggleable) >> o & 1:
            return None
        self.toggled |= 1 << o
        return f"You turn on the {rest}."

    def _examine(self, rest):
        r = self._receptacle(rest)
        if r >= 0:
            return describe(self.game, r, self.opened >> r & 1, self.contents[r])
        return self._describe_held() if self._is_in_hand(rest) else None

    def _describe_held(self):
        game, o, name = self.game, self.held, self.game.names[self.held]
        hot, cool, clean, cut = (treated >> o & 1 for treated in (self.hot, self.cool, self.clean, self.sliced))
        sliced = "sliced " if cut else ""
        if game.vessels >> o & 1:
            return f"This is a normal {name}. In it, you see {game.listing(game.inner.get(o, 0))}."
        if clean and (hot or cool):
            return f"This is a {'hot' if hot else 'cool'} and clean {sliced}{name}."
        if clean or hot:
            return f"This is a {'clean' if clean else 'hot'} {sliced}{name}."
        if cool:
            return f"This is a cool sliced {name}." if cut else f"This is a cold {name}."
        if self.toggled >> o & 1:  # what was never switched on is not even off
            return f"This {name} is on."
        return f"This is a sliced {name}." if cut else f"There's nothing special about {name}."

    VERBS = {"look": _look, "inventory": _inventory, "help": _help, "go": _go, "open": _open, "close": _close,
             "take": _take, "move": _move, "slice": _slice, "use": _use, "examine": _examine,
             "clean": lambda self, rest: self._treat("clean", rest),
             "heat": lambda self, rest: self._treat("heat", rest),
             "cool": lambda self, rest: self._treat("cool", rest)}
