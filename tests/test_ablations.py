"""ablations/: what each file promises, and that each runs by train.py's command line."""

import importlib
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rollout
import train
from ablations import __main__ as rows
from ablations import (curiosity, ensemble, forks, grpo, implicit_prm, rft, shaping, shuffled,
                       steered, world_states)
from candidates import score_states
from dpo import Batch, Improve
from fast_alfworld import AlfworldEnv, Demonstration, Expert, Step, demonstrate
from fast_alfworld.cli import UserError
from fast_alfworld.gamefile import split_intro
from inverse_prm import transitions
from prm import score
from qestimate import history_keys, q_table, returns
from rollout import Episode
from run import Context
from sft import as_trajectory
from tiny import (ROOT, brute_force, by_id, games, in_process, play, played, random_model, read,
                  some_states, taught, tokenizer)
from utils import generator

NAMES = sorted(f.stem for f in (ROOT / "ablations").glob("[a-z]*.py"))
INVERSE = ("--algo", "inverseprm")


def context(name, *flags):
    """A Context with the games and the tokenizer of tiny.py."""
    args, steps = train.parse(["--ablation", name, "--max-steps", "10", *flags])
    return Context(args, steps, None, torch.device("cpu"), games(), tokenizer=tokenizer())


def episodes(each=2):
    return [Episode(game, k) for game in games() for k in range(each)]


def a_batch(trajectories, log_pi=None, C=3):
    """One state of each trajectory, its first action being candidate 0."""
    log_pi = torch.randn(len(trajectories), C).log_softmax(-1) if log_pi is None else log_pi
    return Batch(log_pi.requires_grad_(), log_pi.detach(), torch.zeros_like(log_pi),
                 torch.zeros(len(trajectories), dtype=torch.long), trajectories,
                 [0] * len(trajectories), ())


# --- exploration ---------------------------------------------------------------------------------

def test_reset_starts_at_states_of_demonstrations_and_counts_own_actions_only():
    c = context("reset", "--demos", "36")
    demos = [t for t, _ in c.steps.demonstrations(c)]
    starts = c.steps.start_states(c, 1, episodes())
    begun = [e for e in starts if e.begun is not None]
    assert len(begun) == len(episodes()) // 2 == sum(a == b for a, b in zip(starts, episodes()))
    assert len({(e.game.id, e.number) for e in starts}) == len(starts)
    for e in begun:
        assert any(t.game == e.game.id and np.array_equal(e.begun, t.ids[:start])
                   for t in demos for start in t.spans[:, 0])
    assert len({len(tokenizer().actions(e.begun)) for e in begun}) > 3  # at all depths
    of = {(e.game.id, e.number): e for e in begun}
    for t in play(taught(), begun, max_steps=4):
        start = of[t.game, t.episode].begun
        assert np.array_equal(t.ids[:len(start)], start) and t.spans[0, 0] == len(start)
        assert len(t) == 4 if t.truncated else len(t) <= 4  # the cap counts from the reset
        (q_hat, _), = c.steps.labels(c, 1, [t])
        assert len(q_hat) == len(t) and len(history_keys(t, tokenizer())[0]) == len(t)


def test_steered_demonstrations_follow_the_strategy():
    c = context("steered", "--steered", "1", "--demos", "24")
    for t, trained in c.steps.demonstrations(c):
        task = re.search(r" Look at a (\w+) first\.", tokenizer().decode(t.ids))
        assert tokenizer().actions(t.ids)[0].startswith(f"go to {task[1]} ") and trained.all()
    half = context("steered", "--demos", "200")
    n = sum("first." in tokenizer().decode(t.ids[:t.spans[0, 0]])
            for t, _ in half.steps.demonstrations(half))
    assert abs(n - 100) < 4 * 50 ** 0.5


def test_steered_rollouts_hide_the_strategy_from_what_learns():
    c = context("steered")
    starts = c.steps.start_states(c, 1, episodes())
    assert sum(e.begun is not None for e in starts) == len(starts) // 2
    told = play(taught(), starts[:24], max_steps=4)
    for t, plain in zip(told, c.steps.trajectories(c, 1, told)):
        prompt = tokenizer().prompt(*split_intro(by_id()[t.game].intro))
        assert tuple(plain.ids[:plain.spans[0, 0]]) == prompt
        behind = len(t.ids) - t.spans[0, 0]
        assert np.array_equal(plain.ids[-behind:], t.ids[-behind:])
        assert tokenizer().actions(plain.ids) == tokenizer().actions(t.ids)
        assert all(np.array_equal(plain.ids[slice(*a)], t.ids[slice(*b)])
                   for a, b in zip(plain.spans, t.spans))
        assert steered.without_hint(plain, tokenizer()) is plain


