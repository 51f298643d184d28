"""alfworld's own engine behind the interface of `AlfworldEnv`.

    from fast_alfworld import Game
    from fast_alfworld.reference import ReferenceEnv
    env = ReferenceEnv(max_steps=30)
    observation, info = env.reset(Game.load("json_2.1.1/valid_seen/.../game.tw-pddl"))

It takes about a second to load a game and 0.1 s a step, because TextWorld translates the PDDL with
Fast Downward and derives every sentence from a grammar. `AlfworldEnv` is tested against it.
"""

import os
from importlib.metadata import version
from tempfile import gettempdir

from .engine import Info
from .gamefile import DataError


class ReferenceEnv:
    """alfworld's engine; games must come from files (`write_games` writes generated ones)."""

    def __init__(self, max_steps=50):
        data = os.environ.get("ALFWORLD_DATA")
        os.environ["ALFWORLD_DATA"] = gettempdir()  # alfworld makes this folder when imported
        try:  # imported here, because it takes seconds and needs the alfworld package
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise DataError(f"alfworld's engine is not installed ({error}): "
                            "pip install alfworld==0.4.2") from None
        finally:
            del os.environ["ALFWORLD_DATA"]
            if data is not None:
                os.environ["ALFWORLD_DATA"] = data
        self.max_steps, self.moment = max_steps, 0
        engine = PddlEnv(EnvInfos(admissible_commands=True, won=True))
        self.engine = AlfredDemangler(engine, shuffle=False)
        self.loaded = None

    def load(self, game):
        """Read a game's file, which takes about half a second; `reset` calls it where needed.

        Raises DataError for a game without a file.
        """
        if game.path is None:
            raise DataError(f"{game.id} has no file for alfworld's engine: write generated games "
                            "by `python -m fast_alfworld write`")
        self.engine.load(str(game.path))
        self.loaded = game.path

    def reset(self, game):
        """Start an episode -> (observation, Info). Raises DataError for a game without a file."""
        if self.loaded != game.path or game.path is None:
            self.load(game)
        self.game, self.steps = game, 0
        self.state = self.engine.reset()
        return self.state.feedback, self._info()

    def step(self, action):
        """Play a command -> (observation, reward, terminated, truncated, Info)."""
        self.state, score, _ = self.engine.step(action)
        self.steps += 1
        won = bool(self.state["won"])
        truncated = not won and self.steps >= self.max_steps
        return self.state.feedback, float(score), won, truncated, self._info()

    def admissible_commands(self):
        """The admissible commands as a tuple, in alfworld's order."""
        return tuple(self.state["admissible_commands"])

    def _info(self):
        self.moment += 1
        info = Info(won=bool(self.state["won"]))
        info.env, info.moment = self, self.moment
        return info


def alfworld_version():
    """The version of the installed alfworld package, to be reported beside every number."""
    return version("alfworld")
