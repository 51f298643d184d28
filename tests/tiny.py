"""What the tests share: a few generated games, a tokenizer, tiny random models, their rollouts.

Each is made once (`lru_cache`). Tests must not change what they get from here: copy it first.
"""

import json
import os
import subprocess
import sys
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn import functional as F

from candidates import PrefixTree
from fast_alfworld import (AlfworldEnv, Expert, demonstrate, fit_prior, generated_split,
                           name_counts)
from fast_alfworld.cli import command_line
from fast_alfworld.gamefile import split_intro
from model import Config, Transformer
from rollout import Episode, replay, rollout
from tokenizer import END, PAD, Tokenizer
from utils import generator, pad

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # the models here are too small for more threads


# --- games, text, models -------------------------------------------------------------------------

@lru_cache
def games():
    """24 games of all task types, then 12 small ones, which random play sometimes wins."""
    return generated_split("train", 24) + generated_split("train", 12, tiny=True)


@lru_cache
def by_id():
    return {game.id: game for game in games()}


def random_play(game, rng, steps=20):
    """Uniformly random admissible commands. -> (first text, [(command, answer)])"""
    env, played = AlfworldEnv(), []
    intro, info = env.reset(game)
    for _ in range(steps):
        command = info["admissible_commands"][rng.integers(len(info["admissible_commands"]))]
        observation, *_, info = env.step(command)
        played.append((command, observation))
    return intro, played


@lru_cache
def random_texts():
    """Everything that random play of all games says, commands included."""
    texts = []
    for number, game in enumerate(games()):
        intro, played = random_play(game, generator("random play", number))
        texts += [*split_intro(intro), *(text for turn in played for text in turn)]
    return texts


@lru_cache
def tokenizer():
    return Tokenizer.train(random_texts(), name_counts(games()))