# --- labels --------------------------------------------------------------------------------------

def test_shaping_is_its_formulas():
    q_hat, V, gamma = np.array([0.5, 0.6, 1.0]), np.array([0.4, 0.2, 0.7]), 0.9
    assert np.allclose(shaping.shaped(q_hat, V, gamma, "potential"), [0.1, 0.4, 0.3])
    assert np.allclose(shaping.shaped(q_hat, V, gamma, "difference"),
                       [0.5 + 0.18 - 0.4, 0.6 + 0.63 - 0.2, 1.0 - 0.7])


def test_squash_is_monotone_and_has_the_slope_it_says():
    x = np.sort(np.random.default_rng(0).normal(size=101))
    y = shaping.squashed(x)
    assert (np.diff(y) > 0).all() and 0 < y.min() and y.max() < 1
    low, high = np.quantile(x, (0.25, 0.75))
    assert np.allclose(np.log(y / (1 - y)), 3 / (high - low) * (x - x.mean()))
    assert np.allclose(shaping.squashed(np.array([2.0, 2.0])), 0.5)
    assert np.isfinite(shaping.squashed(np.array([0, 1e-9, 2e-9, 1e9]))).all()


def test_shaping_reads_values_at_the_act_before_the_action():
    value, some = random_model(5, head="score"), played()[:6]
    for t, V in zip(some, score(value, shaping.at_states(some))):
        h = value(torch.from_numpy(t.ids.astype(np.int64))[None])[0]
        assert np.allclose(V, value.scores(h)[t.spans[:, 0] - 1].detach(), atol=1e-4)


def test_curiosity_grows_with_rarity_and_stays_a_probability():
    count = np.array([1, 2, 4, 100])
    bonus = curiosity.with_bonus(np.zeros(4), 1 / count, 0.2)
    assert np.allclose(bonus, 0.2 / np.sqrt(count))
    c = context("curiosity", "--curiosity", "0.2")
    for (plain, w), (q_hat, weight) in zip(train.labels(c, 1, played()),
                                           c.steps.labels(c, 1, played())):
        assert (q_hat >= plain).all() and (q_hat <= 1).all() and (w == weight).all()


def walked(game, *commands, number=0):
    """A trajectory of given commands."""
    env = AlfworldEnv()
    intro, _ = env.reset(game)
    steps = [Step(command, env.step(command)[0], True) for command in commands]
    demo = Demonstration(game.task, intro, steps, False)
    return as_trajectory(game, demo, tokenizer(), 0, number)[0]


def test_states_of_the_world_unify_histories_that_meet_again():
    game = games()[0]
    first, second = [c for c in AlfworldEnv().reset(game)[1]["admissible_commands"]
                     if c.startswith("go to ")][:2]
    a, b = walked(game, first, second, "look"), walked(game, "look", second, "look", number=1)
    keys = lambda t, tokenizer: world_states.world_keys(t, tokenizer, game)
    (s, p), (u, q) = keys(a, tokenizer()), keys(b, tokenizer())
    assert s[0] == u[0] and s[2] == u[2] and p[2] == q[2]  # they meet behind the second command
    assert s[1] != u[1] and p[1] != q[1] and p[0] != q[0] and u[0] == u[1]  # looking moves nothing
    assert history_keys(a, tokenizer())[0][2] != history_keys(b, tokenizer())[0][2]
    assert len(set(s)) == 3
    b = replace(b, reward=1.0)
    (label_a, weight), _ = context("world_states").steps.labels(context("world_states"), 1, [a, b])
    assert label_a.tolist() == [0, 0, 0.5] and weight.tolist() == [1, 1, 0.5]
    taking = [c for c in played() if any(x.startswith("take") for x in tokenizer().actions(c.ids))]
    t = taking[0]
    assert len(set(world_states.world_keys(t, tokenizer(), by_id()[t.game])[0])) > 1


