"""Results of policies: of a run, of many episodes, and of one episode step by step."""

import shutil

import torch

from candidates import score_states
from fast_alfworld import AlfworldEnv
from fast_alfworld.files import read_json, write_json
from fast_alfworld.gamefile import split_intro
from fast_alfworld.score import mean, paired_bootstrap, points, summarise
from rollout import states_of
from utils import rank


def result_of(trajectories, games):
    """`summarise`, the share of inadmissible actions, and the episodes in order."""
    done = sorted(trajectories, key=lambda t: (t.game, t.episode))
    episodes = [{"game": t.game, "won": bool(t.won), "actions": len(t)} for t in done]
    return {**summarise(episodes, games), "episodes": episodes,
            "inadmissible": mean(number < 0 for t in done for number in t.choice)}


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
