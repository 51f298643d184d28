"""Stage 3: max E[Q_i(s, a)] − β KL(π ‖ π_{i−1}) by online DPO.

At states of the rollouts the *current* policy proposes actions, a score picks the best and the worst of them as chosen and
rejected, and DPO moves the policy against a frozen reference. All states of a trajectory, and all actions at each, share one
forward pass: the trajectory is the trunk of a tree whose branches are the proposed actions.

        <task> … <act> go to desk 1 <end> You … <act> take pen 1 … <end>        trunk: causal
                     ├ go to bed 1 <end>                 ├ open desk 1 <end>      branches: see the trunk up to their <act>,
                     └ go to shelf 2 <end>               └ look <end>             and themselves
"""

import numpy as np
import torch
from torch.nn import functional as F

from common import generator, key, optimise, pad
from model import Cache
from rollout import action_logprobs, branch


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """−log σ(β[(log π(a⁺) − log π_ref(a⁺)) − (log π(a⁻) − log π_ref(a⁻))]) (Rafailov et al. 2023, eq. 7; P1, eq. 4).

    Arguments (N,): log-probabilities summed over an action's tokens, <end> included, at the sampling temperature. -> losses
    (N,) and the implicit rewards (N,) of chosen and rejected, detached.
    """
    chosen, rejected = beta * (pi_chosen - ref_chosen), beta * (pi_rejected - ref_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


class Tree:
    """A batch of trunks (trajectories) with branches (actions) as padded sequences for one forward pass.

    trunks: list of (L,) id arrays. branches: list of (trunk number, start, action ids, forced), `start` being the place of the
    action in its trunk: a branch sees trunk[:start]. forced: the final <end> was not sampled and carries no log-probability.
    """

    def __init__(self, trunks, branches, device="cpu"):
        B, mine = len(trunks), [[] for _ in trunks]
        for n, branch in enumerate(branches):
            mine[branch[0]].append(n)
        reach = [max([branches[n][1] for n in m], default=0) for m in mine]  # no branch looks at the trunk beyond here
        ids, positions, owner, limit = [], [], [], []
        self.end = [None] * len(branches)  # place of each branch's <end>
        token_branch, token_row, token_place, token_before = [], [], [], []
        for b in range(B):
            L = reach[b]
            i, p = list(trunks[b][:L]), list(range(L))
            o, l = [-1] * L, [-1] * L  # trunk tokens: owner -1
            for n in mine[b]:
                _, start, action, forced = branches[n]
                for k, token in enumerate(action):
                    if not (forced and k == len(action) - 1):
                        token_branch.append(n), token_row.append(b), token_place.append(len(i))
                        token_before.append(len(i) - 1 if k else start - 1)  # whose hidden state predicts this token
                    i.append(token), p.append(start + k), o.append(n), l.append(start)
                self.end[n] = len(i) - 1
            ids.append(i), positions.append(p), owner.append(o), limit.append(l)
        to = lambda x: torch.as_tensor(x, dtype=torch.long).to(device)
        self.ids, self.positions = pad(ids).to(device), pad(positions).to(device)  # (B, S)
        owner, limit, S = pad(owner, -2).to(device), pad(limit, 0).to(device), self.ids.shape[1]
        trunk = (owner == -1)[:, None, :]  # columns that are trunk
        causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        self.mask = causal & ((owner[:, :, None] == owner[:, None, :]) | (trunk & (self.positions[:, None, :] < limit[:, :, None])))
        self.end, self.row = to(self.end), to([branch[0] for branch in branches])
        self.token_branch, self.token_row, self.token_place, self.token_before = map(to, (token_branch, token_row, token_place, token_before))

    def logprobs(self, policy, temperature):
        """Log-probability of each branch's action, summed over its sampled tokens: (branches,)."""
        h = policy(self.ids, self.positions, self.mask)  # (B, S, D)
        logp = action_logprobs(policy.logits(h[self.token_row, self.token_before]), temperature)  # (tokens, V)
        logp = logp.gather(-1, self.ids[self.token_row, self.token_place][:, None])[:, 0]
        return logp.new_zeros(len(self.end)).index_add(0, self.token_branch, logp)

    def scores(self, prm):
        """The PRM's f of each branch's action: (branches,)."""
        return prm.scores(prm(self.ids, self.positions, self.mask)[self.row, self.end])


@torch.no_grad()
def propose(policy, tokenizer, trunks, states, n, temperature, names):
    """Sample n actions at each state [(trunk number, start)], with the trunks encoded once.

    names: integers that name the random numbers. -> list over states of n (action ids, forced).
    """
    device = policy.cos.device
    lengths = np.array([len(t) for t in trunks])
    trunk_cache = Cache(policy.config, len(trunks), int(lengths.max()), device)
    rows = np.repeat(np.arange(len(trunks)), lengths)
    slots = np.concatenate([np.arange(l) for l in lengths])
    to = lambda a: torch.from_numpy(a).to(device)
    h = policy.extend(to(np.concatenate(trunks).astype(np.int64)), to(rows), to(slots), trunk_cache)  # (tokens, D)
    owner, start = np.array(states).T
    last = (lengths.cumsum() - lengths)[owner] + start - 1  # the <act> before the action
    names = np.stack([np.full(len(owner), name) for name in names] + [np.arange(len(owner))])
    drawn = branch(policy, tokenizer, trunk_cache, owner, start, h[to(last)], n, names, temperature)
    return [[(action, forced) for action, _, forced in state] for state in drawn]


def online_dpo(policy, reference, score, tokenizer, trajectories, counts, *, pairs, beta, lr, temperature, seed, state, proposals=2,
               trunks=16, states_per_trunk=8, min_gap=0.0, renumber=True, name="DPO"):
    """Improve `policy` against the frozen `reference` by preferences of `score`(Tree) -> (branches,). -> log.

    `pairs`: states at which the policy proposes, in all. Each gives one pair, the best and the worst of `proposals` samples (the
    paper's pair is two samples). States where all read the same, or where the two scores differ by no more than `min_gap`, carry
    no preference and cost no backward pass.
    """
    steps = max(1, pairs // (trunks * states_per_trunk))
    device = policy.cos.device

    def loss_of(step):
        rng = generator(seed, "dpo", step)
        picked = [trajectories[i] for i in rng.choice(len(trajectories), trunks, replace=len(trajectories) < trunks)]
        ids = [tokenizer.renumber(t.ids, counts[t.game], rng) if renumber else t.ids.astype(np.int64) for t in picked]
        states = [(b, int(t.spans[k, 0])) for b, t in enumerate(picked)
                  for k in sorted(rng.choice(len(t), min(len(t), states_per_trunk), replace=False))]
        sampled = propose(policy, tokenizer, ids, states, proposals, temperature, (seed, key("propose"), step))
        distinct = [first_of_each(drawn, lambda drawn: tokenizer.decode(drawn[0]).strip()) for drawn in sampled]
        branches = [(*state, *action) for state, drawn in zip(states, distinct) if len(drawn) > 1 for action in drawn]
        counts_of = [len(drawn) for drawn in distinct if len(drawn) > 1]
        metrics = {"pairs/differ": len(counts_of) / len(states)}
        if not branches:
            return None, metrics
        with torch.no_grad():
            q = score(Tree(ids, branches, device)).float().cpu().split(counts_of)
        ends = np.cumsum(counts_of)
        order = [(first + int(f.argmax()), first + int(f.argmin())) for first, f in zip(ends - counts_of, q) if f.max() - f.min() > min_gap]
        gap = torch.stack([f.max() - f.min() for f in q])
        metrics.update({"score/mean": torch.cat(q).mean(), "score/gap": gap.mean(), "pairs/kept": len(order) / len(states)})
        if not order:
            return None, metrics
        tree = Tree(ids, [branches[i] for pair in order for i in pair], device)  # chosen, rejected, chosen, …
        with torch.no_grad():
            ref = tree.logprobs(reference, temperature).view(-1, 2)
        pi = tree.logprobs(policy, temperature).view(-1, 2)
        losses, chosen, rejected = dpo_loss(pi[:, 0], pi[:, 1], ref[:, 0], ref[:, 1], beta)
        metrics.update({"loss": losses.detach().mean(), "rewards/margins": (chosen - rejected).mean(),
                        "rewards/accuracies": (chosen > rejected).float().mean(), "objective/kl": (pi.detach() - ref).mean()})
        return losses.mean(), metrics

    return optimise(policy, loss_of, steps, lr, state, name)


def first_of_each(things, name):
    """Drop duplicates by name(thing), keeping the order."""
    kept = {}
    for thing in things:
        kept.setdefault(name(thing), thing)
    return list(kept.values())
