"""The loop by its command line: what a run leaves behind, every kind of it, and bad values."""

import json
import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dpo
import prm
import tiny
import train
from candidates import PrefixTree
from fast_alfworld import generated_split, split_dev, task_folder
from fast_alfworld.cli import UserError
from fast_alfworld.files import lock, write_json
from optim import optimise
from qestimate import labels_of, q_table
from rollout import load_trajectories, save_trajectories
from tiny import (TINY, assert_refused, command, in_process, random_model, read, same, taught,
                  tokenizer)
from utils import read_model, save_model


@pytest.fixture
def again(run, tmp_path, monkeypatch, capsys):
    """again(*flags, without=…) continues a copy of the finished run, within this process.

    flags: those of the copy from now on; without: paths that are deleted first. A third of the
    copy's rollouts count as won, so that every objective has something to learn.
    """
    def start(*flags, without=()):
        folder = tmp_path / "run"
        shutil.copytree(run[0], folder)
        for file in folder.glob("iter*/rollouts/*.safetensors"):
            some = load_trajectories(file)
            save_trajectories(file, [replace(t, won=n % 3 == 0, reward=float(n % 3 == 0),
                                             truncated=n % 3 > 0) for n, t in enumerate(some)])
        words, config = [*TINY, *flags, "--out", folder], read(folder / "config.json")
        args = vars(train.parse(list(map(str, words)))[0])
        write_json(folder / "config.json", config | {"flags": args})
        for path in without:
            for file in sorted(folder.glob(path)):
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        monkeypatch.setenv("GIT_DIR", "/nowhere")
        return folder, in_process(train.main, words, monkeypatch, capsys)

    return start


PRM_ON = ("iter1/prm*", "iter1/dpo*", "iter1/policy", "iter1/eval*", "iter2", "best", "*.jsonl")


# --- a whole run ---------------------------------------------------------------------------------

def test_a_run_ends_with_a_table_of_all_policies(run):
    folder, done, _ = run
    rows = re.findall(r"^π_(\d)( \*)?  .*$", done.stdout, re.MULTILINE)
    assert [i for i, _ in rows] == ["0", "1", "2"] and sum(bool(star) for _, star in rows) == 1
    assert "cap 8, temperature 1.0, actions candidates" in done.stdout
    result = read(folder / "result.json")
    assert len(result["rows"]) == 3 and result["flags"]["max_steps"] == 8
    for i, row in enumerate(result["rows"]):
        assert row["iteration"] == i and row["best"] == (i == result["best"])
        for split in ("dev", "valid_seen"):
            record = read(folder / f"iter{i}/eval-{split}.json")
            assert row[split]["success"] == record["success"]
            won = [e["won"] for e in record["episodes"]]
            assert record["success"] == np.mean(won) and len(row[split]["gain"]) == 3
            assert len(won) == record["games"] * (2 if split == "dev" else 1)
    assert result["rows"][0]["dev"]["gain"] == [0, 0, 0]


def test_two_at_once_in_one_folder_are_refused(run):
    kept, before = lock(run[0] / ".lock", "busy"), (run[0] / "config.json").read_bytes()
    done = tiny.train(run[0], *TINY, "--iters", "3")
    assert_refused(done, "another train.py is at work there", str(os.getpid()))
    assert (run[0] / "config.json").read_bytes() == before
    kept.close()


