"""The loop by its real command line: a table, the same table after kills, and mistakes told in one line."""

import json
import random
import re
import shutil
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError, read_model, save_model, write_file, write_json
from figures import figures_of
from flags import OF_SFT, episodes_of_each_game, parse_flags
from games import task_folder
from generate import generated_split
from kill_test import differences, files, finish, kill, moments
from qestimate import labels_of, q_table
from report import read_run
from runs import Run, load_games, settle_flags
from sft import main as sft_main
from shards import load_trajectories, play_shards, rollouts_in, save_trajectories
from tiny import ROOT, TINY, assert_refused, capture, command, copy_of, in_process, read, same, taught, tokenizer
from tokenizer import ACT, split_intro
from train import main as train_main
from train import held_out, stored_rollouts
from tree import Tree


# --- what comes out ---------------------------------------------------------------------------------------------------------------

def test_a_run_ends_with_a_table_of_all_policies(run):
    folder, done, _ = run
    rows = re.findall(r"^π_(\d)( \*)? .*$", done.stdout, re.MULTILINE)
    assert [i for i, _ in rows] == ["0", "1", "2"] and sum(bool(star) for _, star in rows) == 1
    assert "cap 8, temperature 0.3" in done.stdout
    result = read(folder / "result.json")
    for i in (1, 2):
        for split in ("dev", "valid_seen"):
            gap, low, high = (100 * x for x in result["rows"][i][split]["gain_over_0"])
            assert re.search(rf"^  π_{i} .*{split} {re.escape(f'{gap:+.1f} ({low:+.1f} … {high:+.1f})')}", done.stdout, re.MULTILINE)
    assert len(result["rows"]) == 3 and result["max_steps"] == 8 and result["rows"][0]["dev"]["gain_over_0"] == [0, 0, 0]
    for i, row in enumerate(result["rows"]):
        for split in ("dev", "valid_seen"):
            told = read(folder / f"iter{i}/eval-{split}.json")
            assert row[split]["success"] == told["success"] and len(told["episodes"]) == told["games"] and told["split"] == split
    best = max(range(3), key=lambda i: (result["rows"][i]["dev"]["success"], -i))
    assert result["best"] == best
    for name, head in (("policy", "lm"), ("prm", "score"))[:1 + (best > 0)]:
        mine, of_iteration = (read_model(folder / where / name, head=head)[0].state_dict() for where in ("best", f"iter{best}"))
        assert all(torch.equal(mine[k], of_iteration[k]) for k in mine)
    whence = read(folder / "best/run.json")
    assert whence["metrics"] == result["rows"][best] and whence["data"] == result["data"] and "train.py" in whence["command"] and whence["flags"]["iters"] == 2
    assert whence["versions"]["torch"] == torch.__version__


def test_without_iterations_a_run_is_the_first_policy_and_its_evaluation(run, tmp_path, monkeypatch, capsys):
    folder = copy_of(run, tmp_path, "--iters", "0")
    for i in (1, 2):
        shutil.rmtree(folder / f"iter{i}")
    done = in_process(train_main, read(folder / "config.json")["words"], monkeypatch, capsys)
    assert done.returncode == 0 and "π_0 *" in done.stdout and "π_1" not in done.stdout, done.stderr
    assert [row["iteration"] for row in read(folder / "result.json")["rows"]] == [0]
    assert same(*(read_model(folder / name)[0] for name in ("best/policy", "iter0/policy"))) and not (folder / "best/prm").exists()


