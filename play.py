"""One episode at a time, to be looked at: what a policy did and might have done instead, or a person who plays.

    python eval.py --policy DIR --prm DIR --watch
    python eval.py --agent human
"""

import numpy as np
import torch

from common import generator, key
from env import AlfworldEnv
from figures import KINDS
from tokenizer import split_intro
from tree import Tree, distinct, propose

PROPOSALS = 8  # actions sampled from the policy at each state, beside the one that was taken
PROPOSED_AT = 1.0  # the temperature of these in `eval.py --watch`, that of DPO's proposals


def told(game, trajectory, policy, tokenizer, temperature, seed, prm=None, q=None):
    """An episode in words; q (T,): Q of its actions by the PRM, their promise. Progress is Q less Q of the action before; the first has none.

    `others`: what else the policy proposes at a state, of PROPOSALS samples at this temperature: its Q, and how often it was
    drawn. `times`: how often the action taken was. Without a PRM all Q are None.
    """
    env, ids = AlfworldEnv(len(trajectory)), trajectory.ids.astype(np.int64)
    task, observation = split_intro(env.reset(game)[0])
    text = tokenizer.command
    states = [(0, int(start)) for start in trajectory.spans[:, 0]]
    drawn = propose(policy, [ids], states, PROPOSALS, temperature, (seed, key(game.id), np.arange(len(states))))
    branches = [(*state, *action) for state, actions in zip(states, drawn) for action in distinct(actions, tokenizer)]
    q_of = {(start, text(action)): None for _, start, action, _ in branches}
    if prm:
        with torch.no_grad():
            q_of = dict(zip(q_of, (round(x, 4) for x in Tree([ids], branches, policy.cos.device).scores(prm).sigmoid().tolist())))
    steps = []
    for t, (start, end) in enumerate(trajectory.spans.tolist()):
        action, proposals = text(ids[start:end]), [text(proposal) for proposal, _ in drawn[t]]
        others = [{"action": other, "q": q_of[start, other], "times": proposals.count(other)}
                  for other in dict.fromkeys(proposals) if other != action]
        steps.append({"action": action, "q": round(float(q[t]), 4) if prm else None,
                      "progress": round(float(q[t] - q[t - 1]), 4) if prm and t else None,
                      "times": proposals.count(action), "answer": env.step(action)[0], "inadmissible": bool(trajectory.inadmissible[t]),
                      "others": sorted(others, key=lambda other: -(other["q"] if prm else other["times"]))})
    return {"game": game.id, "type": KINDS[game.task_type], "won": bool(trajectory.won), "task": task, "observation": observation, "steps": steps}


def narrated(episode):
    """What `told` tells -> lines of text."""
    def line(mark, step):
        return f"  {mark} {step['action'] or '(nothing)':44} {step['times']} of {PROPOSALS}" + ("" if step["q"] is None else f"   Q {step['q']:.3f}")

    yield from (episode["game"], f"k of {PROPOSALS}: how often the policy proposed an action, at temperature {PROPOSED_AT:g}; "
                "Q: what the PRM expects of it, and its change; ✗: not accepted", episode["observation"], f"Your task is to: {episode['task']}")
    for n, step in enumerate(episode["steps"], 1):
        yield ""
        yield line(f"{n:2} >", step) + ("" if step["progress"] is None else f"  {step['progress']:+.3f}") + "  ✗" * step["inadmissible"]
        yield from (line("    ", other) for other in step["others"])
        yield step["answer"]
    yield f"\n{'won' if episode['won'] else 'not won'} after {len(episode['steps'])} actions"


def play_by_hand(games, *, max_steps, seed, make_env=AlfworldEnv):
    """A person plays the games in shuffled order, until `quit`, Ctrl-C or the end of input.
    -> [{"game", "won", "actions"}] of those played to the end"""
    env, episodes = make_env(max_steps), []
    print("? lists what the world would accept, quit ends")
    for g in generator(seed, "by hand").permutation(len(games)):
        observation, info = env.reset(games[g])
        actions, won, cut = 0, False, False
        print(f"\n{observation}")
        while not (won or cut):
            try:
                action = input(f"{actions + 1:2} > ").strip()
            except (EOFError, KeyboardInterrupt, RuntimeError):  # the last: there is no keyboard at all
                print()
                return episodes
            if action.lower() in ("quit", "exit"):
                return episodes
            if action in ("?", ""):
                print(*info["admissible_commands"], sep="\n")
                continue
            observation, _, won, cut, info = env.step(action)
            actions += 1
            print(observation)
        print(f"{'won' if won else 'not won'} after {actions} actions")
        episodes.append({"game": games[g].id, "won": bool(won), "actions": actions})
    return episodes