def test_forks_are_brute_force_means(monkeypatch):
    c, asked = context("forks", "--forks", "3", "--gamma", "0.9"), []

    def in_this_process(c, i, name, episodes, *rest):
        asked.extend(episodes)
        return play(taught(), episodes, temperature=1.5, max_steps=15, seed=7)[::-1]

    monkeypatch.setattr(train, "play", in_this_process)
    some = sorted(played(), key=lambda t: (t.won, len(t)))[-4:]
    labels = c.steps.labels(c, 1, some)
    forked = {t.episode: t for t in in_this_process(c, 1, "forks", list(asked))}
    for t, (q_hat, weight) in zip(some, labels):
        assert (weight == 1).all() and len(q_hat) == len(t)
        for k in range(len(t) - 1):
            start = t.ids[:t.spans[k + 1, 0]]
            own = [e for e in asked[:len(forked)] if np.array_equal(e.begun, start)]
            assert len(own) == 3 and all(e.game.id == t.game and e.played == k + 1 for e in own)
            G = [0.9 * returns(forked[e.number], 0.9)[0] for e in own] + [returns(t, 0.9)[k]]
            assert q_hat[k] == pytest.approx(np.mean(G), abs=1e-6)
            assert all(k + 1 + len(forked[e.number]) <= 15 for e in own)
        assert q_hat[-1] == t.reward
    assert max(q.max() for q, _ in labels) > 0 and len(forked) == 3 * sum(len(t) - 1 for t in some)


# --- what judges ---------------------------------------------------------------------------------

def test_an_ensemble_of_equal_prms_is_one_of_them():
    one, other = (torch.rand(4, 5) for _ in range(2))
    for how in ("mean", "min"):
        assert torch.allclose(ensemble.together([lambda *_: one] * 3, how)(0, 0), one)
    both = [lambda *_: one, lambda *_: other]
    assert torch.allclose(ensemble.together(both, "mean")(0, 0), (one + other) / 2)
    assert torch.equal(ensemble.together(both, "min")(0, 0), torch.minimum(one, other))


def test_shuffled_keeps_each_states_values_and_depends_on_the_history_alone():
    sequences, states = some_states(12)
    q = torch.rand(len(states), max(len(tree) for *_, tree in states))
    mixed = shuffled.shuffle(q, sequences, states, 0, "x")
    for row, new, (*_, tree) in zip(q, mixed, states):
        n = len(tree)
        assert torch.equal(row[:n].sort()[0], new[:n].sort()[0]) and torch.equal(row[n:], new[n:])
    assert not torch.equal(q, mixed)
    assert torch.equal(shuffled.shuffle(q[3:], sequences, states[3:], 0, "x"), mixed[3:])
    assert not torch.equal(shuffled.shuffle(q, sequences, states, 1, "x"), mixed)


def test_implicit_prm_is_the_sum_of_log_ratios():
    theta, reference, some, b = random_model(0), random_model(1), played()[:3], 0.05
    objective = implicit_prm.outcome_objective(reference, some, by_id(), tokenizer(), 0.5, b)
    loss, metrics = objective(theta, [2, 0], 2, 0)
    expected = 0.0
    for t in (some[2], some[0]):
        states = rollout.states_of(t, by_id()[t.game], tokenizer())
        ratio = sum(float(p[a] - q[a]) for p, q, a in zip(
            brute_force(theta, [t.ids], states, 0.5), brute_force(reference, [t.ids], states, 0.5),
            t.choice))
        p = 1 / (1 + np.exp(-b * ratio))
        expected -= np.log(p if t.won else 1 - p) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert float(metrics["loss"][0]) == pytest.approx(2 * expected, rel=1e-3)
    loss.backward()
    assert all(p.grad is None for p in reference.parameters())
    sequences, states = some_states(5)
    assert not implicit_prm.log_ratio(theta, theta, sequences, states, 0.3).any()


# --- what is learned without a PRM ---------------------------------------------------------------

def test_rft_learns_from_won_rollouts_alone():
    won, lost = (next(t for t in played() if t.won == x) for x in (True, False))
    batch = a_batch([won, lost, won, lost])
    losses, metrics = rft.rft_loss(batch, Improve())
    assert torch.allclose(losses[::2], -batch.log_pi[::2, 0]) and not losses[1::2].any()
    losses.sum().backward()
    assert (batch.log_pi.grad[::2, 0] == -1).all() and not batch.log_pi.grad[1::2].any()
    assert not batch.log_pi.grad[:, 1:].any() and int(metrics["won"][0]) == 2
    assert context("rft").steps.start_prm is None and context("rft").steps.judge(0, 1, None) is None


def test_grpo_advantages_of_a_group_sum_to_zero():
    groups = {}
    for (game, _), a in (found := grpo.advantages(played())).items():
        groups.setdefault(game, []).append(a)
    won = {game: [t.reward for t in played() if t.game == game] for game in groups}
    for game, group in groups.items():
        assert sum(group) == pytest.approx(0, abs=1e-6)
        assert np.std(group) == pytest.approx(float(len(set(won[game])) > 1))
    assert len(found) == len(played()) and any(map(any, groups.values()))
    assert all((found[t.game, t.episode] > 0) == (t.won and len(set(won[t.game])) > 1)
               for t in played())


