"""Evaluation: its sums by hand, its JSON contract, and the real command line with every agent."""

import json
import shutil
from argparse import ArgumentTypeError
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import save_model, write_json
from env import AlfworldEnv
from eval import main as eval_main
from eval import evaluate_beams, evaluate_best_episodes, evaluate_policy, evaluate_scripted
from eval import judge_best_episodes, keep_by_expand, paired_bootstrap, summarise, table
from games import generated_split, split_dev
from search import best_episodes, best_of_n, last_scores, prediction_accuracy
from tiny import assert_refused, command, games, in_process, play, played, prior, random_model, taught, tokenizer
from tokenizer import Tokenizer

CONTRACT = {"agent": str, "split": str, "games": int, "success": float, "mean_actions": float, "by_task": dict, "max_steps": int, "temperature": (float, type(None)),
            "engine": str, "alfworld": str, "data": str, "seed": int, "episodes": list}


def episode(game, won, actions):
    return {"game": game, "won": won, "actions": actions}


# --- sums ------------------------------------------------------------------------------------------------------------------------

def test_summarise():
    some = [SimpleNamespace(id="a", task_type="pick_and_place_simple"), SimpleNamespace(id="b", task_type="look_at_obj_in_light"),
            SimpleNamespace(id="c", task_type="look_at_obj_in_light")]
    played = [episode("a", True, 5), episode("a", False, 30), episode("b", True, 10), episode("c", True, 15), episode("c", True, 20)]
    told = summarise(played, some)
    assert (told["games"], told["success"], told["mean_actions"]) == (3, 0.8, 16.0)
    assert told["by_task"] == {"pick_and_place_simple": {"games": 1, "success": 0.5, "mean_actions": 17.5},
                               "look_at_obj_in_light": {"games": 2, "success": 1.0, "mean_actions": 15.0}}
    lines = table(told)
    assert lines[-1].split() == ["all", "3", "80.0%", "16.00"] and len(lines) == 4 and len({len(line) for line in lines}) == 1


def test_paired_bootstrap_on_known_cases():
    lost, won = ([episode(f"{i}", w, 1) for i in range(50)] for w in (False, True))
    assert paired_bootstrap(lost, lost) == (0, 0, 0) and paired_bootstrap(lost, won) == (1, 1, 1) and paired_bootstrap(won, lost) == (-1, -1, -1)
    # games are resampled, not episodes: four episodes of each game say no more than one
    before = [episode(f"{i}", False, 1) for i in range(100)]
    after = [episode(f"{i}", i < 30, 1) for i in range(100)]
    mean, low, high = paired_bootstrap(before, after)
    error = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert mean == pytest.approx(0.3) and low == pytest.approx(0.3 - error, abs=0.015) and high == pytest.approx(0.3 + error, abs=0.015)
    assert paired_bootstrap(4 * before, 4 * after) == (pytest.approx(mean), pytest.approx(low), pytest.approx(high))
    assert paired_bootstrap(before, after[::-1]) == (mean, low, high)  # the order of episodes says nothing
    # paired: what both win and both lose does not widen the interval
    both = [episode(f"{i}", i % 2 == 0, 1) for i in range(100)]
    better = [episode(f"{i}", i % 2 == 0 or i == 1, 1) for i in range(100)]
    assert paired_bootstrap(both, better)[2] < 0.05
    with pytest.raises(ValueError, match="same games"):
        paired_bootstrap(lost, won[1:])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        before, after = ([episode(f"{i}", bool(w), 1) for i, w in enumerate(rng.random(60) < p)] for p in (0.4, 0.6))
        _, low, high = paired_bootstrap(before, after, n=500)
        covered += low <= 0.2 <= high
    assert 0.88 < covered / 200 < 0.99


def test_best_episodes_are_judged_beside_all_and_beside_the_oracle():
    """Four episodes of each of two games, in pairs: chosen by q, not by what was won."""
    won = ((False, True, False, False), (True, True, False, True))
    some = [replace(t, game=game.id, won=w, episode=k) for game, mine in zip(games(), won) for k, (t, w) in enumerate(zip(played(), mine))]
    q = np.array([0, 1, 2, 3, 3, 1, 1, 2])
    told = judge_best_episodes(some, q, 2, games())
    lengths = [len(t) for t in played()[:4]]
    assert [e["won"] for e in sorted(told["episodes"], key=lambda e: e["game"] != games()[0].id)] == [True, False, True, True]
    assert (told["success"], told["oracle"], told["plain"]) == (0.75, 0.75, {"success": 0.5, "mean_actions": np.mean(lengths)})
    assert told["mean_actions"] == np.mean([lengths[k] for k in (1, 3, 0, 3)])
    assert judge_best_episodes(some, q, 4, games())["oracle"] == 1 and judge_best_episodes(some, -q, 2, games())["success"] == 0.25


