"""Trajectories with other actions beside their own, as one sequence each.

        <task> … <act> go to desk 1 <end> You … <act> take pen 1 … <end>        trunk: causal
                     ├ go to bed 1 <end>                 ├ open desk 1 <end>      branches: see the trunk up to their <act>,
                     └ go to shelf 2 <end>               └ look <end>             and themselves

One forward pass gives log-probabilities or scores of all of them: of the proposals that DPO compares, of the policy's next
actions at the expert's states in InversePRM, of the actions that were taken at one state in several rollouts.
"""

import numpy as np
import torch

from common import pad
from model import Cache
from rollout import action_logprobs, branch


class Tree:
    """A batch of trunks (trajectories) with branches (actions) as padded sequences for one forward pass.

    trunks: list of (L,) id arrays. branches: list of (trunk number, start, action ids, forced), `start` being the place of the
    action in its trunk: a branch sees trunk[:start]. forced: the final <end> was not sampled and carries no log-probability.
    Trunks are cut behind what their branches see, and those without branches left out, but for the trunk numbers in `whole`.
    `trunks`: the trunk number of each row. Shapes: ids, positions (B, S), lengths (B,), mask (B, S, S) of row token × column token; of each branch
    branch_row, branch_end, the place of its <end>, (branches,); of each sampled token of a branch its token_branch, token_row, token_place, and
    token_before, the place whose hidden state predicts it, (tokens,).
    """

    def __init__(self, trunks, branches, device="cpu", whole=()):
        mine = [[] for _ in trunks]
        for n, (b, *_) in enumerate(branches):
            mine[b].append(n)
        self.trunks = [b for b, m in enumerate(mine) if m or b in whole]
        ids, positions, owner, limit = [], [], [], []
        self.branch_end = [None] * len(branches)
        token_branch, token_row, token_place, token_before = [], [], [], []
        for row, b in enumerate(self.trunks):
            L = len(trunks[b]) if b in whole else max(branches[n][1] for n in mine[b])  # no branch looks at the trunk beyond here
            i, p = list(trunks[b][:L]), list(range(L))  # ids and positions,
            o, l = [-1] * L, [-1] * L  # whose token it is (-1: the trunk's), and how much of the trunk it sees
            for n in mine[b]:
                _, start, action, forced = branches[n]
                for k, token in enumerate(action):
                    if not (forced and k == len(action) - 1):
                        token_branch.append(n), token_row.append(row), token_place.append(len(i))
                        token_before.append(len(i) - 1 if k else start - 1)  # whose hidden state predicts this token
                    i.append(token), p.append(start + k), o.append(n), l.append(start)
                self.branch_end[n] = len(i) - 1
            ids.append(i), positions.append(p), owner.append(o), limit.append(l)
        to = lambda x: torch.as_tensor(x, dtype=torch.long).to(device)
        self.ids, self.positions, self.lengths = pad(ids).to(device), pad(positions).to(device), to(list(map(len, ids)))
        owner, limit, S = pad(owner, -2).to(device), pad(limit, 0).to(device), self.ids.shape[1]
        trunk = (owner == -1)[:, None, :]  # columns that are trunk
        causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        self.mask = causal & ((owner[:, :, None] == owner[:, None, :]) | (trunk & (self.positions[:, None, :] < limit[:, :, None])))
        self.branch_end, self.branch_row = to(self.branch_end), to([self.trunks.index(b) for b, *_ in branches])
        self.token_branch, self.token_row, self.token_place, self.token_before = map(to, (token_branch, token_row, token_place, token_before))

    def hidden(self, model):
        """(B, S, D): the trunks' tokens first, then those of their branches."""
        return model.ragged(self.ids, self.lengths, self.positions, self.mask)

    def logprobs(self, policy, temperature, h=None):
        """Log-probability of each branch's action, summed over its sampled tokens: (branches,). h: the policy's `hidden`, if at hand."""
        h = self.hidden(policy) if h is None else h
        logp = action_logprobs(policy.logits(h[self.token_row, self.token_before]), temperature)  # (tokens, V)
        logp = logp.gather(-1, self.ids[self.token_row, self.token_place][:, None])[:, 0]
        return logp.new_zeros(len(self.branch_end)).index_add(0, self.token_branch, logp)

    def scores(self, prm):
        """The PRM's f of each branch's action: (branches,)."""
        return prm.scores(self.hidden(prm)[self.branch_row, self.branch_end])


@torch.no_grad()
def propose(policy, trunks, states, n, temperature, names):
    """Sample n actions at each state [(trunk number, start)], with the trunks encoded once.

    names: integers, or arrays (states,) of them, that name the random numbers. -> list over states of n (action ids, forced).
    """
    device = policy.cos.device
    lengths = np.array([max([start for b, start in states if b == n], default=1) for n in range(len(trunks))])  # no state sees more
    order = np.argsort(lengths, kind="stable")  # rows of like length side by side: they are attended together
    lengths, trunks = lengths[order], [trunks[n][:lengths[n]] for n in order]
    trunk_cache = Cache(policy.config, len(trunks), int(lengths.max()), device)
    rows = np.repeat(np.arange(len(trunks)), lengths)
    slots = np.concatenate([np.arange(l) for l in lengths])
    to = lambda a: torch.from_numpy(a).to(device)
    h = policy.extend(to(np.concatenate(trunks).astype(np.int64)), to(rows), to(slots), trunk_cache)  # (tokens, D)
    owner, start = np.array(states).T
    owner = np.argsort(order)[owner]  # row of its trunk
    last = (lengths.cumsum() - lengths)[owner] + start - 1  # the <act> before the action
    drawn = branch(policy, trunk_cache, owner, start, h[to(last)], n, np.stack([np.broadcast_to(name, len(owner)) for name in names]), temperature)
    return [[(action, forced) for action, _, forced in state] for state in drawn]


def distinct(drawn, tokenizer):
    """Of actions (ids, …) the first of each text."""
    kept = {}
    for action in drawn:
        kept.setdefault(tokenizer.command(action[0]), action)
    return list(kept.values())
