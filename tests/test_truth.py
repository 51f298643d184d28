"""The truth by brute force: rollouts go on from the states they say, and a judge is compared with what they show."""

import numpy as np
import pytest
import torch

import truth
from common import read_json, save_model, write_json
from tiny import assert_refused, games, in_process, taught, tokenizer
from truth import against_truth, judged, main, play_truth


def test_the_truth_is_the_mean_return_of_what_began_with_the_action(monkeypatch):
    todo = []
    rollout = truth.rollout
    monkeypatch.setattr(truth, "rollout", lambda policy, tok, episodes, **options: (todo.append(list(episodes)), rollout(policy, tok, episodes, **options))[1])
    found = play_truth(taught(), tokenizer(), games()[:4], states=6, rollouts=5, gamma=0.9, max_steps=10, temperature=0.8, seed=0)
    assert [state["game"] for state in found] == [game.id for game in (games()[:4] * 2)[:6]] and len(todo[1]) == 30
    for n, state in enumerate(found):
        assert all(np.array_equal(episode[2], state["ids"]) for episode in todo[1][5 * n:5 * n + 5])
    again = list(rollout(taught(), tokenizer(), todo[1], temperature=0.8, max_steps=10, seed=1))
    expected = [{} for _ in found]
    for t in again:
        text = tokenizer().decode(t.ids[slice(*t.spans[0])]).strip()
        expected[t.episode // 5].setdefault(text, []).append(t.reward * 0.9 ** (len(t) - 1))
    for state, returns in zip(found, expected):
        assert {text: sorted(a["returns"]) for text, a in state["actions"].items()} == {text: pytest.approx(sorted(G)) for text, G in returns.items()}


def states_of(rng, judge):
    true = [rng.random(n) for n in rng.integers(2, 6, 30)]
    return [(judge(q), q, np.full(len(q), 1 / len(q)), np.zeros(len(q))) for q in true]


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
    states = [(np.array([0.1, 0.5, 0.5]), np.array([0.6, 0.2, 0.6]), np.array([0.5, 0.25, 0.25]), np.array([0.005, 0.005, 0.015]))]
    found = against_truth(states)
    assert found["actions"] == 3 and found["far"] == (1, 0.0, pytest.approx(-0.4))  # the other pair may be 0.4 apart by chance: 3 · √(0.005 + 0.015)
    assert found["gaps"][0.2] == (1, 0.0, pytest.approx(-0.4))  # the other is truly no gap


def test_actions_that_are_equally_good_are_seldom_far_apart():
    """Rollouts by a coin, four and more an action: a pair of them is not told apart by four that all lost."""
    rng, found = np.random.default_rng(0), []
    for n in range(300):
        counts = rng.multinomial(64, rng.dirichlet(np.ones(5)))
        found.append({"game": "", "ids": [1], "actions": {str(k): {"ids": [2], "returns": (rng.random(c) < 0.3).astype(float).tolist()} for k, c in enumerate(counts) if c}})
    states = judged(lambda tree: torch.zeros(len(tree.branch_end)), found, "cpu", 4)
    pairs = sum(len(q) * (len(q) - 1) // 2 for _, q, *_ in states)
    assert pairs > 1000 and against_truth(states)["far"][0] < 0.01 * pairs


@pytest.fixture
def run(tmp_path):
    """A run directory of π_0, and two PRMs of iteration 1."""
    run = tmp_path / "run"
    write_json(run / "config.json", {"flags": {"max_steps": 8, "gamma": 0.95, "rollout_temperature": 1.0, "n_generated": 40, "dev_games": 6, "data": None}})
    write_json(run / "data.json", {"train": "40 generated games of train, seed 0, alfworld 0.4.2"})
    save_model(run / "iter0/policy", taught(), tokenizer())
    for k, head in enumerate(("score", "relative")):
        prm = taught().with_score_head(head)
        torch.nn.init.normal_(prm.score.weight, generator=torch.Generator().manual_seed(k))
        save_model(run / f"iter1/prm{k + 1 if k else ''}", prm.eval(), tokenizer())
    return run


FLAGS = ("--states", 8, "--rollouts", 12, "--least", 1, "--threads", 1)


def test_a_row_for_the_policy_and_for_every_prm_from_rollouts_that_stay(run, monkeypatch, capsys):
    done = in_process(main, ("--run", run, *FLAGS), monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[-1] for line in lines[2:]] == ["s)", str(run / "iter1/prm"), str(run / "iter1/prm2")] and "log π_0(a | s)" in lines[2]
    monkeypatch.setattr(truth, "play_truth", None)
    again = in_process(main, ("--run", run, *FLAGS, "--prm", run / "iter1/prm2"), monkeypatch, capsys).stdout.splitlines()
    assert again == [*lines[:3], lines[4]]
    assert_refused(in_process(main, ("--run", run, *FLAGS, "--seed", 1), monkeypatch, capsys), "truth-0.json", "seed 0 -> 1")
    found = read_json(run / "truth-0.json")["found"]
    states = judged(lambda tree: tree.logprobs(taught(), 1.0), found, "cpu", 1)
    assert f"{sum(len(q) for _, q, *_ in states)} actions of {len(states)} states" == lines[0]
    assert all(abs(share.sum() - 1) < 1e-9 and len(said) == len(true) == len(share) == len(variance) > 1 for said, true, share, variance in states)


@pytest.mark.parametrize("flags, parts", (
    (("--run", "nowhere"), ("nowhere", "data.json")),
    (("--states", 0), ("--states",)),
    (("--policy", 3), ("iter3/policy",)),
    (("--prm", "{run}/iter0/policy"), ("iter0/policy", "PRM")),
    ((*FLAGS, "--least", 7), ("--rollouts 12", "14")),
))
def test_mistakes_are_told_in_one_line(run, flags, parts, monkeypatch, capsys):
    assert_refused(in_process(main, ("--run", run, *(str(flag).format(run=run) for flag in flags)), monkeypatch, capsys), *parts)