def test_every_stage_leaves_its_record(run):
    folder, _, _ = run
    stages = {line["stage"]: line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    expected = {"iter0/sft"} | {f"iter{i}/{stage}" for i in (1, 2) for stage in ("rollouts", "checks", "prm", "dpo")} | {
        f"iter{i}/eval-{split}" for i in range(3) for split in ("dev", "valid_seen")}
    spent = read(folder / "state.json")
    assert stages.keys() == expected == spent["seconds"].keys() == spent["core_seconds"].keys() == spent["peak_mb"].keys()
    assert all(100 < mb < 10_000 for mb in spent["peak_mb"].values()) and spent["core_seconds"]["iter1/rollouts"] > 0
    assert not list(folder.rglob("*.state.safetensors")) and not list(folder.rglob("*.tmp"))
    config = read(folder / "config.json")
    assert config["flags"]["beta"] == 0.03 and config["flags"]["iters"] == 2 and {"python", "torch", "alfworld"} <= config["versions"].keys()
    order = list(spent["seconds"])
    assert all(order.index(f"iter{i}/eval-dev") < order.index(f"iter{i + 1}/rollouts") for i in (0, 1))  # a run is watched while it learns
    assert stages["iter1/dpo"]["log"][-1]["step"] == 2 and stages["iter0/sft"]["parameters"] == read_model(folder / "iter0/policy")[0].n_parameters()


def test_more_iterations_may_follow_those_of_a_finished_run(run, tmp_path, monkeypatch, capsys):
    """They are what they would have been at once; fewer than there are is another run."""
    folder = copy_of(run, tmp_path)
    words, config = read(folder / "config.json")["words"], read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"flags": config["flags"] | {"iters": 1}}))
    shutil.rmtree(folder / "iter2")
    done = in_process(train_main, words, monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    assert read(folder / "config.json")["flags"]["iters"] == 2 and len(read(folder / "result.json")["rows"]) == 3
    ours, theirs = (read_model(where / "iter2/policy")[0].state_dict() for where in (folder, run[0]))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    done = in_process(train_main, [*words, "--iters", "1"], monkeypatch, capsys)
    assert done.returncode == 2 and "--iters 2 -> 1" in done.stderr


def test_the_rollouts_are_those_asked_for_and_the_policies_change(run):
    folder, _, _ = run
    for i in (1, 2):
        shards = [load_trajectories(file) for file in sorted((folder / f"iter{i}/rollouts").iterdir())]
        assert [len(shard) for shard in shards] == [12, 12]
        trajectories = [t for shard in shards for t in shard]
        assert len({(t.game, t.episode) for t in trajectories}) == 24 and len({t.game for t in trajectories}) == 6
        told = read(folder / f"iter{i}/rollouts.json")
        assert told["episodes"] == 24 and told["mean_actions"] == sum(map(len, trajectories)) / 24
        held = read(folder / f"iter{i}/prm.json")["held_out"]["actions"]
        assert 0 < held < sum(map(len, trajectories))  # labels are held out by task folder
        before, after = (read_model(folder / f"iter{k}/policy")[0].state_dict() for k in (i - 1, i))
        assert any(not torch.equal(before[k], after[k]) for k in before)


def of_init():
    """The flags TINY, but for those of SFT alone, which --init leaves without effect."""
    pairs = list(zip(TINY[1::2], TINY[2::2]))
    return [TINY[0], *(word for pair in pairs if pair[0][2:].replace("-", "_") not in OF_SFT for word in pair)]


def test_flags_reach_their_stage(run, tmp_path):
    """--init takes the policy as it is; another --seed, --ref, --beta changes what comes after."""
    save_model(tmp_path / "policy", taught(), tokenizer())
    flags = [*of_init(), "--init", str(tmp_path / "policy"), "--context", "1024", "--rollout-temperature", "1", "--iters", "1"]
    done = command("train.py", *flags, "--out", tmp_path / "init")
    assert done.returncode == 0, done.stderr
    got, words = read_model(tmp_path / "init/iter0/policy")
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), taught().parameters())) and words.tokens == tokenizer().tokens
    assert read(tmp_path / "init/iter0/sft.json")["log"] == []
    trajectories = [t for file in sorted((tmp_path / "init/iter1/rollouts").iterdir()) for t in load_trajectories(file)]
    assert {t.seed for t in trajectories} != {0} and any(t.inadmissible.mean() < 1 for t in trajectories)


@pytest.mark.parametrize("ref", ("prev", "init"))
def test_dpo_starts_from_the_previous_policy_and_refers_to_it_or_to_the_first(run, ref, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path, "--ref", ref)
    policy, reference, score, *_ = capture(monkeypatch, folder, "iter2/dpo", "online_dpo")
    first, previous = (read_model(folder / f"iter{i}/policy")[0] for i in (0, 1))
    assert same(policy, previous) and same(reference, previous if ref == "prev" else first) and not same(first, previous)
    prm = read_model(folder / "iter2/prm", head="score")[0]
    tree = Tree([[0, 7, 8]], [(0, 3, [9, 5], False)])
    assert torch.equal(score(tree), tree.scores(prm).sigmoid())


@pytest.mark.parametrize("whose, expected", (("all", 48), ("last", 24)))
def test_dpo_visits_the_states_of_all_rollouts_so_far_or_of_the_last(run, whose, expected, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path, "--states-of", whose)
    trajectories = capture(monkeypatch, folder, "iter2/dpo", "online_dpo")[4]
    assert len(trajectories) == expected
    last = [t.ids.tolist() for file in sorted((folder / "iter2/rollouts").iterdir()) for t in load_trajectories(file)]
    assert [t.ids.tolist() for t in trajectories[-24:]] == last


@pytest.mark.parametrize("unlearn", ("0", "0.7"))
def test_stage_3_unlearns_what_the_world_did_not_accept(run, unlearn, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path, "--unlearn", unlearn)
    *_, options = capture(monkeypatch, folder, "iter1/dpo", "online_dpo")
    trajectories = [t for file in sorted((folder / "iter1/rollouts").iterdir()) for t in load_trajectories(file)]
    wrong = [weights[start] for t, weights in zip(trajectories, options["weigh"](trajectories)) for (start, _), bad in zip(t.spans, t.inadmissible) if bad]
    assert len(wrong) > 5 and wrong == pytest.approx([-float(unlearn)] * len(wrong))


