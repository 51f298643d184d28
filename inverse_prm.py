"""InversePRM: a process reward model from demonstrations alone (P1, section 3).

A score f(s, a) stands for the Q of the reward that explains the expert,

    r(s, a) = f(s, a) − γ E_{a'~π}[f(s', a')],

and a classifier with r as its logit learns to tell the expert's transitions from those of all
learner policies so far. No outcome is read. That an episode ended by itself shows success, which
`hide_ends` hides too."""

import numpy as np
import torch
from torch.nn import functional as F

from candidates import draw, prefix_tree, score_states
from rollout import states_of
from utils import generator, key, uniform


def inverse_loss(z, expert):
    """BCE of expert against learner: logits z (N,) of transitions, expert (N,) bool. -> (N,)

    z = f(s, a) − γ f(s', a'); the gradient goes through both terms (P1, section 3.1)."""
    return F.binary_cross_entropy_with_logits(z, expert.to(z.dtype), reduction="none")


def transitions(trajectory, trained=None, hide_ends=False):
    """The actions (n,) of a trajectory that make a transition (s, a, s', a'), and whether the
    episode ended by itself with it, (n,) bool: then z = f(s, a).

    trained (T,) bool: actions that count. An episode that was cut has no last transition, for
    nobody saw what comes next; with hide_ends no episode has one."""
    T = len(trajectory)
    counts = np.ones(T, bool) if trained is None else trained.copy()
    counts[T - 1] &= not (hide_ends or trajectory.truncated)
    actions = counts.nonzero()[0]
    return actions, actions == T - 1


def inverse_objective(policy, demos, learners, games, tokenizer, *, gamma, temperature, seed,
                      hide_ends=False):
    """The objective of stage 2 on equal numbers of expert and learner trajectories.

    policy: the current one, from which the expert's next actions are re-sampled at temperature.
    demos [(Trajectory, trained)]; learners [Trajectory], of all policies so far; games {id: Game}.
    -> objective(prm, picked, share, step); `picked`: how many trajectories of each side"""
    experts = [(t, trained, True) for t, trained in demos]
    learners = [(t, None, False) for t in learners]
    mean = {side: np.mean([len(transitions(t, w, hide_ends)[0]) for t, w, _ in some])
            for side, some in ((True, experts), (False, learners))}

    def pair(b, t, k, command=None):
        """Action k of trajectory b, or a command in its place, as the only candidate there."""
        command = command or tokenizer.decode(t.ids[slice(*t.spans[k])])
        return b, int(t.spans[k, 0]), prefix_tree((command,), tokenizer)

    @torch.no_grad()
    def next_actions(batch, sequences, step):
        """a' ~ π(·|s') at the expert's states: {(trajectory, action number): command}."""
        asked, states, episodes = [], [], []
        for b, (t, trained, is_expert) in enumerate(batch):
            every = states_of(t, games[t.game], tokenizer, b) if is_expert else []
            for k, last in zip(*transitions(t, trained, hide_ends)):
                if is_expert and not last:
                    asked.append((b, k + 1)), states.append(every[k + 1])
                    episodes.append(t.episode)
        if not states:
            return {}
        log_pi = score_states(policy, sequences, states, temperature)
        u = uniform(seed, key("next action"), step, episodes, [k for _, k in asked])
        return {at: tree.commands[c]
                for at, (*_, tree), c in zip(asked, states, draw(log_pi, u).tolist())}

    def objective(prm, picked, share, step):
        batch = [pool[generator(seed, "inverse", step, int(i), len(pool)).integers(len(pool))]
                 for pool in (experts, learners) for i in picked]
        sequences = [t.ids for t, _, _ in batch]
        drawn = next_actions(batch, sequences, step)
        states, now, then, ended, expert = [], [], [], [], []
        for b, (t, trained, is_expert) in enumerate(batch):
            for k, last in zip(*transitions(t, trained, hide_ends)):
                now.append(len(states)), ended.append(last), expert.append(is_expert)
                states.append(pair(b, t, k))
                then.append(now[-1] if last else len(states))
                if not last:
                    states.append(pair(b, t, k + 1, drawn.get((b, k + 1))))
        if not states:
            return None, {"loss": (0, len(picked) / share)}
        f = score_states(prm, sequences, states)[:, 0]  # (pairs,)
        ended, expert = (torch.tensor(x, device=f.device) for x in (ended, expert))
        z = f[now] - gamma * f[then].masked_fill(ended, 0)  # (N,)
        losses = inverse_loss(z, expert)
        loss = sum(losses[expert == side].sum() / (share * mean[side]) for side in mean) / 2
        right, z = ((z > 0) == expert).sum(), z.detach()
        return loss, {"loss": (loss.detach(), len(picked) / share), "accuracy": (right, len(z)),
                      "reward/expert": (z[expert].sum(), expert.sum()),
                      "reward/learner": (z[~expert].sum(), (~expert).sum())}

    return objective
