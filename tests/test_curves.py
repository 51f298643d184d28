"""Curves over N: which policies and PRMs, on which games, what is played again, and the command."""

import json

import numpy as np
import pytest
import torch

import curves
from common import save_model, write_json
from common import whole_numbers
from curves import find, main, pairs_of_run
from eval import evaluate_policy, judge_best_episodes
from games import DataError, games_of_run, generated_split, split_dev
from search import best_of_n, last_scores
from tiny import assert_refused, in_process, play, taught, tokenizer

ACTING = dict(temperature=0.9, max_steps=3)


def prm(i):
    model = taught().with_score_head()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(i))
    return model.eval()


@pytest.fixture
def run(tmp_path):
    """A run directory of one iteration, and the PRM of a second."""
    run = tmp_path / "run"
    write_json(run / "config.json", {"flags": {"max_steps": 3, "eval_temperature": 0.9, "n_generated": 40, "dev_games": 6, "data": None}})
    write_json(run / "data.json", {"train": "40 generated games of train, seed 0, alfworld 0.4.2"})
    for i in range(2):
        save_model(run / f"iter{i}/policy", taught(), tokenizer())
        save_model(run / f"iter{i + 1}/prm", prm(i + 1), tokenizer())
    return run


def told(run, *flags, monkeypatch, capsys):
    """-> (the JSON, the printed lines)"""
    done = in_process(main, ("--run", run, *flags), monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "curves-dev.json").read_text()), done.stdout.splitlines()


def test_each_policy_with_the_prm_it_was_trained_by_and_the_one_trained_on_it(run):
    assert pairs_of_run(run, None) == [(0, 1), (1, 1), (1, 2)] and pairs_of_run(run, [0]) == [(0, 1)] and pairs_of_run(run, [5]) == []


def test_dev_is_what_the_run_held_out(run):
    dev, source = games_of_run(run, "dev", None)
    train, expected = split_dev(generated_split("train", 40), 6)
    assert [game.id for game in dev] == [game.id for game in expected] and 0 < len(dev) <= 6 and f"{len(dev)} games held out" in source
    assert len(games_of_run(run, "train", None)[0]) == 40 and len(games_of_run(run, "valid_seen", None)[0]) == 10
    flags = json.loads((run / "config.json").read_text())["flags"]
    write_json(run / "config.json", {"flags": {**flags, "n_generated": 44}})
    with pytest.raises(DataError, match="trained on other games"):
        games_of_run(run, "dev", None)
    write_json(run / "config.json", {"flags": flags})


def test_whole_numbers():
    assert whole_numbers("4,1,16,4") == [1, 4, 16]


def test_a_curve_over_actions(run, monkeypatch, capsys):
    result, lines = told(run, "--best-of", "1,3", "--episodes-per-game", 5, monkeypatch=monkeypatch, capsys=capsys)
    dev, rows = games_of_run(run, "dev", None)[0], result["rows"]
    assert (result["split"], result["temperature"], result["max_steps"], result["engine"]) == ("dev", 0.9, 3, "fast")
    assert [(r["policy"], r["prm"], r["n"]) for r in rows] == [(0, None, 1), (0, 1, 3), (1, None, 1), (1, 1, 3), (1, 2, 3)]
    for r in rows:
        choose = best_of_n(prm(r["prm"]), 3) if r["prm"] else None
        assert r.items() >= evaluate_policy(taught(), tokenizer(), dev, episodes_per_game=5, choose=choose, **ACTING).items()
    assert any(rows[3][key] != rows[4][key] for key in ("inadmissible", "episodes"))  # another PRM
    assert find(rows, 1, 1, "actions", 1) is find(rows, 1, 2, "actions", 1) is rows[2] and find(rows, 1, 1, "episodes", 1) is None
    assert [line.split()[:5] for line in lines[2:5]] == [
        ["π_0", "by", "Q_1", *(f"{rows[i]['success']:.1%}" for i in (0, 1))], ["π_1", "by", "Q_1", *(f"{rows[i]['success']:.1%}" for i in (2, 3))],
        ["π_1", "by", "Q_2", *(f"{rows[i]['success']:.1%}" for i in (2, 4))]]


