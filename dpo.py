"""Stage 3: max_π E[Q_i(s, a)] − β KL(π ‖ π_{i−1}), judged by the PRM at states of the rollouts.

With the candidates at hand π(·|s), KL and E[Q] are exact, and the objective has the closed form
π*(a|s) ∝ π_{i−1}(a|s)·exp(Q_i(s, a)/β) (METHOD, equation 1). Three losses approach it:

    dpo, hard labels    P1: two samples of the current policy, the one of higher Q is chosen
    dpo, soft labels    the same pairs, labelled σ(Q_a − Q_b): its optimum is the closed form
    exact               cross-entropy from the closed form, over all candidates

All states of a trajectory that an update looks at share one forward pass (candidates.py).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from candidates import draw, entropy, expected, kl, score_states, tilt, tree_builder
from optim import optimise
from rollout import replay
from utils import generator, key, mine, uniform

# --- losses, pure functions of tensors -----------------------------------------------------------


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, label=1.0):
    """−log σ(β[(log π(a⁺) − log π_ref(a⁺)) − (log π(a⁻) − log π_ref(a⁻))]) (P1, eq. 4).

    Arguments (N,): log-probabilities of whole actions. label (N,): the probability that a⁺ is
    preferred; the cross-entropy with it, 1 being the hard label. -> losses (N,)
    """
    margin = beta * ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected))
    return -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)


def exact_loss(log_pi, log_ref, q, beta):
    """KL(π* ‖ π) with the closed form π* ∝ π_ref·exp(Q/β): all (B, C). -> losses (B,)"""
    return kl(tilt(log_ref, q, beta), log_pi)


# --- training ------------------------------------------------------------------------------------

@dataclass
class Improve:
    """Settings of stage 3."""
    how: str = "exact"  # or "dpo"
    labels: str = "hard"  # of dpo; or "soft"
    beta: float = 0.05  # weight of the KL to the reference
    kl: float = 0.0  # weight of KL(π ‖ π_ref) at every state of the pass, added to the loss
    min_gap: float = 0.0  # a pair with a smaller gap in Q carries no preference
    lr: float = 1e-4
    updates: int = 300
    trajectories: int = 8  # in an update
    states: int = 8  # of each
    temperature: float = 0.3  # of π and π_ref
    weight_decay: float = 0.0


@dataclass
class Batch:
    """B states of an update: everything that a policy loss may look at."""
    log_pi: torch.Tensor  # (B, C) current policy, with gradient
    log_ref: torch.Tensor  # (B, C) reference policy
    q: torch.Tensor  # (B, C) what the judge says of each candidate
    choice: torch.Tensor  # (B,) the candidate that the rollout took
    trajectories: list  # B trajectories
    steps: list  # B numbers of actions in them
    keys: tuple  # RNG keys, one of them (B,)


def policy_loss(batch, settings):
    """The loss of stage 3 -> losses (B,), metrics {name: (sum, count)}."""
    log_pi, log_ref, q, beta = batch.log_pi, batch.log_ref, batch.q, settings.beta
    if settings.how == "exact":
        return exact_loss(log_pi, log_ref, q, beta), {}
    a, b = (draw(log_pi.detach(), uniform(*batch.keys, k))[:, None] for k in (0, 1))
    q_a, q_b = q.gather(1, a)[:, 0], q.gather(1, b)[:, 0]
    swap = (q_b > q_a)[:, None]
    chosen, rejected = torch.where(swap, b, a), torch.where(swap, a, b)
    gap = (q_a - q_b).abs()
    pick = lambda log_p, action: log_p.gather(1, action)[:, 0]
    label = gap.sigmoid() if settings.labels == "soft" else 1.0
    losses = dpo_loss(pick(log_pi, chosen), pick(log_pi, rejected), pick(log_ref, chosen),
                      pick(log_ref, rejected), beta, label)
    kept = (a != b)[:, 0] & (gap > settings.min_gap)
    return losses * kept, {"pairs": (kept.sum(), len(kept)), "gap": ((gap * kept).sum(), kept.sum())}


def prm_judge(prm, bounded=True):
    """-> judge(sequences, states): Q(s, ·) of all candidates (B, C); σ(f), or f if not bounded."""
    def judge(sequences, states):
        f = score_states(prm, sequences, states)
        return f.sigmoid() if bounded else f

    return judge


def improve(policy, reference, judge, tokenizer, trajectories, games, settings, *, seed,
            loss=policy_loss, **training):
    """Move the policy to the objective of stage 3 at random states of the trajectories. -> log

    games: {id: Game}, to replay for the candidates. judge(sequences, states) -> Q (B, C); None for
    a loss that asks no PRM. Logged at every state, exactly: kl (to the reference), distillation
    loss, E[Q] of the policy less that of the reference, entropy. training: options of `optimise`.
    """
    rng, tree_of = generator(seed, "improve"), tree_builder(tokenizer)
    n, per = len(trajectories), settings.trajectories
    laps = -(-settings.updates * per // n)
    order = np.concatenate([rng.permutation(n) for _ in range(laps)])

    def loss_of(step):
        picked = [trajectories[i] for i in order[step * per:(step + 1) * per]]
        numbers = mine(list(range(len(picked))))
        sequences, states, taken, of, steps, which = [], [], [], [], [], []
        for b, j in enumerate(numbers):
            t, rng = picked[j], generator(seed, "states", step, j)
            candidates = replay(t, games[t.game], tokenizer)
            sequences.append(t.ids)
            for k in sorted(rng.choice(len(t), min(len(t), settings.states), replace=False)):
                states.append((b, int(t.spans[k, 0]), tree_of(candidates[k])))
                taken.append(int(t.choice[k])), of.append(t), steps.append(int(k))
                which.append(j * 1000 + int(k))
        if not states:
            return None, {}
        T, B = settings.temperature, len(states)
        with torch.no_grad():
            log_ref = score_states(reference, sequences, states, T)
            q = judge(sequences, states) if judge else torch.zeros_like(log_ref)
        log_pi = score_states(policy, sequences, states, T)
        batch = Batch(log_pi, log_ref, q, torch.tensor(taken, device=log_pi.device), of, steps,
                      (seed, key("pairs"), step, np.array(which)))
        losses, metrics = loss(batch, settings)
        divergence = kl(log_pi, log_ref)
        total = sum(min(len(t), settings.states) for t in picked)
        with torch.no_grad():
            gain = expected(log_pi, q) - expected(log_ref, q)
            metrics |= {name: (x.detach().sum(), B) for name, x in (
                ("loss", losses), ("kl", divergence), ("gain", gain),
                ("distillation", exact_loss(log_pi, log_ref, q, settings.beta)),
                ("entropy", entropy(log_pi)))}
        return (losses + settings.kl * divergence).sum() / total, metrics

    return optimise(policy, loss_of, settings.updates, lr=settings.lr,
                    weight_decay=settings.weight_decay, **{"name": "policy", **training})
