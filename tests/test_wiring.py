"""What train.py hands from stage to stage: on a finished run in which some episodes are said to have been won, and every flag has a value of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import read_model
from credit import judged_by
from flags import parse_flags
from games import generated_split, split_dev, task_folder
from qestimate import labels_of, q_table, returns, sarsa, shaped, squashed, state_labels, td_gae
from runs import load_games
from shards import load_trajectories, rollouts_in, save_trajectories
from tiny import TINY, capture, copy_of, in_process, played, random_model, read, same, some_branches
from train import held_out, objective
from train import main as train_main
from tree import Tree


def won_in_part(run, folder, *flags):
    """A copy of the finished run, to go on with other flags: every third of its rollouts is said to have been won."""
    folder = copy_of(run, folder, *flags)
    for file in folder.glob("iter*/rollouts/*.safetensors"):
        trajectories = load_trajectories(file)
        save_trajectories(file, [t if n % 3 else replace(t, won=True, reward=1.0, truncated=False) for n, t in enumerate(trajectories)])
    return folder


# --- what is held out -------------------------------------------------------------------------------------------------------------

def test_the_best_on_dev_is_kept_and_not_the_best_on_a_test_split(run, tmp_path, monkeypatch, capsys):
    folder = copy_of(run, tmp_path)
    for i, (dev, seen) in enumerate(((0.2, 0.1), (0.6, 0.2), (0.4, 0.9))):
        for split, success in (("dev", dev), ("valid_seen", seen)):
            file = folder / f"iter{i}/eval-{split}.json"
            file.write_text(json.dumps(read(file) | {"success": success}))
    (folder / "result.json").unlink()
    done = in_process(train_main, read(folder / "config.json")["words"], monkeypatch, capsys)
    assert done.returncode == 0 and "π_1 *" in done.stdout and read(folder / "result.json")["best"] == 1
    for name, head in (("policy", "lm"), ("prm", "score")):
        best, first, second = (read_model(folder / where / name, head=head)[0] for where in ("best", "iter1", "iter2"))
        assert same(best, first) and not same(best, second)


def test_dev_is_held_out_of_train(run):
    games = load_games(parse_flags(TINY), SimpleNamespace(note_data=lambda source: None))
    train, dev = split_dev(generated_split("train", 40), 6)
    assert [game.id for game in games.dev] == [game.id for game in dev] and [game.id for game in games.train] == [game.id for game in train]
    assert not {task_folder(game.id) for game in dev} & {task_folder(game.id) for game in train}
    for i in range(3):
        assert {e["game"] for e in read(run[0] / f"iter{i}/eval-dev.json")["episodes"]} == {game.id for game in dev}
    assert {t.game for i in (1, 2) for t in rollouts_in(run[0] / f"iter{i}")} <= {game.id for game in train}


def test_a_prm_is_judged_on_rollouts_of_other_folders(run, tmp_path, monkeypatch):
    folder = won_in_part(run, tmp_path)
    prm, test, labels, table, *_ = capture(monkeypatch, folder, "iter2/prm", "report")
    everything = rollouts_in(folder / "iter2")
    held = held_out(parse_flags(TINY), everything)
    expected = [t for t in everything if task_folder(t.game) in held]
    assert [(t.game, t.episode) for t in test] == [(t.game, t.episode) for t in expected] and 0 < len(test) < len(everything)
    assert (table["returns"] == np.concatenate([returns(t, 0.95) for t in expected])).all()


def test_inverse_prm_is_judged_and_checked_apart_from_what_it_learns_from(run, tmp_path, monkeypatch):
    folder = won_in_part(run, tmp_path, "--algo", "inverseprm", "--inverse-updates", "1")
    expert, learner, _ = capture(monkeypatch, folder, "iter2/prm", "told_apart")[:3]
    held = held_out(parse_flags(TINY), rollouts_in(folder / "iter2"))
    assert expert and learner and {task_folder(t.game) for t, *_ in (*expert, *learner)} <= held
    shown = []
    (folder / "iter2/prm.json").write_text("{}")
    monkeypatch.undo()
    monkeypatch.setattr("train.check_loss", lambda prm, tokenizer, demonstrations, *_: shown.extend(demonstrations))
    *_, options = capture(monkeypatch, folder, "iter2/prm", "train_inverse_prm")
    options["check"](0)
    assert shown and not {task_folder(t.game) for t, _ in shown} & held


# --- labels -----------------------------------------------------------------------------------------------------------------------

def test_q_and_v_are_taught_the_labels_of_their_own_places(run, tmp_path, monkeypatch):
    folder = won_in_part(run, tmp_path)
    _, fit, labels_objective, *_, options = capture(monkeypatch, folder, "iter2/prm", "train_prm")
    tokenizer = read_model(folder / "iter0/policy")[1]
    table = q_table(fit, tokenizer, 0.95)
    for fitted, labels, place in ((labels_objective, labels_of(fit, table), lambda t: t.spans[:, 1] - 1), (options["value"], state_labels(fit, table), lambda t: t.spans[:, 0] - 1)):
        assert len(set(np.concatenate([q for q, _ in labels]).round(4))) > 3
        logits = logits_of(q for q, _ in labels)
        assert excess(fitted, logits) == pytest.approx(0, abs=1e-4) and excess(fitted, [x.flip(0) for x in logits]) > 0.02
        assert all((where == place(t)).all() for where, t in zip(fitted.places, fit, strict=True))


def excess(fitted, logits):
    """The loss of these f above the labels' own entropy."""
    return float(fitted.loss(logits, range(len(logits)), sum(fitted.weights))[1]["excess"][0])


