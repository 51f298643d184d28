"""Group-relative advantage: a policy gradient from the rollouts of a game alone; no PRM.

Paper: none in P1 or P2. The baseline of Shao et al. 2024 (DeepSeekMath, GRPO).
Changes `policy_loss`: with R = 1 for a won and 0 for a lost rollout, every action of a rollout has
    the advantage (R − mean)/std over the rollouts of its group, which have the same game and start,
    16 with the default flags; 0 where all R are equal. The loss is PPO's clipped surrogate
    −min(ρA, clip(ρ, 0.8, 1.2)A), ρ = π(a|s)/π_{i−1}(a|s) with the rollout's stored π_{i−1}(a|s).
    The KL to the reference is exact, with weight --kl (here 0.04, GRPO's, by default).
    `start_prm`, `judge`: there is no PRM.
Command: python train.py --ablation grpo
Ours: not measured yet.
"""

from functools import partial

import numpy as np
import torch

from fast_alfworld.cli import UserError

CLIP = 0.2
start_prm = None


def flags(parser):
    parser.set_defaults(kl=0.04)


def check(args):
    if args.dpo_temperature != args.temperature:
        raise UserError("--ablation grpo: the ratio of probabilities needs --dpo-temperature and "
                        "--temperature to be equal")


def judge(c, i, prm):
    """No action is judged."""
    return None


def advantages(trajectories):
    """-> {(game, episode): advantage}"""
    groups = {}
    for t in trajectories:
        groups.setdefault((t.game, t.ids[:t.spans[0, 0]].tobytes()), []).append(t)
    out = {}
    for group in groups.values():
        rewards = np.array([t.reward for t in group])
        gap = rewards - rewards.mean()
        out |= {(t.game, t.episode): float(a) for t, a in zip(group, gap / (rewards.std() or 1))}
    return out


def clipped_loss(log_pi, log_old, advantage):
    """−min(ρA, clip(ρ)A): log-probabilities of the actions taken and advantages (B,). -> (B,)"""
    ratio = (log_pi - log_old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def grpo_loss(advantage_of, batch, settings):
    """-> losses (B,), metrics"""
    of, device = batch.trajectories, batch.log_pi.device
    old = torch.tensor([float(t.logp[k]) for t, k in zip(of, batch.steps)], device=device)
    A = torch.tensor([advantage_of[t.game, t.episode] for t in of], device=device)
    log_pi = batch.log_pi.gather(1, batch.choice.long()[:, None])[:, 0]
    outside = ((log_pi - old).exp() - 1).abs() > CLIP
    return clipped_loss(log_pi, old, A), {"outside_clip": (outside.sum(), len(A)),
                                          "with_signal": ((A != 0).sum(), len(A))}


def policy_loss(c, i, some):
    return partial(grpo_loss, advantages(some))
