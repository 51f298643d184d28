"""Stage 2: the process reward model Q(s, a) = σ(f(s, a)): losses, training, validation metrics.

The PRM is the policy's transformer with a scalar head f, read at the <end> of each action: one
causal forward pass over a trajectory gives Q at all its actions. An objective is a function
objective(prm, picked, share, step) -> (loss, metrics): `picked` are the numbers of the
trajectories, `share` the size of the whole batch, of which other ranks may have a part."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from candidates import prefix_tree, score_states
from optim import optimise, random_batches
from qestimate import pearson
from utils import generator, mine, pad


def bce_loss(f, q_hat, weight):
    """Soft binary cross-entropy of Q = σ(f) against Q̂, summed (P1, section 2.2, eq. 2).

    All arguments (N,). A weight of 1/count makes each distinct (s, a) count once. -> scalar"""
    return (weight * F.binary_cross_entropy_with_logits(f, q_hat, reduction="none")).sum()


def label_entropy(q_hat, weight):
    """What `bce_loss` cannot fall below: the labels' own entropy. -> scalar"""
    return -(weight * (torch.xlogy(q_hat, q_hat) + torch.xlogy(1 - q_hat, 1 - q_hat))).sum()


def bt_loss(f_better, f_worse):
    """−log σ(f(s, a⁺) − f(s, a⁻)) for pairs (N,) of the same state (P1, relative loss). -> (N,)"""
    return -F.logsigmoid(f_better - f_worse)


def promise_progress_loss(M, q_hat, advantage, beta):
    """(M_t − Q̂_t)² + β((M_t − M_{t−1}) − Â_t)² of one trajectory, all (T,) (P2). -> (T,)

    No second term at t = 0. The gradient goes through M_{t−1} too."""
    progress = (M[1:] - M[:-1] - advantage[1:]) ** 2
    return (M - q_hat) ** 2 + beta * F.pad(progress, (1, 0))


def hidden(prm, trajectories):
    """Hidden states of whole trajectories. -> (B, S, D)"""
    ids = pad([t.ids for t in trajectories]).to(prm.device)  # (B, S)
    return prm.ragged(ids, torch.tensor([len(t.ids) for t in trajectories]))


def at_actions(prm, trajectories, h=None):
    """f(s_t, a_t) at every action, read at its <end>: list of B tensors (T,)."""
    h = hidden(prm, trajectories) if h is None else h
    rows = [torch.from_numpy(t.spans[:, 1].astype(np.int64) - 1) for t in trajectories]
    return [prm.scores(h[b, ends.to(h.device)]) for b, ends in enumerate(rows)]


def at_start(prm, trajectories, h=None):
    """f at the <act> before the first action, which P2 reads as v_0. -> (B,)"""
    h = hidden(prm, trajectories) if h is None else h
    start = [int(t.spans[0, 0]) - 1 for t in trajectories]
    return prm.scores(h[range(len(start)), start])


def bce_objective(trajectories, labels):
    """Q near the labels [(q_hat (T,), weight (T,))] by `bce_loss`."""
    def objective(prm, picked, share, step):
        f = torch.cat(at_actions(prm, [trajectories[i] for i in picked]))
        q_hat, weight = (torch.from_numpy(np.concatenate([labels[i][k] for i in picked])).to(f)
                         for k in (0, 1))
        total = share * mean_weight
        loss = bce_loss(f, q_hat, weight) / total
        excess = loss.detach() - label_entropy(q_hat, weight) / total
        part = len(picked) / share  # of the batch: the parts of all ranks add up to 1
        return loss, {"loss": (loss.detach(), part), "excess": (excess, part)}

    mean_weight = np.mean([weight.sum() for _, weight in labels])  # of a trajectory
    return objective


def bt_objective(trajectories, pairs, tokenizer):
    """f higher for the better action of a state, by `bt_loss`; pairs as from `preference_pairs`."""
    def objective(prm, picked, share, step):
        states = []
        for b, i in enumerate(picked):
            t = trajectories[i]
            for k, worse in pairs[i]:
                pair = tuple(tokenizer.decode(ids) for ids in (t.ids[slice(*t.spans[k])], worse))
                states.append((b, int(t.spans[k, 0]), prefix_tree(pair, tokenizer)))
        part = len(picked) / share
        if not states:
            return None, {"loss": (0, part)}
        f = score_states(prm, [trajectories[i].ids for i in picked], states)  # (pairs, 2)
        loss = bt_loss(f[:, 0], f[:, 1]).sum() / (share * mean_pairs)
        right = (f[:, 0] > f[:, 1]).sum()
        return loss, {"loss": (loss.detach(), part), "accuracy": (right, len(f))}

    mean_pairs = np.mean([len(found) for found in pairs]) or 1
    return objective