def test_every_stage_leaves_its_record_and_nothing_else(run):
    folder, _, _ = run
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    expected = {"iter0/sft"} | {f"iter{i}/{s}" for i in (1, 2) for s in ("rollouts", "prm", "dpo")}
    expected |= {f"iter{i}/eval-{split}" for i in range(3) for split in ("dev", "valid_seen")}
    costs = read(folder / "state.json")
    assert {line["stage"] for line in lines} == expected == costs.keys() and len(lines) == 13
    assert all(cost["seconds"] > 0 and 100 < cost["peak_mb"] < 10_000 for cost in costs.values())
    assert not list(folder.rglob("*.state.safetensors")) and not list(folder.rglob("*tmp*"))
    order = list(costs)  # a run can be watched while it learns
    assert all(order.index(f"iter{i}/eval-dev") < order.index(f"iter{i + 1}/rollouts")
               for i in (0, 1))
    config = read(folder / "config.json")
    assert config["flags"]["iters"] == 2 and config["versions"]["torch"] == torch.__version__
    assert config["games"].keys() == {"train", "dev", "valid_seen"}
    stages = {line["stage"]: line for line in lines}
    assert stages["iter1/dpo"]["log"][-1]["step"] == 3
    assert stages["iter0/sft"]["log"][-1]["step"] == 6  # 48 demonstrations, once, in batches of 8
    policy = read_model(folder / "iter0/policy")[0]
    assert stages["iter0/sft"]["parameters"] == policy.n_parameters()


def test_rollouts_are_as_many_as_asked_for_of_train_games_and_the_models_move(run):
    folder, _, _ = run
    train_games, dev = split_dev(generated_split("train", 40, tiny=True))
    for i in (1, 2):
        some = [t for file in sorted((folder / f"iter{i}/rollouts").iterdir())
                for t in load_trajectories(file)]
        assert len({(t.game, t.episode) for t in some}) == 40 == len(some)
        games = {t.game for t in some}
        assert len(games) == 10 and games <= {game.id for game in train_games}
        record = read(folder / f"iter{i}/rollouts.json")
        assert record["episodes"] == 40
        assert record["mean_actions"] == pytest.approx(np.mean([len(t) for t in some]))
        a, b = (read_model(folder / f"iter{k}/policy")[0] for k in (i - 1, i))
        assert not same(a, b)
    played = [{e["game"] for e in read(folder / f"iter{i}/eval-dev.json")["episodes"]}
              for i in range(3)]
    assert all(games == {game.id for game in dev} for games in played)


def test_the_best_on_dev_is_kept_whatever_a_test_split_says(run, again):
    edited = {0: (0.2, 0.1), 1: (0.6, 0.2), 2: (0.4, 0.9)}
    folder, _ = again()
    for i, success in edited.items():
        for split, value in zip(("dev", "valid_seen"), success):
            file = folder / f"iter{i}/eval-{split}.json"
            write_json(file, read(file) | {"success": value})
    shutil.rmtree(folder / "best")
    done = command("train.py", *TINY, "--out", folder)
    assert done.returncode == 0 and "π_1 *" in done.stdout, done.stderr
    assert read(folder / "result.json")["best"] == 1
    for name, head in (("policy", "lm"), ("prm", "score")):
        best, first, second = (read_model(folder / where / name, head=head)[0]
                               for where in ("best", "iter1", "iter2"))
        assert same(best, first) and not same(best, second)
    assert read(folder / "best/run.json")["metrics"]["dev"]["success"] == 0.6


def test_a_finished_run_is_left_as_it_is_and_fewer_iterations_show_a_part(run, again):
    folder, done = again("--iters", 0)
    assert done.returncode == 0 and "π_0 *" in done.stdout and "π_1" not in done.stdout
    assert [row["iteration"] for row in read(folder / "result.json")["rows"]] == [0]
    assert same(*(read_model(folder / name)[0] for name in ("best/policy", "iter0/policy")))
    assert not (folder / "best/prm").exists()


# --- what the stages hand to one another ---------------------------------------------------------

def spied(monkeypatch, module, name):
    """The calls of a function: list of (args, kwargs, result)."""
    calls, real = [], getattr(module, name)

    def spy(*args, **kwargs):
        calls.append((args, kwargs, real(*args, **kwargs)))
        return calls[-1][2]

    monkeypatch.setattr(module, name, spy)
    return calls


