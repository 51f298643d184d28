"""The tree of branches against separate sequences, and its proposals against plain sampling."""

import numpy as np
import pytest
import torch

from rollout import action_logprobs
from tiny import played, random_model, some_branches, taught
from tree import Tree, propose


def separate(model, trunks, branches, temperature):
    """What Tree.logprobs promises, written out: one sequence for every branch."""
    out = []
    for b, start, action, forced in branches:
        ids = torch.tensor([*trunks[b][:start].tolist(), *action])
        logp = action_logprobs(model.logits(model(ids[None])[0]), temperature)
        sampled = range(start, len(ids) - forced)  # a forced <end> was not sampled
        out.append(sum(logp[i - 1, ids[i]] for i in sampled))
    return torch.stack(out)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("temperature", (0.7, 1.0))
@torch.no_grad()
def test_the_tree_gives_the_logprobs_of_separate_sequences(seed, temperature):
    model, (trunks, branches) = random_model(seed), some_branches(seed)
    assert {forced for *_, forced in branches} == {True, False}
    ours = Tree(trunks, branches).logprobs(model, temperature)
    torch.testing.assert_close(ours, separate(model, trunks, branches, temperature), atol=2e-3, rtol=1e-4)
    shuffled = np.random.default_rng(0).permutation(len(branches))
    torch.testing.assert_close(Tree(trunks, [branches[i] for i in shuffled]).logprobs(model, temperature), ours[shuffled], atol=2e-3, rtol=1e-4)


def test_the_tree_has_the_gradient_of_separate_sequences():
    model, (trunks, branches) = random_model(), some_branches()
    gradients = []
    for logprobs in (Tree(trunks, branches).logprobs(model, 0.7), separate(model, trunks, branches, 0.7)):
        model.zero_grad()
        (logprobs * torch.arange(len(branches))).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=1e-3)


@torch.no_grad()
def test_the_tree_gives_the_scores_of_separate_sequences():
    model, (trunks, branches) = random_model(head="score"), some_branches()
    alone = [model.scores(model(torch.tensor([[*trunks[b][:start].tolist(), *action]])))[0, -1] for b, start, action, _ in branches]
    torch.testing.assert_close(Tree(trunks, branches).scores(model), torch.stack(alone), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_logprobs_of_what_was_played_are_those_recorded():
    trajectories = [*played()[:6]]
    branches = [(b, int(start), t.ids[start:end].tolist(), bool(cut)) for b, t in enumerate(trajectories) for (start, end), cut in zip(t.spans, t.forced)]
    ours = Tree([t.ids for t in trajectories], branches).logprobs(taught(), 0.7)
    torch.testing.assert_close(ours, torch.from_numpy(np.concatenate([t.logp for t in trajectories])), atol=1e-3, rtol=0)


@torch.no_grad()
def test_a_whole_trunk_changes_nothing_for_its_branches():
    model, (trunks, branches) = random_model(), some_branches()
    cut, whole = Tree(trunks, branches), Tree(trunks, branches, whole=[0, 2])
    assert whole.ids.shape[1] > cut.ids.shape[1] and Tree(trunks, branches[:1], whole=[3]).trunks == sorted({branches[0][0], 3})
    torch.testing.assert_close(whole.logprobs(model, 0.7), cut.logprobs(model, 0.7), atol=2e-3, rtol=1e-4)


@torch.no_grad()
def test_greedy_proposals_are_the_most_probable_tokens_after_each_state():
    trunks = [t.ids for t in played()[:3]]
    states = [(b, int(played()[b].spans[k, 0])) for b in range(3) for k in (0, 4, 9)]
    for (b, start), drawn in zip(states, propose(taught(), trunks, states, 2, 0.0, (0,))):
        assert drawn[0] == drawn[1]
        action, forced = drawn[0]
        ids = torch.tensor([*trunks[b][:start].tolist(), *action])
        best = action_logprobs(taught().logits(taught()(ids[None])[0]), 1.0).argmax(-1)
        assert best[start - 1:len(ids) - 1 - forced].tolist() == action[:len(action) - forced]


def test_a_proposal_does_not_see_what_comes_after_its_state():
    """From the whole trajectory, or from what had happened by then, next to others or alone: the same proposals."""
    t, other = played()[0], played()[7]
    start = int(t.spans[5, 0])
    draw = lambda trunks, states: propose(taught(), trunks, states, 4, 1.0, (1, 2, np.arange(len(states))))[0]
    assert draw([t.ids], [(0, start)]) == draw([t.ids[:start]], [(0, start)]) == draw([t.ids, other.ids], [(0, start), (1, int(other.spans[2, 0]))])
    assert len({tuple(a) for a, _ in draw([t.ids], [(0, start)])}) > 1
    other_names = propose(taught(), [t.ids], [(0, start)], 4, 1.0, (1, 3, 0))[0]
    assert other_names != draw([t.ids], [(0, start)])
