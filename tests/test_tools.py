"""The tools: each runs on a tiny run, and its numbers hold a property that is known beforehand."""

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from candidates import prefix_tree, score_states
from eval import evaluate_policy
from fast_alfworld import Game, fingerprint, generate, write_games
from qestimate import returns
from rollout import Episode, replay, rollout
from run import Context, Run
from search import best_of_n, tilted
from tiny import assert_refused, by_id, in_process, played, read, taught, tokenizer
from tools import bench, bench_models, curves, q_checks, q_ground_truth, report
from tools.experiment import list_of, read_run
from utils import generator, read_model, save_model

FLAGS = ("--games tiny --n-generated 40 --iters 1 --max-steps 12 --temperature 1 --updates 4 "
         "--rollouts 48 --rollouts-per-game 4 --dpo-batch 4 --test-splits valid_seen "
         "--episodes-per-game 1 --dpo-lr 5e-4 --threads 1").split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one iteration whose π_0 wins some games: its folder, and its Context."""
    folder = tmp_path_factory.mktemp("run") / "run"
    args, steps = train.parse([*FLAGS, "--out", str(folder)])
    own, dev, test = train.games_of(args, steps)
    prints = {split: fingerprint(some) for split, some in
              {"train": own, "dev": dev, **test}.items()}
    run = Run(folder, vars(args), prints)
    c = Context(args, steps, run, torch.device("cpu"), own, dev, test, tokenizer())
    save_model(folder / "iter0/policy", taught(), tokenizer())
    some = train.roll_out(c, 1)
    train.train_prm(c, 1, some)
    prm = c.prm(1)
    torch.nn.init.normal_(prm.score.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    save_model(folder / "iter1/prm", prm, tokenizer())  # one that says something of actions
    train.improve_policy(c, 1, some)
    for i in (0, 1):
        train.evaluate(c, i)
    return folder, c


def tool(main, words, monkeypatch, capsys):
    """Run a main function. -> its printed lines"""
    done = in_process(main, words, monkeypatch, capsys)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def part(name):
    """A part of curves.py as a main function."""
    return lambda: curves.PARTS[name](curves.sys.argv[1:])


def test_rollouts_are_those_that_the_run_has_written(made, monkeypatch, capsys):
    """A copy beside them, by a file manager say, does not count."""
    shard = made[0] / "iter1/rollouts/00000.safetensors"
    copy = shard.with_name("00000 (1).safetensors")
    copy.write_bytes(shard.read_bytes())
    try:
        lines = tool(q_checks.main, ("--run", made[0]), monkeypatch, capsys)
        episodes = len(curves.load_trajectories(shard))
        assert f"episodes: {episodes}" in lines and episodes == 48
        assert 0 <= read(made[0] / "q-checks/1.json")["go_to_repeated"]["lost"] < 12
        assert read(made[0] / "q-checks/1.json")["episodes"] == episodes
    finally:
        copy.unlink()


# --- curves.py -----------------------------------------------------------------------------------

def test_acting_at_beta_infinity_and_best_of_1_is_the_policy(made, monkeypatch, capsys):
    folder, c = made
    flags = "--run", folder, "--betas", "inf,0.1", "--best-of", "1,8", "--threads", 1
    lines = tool(part("act"), flags, monkeypatch, capsys)
    out = folder / "curves/act-dev-policy0-prm1"
    rows, record = read(out / "rows.json"), read(folder / "iter0/eval-dev.json")
    by = {(r["kind"], r["x"]): r for r in rows}
    plain = by["beta", None]
    assert plain["success"] == by["best_of", 1]["success"] == record["success"] > 0
    assert plain["interval"] == record["interval"] and plain["gain"] == [0, 0, 0]
    assert read(out / "rows/plain.json")["episodes"] == record["episodes"]
    for (kind, x), act in {("beta", 0.1): tilted(0.1), ("best_of", 8): best_of_n(8)}.items():
        expected = evaluate_policy(taught(), tokenizer(), c.dev, episodes_per_game=2, max_steps=12,
                                   temperature=1.0, seed=0, act=act, prm=c.prm(1))
        assert by[kind, x]["success"] == expected["success"]
        assert by[kind, x]["gain"][0] == pytest.approx(expected["success"] - plain["success"])
    assert len(lines) == 2 + 4 and (out / "figure.png").stat().st_size > 10_000
    monkeypatch.setattr(curves, "evaluate_policy", None)  # nothing is played again
    assert tool(part("act"), flags, monkeypatch, capsys) == lines
    refused = in_process(part("act"), [*flags, "--seed", 5], monkeypatch, capsys)
    assert_refused(refused, "seed 0 -> 5")


def test_stage_3_starts_at_the_policy_and_stays_there_without_a_step(made, monkeypatch, capsys):
    folder, c = made
    flags = ["--run", folder, "--methods", "exact,dpo-hard-kl", "--lrs", "1e-12,5e-4",
             "--evaluations", 2, "--updates", 4, "--threads", 1]
    tool(part("improve"), flags, monkeypatch, capsys)
    out, plain = folder / "curves/improve-1", read(folder / "iter0/eval-dev.json")["success"]
    groups = {(g["method"], g["lr"]): g for g in read(out / "rows.json")}
    assert len(groups) == 4 and (out / "figure.png").exists()
    for (method, lr), g in groups.items():
        assert g["steps"]["success"] == [0, 2, 4] and g["steps"]["dev_kl"] == list(range(5))
        assert g["success"][0][0] == plain and g["dev_kl"][0][0] == pytest.approx(0, abs=1e-6)
        if lr == 1e-12:
            assert g["success"] == [[plain] * 3]
            assert g["dev_kl"][0] == pytest.approx([0] * 5, abs=1e-6)
            assert g["dev_distillation"][0] == pytest.approx([g["dev_distillation"][0][0]] * 5)
        else:
            assert g["dev_kl"][0][-1] > 1e-4
    log = read(out / "rows/exact-0.0005-0.json")["log"]
    assert log[-1]["train_distillation"] < log[0]["train_distillation"]
    own = read(folder / "iter1/dpo.json")["log"]  # the run's settings repeat the run's training
    assert [{k: e[k] for k in own[0]} for e in log] == own
    assert log[-1]["success"] == read(folder / "iter1/eval-dev.json")["success"]
    assert read(out / "rows/start.json")["train_kl"] == pytest.approx(0, abs=1e-6)
    stage = curves.Stage
    monkeypatch.setattr(stage, "train", None)  # finished trainings are not repeated
    tool(part("improve"), flags, monkeypatch, capsys)


def test_the_closed_form_has_no_distillation_loss_and_gains(made):
    _, c = made
    args = SimpleNamespace(episodes_per_game=1, kl=0.1, evaluations=1)
    stage = curves.Stage(c, 1, curves.dpo.Improve(beta=0.2, temperature=1.0), args)
    probe = stage.probes["dev"]
    measured = probe(taught(), 0.2)
    assert measured["kl"] == pytest.approx(0, abs=1e-6) == measured["gain"]
    assert measured["distillation"] > 0
    moved = curves.Probe.__call__.__wrapped__  # the same quantities of π·exp(Q/β)
    monkey = lambda *_: curves.dpo.tilt(probe.log_ref, probe.q, 0.2)
    original, curves.score_states = curves.score_states, monkey
    try:
        best = moved(probe, None, 0.2)
    finally:
        curves.score_states = original
    assert best["distillation"] == pytest.approx(0, abs=1e-6)
    assert best["gain"] > 0 and best["gain"] - 0.2 * best["kl"] > 0


def test_sft_by_demonstrations_and_its_ablations_in_one_table(tmp_path, monkeypatch, capsys):
    flags = ("--games tiny --n-generated 40 --demos 8,16 --dim 32 --layers 1 --max-steps 4 "
             f"--episodes-per-game 1 --threads 1 --out {tmp_path}/sft").split()
    tool(part("sft"), [*flags, "--seeds", "0,1"], monkeypatch, capsys)
    ablation = "--demos", 8, "--joined-names", "--mistakes", 0.2
    tool(part("sft"), [*flags, *ablation], monkeypatch, capsys)
    rows = read(tmp_path / "sft/rows.json")
    assert sorted((r["variant"].split(", d")[0], r["demos"], r["seeds"]) for r in rows) == [
        ("dim 32, layers 1", 8, [0, 1]), ("dim 32, layers 1", 16, [0, 1]),
        ("joined names, mistakes 0.2", 8, [0])]
    row = read(tmp_path / "sft/rows/16-1-dim-32-layers-1.json")
    policy, own = read_model(tmp_path / "sft/policies/16-1-dim-32-layers-1")
    _, dev, _ = train.games_of(*train.parse(FLAGS))
    again = evaluate_policy(policy, own, dev, episodes_per_game=1, seed=1, max_steps=4)
    assert row["episodes"] == again["episodes"]
    _, joined = read_model(next((tmp_path / "sft/policies").glob("8-0-joined*")))
    names = [token for token in joined.tokens if re.fullmatch(r" [a-z]+ 1", token)]
    assert names and all(len(joined.encode(x)) == 1 < len(own.encode(x)) for x in names)
    done = in_process(part("sft"), [*flags, "--max-steps", 5], monkeypatch, capsys)
    assert_refused(done, "max-steps 4 -> 5")


def test_lists_drop_duplicates():
    assert list_of(int)("4,1,16,4") == [4, 1, 16]


# --- q_ground_truth.py ---------------------------------------------------------------------------

def states_of(rng, n=30, error=0.0):
    return [{"q": rng.random(k).tolist(), "error": [error] * k, "pi": [1 / k] * k}
            for k in rng.integers(2, 6, n)]


def test_a_judge_that_knows_ranks_right_and_one_that_errs_wrong():
    states = states_of(np.random.default_rng(0))
    q = [np.array(s["q"]) for s in states]
    right, wrong, flat = (q_ground_truth.compare([f(x) for x in q], states, 0.1) for f in (
        lambda x: 2 * x, lambda x: -x, lambda x: np.full(len(x), x.mean())))
    assert right["q"] == right["advantage"] == pytest.approx(1) == -wrong["advantage"]
    assert right["pairs"][0.05][1] == 1 and wrong["pairs"][0.05][1] == 0
    assert right["pairs"][0.15][0] < right["pairs"][0.05][0] and right["gain"] > 0 > wrong["gain"]
    assert right["spread"] == pytest.approx(2 * right["true_spread"])
    assert flat["advantage"] is None and flat["pairs"][0.1][1] == 0.5 and flat["q"] > 0.3


def test_pairs_and_gain_written_out():
    states = [{"q": [0.6, 0.2, 0.5], "error": [0.01, 0.01, 0.06], "pi": [0.5, 0.25, 0.25]}]
    found = q_ground_truth.compare([np.array([0.1, 0.5, 0.5])], states, 0.4 / np.log(2))
    # A of 0.6, 0.2, 0.5 is 0.125, −0.275, 0.025; the pair 0.6, 0.5 is within two standard errors
    # π·exp(Q/β) is 0.5, 0.5, 0.5 before it is normalised
    assert found["gain"] == pytest.approx((0.125 - 0.275 + 0.025) / 3)
    assert found["pairs"] == {0.05: (2, 0.25), 0.1: (2, 0.25), 0.15: (2, 0.25)}


def test_the_spread_of_actions_that_are_equally_good_is_noise():
    rng, N = np.random.default_rng(0), 64
    states = [{"q": (rng.binomial(N, 0.3, 4) / N).tolist(), "pi": [0.25] * 4,
               "error": [(0.21 / N) ** 0.5] * 4} for _ in range(400)]
    found = q_ground_truth.compare([np.array(s["q"]) for s in states], states, 0.1)
    assert found["true_spread"] < 0.015 < 0.04 < found["spread"]
    assert found["pairs"][0.05][0] < 0.1 * 400 * 6


def test_the_true_q_of_a_forced_win_is_1_and_of_the_last_step_at_the_cap_0(made, tmp_path):
    c = Context(SimpleNamespace(max_steps=15, temperature=1.5, gamma=0.9), None, None,
                torch.device("cpu"), dev=list(by_id().values()), tokenizer=tokenizer())
    t = next(t for t in played() if t.won and len(t) > 2)
    last = tokenizer().actions(t.ids)[-1]
    ids = t.ids[:t.spans[-1, 0]].tolist()
    game = by_id()[t.game]
    assert q_ground_truth.after(c, game, ids, last)[0] == 1
    ended, begun, commands, n = q_ground_truth.after(c, game, ids, "inventory")
    assert ended is None and n == len(t) and "inventory" in commands
    assert tokenizer().actions([*begun])[-1] == "inventory"
    c.args.max_steps = len(t)
    assert q_ground_truth.after(c, game, ids, "inventory")[0] == 0
    c.args.max_steps = 15
    state = {"game": t.game, "ids": ids, "commands": [last, "inventory"], "pi": [0.9, 0.1]}
    args = SimpleNamespace(likely=2, others=0, rollouts=40, seed=0)
    folder = tmp_path / "policy"
    save_model(folder, taught(), tokenizer())
    found, = q_ground_truth.play_truth(c, [state], args, folder, tmp_path)
    episodes = [Episode(game, 40 + j, begun, n) for j in range(40)]
    again = [t.reward * 0.9 ** len(t) for t in rollout(
        taught(), tokenizer(), episodes, temperature=1.5, max_steps=15,
        seed=q_ground_truth.key("truth 0"))]
    assert found["q"] == [1, pytest.approx(np.mean(again))] and 0 < found["q"][1] <= 0.9
    assert found["error"] == [0, pytest.approx(np.std(again, ddof=1) / 40 ** 0.5)]


def test_a_row_for_every_judge_from_rollouts_that_stay(made, monkeypatch, capsys):
    folder, c = made
    flags = "--run", folder, "--states", 6, "--rollouts", 4, "--threads", 1
    lines = tool(q_ground_truth.main, flags, monkeypatch, capsys)
    judges = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    prm = str(folder / "iter1/prm")
    assert judges == ["log π", prm, f"one step ahead by {prm}", "true Q"]
    states = read(folder / "truth-policy0/truth/states.json")["states"]
    assert len(states) == 6 and all(len(s["q"]) == len(s["commands"]) == 4 for s in states)
    assert all(sorted(s["pi"][:3], reverse=True) == s["pi"][:3] for s in states)
    monkeypatch.setattr(q_ground_truth, "play_truth", None)
    assert tool(q_ground_truth.main, flags, monkeypatch, capsys) == lines
    done = in_process(q_ground_truth.main, [*flags, "--seed", 1], monkeypatch, capsys)
    assert_refused(done, "seed 0 -> 1")
    s = states[0]
    said = q_ground_truth.judge_states(c, taught(), {"prm": (c.prm(1), True)}, states)
    f = score_states(c.prm(1), [np.array(s["ids"])],
                     [(0, len(s["ids"]), prefix_tree(tuple(s["commands"]), tokenizer()))])
    assert said["prm"][0] == pytest.approx(f[0].sigmoid().tolist(), abs=1e-5)


# --- report.py -----------------------------------------------------------------------------------

class Page(HTMLParser):
    """All text, start tags, and what is open at the end."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page_that_asks_for_nothing_and_tells_the_runs_numbers(made, monkeypatch, capsys):
    folder, c = made
    tool(report.main, (folder, "--episodes", 3, "--threads", 1), monkeypatch, capsys)
    text = (folder / "report/index.html").read_text()
    page = Page(text)
    assert page.open == [] and not any(tag in ("script", "link", "iframe") for tag, _ in page.tags)
    assert all((folder / "report" / value).stat().st_size > 5000 for _, a in page.tags
               for name, value in a.items() if name in ("src", "href"))
    assert [tag for tag, _ in page.tags].count("details") == 3
    for i in (0, 1):
        for split in ("dev", "valid_seen"):
            record = read(folder / f"iter{i}/eval-{split}.json")
            row = [f"π_{i}", split, f"{100 * record['success']:.1f} %"]
            assert any(page.texts[n:n + 3] == row for n in range(len(page.texts)))
    assert sorted(f.name for f in (folder / "report").glob("*.png")) == [
        "calibration.png", "stage-3.png", "success.png", "time.png"]
    steps = re.findall(r"<td>(\d\.\d{3})</td><td>(\d\.\d{3})</td>", text)
    assert len(steps) > 9 and all(0 <= float(x) <= 1 for step in steps for x in step)


