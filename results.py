"""Results as numbers and as text: success with its interval, a table, an episode step by step."""

import shutil

import numpy as np
import torch

from candidates import score_states
from fast_alfworld import TASK_TYPES, AlfworldEnv
from rollout import states_of
from tokenizer import split_intro
from utils import rank, read_json, write_json

SHOWN = 6  # candidates of a state that `narrate` prints


def summarise(episodes, games):
    """Success, its 95 % interval and mean actions (over all episodes), in all and by task type.

    episodes: list of {"game", "won", "actions"}; "by_task" holds the same for each task type.
    """
    def share(part):
        return {"games": len({e["game"] for e in part}), "success": mean(e["won"] for e in part),
                "interval": bootstrap(by_game(part).values()),
                "mean_actions": mean(e["actions"] for e in part)}

    type_of = {game.id: game.task_type for game in games}
    by_task = {t: [e for e in episodes if type_of[e["game"]] == t] for t in TASK_TYPES}
    return {**share(episodes), "by_task": {t: share(part) for t, part in by_task.items() if part}}


def result_of(trajectories, games):
    """`summarise`, the share of inadmissible actions, and the episodes in order."""
    done = sorted(trajectories, key=lambda t: (t.game, t.episode))
    episodes = [{"game": t.game, "won": bool(t.won), "actions": len(t)} for t in done]
    return {**summarise(episodes, games), "episodes": episodes,
            "inadmissible": mean(number < 0 for t in done for number in t.choice)}


def mean(values):
    return float(np.mean(list(values)))


def by_game(episodes):
    """-> {game: share of its episodes that were won}, in order of game"""
    won = {}
    for e in sorted(episodes, key=lambda e: e["game"]):
        won.setdefault(e["game"], []).append(e["won"])
    return {game: mean(w) for game, w in won.items()}


def bootstrap(values, n=10_000, seed=0):
    """95 % interval of the mean of one value a game, resampling games. -> [low, high]"""
    values = np.array(list(values))
    resampled = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    return np.quantile(values[resampled].mean(1), (0.025, 0.975)).tolist()


def paired_bootstrap(before, after):
    """Two lists of episodes on the same games -> (mean gain in success, low, high), 95 %."""
    a, b = by_game(before), by_game(after)
    if a.keys() != b.keys():
        raise ValueError("a paired bootstrap needs the same games on both sides")
    gain = [b[game] - a[game] for game in a]
    return mean(gain), *bootstrap(gain)


def points(gain):
    """(gain, low, high) -> text, in points"""
    return f"{100 * gain[0]:+.1f} ({100 * gain[1]:+.1f} … {100 * gain[2]:+.1f})"


def table(result):
    """A result of `evaluate_*` -> lines of text."""
    lines = [f"{'task type':34}{'games':>7}{'success':>9}{'95 % interval':>18}{'actions':>9}"]
    for name, r in (*result["by_task"].items(), ("all", result)):
        low, high = r["interval"]
        lines.append(f"{name:34}{r['games']:7}{r['success']:9.1%}{low:9.1%} …{high:7.1%}"
                     f"{r['mean_actions']:9.2f}")
    return lines


def report(result, against, used):
    """A result, and what it is compared with -> lines of text."""
    r = result
    yield (f"agent {r['agent']}{used}, {r['data']}, {r['actions']}, cap {r['max_steps']}, "
           f"temperature {r['temperature']}, engine {r['engine']}, "
           f"{r['episodes_per_game']} episode(s) a game")
    yield from table(r)
    if r.get("inadmissible"):
        yield f"inadmissible actions: {r['inadmissible']:.1%}"
    if "world_actions" in r:
        yield f"actions taken in the world, an episode: {r['world_actions']:.1f}"
    if "oracle" in r:
        yield f"all rollouts: {r['plain']:.1%}; at least one of N won: {r['oracle']:.1%}"
    if "equal_episodes" in r:
        yield f"equal in both engines: {r['equal_episodes']} of {len(r['episodes'])} episodes"
    if "gain" in r:
        yield f"gain over {against}: {points(r['gain'])} points"