@pytest.mark.parametrize("ref", ("prev", "init"))
def test_dpo_starts_from_the_previous_policy_and_keeps_near_the_reference(again, ref, monkeypatch):
    seen = []
    monkeypatch.setattr(dpo, "improve", lambda policy, reference, judge, tok, some, *a, **k:
                        seen.append((policy, reference, judge, some, a[1])) or [])
    folder, done = again("--ref", ref, "--kl", 0.5, "--beta", 0.7, "--dpo-temperature", 2,
                         without=("iter2/dpo.json", "iter2/eval*", "best"))
    assert done.returncode == 0, done.stderr
    (policy, reference, judge, some, settings), = seen
    first, previous = (read_model(folder / f"iter{i}/policy")[0] for i in (0, 1))
    assert same(policy, previous) and same(reference, first if ref == "init" else previous)
    assert not same(first, previous) and len(some) == 40
    assert (settings.kl, settings.beta, settings.temperature, settings.updates) == (0.5, 0.7, 2, 3)
    model = read_model(folder / "iter2/prm", head="score")[0]
    t, words = some[0], read_model(folder / "iter2/policy")[1]
    states = [(0, int(t.spans[0, 0]), PrefixTree(("look", "inventory"), words.encode))]
    with torch.no_grad():
        torch.testing.assert_close(judge([t.ids], states), dpo.prm_judge(model)([t.ids], states))


def test_the_prm_starts_from_the_policy_and_sees_no_folder_that_validates_it(again, monkeypatch):
    objectives = spied(monkeypatch, prm, "bce_objective")
    judged = spied(monkeypatch, prm, "validation_metrics")
    start = []
    real = prm.fit
    monkeypatch.setattr(prm, "fit", lambda model, *a, **k: start.append(
        [p.clone() for p in model.model.parameters()]) or real(model, *a, **k))
    folder, done = again(without=("iter2/prm*", "iter2/dpo*", "iter2/policy", "iter2/eval*"))
    assert done.returncode == 0, done.stderr
    ((fitted, labels), _, _), = objectives
    ((_, held, held_labels, gained), _, metrics), = judged
    of = lambda some: {task_folder(t.game) for t in some}
    assert fitted and held and not of(fitted) & of(held) and len(fitted) + len(held) == 40
    words = read_model(folder / "iter0/policy")[1]
    for some, got in ((fitted, labels), (held, held_labels)):
        for pair, want in zip(got, labels_of(some, q_table(some, words, 0.95)), strict=True):
            np.testing.assert_array_equal(pair, want)
    assert gained.tolist() == sum(([0.95 ** (len(t) - 1 - k) * t.won for k in range(len(t))]
                                   for t in held), [])
    policy = read_model(folder / "iter1/policy")[0]
    assert all(torch.equal(p, q) for p, q in zip(start[0], policy.model.parameters()))
    assert read(folder / "iter2/prm.json")["validation"]["actions"] == metrics["actions"]


def test_the_folders_held_out_are_a_share_and_stay_the_same():
    """Whatever else is played: the metrics of all iterations are of the same folders."""
    rollouts = [SimpleNamespace(game=f"task-{n}/trial") for n in range(400)]
    args = train.parse(["--seed", "3"])[0]
    held = train.held_out(args, rollouts)
    assert 40 < len(held) < 80 and held == train.held_out(args, rollouts[::-1] * 3)
    assert held != train.held_out(train.parse(["--seed", "4"])[0], rollouts)
    for some in (rollouts[:200], rollouts[200:], rollouts[::2]):
        assert train.held_out(args, some) == held & {task_folder(t.game) for t in some}
    assert all(len(train.held_out(args, rollouts[n:n + 2])) == 1 for n in range(60))
    with pytest.raises(UserError, match="more --rollouts"):
        train.held_out(args, rollouts[:1] * 9)


