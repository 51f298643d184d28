"""Stage 2: the process reward model Q(s, a): losses as pure functions, its training, its scores, its report card.

The PRM is the policy's transformer with a scalar head f, read at the <end> of each action: one causal pass over a trajectory
gives Q at all its actions. Read at the <act> before an action, the same head gives V of the state, which imitation in stage 3 asks for.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from common import generator, pad
from optim import optimise
from qestimate import pearson
from ranks import everyones, mine, summed
from tree import Tree


def bce_loss(f, q_hat, weight, total=None):
    """Soft binary cross-entropy of Q = sigmoid(f) against Q̂ (P1, eq. 2), each (s, a) by its weight; all arguments (N,). -> scalar

    total: what to divide by instead: the weight of the whole batch, or of an average one, where this is but a part of it.
    """
    return (weight * F.binary_cross_entropy_with_logits(f, q_hat, reduction="none")).sum() / (weight.sum() if total is None else total)


def label_entropy(q_hat, weight, total=None):
    """What `bce_loss` cannot fall below: the labels' own entropy; arguments as there. -> scalar"""
    entropy = -(torch.xlogy(q_hat, q_hat) + torch.xlogy(1 - q_hat, 1 - q_hat))
    return (weight * entropy).sum() / (weight.sum() if total is None else total)


def bt_loss(f_better, f_worse):
    """−log σ(f(s, a⁺) − f(s, a⁻)) for pairs (N,) of the same state (P1, relative loss; Bradley–Terry). -> losses (N,)"""
    return -F.logsigmoid(f_better - f_worse)


def promise_progress_loss(M, q_hat, advantage, beta):
    """(M_t − Q̂_t)² + β ((M_t − M_{t−1}) − Â_t)², the second not at t = 0, of one trajectory: all (T,), labels constant (P2). -> losses (T,)

    Gradient goes through M_{t−1} too.
    """
    return (M - q_hat) ** 2 + beta * F.pad((M[1:] - M[:-1] - advantage[1:]) ** 2, (1, 0))


def actions_of(trajectories):
    """The places where Q(s_t, a_t) is read: the <end> of each action. -> list of (T,) arrays"""
    return [t.spans[:, 1] - 1 for t in trajectories]


def states_of(trajectories):
    """The places where V(s_t) is read: the <act> behind each observation. -> list of (T,) arrays"""
    return [t.spans[:, 0] - 1 for t in trajectories]


def flat(places, device):
    """B arrays of places (n,) -> row and place of each, two (sum of n,) tensors."""
    row = np.repeat(np.arange(len(places)), [len(p) for p in places])
    return tuple(torch.as_tensor(a, dtype=torch.long).to(device) for a in (row, np.concatenate(places)))


def scores_at(prm, h, places):
    """f behind the tokens at `places`, a list of B arrays (n,), of hidden states h (B, S, D). -> (sum of n,), row after row."""
    return prm.scores(h[flat(places, h.device)])


def answers_of(spans):
    """The places of the world's answers in a trajectory: all tokens between one action and the next. -> (tokens,)"""
    return np.concatenate([np.arange(end, start) for (_, end), (start, _) in zip(spans[:-1], spans[1:])] or [np.empty(0, np.int64)])


def answer_tokens(spans, device):
    """The same for a batch, list of (T, 2). -> row and place of every token of an answer, two (tokens,) tensors"""
    return flat([answers_of(s) for s in spans], device)


def answers_loss(prm, h, ids, spans, total=None):
    """Cross-entropy of the world's answers: hidden states h (B, S, D), ids (B, S), spans list of (T, 2). -> scalar

    To tell what an action will bring is most of what there is to know about its value, and says more than a return does.
    total: the answers' tokens in the whole batch, where this is but a part of it.
    """
    row, place = answer_tokens(spans, h.device)
    losses = F.cross_entropy(prm.logits(h[row, place - 1]), ids[row, place], reduction="sum")
    return losses / max(1, len(place) if total is None else total)


def batches(n, batch, rng):
    """An endless stream of index arrays: shuffled epochs of 0 … n − 1.

    At random, not by length: a long episode is a lost one, and a PRM that sees won and lost ones in turn learns less,
    and hopes for too much (LOG.md).
    """
    while True:
        order = rng.permutation(n)
        yield from (order[start:start + batch] for start in range(0, n, batch))


@dataclass
class Objective:
    """What train_prm minimises: `loss`, of the scores f read at `places` of each trajectory."""
    loss: Callable  # (f: list of (n,) tensors, picked: their trajectories' numbers, total) -> scalar, {metric: (sum, count)}
    places: list  # of each trajectory: (n,) array, tokens behind which f is read; those of branches lie behind its own
    weights: list  # of each trajectory in the loss; `total`: of an average batch of this size
    branches: list = None  # of each trajectory: [(start, ids)], other actions


