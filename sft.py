"""π_0: supervised fine-tuning on demonstrations, by masked cross-entropy.

    trajectories = demonstrations(games, prior, Demos(4000), tokenizer)
    log = train_sft(policy, tokenizer, trajectories, by_id, Sft(), seed, state)

Each demonstration is seen once. The loss is over the tokens of the expert's actions, <end>
included, and, at a smaller weight, over the world's answers, which look-ahead has to predict.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from candidates import score_states, tree_builder
from fast_alfworld import HELP, AlfworldEnv, Expert, demonstrate
from model import Config
from optim import optimise
from rollout import MAX_ACTION, Trajectory, replay
from tokenizer import END, Tokenizer, split_intro
from utils import generator, mine, pad


@dataclass
class Demos:
    """What is demonstrated: `demos` games, each once before any twice.

    mistakes: chance that a random action takes the place of the expert's and is masked from the
    loss (DART). noise: chance that a random action is learned as if it were the expert's.
    """
    demos: int
    seed: int = 0
    max_steps: int = 30
    mistakes: float = 0.0
    noise: float = 0.0


def train_tokenizer(games, prior, seed, joined=False, sample=1000):
    """A vocabulary from the texts of `sample` demonstrations and all names of all games."""
    counts, texts, env = {}, [HELP] * 5, AlfworldEnv(30)
    for game in games:
        for name, n in game.counts.items():
            counts[name] = max(n, counts.get(name, 0))
    for i in generator(seed, "tokenizer").permutation(len(games))[:sample]:
        rng = generator(seed, "tokenizer", int(i))
        demo = demonstrate(env, games[i], Expert(prior), rng, mistakes=0.2)
        texts += [*split_intro(demo.observation),
                  *(text for step in demo.steps for text in (step.action, step.observation))]
    return Tokenizer.train(texts, counts, joined)


def demonstrations(games, prior, demos, tokenizer):
    """-> list of (Trajectory, trained (T,) bool: False where the loss masks the action)."""
    env, out = AlfworldEnv(demos.max_steps), []
    for number in range(demos.demos):
        lap, place = divmod(number, len(games))
        if place == 0:
            order = generator(demos.seed, "demonstrations", lap).permutation(len(games))
        game, rng = games[order[place]], generator(demos.seed, "demonstration", number)
        demo = demonstrate(env, game, Expert(prior), rng, mistakes=demos.mistakes,
                           noise=demos.noise, max_steps=demos.max_steps)
        out.append(as_trajectory(game, demo, tokenizer, demos.seed, number))
    return out


def as_trajectory(game, demo, tokenizer, seed, number, context=Config.max_len):
    """A Demonstration as a rollout would be stored -> (Trajectory, trained (T,) bool).

    Like a rollout it is cut where it would outgrow the model's context.
    """
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
    candidates = replay(trajectory, game, tokenizer)
    trajectory.choice[:] = [c.index(step.action) if step.action in c else -1
                            for c, step in zip(candidates, demo.steps)]
    trajectory.n_candidates[:] = [len(c) for c in candidates]
    return trajectory, np.array([step.trained for step in demo.steps[:T]])


def token_weights(trajectory, trained, obs_weight):
    """Weight of each token in the loss, (L,): 1 in trained actions, obs_weight in answers."""
    weights = np.full(len(trajectory.ids), obs_weight, np.float32)
    weights[:trajectory.spans[0, 0]] = 0  # the prompt
    for (start, end), learn in zip(trajectory.spans, trained):
        weights[start:end] = learn
    return weights


def sft_loss(logits, targets, weights, total):
    """Weighted cross-entropy of next tokens: logits (N, V), targets and weights (N,). -> scalar

    total: the weight to divide by, that of the whole batch.
    """
    return (weights * F.cross_entropy(logits, targets, reduction="none")).sum() / total


@dataclass
class Sft:
    """Settings of the training. loss: "tokens" over the vocabulary, "candidates" over A(s)."""
    lr: float = 3e-3
    batch: int = 4
    epochs: int = 1
    obs_weight: float = 0.1
    weight_decay: float = 0.1
    loss: str = "tokens"


def train_sft(policy, tokenizer, demos, games, settings, seed, state):
    """Fine-tune the policy on demonstrations [(Trajectory, trained)]. -> log

    games: {id: Game}, needed for the loss over candidates only.
    """
    n, batch, device = len(demos), settings.batch, policy.device
    per_epoch, tree_of = -(-n // batch), tree_builder(tokenizer)

    def loss_of(step):
        epoch, part = divmod(step, per_epoch)
        order = generator(seed, "sft", epoch).permutation(n)[part * batch:(part + 1) * batch]
        weights = [token_weights(*demos[i], settings.obs_weight) for i in order]
        total = float(sum(w.sum() for w in weights))
        rows = mine([(demos[i], w) for i, w in zip(order, weights)])
        if not rows:
            return None, {}
        if settings.loss == "candidates":
            total = sum(int(demos[i][1].sum()) for i in order)  # trained actions
            return candidate_loss(policy, rows, games, tokenizer, tree_of, total)
        ids = pad([t.ids for (t, _), _ in rows]).to(device)  # (B, S)
        weights = pad([w for _, w in rows], 0.0, torch.float32).to(device)[:, 1:]
        lengths = torch.tensor([len(t.ids) - 1 for (t, _), _ in rows])
        used = weights > 0
        h = policy.ragged(ids[:, :-1], lengths)[used]  # (N, D)
        loss = sft_loss(policy.logits(h), ids[:, 1:][used], weights[used], total)
        return loss, {"loss": (loss.detach() * total, float(weights[used].sum()))}

    return optimise(policy, loss_of, settings.epochs * per_epoch, lr=settings.lr, state=state,
                    name="SFT", weight_decay=settings.weight_decay)


def candidate_loss(policy, rows, games, tokenizer, tree_of, total):
    """−log π(a|s) of the demonstrated actions over the candidates, at temperature 1.

    total: the number of such actions in the whole batch, of which `rows` may be a part.
    """
    states, picked = [], []
    for b, ((t, trained), _) in enumerate(rows):
        candidates = replay(t, games[t.game], tokenizer)
        for k in np.nonzero(trained)[0]:
            states.append((b, int(t.spans[k, 0]), tree_of(candidates[k])))
            picked.append(int(t.choice[k]))
    if not states:
        return None, {}
    log_pi = score_states(policy, [t.ids for (t, _), _ in rows], states)
    loss = -log_pi[torch.arange(len(picked)), torch.tensor(picked)].sum() / total
    return loss, {"loss": (loss.detach() * total, len(picked))}