def test_keep_by_expand():
    assert keep_by_expand("4x8") == keep_by_expand("4X8") == (4, 8)
    for text in ("4", "4x", "x4", "4x0", "-1x4", "4x4x4", "axb", "1.5x2", ""):
        with pytest.raises(ArgumentTypeError, match="KxM"):
            keep_by_expand(text)


# --- agents ----------------------------------------------------------------------------------------------------------------------

def test_a_policy_is_evaluated_episode_by_episode():
    options = dict(temperature=0.7, max_steps=6, episodes_per_game=2, seed=4)
    told = evaluate_policy(taught(), tokenizer(), games()[:6], slots=12, **options)
    assert [(e["game"], e["actions"]) for e in told["episodes"]] == sorted((e["game"], e["actions"]) for e in told["episodes"])
    assert len(told["episodes"]) == 12 and told["games"] == 6 and 0 <= told["inadmissible"] <= 1
    other_slots = evaluate_policy(taught(), tokenizer(), games()[:6][::-1], slots=5, **options)
    assert other_slots["episodes"] == told["episodes"] and other_slots["inadmissible"] == told["inadmissible"]
    assert evaluate_policy(taught(), tokenizer(), games()[:6], admissible=True, **options)["inadmissible"] == 0


def test_the_expert_wins_and_chance_does_not():
    expert = evaluate_scripted("expert", games(), prior=prior(), max_steps=40)
    chance = evaluate_scripted("random", games()[:10], max_steps=20, episodes_per_game=2)
    assert expert["success"] >= 0.95 and expert["mean_actions"] < 20
    assert chance["success"] <= 0.2 and chance["mean_actions"] > 15 and len(chance["episodes"]) == 20
    assert chance == evaluate_scripted("random", games()[:10], max_steps=20, episodes_per_game=2)
    assert chance["episodes"] != evaluate_scripted("random", games()[:10], max_steps=30, episodes_per_game=2, seed=1)["episodes"]


