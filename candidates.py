"""The candidate actions of a state: log π(a|s) and Q(s, a) of all of them from one forward pass.

A state comes with its admissible commands A(s). The policy is a softmax over whole commands,

    log π(a|s) = ℓ(a|s)/T − log Σ_{b∈A(s)} exp(ℓ(b|s)/T),     ℓ(a|s) = Σ_k log p(a_k | s, a_<k),

the <end> token included. The commands are laid out as a prefix tree behind the history:

    <task> … <obs> … <act> ─┬─ go to ─┬─ desk ─── 1 ─── <end>
                            │         └─ shelf ─┬─ 1 ── <end>
                            │                   └─ 2 ── <end>
                            └─ look ─── <end>

The policy reads log p of each token at its parent; the PRM reads Q(s, a) at the <end> of a. In
rollouts the history is in a KV cache (`extend`); in training whole trajectories and the trees of
several of their states share one forward pass (`score_states`). A batch of states is a (B, C)
tensor, padded with FORBIDDEN where a state has fewer than C candidates."""

from functools import lru_cache

import numpy as np
import torch
from torch.nn import functional as F

from model import NO_TREE
from tokenizer import END

FORBIDDEN = -1e9  # log-probability of padding; finite, so that 0 · log 0 is 0


class PrefixTree:
    """The prefix tree of some commands.

    ids (n + C,): tokens of the n inner nodes, parents first, then <end> for each command.
    depth (n + C,): distance from the <act>. seen (n + C, n + C) bool: node i sees node j, an
    ancestor or itself. paths: the nodes of each command without its <end>. For every token of every
    command, <end> included: `command`, its number; `token`; `before`, the node that predicts it, 0
    being the <act> and 1 + i node i."""

    def __init__(self, commands, encode):
        self.commands, self.paths, child_of = commands, [], {}
        ids, parent, depth, command, token, before = ([] for _ in range(6))
        for c, text in enumerate(commands):
            at, path = -1, []
            for k, t in enumerate(encode(text)):
                command.append(c), token.append(t), before.append(at + 1)
                if (at, t) not in child_of:
                    child_of[at, t] = len(ids)
                    ids.append(t), parent.append(at), depth.append(k)
                at = child_of[at, t]
                path.append(at)
            command.append(c), token.append(END), before.append(at + 1)
            self.paths.append(np.array(path, np.int64))
        self.n = len(ids)
        leaves = [path[-1] if len(path) else -1 for path in self.paths]
        self.ids = np.array(ids + [END] * len(commands), np.int64)
        self.depth = np.array(depth + [len(path) for path in self.paths], np.int64)
        self.seen = np.eye(len(self.ids), dtype=bool)
        for i, p in enumerate(parent + leaves):
            if p >= 0:
                self.seen[i] |= self.seen[p]
        self.command, self.token, self.before = map(np.array, (command, token, before))

    def __len__(self):
        return len(self.commands)

    def nodes(self, ends):
        """How many nodes a forward pass takes: a policy needs no <end> as input, a PRM does."""
        return len(self.ids) if ends else self.n


@lru_cache(4096)
def prefix_tree(commands, tokenizer):
    """The PrefixTree of a tuple of commands; states recur, so it is cached."""
    return PrefixTree(commands, tokenizer.encode)


def entropy(log_pi):
    """H(π(·|s)) in nats."""
    return -(log_pi.exp() * log_pi).sum(-1)


