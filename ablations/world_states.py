"""States of the world instead of histories as the keys of Q̂.

Paper: none; P1's state is the history. Ours, for comparison; only an exact world allows it.
Changes `labels`: rollouts of a game whose histories meet again in one state of the world share
    their returns there. What the agent has seen on the way differs though the world does not.
Command: python train.py --ablation world_states
Ours: not measured yet.
"""

import numpy as np

from ablations import needs_labels
from fast_alfworld import AlfworldEnv
from qestimate import labels_of, q_table
from utils import key


def check(args):
    needs_labels(args, "world_states")


def world_keys(trajectory, tokenizer, game):
    """As `qestimate.history_keys`, of the world's states: two (T,) uint64 arrays."""
    env, states, pairs = AlfworldEnv(), [], []
    env.reset(game)
    for action in tokenizer.actions(trajectory.ids):
        _, _, *state, taken = env.snapshot()  # without the game and the number of steps
        # An object that was put back is as one that was never taken.
        taken = sorted(item for item in taken.items() if item[1])
        states.append(key(repr((game.id, state, taken))))
        pairs.append(key(f"{states[-1]} {action.strip()}"))
        env.step(action)
    own = slice(-len(trajectory), None)  # without the actions of a demonstration it started from
    return np.array(states[own], np.uint64), np.array(pairs[own], np.uint64)


def labels(c, i, some):
    """Q̂ by states of the world. -> [(q_hat (T,), weight (T,))]"""
    games = c.by_id
    keys = lambda t, tokenizer: world_keys(t, tokenizer, games[t.game])
    return labels_of(some, q_table(some, c.tokenizer, c.args.gamma, keys))
