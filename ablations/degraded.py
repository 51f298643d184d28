"""Degraded demonstrations: a share of the demonstrator's actions is random and learned as its own.

Paper (P1, named among its checks): process reward accuracy and success under degraded
    demonstrations, against behaviour cloning (π_0 of the same run); no number.
Changes `demonstrations`, of π_0 and of InversePRM.
Command: python train.py --algo inverseprm --ablation degraded --noise 0.25    (or 0.1, 0.5)
Ours: not measured yet.
"""

import sft
from ablations import trains_policy
from fast_alfworld.cli import between


def flags(parser):
    parser.add_argument_group("--ablation degraded").add_argument(
        "--noise", type=between(0, 1), default=0.25, help="share of random actions")


def check(args):
    if args.algo != "inverseprm":
        trains_policy(args, "degraded")


def demonstrations(c):
    """-> [(Trajectory, trained (T,) bool)]"""
    args = c.args
    return sft.demonstrations(c.train, c.prior, c.tokenizer, args.demos, seed=args.seed,
                              max_steps=args.max_steps, noise=args.noise)