# --- the command line --------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy and a PRM on disk."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "policy", taught(), tokenizer())
    prm = taught().with_score_head()
    torch.nn.init.normal_(prm.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(folder / "prm", prm, tokenizer())
    words = Tokenizer.train(["some words", "of its own"], {"desk": 2}, min_count=1)
    save_model(folder / "other", random_model(head="score", vocab=len(words)), words)
    return folder


def evaluated(tmp_path, *flags, n=8):
    """eval.py on n generated games -> (the JSON, the printed lines), the contract checked."""
    file = tmp_path / "result.json"
    run = command("eval.py", "--games", "generated", "--n-generated", n, "--json", file, *flags)
    assert run.returncode == 0, run.stderr
    told = json.loads(file.read_text())
    for name, kind in CONTRACT.items():
        assert isinstance(told[name], kind), name
    episodes = told["episodes"]
    assert all(e.keys() == {"game", "won", "actions"} and type(e["won"]) is bool and 1 <= e["actions"] <= told["max_steps"] for e in episodes)
    assert told["success"] == pytest.approx(np.mean([e["won"] for e in episodes])) and 0 <= told["success"] <= 1
    assert told["mean_actions"] == pytest.approx(np.mean([e["actions"] for e in episodes]))
    assert told["games"] == len({e["game"] for e in episodes}) == sum(part["games"] for part in told["by_task"].values()) == n
    assert f"{told['success']:.1%}" in run.stdout and f"cap {told['max_steps']}" in run.stdout and told["alfworld"] in run.stdout
    return told, run.stdout.splitlines()


def test_random_and_expert_by_command(tmp_path):
    chance, _ = evaluated(tmp_path, "--agent", "random", "--split", "valid_seen", "--max-steps", 10)
    assert (chance["agent"], chance["split"], chance["max_steps"], chance["temperature"]) == ("random", "valid_seen", 10, None)
    expert, lines = evaluated(tmp_path, "--agent", "expert", "--split", "valid_unseen", "--max-steps", 50)
    assert expert["success"] == 1 and chance["success"] < 1 and expert["engine"] == "fast" and "generated" in expert["data"]
    assert lines[-1].split()[:3] == ["all", "8", "100.0%"]


def test_a_policy_by_command_equals_the_same_in_python(folder, tmp_path):
    from games import generated_split
    told, lines = evaluated(tmp_path, "--policy", folder / "policy", "--max-steps", 5, "--episodes-per-game", 2, "--seed", 3, "--temperature", 0.5)
    again = evaluate_policy(taught(), tokenizer(), generated_split("valid_seen", 8), max_steps=5, episodes_per_game=2, seed=3, temperature=0.5)
    assert told["episodes"] == again["episodes"] and told["inadmissible"] == again["inadmissible"]
    assert lines[-1] == f"inadmissible actions: {told['inadmissible']:.1%}"


def test_best_of_n_by_command(folder, tmp_path):
    from games import generated_split
    from common import read_model
    flags = ("--policy", folder / "policy", "--max-steps", 20, "--episodes-per-game", 2, "--temperature", 1)
    told, _ = evaluated(tmp_path, *flags, "--prm", folder / "prm", "--best-of", 3)
    options = dict(max_steps=20, episodes_per_game=2, temperature=1.0)
    again = evaluate_policy(taught(), tokenizer(), generated_split("valid_seen", 8), choose=best_of_n(read_model(folder / "prm", head="score")[0], 3), **options)
    plain = evaluate_policy(taught(), tokenizer(), generated_split("valid_seen", 8), **options)
    same = lambda a, b: all(a[key] == b[key] for key in ("episodes", "inadmissible"))
    assert told["best_of"] == 3 and same(told, again) and not same(told, plain)


def test_searches_by_command_equal_the_same_in_python(folder, tmp_path):
    from games import generated_split
    from common import read_model
    prm, some = read_model(folder / "prm", head="score")[0], generated_split("valid_seen", 4)
    flags = ("--policy", folder / "policy", "--prm", folder / "prm", "--max-steps", 4, "--temperature", 1)
    options = dict(max_steps=4, temperature=1.0)

    told, lines = evaluated(tmp_path, *flags, "--beam", "2x3", "--episodes-per-game", 2, n=4)
    again = evaluate_beams(taught(), prm, tokenizer(), some, 2, 3, episodes_per_game=2, **options)
    assert told.items() >= again.items() and told["beam"] == "2x3" and 4 < told["world_actions"] <= 8
    assert lines[-2] == f"actions tried in the world an episode: {told['world_actions']:.1f}"

    told, lines = evaluated(tmp_path, *flags, "--best-of-episodes", 3, n=4)
    again = evaluate_best_episodes(taught(), prm, tokenizer(), some, 3, **options)
    rollouts = play(taught(), [(game, k) for game in some for k in range(3)], **options)
    chosen = best_episodes(rollouts, last_scores(prm, rollouts), 3)
    assert told.items() >= again.items() and told["best_of_episodes"] == 3 and told["inadmissible"] == np.mean(np.concatenate([t.inadmissible for t in chosen]))
    assert f"{told['plain']['success']:.1%}" in lines[-2] and f"{told['oracle']:.1%}" in lines[-2]

    told, lines = evaluated(tmp_path, *flags, "--best-of", 2, "--lookahead", 1, n=4)
    choose = best_of_n(prm, 2, 1)
    again = evaluate_policy(taught(), tokenizer(), some, choose=choose, predictions=True, **options)
    assert told.items() >= again.items() and (told["best_of"], told["lookahead"]) == (2, 1)
    rollouts = play(taught(), [(game, 0) for game in some], choose=choose, **options)
    assert told["predictions"] == prediction_accuracy(taught(), rollouts) and f"{told['predictions']['tokens']:.1%}" in lines[-2]


def test_a_prm_that_compares_actions_of_one_state_is_for_those_alone(folder, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "bt", taught().with_score_head("relative"), tokenizer())
    flags = ("--games", "generated", "--n-generated", "2", "--max-steps", "2", "--policy", folder / "policy", "--prm", tmp_path / "bt")
    assert in_process(eval_main, (*flags, "--best-of", "2"), monkeypatch, capsys).returncode == 0
    for search in (("--beam", "2x2"), ("--best-of-episodes", "2"), ("--best-of", "2", "--lookahead", "1")):
        assert_refused(in_process(eval_main, (*flags, *search), monkeypatch, capsys), "bt", "one state")


def test_alfworlds_own_engine_judges_alike(folder, tmp_path):
    flags = ("--policy", folder / "policy", "--max-steps", 3, "--temperature", 1)
    fast, stock, both = (evaluated(tmp_path, *flags, "--engine", engine, n=2)[0] for engine in ("fast", "alfworld", "both"))
    assert stock["engine"] == "alfworld" and [fast[k] for k in ("episodes", "success", "inadmissible")] == [stock[k] for k in ("episodes", "success", "inadmissible")]
    assert both["episodes"] == stock["episodes"] and both["equal_episodes"] == len(stock["episodes"])


def test_a_result_against_an_earlier_one(folder, tmp_path, monkeypatch, capsys):
    flags = ("--policy", folder / "policy", "--games", "generated", "--n-generated", 8, "--max-steps", 12, "--episodes-per-game", 2)
    results = []
    for temperature, more in ((0.3, ()), (1.0, ("--against", tmp_path / "0.3.json"))):
        done = in_process(eval_main, (*flags, "--temperature", temperature, "--json", tmp_path / f"{temperature}.json", *more), monkeypatch, capsys)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"{temperature}.json").read_text())["episodes"])
    gap, low, high = (100 * x for x in paired_bootstrap(*results))
    assert f"{gap:+.1f} points ({low:+.1f} … {high:+.1f})" in done.stdout