def test_half_of_the_rollouts_begin_in_demonstrations(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path, "--reset-frac", "0.5")
    shutil.rmtree(folder / "iter2/rollouts")
    shards, *_ = capture(monkeypatch, folder, "iter2/rollouts", "play_shards")
    episodes = [episode for _, some in shards for episode in some]
    begun = [(game, ids) for game, number, *rest in episodes for ids in rest]
    assert 0 < len(begun) < len(episodes) == 24
    words = read_model(folder / "iter1/policy")[1]
    for game, ids in begun:
        assert ids[-1] == ACT and split_intro(game.intro)[0] in words.decode(ids) and len(words.actions(ids)) == (ids == ACT).sum() - 1


def test_half_of_the_rollouts_are_told_a_strategy_that_no_other_stage_sees(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path, "--steer", "0.5")
    shutil.rmtree(folder / "iter2/rollouts")
    shards, policy, device, workers, options = capture(monkeypatch, folder, "iter2/rollouts", "play_shards")
    words = read_model(folder / "iter1/policy")[1]
    told = [words.decode(ids) for _, some in shards for _, _, *rest in some for ids in rest]
    assert 0 < len(told) < 24 and all(re.search(r"Look at a \w+ first\.", text) for text in told)
    monkeypatch.undo()
    list(play_shards(shards, policy, device, 1, **options))
    played = [t for file, _ in shards for t in load_trajectories(file)]
    assert sum("Look at a" in words.decode(t.ids) for t in played) == len(told)
    hidden = stored_rollouts(parse_flags(["--steer", "0.5"]), SimpleNamespace(path=folder), 2)
    assert len(hidden) == 24 and not any("Look at a" in words.decode(t.ids) for t in hidden)


def test_the_previous_policy_plays(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path)
    shutil.rmtree(folder / "iter2/rollouts")
    shards, policy, *_ = capture(monkeypatch, folder, "iter2/rollouts", "play_shards")
    assert policy == folder / "iter1/policy" and [len(episodes) for _, episodes in shards] == [12, 12]


def test_checks_start_from_the_policy_that_played(run, tmp_path, monkeypatch):
    prm, _, demos, *_, options = capture(monkeypatch, copy_of(run, tmp_path), "iter2/checks", "train_checks")
    assert same(prm.model, read_model(run[0] / "iter1/policy")[0].model) and 0 < len(demos) < 64 and options["updates"] == 2


def test_the_prm_starts_from_the_checks_and_does_not_see_the_folders_held_out(run, tmp_path, monkeypatch):
    folder = copy_of(run, tmp_path)
    prm, fit, objective, *_ = capture(monkeypatch, folder, "iter2/prm", "train_prm")
    assert same(prm.model, read_model(folder / "iter2/checks", head="score")[0].model) and not prm.score.weight.any()
    everything = [t for file in sorted((folder / "iter2/rollouts").iterdir()) for t in load_trajectories(file)]
    of = lambda trajectories: {t.game.split("/")[0] for t in trajectories}
    held = of(everything) - of(fit)
    assert held and sum(t.game.split("/")[0] in held for t in everything) + len(fit) == len(everything)
    labels = labels_of(fit, q_table(fit, read_model(folder / "iter0/policy")[1], 0.95))
    best = [torch.logit(torch.from_numpy(q_hat), eps=1e-7) for q_hat, _ in labels]
    assert objective.weights == [pytest.approx(float(weight.sum())) for _, weight in labels]
    assert objective.loss(best, range(len(fit)), sum(objective.weights))[1]["excess"][0] == pytest.approx(0, abs=1e-5)  # as good as these labels allow


def test_the_same_folders_are_held_out_of_every_iteration():
    """Whatever else is played: the folders held out of all rollouts are the first to be held out of some of them, too."""
    rollouts = [SimpleNamespace(game=f"pick-{n}-Desk/trial") for n in range(40)]
    args, rng = SimpleNamespace(seed=3, held_out=0.15), np.random.default_rng(0)
    held = held_out(args, rollouts)
    assert len(held) == 6 and held == held_out(args, rollouts[::-1] * 3) and held != held_out(SimpleNamespace(seed=4, held_out=0.15), rollouts)
    for _ in range(20):
        some = [rollouts[n] for n in rng.permutation(40)[:20]]
        played = held & {t.game.split("/")[0] for t in some}
        now = held_out(args, some)
        assert len(now) == 3 and (now <= played if len(played) >= 3 else played <= now)


