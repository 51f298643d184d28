"""Evaluation: sums by hand, intervals that cover, and the real command line with every agent."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
from eval import (Human, evaluate_beams, evaluate_best_episodes, evaluate_policy,
                  evaluate_scripted)
from fast_alfworld import Expert, fit_prior, generate, generated_split, write_games
from fast_alfworld.score import bootstrap, narrate, paired_bootstrap, summarise, table
from results import explain
from rollout import Episode
from search import best_of_n
from tiny import (assert_refused, by_id, command, games, in_process, play, random_model,
                  read, taught, tokenizer)
from utils import save_model

FLAGS = ["--games", "tiny", "--n-generated", "8", "--max-steps", "6", "--temperature", "1"]
SPLIT = generated_split("valid_seen", 8, tiny=True)


def episode(game, won, actions=1):
    return {"game": game, "won": won, "actions": actions}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run directory with a policy and PRMs that fit it, one of them trained by BT."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "policy", taught(), tokenizer())
    for prm in (folder / "prm", folder / "bt" / "iter1" / "prm"):
        save_model(prm, random_model(3, "score"), tokenizer())
    (folder / "bt" / "config.json").write_text(json.dumps({"flags": {"prm_loss": "bt"}}))
    return folder


@pytest.fixture
def run(models, monkeypatch, capsys):
    """run(words): eval.py in this process, {p} being the models' folder."""
    def run_(*words):
        words = [str(word).format(p=models) for word in words]
        return in_process(evaluation.main, words, monkeypatch, capsys)
    return run_


PLAY = ("--policy", "{p}/policy", *FLAGS)


# --- sums ----------------------------------------------------------------------------------------

def test_summarise_and_table():
    types = {"a": "pick_and_place_simple", "b": "look_at_obj_in_light", "c": "look_at_obj_in_light"}
    some = [SimpleNamespace(id=game, task_type=t) for game, t in types.items()]
    episodes = [episode("a", True, 5), episode("a", False, 30), episode("b", True, 10),
                episode("b", True, 10), episode("c", True, 15), episode("c", True, 20)]
    result = summarise(episodes, some)
    assert (result["games"], result["success"], result["mean_actions"]) == (3, 5 / 6, 15.0)
    look = result["by_task"]["look_at_obj_in_light"]
    assert (look["games"], look["success"], look["interval"]) == (2, 1.0, [1.0, 1.0])
    assert list(result["by_task"]) == ["pick_and_place_simple", "look_at_obj_in_light"]
    lines = table(result)
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[-1].split() == ["all", "3", "83.3%", "50.0%", "…", "100.0%", "15.00"]


def test_intervals_resample_games():
    low, high = bootstrap([1.0] * 30 + [0.0] * 70)
    error = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert abs(low - 0.3 + error) < 0.015 and abs(high - 0.3 - error) < 0.015
    before = [episode(f"{i}", False) for i in range(100)]
    after = [episode(f"{i}", i < 30) for i in range(100)]
    gain = paired_bootstrap(before, after)
    assert gain == pytest.approx((0.3, low, high))
    assert paired_bootstrap(4 * before, 4 * after) == gain  # more episodes of a game, no more games
    assert paired_bootstrap(before, after[::-1]) == gain
    assert paired_bootstrap(after, after) == (0, 0, 0)
    # Paired: games that both win or both lose do not widen the interval.
    both = [episode(f"{i}", i % 2 == 0) for i in range(100)]
    better = [episode(f"{i}", i % 2 == 0 or i == 1) for i in range(100)]
    assert paired_bootstrap(both, better)[2] < 0.05
    with pytest.raises(ValueError, match="same games"):
        paired_bootstrap(before, after[1:])


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = bootstrap((rng.random(60) < 0.4).astype(float), n=500)
        covered += low <= 0.4 <= high
    assert 0.88 < covered / 200 < 0.99


# --- evaluating ----------------------------------------------------------------------------------

def test_evaluate_policy_plays_rollouts():
    result = evaluate_policy(taught(), tokenizer(), games()[-6:], episodes_per_game=2,
                             temperature=1.0, max_steps=9, seed=3)
    some = play(taught(), [Episode(g, k) for g in games()[-6:] for k in range(2)],
                temperature=1.0, max_steps=9, seed=3)
    assert result["episodes"] == [episode(t.game, t.won, len(t)) for t in some]
    assert {"games", "success", "interval", "mean_actions", "inadmissible", "by_task",
            "episodes"} == set(result)
    assert result["games"] == 6 and result["inadmissible"] == 0.0
    free = evaluate_policy(taught(), tokenizer(), games()[-6:], temperature=1.0, max_steps=9,
                           act=None, name="free")
    assert 0 < free["inadmissible"] < 1


