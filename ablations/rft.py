"""Rejection-sampling fine-tuning: imitate the actions of won rollouts; no PRM.

Paper: a strong baseline in other work on agents (RFT, IPR); P1 and P2 have no number for it.
Changes `policy_loss`: −log π(a|s) over the candidates for the actions of won rollouts, at the
    temperature of stage 3; nothing from lost ones. `start_prm`, `judge`: there is no PRM.
Command: python train.py --ablation rft
Ours: 4,000 rollouts, three seeds: 71.9 → 75.7 % of dev, 70.2 → 75.9 of valid_seen; the default with
    the PRM 79.4 and 83.1.
"""

import torch

start_prm = None


def judge(c, i, prm):
    """No action is judged."""
    return None


def rft_loss(batch, settings):
    """−log π(a|s) where the rollout was won, else 0. -> losses (B,), metrics"""
    won = torch.tensor([t.won for t in batch.trajectories], device=batch.log_pi.device)
    taken = batch.log_pi.gather(1, batch.choice.long()[:, None])[:, 0]
    return torch.where(won, -taken, 0.0), {"won": (won.sum(), len(won))}


def policy_loss(c, i, some):
    return rft_loss