def fit_labels(labels, places):
    """Q near labels [(q_hat (n,), weight (n,))], by `bce_loss`."""
    def loss(f, picked, total):
        q_hat, weight = (torch.from_numpy(np.concatenate([labels[i][k] for i in picked])).to(f[0].device) for k in (0, 1))
        loss = bce_loss(torch.cat(f), q_hat, weight, total)
        return loss, {"excess": summed(loss.detach() - label_entropy(q_hat, weight, total))}

    return Objective(loss, places, [float(weight.sum()) for _, weight in labels])


def prefer(trajectories, pairs):
    """f higher for the better of two actions of one state, by `bt_loss`: pairs as from `preference_pairs`."""
    places, branches = [], []
    for t, found in zip(trajectories, pairs):
        # the <end>s of the branches, as a Tree with `whole` lays them out: behind the trunk, in this order
        others = np.cumsum([len(t.ids), *(len(ids) for _, ids in found)])[1:] - 1
        places.append(np.concatenate([t.spans[[k for k, _ in found], 1] - 1, others]) if found else np.empty(0, np.int64))
        branches.append([(int(t.spans[k, 0]), ids) for k, ids in found])

    def loss(f, picked, total):
        better, worse = (torch.cat(side) for side in zip(*(scores.chunk(2) for scores in f)))
        return bt_loss(better, worse).sum() / total, {"accuracy": ((better > worse).sum(), len(better))}

    return Objective(loss, places, list(map(len, pairs)), branches)


def promise_and_progress(trajectories, targets, beta):
    """Promise M = σ(f) near Q̂ and its change near Â, by `promise_progress_loss`: targets(number of the trajectory, M (T,)) -> Q̂, Â."""
    def loss(f, picked, total):
        M = [scores.sigmoid() for scores in f]
        labels = [[torch.tensor(x, dtype=m.dtype, device=m.device) for x in targets(i, m.detach().double().cpu().numpy())] for i, m in zip(picked, M)]
        losses = torch.cat([promise_progress_loss(m, *label, beta) for m, label in zip(M, labels)])
        return losses.sum() / total, {"promise": (sum(((m - q_hat) ** 2).sum().detach() for m, (q_hat, _) in zip(M, labels)), len(losses))}

    return Objective(loss, actions_of(trajectories), [len(t) for t in trajectories])


