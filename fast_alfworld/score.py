"""How well an agent plays: success with its interval, by task type, as numbers and as a table.

An episode is {"game": its id, "won": bool, "actions": how many}, of any agent.
"""

import numpy as np

from .cli import UserError
from .expert import demonstrate
from .files import read_json
from .gamefile import TASK_TYPES


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


def play_scripted(env, todo, player, rng_of, mistakes=0.0, max_steps=30):
    """Yield the episodes of an Expert or Human; the share `mistakes` of the actions is random.

    todo: tuples (game, number, …); rng_of(game id, number) -> numpy Generator.
    """
    for game, number, *_ in todo:
        try:
            demo = demonstrate(env, game, player, rng_of(game.id, number), mistakes,
                               max_steps=max_steps)
        except EOFError:  # a person has had enough
            return
        yield {"game": game.id, "won": demo.won, "actions": len(demo.steps)}


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


def earlier(file, games):
    """The episodes of an earlier result; UserError where that is no result on these games."""
    try:
        episodes = [{"game": e["game"], "won": float(e["won"])}
                    for e in read_json(file)["episodes"]]
        if {e["game"] for e in episodes} == {game.id for game in games}:
            return episodes
    except (TypeError, LookupError, ValueError, UserError):
        pass
    raise UserError(f"--against {file}: not a result of eval.py --json on the same games")


def narrate(episode):
    """An episode, as from `results.explain` -> lines of text, with the six likeliest candidates."""
    yield from (episode["game"], episode["observation"], f"Your task is to: {episode['task']}")
    for n, step in enumerate(episode["steps"], 1):
        yield f"\n{n:2} > {step['action']}" + "  (not admissible)" * (not step["admissible"])
        for place, o in enumerate(step["candidates"]):
            taken = o["action"] == step["action"]
            if place < 6 or taken:
                q = "" if o["q"] is None else f"   Q {o['q']:.3f}"
                yield f"   {' >'[taken]} {o['action']:44} π {o['pi']:.3f}{q}"
        yield step["answer"]
    yield f"\n{'won' if episode['won'] else 'not won'} after {len(episode['steps'])} actions"
