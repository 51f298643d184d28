"""One episode at a time: what is told of it, and a person at the keyboard."""

import builtins
import re

import pytest
import torch

import eval as eval_main
from common import save_model
from games import games_for
from play import PROPOSALS, narrated, told
from prm import score, sigmoid
from tiny import assert_refused, games, in_process, played, random_model, taught, tokenizer

FEW = ["--games", "generated", "--n-generated", "30", "--split", "train"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("play")
    prm = taught().with_score_head()
    torch.nn.init.normal_(prm.score.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    save_model(folder / "policy", taught(), tokenizer())
    save_model(folder / "prm", prm, tokenizer())
    return folder


def test_what_is_narrated_is_what_was_played():
    t = max(played(), key=len)
    game = next(g for g in games() if g.id == t.game)
    prm = random_model(3, "score")
    q = sigmoid(score(prm, [t])[0])
    with_q, without = told(game, t, taught(), tokenizer(), 1.0, 0, prm, q), told(game, t, taught(), tokenizer(), 1.0, 0)
    assert [s["q"] for s in with_q["steps"]] == pytest.approx(q, abs=1e-4) and all(s["q"] is None for s in without["steps"])
    assert [{o["action"]: o["times"] for o in s["others"]} for s in with_q["steps"]] == [{o["action"]: o["times"] for o in s["others"]} for s in without["steps"]]
    lines = list(narrated(with_q))
    taken = [re.match(r" +(\d+) > (.*?) +(\d) of 8   Q ([\d.]+)", line) for line in lines]
    taken = [m.groups() for m in taken if m]
    assert [(int(n), action, int(times), float(q)) for n, action, times, q in taken] == [(n, s["action"], s["times"], pytest.approx(s["q"], abs=1e-3)) for n, s in enumerate(with_q["steps"], 1)]
    assert sum(s["times"] + sum(o["times"] for o in s["others"]) for s in with_q["steps"]) == PROPOSALS * len(t)
    assert [s["inadmissible"] for s in with_q["steps"]] == [line.endswith("✗") for line in lines if re.match(r" *\d+ > ", line)]
    assert all(s["answer"] in lines for s in with_q["steps"]) and lines[-1].endswith(f"after {len(t)} actions")
    assert not any(re.search(r"Q \d", line) for line in narrated(without) if " of 8" in line)


@pytest.mark.parametrize("more", ([], ["--prm", "PRM"], ["--prm", "PRM", "--best-of", "3"]), ids=("policy", "with a PRM", "Best-of-3"))
def test_watch_prints_one_episode(saved, monkeypatch, capsys, more):
    words = [*FEW, "--policy", saved / "policy", "--watch", "--max-steps", "5", *(str(saved / "prm") if word == "PRM" else word for word in more)]
    done = in_process(eval_main.main, words, monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    assert "Your task is to: " in done.stdout and re.search(r"won after \d actions\n$", done.stdout)
    assert ("Q 0." in done.stdout) == bool(more)
    assert done.stdout == in_process(eval_main.main, words, monkeypatch, capsys).stdout
    assert done.stdout != in_process(eval_main.main, [*words, "--seed", "1"], monkeypatch, capsys).stdout  # another game


def test_a_person_who_knows_the_way_wins_and_may_leave(monkeypatch, capsys):
    """Through the walkthrough of the first game, with a question and a mistake on the way; the second is left."""
    everything = games_for("generated", None, "train", 30)[0]
    shown, words = [], []

    def typed(prompt):
        if not words:
            text = capsys.readouterr().out
            shown.append(text)
            if len(shown) > 1:
                raise EOFError
            game = next(g for g in everything if g.intro in text)
            words.extend(["?", "fly away", *game.walkthrough])
        return words.pop(0)

    monkeypatch.setattr(builtins, "input", typed)
    done = in_process(eval_main.main, [*FEW, "--agent", "human"], monkeypatch, capsys)
    assert done.returncode == 0 and "won after" in shown[1] and "Nothing happens." in shown[1] and "\nlook\n" in shown[1]
    actions = int(re.search(r"won after (\d+) actions", shown[1])[1])
    assert re.search(rf"all +1 +100.0% +{actions}.00", done.stdout)
    for left in (EOFError, KeyboardInterrupt, RuntimeError("input(): lost sys.stdin")):
        def leave(prompt):
            raise left
        monkeypatch.setattr(builtins, "input", leave)
        gone = in_process(eval_main.main, [*FEW, "--agent", "human"], monkeypatch, capsys)
        assert gone.returncode == 0 and gone.stdout.endswith("\nno game was played to its end\n")
    monkeypatch.setattr(builtins, "input", lambda prompt: "quit")
    assert "no game was played to its end" in in_process(eval_main.main, [*FEW, "--agent", "human"], monkeypatch, capsys).stdout


def test_what_cannot_be_watched_is_refused(saved, monkeypatch, capsys):
    for words in (["--agent", "expert", "--watch"], ["--policy", saved / "policy", "--prm", saved / "prm", "--beam", "2x2", "--watch"]):
        assert_refused(in_process(eval_main.main, [*FEW, *words], monkeypatch, capsys), "--watch")
