"""What stage 3 learns from: the PRMs' judgement of proposed actions, and what the rollouts' own actions are worth imitating.

Several PRMs (`--ensemble`) judge together: their opinions are averaged, or the least hopeful one counts.
"""

import numpy as np
import torch

from inverse_prm import like_the_expert
from prm import actions_of, score, sigmoid, states_of
from qestimate import returns

TOGETHER = {"mean": lambda opinions: opinions.mean(0), "min": lambda opinions: opinions.min(0)}  # (K, …) -> (…)


def judged_by(prms, how):
    """The score that `online_dpo` asks for: Tree -> (branches,), Q of each proposal, or f of PRMs that compare actions of one state only
    (preferences, InversePRM)."""
    @torch.no_grad()
    def judge(tree):
        f = torch.stack([tree.scores(prm) for prm in prms])
        return torch.as_tensor(TOGETHER[how]((f if prms[0].config.head == "relative" else f.sigmoid()).cpu().numpy()))

    return judge


def opinions(prms, trajectories, places=actions_of):
    """Q of every action by every PRM, or with `states_of` V of every state: for each trajectory (K, T)."""
    return [np.stack(of_one) for of_one in zip(*(map(sigmoid, score(prm, trajectories, places=places)) for prm in prms))]


SETBACK = 0.02  # of V; what an action costs less than that may be the PRM's error


def no_setback(trajectory, V, gamma):
    """1 for each action of a won rollout that was no setback by its states' values V (T,), γ V(s_{t+1}) − V(s_t) > −SETBACK, else 0, (T,).

    A rollout is won in spite of some of its actions, and only the PRM can tell which. It judges them by what the world answered, bad luck
    included: judged by Q(s, a) − V(s), which does not know the answer, one imitates worse (LOG.md). Lost rollouts give nothing.
    """
    after = np.append(gamma * V[1:], trajectory.won)  # nothing follows the last action
    return trajectory.won * (after - V > -SETBACK)


def better_than_expected(trajectory, V, gamma):
    """How much better a won rollout went than its states' values V (T,), max(0, G_t − V(s_t)), (T,): self-imitation (Oh et al. 2018,
    eq. 2). Lost rollouts give nothing.

    V must know what was seen at s_t: with Q(s_{t−1}, a_{t−1}) / γ in its place, the luck of finding a thing is the next action's merit.
    """
    return trajectory.won * np.maximum(0, returns(trajectory, gamma) - V)


def progress(M):
    """What each action added to the PRM's promise M (T,), max(0, M_t − M_{t−1}), (T,) (P2); the first nothing. Of any rollout, won or not."""
    return np.maximum(0, np.diff(M, prepend=M[:1]))


def worth(prms, trajectories, by, *, how, prm_loss, ends):
    """What each action of the rollouts is worth to be imitated, `by` (--imitate-by) win, outcome, surplus, expert, progress or all:
    for each trajectory (T,).

    What won rollouts are measured by, V(s_t), depends on what the PRM was trained for: its own reading at the state; of a PRM of promise,
    M_{t−1}, which plays V there (P2; γ M_0 for t = 0: nothing gained, nothing lost); 0 of one that compares actions of one state only.
    `ends`: γ, and what InversePRM makes of an episode's end.
    """
    together, gamma = TOGETHER[how], ends.gamma
    if by == "all":
        return [np.ones(len(t)) for t in trajectories]
    if by == "outcome":
        return [np.full(len(t), float(t.won)) for t in trajectories]
    if by == "expert":
        return like_the_expert(trajectories, [together(np.stack(f)) for f in zip(*(score(prm, trajectories) for prm in prms))], ends)
    if by == "progress":
        return [progress(together(q)) for q in opinions(prms, trajectories)]
    if prm_loss == "bt":
        values = [np.zeros(len(t)) for t in trajectories]
    elif prm_loss == "promise-progress":
        values = [np.append(gamma * M[:1], M[:-1]) for M in map(together, opinions(prms, trajectories))]
    else:
        values = map(together, opinions(prms, trajectories, states_of))
    if by == "surplus":
        return [better_than_expected(t, V, gamma) for t, V in zip(trajectories, values)]
    return [no_setback(t, V, gamma) for t, V in zip(trajectories, values)]


def imitated(trajectory, gain, obs_weight, unlearn=0.0):
    """How much each token of a rollout is imitated, (L,) float32; less than nothing: how much the action it belongs to is to be unlearned.

    An admissible action weighs its gain (T,), the world's answers `obs_weight` times the mean of its actions, and one that the world
    did not accept −`unlearn`.
    """
    weights = np.zeros(len(trajectory.ids), np.float32)
    gain = np.where(trajectory.inadmissible, 0, gain)
    weights[trajectory.spans[0, 0]:] = obs_weight * gain.mean()
    for (start, end), weight in zip(trajectory.spans, np.where(trajectory.inadmissible, -unlearn, gain)):
        weights[start:end] = weight
    weights[trajectory.spans[trajectory.forced, 1] - 1] = 0  # an <end> that the policy did not choose
    return weights
