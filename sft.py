"""π_0: supervised fine-tuning on demonstrations of the scripted expert.

    python sft.py --demos 8000 --out runs/sft                       # train one π_0
    python sft.py --curve 1000,2000,4000,8000 --out runs/sft-curve  # success against the number of demonstrations

Demonstrations are cheap here (a fast world, a fast expert), so every one is fresh and seen once; `--demos` counts them. Each
is told with its instance numbers permuted, because copying "the number that was seen" is what a small model finds hardest.
"""

import numpy as np
import torch
from torch.nn import functional as F

from common import generator, optimise, pad
from env import AlfworldEnv
from expert import Expert, demonstrate
from tokenizer import PAD, Tokenizer, split_intro


def train_tokenizer(games, prior, seed, sample=1000):
    """Vocabulary from `sample` demonstrations with mistakes, and every base name with every number it has in any of the games."""
    counts, texts, env = {}, [], AlfworldEnv(30)
    for game in games:
        for base, n in game.counts.items():
            counts[base] = max(n, counts.get(base, 0))
    for number, i in enumerate(generator(seed, "tokenizer").permutation(len(games))[:sample]):
        rng = generator(seed, "tokenizer", number)
        demo = demonstrate(env, games[i], Expert(prior, rng), rng, mistakes=0.2)
        texts += split_intro(demo.observation)
        texts += [text for step in demo.steps for text in (step.action, step.observation)]
    return Tokenizer.train(texts, counts)


def demonstration_tokens(demo, tokenizer, obs_weight):
    """A Demonstration -> ids (L,) int64 and the weight of each token in the loss (L,) float32.

    Actions of the expert weigh 1, its mistakes 0 (they are shown, not taught), observations `obs_weight`, the prompt 0.
    """
    ids = list(tokenizer.prompt(*split_intro(demo.observation)))
    weights = [0.0] * len(ids)
    for i, (action, observation, trained) in enumerate(demo.steps):
        tokens = tokenizer.action(action)
        ids += tokens
        weights += [float(trained)] * len(tokens)
        if i + 1 < len(demo.steps):
            turn = tokenizer.turn(observation)
            ids += turn
            weights += [obs_weight] * len(turn)
    return np.array(ids), np.array(weights, np.float32)


def demonstrations(games, prior, tokenizer, numbers, *, seed, mistakes, obs_weight, max_steps):
    """Demonstrations by number: each a game in shuffled order (each once before any twice), played by the expert. -> [(ids, weights)]"""
    env, out = AlfworldEnv(max_steps), []
    for number in numbers:
        lap, place = divmod(number, len(games))
        game = games[generator(seed, "demo order", lap).permutation(len(games))[place]]
        rng = generator(seed, "demo", number)
        demo = demonstrate(env, game, Expert(prior, rng), rng, mistakes=mistakes, max_steps=max_steps)
        ids, weights = demonstration_tokens(demo, tokenizer, obs_weight)
        out.append((tokenizer.renumber(ids, game.counts, rng), weights))
    return out


def sft_loss(logits, targets, weights):
    """Weighted cross-entropy of next tokens: logits (B, S, V), targets and weights (B, S). -> scalar"""
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (loss * weights.flatten()).sum() / weights.sum()


def train_sft(policy, tokenizer, games, prior, *, demos, lr, batch, seed, state, mistakes, obs_weight, max_steps, name="SFT", pool=8):
    """Train on `demos` fresh demonstrations, each seen once. -> log"""
    steps = max(1, demos // batch)
    device = policy.cos.device
    made = {}  # the pool of batches in use: sorted by length, so that a batch holds little padding

    def loss_of(step):
        nonlocal made
        if step not in made:
            first = step - step % pool
            last = min(first + pool, steps)
            episodes = demonstrations(games, prior, tokenizer, range(first * batch, last * batch), seed=seed, mistakes=mistakes,
                                      obs_weight=obs_weight, max_steps=max_steps)
            episodes.sort(key=lambda e: len(e[0]))
            order = generator(seed, "sft order", first).permutation(last - first)
            made = {first + i: episodes[j * batch:(j + 1) * batch] for i, j in enumerate(order)}
        ids = pad([e[0] for e in made[step]], PAD).to(device)  # (B, S)
        weights = pad([e[1] for e in made[step]], 0.0, torch.float32).to(device)
        logits = policy.logits(policy(ids[:, :-1]))
        loss = sft_loss(logits, ids[:, 1:], weights[:, 1:])
        taught = weights[:, 1:] == 1
        right = (logits.argmax(-1) == ids[:, 1:])[taught].float().mean()
        return loss, {"loss": loss.detach(), "accuracy": right}

    return optimise(policy, loss_of, steps, lr, state, name)