def kl(log_p, log_q):
    """KL(p ‖ q) in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def expected(log_pi, q):
    """E_{a~π}[Q(s, a)]."""
    return (log_pi.exp() * q).sum(-1)


def tilt(log_pi, q, beta):
    """log of π(a|s)·exp(Q(s,a)/β)/Z(s), which maximises E[Q] − β KL(· ‖ π) (dpo.py)."""
    return torch.log_softmax(log_pi + q / beta, dim=-1)


def draw(log_pi, u):
    """Sample one candidate a state by inverse CDF: log_pi (B, C), u (B,) in [0, 1) -> (B,)."""
    cdf = log_pi.double().exp().cumsum(-1)
    u = torch.as_tensor(u, dtype=torch.double, device=log_pi.device)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, u, right=True)[:, 0].clamp(max=log_pi.shape[1] - 1)


def log_policy(policy, h, trees, temperature):
    """log π(·|s) of B states; temperature 0 puts all probability on the most likely command.

    h (Σ(1 + n_b), D): for each state the hidden state of its <act>, then of its n_b inner nodes.
    -> (B, C)"""
    offsets = np.cumsum([0] + [1 + tree.n for tree in trees])[:-1]
    first = np.cumsum([0] + [len(tree) for tree in trees])[:-1]
    to = lambda arrays: torch.from_numpy(np.concatenate(arrays)).to(h.device)
    before = to([tree.before + o for tree, o in zip(trees, offsets)])
    command = to([tree.command + f for tree, f in zip(trees, first)])
    logits = policy.logits(h).float()  # (Σ(1 + n_b), V)
    token = to([tree.token for tree in trees])
    log_p = logits[before, token] - logits.logsumexp(-1)[before]  # of every token of every command
    likelihood = log_p.new_zeros(sum(map(len, trees))).index_add(0, command, log_p)  # ℓ
    likelihood = padded(likelihood, trees, FORBIDDEN)
    if temperature == 0:
        best = F.one_hot(likelihood.argmax(-1), likelihood.shape[1])
        return torch.where(best == 1, 0.0, FORBIDDEN)
    return torch.log_softmax((likelihood / temperature).clamp(min=FORBIDDEN), dim=-1)


def values(model, h, trees, temperature):
    """-> log π (B, C) of a policy; f (B, C) of a PRM, whose h (ΣC_b, D) is that of all <end>s."""
    if model.config.head == "score":
        return padded(model.scores(h).float(), trees, 0.0)
    return log_policy(model, h, trees, temperature)


def padded(values, trees, value):
    """(ΣC_b,) -> (B, C), a row a state."""
    rows = values.split([len(tree) for tree in trees])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def extend(model, cache, starts, chains, trees, temperature=1.0):
    """Append to each cache row a chain of tokens, then score the candidates behind it.

    starts (rows,): tokens the row holds. chains: the new ids of every row, up to an <act>; a row
    without tokens takes no part. trees: a PrefixTree for every row with tokens; its keys and values
    lie in the cache behind the chain. -> log π (B, C) of a policy, f (B, C) of a PRM"""
    ends = model.config.head == "score"
    tokens, behind, places, total, waiting = [], [], [], 0, iter(trees)
    for chain in chains:
        if not len(chain):
            tokens.append(NO_TREE[0]), behind.append(NO_TREE)
            continue
        tree = next(waiting)
        n = tree.nodes(ends)
        tokens.append(np.concatenate([chain, tree.ids[:n]]))
        behind.append((tree.depth[:n], tree.seen[:n, :n]))
        total += len(tokens[-1])
        places.append(np.arange(total - (len(tree) if ends else 1 + n), total))
    h = model.extend(cache, starts, tokens, behind)  # (N, D)
    return values(model, h[torch.from_numpy(np.concatenate(places)).to(h.device)], trees,
                  temperature)


def keep_branch(cache, rows, lengths, paths):
    """Of the trees behind lengths (B,) tokens of cache rows (B,), keep one path of nodes each.

    The keys and values are moved, not computed again."""
    counts = [len(path) for path in paths]
    rows, lengths = np.repeat(rows, counts), np.repeat(lengths, counts)
    target = np.concatenate([np.arange(n) for n in counts])
    to = lambda array: torch.from_numpy(array).to(cache.k.device)
    cache.move(to(rows), to(lengths + np.concatenate(paths)), to(lengths + target))


def score_states(model, sequences, states, temperature=1.0):
    """All candidates of B states of some sequences, with gradient.

    sequences: list of (L,) id arrays. states: list of (sequence number, start, PrefixTree), start
    being the place behind the state's <act>. -> log π (B, C) of a policy, f (B, C) of a PRM"""
    h = hidden(model, sequences, states)
    return values(model, h, [tree for *_, tree in states], temperature)


def hidden(model, sequences, states):
    """-> (N, D): the hidden states that `values` asks for, of `states` as in `score_states`.

    The sequences, cut behind their last state, come first; then the trees, in rows of their own."""
    ends, length = model.config.head == "score", {}
    for b, start, _ in states:
        length[b] = max(start, length.get(b, 0))
    own = sorted(length, key=length.get)  # neighbours of similar length
    order = sorted(range(len(states)), key=lambda n: states[n][1])
    rows = [(0, sequences[b][:length[b]], NO_TREE, r) for r, b in enumerate(own)]
    for b, start, tree in (states[n] for n in order):
        m = tree.nodes(ends)
        rows.append((start, tree.ids[:m], (tree.depth[:m], tree.seen[:m, :m]), own.index(b)))
    starts, tokens, behind, parents = zip(*rows)
    h = model.extend(None, np.array(starts), tokens, behind, np.array(parents))
    offsets, places = np.cumsum([0, *map(len, tokens)]), [None] * len(states)
    for n, row in zip(order, range(len(own), len(rows))):
        act, nodes = offsets[parents[row]] + starts[row] - 1, np.arange(*offsets[row:row + 2])
        places[n] = nodes[-len(states[n][2]):] if ends else np.append(act, nodes)
    return h[torch.from_numpy(np.concatenate(places)).to(h.device)]