def test_texts_of_an_episode_are_escaped():
    nasty = "<b>&\"'"
    step = {"action": nasty, "answer": nasty, "candidates": [{"action": nasty, "pi": 1, "q": None}]}
    html = report.episode_html({"task": nasty, "observation": nasty, "won": False, "steps": [step]})
    page = Page(html)
    assert page.open == [] and page.texts.count(nasty) == 4
    assert ("tr", {"class": "taken"}) in page.tags


def test_without_episodes_no_model_is_needed(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "read_run", None)
    tool(report.main, (made[0], "--episodes", 0, "--out", tmp_path), monkeypatch, capsys)
    assert (tmp_path / "index.html").exists()


# --- bench.py ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small games with files, and a folder of a policy."""
    folder = tmp_path_factory.mktemp("bench")
    write_games(generate("train", 8, tiny=True), folder, "train")
    save_model(folder / "policy", taught(), tokenizer())
    return folder, sorted(folder.glob("json_2.1.1/train/*/*/game.tw-pddl"))


def fine(rows, *names):
    assert [r["what"] for r in rows] == list(names)
    for r in rows:
        assert r.keys() == {"what", "unit", "ours", "other", "other_name", "ratio"}
        assert r["ours"] > 0 and r["ratio"] == pytest.approx(r["other"] / r["ours"])


