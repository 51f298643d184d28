"""Ablations: `python train.py --ablation NAME` replaces named steps of train.py by NAME.py's.

A file's functions that have the name of a step take its place, with the same arguments.
flags(parser) adds flags, check(args) refuses settings under which the ablation changes nothing.
`python -m ablations --help` runs many of them and prints a table.
"""

import importlib
from inspect import ismodule
from pathlib import Path

from fast_alfworld.cli import UserError


def load(names, parser, steps):
    """Add the flags of ablations to the parser and replace steps {name: function}.

    -> the steps, and the ablations' checks of the flags
    """
    known, owner, checks = sorted(f.stem for f in Path(__file__).parent.glob("[a-z]*.py")), {}, []
    for name in names:
        if name not in known:
            raise UserError(f"--ablation {name}: must be among {', '.join(known)}")
        module = importlib.import_module(f"ablations.{name}")
        getattr(module, "flags", lambda parser: None)(parser)
        checks.append(getattr(module, "check", lambda args: None))
        for step in steps.keys() & vars(module).keys():
            if ismodule(getattr(module, step)):  # `import tokenizer` is no step
                continue
            if step in owner:
                raise UserError(f"--ablation {owner[step]},{name}: both replace the step {step}")
            steps[step], owner[step] = getattr(module, step), name
    return steps, checks


def needs_labels(args, name):
    """UserError where stage 2 does not learn from the step `labels`."""
    if args.algo != "agentprm" or args.prm_loss == "bt" or args.targets != "mc":
        raise UserError(f"--ablation {name} changes the Monte Carlo labels: it needs --algo "
                        "agentprm, --prm-loss bce or promise-progress, and --targets mc")


def trains_policy(args, name):
    """UserError where π_0 is not trained in this run."""
    if args.init:
        raise UserError(f"--ablation {name} changes what π_0 is trained on: leave out --init")