def random_model(seed=0, head="lm", scale=0.2, **sizes):
    """Large random weights, norms and biases too, so that no error hides behind a 0 or a 1."""
    rng = torch.Generator().manual_seed(seed)
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden=64, max_len=1024,
                 rope_theta=300.0, norm_eps=1e-3) | sizes
    sizes.setdefault("vocab_size", len(tokenizer()))
    model = Transformer(Config(head=head, **sizes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * scale + ("norm" in name))
    return model


@lru_cache
def demonstrations():
    """[(game, Demonstration)] by the expert, a fifth of the actions being random mistakes."""
    env, expert = AlfworldEnv(), Expert(fit_prior(games()))
    return [(game, demonstrate(env, game, expert, generator("demonstration", i, k), mistakes=0.2,
                               max_steps=12))
            for i, game in enumerate(games()) for k in range(1 if i < 24 else 8)]


def transcript(demonstration):
    """The ids of an episode, ending with the <end> of its last action."""
    ids = [*tokenizer().prompt(demonstration.task, demonstration.observation.split("\n\n")[1])]
    for step in demonstration.steps:
        ids += [*tokenizer().encode(step.action), END, *tokenizer().turn(step.observation)]
    return ids[:len(ids) - ids[::-1].index(END)]


@lru_cache
@torch.enable_grad()  # the first to ask may be a test without
def taught():
    """A policy that wins most of the small games, after some seconds of training."""
    model, updates = random_model(seed=3, scale=0.1), 200
    optimizer = torch.optim.AdamW(model.parameters())
    transcripts = sorted((transcript(demo) for _, demo in demonstrations()), key=len)
    for step in range(updates):
        start = int(generator("sft", step).integers(len(transcripts) - 4))
        ids = pad(transcripts[start:start + 4])
        logits = model.logits(model(ids[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 2e-2 * min(1, (step + 1) / 10) * (1 - step / updates)
        optimizer.step()
    return model.eval()


@lru_cache
def prm():
    return random_model(2, head="score")


# --- rollouts ------------------------------------------------------------------------------------

def play(model, episodes, **options):
    """Trajectories in the order of (game, episode)."""
    played = rollout(model, tokenizer(), episodes, **options)
    return sorted(played, key=lambda t: (t.game, t.episode))


@lru_cache
def played():
    """64 rollouts of `taught`, 4 a game; some are won."""
    chosen = [*games()[:4], *games()[-12:]]
    return play(taught(), [Episode(game, k) for game in chosen for k in range(4)],
                temperature=1.5, max_steps=15, seed=1)


def some_states(n=12, seed=0, trajectories=None):
    """n random states of rollouts, several of a trajectory: (sequences, states)."""
    trajectories, rng = trajectories or played()[::11], np.random.default_rng(seed)
    commands = [replay(t, by_id()[t.game], tokenizer()) for t in trajectories]
    every = [(b, k) for b, t in enumerate(trajectories) for k in range(len(t))]
    states = []
    for i in sorted(rng.choice(len(every), min(n, len(every)), replace=False)):
        b, k = every[i]
        tree = PrefixTree(commands[b][k], tokenizer().encode)
        states.append((b, int(trajectories[b].spans[k, 0]), tree))
    return [t.ids for t in trajectories], states


@torch.no_grad()
def brute_force(model, sequences, states, temperature=1.0):
    """What candidates.py promises, by one plain forward pass for each command alone.

    -> for each state log π(·|s) of a policy, f(s, ·) of a PRM: list of (C,)
    """
    out = []
    for b, start, tree in states:
        values = []
        for command in tree.commands:
            ids = torch.tensor([*sequences[b][:start].tolist(), *tokenizer().encode(command), END])
            h = model(ids[None])[0]
            if model.config.head == "score":
                values.append(model.scores(h)[-1])
            else:
                log_p = model.logits(h).log_softmax(-1)
                values.append(log_p[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum())
        values = torch.stack(values)
        out.append(values if model.config.head == "score" else
                   (values / temperature).log_softmax(-1))
    return out


# --- comparing -----------------------------------------------------------------------------------

def assert_same(a, b):
    """Two trajectories are equal, their log-probabilities up to rounding."""
    for field in fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "logp":
            np.testing.assert_allclose(x, y, atol=1e-4)
        else:
            np.testing.assert_array_equal(x, y, err_msg=field.name)


def same(a, b):
    """Do two models have the same weights, bit by bit?"""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# --- command lines -------------------------------------------------------------------------------

# train.py: every stage twice, in seconds
TINY = ("--games tiny --n-generated 40 --iters 2 --demos 48 --dim 32 --layers 2 --max-steps 8 "
        "--rollouts 40 --rollouts-per-game 4 --prm-batch 8 --updates 3 --dpo-batch 4 "
        "--sft-batch 8 --beta 0.1 --temperature 1 --episodes-per-game 1 "
        "--threads 1").split()
# Records name the git commit; where others commit meanwhile, two runs would differ in it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "GIT_DIR": "/nowhere"}


def command(*words):
    """Run a command of the project. -> CompletedProcess with its texts"""
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, timeout=300,
                          env=ENVIRONMENT, capture_output=True)


def train(folder, *flags, program=(sys.executable,)):
    """train.py … --out <the folder's name>, from its parent. -> CompletedProcess"""
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    words = [*program, ROOT / "train.py", *flags, "--out", Path(folder).name]
    return subprocess.run(list(map(str, words)), cwd=Path(folder).parent, text=True, timeout=300,
                          env=ENVIRONMENT, capture_output=True)


def in_process(main, words, monkeypatch, capsys):
    """As `command`, for a main function and within this process, which saves seconds."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    capsys.readouterr()
    try:
        command_line(main)
        code = 0
    except SystemExit as left:
        code = left.code
    return SimpleNamespace(returncode=code, **dict(zip(("stdout", "stderr"), capsys.readouterr())))


def assert_refused(run, *parts):
    """Exit code 2 and one line of error, which names all `parts`; `run` as from `command`."""
    lines = [line for line in run.stderr.splitlines() if not line.startswith("games: ")]
    assert run.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), run.stderr
    assert all(part in lines[0] for part in parts), lines[0]


def read(file):
    return json.loads(Path(file).read_text())
