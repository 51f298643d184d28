"""Process reward shaping: labels shaped by the value V^μ of a reference policy μ.

Paper (P1, process reward shaping): the advantage of a reference policy is added to the process
    reward; no number in our notes.
Changes `labels` to Q̂(s,a) + γV^μ(s') − V^μ(s), with V^μ(s') = 0 after the last action
    (--shape difference, as the public code does), or to Q̂(s,a) − V^μ(s) (--shape potential, which
    is what shaping the reward by the potential V^μ gives). Both are mapped to [0, 1] by a sigmoid
    centred on their mean with slope 3/IQR (1 if the IQR is 0). V^μ is the policy's network with a
    scalar head read at the <act>, trained on the mean returns of the states of μ's rollouts; those
    of held-out task folders are left out. μ is π_0, or the policy of --reference.
    The trained score is no value, and does not compare across states.
Command: python train.py --ablation shaping    (or with --shape potential)
Ours: not measured yet.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

import prm as prms
import train
from ablations import needs_labels
from fast_alfworld import task_folder
from fast_alfworld.cli import UserError
from qestimate import labels_of, q_table
from rollout import SHARDS, load_trajectories
from tokenizer import Tokenizer
from utils import key, save_model


def flags(parser):
    add = parser.add_argument_group("--ablation shaping").add_argument
    add("--shape", choices=("difference", "potential"), default="difference",
        help="Q̂ + γV(s') − V(s), or Q̂ − V(s)")
    add("--reference", metavar="DIR", help="a run with the same π_0; μ is the policy that played "
        "its last rollouts (default: π_0)")


def check(args):
    needs_labels(args, "shaping")
    if args.reference and not shards(args.reference):
        raise UserError(f"--reference {args.reference}: no rollouts there")


def shards(run):
    """The files with the last rollouts of a run."""
    files = sorted(Path(run).glob(f"iter*/rollouts/{SHARDS}"))
    return [file for file in files if file.parent == files[-1].parent]


def shaped(q_hat, V, gamma, how):
    """The shaped targets of a trajectory, from its Q̂ (T,) and the values V (T,) of its states."""
    return q_hat - V if how == "potential" else q_hat + gamma * np.append(V[1:], 0) - V


def squashed(x):
    """Shaped targets (N,) -> [0, 1]: a sigmoid around their mean with slope 3/IQR."""
    low, high = np.quantile(x, (0.25, 0.75))
    slope = 3 / (high - low) if high > low else 1
    return 1 / (1 + np.exp(np.minimum(700, slope * (x.mean() - x))))  # exp(710) overflows


def at_states(trajectories):
    """Trajectories whose actions end at the <act>: prm.py then reads V(s_t) for Q(s_t, a_t)."""
    return [replace(t, spans=np.repeat(t.spans[:, :1], 2, axis=1)) for t in trajectories]


def state_labels(trajectories, table):
    """V̂(s) = mean return of all rollouts through s. -> as `labels_of`, weights 1/visits of s"""
    _, inverse, count = np.unique(table["state"], return_inverse=True, return_counts=True)
    value = np.bincount(inverse, weights=table["returns"]) / count
    return labels_of(trajectories, {"q_hat": value[inverse], "count": count[inverse]})


def reference_value(c):
    """Train V^μ once a run. -> the network"""
    args = c.args

    def make(state):
        if args.reference:
            if Tokenizer.load(Path(args.reference, "iter0/policy")).tokens != c.tokenizer.tokens:
                raise UserError(f"--reference {args.reference}: another vocabulary than this run's")
            some = [t for file in shards(args.reference) for t in load_trajectories(file)]
        else:
            some = train.roll_out(c, 1)
        held = train.held_out(args, some)
        some = [t for t in some if task_folder(t.game) not in held]
        labels = state_labels(some, q_table(some, c.tokenizer, args.gamma))
        value = c.policy(0).with_score_head()
        settings = prms.Fit(lr=args.prm_lr, batch=args.prm_batch, epochs=args.prm_epochs)
        log = prms.fit(value, len(some), prms.bce_objective(at_states(some), labels), settings,
                       key(f"value {args.seed}"), state, "V of the reference")
        save_model(c.run.path / "iter1/value", value, c.tokenizer)
        return {"log": log}

    c.run.once("iter1/value", make, [c.run.path / "iter1/value/model.safetensors"])
    return c.prm(1, "value")


def labels(c, i, some):
    """Shaped Q̂ in [0, 1]. -> [(q_hat (T,), weight (T,))]"""
    plain, values = train.labels(c, i, some), prms.score(reference_value(c), at_states(some))
    targets = [shaped(q_hat, 1 / (1 + np.exp(-f)), c.args.gamma, c.args.shape)
               for (q_hat, _), f in zip(plain, values)]
    ends = np.cumsum([len(t) for t in some])[:-1]
    targets = np.split(squashed(np.concatenate(targets)).astype(np.float32), ends)
    return [(target, weight) for target, (_, weight) in zip(targets, plain)]