def train_prm(prm, trajectories, objective, tell, *, epochs, lr, batch, seed, state, value=None, obs_weight=0.0, name="PRM"):
    """Fit f to an Objective over the trajectories, to another one for the states' values, and `obs_weight` times the world's answers. -> log.

    tell(ids, game id, rng) -> ids: how a trajectory is told this time (`tellings.teller`), with other names, under which its labels stay.
    """
    steps = max(1, round(epochs * -(-len(trajectories) // batch)))
    plan = [i for _, i in zip(range(steps), batches(len(trajectories), batch, generator(seed, "prm")))]
    device = prm.cos.device
    goals = {"": objective, **({"value/": value} if value else {})}
    weights = {kind: np.mean(goal.weights) or 1 for kind, goal in goals.items()}  # of a trajectory
    answered = np.mean([len(answers_of(t.spans)) for t in trajectories])

    def told(i, rng):
        """Ids of a trajectory, those of its branches behind them, with other numbers. -> ids (L,), branches [ids]"""
        ids, branches = trajectories[i].ids, [ids for _, ids in objective.branches[i]] if objective.branches else []
        everything = tell(np.concatenate([ids, *branches]), trajectories[i].game, rng)
        ids, *branches = np.split(everything, np.cumsum([len(ids), *map(len, branches)])[:-1])
        return ids, branches

    def loss_of(step):
        rng = generator(seed, "prm numbers", step)
        texts = [told(i, rng) for i in plan[step]]
        n, picked, texts = len(plan[step]), mine(plan[step]), mine(texts)
        if not len(picked):
            return None, {}
        trunks = [ids for ids, _ in texts]
        if objective.branches:
            branches = [(row, start, ids.tolist(), False) for row, (i, (_, others)) in enumerate(zip(picked, texts))
                        for (start, _), ids in zip(objective.branches[i], others)]
            tree = Tree(trunks, branches, device, whole=range(len(trunks)))
            ids, h = tree.ids, tree.hidden(prm)
        else:
            ids = pad(trunks).to(device)
            h = prm.ragged(ids, torch.tensor(list(map(len, trunks)), device=device))  # (B, S, D)
        loss, metrics = 0, {}
        for kind, goal in goals.items():
            places = [goal.places[i] for i in picked]
            # over what n trajectories weigh on average: by the batch's own weight, an action would weigh more in a batch of short episodes,
            # which are won ones
            part, measured = goal.loss(scores_at(prm, h, places).split([len(p) for p in places]), picked, n * weights[kind])
            metrics |= {kind + what: number for what, number in {"loss": summed(part.detach()), **measured}.items()}
            loss = loss + part
        if obs_weight:
            answers = answers_loss(prm, h, ids, [trajectories[i].spans for i in picked], n * answered)
            metrics["answers"] = summed(answers.detach())
            loss = loss + obs_weight * answers
        return loss, metrics

    return optimise(prm, loss_of, steps, lr, state, name)


def sigmoid(f):
    """Q of scores f, a numpy array."""
    return 1 / (1 + np.exp(-f))


@torch.no_grad()
def score(prm, trajectories, batch=64, places=actions_of):
    """f(s_t, a_t) of every action: list of (T,) float32 arrays, in the order of the trajectories; with `states_of`, f(s_t).
    Ranks share the batches."""
    order = np.argsort([len(t.ids) for t in trajectories], kind="stable")
    chunks = mine([order[start:start + batch] for start in range(0, len(order), batch)])
    f_of = {}
    for picked in tqdm(chunks, "score", unit="batch", leave=False, dynamic_ncols=True, disable=len(order) < 5000):  # minutes at full size
        h = prm(pad([trajectories[i].ids for i in picked]).to(prm.cos.device))
        f = scores_at(prm, h, places([trajectories[i] for i in picked])).cpu().numpy()
        f_of.update(zip(picked.tolist(), np.split(f, np.cumsum([len(trajectories[i]) for i in picked])[:-1])))
    f_of = {i: f for part in everyones(f_of) for i, f in part.items()}
    return [f_of[i] for i in range(len(order))]


@torch.no_grad()
def pair_gaps(prm, trajectories, pairs):
    """By how much Q (f of a PRM that compares actions of one state only) is higher for the better action of each pair: pairs as from
    `preference_pairs`. -> (pairs,) float64"""
    gaps = [np.zeros(0)]
    for t, found in zip(trajectories, pairs):
        if found:
            branches = [(0, int(t.spans[k, 0]), list(ids), False) for k, worse in found for ids in (t.ids[slice(*t.spans[k])], worse)]
            f = Tree([t.ids], branches, prm.cos.device).scores(prm).double().cpu()
            gaps.append((f if prm.config.head == "relative" else f.sigmoid()).view(-1, 2).diff(dim=1)[:, 0].neg().numpy())
    return np.concatenate(gaps)


def share_right(gaps):
    """How often the better action has the higher score; None where there are no pairs."""
    return float((gaps > 0).mean()) if len(gaps) else None


def report(prm, trajectories, labels, table, pairs, bins=10, ranks_alone=False):
    """How good is Q on trajectories it has not seen? Loss above the labels' entropy, calibration, correlation with returns.

    Calibration is against discounted returns: `calibration` lists (mean Q, mean return, actions) by bins of Q; `ece` is the mean
    gap between the two, weighted by actions. `pair_accuracy`: on `pairs` as from `preference_pairs`, all that is asked of a
    relative PRM, and with `ranks_alone` of one whose labels are no returns.
    """
    right = {"pair_accuracy": share_right(pair_gaps(prm, trajectories, pairs)), "pairs": sum(map(len, pairs))}
    if prm.config.head == "relative" or ranks_alone:
        return right
    f = torch.from_numpy(np.concatenate(score(prm, trajectories)))
    q_hat, weight = (torch.from_numpy(np.concatenate([l[k] for l in labels])) for k in (0, 1))
    q, G = torch.sigmoid(f).numpy(), table["returns"]
    bce, entropy = float(bce_loss(f, q_hat, weight)), float(label_entropy(q_hat, weight))
    which = np.minimum((q * bins).astype(int), bins - 1)
    calibration = [(float(q[which == b].mean()), float(G[which == b].mean()), int((which == b).sum())) for b in range(bins) if (which == b).any()]
    return {"bce": bce, "label_entropy": entropy, "excess_bce": bce - entropy, "ece": sum(abs(a - b) * n for a, b, n in calibration) / len(q),
            "pearson_returns": pearson(q, G), "pearson_q_hat": pearson(q, q_hat), "mean_q": float(q.mean()), "mean_return": float(G.mean()),
            "calibration": calibration, "actions": len(q), **right}
