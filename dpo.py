"""Stage 3: max E[Q_i(s, a)] − β KL(π ‖ π_{i−1}) by online DPO.

At states of the rollouts the *current* policy proposes actions, a score picks the best and the worst of them as chosen and
rejected, and DPO moves the policy against a frozen reference. All states of a trajectory, and all actions at each, share one
forward pass (tree.py).
"""

import numpy as np
import torch
from torch.nn import functional as F

from common import generator, key, pad
from optim import optimise
from prm import batches
from ranks import mine, summed
from tree import Tree, distinct, propose


def dpo_loss(pi_chosen, pi_rejected, ref_chosen, ref_rejected, beta):
    """−log σ(β[(log π(a⁺) − log π_ref(a⁺)) − (log π(a⁻) − log π_ref(a⁻))]) (Rafailov et al. 2023, eq. 7; P1, eq. 4).

    Arguments (N,): log-probabilities summed over an action's tokens, <end> included, at the sampling temperature. -> losses
    (N,) and the implicit rewards (N,) of chosen and rejected, detached.
    """
    chosen, rejected = beta * (pi_chosen - ref_chosen), beta * (pi_rejected - ref_rejected)
    return -F.logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def unlikelihood(logprobs, slack=0.05):
    """−log(1 − π(a|s) + slack), of an action that one should not do again
    (Welleck et al. 2020, eq. 4, of whole actions: most tokens of a wrong one are right).

    logprobs (N,): log π(a|s), summed over an action's tokens. Slack bounds the gradient where an action is as good as certain. -> (N,)
    """
    return -torch.log1p(slack - logprobs.exp())


def imitation_loss(policy, h, ids, weights, total=None):
    """Weighted cross-entropy of the trunks' own tokens, and `unlikelihood` of actions whose tokens weigh less than nothing:
    h (B, S, D) and ids (B, S) of a Tree, weights (B, L), L ≤ S. -> scalar

    total: what to divide by instead of the tokens' weight: that of the whole batch, or of an average one, where this is but a part of it.
    """
    row, place = weights[:, 1:].nonzero(as_tuple=True)  # place: of the token before
    weight = weights[row, place + 1]  # (N,)
    losses = F.cross_entropy(policy.logits(h[row, place]), ids[row, place + 1], reduction="none")
    loss, wrong = (losses * weight.clamp(min=0)).sum(), weight < 0
    if wrong.any():
        row, place = row[wrong], place[wrong]
        # an action's tokens are side by side, and between two actions is an answer
        begins = torch.cat([row.new_ones(1), (row.diff() != 0) | (place.diff() != 1)])
        action = begins.cumsum(0) - 1
        logprobs = losses.new_zeros(int(begins.sum())).index_add(0, action, -losses[wrong])
        loss = loss - (weight[wrong][begins.bool()] * unlikelihood(logprobs)).sum()
    return loss / (weights[:, 1:].abs().sum() if total is None else total)


def as_it_was(trajectory, weights, rng):
    """A rollout, and what its tokens weigh, as `online_dpo` goes through it: -> (ids (L,), where its actions start (T,), weights (L,))"""
    return trajectory.ids, trajectory.spans[:, 0], weights


