"""The ALFWorld text world as a simulator in plain Python.

All that it returns equals what alfworld 0.4.2 on TextWorld 1.7 returns, character for character,
for any sequence of commands: tests/world/test_parity.py plays both side by side. A step takes a few
microseconds. All games share one PDDL domain and one grammar, which are written out below in code.

    from fast_alfworld import AlfworldEnv, Game
    env = AlfworldEnv(max_steps=30)
    observation, info = env.reset(Game.load("json_2.1.1/train/.../game.tw-pddl"))
    observation, reward, terminated, truncated, info = env.step("go to desk 1")

gamefile.py says how objects, receptacles and places are numbered. A set of them is an integer: its
bit i stands for number i, so that `x >> i & 1` asks whether i is in the set x.
"""

from functools import lru_cache

from .gamefile import MIDDLE_OF_ROOM, join_list, numbers

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
# The verbs that can change `won`, besides "go" in games with a lamp.
CHANGES_WON = frozenset(("take", "move", "clean", "heat", "cool", "use"))


@lru_cache(maxsize=1 << 13)  # some megabytes at most; both caches serve the games played lately
def describe(game, r, is_open, contents):
    """What the agent sees of receptacle r, such as "On the desk 1, you see a mug 1."."""
    name = game.room.names[r]
    if not game.room.openable >> r & 1:
        return f"On the {name}, you see {game.listing(contents)}."
    if is_open:
        return f"The {name} is open. In it, you see {game.listing(contents)}."
    return f"The {name} is closed."


@lru_cache(maxsize=1 << 13)
def commands(game, place, held, opened, at, contents):
    """The admissible commands as a sorted tuple of str, from all that they depend on.

    That is the agent's place, the object in its hand (or -1), the set of open receptacles, the set
    of objects located at the place, and a tuple with the contents of each receptacle there.
    """
    room, names, in_hand = game.room, game.names, held >= 0 and game.names[held]
    found = list(room.commands_at[place])
    within_reach = 0
    for r, inside in zip(room.receptacles_at[place], contents):
        name, is_shut = room.names[r], (room.openable & ~opened) >> r & 1
        within_reach |= inside
        if room.openable >> r & 1:
            found.append(("open " if is_shut else "close ") + name)
        if in_hand and not is_shut and game.type_of[held] in room.accepts[r]:
            found.append(f"move {in_hand} to {name}")
        elif not in_hand and not is_shut:
            found += [f"take {names[o]} from {name}" for o in numbers(inside & game.pickupable)]
        if in_hand and (verb := room.treats[r]) and game.treatable[verb] >> held & 1:
            found.append(f"{verb} {in_hand} with {name}")
    if in_hand:
        found.append("examine " + in_hand)
        if game.blades >> held & 1:
            found += [f"slice {names[o]} with {in_hand}" for o in numbers(at & game.sliceable)]
    if within_reach & game.toggleable:
        found += ["use " + names[o] for o in numbers(within_reach & game.toggleable)]
    return tuple(sorted(found))


class Info(dict):
    """What a step returns besides the observation: `won` and `admissible_commands`.

    The commands are computed when they are first read, which must be before the environment's next
    step, reset or restore (RuntimeError).
    """

    __slots__ = ("env", "moment")

    def __contains__(self, key):
        return key == "admissible_commands" or super().__contains__(key)

    def get(self, key, default=None):
        return self[key] if key in self else default

    def __missing__(self, key):
        if key != "admissible_commands":
            raise KeyError(key)
        if self.env.moment != self.moment:
            raise RuntimeError("the environment has moved on: read admissible_commands before the "
                               "next step, reset or restore")
        self[key] = found = self.env.admissible_commands()
        return found