def logits_of(targets):
    return [torch.logit(torch.from_numpy(np.asarray(q, np.float32)), eps=1e-6) for q in targets]


def objective_of(*flags):
    """`train.objective` on rollouts as they are, with labels of their own. -> it, the trajectories, labels"""
    fit = played()
    rng = np.random.default_rng(0)
    labels = [(rng.random(len(t)).astype(np.float32), 1 / rng.integers(1, 4, len(t)).astype(np.float32)) for t in fit]
    return objective(parse_flags(["--rollouts", "100", "--min-games", "6", *flags]), SimpleNamespace(path=Path("anywhere"), device="cpu"), fit, labels, []), fit, labels


def test_curiosity_is_added_where_visits_are_few():
    fitted, _, labels = objective_of("--state", "world", "--curiosity", "0.2")
    right = [np.minimum(1, q + 0.2 * np.sqrt(weight)) for q, weight in labels]
    assert excess(fitted, logits_of(right)) == pytest.approx(0, abs=1e-4) and excess(fitted, logits_of(q for q, _ in labels)) > 0.01


@pytest.mark.parametrize("shape", ("difference", "potential"))
def test_labels_are_shaped_by_the_values_of_the_reference(shape, monkeypatch):
    values = [np.linspace(0.1, 0.8, len(t)) for t in played()]
    monkeypatch.setattr("train.read_model", lambda *_: (None, None))
    monkeypatch.setattr("train.opinions", lambda prms, some, places: [[V] for V in values])
    monkeypatch.setattr("flags.complaints", lambda *_: ())
    fitted, _, labels = objective_of("--shape-with", "anywhere", "--shape", shape)
    right = squashed(np.concatenate([shaped(q, V, 0.95, shape) for (q, _), V in zip(labels, values)]))
    right = np.split(right, np.cumsum([len(q) for q, _ in labels])[:-1])
    assert excess(fitted, logits_of(right)) == pytest.approx(0, abs=1e-4) and excess(fitted, logits_of(q for q, _ in labels)) > 0.01


@pytest.mark.parametrize("name, targets", (
    ("mc", lambda t, q, M: (q, np.diff(q, prepend=0))),
    ("td-gae", lambda t, q, M: td_gae(M, 0, t.reward, 0.95, 0.7)),
    ("sarsa", lambda t, q, M: sarsa(M, 0, t.reward, 0.95, 0.7))))