def final_table(c):
    """Print π_0 … π_N on every split; the best on dev goes to best/, all to result.json."""
    if rank():
        return
    evals = {(i, name[5:]): r for (i, name), r in c.run.records().items()
             if name.startswith("eval-")}
    best = max(range(c.args.iters + 1), key=lambda i: (evals[i, "dev"]["success"], -i))
    splits, rows = ["dev", *c.test], []
    head = "".join(f"{s} ({evals[0, s]['games']} games)".rjust(26) for s in splits)
    lines = [f"π_i   {head}   gain over π_0 in points, 95 % interval"]
    for i in range(c.args.iters + 1):
        row, line, gains = {"iteration": i, "best": i == best}, "", []
        for s in splits:
            r = evals[i, s]
            gain = paired_bootstrap(evals[0, s]["episodes"], r["episodes"])
            row[s] = {k: v for k, v in (r | {"gain": gain}).items()
                      if k not in ("episodes", "commit")}
            line += f"{r['success']:14.1%}{r['mean_actions']:6.1f} steps"
            gains.append(f"{s} {points(gain)}")
        rows.append(row)
        lines.append(f"π_{i}{' *' if i == best else '  '}  {line}   {', '.join(gains) * bool(i)}")
    for kind in ("policy", "prm"):
        source, target = c.run.path / f"iter{best}/{kind}", c.run.path / f"best/{kind}"
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, target)
    config = read_json(c.run.path / "config.json")
    write_json(c.run.path / "best/run.json", {**config, "metrics": rows[best]})
    write_json(c.run.path / "result.json", {"best": best, "rows": rows, **config})
    print(f"cap {c.args.max_steps}, temperature {c.args.temperature}, actions {c.args.actions}, "
          f"fast engine; * best on dev, in {c.run.path}/best", *lines, sep="\n")


@torch.no_grad()
def explain(game, trajectory, policy, tokenizer, temperature, prm=None):
    """An episode as a dict. Each step: {"action", "answer", "admissible", "candidates": all of
    them as {"action", "pi": π(a|s), "q": Q(s,a) or None}, the most likely first}."""
    env, states = AlfworldEnv(len(trajectory)), states_of(trajectory, game, tokenizer)
    pi = score_states(policy, [trajectory.ids], states, temperature).exp().tolist()
    q = score_states(prm, [trajectory.ids], states).sigmoid().tolist() if prm else None
    task, observation = split_intro(env.reset(game)[0])
    steps = []
    for t, action in enumerate(tokenizer.actions(trajectory.ids)):
        options = [{"action": c, "pi": pi[t][i], "q": q and q[t][i]}
                   for i, c in enumerate(states[t][2].commands)]
        steps.append({"action": action, "answer": env.step(action)[0],
                      "admissible": bool(trajectory.choice[t] >= 0),
                      "candidates": sorted(options, key=lambda o: -o["pi"])})
    return {"game": game.id, "task_type": game.task_type, "won": bool(trajectory.won),
            "task": task, "observation": observation, "steps": steps}


def narrate(episode):
    """What `explain` returns -> lines of text."""
    yield from (episode["game"], episode["observation"], f"Your task is to: {episode['task']}")
    for n, step in enumerate(episode["steps"], 1):
        yield f"\n{n:2} > {step['action']}" + "  (not admissible)" * (not step["admissible"])
        for place, o in enumerate(step["candidates"]):
            taken = o["action"] == step["action"]
            if place < SHOWN or taken:
                q = "" if o["q"] is None else f"   Q {o['q']:.3f}"
                yield f"   {' >'[taken]} {o['action']:44} π {o['pi']:.3f}{q}"
        yield step["answer"]
    yield f"\n{'won' if episode['won'] else 'not won'} after {len(episode['steps'])} actions"
