"""Promise and progress with labels by ordinary SARSA(λ) instead of TD + GAE.

Paper: none. The fixed point of TD + GAE decays by γλ/(1−γ(1−λ)) a step, as M_t bootstraps on
    itself; that of SARSA(λ), which bootstraps on M_{t+1}, by γ.
Changes `prm_loss`: Q̂_t = γ((1−λ) M_{t+1} + λ Q̂_{t+1}), Q̂_{T−1} = R and Â_t = Q̂_t − M_{t−1}.
Command: python train.py --prm-loss promise-progress --targets td-gae --ablation sarsa
Ours: not measured yet.
"""

import numpy as np

from fast_alfworld.cli import UserError
import prm as prms


def check(args):
    if args.prm_loss != "promise-progress" or args.targets != "td-gae":
        raise UserError("--ablation sarsa: needs --prm-loss promise-progress --targets td-gae")


def sarsa(M, v_0, R, gamma, lam):
    """As `qestimate.td_gae`. -> Q̂_t and Q̂_t − M_{t−1}, each (T,)"""
    q_hat = np.full(len(M), R, np.float64)
    for t in reversed(range(len(M) - 1)):
        q_hat[t] = gamma * ((1 - lam) * M[t + 1] + lam * q_hat[t + 1])
    return q_hat, q_hat - np.concatenate([[v_0], M[:-1]])


def prm_loss(c, i, some):
    """-> objective(prm, picked, share, step)"""
    return prms.promise_progress_objective(
        some, lambda n, M, v_0: sarsa(M, v_0, some[n].reward, c.args.gamma, 0.95))
