"""What the tests share: a few generated games, a tokenizer, tiny models and their rollouts; each made once."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tellings
from common import command_line
from expert import fit_prior
from flags import parse_flags
from games import generated_split
from model import Config, Transformer
from rollout import MAX_ACTION, rollout
from sft import train_sft, train_tokenizer
from tokenizer import END
from train import main as train_main

ROOT = Path(__file__).parent.parent
TINY = ["--smoke", "--iters", "2", "--n-generated", "40", "--dev-games", "6", "--demos", "64", "--sft-updates", "8", "--glances", "2", "--checks", "2", "--check-batch", "8", "--rollouts", "24", "--min-games", "6", "--shard", "12",
        "--pairs", "64", "--states-per-trajectory", "8", "--dim", "32", "--hidden", "64", "--max-steps", "8", "--test-splits", "valid_seen", "--threads", "1"]  # train.py at its smallest

torch.set_num_threads(1)  # on matrices this small a second thread only costs


@lru_cache
def games():
    return generated_split("train", 40)


@lru_cache
def prior():
    return fit_prior(games())


@lru_cache
def tokenizer():
    return train_tokenizer(games(), prior(), seed=0)


@lru_cache
def tell():
    """As stages 2 and 3 tell an episode, numbers alone."""
    return tellings.teller(games(), tokenizer(), 0.0)


def as_it_is(ids, game, rng, any_number=False):
    """An episode not told anew."""
    return np.asarray(ids, np.int64)


def random_model(seed=0, head="lm", vocab=None, dim=32, layers=2, heads=4, kv_heads=2, hidden=64, context=1024, scale=0.3):
    """Large random weights, norms and biases too, so that no mistake hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(Config(vocab or len(tokenizer()), dim, layers, heads, kv_heads, hidden, context, 300.0, 1e-3, head)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale + ("norm" in name))
    return model


@lru_cache
@torch.enable_grad()  # the first to ask may be a test without
def taught():
    """A policy that speaks the language of the game, after some seconds of SFT. Tests must not train it: copy it."""
    torch.manual_seed(0)
    policy = Transformer(Config(len(tokenizer()), 32, 2, 4, 2, 64, 1024))
    with tempfile.TemporaryDirectory() as folder:
        train_sft(policy, tokenizer(), games(), prior(), demos=1280, updates=1, glanced=0, lr=1e-2, batch=16, seed=0, state=Path(folder, "state"), mistakes=0.15,
                  obs_weight=0.3, max_steps=20)
    return policy


def play(policy, episodes, **options):
    """Trajectories in the order of (game, episode)."""
    return sorted(rollout(policy, tokenizer(), episodes, **options), key=lambda t: (t.game, t.episode))


@lru_cache
def played():
    """48 rollouts of `taught`, 4 a game."""
    return play(taught(), [(game, k) for game in games()[:12] for k in range(4)], temperature=0.7, max_steps=15, seed=1)


@lru_cache
def demonstrations():
    """[(Trajectory, taught)]: what the expert leaves, mistakes included; most are won."""
    return tellings.expert_trajectories(games(), prior(), tokenizer(), demos=3 * len(games()), seed=0, mistakes=0.1, max_steps=20)


def expert_trajectories():
    return [t for t, _ in demonstrations()]


def some_branches(seed=0, trunks=4, n=24):
    """Played trajectories with random actions branching off at random places of theirs: (trunks, branches)."""
    rng = np.random.default_rng(seed)
    picked = [played()[i] for i in rng.choice(len(played()), trunks, replace=False)]
    branches = []
    for b in sorted(rng.integers(trunks, size=n)):
        t = picked[b]
        start = int(t.spans[rng.integers(len(t)), 0])
        forced = bool(rng.random() < 0.3)
        length = MAX_ACTION - 1 if forced else rng.integers(0, 6)
        branches.append((int(b), start, [*rng.integers(6, len(tokenizer()), length).tolist(), END], forced))
    return [t.ids for t in picked], branches


def assert_same(a, b):
    """Two trajectories are equal, their log-probabilities up to rounding."""
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "logp":
            np.testing.assert_allclose(x, y, atol=1e-4)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


def command(*words):
    """Run a command of the project. -> CompletedProcess with its texts"""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
                          text=True, timeout=300)


def assert_refused(run, *parts):
    """Exit code 2, and one line on stderr behind those on games; `run` as from `command`."""
    lines = [line for line in run.stderr.splitlines() if not line.startswith(("games: ", "estimate "))]
    assert run.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    assert all(part in lines[0] for part in parts), lines[0]


def in_process(main, words, monkeypatch, capsys):
    """The same as `command` for a main, within this process: seconds less for each."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    capsys.readouterr()
    try:
        command_line(main)
        code = 0
    except SystemExit as left:
        code = left.code
    return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr())))


def read(file):
    return json.loads(file.read_text())


def copy_of(run, tmp_path, *flags):
    """A copy of the finished run, to be spoiled; its config.json says how to continue it, with other flags if any."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    words = [*TINY, *flags, "--out", str(folder)]
    config = read(folder / "config.json")
    (folder / "config.json").write_text(json.dumps(config | {"flags": vars(parse_flags(words)), "words": words}))
    return folder


class Captured(Exception):
    """Carries the arguments of a call out of a stage."""


def capture(monkeypatch, folder, stage, function):
    """Continue a run that lacks one record, up to the call of `function`. -> its arguments by position, then those by name"""
    (folder / f"{stage}.json").unlink()

    def stop(*positions, **names):
        raise Captured((*positions, names))

    monkeypatch.setattr(f"train.{function}", stop)
    monkeypatch.setattr("sys.argv", ["train.py", *read(folder / "config.json")["words"]])
    with pytest.raises(Captured) as caught:
        train_main()
    return caught.value.args[0]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