def assert_forked(folder, trajectories, forks):
    """Two forks behind every action but the last, that go on from what was said by then, each in its own way."""
    at = [(t, k) for t in trajectories for k in range(len(t) - 1) for _ in range(2)]
    assert len(at) == len(forks) == read(folder / "iter1/forks.json")["episodes"]
    differ = 0
    for n, ((t, k), fork) in enumerate(zip(at, forks)):
        begun = t.spans[k + 1, 0]
        assert fork.game == t.game and fork.spans[0, 0] == begun and (fork.ids[:begun] == t.ids[:begun]).all()
        differ += n % 2 and not np.array_equal(fork.ids, forks[n - 1].ids)
    assert differ > len(at) / 8
    assert all(k + 1 + len(fork) <= 8 for (_, k), fork in zip(at, forks))  # --max-steps counts from the start


def test_labels_of_forks_are_those_of_the_rollouts_that_are_fitted(run, tmp_path, monkeypatch):
    """With every third fork said to have won: the PRM is given the labels of its own trajectories."""
    folder = copy_of(run, tmp_path, "--iters", "1", "--forks", "2")
    for stage in ("prm", "dpo"):
        (folder / f"iter1/{stage}.json").unlink()
    (folder / "iter1/again.json").write_text("{}")
    capture(monkeypatch, folder, "iter1/again", "train_prm")
    for file in sorted((folder / "iter1/forks").glob("*.safetensors")):
        forks = load_trajectories(file)
        save_trajectories(file, [replace(t, won=True, reward=1.0) if t.episode % 3 == 0 else t for t in forks])
    (folder / "iter1/again.json").write_text("{}")
    _, fitted, objective, *_ = capture(monkeypatch, folder, "iter1/again", "train_prm")[:-1]
    everything = rollouts_in(folder / "iter1")
    at = [(i, k) for i, t in enumerate(everything) for k in range(len(t) - 1) for _ in range(2)]
    forks = sorted(rollouts_in(folder / "iter1", "forks"), key=lambda t: t.episode)
    expected = {}
    for n, ((i, k), fork) in enumerate(zip(at, forks, strict=True)):
        expected[i, k] = expected.get((i, k), 0.95 ** (len(everything[i]) - 1 - k) * everything[i].reward / 3) + 0.95 ** len(fork) * (n % 3 == 0 or fork.reward) / 3
    number = {(t.game, t.episode): i for i, t in enumerate(everything)}
    picked = [number[t.game, t.episode] for t in fitted]
    wanted = np.concatenate([[*(expected[i, k] for k in range(len(everything[i]) - 1)), everything[i].reward] for i in picked])
    assert 0 < len(picked) < len(everything) and wanted.max() > 0
    best = [torch.logit(torch.from_numpy(part), eps=1e-7) for part in np.split(wanted.astype(np.float32), np.cumsum([len(t) for t in fitted])[:-1])]
    assert objective.loss(best, range(len(fitted)), sum(objective.weights))[1]["excess"][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("flags", (
    ("--algo", "inverseprm", "--inverse-updates", "3"),
    ("--algo", "inverseprm", "--inverse-updates", "3", "--hide-ends"),
    ("--algo", "inverseprm", "--inverse-updates", "3", "--rest"),
    ("--algo", "inverseprm", "--inverse-updates", "3", "--imitate-by", "all", "--proposals", "0"),
    ("--prm-loss", "bt"),
    ("--prm-loss", "promise-progress", "--targets", "td-gae"),
    ("--prm-loss", "promise-progress", "--imitate-by", "progress"),
    ("--state", "world", "--curiosity", "0.1"),
    ("--ensemble", "2", "--ensemble-by", "min", "--track-hacking"),
    ("--shape-with", "RUN/iter2"),
    ("--forks", "2"),
), ids=" ".join)
def test_every_kind_of_prm_runs_to_its_table(run, tmp_path, monkeypatch, capsys, flags):
    """From stage 2 of the first iteration on, on the rollouts of a finished run."""
    folder = copy_of(run, tmp_path, "--iters", "1", *(flag.replace("RUN", str(run[0])) for flag in flags))
    shutil.rmtree(folder / "iter2")
    for stage in ("prm", "dpo", "eval-dev", "eval-valid_seen"):
        (folder / f"iter1/{stage}.json").unlink()
    before = read_model(folder / "iter1/prm", head="score")[0].state_dict()
    done = in_process(train_main, read(folder / "config.json")["words"], monkeypatch, capsys)
    assert done.returncode == 0 and "π_1" in done.stdout, done.stderr
    assert ("nothing to compare" in done.stderr) == ("bt" in flags)  # nothing is won so early
    told, after = read(folder / "iter1/prm.json"), read_model(folder / "iter1/prm", head="score")[0]
    assert "pair_accuracy" in told["held_out"] and ("bce" in told["held_out"]) == ("pearson_returns" in told["held_out"]) == (not {"bt", "inverseprm", "--shape-with", "--curiosity"} & set(flags))
    by_gap = list(told["expert_preferred"].pop("by_gap").values())
    assert told["expert_preferred"].keys() == {"to_chance", "to_policy"} and all(0 <= share <= 1 for share in told["expert_preferred"].values())
    assert [n for _, n in by_gap] == sorted((n for _, n in by_gap), reverse=True) and all(share is None if n == 0 else 0 <= share <= 1 for share, n in by_gap)
    assert after.config.head == ("relative" if {"bt", "inverseprm"} & set(flags) else "score")
    changed = any(not torch.equal(before[k], v) for k, v in after.state_dict().items())
    lost = "--forks" in flags and not read(folder / "iter1/forks.json")["success"]  # forked or not, nothing was won
    assert changed == ("--ensemble" not in flags and not lost)  # the first of an ensemble is the one that would stand alone
    if "--ensemble" in flags:
        other = read_model(folder / "iter1/prm2", head="score")[0]
        assert not same(after, other) and (folder / "iter1/prm2.json").exists()
        log = read(folder / "iter1/dpo.json")["log"]
        assert all(0 <= entry["true/success"] <= 1 and 0 < entry["prm/q"] < 1 and entry["prm/disagreement"] > 0 for entry in log)
        assert all(0 <= entry["true/return"] <= 1 and (entry["true/return"] > 0) == (entry["true/success"] > 0) for entry in log)
    if "--forks" in flags:
        assert figures_of(read_run(folder))
        assert_forked(folder, rollouts_in(folder / "iter1"), sorted(rollouts_in(folder / "iter1", "forks"), key=lambda t: t.episode))
    if "--shape-with" in flags:
        assert (folder / "iter0/value/config.json").exists()


def test_inverse_prm_reads_no_outcome(run, tmp_path, monkeypatch):
    """Not in stage 2 beyond what its own tests poison, not in what stage 3 imitates."""
    folder = copy_of(run, tmp_path, "--algo", "inverseprm")
    *_, trajectories, _, options = capture(monkeypatch, folder, "iter1/dpo", "online_dpo")
    trajectories = [replace(t, inadmissible=np.zeros(len(t), bool)) for t in trajectories]  # a policy this small knows hardly any other
    poisoned = [replace(t, won=not t.won, reward=7.0) for t in trajectories]
    weights, others = (options["weigh"](some) for some in (trajectories, poisoned))
    assert all((a == b).all() for a, b in zip(weights, others)) and any(w.any() for w in weights)
    folder = copy_of(run, tmp_path / "again", "--algo", "inverseprm")
    shutil.rmtree(folder / "iter1/rollouts")
    shutil.copytree(folder / "iter2/rollouts", folder / "iter1/rollouts")  # so that what is held out of the one is there in the other
    prm, policy, demonstrations, rollouts, *_ = capture(monkeypatch, folder, "iter2/prm", "train_inverse_prm")
    assert same(policy, read_model(folder / "iter1/policy")[0]) and same(prm.model, read_model(folder / "iter2/checks", head="score")[0].model)
    seen = Counter((t.game, t.episode) for t in rollouts)
    assert 0 < len(seen) < 24 and set(seen.values()) == {2}  # of all learners so far, without the folders held out
    held = {t.game.split("/")[0] for t in rollouts_in(folder / "iter2")} - {game.split("/")[0] for game, _ in seen}
    assert 0 < len(demonstrations) < 64 and not held & {demo.game.split("/")[0] for demo, _ in demonstrations}
    _, _, checked, *_ = capture(monkeypatch, folder, "iter2/checks", "train_checks")  # nor is f told of those before
    assert [demo.game for demo, _ in checked] == [demo.game for demo, _ in demonstrations]


def test_flags_may_be_mended_until_a_stage_has_left_something(tmp_path):
    for beta in (1, 2):
        settle_flags(tmp_path, {"beta": beta})
        assert read(tmp_path / "config.json")["flags"] == {"beta": beta}
    (tmp_path / "iter0").mkdir()
    (tmp_path / "iter0/sft.state.safetensors").touch()
    settle_flags(tmp_path, {"beta": 2})
    with pytest.raises(UserError, match="--beta 2 -> 3"):
        settle_flags(tmp_path, {"beta": 3})


# --- interruptions -----------------------------------------------------------------------------------------------------------------

def test_a_finished_run_is_left_as_it_is(run):
    folder, done, _ = run
    before = files(folder)
    again = command("train.py", *TINY, "--out", folder)
    assert again.returncode == 0 and again.stdout.splitlines()[2:-1] == done.stdout.splitlines()[2:-1]
    assert files(folder) == before


def test_a_killed_run_ends_as_an_undisturbed_one(run, tmp_path):
    folder, _, began = run
    fell = [kill(tmp_path / "killed", TINY, *moment) for moment in moments(folder, began, 3, random.Random(0))]
    assert any(fell)
    finish(tmp_path / "killed", TINY)
    assert differences(folder, tmp_path / "killed") == []


@pytest.mark.parametrize("lost", (["iter2/dpo.json", "iter2/policy", "iter2/eval-dev.json"], ["iter1/rollouts/00001.safetensors", "iter1/rollouts.json"],
                                  ["iter1/prm/config.json", "iter1/prm.json", "iter1/dpo.json", "result.json", "best"]))
def test_whatever_is_missing_is_made_again_and_equal(run, lost, tmp_path):
    folder = copy_of(run, tmp_path)
    for path in (folder / name for name in lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    finish(folder, TINY)
    assert differences(run[0], folder) == []


def test_a_killed_sitting_counts_too(tmp_path, monkeypatch):
    monkeypatch.setattr("runs.BEAT", 0.05)
    run = Run(SimpleNamespace(out=str(tmp_path), device="cpu"))
    spent = lambda: read(tmp_path / "state.json")

    def told(stage, seconds):
        """What is told of a stage before it has ended, all that a killed one leaves."""
        deadline = time.monotonic() + 60
        while not (tmp_path / "state.json").exists() or spent()["seconds"].get(stage, 0) < seconds:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return (tmp_path / "state.json").read_text()

    with run.stage("iter0/sft"):
        killed = told("iter0/sft", 0.5)
    write_file(tmp_path / "state.json", lambda p: p.write_text(killed))
    before = spent()
    with run.stage("iter0/sft") as stage:
        told("iter0/sft", before["seconds"]["iter0/sft"] + 0.5)
        stage.finish({})
    after = spent()
    assert before["last"] is None and after["last"] == "iter0/sft"
    assert after["seconds"]["iter0/sft"] >= before["seconds"]["iter0/sft"] + 0.5 and after["core_seconds"]["iter0/sft"] >= before["core_seconds"]["iter0/sft"] > 0
    with run.stage("iter0/sft") as stage:
        assert stage.done
    assert spent() == after


def test_a_run_killed_between_a_stages_record_and_its_tidying_up_ends_as_an_undisturbed_one(run, tmp_path):
    folder = copy_of(run, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    for name in ("iter1/prm", "iter2/dpo"):
        (folder / f"{name}.state.safetensors").write_bytes(b"left over")
    finish(folder, TINY)
    assert differences(run[0], folder) == []


def test_no_demonstration_left_for_the_checks_is_told(run, tmp_path, monkeypatch, capsys):
    folder = copy_of(run, tmp_path)
    shutil.rmtree(folder / "iter1/checks")
    (folder / "iter1/checks.json").unlink()
    monkeypatch.setattr("train.held_out", lambda *_: {task_folder(game.id) for game in generated_split("train", 40)})
    done = in_process(train_main, (*TINY, "--out", folder), monkeypatch, capsys)
    assert done.returncode == 2 and "--held-out" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_run_with_other_flags_or_games_is_refused_and_the_difference_shown(run, monkeypatch, capsys):
    folder, _, _ = run
    before = files(folder)
    refused = lambda *flags: in_process(train_main, (*TINY, "--out", folder, *flags), monkeypatch, capsys)
    assert_refused(refused("--beta", "0.1", "--seed", "3"), "--beta 0.03 -> 0.1", "--seed 0 -> 3", "another --out")
    (folder / "data.json").write_text(json.dumps({"train": "other games"}))
    assert_refused(refused(), "other games")
    (folder / "data.json").write_bytes(before["data.json"])
    assert files(folder) == before
    assert refused("--device", "cpu").returncode == 0  # where it runs may change


# --- mistakes ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, parts", (
    (("--iters", "-1"), ("--iters -1",)),
    (("--iters", "two"), ("--iters", "two")),
    (("--rollouts", "1"), ("--rollouts",)),
    (("--rollouts", "4", "--min-games", "1"), ("--rollouts",)),  # one game: nothing to hold out
    (("--gamma", "1.5"), ("--gamma 1.5", "0.01 … 1")),
    (("--gamma", "nan"), ("--gamma",)),
    (("--seed", "-1"), ("--seed -1",)),
    (("--beta", "0"), ("--beta",)),
    (("--ref", "best"), ("--ref", "best")),
    (("--threads", "-3"), ("--threads",)),
    (("--smok",), ("--smok",)),
    (("--demos", "0"), ("--demos 0", "at least 1")),
    (("--checks", "-1"), ("--checks -1",)),
    (("--check-batch", "0"), ("--check-batch 0", "at least 1")),
    (("--heads", "3"), ("heads 3",)),
    (("--context", "60"), ("--context",)),
    (("--n-generated", "3"), ("--n-generated",)),
    (("--dev-games", "0"), ("--dev-games",)),
    (("--device", "tpu9"), ("tpu9",)),
    (("--games", "alfworld", "--data", "/nowhere"), ("/nowhere",)),
    (("--targets", "td-gae"), ("--targets td-gae", "promise-progress")),
    (("--algo", "inverseprm", "--prm-loss", "bt"), ("--prm-loss bt",)),
    (("--algo", "inverseprm", "--imitate-by", "win"), ("--imitate-by win", "expert")),
    (("--algo", "inverseprm", "--imitate-by", "progress"), ("--imitate-by progress", "expert")),
    (("--prm-loss", "bt", "--imitate-by", "progress"), ("--imitate-by progress", "win")),
    (("--shape-with", "/nowhere"), ("/nowhere",)),
    (("--curiosity", "0.1", "--prm-loss", "bt"), ("--curiosity",)),
    (("--hide-ends",), ("--hide-ends", "inverseprm")),
    (("--rest",), ("--rest", "inverseprm")),
    (("--algo", "inverseprm", "--rest", "--hide-ends"), ("--rest", "sees ends")),
    (("--algo", "inverseprm", "--rest", "--gamma", "1"), ("--rest", "--gamma below 1")),
    (("--prm-loss", "promise-progress", "--gae-lambda", "0.5"), ("--gae-lambda 0.5", "--targets")),
    (("--imitate", "0", "--imitate-by", "progress"), ("--imitate-by progress", "--imitate")),
    (("--imitate", "0", "--imitate-detours", "0.5"), ("--imitate-detours 0.5", "--imitate")),
    (("--imitate", "0", "--unlearn", "2"), ("--unlearn 2", "--imitate")),
    (("--progress-weight", "3"), ("--progress-weight 3", "promise-progress")),
    (("--algo", "inverseprm", "--prm-epochs", "3"), ("--prm-epochs 3", "agentprm")),
    (("--proposals", "1"), ("--proposals 1", "two")),
    (("--proposals", "0", "--imitate", "0"), ("--proposals 0", "learns nothing")),
    (("--proposals", "0", "--beta", "1"), ("--beta 1", "--proposals")),
    (("--proposals", "0", "--min-gap", "0.1"), ("--min-gap 0.1", "--proposals")),
    (("--checks", "0", "--check-batch", "3"), ("--check-batch 3", "--checks")),
    (("--glances", "0", "--searches", "9"), ("--searches 9", "--glances")), (("--demo-noise", "0.1", "--searches", "9"), ("--searches 9", "--demo-noise")),
    (("--algo", "inverseprm", "--prm-batch", "1"), ("--prm-batch 1", "inverseprm")),
    (("--shape", "potential"), ("--shape potential", "--shape-with")),
    (("--ensemble-by", "min"), ("--ensemble-by min",)),
    (("--ensemble", "2", "--ensemble-by", "min", "--prm-loss", "bt"), ("--ensemble-by min", "mean")),
    (("--state", "world", "--algo", "inverseprm"), ("--state world",)),
    (("--track-hacking", "--prm-loss", "bt"), ("--track-hacking",)),
    (("--forks", "2", "--prm-loss", "bt"), ("--forks",)),
    (("--forks", "2", "--state", "world"), ("--forks", "world")),
    (("--init", "/nowhere"), ("/nowhere", "no model there")),
    (("--proposals", "0", "--ref", "init"), ("--ref init", "--proposals")),
    (("--inverse-updates", "7"), ("--inverse-updates 7", "inverseprm")),
    (("--data", "/nowhere"), ("--data /nowhere", "ALFWorld's games")),
    (("--reset-frac", "0.6", "--steer", "0.5"), ("--reset-frac 0.6", "together")),
    (("--shape-with", "/nowhere", "--track-hacking"), ("--shape-with", "--track-hacking")),
    (("--out", str(ROOT / "train.py")), ("train.py",)),
))
def test_mistakes_are_told_in_one_line_before_any_work(flags, parts, tmp_path, monkeypatch, capsys):
    words = [*TINY, "--out", str(tmp_path / "run"), *flags]
    assert_refused(in_process(train_main, words, monkeypatch, capsys), *parts)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_values_are_not_taken_from_a_prm_that_has_none(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "other/iter1/prm").mkdir(parents=True)
    for flags in ({"prm_loss": "bt"}, {"prm_loss": "promise-progress"}, {"algo": "inverseprm"}):
        write_json(tmp_path / "other/config.json", {"flags": {"prm_loss": "bce", "algo": "agentprm", **flags}})
        write_json(tmp_path / "other/iter1/prm/config.json", {})
        assert_refused(in_process(train_main, [*TINY, "--out", tmp_path / "run", "--shape-with", tmp_path / "other/iter1"], monkeypatch, capsys), "--shape-with", "knows the states' values")
    assert not (tmp_path / "run").exists()


def test_a_policy_of_another_run_is_taken_only_where_it_fits(run, tmp_path, monkeypatch, capsys):
    folder = copy_of(run, tmp_path)
    start = lambda *more: in_process(train_main, [*of_init(), "--init", folder / "iter0/policy", "--out", tmp_path / "begun", *more], monkeypatch, capsys)
    for more, parts in ((("--dev-games", 7), ("--dev-games 6 -> 7",)), (("--context", 512), ("--context 512", "2048")), (("--steer", 0.5), ("--steer 0.5", "strategy")), (("--sparse", 0.3, "--sft-lr", 0.1), ("--sparse, --sft-lr", "no effect")),
                        (("--n-generated", 50), ("other games", "40 generated games", "50 generated games"))):
        assert_refused(start(*more), "--init", *parts)
        shutil.rmtree(tmp_path / "begun", ignore_errors=True)
    done = start("--iters", 0, "--seed", 1)
    assert done.returncode == 0 and "not those of --init (--seed 0 -> 1)" in done.stderr
    shutil.rmtree(folder)
    assert start("--iters", 0, "--seed", 1).returncode == 0  # it has a copy of its own


def test_a_policy_of_sft_is_taken(tmp_path, monkeypatch, capsys):
    done = in_process(sft_main, ["--games", "generated", "--demos", 16, "--updates", 1, "--glances", 0, "--searches", 0, "--max-steps", 4, "--episodes-per-game", 1, "--out", tmp_path / "sft"], monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    flags = ["--games", "generated", "--init", tmp_path / "sft/16/policy", "--iters", 0, "--max-steps", 4, "--dev-episodes", 1, "--test-splits", "--out", tmp_path / "run"]
    assert in_process(train_main, flags, monkeypatch, capsys).returncode == 0
    assert_refused(in_process(train_main, [*flags, "--n-generated", 900, "--out", tmp_path / "other"], monkeypatch, capsys), "--init", "other games")


def test_defaults_that_follow_the_number_of_rollouts():
    small, large, own = (parse_flags(words.split()) for words in ("--rollouts 4000", "", "--pairs 7 --prm-epochs 0.5"))
    assert (small.prm_epochs, small.pairs) == (2, 12_500) and large.rollouts == 70_000 and (large.prm_epochs, large.pairs) == (1, 50_000)
    assert (own.prm_epochs, own.pairs) == (0.5, 7)


def test_a_mistake_ends_the_process_with_code_2(tmp_path):
    assert_refused(command("train.py", "--iters", "-1", "--out", tmp_path), "--iters -1")


# --- flags -------------------------------------------------------------------------------------------------------------------------

def test_a_task_type_left_out_is_still_tested(tmp_path):
    told = []
    args = parse_flags([*TINY, "--without", "pick_heat_then_place_in_recep"])
    games = load_games(args, SimpleNamespace(note_data=told.append))
    types = lambda some: {game.task_type for game in some}
    assert told and "pick_heat_then_place_in_recep" not in types(games.train) | types(games.dev)
    assert "pick_heat_then_place_in_recep" in types(load_games(parse_flags(TINY), SimpleNamespace(note_data=told.append)).train)
    assert types(games.train) and len(games.test["valid_seen"]) == 10


def test_the_defaults_are_the_contracts():
    args = parse_flags([])
    assert (args.iters, args.rollouts, args.rollouts_per_game, args.max_steps, args.gamma, args.beta, args.ref, args.seed, args.context) == (
        3, 70000, 16, 30, 0.95, 0.03, "prev", 0, 2048)
    assert parse_flags(["--smoke"]).rollouts < 1000 and parse_flags(["--smoke", "--rollouts", "5000"]).rollouts == 5000
    with pytest.raises(UserError):
        parse_flags(["--rollouts", "many"])


@pytest.mark.parametrize("flags, each", (([], 16), (["--rollouts", "4000"], 1), (["--rollouts", "16000"], 4), (["--rollouts", "400"], 1), (["--rollouts", "400", "--min-games", "1"], 16),
                                         (["--rollouts", "16000", "--rollouts-per-game", "3"], 3)))
def test_few_rollouts_are_spread_over_many_games(flags, each):
    assert episodes_of_each_game(parse_flags(flags)) == each


@pytest.mark.parametrize("program", sorted(f.name for f in ROOT.glob("*.py") if '__name__ == "__main__"' in f.read_text()))
def test_help_gives_every_flag_a_meaning_and_a_default(program):
    done = command(program, "--help")
    assert done.returncode == 0 and not done.stderr
    flags = re.split(r"\n  (?=-)", done.stdout.partition("  -h, --help")[2])[1:]
    assert flags
    for flag in flags:
        text = " ".join(flag.split())
        assert re.fullmatch(r"--[a-z0-9-]+(, --no-[a-z0-9-]+)? .*[a-z]{3}.*\(default: [^)]+\).*", text), text
