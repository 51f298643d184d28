"""Rollouts on disk, in shards that any number of processes may play.

A shard fixes its episodes and how they are batched: it is the same whoever plays it, before or after a kill, on one rank or two.
"""

import json
import os
import signal
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from common import UserError, end_with, peak_memory, read_model, set_up_torch, write_file
from rollout import Trajectory, rollout


def play_shards(shards, folder, device, workers, **options):
    """Play each shard [(file, episodes)] that is not on disk yet with the policy in `folder`, in `workers` processes of one thread each.

    Yields, many times, how many episodes have ended and been won so far, and the bytes of memory that the processes have held at most.
    A shard is the same whoever plays it, and whenever: one thread, its own batch, randomness by name. UserError if a process dies.
    """
    missing = [shard for shard in shards if not shard[0].exists()]
    ended = [sum(len(episodes) for file, episodes in shards if file.exists()), 0, 0]
    ended[1] = sum(t.won for file, _ in shards if file.exists() for t in load_trajectories(file))
    yield ended
    workers = min(workers, len(missing))
    if workers > 1:
        context = get_context("spawn")
        counters = [context.Array("q", 3, lock=False) for _ in range(workers)]
        processes = [context.Process(target=play_in_process, args=(os.getpid(), missing[w::workers], folder, device, counters[w], options),
                                     daemon=True) for w in range(workers)]
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
                wait([process.sentinel for process in processes if process.is_alive()], 0.2)
                yield [start + sum(counts) for start, *counts in zip(ended, *counters)]
            if any(process.exitcode for process in processes):
                raise UserError("a process that played rollouts has died (it has said why, if it could); "
                                "the same command continues from the last whole shard")
            yield [start + sum(counts) for start, *counts in zip(ended, *counters)]
        finally:
            for process in processes:
                if process.pid:  # it was started
                    process.kill()
    elif missing:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for won in play(missing, folder, device, options):
                ended = [ended[0] + 1, ended[1] + won, 0]
                yield ended
        finally:
            torch.set_num_threads(threads)


def play(shards, folder, device, options):
    """Play and write the shards, one after the other. -> whether won, for each episode as it ends"""
    policy, tokenizer = read_model(folder, device)
    for file, episodes in shards:
        trajectories = []
        for trajectory in rollout(policy, tokenizer, episodes, **options):
            trajectories.append(trajectory)
            yield trajectory.won
        save_trajectories(file, sorted(trajectories, key=lambda t: (t.game, t.episode)))


def play_in_process(parent, shards, folder, device, counter, options):
    """`play` in a process of its own, which ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    end_with(parent)
    set_up_torch(1)
    try:
        for won in play(shards, folder, device, options):
            counter[0] += 1
            counter[1] += won
            counter[2] = peak_memory()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None  # one line, and the parent's


PER_ACTION = ("spans", "logp", "forced", "inadmissible")
PER_EPISODE = ("reward", "won", "truncated", "seed", "episode")


def save_trajectories(path, trajectories):
    """One shard: flat arrays with the lengths to cut them by, written whole."""
    arrays = {k: np.concatenate([getattr(t, k) for t in trajectories]) for k in ("ids", *PER_ACTION)}
    arrays.update({k: np.array([getattr(t, k) for t in trajectories]) for k in PER_EPISODE})
    arrays["tokens"] = np.array([len(t.ids) for t in trajectories])
    arrays["actions"] = np.array([len(t) for t in trajectories])
    write_file(path, lambda p: save_file(arrays, str(p), metadata={"games": json.dumps([t.game for t in trajectories])}))


def load_trajectories(path):
    """A shard -> list of Trajectory."""
    with safe_open(str(path), "np") as f:
        a = {k: f.get_tensor(k) for k in f.keys()}
        games = json.loads(f.metadata()["games"])
    token_ends, action_ends = a["tokens"].cumsum(), a["actions"].cumsum()
    out = []
    for i, game in enumerate(games):
        tokens = slice(token_ends[i] - a["tokens"][i], token_ends[i])
        actions = slice(action_ends[i] - a["actions"][i], action_ends[i])
        out.append(Trajectory(game, a["ids"][tokens], *(a[k][actions] for k in PER_ACTION), *(a[k][i].item() for k in PER_EPISODE)))
    return out


def rollouts_in(folder, name="rollouts"):
    """All rollouts of an iteration's folder."""
    return [t for file in sorted(Path(folder, name).glob("*.safetensors")) for t in load_trajectories(file)]


def sampled_tokens(trajectories):
    """What a policy had to write for them."""
    return int(sum(np.diff(t.spans).sum() for t in trajectories))