def online_dpo(policy, reference, score, tokenizer, trajectories, tell, *, pairs, beta, lr, temperature, seed, state, proposals=2,
               trunks=16, states_per_trunk=2, min_gap=0.0, imitate=0.0, weigh=None, stray=as_it_was, averaged=0.5, watch=None, name="DPO"):
    """Improve `policy` against the frozen `reference` by preferences of `score`(Tree) -> (branches,). -> log

    pairs                 states at which the policy proposes, in all; fewer where episodes are shorter than `states_per_trunk`
    proposals             samples at each: the best and the worst make a pair (the paper's pair is two samples); 0: all is imitation
    trunks                trajectories an update, `states_per_trunk` states of each
    min_gap               states where all samples read the same, or where the two scores differ by no more, carry no preference
    beta, temperature     of `dpo_loss`: the KL's weight; what is sampled at, and what log-probabilities are taken at
    imitate, weigh        weight of the likelihood of the trunks' own tokens, out of the same pass, and what these weigh:
                          `weigh`(trajectories) -> [(L,)] of credit.py; less than nothing: are unlearned
    stray, tell           another telling of a rollout in the place of `as_it_was`, such as with a detour; `tellings.teller`, afterwards
    averaged, watch       as in `optimise`
    """
    steps = max(1, pairs // (trunks * states_per_trunk))
    device = policy.cos.device
    plan = [picked for _, picked in zip(range(steps), batches(len(trajectories), trunks, generator(seed, "drawn")))]
    visited = np.unique(np.concatenate(plan))
    weights_of = dict(zip(visited, weigh([trajectories[i] for i in visited]))) if imitate else {}
    # what a trajectory's states and its tokens weigh on average: by a batch's own weight, one among lost ones would weigh more. What is to be
    # unlearned weighs as much as what is imitated, so the more of it there is, the less a token of either kind counts
    length, mean_weight = np.mean([len(trajectories[i]) for i in visited]), np.mean([np.abs(w[1:]).sum() for w in weights_of.values()] or [0.0])

    def preferences(step, ids, states, numbers, metrics):
        """Propose and score. -> (chosen, rejected, chosen, …) as branches of a Tree"""
        sampled = propose(policy, ids, states, proposals, temperature, (seed, key("propose"), step, numbers))
        different = [distinct(drawn, tokenizer) for drawn in sampled]
        branches = [(*state, *action) for state, drawn in zip(states, different) if len(drawn) > 1 for action in drawn]
        counts_of = [len(drawn) for drawn in different if len(drawn) > 1]
        metrics["pairs/differ"], metrics["pairs/kept"] = (len(counts_of), len(states)), (0, len(states))
        if not branches:
            return []
        with torch.no_grad():
            q = score(Tree(ids, branches, device)).float().cpu().split(counts_of)
        order = [(first + int(f.argmax()), first + int(f.argmin())) for first, f in zip(np.cumsum(counts_of) - counts_of, q)
                 if f.max() - f.min() > min_gap]
        metrics.update({"score/mean": (torch.cat(q).sum(), sum(counts_of)), "score/gap": (sum(f.max() - f.min() for f in q), len(q)),
                        "pairs/kept": (len(order), len(states))})
        return [branches[i] for pair in order for i in pair]

    def loss_of(step):
        rng, metrics, loss = generator(seed, "dpo", step), {}, None
        picked = [trajectories[i] for i in plan[step]]
        told = [stray(t, weights_of[i] if imitate else np.zeros(len(t.ids), np.float32), rng) for i, t in zip(plan[step], picked)]
        ids = [tell(ids.astype(np.int64), t.game, rng) for (ids, _, _), t in zip(told, picked)]
        starts, weights = [starts for _, starts, _ in told], [weights for _, _, weights in told]
        at = [sorted(rng.choice(len(t), min(len(t), states_per_trunk), replace=False)) for t in picked]  # actions to be thought over
        total_states, total_weight = length * len(picked), mean_weight * len(picked)  # of an average batch; this rank has a part of it
        first = np.cumsum([0, *map(len, at)])[:-1]  # number of a trajectory's first state
        picked, ids, starts, at, weights, first = map(mine, (picked, ids, starts, at, weights, first))
        if total_weight:
            metrics["imitation"] = summed(0.0)  # this rank may have nothing to imitate
        if not picked:
            return None, metrics
        states = [(b, int(starts[b][k])) for b in range(len(picked)) for k in at[b]]
        branches = [] if not proposals else preferences(
            step, ids, states, [first[b] + n for b in range(len(picked)) for n in range(len(at[b]))], metrics)
        # states: of a long trajectory as few are drawn as of a short one
        stands_for = torch.tensor([len(picked[b]) / len(at[b]) for b, *_ in branches[::2]], device=device)
        taught = [b for b, w in enumerate(weights) if w.any()]  # trajectories that are imitated, or unlearned in part
        if not branches and not taught:
            return None, metrics
        cut = Tree(ids, branches, device) if branches else None
        tree = Tree(ids, branches, device, whole=taught) if taught else cut
        h = tree.hidden(policy)  # (B, S, D)
        if branches:
            with torch.no_grad():
                ref = cut.logprobs(reference, temperature).view(-1, 2)  # (pairs, 2): chosen, rejected
            pi = tree.logprobs(policy, temperature, h).view(-1, 2)
            losses, chosen, rejected = dpo_loss(pi[:, 0], pi[:, 1], ref[:, 0], ref[:, 1], beta)
            loss = (stands_for * losses).sum() / total_states  # a state without a preference counts as one that is content
            n = len(losses)
            metrics.update({"loss": (losses.detach().sum(), n), "rewards/margins": ((chosen - rejected).sum(), n),
                            "rewards/accuracies": ((chosen > rejected).sum(), n), "pairs/log_ratio": ((pi.detach() - ref).sum(), 2 * n)})
        if taught:
            rows = [weights[b] if b in taught else np.zeros(1, np.float32) for b in tree.trunks]
            likelihood = imitation_loss(policy, h, tree.ids, pad(rows, dtype=torch.float32).to(device), total_weight)
            metrics["imitation"] = summed(likelihood.detach())
            loss = imitate * likelihood + (0 if loss is None else loss)
        return loss, metrics

    return optimise(policy, loss_of, steps, lr, state, name, averaged=averaged, watch=watch)
