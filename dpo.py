"""Stage 3: max_π E[Q_i(s, a)] − β KL(π ‖ π_{i−1}), judged by the PRM at states of the rollouts.

With the candidates at hand π(·|s), KL and E[Q] are exact, and the objective has the closed form
π*(a|s) ∝ π_{i−1}(a|s)·exp(Q_i(s, a)/β). Three losses approach it:

    dpo, hard labels    P1: two samples of the current policy, the one of higher Q is chosen
    dpo, soft labels    the same pairs, labelled σ(Q_a − Q_b): its optimum is the closed form
    exact               cross-entropy from the closed form, over all candidates

All states of a trajectory that an update looks at share one forward pass (candidates.py)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from candidates import draw, entropy, expected, kl, score_states, tilt
from optim import optimise, random_batches
from rollout import states_of
from utils import generator, key, mine, uniform


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta, label=1.0):
    """−log σ(β[(log π(a⁺) − log π_ref(a⁺)) − (log π(a⁻) − log π_ref(a⁻))]) (P1, eq. 4).

    All (N,): log-probabilities of whole actions; label: the probability that a⁺ is preferred, 1
    being the hard label of P1. -> cross-entropies (N,)"""
    margin = beta * ((pi_chosen - ref_chosen) - (pi_rejected - ref_rejected))
    return -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)


def exact_loss(log_pi, log_ref, q, beta):
    """KL(π* ‖ π) with the closed form π* ∝ π_ref·exp(Q/β): all (B, C). -> losses (B,)"""
    return kl(tilt(log_ref, q, beta), log_pi)


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
    states: int = 8  # of each trajectory
    temperature: float = 0.3  # of π and π_ref
    weight_decay: float = 0.0


@dataclass
class Batch:
    """B states of an update: everything that a policy loss may look at."""
    log_pi: torch.Tensor  # (B, C) current policy, with gradient
    log_ref: torch.Tensor  # (B, C) reference policy
    q: torch.Tensor | None  # (B, C) what the judge says of each candidate
    choice: torch.Tensor  # (B,) the candidate that the rollout took
    trajectories: list  # B trajectories
    steps: list  # B indices: which action of its trajectory
    keys: tuple  # RNG keys, one of them (B,)


def policy_loss(batch, settings):
    """The loss of stage 3 -> losses (B,), metrics {name: (sum, count)}."""
    log_pi, log_ref, q, beta = batch.log_pi, batch.log_ref, batch.q, settings.beta
    if settings.how == "exact":
        return exact_loss(log_pi, log_ref, q, beta), {}
    drawn = [draw(log_pi.detach(), uniform(*batch.keys, k)) for k in (0, 1)]
    pair = torch.stack(drawn, 1)  # (B, 2), of which the one of higher Q is chosen
    pair = pair.gather(1, q.gather(1, pair).argsort(dim=1, descending=True, stable=True))
    q_chosen, q_rejected = q.gather(1, pair).T
    gap = q_chosen - q_rejected
    label = gap.sigmoid() if settings.labels == "soft" else 1.0
    losses = dpo_loss(*log_pi.gather(1, pair).T, *log_ref.gather(1, pair).T, beta, label)
    kept = (pair[:, 0] != pair[:, 1]) & (gap > settings.min_gap)
    pairs = kept.sum()
    return losses * kept, {"pairs": (pairs, len(kept)), "gap": ((gap * kept).sum(), pairs)}


def prm_judge(prm, bounded=True):
    """-> judge(sequences, states): Q(s, ·) of all candidates (B, C); σ(f), or f if not bounded."""
    value = torch.sigmoid if bounded else lambda f: f
    return lambda sequences, states: value(score_states(prm, sequences, states))


def improve(policy, reference, judge, tokenizer, trajectories, games, settings, *, seed,
            loss=policy_loss, **training):
    """Move the policy to the objective of stage 3 at random states of the trajectories. -> log

    games: {id: Game}. judge(sequences, states) -> Q (B, C); None for a loss that needs no PRM.
    Logged at every state, exactly: kl (to the reference), entropy and, with a judge, distillation
    loss and gain in E[Q] over the reference. training: options of `optimise`."""
    order = random_batches(generator(seed, "improve"), len(trajectories), settings.trajectories,
                           settings.updates)

    def loss_of(step):
        picked = [trajectories[i] for i in order[step]]
        sequences, states, of, steps, which = [], [], [], [], []
        for b, j in enumerate(mine(list(range(len(picked))))):
            t, rng = picked[j], generator(seed, "states", step, j)
            every = states_of(t, games[t.game], tokenizer, b)
            sequences.append(t.ids)
            for k in sorted(rng.choice(len(t), min(len(t), settings.states), replace=False)):
                states.append(every[k]), of.append(t), steps.append(int(k))
                which.append(j * 1000 + int(k))
        if not states:
            return None, {}
        T, B = settings.temperature, len(states)
        with torch.no_grad():
            log_ref = score_states(reference, sequences, states, T)
            q = judge(sequences, states) if judge else None
        log_pi = score_states(policy, sequences, states, T)
        taken = torch.tensor([int(t.choice[k]) for t, k in zip(of, steps)], device=log_pi.device)
        losses, metrics = loss(Batch(log_pi, log_ref, q, taken, of, steps,
                                     (seed, key("pairs"), step, np.array(which))), settings)
        now, divergence = log_pi.detach(), kl(log_pi, log_ref)
        measured = {"loss": losses, "kl": divergence, "entropy": entropy(now)}
        if judge:
            measured |= {"gain": expected(now, q) - expected(log_ref, q),
                         "distillation": exact_loss(now, log_ref, q, settings.beta)}
        total = sum(min(len(t), settings.states) for t in picked)
        return ((losses + settings.kl * divergence).sum() / total,
                metrics | {name: (x.detach().sum(), B) for name, x in measured.items()})

    return optimise(policy, loss_of, settings.updates, lr=settings.lr,
                    weight_decay=settings.weight_decay, **{"name": "policy", **training})
