"""Monte Carlo labels from rollouts that fork behind every action.

Paper (P2): the usual way to label steps, with 16 rollouts from each; TD + GAE from whole
    trajectories is claimed to need 8 times less compute at equal Best-of-N.
Changes `labels`: behind each action but the last of an episode, K rollouts go on from the state
    reached; Q̂(s_t,a_t) is the mean return of these and of the trajectory itself, each action with
    weight 1. The cap counts from the start of the episode.
    At equal tokens: about 4,000 whole rollouts cost what 180 with K = 4 do.
Command: python train.py --ablation forks --forks 4 --rollouts 180 --prm-epochs 22
Ours: not measured yet.
"""

import numpy as np

import train
from ablations import needs_labels
from fast_alfworld.cli import between
from qestimate import returns
from rollout import Episode
from utils import key


def flags(parser):
    parser.add_argument_group("--ablation forks").add_argument(
        "--forks", type=between(1, 1000, int), default=16, metavar="K",
        help="rollouts that fork behind each action")


def check(args):
    needs_labels(args, "forks")


def forks_of(trajectories, K):
    """(number of the trajectory, of the action behind which it forks) of every fork, in order."""
    return [(n, k) for n, t in enumerate(trajectories) for k in range(len(t) - 1)
            for _ in range(K)]


def forked(trajectories, forks, K, gamma):
    """Q̂ from the forks, in the order of `forks_of`. -> [(q_hat (T,), weight (T,))]"""
    total = [returns(t, gamma) for t in trajectories]
    for (n, k), fork in zip(forks_of(trajectories, K), forks, strict=True):
        total[n][k] += gamma * returns(fork, gamma)[0]
    count = [np.append(np.full(len(q) - 1, K + 1), 1) for q in total]
    return [((q / n).astype(np.float32), np.ones(len(q), np.float32))
            for q, n in zip(total, count)]


def labels(c, i, some):
    """Play the forks and average their returns. -> [(q_hat (T,), weight (T,))]"""
    games, K = c.by_id, c.args.forks
    episodes = [Episode(games[some[n].game], number, some[n].ids[:some[n].spans[k + 1, 0]], k + 1)
                for number, (n, k) in enumerate(forks_of(some, K))]
    forks = sorted(train.play(
        c, i, "forks", episodes, i - 1, key(f"forks {c.args.seed} {i}"),
        lambda played: {"episodes": len(played)}), key=lambda t: t.episode)
    return forked(some, forks, K, c.args.gamma)
