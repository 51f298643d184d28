"""Stage 1: play many episodes at once with a policy, by batched sampling on a KV cache.

    trajectories = list(rollout(policy, tokenizer, [Episode(game, 0), Episode(game, 1)], seed=0))

One forward pass an environment step: each row brings the world's last answer and the prefix tree of
its next candidates (candidates.py). An episode that ends is replaced at once (continuous batching);
episodes of one game share its encoded prompt. Random numbers are keyed by (seed, game, episode,
step), so an episode does not depend on its neighbours in the batch."""

import json
import os
import signal
from collections import Counter, deque
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from candidates import draw, extend, keep_branch, prefix_tree
from fast_alfworld import AlfworldEnv
from fast_alfworld.cli import UserError
from fast_alfworld.files import a_file, write_file
from fast_alfworld.gamefile import split_intro
from model import Cache
from tokenizer import END, SPECIAL
from utils import end_with, key, read_model, set_up_torch, uniform

SHARDS = "[0-9][0-9][0-9][0-9][0-9].safetensors"  # files of rollouts that a run has written
MAX_ACTION = 32  # tokens of a freely generated action; the longest command has fewer


@dataclass
class Trajectory:
    """One episode; the T actions are the policy's own, not those of a demonstration before them."""
    game: str
    ids: np.ndarray  # (L,) int32: the whole transcript, up to the <end> of the last action
    spans: np.ndarray  # (T, 2) int32: action t is ids[start:end], its <end> included
    choice: np.ndarray  # (T,) int32: its number among the candidates; -1: not admissible
    n_candidates: np.ndarray  # (T,) int32
    logp: np.ndarray  # (T,) float32: log π(a_t|s_t) at the sampling temperature
    reward: float  # 1 if won
    won: bool
    truncated: bool
    seed: int
    episode: int

    def __len__(self):
        return len(self.spans)


class Episode(NamedTuple):
    """An episode to play; `begun` is a transcript up to an <act> to start from, of which the last
    `played` actions count towards the step cap."""
    game: Any
    number: int
    begun: np.ndarray | None = None
    played: int = 0

    @property
    def prompt(self):
        return self.game.id, None if self.begun is None else self.begun.tobytes()


@dataclass
class Turn:
    """What an agent sees of the B states at which it has to act; `act` functions get it.

    log_pi (B, C), f (B, C) or None without a PRM, trees: the candidates, names (4, B): RNG keys.
    For look-ahead: the policy, its cache, and each state's cache row and number of tokens in it."""
    log_pi: torch.Tensor
    f: torch.Tensor | None
    trees: list
    names: np.ndarray
    histories: list
    policy: Any = None
    cache: Any = None
    rows: np.ndarray | None = None
    lengths: np.ndarray | None = None


def sample(turn):
    """a ~ π(·|s). -> (B,) numbers of candidates"""
    return draw(turn.log_pi, uniform(*turn.names))


@dataclass
class Row:
    """An episode in flight; the cache holds all of `ids` but what came since the last turn."""
    env: Any
    episode: Episode
    ids: list
    commands: tuple
    taken: list = field(default_factory=list)  # of (start, end, choice, candidates, log π)


@torch.no_grad()
def rollout(policy, tokenizer, episodes, *, temperature=0.3, max_steps=30, seed=0, slots=None,
            act=sample, prm=None, make_env=AlfworldEnv):
    """Yield a Trajectory for each Episode, in the order in which they end.

    temperature 0 is greedy. act(Turn) -> numbers of the chosen candidates; None generates the
    actions token by token, without candidates. slots: episodes in flight. An episode is cut after
    max_steps actions or when it would outgrow the model's context."""
    waiting, models, turn = deque(episodes), [policy, *([prm] if prm else [])], 0
    slots = min(slots or slots_for(policy), len(waiting))
    left = Counter(episode.prompt for episode in waiting)  # so that prompts can be forgotten
    caches = [Cache(model.config, slots, model.device) for model in models]
    rows, lengths, prompts = [None] * slots, np.zeros(slots, np.int64), {}
    while waiting or any(rows):
        started = [i for i, row in enumerate(rows) if row is None][:len(waiting)]
        for i in started:
            rows[i] = begin(make_env(max_steps), tokenizer, waiting.popleft(), policy)
        fill_prompts(models, caches, rows, lengths, started, prompts)
        left.subtract(rows[i].episode.prompt for i in started)
        prompts = {name: saved for name, saved in prompts.items() if left[name]}
        live = np.array([i for i, row in enumerate(rows) if row])
        turn += 1
        if 2 * len(live) <= len(rows) or turn % 32 == 0:  # neighbours get similar lengths
            live = live[np.argsort(lengths[live], kind="stable")]
            rows, lengths = [rows[i] for i in live], lengths[live]
            for cache in caches:
                cache.take(live)
            live = np.arange(len(rows))
        chains = [row.ids[n:] if row else [] for row, n in zip(rows, lengths)]
        names = np.array([(seed, key(rows[i].episode.game.id), rows[i].episode.number,
                           len(rows[i].taken)) for i in live]).T
        own = [rows[i] for i in live]
        if act is None:
            h = policy.extend(caches[0], lengths, chains)
            ends = np.cumsum([len(c) for c in chains])[live] - 1
            lengths[live] = [len(row.ids) for row in own]
            actions, logp = generate(policy, caches[0], live, lengths, h[ends], temperature, names)
            commands = [tokenizer.decode(ids).strip() for ids in actions]
            chosen = [row.commands.index(command) if command in row.commands else -1
                      for row, command in zip(own, commands)]
        else:
            trees = [prefix_tree(row.commands, tokenizer) for row in own]
            log_pi = extend(policy, caches[0], lengths, chains, trees, temperature)
            f = extend(prm, caches[1], lengths, chains, trees) if prm else None
            lengths[live] = [len(row.ids) for row in own]
            picked = act(Turn(log_pi, f, trees, names, [row.ids for row in own], policy, caches[0],
                              live, lengths))
            logp, chosen = log_pi.gather(1, picked[:, None])[:, 0].tolist(), picked.tolist()
            paths = [tree.paths[c] for tree, c in zip(trees, chosen)]
            actions = [tree.ids[path].tolist() for tree, path in zip(trees, paths)]
            commands = [tree.commands[c] for tree, c in zip(trees, chosen)]
            for cache in caches:
                keep_branch(cache, live, lengths[live], paths)
        lengths[live] += [len(ids) for ids in actions]
        for i, *action in zip(live, commands, actions, chosen, logp):
            trajectory = step(rows[i], tokenizer, policy, seed, *action)
            if trajectory:
                rows[i], lengths[i] = None, 0
                yield trajectory


