"""Implicit PRM: Q(s,a) = b·log π_θ(a|s)/π_{i−1}(a|s), learned from outcomes alone.

Paper: none in P1 or P2. PRIME (Cui et al. 2025) and implicit PRMs (Yuan et al. 2024).
Changes `judge`: a copy of π_{i−1}, θ, is trained by the cross-entropy of
    σ(Σ_t b·log π_θ(a_t|s_t)/π_{i−1}(a_t|s_t)) with the outcome (1 if won) of each rollout of
    the task folders that are not held out; π over the candidates, at the temperature of stage 3.
    `start_prm`: there is no other PRM. Q is in units of log-odds, so that stage 3 may need another
    --beta; with --beta b its closed form is π_θ itself.
Command: python train.py --ablation implicit_prm
Ours: not measured yet.
"""

import torch
from torch.nn import functional as F

import prm as prms
import train
from candidates import score_states
from fast_alfworld import task_folder
from fast_alfworld.cli import between
from rollout import states_of
from utils import key, read_model, save_model

start_prm = None


def flags(parser):
    parser.add_argument_group("--ablation implicit_prm").add_argument(
        "--implicit-beta", type=between(1e-6, 1e6), default=0.05, metavar="X",
        help="b, the scale of the log-ratio")


def log_ratio(theta, reference, sequences, states, temperature):
    """log π_θ(·|s) − log π_ref(·|s) of some states. -> (B, C), the gradient of θ alone"""
    with torch.no_grad():
        log_ref = score_states(reference, sequences, states, temperature)
    return score_states(theta, sequences, states, temperature) - log_ref


def outcome_objective(reference, trajectories, games, tokenizer, temperature, b):
    """-> objective(theta, picked, share, step), as in prm.py"""
    def objective(theta, picked, share, step):
        some = [trajectories[n] for n in picked]
        states, of, taken = [], [], []
        for n, t in enumerate(some):
            states += states_of(t, games[t.game], tokenizer, n)
            of += [n] * len(t)
            taken += t.choice.tolist()
        ratio = log_ratio(theta, reference, [t.ids for t in some], states, temperature)
        of, taken = (torch.tensor(x, device=ratio.device) for x in (of, taken))
        each = ratio.gather(1, taken[:, None])[:, 0]  # (actions,)
        logit = each.new_zeros(len(some)).index_add(0, of, b * each)  # (trajectories,)
        won = torch.tensor([float(t.won) for t in some], device=logit.device)
        losses = F.binary_cross_entropy_with_logits(logit, won, reduction="none")
        right = ((logit > 0) == won.bool()).sum()
        return losses.sum() / share, {"loss": (losses.detach().sum(), len(some)),
                                      "accuracy": (right, len(some))}

    return objective


def implicit_prm(c, i):
    """Train π_θ of iteration i, once. -> π_θ"""
    args, folder = c.args, c.run.path / f"iter{i}/implicit"

    def make(state):
        theta, reference, games = c.policy(i - 1), c.policy(i - 1), c.by_id
        some = train.roll_out(c, i)
        held = train.held_out(args, some)
        part = {out: [t for t in some if (task_folder(t.game) in held) == out]
                for out in (False, True)}
        objective = {out: outcome_objective(reference, part[out], games, c.tokenizer,
                                            args.dpo_temperature, args.implicit_beta)
                     for out in part}
        settings = prms.Fit(lr=args.prm_lr, batch=args.prm_batch, epochs=args.prm_epochs)
        log = prms.fit(theta, len(part[False]), objective[False], settings,
                       key(f"implicit {args.seed} {i}"), state, f"implicit PRM {i}")
        save_model(folder, theta, c.tokenizer)
        with torch.no_grad():
            new = [objective[True](theta, [n], 1, 0)[1] for n in range(len(part[True]))]
        return {"validation": {name: sum(float(one[name][0]) for one in new) / len(new)
                               for name in ("loss", "accuracy")}, "log": log}

    c.run.once(f"iter{i}/implicit", make, [folder / "model.safetensors"])
    return read_model(folder, c.device)[0]


def judge(c, i, prm):
    """-> judge(sequences, states) -> Q (B, C)"""
    theta, reference, args = implicit_prm(c, i), c.policy(i - 1), c.args
    return lambda sequences, states: args.implicit_beta * log_ratio(
        theta, reference, sequences, states, args.dpo_temperature)