def promise_progress_objective(trajectories, targets, beta=1.0):
    """Promise M = σ(f) near Q̂ and its change near Â by `promise_progress_loss` (P2).

    targets(i, M (T,), v_0) -> Q̂ (T,), Â (T,): of trajectory i, given the current PRM."""
    def objective(prm, picked, share, step):
        batch = [trajectories[i] for i in picked]
        h = hidden(prm, batch)
        M = [f.sigmoid() for f in at_actions(prm, batch, h)]
        v_0 = at_start(prm, batch, h.detach()).sigmoid().tolist()
        losses = []
        for i, m, v in zip(picked, M, v_0):
            q_hat, advantage = (torch.from_numpy(x).to(m)
                                for x in targets(i, m.detach().double().cpu().numpy(), v))
            losses.append(promise_progress_loss(m, q_hat, advantage, beta))
        loss = torch.cat(losses).sum() / (share * mean_length)
        return loss, {"loss": (loss.detach(), len(picked) / share)}

    mean_length = np.mean([len(t) for t in trajectories])
    return objective


@dataclass
class Fit:
    """Settings of stage 2."""
    lr: float = 1e-3
    batch: int = 16
    epochs: float = 1.0
    weight_decay: float = 0.1


def fit(prm, n, objective, settings, seed, state, name="PRM"):
    """Minimise an objective over n trajectories. -> log"""
    updates = max(1, round(settings.epochs * -(-n // settings.batch)))
    order = random_batches(generator(seed, "prm"), n, settings.batch, updates)

    def loss_of(step):
        here = mine(order[step])
        return objective(prm, here, settings.batch, step) if len(here) else (None, {})

    return optimise(prm, loss_of, updates, lr=settings.lr, state=state, name=name,
                    weight_decay=settings.weight_decay)


@torch.no_grad()
def score(prm, trajectories, batch=64):
    """f(s_t, a_t) of every action: list of (T,) arrays, in the order of the trajectories."""
    order = np.argsort([len(t.ids) for t in trajectories], kind="stable")
    out = [None] * len(order)
    for first in range(0, len(order), batch):
        picked = order[first:first + batch]
        for i, f in zip(picked, at_actions(prm, [trajectories[i] for i in picked])):
            out[i] = f.cpu().numpy()
    return out


@torch.no_grad()
def pair_accuracy(prm, trajectories, pairs, tokenizer):
    """How often f ranks two actions of a state as their Q̂ does; None without pairs."""
    right = [float(bt_objective([t], [found], tokenizer)(prm, [0], 1, 0)[1]["accuracy"][0])
             for t, found in zip(trajectories, pairs) if found]
    n = sum(map(len, pairs))
    return sum(right) / n if n else None


def validation_metrics(prm, trajectories, labels, returns, bins=10):
    """How good is Q on trajectories it has not seen?

    labels: as for `bce_objective`; returns (N,) of all actions. Calibration: (mean Q, mean return,
    actions) by bins of Q; `ece`: the mean gap. `excess_bce`: BCE less the labels' own entropy."""
    f = torch.from_numpy(np.concatenate(score(prm, trajectories)))
    q_hat, weight = (torch.from_numpy(np.concatenate([pair[k] for pair in labels])) for k in (0, 1))
    q = torch.sigmoid(f).numpy()
    bce, least = (float(x / weight.sum()) for x in (bce_loss(f, q_hat, weight),
                                                    label_entropy(q_hat, weight)))
    which = np.minimum((q * bins).astype(int), bins - 1)
    calibration = [(float(q[which == b].mean()), float(returns[which == b].mean()),
                    int((which == b).sum())) for b in range(bins) if (which == b).any()]
    ece = sum(abs(mean_q - mean_return) * n for mean_q, mean_return, n in calibration) / len(q)
    return {"actions": len(q), "bce": bce, "label_entropy": least, "excess_bce": bce - least,
            "ece": ece, "pearson_returns": pearson(q, returns), "pearson_q_hat": pearson(q, q_hat),
            "mean_q": float(q.mean()), "mean_return": float(returns.mean()),
            "calibration": calibration}
