"""The referee: the alfworld package's own engine behind the interface of `AlfworldEnv`.

    from stock import StockAlfworldEnv
    env = StockAlfworldEnv(max_steps=30)
    observation, info = env.reset(Game.load("json_2.1.1/valid_seen/.../game.tw-pddl"))

About a second to load a game and 0.1 s a step: TextWorld translates the PDDL by Fast Downward and derives every sentence
from a grammar. `AlfworldEnv` is checked against it (tests/test_parity.py) and `eval.py --engine alfworld` plays in it.
"""

from importlib.metadata import version

from .engine import Info
from .gamefile import DataError


class ReferenceEnv:
    """alfworld's engine; the game must come from a file (`games.py --out` writes generated ones)."""

    def __init__(self, max_steps=50):
        try:  # here, because it takes seconds and only the referee needs it
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise DataError(f"alfworld's engine is not installed ({error}): pip install alfworld==0.4.2") from None
        self.max_steps, self.moment = max_steps, 0
        self.engine = AlfredDemangler(PddlEnv(EnvInfos(admissible_commands=True, won=True)), shuffle=False)
        self.loaded = None

    def load(self, game):
        """Read a game's file; about half a second. `reset` does it where it is needed. Raises DataError for a game without a file."""
        if game.path is None:
            raise DataError(f"{game.id} has no file for alfworld's engine: write generated games with games.py --out DIR")
        self.engine.load(str(game.path))
        self.loaded = game.path

    def reset(self, game):
        """-> (observation, info). Raises DataError for a game without a file."""
        if self.loaded != game.path or game.path is None:
            self.load(game)
        self.game, self.steps = game, 0
        self.state = self.engine.reset()
        return self.state.feedback, self._info()

    def step(self, action):
        """-> (observation, reward, terminated, truncated, info), as `AlfworldEnv.step`."""
        self.state, score, _ = self.engine.step(action)
        self.steps += 1
        won = bool(self.state["won"])
        return self.state.feedback, float(score), won, not won and self.steps >= self.max_steps, self._info()

    def _info(self):
        self.moment += 1
        info = Info(won=bool(self.state["won"]))
        info.env, info.moment = self, self.moment
        return info

    def admissible_commands(self):
        return list(self.state["admissible_commands"])


def alfworld_version():
    """Version of the installed alfworld package, to stand beside every number."""
    return version("alfworld")