def test_the_world_is_faster_than_alfworlds(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PER_TYPE", 1)
    monkeypatch.setattr(bench, "TASK_TYPES", bench.TASK_TYPES[:1])
    words = "env", "--data", files[0], "--json", tmp_path / "bench.json"
    tool(bench.main, words, monkeypatch, capsys)
    rows = read(tmp_path / "bench.json")
    fine(rows, "env.step", "env.reset", "env.load")
    assert all(r["ratio"] > 10 for r in rows)


def test_transformers_scores_the_same_candidates_alike(files):
    pytest.importorskip("transformers")
    model = bench_models.transformers_model(files[0] / "policy")
    t = max(played(), key=len)
    game = by_id()[t.game]
    state = bench_models.Stock.__new__(bench_models.Stock)
    state.cache, before = None, 0
    for k, commands in list(enumerate(replay(t, game, tokenizer())))[:4]:
        start = int(t.spans[k, 0])
        state.new, state.commands, before = t.ids[before:start].tolist(), commands, start
        log_pi = bench_models.score_candidates(model, tokenizer(), state)
        ours = score_states(taught(), [t.ids], [(0, start, prefix_tree(commands, tokenizer()))],
                            bench_models.TEMPERATURE)[0]
        assert log_pi.tolist() == pytest.approx(ours.tolist(), abs=1e-3)


def test_rollouts_against_transformers(files, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench_models, "CAP", 3)
    monkeypatch.setattr(bench_models, "STEPS", 3)
    games = [Game.load(f) for f in files[1][:1]]
    args = SimpleNamespace(episodes=16, stock_episodes=1)
    rows = list(bench_models.bench_rollout(bench.row, taught(), tokenizer(), files[0] / "policy",
                                           games, args))
    fine(rows, "rollout.candidates", "rollout.transformers", "rollout.end_to_end", "decode.b16",
         "decode.b64", "decode.b256")
    assert rows[1]["ratio"] > 10


@pytest.mark.parametrize("name", ("prm", "dpo"))
def test_training_against_the_usual_way_has_equal_losses(files, name, monkeypatch):
    if name == "dpo":
        pytest.importorskip("trl")
    monkeypatch.setattr(bench_models, "CAP", 4)
    policy, own, folder = bench_models.load_policy(files[0] / "policy", [], None, "")
    games = [Game.load(f) for f in files[1]]
    rows = list(bench.PARTS[name](bench.row, policy, own, folder, games, None))
    fine(rows, {"prm": "prm.labels", "dpo": "dpo.pairs"}[name])
    assert "losses" in rows[0]["other_name"]


def test_without_a_policy_a_random_one_is_measured(files, tmp_path, capsys):
    games = [Game.load(f) for f in files[1]]
    policy, own, folder = bench_models.load_policy("/nowhere", games, tmp_path, "/nowhere")
    assert policy.config.vocab_size == len(own) and "random" in capsys.readouterr().err
    assert read_model(folder)[1].tokens == own.tokens


# --- mistakes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("main, flags, parts", (
    ("act", ("--run", "/nowhere"), ("/nowhere", "config.json")),
    ("act", ("--run", "{run}", "--betas", "1,two"), ("--betas", "two")),
    ("act", ("--run", "{run}", "--best-of", "0,1"), ("--best-of", "1")),
    ("act", ("--run", "{run}", "--policy", 7), ("iter7/policy",)),
    ("act", ("--run", "{run}", "--split", "nosuch"), ("nosuch",)),
    ("act", ("--run", "{run}", "--iteration", 3, "--policy", 0), ("iter3/prm",)),
    ("improve", ("--run", "{run}", "--methods", "exact,best"), ("best", "exact, dpo-hard")),
    ("improve", ("--run", "{run}", "--iteration", 2), ("iteration 2", "not finished")),
    ("sft", ("--dim", 33), ("--dim 33", "32")),
    ("sft", ("--loss", "mse"), ("--loss",)),
    (q_ground_truth.main, ("--run", "{run}", "--prm", "{run}/iter0/policy"), ("not a PRM",)),
    (q_ground_truth.main, ("--run", "{run}", "--rollouts", 1), ("--rollouts",)),
    (report.main, ("/nowhere",), ("/nowhere", "config.json")),
    (report.main, ("{run}", "--episodes", -1), ("--episodes",)),
    (report.main, ("{run}", "--split", "nosuch"), ("nosuch",)),
    (bench.main, ("sort",), ("sort", "env")),
    (bench.main, ("prm", "--policy", "/nowhere"), ("/nowhere", "no model there")),
    (lambda: curves.run_part(curves.__doc__, curves.PARTS, ["plot"]), (), ("plot",)),
))
def test_mistakes_are_one_line_and_exit_code_2(made, files, main, flags, parts, monkeypatch,
                                               capsys):
    monkeypatch.setenv("ALFWORLD_DATA", str(files[0]))
    words = [str(flag).format(run=made[0]) for flag in flags]
    main = part(main) if isinstance(main, str) else main
    assert_refused(in_process(main, words, monkeypatch, capsys), *parts)


