"""The text world of ALFWorld in plain Python, with exactly the texts of alfworld 0.4.2.

Needs numpy and tqdm; alfworld only to generate games and for its own engine (reference.py).

    from fast_alfworld import AlfworldEnv, games_for
    games, source = games_for("auto", split="train")     # published games or generated ones
    env = AlfworldEnv(max_steps=30)
    observation, info = env.reset(games[0])
    observation, reward, terminated, truncated, info = env.step(info["admissible_commands"][0])

Engine (engine.py): AlfworldEnv, NOTHING_HAPPENS (the answer to an inadmissible command), HELP (the
    answer to "help").
One game (gamefile.py): Game, TASK_TYPES, and two kinds of ValueError with a message of one line:
    GameError (a file cannot be played), DataError (games are missing or cannot be made).
Many games (games.py): games_for, training_games, find_data, split_dev, task_folder, name_counts,
    fingerprint, write_games; COMPLETE, the sizes of the published splits; GAMES, the values of
    games_for(games=…).
Generated games (generate.py): generate, generated_split.
Expert (expert.py): Expert, fit_prior, parse_task, Human (a person in its place), demonstrate ->
    Demonstration with its Step list.
How well an agent plays, with intervals: fast_alfworld.score.
alfworld's own engine behind the same interface: fast_alfworld.reference.ReferenceEnv.

On the command line: python -m fast_alfworld --help
"""

from .engine import HELP, NOTHING_HAPPENS, AlfworldEnv
from .expert import Demonstration, Expert, Human, Step, demonstrate, fit_prior, parse_task
from .gamefile import TASK_TYPES, DataError, Game, GameError
from .games import (COMPLETE, GAMES, find_data, fingerprint, games_for, name_counts, split_dev,
                    task_folder, training_games, write_games)
from .generate import generate, generated_split

__all__ = [
    "COMPLETE", "GAMES", "HELP", "NOTHING_HAPPENS", "TASK_TYPES", "AlfworldEnv", "DataError",
    "Demonstration", "Expert", "Game", "GameError", "Human", "Step", "demonstrate", "find_data",
    "fingerprint", "fit_prior", "games_for", "generate", "generated_split", "name_counts",
    "parse_task", "split_dev", "task_folder", "training_games", "write_games"]
