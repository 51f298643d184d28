"""Ablations: `python train.py --ablation NAME` replaces named steps of train.py by NAME.py's.

A file's functions that have the name of a step take its place, with the same arguments.
flags(parser) adds flags, check(args) refuses settings under which the ablation changes nothing.
`python -m ablations --help` runs many of them and prints a table.
"""

from utils import UserError


def needs_labels(args, name):
    """UserError where stage 2 does not learn from the step `labels`."""
    if args.algo != "agentprm" or args.prm_loss == "bt" or args.targets != "mc":
        raise UserError(f"--ablation {name} changes the Monte Carlo labels: it needs --algo "
                        "agentprm, --prm-loss bce or promise-progress, and --targets mc")


def trains_policy(args, name):
    """UserError where π_0 is not trained in this run."""
    if args.init:
        raise UserError(f"--ablation {name} changes what π_0 is trained on: leave out --init")