def test_inverse_prm_learns_from_all_policies_so_far_but_for_the_folders_held_out(again,
                                                                                 monkeypatch):
    calls = spied(monkeypatch, train, "inverse_objective")
    folder, done = again("--algo", "inverseprm",
                         without=("iter2/prm*", "iter2/dpo*", "iter2/policy", "iter2/eval*"))
    assert done.returncode == 0, done.stderr
    ((policy, demos, learners, games, words), options, _), = calls
    stored = [[t for file in sorted((folder / f"iter{i}/rollouts").iterdir())
               for t in load_trajectories(file)] for i in (1, 2)]
    held = train.held_out(train.parse([])[0], stored[1])
    want = [(t.seed, t.game, t.episode) for some in stored for t in some
            if task_folder(t.game) not in held]
    assert sorted((t.seed, t.game, t.episode) for t in learners) == sorted(want)
    assert len({t.seed for t in learners}) == 2 and 40 < len(learners) < 80
    assert 0 < len(demos) < 48 and not held & {task_folder(t.game) for t, _ in demos}
    assert same(policy, read_model(folder / "iter1/policy")[0]) and options["gamma"] == 0.95
    assert options["temperature"] == 1


# --- every kind of run ---------------------------------------------------------------------------

@pytest.mark.parametrize("flags", (
    "--algo inverseprm", "--prm-loss bt", "--prm-loss promise-progress",
    "--prm-loss promise-progress --targets td-gae",
    "--improve dpo", "--improve dpo --labels soft --kl 1", "--ref init", "--prm-epochs 3"))
def test_each_kind_runs_from_stage_2_on(again, flags):
    folder, done = again("--iters", 1, *flags.split(), without=PRM_ON)
    assert done.returncode == 0 and "π_1" in done.stdout, done.stderr
    record, log = read(folder / "iter1/prm.json"), read(folder / "iter1/dpo.json")["log"]
    relative = "bt" in flags or "inverseprm" in flags
    assert (record["validation"] is None) == relative  # f is open up to a constant a state
    assert 0 <= record["pair_accuracy"] <= 1 and np.isfinite(record["log"][-1]["loss"])
    assert {"loss", "kl", "gain", "distillation", "entropy"} <= log[-1].keys()
    assert ("pairs" in log[-1]) == ("dpo" in flags)
    assert not same(*(read_model(folder / f"iter{i}/policy")[0] for i in (0, 1)))
    assert read_model(folder / "iter1/prm", head="score")[0]


