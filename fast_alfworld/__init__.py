"""ALFWorld's text world in plain Python: games, the engine, an expert; no torch, no TextWorld."""

from .engine import HELP, NOTHING_HAPPENS, AlfworldEnv
from .expert import Demonstration, Expert, Step, demonstrate, fit_prior, parse_task
from .gamefile import TASK_TYPES, DataError, Game, GameError
from .games import COMPLETE, GAMES, find_data, games_for, split_dev, task_folder, write_games
from .generate import generate, generated_split