def test_a_curve_over_episodes_plays_each_once(run, monkeypatch, capsys):
    counted = []
    rollout = curves.rollout
    monkeypatch.setattr(curves, "rollout", lambda *arguments, **options: (counted.append(t) or t for t in rollout(*arguments, **options)))
    result, lines = told(run, "--best-of-episodes", "1,2,5", monkeypatch=monkeypatch, capsys=capsys)
    dev, rows = games_of_run(run, "dev", None)[0], result["rows"]
    assert len(counted) == 2 * 5 * len(dev)  # two policies, whatever the PRMs and N
    assert [(r["policy"], r["prm"], r["n"]) for r in rows] == [(0, None, 1), (0, 1, 2), (0, 1, 5), (1, None, 1), (1, 1, 2), (1, 1, 5), (1, 2, 2), (1, 2, 5)]
    for r in rows:
        n = r["n"]
        trajectories = play(taught(), [(game, k) for game in dev for k in range(5 // n * n)], **ACTING)
        q = last_scores(prm(r["prm"]), trajectories) if r["prm"] else np.zeros(len(trajectories))
        assert r.items() >= judge_best_episodes(trajectories, q, n, dev).items() and len(r["episodes"]) == len(dev) * (5 // n)
    assert len(lines) == 1 + 1 + 2 * 3 + 1 and "oracle" in lines[3]


def test_an_interrupted_curve_goes_on_where_it_stopped(run, monkeypatch, capsys):
    played = []

    def evaluate(*arguments, name, **options):
        if len(played) == 2:
            raise KeyboardInterrupt
        played.append(name)
        return evaluate_policy(*arguments, name=name, **options)

    monkeypatch.setattr(curves, "evaluate_policy", evaluate)
    assert in_process(main, ("--run", run, "--best-of", "1,2"), monkeypatch, capsys).returncode == 130
    assert len(json.loads((run / "curves-dev.json").read_text())["rows"]) == 2
    played[:] = [None] * 9
    result, _ = told(run, "--best-of", "1,2", monkeypatch=monkeypatch, capsys=capsys)
    assert played[9:] == ["π_1, best of 1", "π_1, best of 2 by Q_1", "π_1, best of 2 by Q_2"] and len(result["rows"]) == 5
    played[:] = [None] * 9
    result, _ = told(run, "--best-of", "2,3", monkeypatch=monkeypatch, capsys=capsys)
    assert [name[:16] for name in played[9:]] == ["π_0, best of 3 b", "π_1, best of 3 b", "π_1, best of 3 b"] and len(result["rows"]) == 8
    monkeypatch.setattr(curves, "evaluate_policy", evaluate_policy)
    (run / "curves-dev.json").unlink()
    afresh, _ = told(run, "--best-of", "1,2,3", monkeypatch=monkeypatch, capsys=capsys)
    order = lambda rows: sorted(rows, key=lambda r: (r["policy"], r["prm"] or 0, r["n"]))
    assert order(afresh["rows"]) == order(result["rows"])


@pytest.mark.parametrize("flags, parts", (
    (("--run", "nowhere"), ("nowhere", "data.json")),
    (("--best-of", "1,two"), ("--best-of", "1,two")),
    (("--best-of", "0,1"), ("--best-of", "at least 1")),
    (("--best-of-episodes", "1,-2"), ("--best-of-episodes", "1,-2")),
    (("--policies", "7"), ("[7]",)),
    (("--temperature", -1), ("--temperature",)),
    (("--temperature", 0), ("--temperature", "same")),
    (("--split", "nosuchsplit"), ("nosuchsplit",)),
    (("--json", "{run}/config.json/out.json"), ("config.json",)),
    (("--json", "{run}/data.json"), ("data.json", "other results", "--json")),
    (("--seed", 10 ** 20), ("--seed",)),
))
def test_mistakes_are_told_in_one_line(run, flags, parts, monkeypatch, capsys):
    assert_refused(in_process(main, ("--run", run, *(str(flag).format(run=run) for flag in flags)), monkeypatch, capsys), *parts)