def test_best_episodes_beside_all_and_the_oracle():
    prm, options = random_model(3, "score"), dict(temperature=1.0, max_steps=15, seed=1)
    chosen = sorted(games()[-12:], key=lambda game: game.id)
    result = evaluate_best_episodes(taught(), prm, tokenizer(), chosen, 4, **options)
    some = play(taught(), [Episode(game, k) for game in chosen for k in range(4)], **options)
    won = np.array([t.won for t in some]).reshape(-1, 4)
    assert 0 < won.mean() < 1
    assert result["plain"] == won.mean() and result["oracle"] == won.any(1).mean()
    assert result["success"] <= result["oracle"] and len(result["episodes"]) == len(chosen)


def test_evaluate_beams_counts_what_was_tried():
    options = dict(temperature=1.0, max_steps=6)
    result = evaluate_beams(taught(), random_model(3, "score"), tokenizer(), games()[-4:], (3, 2),
                            episodes_per_game=2, **options)
    assert len(result["episodes"]) == 8 and result["world_actions"] > result["mean_actions"]


def test_the_expert_wins_and_random_play_does_not():
    published_like = generated_split("valid_seen", 30)
    expert = Expert(fit_prior(games()))
    result = evaluate_scripted("expert", published_like, expert)
    assert result["success"] > 0.8 and result["mean_actions"] < 20
    assert result == evaluate_scripted("expert", published_like, expert, seed=1)
    weak = evaluate_scripted("random", published_like, Expert({}), episodes_per_game=2)
    assert weak["success"] < 0.1 and len(weak["episodes"]) == 60
    assert weak == evaluate_scripted("random", published_like, Expert({}), episodes_per_game=2)
    easy = evaluate_scripted("random", games()[-12:], Expert({}), episodes_per_game=8)
    assert 0 < easy["success"] < 1


def test_explained_episodes_show_exact_values():
    prm = random_model(3, "score")
    [t] = play(taught(), [Episode(games()[0], 0)], temperature=1.0, max_steps=9)
    shown = explain(by_id()[t.game], t, taught(), tokenizer(), 1.0, prm)
    assert len(shown["steps"]) == len(t) and shown["won"] == t.won
    with torch.no_grad():
        q = prm.scores(prm(torch.tensor(t.ids[None]).long()))[0, t.spans[:, 1] - 1].sigmoid()
    for k, step in enumerate(shown["steps"]):
        assert sum(o["pi"] for o in step["candidates"]) == pytest.approx(1, abs=1e-4)
        taken, = (o for o in step["candidates"] if o["action"] == step["action"])
        assert np.log(taken["pi"]) == pytest.approx(t.logp[k], abs=1e-3)
        assert taken["q"] == pytest.approx(float(q[k]), abs=1e-4)
        assert len(step["candidates"]) == t.n_candidates[k]
    lines = list(narrate(shown))
    assert f"{len(t)} actions" in lines[-1] and sum(" Q 0." in line for line in lines) >= len(t)
    without = explain(by_id()[t.game], t, taught(), tokenizer(), 1.0)
    assert not any(" Q " in line for line in narrate(without))


# --- the command line ----------------------------------------------------------------------------

def test_json_and_table(run, tmp_path):
    file = tmp_path / "new" / "result.json"
    done = run(*PLAY, "--episodes-per-game", 2, "--json", file)
    assert done.returncode == 0, done.stderr
    result = read(file)
    expected = evaluate_policy(taught(), tokenizer(), SPLIT, temperature=1.0, max_steps=6,
                               episodes_per_game=2)
    assert {k: result[k] for k in expected} == expected
    assert {"agent": "policy", "split": "valid_seen", "temperature": 1.0, "max_steps": 6,
            "best_of": 1, "act_beta": None, "lookahead": 0, "beam": None, "best_of_episodes": 1,
            "actions": "candidates", "engine": "fast", "episodes_per_game": 2, "seed": 0,
            "prm": None}.items() <= result.items()
    assert {"policy", "data", "seconds", "commit", "machine", "versions"} <= set(result)
    assert done.stdout.splitlines()[1:1 + len(table(result))] == table(result)