@pytest.mark.parametrize("where", ("iter0/policy", "best/policy"))
def test_dev_is_what_the_policys_run_held_out_wherever_it_is_kept(folder, where, tmp_path, monkeypatch, capsys):
    """By the run's config.json, or by what was kept beside the policy, whose folder may be elsewhere now."""
    flags, data = {"n_generated": 40, "dev_games": 6, "data": None}, {"train": "40 generated games of train, seed 0, alfworld 0.4.2"}
    shutil.copytree(folder / "policy", tmp_path / where)
    if where.startswith("iter"):
        write_json(tmp_path / "config.json", {"flags": flags})
        write_json(tmp_path / "data.json", data)
    else:
        write_json(tmp_path / "best/run.json", {"flags": flags, "data": data})
    words = ("--policy", tmp_path / where, "--split", "dev", "--max-steps", 1)
    done = in_process(eval_main, (*words, "--json", tmp_path / "out.json"), monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    held_out = split_dev(generated_split("train", 40), 6)[1]
    assert {e["game"] for e in json.loads((tmp_path / "out.json").read_text())["episodes"]} == {game.id for game in held_out}
    assert_refused(in_process(eval_main, (*words, "--n-generated", 900), monkeypatch, capsys), "--n-generated", "held out")


def test_a_prm_of_shaped_labels_is_for_actions_of_one_state(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "prm", tmp_path / "iter1/prm")
    write_json(tmp_path / "config.json", {"flags": {"shape_with": "somewhere"}})
    flags = ("--policy", folder / "policy", "--prm", tmp_path / "iter1/prm", "--games", "generated", "--n-generated", 2, "--max-steps", 1)
    assert_refused(in_process(eval_main, (*flags, "--best-of-episodes", 2), monkeypatch, capsys), "shaped", "--best-of alone")
    assert in_process(eval_main, (*flags, "--best-of", 2), monkeypatch, capsys).returncode == 0


def test_where_the_engines_differ_it_says_so(folder, tmp_path, monkeypatch, capsys):
    class Stricter(AlfworldEnv):
        def __init__(self, max_steps):
            super().__init__(1)

    monkeypatch.setattr("eval.StockAlfworldEnv", Stricter)
    flags = ("--policy", folder / "policy", "--max-steps", 3, "--games", "generated", "--n-generated", 3, "--engine", "both", "--json", tmp_path / "out.json")
    done = in_process(eval_main, flags, monkeypatch, capsys)
    assert done.returncode == 0 and "0 of 3 episodes" in done.stdout and json.loads((tmp_path / "out.json").read_text())["equal_episodes"] == 0


@pytest.mark.parametrize("flags, parts", (
    ((), ("--policy",)),
    (("--policy", "nowhere"), ("nowhere", "no model there")),
    (("--policy", "{policy}", "--prm", "nowhere", "--best-of", 2), ("nowhere", "no model there")),
    (("--policy", "{policy}", "--best-of", 2), ("--prm",)),
    (("--policy", "{prm}"), ("prm", "not a policy")),
    (("--policy", "{policy}", "--prm", "{policy}", "--best-of", 2), ("policy", "not a PRM")),
    (("--policy", "{policy}", "--prm", "{prm}", "--best-of", 2, "--admissible"), ("--admissible", "--best-of")),
    (("--policy", "{policy}", "--prm", "{prm}", "--beam", "2x2", "--admissible"), ("--admissible", "--beam")),
    (("--policy", "{policy}", "--prm", "{prm}", "--beam", "2x2", "--engine", "alfworld"), ("--beam", "--engine fast")),
    (("--policy", "{policy}", "--watch", "--engine", "both"), ("--engine both", "--watch")),
    (("--policy", "{policy}", "--prm", "{prm}", "--beam", "8"), ("--beam", "KxM")),
    (("--policy", "{policy}", "--prm", "{prm}", "--beam", "2x2", "--best-of", 2), ("--best-of", "--beam")),
    (("--policy", "{policy}", "--prm", "{prm}", "--best-of", 2, "--best-of-episodes", 2), ("--best-of", "--best-of-episodes")),
    (("--policy", "{policy}", "--beam", "2x2"), ("--beam", "--prm")),
    (("--policy", "{policy}", "--best-of-episodes", 2), ("--best-of-episodes", "--prm")),
    (("--policy", "{policy}", "--best-of-episodes", 0), ("--best-of-episodes",)),
    (("--policy", "{policy}", "--prm", "{prm}", "--lookahead", 1), ("--lookahead", "--best-of")),
    (("--policy", "{policy}", "--prm", "{prm}", "--best-of", 2, "--lookahead", -1), ("--lookahead",)),
    (("--agent", "expert", "--best-of", 2), ("--best-of", "--agent policy")),
    (("--policy", "{policy}", "--prm", "{other}", "--best-of", 2), ("other", "vocabulary")),
    (("--agent", "wizard"), ("wizard",)),
    (("--agent", "random", "--split", "nosuchsplit"), ("nosuchsplit",)),
    (("--agent", "random", "--games", "alfworld", "--data", "/nowhere"), ("/nowhere",)),
    (("--agent", "random", "--max-steps", 0), ("--max-steps",)),
    (("--agent", "random", "--max-steps", "ten"), ("--max-steps", "ten")),
    (("--agent", "random", "--temperature", -1), ("--temperature",)),
    (("--agent", "random", "--temperature", "nan"), ("--temperature", "greedy")),
    (("--agent", "random", "--temperature", "1e-300"), ("--temperature", "greedy")),
    (("--agent", "random", "--json", "{policy}"), ("--json", "folder")),
    (("--agent", "random", "--seed", -1), ("--seed",)),
    (("--agent", "random", "--seed", 10 ** 20), ("--seed",)),
    (("--agent", "random", "--admissible"), ("--admissible", "--agent policy")),
    (("--policy", "{policy}", "--prm", "{prm}", "--best-of", 2, "--temperature", 0), ("--temperature 0", "--best-of")),
    (("--agent", "random", "--max-steps", 1, "--against", "{policy}/config.json"), ("--against", "no result")),
    (("--policy", "{policy}", "--device", "tpu9"), ("tpu9",)),
    (("--agent", "random", "--no-such-flag"), ("--no-such-flag",)),
    (("--agent", "random", "--max-steps", 1, "--json", "{policy}/config.json/out.json"), ("config.json",)),
))
def test_mistakes_are_told_in_one_line(folder, flags, parts, monkeypatch, capsys):
    flags = [str(flag).format(policy=folder / "policy", prm=folder / "prm", other=folder / "other") for flag in flags]
    games = () if "--games" in flags else ("--games", "generated", "--n-generated", 8)
    assert_refused(in_process(eval_main, (*games, *flags), monkeypatch, capsys), *parts)


def test_a_mistake_ends_the_process_with_code_2():
    assert_refused(command("eval.py", "--policy", "nowhere", "--games", "generated", "--n-generated", 8), "no model there")