def begin(env, tokenizer, episode, policy):
    """Reset the world and play what the episode starts from. -> Row"""
    intro, info = env.reset(episode.game)
    if episode.begun is None:
        ids = tokenizer.prompt(*split_intro(intro))
    else:
        ids = episode.begun.tolist()
        for action in tokenizer.actions(ids):
            info = env.step(action)[-1]
        env.steps = episode.played
    if len(ids) + MAX_ACTION > policy.config.max_len:
        raise UserError(f"{episode.game.id}: its first observation has {len(ids)} tokens, too many "
                        f"for a context of {policy.config.max_len}")
    return Row(env, episode, list(ids), tuple(info["admissible_commands"]))


def step(row, tokenizer, policy, seed, command, ids, choice, logp):
    """Take one action to the world. -> the Trajectory if that ends the episode, else None"""
    row.taken.append((len(row.ids), len(row.ids) + len(ids) + 1, choice, len(row.commands), logp))
    row.ids += [*ids, END]
    observation, reward, won, truncated, info = row.env.step(command)
    answer = tokenizer.turn(observation)
    row.commands = tuple(info["admissible_commands"])
    room = policy.config.max_len - len(row.ids) - len(answer)
    truncated = truncated or not won and room < MAX_ACTION
    if won or truncated:
        *whole, logp = zip(*row.taken)
        start, end, choice, counts = np.array(whole, np.int32)
        return Trajectory(row.episode.game.id, np.array(row.ids, np.int32),
                          np.stack([start, end], 1), choice, counts, np.array(logp, np.float32),
                          reward, won, truncated, seed, row.episode.number)
    row.ids += answer


def fill_prompts(models, caches, rows, lengths, started, prompts):
    """Give each started row the keys and values of its prompt, all but the <act> at its end."""
    new = {rows[i].episode.prompt: rows[i].ids[:-1] for i in started
           if rows[i].episode.prompt not in prompts}
    if new:
        fresh = [Cache(model.config, len(new), model.device) for model in models]
        for model, cache in zip(models, fresh):
            model.extend(cache, np.zeros(len(new), np.int64), list(new.values()))
        for j, (name, ids) in enumerate(new.items()):
            prompts[name] = [cache.read(j, len(ids)) for cache in fresh]
    for i in started:
        for cache, saved in zip(caches, prompts[rows[i].episode.prompt]):
            cache.write(i, saved)
        lengths[i] = len(rows[i].ids) - 1


