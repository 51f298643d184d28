"""Ensemble: several PRMs, trained on the data in different order, judge together.

Paper (P1, reward hacking): the disagreement of an ensemble did not detect hacking.
Changes `judge`: PRMs prm2, prm3, … are trained before stage 3, from the same π_{i−1} and rollouts
    with other seeds; the mean or the minimum of their Q counts. best/ has the first.
Command: python train.py --ablation ensemble    (or with --ensemble-by min)
Ours: not measured yet.
"""

import torch

from fast_alfworld.cli import between
import train


def flags(parser):
    add = parser.add_argument_group("--ablation ensemble").add_argument
    add("--ensemble", type=between(2, 100, int), default=3, metavar="N", help="number of PRMs")
    add("--ensemble-by", choices=("mean", "min"), default="mean", help="which of their Q counts")


def together(judges, how):
    """The judges' mean or minimum. -> judge(sequences, states) -> Q (B, C)"""
    def judge(sequences, states):
        q = torch.stack([one(sequences, states) for one in judges])  # (N, B, C)
        return q.mean(0) if how == "mean" else q.amin(0)

    return judge


def judge(c, i, prm):
    """Train the further PRMs, and let all of them judge. -> judge(sequences, states)"""
    prms = [prm]
    for n in range(2, c.args.ensemble + 1):
        train.train_prm(c, i, train.roll_out(c, i), f"prm{n}")
        prms.append(c.prm(i, f"prm{n}"))
    return together([train.judge(c, i, one) for one in prms], c.args.ensemble_by)
