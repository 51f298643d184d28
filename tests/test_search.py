"""Best-of-N takes what scores highest among the distinct actions sampled, the first where several do."""

from collections import Counter

import numpy as np
import pytest
import torch

import search
from common import key
from prm import score
from rollout import branch, rollout
from search import best_of_n
from tiny import games, play, random_model, taught, tokenizer


def some(n=4, k=2):
    return [(game, episode) for game in games()[:n] for episode in range(k)]


@pytest.fixture
def candidates(monkeypatch):
    """Filled while playing: {(number of the game, episode, step): [(action, logp, forced)], as sampled}."""
    seen = {}

    def note(policy, cache, rows, lengths, h, n, names, temperature):
        drawn = branch(policy, cache, rows, lengths, h, n, names, temperature)
        seen.update({tuple(name[1:].tolist()): state for name, state in zip(names.T, drawn)})
        return drawn

    monkeypatch.setattr(search, "branch", note)
    return seen


@pytest.mark.parametrize("temperature", (0.7, 1.5))
@torch.no_grad()
def test_it_plays_the_candidate_of_highest_q(candidates, temperature):
    model, ranks = random_model(head="score"), Counter()
    trajectories = play(taught(), some(), temperature=temperature, max_steps=6, choose=best_of_n(model, 5))
    assert len(candidates) == sum(map(len, trajectories))
    for t in trajectories:
        for k, (start, end) in enumerate(t.spans):
            state = candidates[key(t.game), t.episode, k]
            q = [model.scores(model(torch.tensor([[*t.ids[:start].tolist(), *action]])))[0, -1].item() for action, *_ in state]
            mine = [action for action, *_ in state].index(t.ids[start:end].tolist())
            assert q[mine] == pytest.approx(max(q), abs=1e-4)
            assert t.logp[k] == pytest.approx(state[mine][1], abs=1e-5) and t.forced[k] == state[mine][2]
            ranks[mine] += 1
    assert len(ranks) == 5  # the best stands anywhere among the five


def test_ties_go_to_the_first(candidates):
    """A PRM that knows nothing: best-of-N plays its first sample, whatever came twice after it."""
    for t in play(taught(), some(), temperature=0.7, max_steps=6, choose=best_of_n(taught().with_score_head(), 6)):
        for k, (start, end) in enumerate(t.spans):
            first = candidates[key(t.game), t.episode, k][0]
            assert tokenizer().decode(first[0]).strip() == tokenizer().decode(t.ids[start:end]).strip()
    assert any(len({tuple(action) for action, *_ in state}) < 6 for state in candidates.values())


def test_duplicates_are_scored_once(candidates, monkeypatch):
    sizes = []

    class Counting(search.Tree):
        def __init__(self, trunks, branches, device="cpu"):
            sizes.append([sum(branch[0] == j for branch in branches) for j in range(len(trunks))])
            super().__init__(trunks, branches, device)

    monkeypatch.setattr(search, "Tree", Counting)
    play(taught(), some(2, 1), temperature=0.5, max_steps=4, choose=best_of_n(random_model(head="score"), 8))
    distinct = [len({tokenizer().decode(action).strip() for action, *_ in state}) for state in candidates.values()]
    assert [n for step in sizes for n in step] == distinct and 1 < np.mean(distinct) < 8


def test_best_of_one_samples_as_the_policy_does():
    """First actions of 2,000 episodes each way, by a chi-square of two samples."""
    options = dict(temperature=0.7, max_steps=1, slots=500)
    episodes = [(games()[0], k) for k in range(2000)]
    first = lambda choose: Counter(tokenizer().decode(t.ids[slice(*t.spans[0])]) for t in rollout(taught(), tokenizer(), episodes, choose=choose, **options))
    a, b = first(None), first(best_of_n(random_model(head="score"), 1))
    common = [text for text in a if a[text] + b[text] >= 10]
    chi2 = sum((a[text] - b[text]) ** 2 / (a[text] + b[text]) for text in common)
    assert len(common) > 8 and chi2 < len(common) + 4 * (2 * len(common)) ** 0.5
    assert a != b  # other random numbers


def test_a_seed_names_it_and_neighbours_do_not_matter():
    choose = best_of_n(random_model(head="score"), 3)
    a, b, c = (play(taught(), some(), temperature=0.7, max_steps=5, choose=choose, slots=slots, seed=seed) for slots, seed in ((16, 0), (3, 0), (16, 1)))
    assert [t.ids.tolist() for t in a] == [t.ids.tolist() for t in b] != [t.ids.tolist() for t in c]


def test_more_candidates_score_higher():
    model = random_model(head="score")
    one, four = (np.concatenate(score(model, play(taught(), some(6), temperature=1.0, max_steps=6, choose=best_of_n(model, n)))).mean() for n in (1, 4))
    assert four > one + 0.1
