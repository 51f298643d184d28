"""The ablations' table, and the first experiments at tiny size."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import experiments
from common import UserError
from experiments import ABLATIONS, FIRST, OF_STAGE_2, OF_STAGE_3, OWN_POLICY, divergence, in_common, row, spread
from flags import parse_flags
from tiny import assert_refused, in_process, played, random_model


def test_without_a_name_everything_is_listed(monkeypatch, capsys):
    told = in_process(experiments.main, [], monkeypatch, capsys).stdout
    assert {line.split()[0] for line in told.splitlines()} == {*ABLATIONS, *FIRST}
    assert_refused(in_process(experiments.main, ["bt", "cte"], monkeypatch, capsys), "cte", "experiments.py lists them")


def runs_of(monkeypatch, tmp_path, name, baseline="few"):
    """The runs of train.py that an ablation asks for: [(folder, parsed flags)], in order, as if each left a PRM behind."""
    runs = []

    def train(folder, flags):
        if folder not in [done for done, _ in runs]:
            runs.append((folder, parse_flags(flags.split())))
            for part in ("iter0/policy", "iter1/prm", "iter3/prm"):
                (folder / part).mkdir(parents=True)
                (folder / part / "config.json").write_text("{}")
            (folder / "config.json").write_text(json.dumps({"flags": vars(runs[-1][1])}))

    monkeypatch.setattr(experiments, "train", train)
    args = SimpleNamespace(out=tmp_path, rollouts=500, baseline=baseline, flags="--threads 1")
    assert experiments.ablation(args, name, 7) == tmp_path / "7" / name
    return runs


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_a_run_that_train_py_takes_from_the_policy_of_the_plain_one(monkeypatch, tmp_path, name):
    *before, (folder, flags) = runs_of(monkeypatch, tmp_path, name)
    assert folder == tmp_path / "7" / name and flags.seed == 7 and flags.threads == 1
    assert flags.rollouts == {"labels-forks": 90, "labels-forks-8": 720, **dict.fromkeys(("hacking-many", "dpo-alone-many", "dpo-wide-many"), 16_000)}.get(name, 500)
    start = {"unsteered": "steer"}.get(name, None if name in OWN_POLICY else "plain")
    assert flags.init == (start and str(tmp_path / f"7/{start}/iter0/policy"))
    assert [done.name for done, _ in before] == [start] * bool(start) + ["three"] * ("shape" in name)
    assert (flags.shape_with == str(tmp_path / "7/three/iter3")) == ("shape" in name)
    (_, plain), *_ = runs_of(monkeypatch, tmp_path / "plain", "plain")
    own = {k for k, v in vars(flags).items() if v != vars(plain)[k]} - {"init"}
    assert own or name in ("plain", "unsteered")  # it differs from the plain run in something


def test_the_paper_s_baseline_tells_each_demonstration_once_and_adds_nothing_to_it(monkeypatch, tmp_path):
    for _, flags in runs_of(monkeypatch, tmp_path, "inverse", "paper"):
        assert flags.demos == 10_000 and flags.sft_updates <= flags.demos // flags.sft_batch  # train_sft: as many updates as tell each once
        assert flags.glances == flags.searches == flags.exchange == flags.detours == flags.sparse == flags.steer == 0 and flags.own_names


@pytest.mark.parametrize("name", ("without-exchange", "little-decay"))
def test_what_the_paper_s_baseline_has_already_is_no_ablation_of_it(monkeypatch, tmp_path, name):
    assert runs_of(monkeypatch, tmp_path, name)
    with pytest.raises(UserError, match=f"{name}.*--baseline paper"):
        runs_of(monkeypatch, tmp_path, name, "paper")


@pytest.mark.parametrize("name, common", (("without-unlearning", ["rollouts", "checks", "prm"]), ("world", ["rollouts", "checks"]), ("inverse", ["rollouts", "checks"]), ("dpo-wide", ["rollouts", "checks", "prm"]),
                                          ("labels-forks", []), ("reset", []), ("dpo-wide-many", []), ("as-published", []), ("unsteered", [])))
def test_what_an_ablation_has_in_common_with_the_run_of_its_policy(monkeypatch, tmp_path, name, common):
    (_, others), *_, (_, flags) = runs_of(monkeypatch, tmp_path, name)
    assert in_common(vars(flags), vars(others)) == common


def test_flags_of_the_stages_are_flags():
    assert OF_STAGE_2 | OF_STAGE_3 <= vars(parse_flags([])).keys() and not OF_STAGE_2 & OF_STAGE_3


def test_a_shared_run_equals_one_on_its_own(folder):
    args = SimpleNamespace(out=folder, rollouts=24, baseline="few", flags=SMALL)
    for name in ("without-unlearning", "promise"):
        shared, own = experiments.ablation(args, name, 0), folder / f"own-{name}"
        experiments.train(own, f"--iters 1 --rollouts 24 {SMALL} {ABLATIONS[name]} --init {folder}/0/plain/iter0/policy")
        cost = json.loads((shared / "state.json").read_text())["seconds"]
        assert "iter1/rollouts" not in cost and ("iter1/prm" in cost) == (name == "promise")  # what is shared was not done again
        for kind in ("prm", "policy"):
            ours, theirs = (load_file(run / f"iter1/{kind}/model.safetensors") for run in (shared, own))
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_results_of_other_flags_are_not_taken_for_these(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    flags = "--rollouts 500 --beta 0.1"
    (folder / "config.json").write_text(json.dumps({"flags": vars(parse_flags([*flags.split(), "--out", str(folder)]))}))
    (folder / "result.json").write_text('{"rows": []}')
    assert experiments.train(folder, f"{flags} --threads 1") == {"rows": []}
    with pytest.raises(UserError, match="--beta 0.1 -> 0.2"):
        experiments.train(folder, "--rollouts 500 --beta 0.2")
    with pytest.raises(UserError, match="--iters 3 -> 2"):
        experiments.train(folder, f"{flags} --iters 2")


def test_a_finished_run_goes_on_with_more_iterations(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"flags": vars(parse_flags(["--iters", "1"]))}))
    (tmp_path / "result.json").write_text('{"rows": []}')
    asked = []
    monkeypatch.setattr(experiments, "subprocess", SimpleNamespace(run=lambda words, **_: asked.append(words) or SimpleNamespace(returncode=0)))
    experiments.train(tmp_path, "--iters 1")
    assert not asked
    experiments.train(tmp_path, "--iters 2")
    assert asked[0][2:4] == ["--iters", "2"]


def test_first_experiments_refuse_seeds(monkeypatch, capsys):
    done = in_process(experiments.main, ["pilot", "--seeds", "0,1"], monkeypatch, capsys)
    assert done.returncode == 2 and "seed 0 alone" in done.stderr


def test_a_row_is_the_mean_and_deviation_over_seeds(tmp_path):
    rng, won = np.random.default_rng(0), []
    for seed in range(3):
        for i in (1, 2):
            (tmp_path / f"{seed}/iter{i}").mkdir(parents=True)
            prm = {"held_out": {"pair_accuracy": None if seed else 0.6, "pearson_returns": 0.1 * (seed + i)}, "expert_preferred": {"to_policy": 0.5 + 0.1 * (i - 1), "to_chance": None}}
            (tmp_path / f"{seed}/iter{i}/prm.json").write_text(json.dumps(prm))
        won.append(rng.random((3, 2)))
        (tmp_path / f"{seed}/result.json").write_text(json.dumps({"rows": [{s: {"success": w} for s, w in zip(("dev", "valid_seen"), both)} for both in won[-1]]}))
    cells = row([tmp_path / str(seed) for seed in range(3)])
    for cell, values in zip(cells, [[w[i, split] for w in won] for split in (0, 1) for i in (0, 1, 2)]):
        mean = sum(values) / 3
        assert cell == f"{100 * mean:.1f} ± {100 * math.sqrt(sum((v - mean) ** 2 for v in values) / 2):.1f}"
    assert cells[6:] == ["0.20 ± 0.10", "60.0", "50.0 ± 0.0", "–"]  # of the first iteration; seeds without pairs are left out
    assert spread([None]) == "–" and spread([0.5]) == "50.0"


def test_runs_that_track_hacking_end_in_a_figure_of_it(monkeypatch, capsys, tmp_path):
    log = [{"step": 5, "loss": 1.0}, {"step": 10, "loss": 1.0, "true/success": 0.5, "prm/q": 0.2}, {"step": 20, "true/success": 0.4, "prm/q": 0.3}]
    for name in ("plain", "hacking"):
        (tmp_path / f"7/{name}/iter1").mkdir(parents=True)
        (tmp_path / f"7/{name}/iter1/dpo.json").write_text(json.dumps({"log": log}))
        (tmp_path / f"7/{name}/config.json").write_text('{"flags": {"rollouts": 4000}}')
    monkeypatch.setattr(experiments, "ablation", lambda args, name, seed: tmp_path / str(seed) / name)
    monkeypatch.setattr(experiments, "row", lambda folders: ["–"] * 10)
    drawn = []
    monkeypatch.setattr(experiments, "draw", lambda path, curves, *words: drawn.append((path, curves)))
    in_process(experiments.main, ["plain", "--seeds", "7", "--out", tmp_path], monkeypatch, capsys)
    assert not drawn
    in_process(experiments.main, ["plain", "hacking", "--seeds", "7", "--out", tmp_path], monkeypatch, capsys)
    assert drawn == [(tmp_path / "hacking.png", {"hacking, 4,000 rollouts": ([10, 20], [0.5, 0.4], [0.2, 0.3])})]


def test_divergence_is_the_kl_written_out():
    p, q = random_model(1), random_model(2)
    trajectories = played()[:6]
    assert divergence(p, p, trajectories) == pytest.approx(0, abs=1e-6)
    kls = []
    for t in trajectories:
        for start, end in t.spans:
            for place in range(start, end):
                with torch.no_grad():
                    a, b = (m.logits(m(torch.from_numpy(t.ids[None, :place].astype(np.int64)))[0, -1]).double().numpy() for m in (p, q))
                a, b = a[5:], b[5:]  # an action is written with words and <end>; other special tokens are never sampled
                a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
                kls.append((np.exp(a) * (a - b)).sum())
    assert divergence(p, q, trajectories) == pytest.approx(np.mean(kls), rel=1e-3) and min(kls) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("experiments")


SMALL = "--games tiny --n-generated 60 --dev-games 12 --max-steps 6 --glances 2 --checks 3 --demos 32 --sft-updates 4 --rollouts 24 --min-games 12 --pairs 32 --dim 32 --layers 1 --hidden 32 " \
        "--dev-episodes 1 --test-splits --threads 1"


@pytest.mark.parametrize("name, rows", (("q-hat", 4), ("reference", 2), ("pilot", 1)))
def test_the_first_experiments_end_in_a_table(monkeypatch, capsys, folder, name, rows):
    for constant, value in (("TINY", SMALL), ("PILOT", "--iters 2 --algo inverseprm --inverse-updates 3"), ("OF_EACH", (2, 4)), ("PLAYED", 64), ("NOISE", (0.5,)), ("GAMES", 60), ("DEV", 12)):
        monkeypatch.setattr(experiments, constant, value)
    done = in_process(experiments.main, [name, "--out", folder], monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(table) == rows + 2 and len({line.count("|") for line in table}) == 1
    if name == "reference":
        kl = [[float(x) for x in re.findall(r", ([\d.]+)", line)] for line in table[2:]]
        assert all(len(line) == 4 and line[0] == 0 for line in kl) and kl[0][:2] == kl[1][:2]  # the two differ from the second iteration on
        assert (folder / "tiny/reference.png").stat().st_size > 10_000