def test_a_policy_of_another_run_is_taken_as_pi_0(run, tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "policy", taught(), tokenizer())
    done = in_process(train.main, [*TINY, "--iters", 0, "--init", tmp_path / "policy", "--out",
                                   tmp_path / "run"], monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    policy, words = read_model(tmp_path / "run/iter0/policy")
    assert same(policy, taught()) and words.tokens == tokenizer().tokens
    assert read(tmp_path / "run/iter0/sft.json")["log"] == []


def test_free_actions_are_for_pi_0_alone(again, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--actions", "free", "--out", tmp_path / "free"]
    assert_refused(in_process(train.main, words, monkeypatch, capsys), "--actions free")
    folder, done = again("--actions", "free", "--iters", 0, without=("iter[12]", "iter0/eval*"))
    assert done.returncode == 0 and "actions free" in done.stdout, done.stderr
    assert read(folder / "iter0/eval-dev.json")["inadmissible"] > 0


@pytest.mark.parametrize("dim", (32, 64, 96, 160, 224))
def test_every_width_that_the_help_promises_makes_a_model(dim, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_sft", lambda *a: [])
    words = [*TINY, "--iters", 0, "--dim", dim, "--test-splits", "", "--out", tmp_path / "run"]
    monkeypatch.setattr(train, "evaluate", lambda c, i: None)
    monkeypatch.setattr(train, "final_table", lambda c: None)
    assert in_process(train.main, words, monkeypatch, capsys).returncode == 0
    assert read_model(tmp_path / "run/iter0/policy")[0].config.dim == dim


# --- bad values ----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, parts", (
    ("--iters -1", ("--iters", "-1")), ("--iters two", ("--iters", "two")),
    ("--iters 1.5", ("--iters", "1.5")), ("--rollouts 1", ("--rollouts", "2 …")),
    ("--gamma 1.5", ("--gamma", "1.5", "0 … 1")),
    ("--gamma nan", ("--gamma", "nan")), ("--seed -1", ("--seed", "-1")),
    ("--beta 0", ("--beta", "0")), ("--kl -1", ("--kl", "-1")), ("--ref best", ("--ref", "best")),
    ("--threads 0", ("--threads", "1 …")), ("--smok", ("--smok",)),
    ("--demos 0", ("--demos", "1 …")), ("--dim 100", ("--dim 100", "multiple of 32")),
    ("--sft-lr inf", ("--sft-lr", "inf")), ("--beta nan", ("--beta",)),
    ("--temperature -1", ("--temperature", "-1")), ("--dpo-temperature 0", ("--dpo-temperature",)),
    ("--n-generated 3", ("3 train games", "dev")), ("--device tpu9", ("tpu9",)),
    ("--device cuda:99", ("--device cuda:99",)), ("--max-steps 0", ("--max-steps",)),
    ("--games alfworld --data /nowhere", ("/nowhere",)), ("--games nine", ("--games", "nine")),
    ("--targets td-gae", ("--targets td-gae", "promise-progress")),
    ("--init /nowhere", ("/nowhere", "no model")), ("--ablation nine", ("--ablation nine",)),
    ("--prm-epochs 0", ("--prm-epochs",)), ("--updates 0", ("--updates",))))
def test_bad_values_are_one_line_and_exit_code_2(flags, parts, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--out", tmp_path / "run", *flags.split()]
    assert_refused(in_process(train.main, words, monkeypatch, capsys), *parts)
    assert not list(tmp_path.iterdir())  # before any work


def test_a_bad_value_ends_the_process_with_code_2(tmp_path):
    assert_refused(command("train.py", "--iters", "-1", "--out", tmp_path), "--iters", "-1")


def test_a_loss_that_is_no_number_stops_the_stage_and_names_it(tmp_path, monkeypatch, capsys):
    words = [*TINY, "--sft-lr", 10, "--demos", 400, "--out", tmp_path / "run"]
    real = train.train_sft

    def broken(policy, *rest):
        policy.model["embed_tokens"].weight.data[7] = float("nan")
        return real(policy, *rest)

    monkeypatch.setattr(train, "train_sft", broken)
    done = in_process(train.main, words, monkeypatch, capsys)
    assert done.returncode == 2 and "error: SFT: the loss is nan" in done.stderr
    assert not (tmp_path / "run/iter0/sft.json").exists()
    assert not (tmp_path / "run/iter0/policy").exists()


def test_weights_that_are_no_numbers_after_the_last_update_are_noticed(tmp_path):
    """A loss of 0 whose gradient is infinite: no later loss would show it."""
    model = random_model()
    root = lambda step: ((model.model["norm"].weight * 0).sum().sqrt(), {})
    with pytest.raises(UserError, match="NAME: the weights are not all finite"):
        optimise(model, root, 1, lr=0.1, state=tmp_path / "state", name="NAME")


# --- flags ---------------------------------------------------------------------------------------

def test_help_gives_every_flag_a_meaning_and_a_default_and_there_are_at_most_40():
    done = command("train.py", "--help")
    assert done.returncode == 0 and not done.stderr
    flags = re.split(r"\n  (?=-)", done.stdout.partition("  -h, --help")[2])[1:]
    assert 30 < len(flags) <= 40
    for flag in flags:
        text = " ".join(flag.split())
        assert re.fullmatch(r"--[a-z0-9-]+ .*[a-z]{2}.*\(default: [^)]+\).*", text), text


def test_the_defaults_are_the_contracts_and_smoke_gives_way_to_flags():
    args, steps = train.parse([])
    assert (args.iters, args.rollouts, args.rollouts_per_game, args.max_steps, args.gamma,
            args.ref, args.seed, args.temperature, args.actions) == (
                3, 70_000, 16, 30, 0.95, "prev", 0, 0.3, "candidates")
    assert vars(steps) == train.STEPS
    smoke = train.parse(["--smoke", "--rollouts", "5000"])[0]
    assert smoke.rollouts == 5000 and smoke.demos < 1000 and smoke.games == "generated"