def slots_for(policy):
    """Episodes in flight: 128 on a CPU, 1024 on a GPU, fewer where a cache would exceed 2 GiB; not
    by what happens to be free, for a shard must be the same whoever plays it."""
    c, size = policy.config, 4 if policy.device.type == "cpu" else 2
    row = 2 * c.n_layers * c.n_kv_heads * c.max_len * c.head_dim * size  # bytes
    return max(1, min(128 if policy.device.type == "cpu" else 1024, 2 ** 31 // row))


def replay(trajectory, game, tokenizer):
    """The candidates of every state of a trajectory: list of T tuples of commands."""
    env, out = AlfworldEnv(), []
    _, info = env.reset(game)
    for action in tokenizer.actions(trajectory.ids):
        out.append(tuple(info["admissible_commands"]))
        info = env.step(action)[-1]
    return out[-len(trajectory):]


def states_of(trajectory, game, tokenizer, row=0):
    """Its T states for `score_states`: list of (row, start, PrefixTree of the candidates)."""
    return [(row, int(start), prefix_tree(commands, tokenizer)) for start, commands in
            zip(trajectory.spans[:, 0], replay(trajectory, game, tokenizer))]


def generate(policy, cache, rows, lengths, h, temperature, names, last=END, most=MAX_ACTION):
    """Sample token by token in cache rows (B,), ascending, that end with hidden states h (B, D).

    lengths (all rows,): tokens in the cache, left as they are. names (k, B): RNG keys. last: <end>
    for an action, <act> for an answer of the world; it is the only choice for token number `most`.
    -> ids without `last`, which the cache gets, and log-probabilities (B,) with it"""
    out, logp, going = [[] for _ in rows], np.zeros(len(rows)), np.arange(len(rows))
    lengths, special = lengths.copy(), [i for i in range(len(SPECIAL)) if i != last]
    for k in range(most - 1):
        logits = policy.logits(h).float()
        logits[:, special] = -torch.inf
        log_p = torch.log_softmax(logits / (temperature or 1.0), -1)
        tokens = draw(log_p, uniform(*names[:, going], k)) if temperature else log_p.argmax(-1)
        logp[going] += log_p.gather(1, tokens[:, None])[:, 0].double().cpu().numpy()
        tokens = tokens.cpu().numpy()
        going, tokens = going[tokens != last], tokens[tokens != last]
        if not len(going):
            break
        new = [[] for _ in lengths]
        for j, token in zip(going, tokens.tolist()):
            out[j].append(token)
            new[rows[j]].append(token)
        h = policy.extend(cache, lengths, new)
        lengths[rows[going]] += 1
    return out, logp


def play_shards(shards, folder, device, workers, **options):
    """Play each shard (file, episodes) that is not on disk yet with the policy in `folder`.

    A shard is the same whoever plays it, before or after a kill: one thread, its own batch, random
    numbers by key. Yields, many times, how many episodes have ended and how many were won."""
    missing = [shard for shard in shards if not shard[0].exists()]
    done = [t.won for file, _ in shards if file.exists() for t in load_trajectories(file)]
    workers, context = max(1, min(workers, len(missing))), get_context("spawn")
    counters = [context.Array("q", 2, lock=False) for _ in range(workers)]
    count = lambda: np.sum([(len(done), sum(done)), *counters], axis=0)
    processes = [context.Process(target=_play, daemon=True, args=(
        os.getpid(), missing[w::workers], folder, str(device), counters[w], options))
        for w in range(workers) if missing]
    yield count()
    try:
        asked = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers leave Ctrl-C to this one
        for process in processes:
            process.start()
        signal.signal(signal.SIGINT, asked)
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            wait([p.sentinel for p in processes if p.is_alive()], 0.2)
            yield count()
        if any(p.exitcode for p in processes):
            raise UserError("a process that played rollouts has died; the same command continues "
                            "from the last whole shard")
        yield count()
    finally:
        for process in (p for p in processes if p.pid):
            process.kill()


def _play(parent, shards, folder, device, counter, options):
    """Play and write shards one after the other, in a process that ends with its parent."""
    end_with(parent)
    set_up_torch(1)
    try:
        policy, tokenizer = read_model(folder, device)
        for file, episodes in shards:
            trajectories = []
            for trajectory in rollout(policy, tokenizer, episodes, **options):
                trajectories.append(trajectory)
                counter[0] += 1
                counter[1] += trajectory.won
            save_trajectories(file, sorted(trajectories, key=lambda t: (t.game, t.episode)))
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


PER_ACTION = ("spans", "choice", "n_candidates", "logp")
PER_EPISODE = ("reward", "won", "truncated", "seed", "episode")


def save_trajectories(path, trajectories):
    """One shard: flat arrays, and the lengths to cut them by."""
    arrays = {name: np.concatenate([getattr(t, name) for t in trajectories])
              for name in ("ids", *PER_ACTION)}
    arrays |= {name: np.array([getattr(t, name) for t in trajectories]) for name in PER_EPISODE}
    arrays["tokens"] = np.array([len(t.ids) for t in trajectories])
    arrays["actions"] = np.array([len(t) for t in trajectories])
    games = json.dumps([t.game for t in trajectories])
    write_file(path, lambda p: save_file(arrays, str(p), metadata={"games": games}))


def load_trajectories(path):
    """A shard -> list of Trajectory. UserError where the file is damaged."""
    try:
        with safe_open(a_file(path), "np") as f:
            a = {name: f.get_tensor(name) for name in f.keys()}
            games = json.loads(f.metadata()["games"])
        cut = lambda name, by: np.split(a[name], a[by].cumsum()[:-1])
        columns = [cut("ids", "tokens"), *(cut(name, "actions") for name in PER_ACTION),
                   *(a[name].tolist() for name in PER_EPISODE)]
        return [Trajectory(*values) for values in zip(games, *columns, strict=True)]
    except Exception as error:
        raise UserError(f"{path}: damaged ({error!r}); delete it, and the same command plays it "
                        "again") from error