def test_grpo_is_the_clipped_policy_gradient():
    some = played()[:4]
    old = torch.tensor([float(t.logp[0]) for t in some])
    log_pi = torch.stack([old, old - 5, old - 5], 1)
    batch = a_batch(some, log_pi)
    advantage = {(t.game, t.episode): a for t, a in zip(some, (1.0, -1.0, 0.0, 2.0))}
    grpo.grpo_loss(advantage, batch, Improve())[0].sum().backward()
    assert batch.log_pi.grad[:, 0].tolist() == pytest.approx([-1, 1, 0, -2])  # −A at ratio 1
    far = (old + torch.tensor([0.5, -0.5, 0.5, -0.5])).requires_grad_()
    grpo.clipped_loss(far, old, torch.tensor([1.0, -1.0, -1.0, 1.0])).sum().backward()
    assert far.grad[:2].tolist() == [0, 0] and far.grad[2] > 0 > far.grad[3]


# --- demonstrations, games, vocabulary -----------------------------------------------------------

def test_hidden_ends_drops_exactly_the_last_transitions(monkeypatch):
    for t in played()[:20]:
        shown, hidden = transitions(t), transitions(t, hide_ends=True)
        assert hidden[0].tolist() == list(range(len(t) - 1)) and not hidden[1].any()
        assert shown[0].tolist() == list(range(len(t) - t.truncated))
    given = {}
    monkeypatch.setattr(train, "inverse_objective", lambda *a, **options: given.update(options))
    c = context("hidden_ends", *INVERSE, "--demos", "1")
    monkeypatch.setattr(train, "held_out", lambda args, some: set())
    monkeypatch.setattr(train, "roll_out", lambda c, i: [])
    c = SimpleNamespace(**vars(c), policy=lambda i: None, demonstrations=[], by_id={})
    c.steps.prm_loss(c, 1, [])
    assert given["hide_ends"] is True
    train.prm_loss(c, 1, [])
    assert given["hide_ends"] is False


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_degraded_share_is_right_within_binomial_error(noise):
    c = context("degraded", "--noise", str(noise), "--demos", "150")
    expert, differ, mean, variance = Expert(c.prior), 0, 0.0, 0.0
    for t, trained in c.steps.demonstrations(c):
        assert trained.all()  # learned as the expert's
        env = AlfworldEnv()
        intro, info = env.reset(by_id()[t.game])
        expert.reset(by_id()[t.game].task, intro)
        for action in tokenizer().actions(t.ids):
            commands = info["admissible_commands"]
            p = noise * (1 - 1 / len(commands))  # a random action may be the expert's
            differ, mean, variance = (differ + (action != expert.act(commands)), mean + p,
                                      variance + p * (1 - p))
            observation, *_, info = env.step(action)
            expert.observe(action, observation)
    assert abs(differ - mean) < 4 * variance ** 0.5


def test_without_task_leaves_one_type_out():
    c = context("without_task", "--without", games()[0].task_type)
    left = c.steps.games(c.args, games())
    assert {g.task_type for g in games()} - {g.task_type for g in left} == {games()[0].task_type}
    assert [g for g in games() if g.task_type != games()[0].task_type] == left


def test_one_token_names_joins_names_and_numbers():
    c = context("one_token_names")
    receptacle = games()[0].room.names[0]
    assert len(c.steps.tokenizer(c).encode(f" {receptacle}")) == 1
    assert len(train.tokenizer(c).encode(f" {receptacle}")) == 2


# --- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_docstring_says_what_it_is_and_its_command_parses(name):
    module = importlib.import_module(f"ablations.{name}")
    for part in ("Paper", "Changes", "Command: ", "Ours: "):
        assert f"\n{part}" in module.__doc__
    command = shlex.split(re.search(r"Command: (.*?)(?:    \(|\n)", module.__doc__)[1])
    args, steps = train.parse(command[2:])
    assert name in args.ablation.split(",")
    changed = {step for step in train.STEPS if getattr(steps, step) is not train.STEPS[step]}
    assert changed and all(f"`{step}`" in module.__doc__ for step in changed)


def test_ablations_that_change_nothing_or_clash_are_refused():
    for words, complaint in ((("rft,ensemble",), "judge"), (("reset,steered",), "start_states"),
                             (("shaping", "--prm-loss", "bt"), "Monte Carlo"),
                             (("curiosity", *INVERSE), "Monte Carlo"),
                             (("hidden_ends",), "inverseprm"), (("steered", *INVERSE), "steered"),
                             (("grpo", "--temperature", "1"), "dpo-temperature"),
                             (("one_token_names", "--init", str(ROOT)), "init"),
                             (("shaping", "--reference", str(ROOT)), "reference"),
                             (("none_such",), "must be among")):
        with pytest.raises(UserError, match=complaint):
            train.parse(["--ablation", *words])
    args, steps = train.parse(["--ablation", "reset,curiosity,ensemble"])
    assert steps.start_states.__module__ == "ablations.reset" and args.ensemble == 3


