"""The trained agent in the box: as small as promised, as good as its record says, and opened by the programs of the README."""

import json
import re

import pytest
import torch

from common import read_model
from eval import evaluate_policy
from games import games_for
from search import best_of_n, read_prm
from tiny import ROOT, command

BOX = ROOT / "checkpoints"


@pytest.fixture(scope="module")
def told():
    """What is written beside it."""
    return json.loads((BOX / "run.json").read_text())


@pytest.fixture(scope="module")
def agent():
    return read_model(BOX / "policy")


def test_the_box_is_small_and_says_where_it_comes_from(told):
    assert sum(f.stat().st_size for f in BOX.rglob("*") if f.is_file()) < 10_000_000
    assert told["command"].startswith("train.py") and len(told["commit"]) == 40 and "train" in told["data"] and told["metrics"]["iteration"] > 0
    assert not re.search(r'[" ]/\w', json.dumps(told))  # no path of the machine it was made on


def test_it_wins_as_often_as_its_record_says(agent, told, data_dir):
    """Five episodes of each game of valid_seen. Sums in another order may tip a sample: not digit for digit on every machine."""
    games, _ = games_for("alfworld", None, "valid_seen")
    flags = told["flags"]
    result = evaluate_policy(*agent, games, episodes_per_game=flags["episodes_per_game"], temperature=flags["eval_temperature"], max_steps=flags["max_steps"], seed=flags["seed"])
    assert result["games"] == told["metrics"]["valid_seen"]["games"] == 140
    assert result["success"] == pytest.approx(told["metrics"]["valid_seen"]["success"], abs=0.02)
    assert result["mean_actions"] == pytest.approx(told["metrics"]["valid_seen"]["mean_actions"], abs=0.5)


def test_it_plays_without_any_published_game(agent, some_games):
    """Generated games, which it has not seen: it still wins most of them."""
    assert evaluate_policy(*agent, some_games)["success"] > 0.6


def test_policy_and_prm_speak_one_language(agent, some_games):
    policy, tokenizer = agent
    prm = read_prm(BOX / "prm", tokenizer, torch.device("cpu"))
    assert prm.config.head == "score"
    assert evaluate_policy(policy, tokenizer, some_games[:10], choose=best_of_n(prm, 4))["games"] == 10


def test_the_commands_of_the_readme():
    done = command("eval.py", "--policy", BOX / "policy", "--prm", BOX / "prm", "--watch", "--games", "generated")
    assert done.returncode == 0 and " Q 0." in done.stdout, done.stderr
    done = command("eval.py", "--policy", BOX / "policy", "--prm", BOX / "prm", "--games", "generated", "--n-generated", "8", "--best-of", "2")
    assert done.returncode == 0 and "success" in done.stdout, done.stderr
