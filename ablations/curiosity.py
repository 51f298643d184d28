"""Curiosity: a bonus on the labels of rarely visited actions.

Paper (P1, named among its open ablations): a bonus for rarely visited (s, a); no number.
Changes `labels`: min(1, Q̂(s,a) + c/√n(s,a)), n(s,a) being the number of rollouts through (s, a).
Command: python train.py --ablation curiosity
Ours: not measured yet.
"""

import numpy as np

import train
from ablations import needs_labels
from fast_alfworld.cli import between


def flags(parser):
    parser.add_argument_group("--ablation curiosity").add_argument(
        "--curiosity", type=between(0, 1), default=0.1, help="c, the bonus of a single visit")


def check(args):
    needs_labels(args, "curiosity")


def with_bonus(q_hat, weight, c):
    """q_hat (T,) with the bonus; weight (T,): 1/n(s, a)."""
    return np.minimum(1, q_hat + c * np.sqrt(weight)).astype(np.float32)


def labels(c, i, some):
    """Q̂ plus the bonus. -> [(q_hat (T,), weight (T,))]"""
    return [(with_bonus(q_hat, weight, c.args.curiosity), weight)
            for q_hat, weight in train.labels(c, i, some)]