def test_rows_share_only_what_they_do_not_change():
    args = SimpleNamespace(iters=1, rollouts=4000, flags="", out=Path("x"))
    plain = vars(train.parse(rows.words_of(args, "plain", 0))[0])
    late = {"iters", "out", "ablation", "prm_loss", "targets", "improve", "labels", "ref", "algo",
            "kl", "prm_epochs"}
    first = {"games", "tokenizer", "demonstrations", "start_states", "trajectories"}
    for name, row in rows.ROWS.items():
        parsed, steps = train.parse(rows.words_of(args, name, 0))
        differ = {k for k, v in vars(parsed).items() if k in plain and plain[k] != v} - late
        differ |= {s for s in first if getattr(steps, s) is not train.STEPS[s]}
        allowed = {"": {*first, "rollouts"}, "policy": {"start_states", "rollouts"},
                   "rollouts": set()}[row.shares]
        assert differ <= allowed, name
        assert row.shares != "rollouts" or row.rollouts == 1


def plays_here(shards, folder, device, workers, **options):
    """`play_shards` without worker processes."""
    policy, words = rollout.read_model(folder, device)
    done = []
    for file, some in (shard for shard in shards if not shard[0].exists()):
        found = list(rollout.rollout(policy, words, some, **options))
        rollout.save_trajectories(file, sorted(found, key=lambda t: (t.game, t.episode)))
        done += [t.won for t in found]
        yield np.array([len(done), sum(done)])


SMALL = ("--smoke --games tiny --n-generated 24 --demos 24 --rollouts 24 --rollouts-per-game 4 "
         "--updates 2 --max-steps 8 --dim 32 --layers 1 --threads 1 --test-splits ").split() + [""]
FLAGS = {"sarsa": ("--prm-loss", "promise-progress", "--targets", "td-gae"),
         "hidden_ends": INVERSE, "degraded": INVERSE, "forks": ("--forks", "2", "--rollouts", "8"),
         "without_task": ("--games", "generated", "--n-generated", "40")}


@pytest.mark.parametrize("name", NAMES)
def test_command_line(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "play_shards", plays_here)
    words = [*SMALL, *FLAGS.get(name, ()), "--ablation", name, "--out", tmp_path / "run"]
    first = in_process(train.main, words, monkeypatch, capsys)
    assert first.returncode == 0, first.stderr
    result, folder = read(tmp_path / "run/result.json"), tmp_path / "run/iter1"
    assert len(result["rows"]) == 2 and result["flags"]["ablation"] == name
    assert (folder / "prm.json").exists() == (name not in ("rft", "grpo", "implicit_prm"))
    extra = {"ensemble": "prm3", "shaping": "value", "forks": "forks", "implicit_prm": "implicit"}
    assert name not in extra or (folder / f"{extra[name]}.json").exists()
    again = in_process(train.main, words, monkeypatch, capsys)
    assert again.returncode == 0 and again.stdout == first.stdout


def test_the_table_shares_runs_and_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "play_shards", plays_here)
    asked = []

    def run_here(command, **_):
        asked.append(command[2:])
        monkeypatch.setattr(sys, "argv", ["train.py", *command[2:]])
        train.main()
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(rows, "subprocess", SimpleNamespace(run=run_here))
    words = ["--only", "rft,reset", "--seeds", "0,1", "--rollouts", "24", "--out", tmp_path,
             "--flags", shlex.join(SMALL)]
    out = in_process(rows.main, words, monkeypatch, capsys)
    assert out.returncode == 0, out.stderr
    assert len(asked) == 6  # `plain` too, of each seed
    table = (tmp_path / "table.md").read_text()
    assert out.stdout.endswith(table) and len(table.splitlines()) == 4 and "0,1" in table
    for stage in ("iter0/sft", "iter1/rollouts"):
        plain, shared, own = (read(tmp_path / row / f"0/{stage}.json")
                              for row in ("plain", "rft", "reset"))
        assert plain == shared and (plain == own or stage == "iter1/rollouts")
    assert in_process(rows.main, words, monkeypatch, capsys).returncode == 0 and len(asked) == 6
    assert "must be among" in in_process(rows.main, ["--only", "x"], monkeypatch, capsys).stderr
