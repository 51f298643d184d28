"""Walks that lead nowhere, told in an episode and not taught.

Where a policy loses it goes, mostly, where it has been (LOG.md). Few episodes show how one leaves such a walk, for those worth imitating
hold none: demonstrations (tellings.py) and won rollouts (dpo.py) are therefore told with one, a new one each time. What is taught is as right
behind it as it was, so this asks for no further demonstration or rollout; only the world is asked what it answers on the way.
"""

import numpy as np

from env import AlfworldEnv
from expert import base, names, parse_task
from rollout import MAX_ACTION
from tokenizer import split_intro

PLACES, WALK = 8, 10  # of a detour, at most: places that it is among, actions


def detour(game, actions, answers, ways, rng):
    """A walk before one of the `ways`, numbers of actions "go to …" of an episode: its actions, the world's answers.
    -> (that number, [(action, answer), …]) or None

    The walk is among places of kinds that the episode does not go to from there on, and those of the others that it was at last, so that the
    demonstrator goes on as it would have (`Expert._search`). One that comes upon the wanted thing, or a lamp that is looked for, is not told, for
    then taking it would be right, nor one that ends where the thing could be put as well, nor one after which the world answers otherwise.
    """
    if not ways:
        return None
    k = ways[rng.integers(len(ways))]
    task, view = split_intro(game.intro)
    been, kind = set(actions[:k]), lambda way: base(way.removeprefix("go to "))
    later = {kind(way) for way in actions[k:] if way.startswith("go to ")}
    last_of = {kind(way): way for way in actions[:k] if way.startswith("go to ")}
    pool = [way for way in (f"go to {place}" for place in names(view))
            if way != actions[k] and (kind(way) not in later or last_of.get(kind(way)) == way)]
    if not pool:
        return None
    among = rng.permutation(pool)[:rng.integers(1, PLACES + 1)]
    walk = [str(among[rng.integers(len(among))]) for _ in range(rng.integers(1, WALK + 1))]
    task = parse_task(task)
    if kind(walk[-1]) == kind(actions[k]) == task.place:
        return None
    seen = replay(game, [*actions[:k], *walk, *actions[k:]])
    before, on_it, after = np.split(np.array(seen, object), [k, k + len(walk)])
    sought = {task.object, task.place} if task.kind == "look" else {task.object}  # a lamp is searched for as well
    found = any(f" {thing} " in answer and way not in been for way, answer in zip(walk, on_it) for thing in sought)
    return None if found or [*before, *after] != list(answers) else (k, list(zip(walk, on_it)))


def replay(game, actions):
    """The world's answers to these actions from the start of the game."""
    env = AlfworldEnv(len(actions))
    env.reset(game)
    return [env.step(action)[0] for action in actions]


def with_detour(trajectory, weights, game, tokenizer, rng, longest):
    """A rollout told with a detour before one of the ways that `weights` (L,) teach, if there is one.
    -> (ids (L′,), starts of its own actions (T,), weights (L′,))

    The detour weighs nothing. Where no action would have room behind it any more, in `longest` tokens, it is told without.
    """
    ids, starts = trajectory.ids, trajectory.spans[:, 0]
    actions = tokenizer.actions(ids)
    before = len(actions) - len(starts)  # of a demonstration, where it began in one
    ways = [before + k for k, start in enumerate(starts) if weights[start] > 0 and actions[before + k].startswith("go to ")]
    taken = detour(game, actions, replay(game, actions), ways, rng)
    if taken is None:
        return ids, starts, weights
    k, walk = taken[0] - before, taken[1]
    between = [token for action, answer in walk for token in (*tokenizer.action(action), *tokenizer.turn(answer))]
    if starts[-1] + len(between) + MAX_ACTION > longest:  # another proposal there may be as long as an action can be
        return ids, starts, weights
    at = starts[k]  # where action k begins, behind its <act>
    return (np.insert(ids, at, between), starts + len(between) * (np.arange(len(starts)) >= k),
            np.insert(weights, at, np.zeros(len(between), weights.dtype)))