@pytest.mark.parametrize("words, shown", [
    (("--best-of", "4"), ""), (("--act-beta", "0.1"), ""), (("--beam", "2x3"), "in the world"),
    (("--best-of-episodes", "3"), "one of N"), (("--best-of", "3", "--lookahead", "1"), "")])
def test_acting_with_a_prm(run, tmp_path, words, shown):
    done = run(*PLAY, "--prm", "{p}/prm", *words, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert words[0] in done.stdout and shown in done.stdout and "NaN" not in done.stdout
    result = read(tmp_path / "r.json")
    assert str(result[words[0].strip("-").replace("-", "_")]) == words[1]
    if words == ("--best-of", "4"):
        expected = evaluate_policy(taught(), tokenizer(), SPLIT, temperature=1.0, max_steps=6,
                                   act=best_of_n(4), prm=random_model(3, "score"))
        assert result["episodes"] == expected["episodes"]


def test_the_gain_over_an_earlier_result(run, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert run(*PLAY, "--json", first).returncode == 0
    done = run("--agent", "expert", *FLAGS[:4], "--against", first, "--json", second)
    assert done.returncode == 0 and f"gain over {first}: +" in done.stdout
    assert read(second)["temperature"] is None
    assert read(second)["gain"] == list(paired_bootstrap(read(first)["episodes"],
                                                         read(second)["episodes"]))


def test_the_result_is_written_before_anything_is_printed(run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("the screen is gone")

    monkeypatch.setattr(evaluation, "report", fail)
    done = run(*PLAY, "--json", tmp_path / "r.json")
    assert done.returncode == 2 and done.stderr.endswith("error: the screen is gone\n")
    assert len(read(tmp_path / "r.json")["episodes"]) == 8


def test_watching(run):
    done = run(*PLAY, "--prm", "{p}/prm", "--watch")
    assert done.returncode == 0, done.stderr
    assert "Your task is to:" in done.stdout and " 1 > " in done.stdout
    assert "π 0." in done.stdout and "Q 0." in done.stdout
    assert run(*PLAY, "--prm", "{p}/prm", "--watch").stdout == done.stdout
    assert run(*PLAY, "--prm", "{p}/prm", "--watch", "--seed", 1).stdout != done.stdout
    for words in (("--prm", "{p}/bt/iter1/prm", "--best-of", 3), ("--actions", "free")):
        assert run(*PLAY, "--watch", *words).returncode == 0


def test_a_person_plays(run, monkeypatch):
    typed = iter(["?", "dance", *["look"] * 5, "inventory", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    done = run("--agent", "human", *FLAGS)
    assert done.returncode == 0, done.stderr
    assert "\nlook\n" in done.stdout and "Nothing happens." in done.stdout
    assert "You are not carrying anything." in done.stdout  # in the second game
    assert done.stdout.splitlines()[-1].split()[:3] == ["all", "1", "0.0%"]
    monkeypatch.setattr("builtins.input", lambda prompt: "quit")
    assert_refused(run("--agent", "human", *FLAGS), "no game")


def test_a_person_can_win():
    game = games()[-1]
    typed = iter(game.walkthrough)
    human = Human()
    human.act = lambda admissible: next(typed)
    result = evaluate_scripted("human", [game], human)
    assert result["episodes"] == [episode(game.id, True, len(game.walkthrough))]


def test_help_explains_every_flag(run):
    text = run("--help").stdout
    for part in ("--act-beta X", "KxM", "(default: 0.3)", "(default: valid_seen)", "runs/default",
                 "(default: 30)", "(default: all cores)", "200 train games", "(default: off)",
                 "(default: none)"):
        assert part in " ".join(text.split()), part


@pytest.mark.parametrize("words, parts", [
    ((), ("--policy DIR",)),
    (("--policy", "{p}/nothing", *FLAGS), ("no model there",)),
    (("--policy", "{p}/prm", *FLAGS), ("not a policy",)),
    ((*PLAY, "--prm", "{p}/policy", "--best-of", 2), ("not a PRM",)),
    ((*PLAY, "--best-of", 2), ("--best-of needs --prm",)),
    ((*PLAY, "--act-beta", 1), ("--act-beta needs --prm",)),
    ((*PLAY, "--prm", "{p}/prm"), ("--prm needs",)),
    ((*PLAY, "--prm", "{p}/prm", "--best-of", 2, "--beam", "2x2"), ("--best-of", "--beam")),
    ((*PLAY, "--prm", "{p}/prm", "--act-beta", 1, "--lookahead", 1), ("--lookahead needs",)),
    ((*PLAY, "--prm", "{p}/prm", "--act-beta", 0), ("--act-beta", "0.0001")),
    ((*PLAY, "--prm", "{p}/prm", "--beam", "3"), ("--beam", "KxM")),
    ((*PLAY, "--prm", "{p}/prm", "--beam", "3000x3000"), ("--beam", "64")),
    ((*PLAY, "--prm", "{p}/prm", "--best-of", "9" * 20), ("--best-of", "1024")),
    ((*PLAY, "--prm", "{p}/prm", "--best-of", 2, "--temperature", 0), ("--temperature",)),
    ((*PLAY, "--prm", "{p}/prm", "--best-of", 2, "--actions", "free"), ("--actions free",)),
    ((*PLAY, "--prm", "{p}/prm", "--beam", "2x2", "--engine", "alfworld"), ("--engine fast",)),
    ((*PLAY, "--prm", "{p}/prm", "--beam", "2x2", "--watch"), ("--beam",)),
    ((*PLAY, "--watch", "--json", "x.json"), ("--json",)),
    ((*PLAY, "--prm", "{p}/bt/iter1/prm", "--beam", "2x2"), ("one state only",)),
    ((*PLAY, "--prm", "{p}/bt/iter1/prm", "--best-of-episodes", 2), ("one state only",)),
    ((*PLAY, "--prm", "{p}/bt/iter1/prm", "--best-of", 2, "--lookahead", 1), ("one state only",)),
    ((*PLAY, "--engine", "alfworld"), ("file",)),
    ((*PLAY, "--json", "{p}"), ("not a file",)),
    ((*PLAY, "--json", "/dev/null"), ("not a file",)),
    ((*PLAY, "--json", "{p}/policy/config.json/x.json"), ("config.json",)),
    ((*PLAY, "--against", "{p}/missing.json"), ("missing.json",)),
    ((*PLAY, "--device", "meta"), ("--device meta",)),
    ((*PLAY, "--split", "nowhere"), ("nowhere",)),
    ((*PLAY, "--max-steps", 0), ("--max-steps",)),
    (("--agent", "expert", "--prm", "{p}/prm", *FLAGS), ("--agent policy",)),
    (("--agent", "robot"), ("--agent",))])
def test_refusals_are_one_line(run, words, parts):
    assert_refused(run(*words), *parts)


@pytest.mark.parametrize("text", [
    "", "[]", "5", "null", "{}", '{"episodes": 3}', '{"episodes": [3]}', '{"episodes": []}',
    '{"episodes": [{"game": "other", "won": true}]}', '{"episodes": [{"game": [], "won": 1}]}',
    '{"episodes": [{"game": "x"}]}', '{"episodes": [{"game": "x", "won": "yes"}]}', "[" * 10 ** 5])
def test_against_what_is_no_result(run, tmp_path, text):
    (tmp_path / "before.json").write_text(text)
    done = run(*PLAY, "--against", tmp_path / "before.json", "--json", tmp_path / "r.json")
    assert_refused(done, "before.json")
    assert not (tmp_path / "r.json").exists()


def test_as_a_program(models, tmp_path):
    """In a process of its own: exit codes, and dev, the same 200 games for every policy."""
    done = command("eval.py", "--agent", "random", "--split", "dev", "--games", "tiny",
                   "--n-generated", 40, "--json", tmp_path / "dev.json")
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "dev.json")["games"] == 8
    assert_refused(command("eval.py", "--best-of", "-1"), "--best-of")


def test_both_engines_give_equal_episodes(models, tmp_path, run):
    pytest.importorskip("alfworld")
    assert write_games(generate("valid_seen", 2), str(tmp_path), "valid_seen") == 2
    done = run("--policy", "{p}/policy", "--data", tmp_path, "--engine", "both", "--max-steps", 6,
               "--temperature", 1, "--prm", "{p}/prm", "--best-of", 2, "--json", tmp_path / "r")
    assert done.returncode == 0, done.stderr
    assert "equal in both engines: 2 of 2 episodes" in done.stdout
    assert read(tmp_path / "r")["equal_episodes"] == 2