class AlfworldEnv:
    """The environment, with the signatures of gymnasium.

    An episode is truncated after `max_steps` actions. Further steps are allowed, as in alfworld.
    """

    def __init__(self, max_steps=50):
        self.max_steps = max_steps
        self.moment = 0  # counts the calls that change the state; see Info

    def reset(self, game):
        """Start an episode of a Game -> (observation, Info). Nothing is parsed."""
        self.game = game
        self.steps = 0
        self.place = -1  # where the agent is
        self.held = -1  # the object in its hand, or -1
        self.opened = 0  # set of receptacles
        self.hot = self.clean = self.sliced = self.toggled = 0  # sets of objects
        self.cool = game.start_cool
        self.contents = list(game.start_contents)  # the set of objects in or on each receptacle
        # The set of objects that the facts locate at each place; some facts locate an object
        # elsewhere than the receptacle that holds it, and alfworld follows both.
        self.at = list(game.start_at)
        self.taken = {}  # receptacle -> set of objects taken from it and not put back into it
        self.won = self._is_won()
        return game.intro, self._info()

    def snapshot(self):
        """A copy of the whole state, for `restore`; it takes about a microsecond."""
        return (self.game, self.steps, self.place, self.held, self.opened, self.hot, self.cool,
                self.clean, self.sliced, self.toggled, self.won,
                self.contents.copy(), self.at.copy(), self.taken.copy())

    def restore(self, snapshot):
        """Return to the state of a snapshot, which can be used again."""
        (self.game, self.steps, self.place, self.held, self.opened, self.hot, self.cool,
         self.clean, self.sliced, self.toggled, self.won, contents, at, taken) = snapshot
        self.contents, self.at, self.taken = contents.copy(), at.copy(), taken.copy()
        self.moment += 1

    def step(self, action):
        """Play a command -> (observation, reward, terminated, truncated, Info).

        The reward is 1.0 in every state that is won, else 0.0; terminated says the same as a bool.
        An inadmissible command is answered by NOTHING_HAPPENS and changes nothing but the number
        of steps.
        """
        verb, _, rest = action.strip().partition(" ")
        act = self.VERBS.get(verb)
        observation = act(self, rest) if act else None
        if observation is None:
            observation = NOTHING_HAPPENS
        elif verb in CHANGES_WON:
            self.won = self._is_won()
        self.steps += 1
        won = self.won
        return observation, float(won), won, not won and self.steps >= self.max_steps, self._info()

    def admissible_commands(self):
        """The commands that are not answered by NOTHING_HAPPENS: a sorted tuple, each once.

        States with the same commands share the tuple through a cache; nothing is copied.
        """
        game, place, contents = self.game, self.place, self.contents
        inside = tuple([contents[r] for r in game.room.receptacles_at[place]])
        return commands(game, place, self.held, self.opened, self.at[place], inside)

    def _info(self):
        self.moment += 1
        info = Info(won=self.won)
        info.env, info.moment = self, self.moment
        return info

    # --- tests that the commands need ------------------------------------------------------------

    def _receptacle(self, name):
        """The number of the receptacle of that name if it is at the agent's place, else -1."""
        r = self.game.index.get(name, -1) - self.game.n_objects
        return r if r >= 0 and self.game.room.place_of[r] == self.place else -1

    def _is_shut(self, r):
        return (self.game.room.openable & ~self.opened) >> r & 1

    def _is_in_hand(self, name):
        return self.held >= 0 and self.game.names[self.held] == name

    def _within_reach(self):
        """The set of objects in or on the receptacles at the agent's place, open or not."""
        objects = 0
        for r in self.game.room.receptacles_at[self.place]:
            objects |= self.contents[r]
        return objects

    def _is_won(self):
        """Whether the goal holds in the present state."""
        game = self.game
        if game.lamps:  # hold a wanted object at the place of a lamp that was switched on
            return (self.held >= 0 and game.goal_objects >> self.held & 1 == 1
                    and self._within_reach() & game.lamps & self.toggled != 0)
        goal = game.goal_objects
        if game.goal_state:
            goal &= getattr(self, game.goal_state)
        for r in game.goal_receptacles:
            there = self.contents[r] & goal
            if there and (not game.goal_is_two or there & there - 1):  # there - 1: drops one object
                return True
        return False

    # --- the commands: each returns the answer, or None where it is not admissible ---------------

    def _look(self, rest):
        if rest:
            return None
        game, here = self.game, self.game.room.receptacles_at[self.place]
        if not here:
            return MIDDLE_OF_ROOM.format("nothing")  # unlike the first observation, as in alfworld
        facing = join_list([game.room.names[r] for r in here])
        beside = [o for o in numbers(self.at[self.place])
                  for r in here if self.taken.get(r, 0) >> o & 1]
        return (f"You are facing the {facing}. "
                f"Next to it, you see {join_list(['a ' + game.names[o] for o in beside])}.")

    def _inventory(self, rest):
        if rest:
            return None
        if self.held < 0:
            return "You are not carrying anything."
        return f"You are carrying: a {self.game.names[self.held]}."

    def _help(self, rest):
        return None if rest else HELP

    def _go(self, rest):
        game, to, name = self.game, rest[:3], rest[3:]
        r = game.index.get(name, -1) - game.n_objects
        if to != "to " or r < 0 or game.room.place_of[r] == self.place:
            return None
        self.place = game.room.place_of[r]
        if game.lamps:
            self.won = self._is_won()
        seen = describe(game, r, self.opened >> r & 1, self.contents[r])
        return f"You arrive at {name}. {seen}"

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
        if (o < 0 or r < 0 or self.held >= 0 or self._is_shut(r)
                or not (self.contents[r] & self.game.pickupable) >> o & 1):
            return None
        self.held = o
        self.contents[r] ^= 1 << o  # only from this receptacle, even if others hold it too
        self.at[self.place] &= ~(1 << o)
        self.taken[r] = self.taken.get(r, 0) | 1 << o
        return f"You pick up the {name} from the {receptacle}."

    def _move(self, rest):
        name, _, receptacle = rest.partition(" to ")
        o, r = self.held, self._receptacle(receptacle)
        if (r < 0 or not self._is_in_hand(name) or self._is_shut(r)
                or self.game.type_of[o] not in self.game.room.accepts[r]):
            return None
        self.held = -1
        self.contents[r] |= 1 << o
        self.at[self.place] |= 1 << o
        if r in self.taken:
            self.taken[r] &= ~(1 << o)
        return f"You move the {name} to the {receptacle}."

    def _treat(self, verb, rest):
        """Clean, heat or cool the object in hand."""
        name, _, receptacle = rest.partition(" with ")
        r = self._receptacle(receptacle)
        if (r < 0 or self.game.room.treats[r] != verb or not self._is_in_hand(name)
                or not self.game.treatable[verb] >> self.held & 1):
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
        if (o < 0 or not self._is_in_hand(blade) or not game.blades >> self.held & 1
                or not (game.sliceable & self.at[self.place]) >> o & 1):
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
        hot, cool, clean, cut = [treated >> o & 1 for treated in
                                 (self.hot, self.cool, self.clean, self.sliced)]
        sliced = "sliced " if cut else ""
        if game.vessels >> o & 1:
            return f"This is a normal {name}. In it, you see {game.listing(game.inner.get(o, 0))}."
        if clean and (hot or cool):
            return f"This is a {'hot' if hot else 'cool'} and clean {sliced}{name}."
        if clean or hot:
            return f"This is a {'clean' if clean else 'hot'} {sliced}{name}."
        if cool:
            return f"This is a cool sliced {name}." if cut else f"This is a cold {name}."
        if self.toggled >> o & 1:
            return f"This {name} is on."
        return f"This is a sliced {name}." if cut else f"There's nothing special about {name}."

    VERBS = {"look": _look, "inventory": _inventory, "help": _help, "examine": _examine,
             "go": _go, "open": _open, "close": _close, "take": _take, "move": _move,
             "slice": _slice, "use": _use,
             "clean": lambda self, rest: self._treat("clean", rest),
             "heat": lambda self, rest: self._treat("heat", rest),
             "cool": lambda self, rest: self._treat("cool", rest)}