def test_promise_and_progress_have_the_targets_that_are_asked_for(name, targets):
    """The loss written out: (M − Q̂)² + w (M − M before − Â)², without progress of the first action."""
    fitted, fit, labels = objective_of("--prm-loss", "promise-progress", "--targets", name, "--progress-weight", "0.5", *(["--gae-lambda", "0.7"] if name != "mc" else []))
    f = [torch.from_numpy(np.random.default_rng(n).normal(size=len(t)).astype(np.float32)) for n, t in enumerate(fit)]
    loss, _ = fitted.loss(f, range(len(fit)), sum(fitted.weights))
    expected = 0.0
    for t, (q, _), logits in zip(fit, labels, f):
        M = torch.sigmoid(logits).numpy().astype(np.float64)
        q_hat, a_hat = (np.asarray(x, np.float64) for x in targets(t, q, M))
        expected += ((M - q_hat) ** 2).sum() + 0.5 * ((np.diff(M) - a_hat[1:]) ** 2).sum()
    assert float(loss) == pytest.approx(expected / sum(fitted.weights), rel=1e-3)


# --- flags ------------------------------------------------------------------------------------------------------------------------

FLAGS = ["--rollout-temperature", "0.8", "--eval-temperature", "0.6", "--dpo-temperature", "0.7", "--beta", "0.11", "--min-gap", "0.07", "--imitate", "1.5", "--average", "0.4", "--dpo-lr", "0.0012",
         "--prm-lr", "0.0017", "--prm-epochs", "1.5", "--prm-obs-weight", "0.9", "--prm-batch", "6", "--gamma", "0.9", "--proposals", "3", "--slots", "5"]


@pytest.mark.parametrize("stage, function, more, expected", (
    ("iter2/rollouts", "play_shards", (), {"temperature": 0.8, "max_steps": 8, "slots": 5}),
    ("iter2/prm", "train_prm", (), {"epochs": 1.5, "lr": 0.0017, "batch": 6, "obs_weight": 0.9}),
    ("iter2/prm", "train_inverse_prm", ("--algo", "inverseprm", "--inverse-updates", "7"), {"temperature": 0.8, "updates": 7, "lr": 0.0017, "batch": 6, "obs_weight": 0.9}),
    ("iter2/dpo", "online_dpo", (), {"temperature": 0.7, "beta": 0.11, "min_gap": 0.07, "imitate": 1.5, "averaged": 0.4, "lr": 0.0012, "proposals": 3, "pairs": 64, "trunks": 4, "states_per_trunk": 8}),
    ("iter2/eval-dev", "evaluate_policy", (), {"temperature": 0.6, "episodes_per_game": 1, "max_steps": 8, "slots": 5, "seed": 0}),
))
def test_a_flag_reaches_its_stage_and_no_other(run, stage, function, more, expected, tmp_path, monkeypatch):
    flags = [flag for pair in zip(FLAGS[::2], FLAGS[1::2]) for flag in pair if not ("inverseprm" in more and pair[0] == "--prm-epochs")]
    folder = won_in_part(run, tmp_path, *flags, *more)
    if stage.endswith("rollouts"):
        shutil.rmtree(folder / stage)
    *_, options = capture(monkeypatch, folder, stage, function)
    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize("hide", (False, True))
def test_inverse_prm_is_told_how_episodes_end(run, hide, tmp_path, monkeypatch):
    folder = won_in_part(run, tmp_path, "--algo", "inverseprm", "--gamma", "0.9", *["--hide-ends"] * hide)
    ends = capture(monkeypatch, folder, "iter2/prm", "train_inverse_prm")[5]
    assert ends[:2] == (0.9, hide)


@pytest.mark.parametrize("head", ("score", "relative"))
@pytest.mark.parametrize("how", ("mean", "min"))
@torch.no_grad()
def test_prms_judge_together(how, head):
    prms, tree = [random_model(seed, head) for seed in (1, 2, 3)], Tree(*some_branches())
    each = torch.stack([tree.scores(prm) if head == "relative" else tree.scores(prm).sigmoid() for prm in prms])
    assert each.std(0).min() > 0
    torch.testing.assert_close(judged_by(prms, how)(tree), each.mean(0) if how == "mean" else each.min(0).values)