def test_other_games_than_those_of_the_run_are_refused(made, tmp_path):
    config = json.loads((made[0] / "config.json").read_text())
    config["games"]["dev"] = "3 games, 000000000000"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(curves.UserError, match="other games of dev"):
        read_run(tmp_path)


@pytest.mark.parametrize("words", (["bench.py"], ["curves.py"], ["curves.py", "act"], ["report.py"],
                                   ["curves.py", "improve"], ["curves.py", "sft"],
                                   ["q_ground_truth.py"]))
def test_help_shows_every_default(words, monkeypatch, capsys):
    main = {"bench.py": bench.main, "report.py": report.main, "q_ground_truth.py":
            q_ground_truth.main}.get(words[0]) or (
        lambda: curves.run_part(curves.__doc__, curves.PARTS, curves.sys.argv[1:]))
    done = in_process(main, [*words[1:], "--help"], monkeypatch, capsys)
    flags = re.findall(r"^  (--[a-z-]+)", done.stdout, re.M)
    assert done.returncode == 0 and (len(flags) > 4 or words == ["curves.py"])
    assert done.stdout.count("(default") == len(flags)


def test_a_tool_runs_as_a_program(tmp_path):
    from tiny import command
    done = command("tools/report.py", tmp_path)
    assert done.returncode == 2 and "config.json is missing" in done.stderr
