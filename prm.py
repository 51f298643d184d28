"""Stage 2: the process reward model Q(s, a): losses as pure functions, its training, its scores, its report card.

The PRM is the policy's transformer with a scalar head f, read at the <end> of each action: one causal pass over a trajectory
gives Q at all its actions.
"""

import numpy as np
import torch
from torch.nn import functional as F

from common import generator, optimise, pad
from qestimate import pearson
from ranks import mine, summed


def bce_loss(f, q_hat, weight, total=None):
    """Soft binary cross-entropy of Q = sigmoid(f) against Q̂ (P1, eq. 2), each (s, a) by its weight; all arguments (N,). -> scalar

    total: the weight of the whole batch, where this is but a part of it.
    """
    return (weight * F.binary_cross_entropy_with_logits(f, q_hat, reduction="none")).sum() / (weight.sum() if total is None else total)


def label_entropy(q_hat, weight, total=None):
    """What `bce_loss` cannot fall below: the labels' own entropy; arguments as there. -> scalar"""
    entropy = -(torch.xlogy(q_hat, q_hat) + torch.xlogy(1 - q_hat, 1 - q_hat))
    return (weight * entropy).sum() / (weight.sum() if total is None else total)


def scores_at_actions(prm, h, spans):
    """f at the <end> of every action: hidden states h (B, S, D), spans list of (T, 2). -> (sum of T,), trajectory after trajectory."""
    row = torch.cat([torch.full((len(s),), b) for b, s in enumerate(spans)]).to(h.device)
    end = torch.cat([torch.as_tensor(s[:, 1] - 1, dtype=torch.long) for s in spans]).to(h.device)
    return prm.scores(h[row, end])


def answers_of(spans):
    """The places of the world's answers in a trajectory: all tokens between one action and the next. -> (tokens,)"""
    return np.concatenate([np.arange(end, start) for (_, end), (start, _) in zip(spans[:-1], spans[1:])] or [np.empty(0, np.int64)])


def answer_tokens(spans, device):
    """The same for a batch, list of (T, 2). -> row and place of every token of an answer, two (tokens,) tensors"""
    places = [answers_of(s) for s in spans]
    row, place = np.repeat(np.arange(len(spans)), [len(p) for p in places]), np.concatenate(places)
    return torch.from_numpy(row).to(device), torch.from_numpy(place).to(device)


def answers_loss(prm, h, ids, spans, total=None):
    """Cross-entropy of the world's answers: hidden states h (B, S, D), ids (B, S), spans list of (T, 2). -> scalar

    To tell what an action will bring is most of what there is to know about its value, and says more than a return does.
    total: the answers' tokens in the whole batch, where this is but a part of it.
    """
    row, place = answer_tokens(spans, h.device)
    losses = F.cross_entropy(prm.logits(h[row, place - 1]), ids[row, place], reduction="sum")
    return losses / max(1, len(place) if total is None else total)


def batches(lengths, batch, rng, pool=8):
    """An endless stream of index arrays: shuffled epochs, batches of neighbours in length (less padding) out of pools of `pool` batches."""
    while True:
        order = rng.permutation(len(lengths))
        for start in range(0, len(order), batch * pool):
            part = order[start:start + batch * pool]
            part = part[np.argsort(lengths[part], kind="stable")]
            cuts = [part[i:i + batch] for i in range(0, len(part), batch)]
            for i in rng.permutation(len(cuts)):
                yield cuts[i]


def epoch_steps(n, batch, pool=8):
    """Updates in one epoch of `batches`."""
    whole, rest = divmod(n, batch * pool)
    return whole * pool + -(-rest // batch)


def train_prm(prm, tokenizer, trajectories, labels, counts, *, epochs, lr, batch, seed, state, obs_weight=0.0, renumber=True, name="PRM"):
    """Fit Q to the labels [(q_hat (T,), weight (T,))] of the trajectories, and `obs_weight` times the world's answers. -> log.

    counts: {game id: {base name: n}}; with `renumber` every pass tells each trajectory with other instance numbers, under
    which Q does not change.
    """
    lengths = np.array([len(t.ids) for t in trajectories])
    steps = max(1, round(epochs * epoch_steps(len(lengths), batch)))
    plan = [i for _, i in zip(range(steps), batches(lengths, batch, generator(seed, "prm")))]
    device = prm.cos.device

    def loss_of(step):
        rng = generator(seed, "prm numbers", step)
        told = [tokenizer.renumber(trajectories[i].ids, counts[trajectories[i].game], rng) if renumber else trajectories[i].ids for i in plan[step]]
        total = sum(float(labels[i][1].sum()) for i in plan[step])  # of the batch; this rank has a part of it
        total_answers = sum(len(answers_of(trajectories[i].spans)) for i in plan[step])
        picked, told = mine(plan[step]), mine(told)
        if not told:
            return None, {}
        ids, spans = pad(told).to(device), [trajectories[i].spans for i in picked]
        h = prm(ids)  # (B, S, D)
        q_hat, weight = (torch.from_numpy(np.concatenate([labels[i][k] for i in picked])).to(device) for k in (0, 1))
        loss = bce_loss(scores_at_actions(prm, h, spans), q_hat, weight, total)
        metrics = {"loss": summed(loss.detach()), "excess": summed(loss.detach() - label_entropy(q_hat, weight, total))}
        if obs_weight:
            answers = answers_loss(prm, h, ids, spans, total_answers)
            metrics["answers"] = summed(answers.detach())
            loss = loss + obs_weight * answers
        return loss, metrics

    return optimise(prm, loss_of, steps, lr, state, name)


@torch.no_grad()
def score(prm, trajectories, batch=64):
    """f(s_t, a_t) of every action: list of (T,) float32 arrays, in the order of the trajectories."""
    order = np.argsort([len(t.ids) for t in trajectories], kind="stable")
    out = [None] * len(trajectories)
    for start in range(0, len(order), batch):
        picked = order[start:start + batch]
        h = prm(pad([trajectories[i].ids for i in picked]).to(prm.cos.device))
        f = scores_at_actions(prm, h, [trajectories[i].spans for i in picked]).cpu().numpy()
        for i, part in zip(picked, np.split(f, np.cumsum([len(trajectories[i]) for i in picked])[:-1])):
            out[i] = part
    return out


def report(prm, trajectories, labels, table, bins=10):
    """How good is Q on trajectories it has not seen? Loss above the labels' entropy, calibration, correlation with returns.

    Calibration is against discounted returns: `calibration` lists (mean Q, mean return, actions) by bins of Q; `ece` is the mean
    gap between the two, weighted by actions.
    """
    f = torch.from_numpy(np.concatenate(score(prm, trajectories)))
    q_hat, weight = (torch.from_numpy(np.concatenate([l[k] for l in labels])) for k in (0, 1))
    q, G = torch.sigmoid(f).numpy(), table["returns"]
    bce, entropy = float(bce_loss(f, q_hat, weight)), float(label_entropy(q_hat, weight))
    which = np.minimum((q * bins).astype(int), bins - 1)
    calibration = [(float(q[which == b].mean()), float(G[which == b].mean()), int((which == b).sum())) for b in range(bins) if (which == b).any()]
    return {"bce": bce, "label_entropy": entropy, "excess_bce": bce - entropy, "ece": sum(abs(a - b) * n for a, b, n in calibration) / len(q),
            "pearson_returns": pearson(q, G), "pearson_q_hat": pearson(q, q_hat), "mean_q": float(q.mean()), "mean_return": float(G.mean()),
            "calibration": calibration, "actions": len(q)}
