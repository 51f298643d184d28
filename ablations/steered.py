"""Steered exploration: half of the rollouts are played with a strategy in the task text.

Paper (P1, steered exploration): with probability 0.5 the prompt asks for a strategy, proposed
    against the slow first iteration; no number in our notes.
Changes `demonstrations`: a share of them has " Look at a desk first." behind the task, with a
    random receptacle type of the room, and the expert does so. `start_states`: the same for a share
    of the rollouts. `trajectories`: the sentence is removed before Q̂, the PRM and stage 3 see it.
    Evaluation never shows one.
Command: python train.py --ablation steered
Ours: not measured yet.
"""

import re
from dataclasses import replace

import numpy as np

import train
from fast_alfworld import AlfworldEnv, Expert, demonstrate
from fast_alfworld.cli import UserError, between
from fast_alfworld.expert import base, names
from fast_alfworld.gamefile import split_intro
from rollout import Episode
from sft import as_trajectory
from tokenizer import OBS, TASK
from utils import generator

HINT = re.compile(r" Look at a \w+ first\.$")


def flags(parser):
    parser.add_argument_group("--ablation steered").add_argument(
        "--steered", type=between(0, 1), default=0.5,
        help="share of the demonstrations, and of the rollouts, with a strategy")


def check(args):
    if args.algo != "agentprm":
        raise UserError("--ablation steered: for --algo agentprm; InversePRM would be trained on "
                        "demonstrations with strategies")


def receptacle_types(game):
    """The receptacle types that a game's first observation names, sorted."""
    return sorted({base(name) for name in names(split_intro(game.intro)[1])})


def hinted(intro, kind):
    """A game's first text with a strategy behind the task."""
    return f"{intro} Look at a {kind} first."


def without_hint(trajectory, tokenizer):
    """The same trajectory as if it had been played without a strategy."""
    ids = trajectory.ids
    end = int(np.argmax(ids == OBS))
    task = tokenizer.decode(ids[:end])
    if not HINT.search(task):
        return trajectory
    plain = np.array([TASK, *tokenizer.encode(HINT.sub("", task))], ids.dtype)
    return replace(trajectory, ids=np.concatenate([plain, ids[end:]]),
                   spans=trajectory.spans + np.int32(len(plain) - end))


def demonstrations(c):
    """A share of the demonstrations, with a strategy. -> [(Trajectory, trained (T,) bool)]"""
    args, prior, games, out = c.args, c.prior, c.by_id, []
    for t, trained in train.demonstrations_(c):
        game, rng = games[t.game], generator(args.seed, "steered", t.episode)
        if rng.random() < args.steered:
            kind = rng.choice(receptacle_types(game))
            demo = demonstrate(AlfworldEnv(args.max_steps), game, Expert(prior, kind), rng,
                               max_steps=args.max_steps)
            demo = demo._replace(observation=hinted(demo.observation, kind))
            t, trained = as_trajectory(game, demo, c.tokenizer, args.seed, t.episode)
        out.append((t, trained))
    return out


def start_states(c, i, episodes):
    """A share of the episodes starts with a strategy in the prompt. -> [Episode]"""
    rng, out = generator(c.args.seed, "steered rollouts", i), list(episodes)
    for n in rng.choice(len(out), round(c.args.steered * len(out)), replace=False):
        game, number, *_ = out[n]
        intro = hinted(game.intro, rng.choice(receptacle_types(game)))
        prompt = np.array(c.tokenizer.prompt(*split_intro(intro)), np.int32)
        out[n] = Episode(game, number, prompt)
    return out


def trajectories(c, i, played):
    """The rollouts without their strategies. -> [Trajectory]"""
    return [without_hint(t, c.tokenizer) for t in played]
