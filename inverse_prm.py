"""InversePRM: a process reward model from demonstrations alone (P1, section 3).

A score f(s, a) stands for the Q of the reward that explains the expert: r(s, a) = f(s, a) − γ E[f(s', a')], a' being the *policy's*
next action. A classifier with r as its logit learns to tell the expert's transitions from those of all learner policies so far.
No outcome is read, neither reward nor `won`; only that an episode ended by itself, which `Ends` may hide too.

Where expert and learner differ little, r is positive for both, and then it is f's advice to live long. With `rest` an episode that ended goes on in
an absorbing state (Kostrikov et al. 2019): until the cap, the expert rests longer than the learner, which makes resting a thing worth getting to.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from common import UserError, generator, key
from optim import optimise
from prm import answers_loss, answers_of
from ranks import mine, summed
from rollout import FROM_DEMONSTRATION
from tree import Tree, propose


class Ends(NamedTuple):
    """What becomes of an episode that ended by itself: in the paper nothing, f' = 0; with `rest`, the logit of each step of it, it rests for ever.
    With `hide` nobody is shown that it ended."""
    gamma: float
    hide: bool = False
    rest: float | None = None

    def logit(self, f, f_next, ended):
        """z = f(s, a) − γ f(s', a') of transitions (n,), tensors or arrays, where f' of an end is Σ_k γ^k rest. -> (n,)"""
        return f - self.gamma * (~ended * f_next + ended * (self.rest / (1 - self.gamma) if self.rest else 0.0))

    def transitions(self, trajectory, taught=None):
        """The actions (n,) of a trajectory that make a transition (s, a, s', a'), and whether the episode ended with it, (n,) bool.

        taught (T,) bool: actions that count, the expert's own and not its mistakes. The last action of an episode that was cut has no
        transition, for nobody saw what comes next; nor has that of any episode with `hide`. With `rest`, which compares what goes on for ever, it is
        taken to be followed by itself: else nothing ties f down in such an episode, and it drifts.
        """
        T = len(trajectory)
        counts = np.ones(T, bool) if taught is None else taught.copy()
        counts[T - 1] &= not self.hide and (not trajectory.truncated or self.rest is not None)
        actions = counts.nonzero()[0]
        return actions, (actions == T - 1) & (not trajectory.truncated)


def inverse_loss(z, expert):
    """Binary cross-entropy of expert against learner (P1, InversePRM): logits z (N,) of transitions, gradient through both of its terms;
    expert (N,) bool: whose they are. -> losses (N,)"""
    return F.binary_cross_entropy_with_logits(z, expert.to(z.dtype), reduction="none")


def rest_odds(demonstrations, rollouts, max_steps):
    """The logit of one step of rest being the expert's, where transitions of either side weigh the same:
    the log of the ratio of both sides' steps of rest, up to the cap, to one transition.

    All steps of rest look the same, so what a classifier would learn of them is known, and need not be learned. Rollouts that were begun in the
    midst of a demonstration do not count: they end early for where they began. demonstrations [(Trajectory, taught)], rollouts [Trajectory]; a
    side that never ends by itself is taken to have rested once.
    """
    resting = Ends(0.0, rest=0.0)
    steps = lambda side: (max(1, sum(max_steps - len(t) for t, _ in side if not t.truncated))
                          / max(1, sum(len(resting.transitions(t, taught)[0]) for t, taught in side)))
    return float(np.log(steps(demonstrations) / steps([(t, None) for t in rollouts if t.episode < FROM_DEMONSTRATION])))


def learned_rewards(trajectory, f, ends, taught=None):
    """r(s, a) = f(s, a) − γ f(s', a') of each transition of a trajectory, a' being what was done next; f (T,): its scores. -> (n,)"""
    actions, ended = ends.transitions(trajectory, taught)
    return ends.logit(f[actions], f[np.minimum(actions + 1, len(f) - 1)], ended)


def like_the_expert(trajectories, scores, ends):
    """What a rollout's learned return, Σ_t r(s_t, a_t), is above that of the average rollout, or 0, over the mean of those above it:
    (T,) each, the same for all its actions.

    scores (T,) of each rollout: its f. r is the learned reward (with rest, what it is more than a step of rest has): self-imitation (as
    `better_than_expected` of credit.py) of a return that no outcome tells. It is not discounted: Σ_t γ^t r_t telescopes to f(s_0, a_0), and would
    say nothing of the rollout. Rollouts that began in the midst of a demonstration are neither compared nor imitated: they owe their return to where
    they began.
    """
    learned = np.array([(learned_rewards(t, f, ends) - (ends.rest or 0.0)).sum() for t, f in zip(trajectories, scores)])
    whole = np.array([t.episode < FROM_DEMONSTRATION for t in trajectories])
    above = np.maximum(0, learned - learned.mean(where=whole)) * whole if whole.any() else np.zeros(len(whole))
    return [np.full(len(t), x / max(above.sum() / max(1, (above > 0).sum()), 1e-9)) for t, x in zip(trajectories, above)]


