"""π_0: supervised fine-tuning on demonstrations, by masked cross-entropy.

    demos = demonstrations(games, prior, tokenizer, 4000)
    log = train_sft(policy, demos, Sft(), seed, state)

The loss is over the tokens of the expert's actions, <end> included, and, at a smaller weight, over
the world's answers, which look-ahead has to predict."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from fast_alfworld import HELP, AlfworldEnv, Expert, demonstrate, name_counts
from fast_alfworld.gamefile import split_intro
from model import Config, Transformer
from optim import optimise
from rollout import MAX_ACTION, Trajectory, replay
from tokenizer import END, Tokenizer
from utils import generator, key, mine, pad


def train_tokenizer(games, prior, seed, joined=False, sample=1000):
    """A vocabulary from the texts of `sample` demonstrations and all names of all games."""
    texts, env = [HELP] * 5, AlfworldEnv(30)
    for i in generator(seed, "tokenizer").permutation(len(games))[:sample]:
        rng = generator(seed, "tokenizer", int(i))
        demo = demonstrate(env, games[i], Expert(prior), rng, mistakes=0.2)
        texts += [*split_intro(demo.observation),
                  *(text for step in demo.steps for text in (step.action, step.observation))]
    return Tokenizer.train(texts, name_counts(games), joined)


def untrained(vocab_size, dim, layers, seed):
    """The transformer that π_0 starts from: heads of 64 dimensions, weights fixed by the seed."""
    torch.manual_seed(key(f"policy {seed}"))
    heads = max(1, dim // 64)
    return Transformer(Config(vocab_size, dim, layers, heads, heads, dim // heads, 3 * dim))


def demonstrations(games, prior, tokenizer, n, *, seed=0, max_steps=30, mistakes=0.0, noise=0.0):
    """n games shown by the expert, each once before any twice. -> [(Trajectory, trained (T,) bool)]

    mistakes: chance that a random action takes the place of the expert's and is masked from the
    loss, trained=False (DART). noise: chance of one that is learned as if it were the expert's."""
    env, out = AlfworldEnv(max_steps), []
    for number in range(n):
        lap, place = divmod(number, len(games))
        if place == 0:
            order = generator(seed, "demonstrations", lap).permutation(len(games))
        game, rng = games[order[place]], generator(seed, "demonstration", number)
        demo = demonstrate(env, game, Expert(prior), rng, mistakes, noise, max_steps)
        out.append(as_trajectory(game, demo, tokenizer, seed, number))
    return out


def as_trajectory(game, demo, tokenizer, seed, number, context=Config.max_len):
    """A Demonstration as a rollout would be stored, cut where it would outgrow the model's context.
    -> (Trajectory, trained (T,) bool)"""
    ids, spans = list(tokenizer.prompt(*split_intro(demo.observation))), []
    for step in demo.steps:
        action = (*tokenizer.encode(step.action), END)
        if len(ids) + max(len(action), MAX_ACTION) > context:
            break
        spans.append((len(ids), len(ids) + len(action)))
        ids += [*action, *tokenizer.turn(step.observation)]
    ids, T = np.array(ids[:spans[-1][1]], np.int32), len(spans)
    won = demo.won and T == len(demo.steps)
    trajectory = Trajectory(
        game.id, ids, np.array(spans, np.int32), np.zeros(T, np.int32), np.zeros(T, np.int32),
        np.zeros(T, np.float32), float(won), won, not won, seed, number)
    for k, (commands, step) in enumerate(zip(replay(trajectory, game, tokenizer), demo.steps)):
        trajectory.choice[k] = commands.index(step.action) if step.action in commands else -1
        trajectory.n_candidates[k] = len(commands)
    return trajectory, np.array([step.trained for step in demo.steps[:T]])


def token_weights(trajectory, trained, obs_weight):
    """Weight of each token in the loss, (L,): 1 in trained actions, obs_weight in answers."""
    weights = np.full(len(trajectory.ids), obs_weight, np.float32)
    weights[:trajectory.spans[0, 0]] = 0  # the prompt
    for (start, end), learn in zip(trajectory.spans, trained):
        weights[start:end] = learn
    return weights


def sft_loss(logits, targets, weights, total):
    """Weighted cross-entropy of next tokens: logits (N, V), targets and weights (N,), over `total`,
    the weight of the whole batch. -> scalar"""
    return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total


@dataclass
class Sft:
    """Settings of the training."""
    lr: float = 3e-3
    batch: int = 4
    epochs: int = 1
    obs_weight: float = 0.1
    weight_decay: float = 0.1


def token_loss(policy, batch, settings):
    """`sft_loss` of this rank's part of a batch of demonstrations. -> loss or None, metrics"""
    weights = [token_weights(*demo, settings.obs_weight) for demo in batch]
    total = float(sum(w.sum() for w in weights))
    rows = mine(list(zip([t for t, _ in batch], weights)))
    if not rows:
        return None, {}
    ids = pad([t.ids for t, _ in rows]).to(policy.device)  # (B, S)
    weights = pad([w for _, w in rows], 0.0, torch.float32).to(policy.device)[:, 1:]
    used = weights > 0
    h = policy.ragged(ids[:, :-1], torch.tensor([len(t.ids) - 1 for t, _ in rows]))[used]  # (N, D)
    loss = sft_loss(policy.logits(h), ids[:, 1:][used], weights[used], total)
    return loss, {"loss": (loss.detach() * total, float(weights[used].sum()))}


def train_sft(policy, demos, settings, seed, state, loss=token_loss):
    """Fine-tune the policy on demonstrations [(Trajectory, trained)], each once an epoch. -> log"""
    n, size = len(demos), settings.batch
    per_epoch = -(-n // size)

    def loss_of(step):
        epoch, part = divmod(step, per_epoch)
        order = generator(seed, "sft", epoch).permutation(n)[part * size:(part + 1) * size]
        return loss(policy, [demos[i] for i in order], settings)

    return optimise(policy, loss_of, settings.epochs * per_epoch, lr=settings.lr, state=state,
                    name="SFT", weight_decay=settings.weight_decay)
