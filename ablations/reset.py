"""Reset distribution: half of the rollouts start at a random state of a random demonstration.

Paper (P1, Reset-50-50): π_1 wins 82.0 % of valid_unseen instead of 73.9 %.
Changes `start_states`. A trajectory holds the learner's own actions only, so they alone are
    labelled; the step cap counts from the reset. The success of the record iter<i>/rollouts is over
    both kinds of episodes.
Command: python train.py --ablation reset
Ours: not measured yet.
"""

from fast_alfworld.cli import between
from rollout import Episode
from utils import generator

FIRST_NUMBER = 10 ** 6  # episode numbers from here on: no other episode of a game has them


def flags(parser):
    parser.add_argument_group("--ablation reset").add_argument(
        "--reset-share", type=between(0, 1), default=0.5,
        help="share of the rollouts that start at a state of a demonstration")


def start_states(c, i, episodes):
    """Replace a share of the episodes. -> [Episode]"""
    demos = [t for t, _ in c.demonstrations]
    games, rng, out = c.by_id, generator(c.args.seed, "reset", i), list(episodes)
    for n in rng.choice(len(out), round(c.args.reset_share * len(out)), replace=False).tolist():
        t = demos[rng.integers(len(demos))]
        start = t.spans[rng.integers(len(t)), 0]  # behind the <act> of a random action
        out[n] = Episode(games[t.game], FIRST_NUMBER + n, t.ids[:start])
    return out