def told_apart(f_expert, f_learner, ends):
    """The learned reward on episodes that its lessons left out (the policy it starts from knows the expert's among them):
    its mean on either side, and how often its sign is right (a coin: 0.5).

    f_expert [(Trajectory, taught (T,), f (T,))], f_learner [(Trajectory, None, f)]. What follows is what was done, the expert's own next
    action too. -> {"expert", "learner": mean r, "accuracy"}; None where a side has no transition
    """
    r = []
    for side in (f_expert, f_learner):
        taken = [learned_rewards(t, f, ends, taught) for t, taught, f in side]
        r.append(np.concatenate(taken) if sum(map(len, taken)) else None)
    if r[0] is None or r[1] is None:
        return None
    return {"expert": float(r[0].mean()), "learner": float(r[1].mean()), "accuracy": float(((r[0] > 0).mean() + (r[1] <= 0).mean()) / 2)}


def train_inverse_prm(prm, policy, demonstrations, rollouts, tell, ends, *, updates, lr, batch, temperature, seed, state, obs_weight=0.0, check=None,
                      name="InversePRM"):
    """Fit f of `prm` to `demonstrations` [(Trajectory, taught)] against `rollouts` [Trajectory] of all learner policies. -> log

    Each update takes as many trajectories of the one as of the other, `batch` in all, and the transitions of either side weigh a half together, over
    all updates. What follows an expert's action is sampled from `policy`, the current one, anew each time; in a rollout it is what the learner did:
    `temperature` must be that of the rollouts. `obs_weight`: of the world's answers, as in `train_prm`. `check`(step) -> loss, metrics: one more
    loss, of `checks.check_loss`: the classifier's own says little about the actions of one state, and without it f ranks them no better than a coin
    (LOG.md). UserError where a side has no transitions.
    """
    device = prm.cos.device
    pools = [(demo, taught, True) for demo, taught in demonstrations], [(t, None, False) for t in rollouts]
    pools = [[one for one in pool if len(ends.transitions(*one[:2])[0])] for pool in pools]
    if batch < 2 or not all(pools):
        raise UserError("InversePRM needs transitions of the expert and of the learner, and at least one trajectory of each in a batch")
    # what half a batch weighs on average: by its own weight, a transition would weigh more among short episodes, which the expert's are
    total = {expert: batch // 2 * np.mean([len(ends.transitions(*one[:2])[0]) for one in pool]) for pool, expert in zip(pools, (True, False))}
    total_answers = batch // 2 * sum(np.mean([len(answers_of(t.spans)) for t, _, _ in pool]) for pool in pools)

    def loss_of(step):
        rng = generator(seed, "inverse", step)
        picked = [pool[i] for pool in pools for i in rng.choice(len(pool), batch // 2, replace=len(pool) < batch // 2)]
        told = [tell(t.ids, t.game, rng) for t, _, _ in picked]
        moves = [ends.transitions(t, taught) for t, taught, _ in picked]
        numbers, picked, told, moves = map(mine, (range(len(picked)), picked, told, moves))
        checked, metrics = check(step) if check else (None, {})
        metrics = {f"checks/{what}": number for what, number in metrics.items()}
        if not told:
            return checked, metrics
        # (row, place) of a; of a', if the learner's; and the states at which the policy is asked for a'
        now, then, ended, expert, asked, states = [], [], [], [], [], []
        for b, ((t, _, is_expert), (actions, last)) in enumerate(zip(picked, moves)):
            for k, end in zip(actions, last):
                now.append((b, t.spans[k, 1] - 1)), ended.append(end), expert.append(is_expert)
                then.append((b, t.spans[min(k + 1, len(t) - 1), 1] - 1))
                asked.append(is_expert and k + 1 < len(t))
                if asked[-1]:
                    states.append((b, int(t.spans[k + 1, 0])))
        drawn = propose(policy, told, states, 1, temperature,
                        (seed, key("next action"), step, *np.array([(numbers[b], start) for b, start in states]).T)) if states else []
        tree = Tree(told, [(*place, *action[0]) for place, action in zip(states, drawn)], device, whole=range(len(told)))
        h = tree.hidden(prm)  # (B, S, D): row b is trajectory b, and the actions drawn behind it
        at = lambda places: prm.scores(h[tuple(torch.tensor(np.array(places)).T)])
        ended, expert = torch.tensor(ended, device=device), torch.tensor(expert, device=device)
        f_next = at(then)
        f_next = f_next.masked_scatter(torch.tensor(asked, device=device), prm.scores(h[tree.branch_row, tree.branch_end]))
        z = ends.logit(at(now), f_next, ended)
        losses, z = inverse_loss(z, expert), z.detach()
        loss = sum((losses * (expert == side)).sum() / total[side] for side in (False, True)) / 2
        metrics |= {"loss": summed(loss.detach()), "accuracy": (((z > 0) == expert).sum(), len(z)),
                   "reward/expert": (z[expert].sum(), int(expert.sum())), "reward/learner": (z[~expert].sum(), int((~expert).sum()))}
        if obs_weight:
            answers = answers_loss(prm, h, tree.ids, [t.spans for t, _, _ in picked], total_answers)
            metrics["answers"] = summed(answers.detach())
            loss = loss + obs_weight * answers
        return loss if checked is None else loss + checked, metrics

    return optimise(prm, loss_of, updates, lr, state, name)
