"""The truth by brute force: rollouts go on from the states they say, and a judge is compared with what they show."""

import numpy as np
import pytest

from tiny import games, taught, tokenizer
from truth import against_truth, play_truth


def test_the_truth_is_the_mean_return_of_what_began_with_the_action(monkeypatch):
    todo = []
    import truth
    rollout = truth.rollout
    monkeypatch.setattr(truth, "rollout", lambda policy, tok, episodes, **options: (todo.append(list(episodes)), rollout(policy, tok, episodes, **options))[1])
    found = play_truth(taught(), tokenizer(), games()[:4], states=6, rollouts=5, gamma=0.9, max_steps=10, seed=0)
    assert [state["game"] for state in found] == [game.id for game in (games()[:4] * 2)[:6]] and len(todo[1]) == 30
    for n, state in enumerate(found):
        assert all(np.array_equal(episode[2], state["ids"]) for episode in todo[1][5 * n:5 * n + 5])
    again = list(rollout(taught(), tokenizer(), todo[1], temperature=1.0, max_steps=10, seed=1))
    expected = [{} for _ in found]
    for t in again:
        text = tokenizer().decode(t.ids[slice(*t.spans[0])]).strip()
        expected[t.episode // 5].setdefault(text, []).append(t.reward * 0.9 ** (len(t) - 1))
    for state, returns in zip(found, expected):
        assert {text: (a["n"], pytest.approx(a["q"])) for text, a in state["actions"].items()} == {text: (len(G), np.mean(G)) for text, G in returns.items()}


def states_of(rng, judge):
    true = [rng.random(n) for n in rng.integers(2, 6, 30)]
    return [(judge(q), q, np.full(len(q), 1 / len(q))) for q in true]


def test_one_who_knows_is_right_and_one_who_errs_is_wrong():
    rng = np.random.default_rng(0)
    right, wrong = (against_truth(states_of(rng, judge)) for judge in (lambda q: 2 * q, lambda q: -q))
    assert right["q"] == right["advantage"] == pytest.approx(1) and wrong["q"] == wrong["advantage"] == pytest.approx(-1)
    assert right["far"][1] == 1 and wrong["far"][1] == 0 and right["far"][2] > 0.15 and wrong["far"][2] < -0.15
    assert right["gaps"][0.2][0] < right["gaps"][0.02][0] and right["gaps"][0.2][2] > right["gaps"][0.02][2] > 0


def test_one_who_knows_states_alone_has_no_advantage():
    rng = np.random.default_rng(0)
    said = against_truth(states_of(rng, lambda q: np.full(len(q), q.mean())))
    assert said["q"] > 0.3 and said["advantage"] is None and said["far"][1] == 0 and said["gaps"][0.02][:2] == (0, None)


def test_pairs_and_their_gain_written_out():
    states = [(np.array([0.1, 0.5, 0.5]), np.array([0.6, 0.2, 0.6]), np.array([0.5, 0.25, 0.25]))]
    found = against_truth(states)
    assert found["actions"] == 3 and found["far"] == (2, 0.0, pytest.approx(-0.2))  # one wrong, one undecided
    assert found["gaps"][0.2] == (1, 0.0, pytest.approx(-0.4))  # the other is truly no gap
