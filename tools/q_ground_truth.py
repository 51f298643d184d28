"""Does a PRM rank actions? The true Q of candidates, by brute force, against what it says.

    python tools/q_ground_truth.py --run runs/default                # π_0, and Q_1
    python tools/q_ground_truth.py --run runs/default --prm DIR,DIR  # other PRMs of its rollouts

At a random state of each of --states episodes of π_{i−1} on dev, some candidates are taken: the
most likely ones, and others at random. After each, --rollouts episodes of π_{i−1} are played: their
mean discounted return is the true Q(s, a). An advantage is Q less its mean over the candidates,
weighted by π. Judges are compared: log π, each PRM, and one step ahead, γ E_π[Q(s', ·)]. Columns:

    Q, A       correlation with the true Q, and of advantages
    spread     standard deviation of advantages; of the true ones, less the noise of the rollouts
    gain       of acting by π·exp(Q/β) over π: the true advantage, a state (not for log π)
    ≥ 0.05 …   pairs of a state whose true Q differ by so much, and by more than two standard
               errors: the share that the judge ranks right

The rollouts stay in --out and are not played again.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from candidates import expected, prefix_tree, score_states
from fast_alfworld import AlfworldEnv, fingerprint
from fast_alfworld.cli import Parser, a_seed, at_least_one, between, command_line
from qestimate import pearson
from rollout import Episode, load_trajectories, play_shards, rollout, states_of
from run import Run
from search import read_prm
from tokenizer import END
from tools.experiment import adder, read_run, run_flags, write_table
from utils import generator, key, set_up_torch

GAPS, SHARD, TRUTH = (0.05, 0.1, 0.15), 512, "true Q"

# --- the truth -----------------------------------------------------------------------------------


@torch.no_grad()
def find_states(c, policy, args, temperature):
    """States of π's own episodes on dev. -> [{"game", "ids", "commands": those taken, "pi"}]"""
    episodes = [Episode(c.dev[n % len(c.dev)], n) for n in range(args.states)]
    played = tqdm(rollout(policy, c.tokenizer, episodes, temperature=temperature,
                          max_steps=c.args.max_steps, seed=key(f"states {args.seed}")),
                  "states", len(episodes), unit="episode", dynamic_ncols=True)
    out, games = [], {game.id: game for game in c.dev}
    for t in sorted(played, key=lambda t: t.episode):
        rng = generator(args.seed, "state", t.episode)
        state = states_of(t, games[t.game], c.tokenizer)[int(rng.integers(len(t)))]
        _, start, tree = state
        pi = score_states(policy, [t.ids], [state], temperature)[0].exp()
        order = pi.argsort(descending=True, stable=True).tolist()
        rest = rng.permutation(order[args.likely:])[:args.others].tolist()
        taken = order[:args.likely] + rest
        out.append({"game": t.game, "ids": t.ids[:start].tolist(), "pi": pi[taken].tolist(),
                    "commands": [tree.commands[a] for a in taken]})
    return out


def after(c, game, ids, command):
    """Take an action at the state `ids`. -> (its return if that ends the episode, else None;
    the transcript up to the next <act>, the next candidates, actions so far)"""
    env = AlfworldEnv(c.args.max_steps)
    _, info = env.reset(game)
    before = c.tokenizer.actions(ids)
    for action in before:
        env.step(action)
    observation, reward, won, truncated, info = env.step(command)
    ids = [*ids, *c.tokenizer.encode(command), END, *c.tokenizer.turn(observation)]
    return (reward if won or truncated else None, np.array(ids, np.int32),
            tuple(info["admissible_commands"]), len(before) + 1)


def play_truth(c, states, args, folder, out):
    """Adds "q" and "error" to each state: mean return of each action, and its standard error."""
    games, N, episodes, returns = {game.id: game for game in c.dev}, args.rollouts, [], {}
    for s, state in enumerate(states):
        for a, command in enumerate(state["commands"]):
            ended, begun, _, n = after(c, games[state["game"]], state["ids"], command)
            returns[s, a] = [] if ended is None else [ended]
            number = (s * (args.likely + args.others) + a) * N
            episodes += [Episode(games[state["game"]], number + j, begun, n)
                         for j in range(N) if ended is None]
    shards = [(out / f"rollouts/{n:05d}.safetensors", episodes[first:first + SHARD])
              for n, first in enumerate(range(0, len(episodes), SHARD))]
    with tqdm(total=len(episodes), desc="rollouts", unit="episode", dynamic_ncols=True) as bar:
        for ended, _ in play_shards(shards, folder, c.device, torch.get_num_threads(),
                                    temperature=c.args.temperature, max_steps=c.args.max_steps,
                                    seed=key(f"truth {args.seed}")):
            bar.update(int(ended) - bar.n)
    for file, _ in shards:
        for t in load_trajectories(file):
            where = divmod(t.episode // N, args.likely + args.others)
            returns[where].append(t.reward * c.args.gamma ** len(t))
    for s, state in enumerate(states):
        G = [np.array(returns[s, a]) for a in range(len(state["commands"]))]
        free = sum(len(g) - 1 for g in G)
        variance = sum(((g - g.mean()) ** 2).sum() for g in G) / max(1, free)
        state["q"] = [float(g.mean()) for g in G]
        state["error"] = [float((variance / len(g)) ** 0.5) if len(g) > 1 else 0.0 for g in G]
    return states


# --- judges --------------------------------------------------------------------------------------

def read_judge(c, folder):
    """A PRM -> (model, whether its values of different states compare)"""
    prm = read_prm(folder, c.tokenizer, c.device, within_state=True)
    return prm, prm.bounded


@torch.no_grad()
def judge_states(c, policy, prms, states, batch=16):
    """What judges say of the candidates of each state -> {judge: [(A,) for each state]}

    prms: {name: as from `read_judge`}
    """
    games = {game.id: game for game in c.dev}
    said = {"log π": [], **{name: [] for name in prms}}
    said |= {f"one step ahead by {name}": [] for name, (_, bounded) in prms.items() if bounded}
    for low in tqdm(range(0, len(states), batch), "judge", unit="batch", dynamic_ncols=True):
        part = states[low:low + batch]
        ids = [np.array(state["ids"]) for state in part]
        here = [(b, len(x), prefix_tree(tuple(s["commands"]), c.tokenizer))
                for b, (x, s) in enumerate(zip(ids, part))]
        counts = [len(state["commands"]) for state in part]
        next_ = [after(c, games[s["game"]], s["ids"], a) for s in part for a in s["commands"]]
        going = [(x, prefix_tree(commands, c.tokenizer))
                 for ended, x, commands, _ in next_ if ended is None]
        sequences, there = [x for x, _ in going], [(b, len(x), t) for b, (x, t) in enumerate(going)]
        said["log π"] += [np.log(np.maximum(state["pi"], 1e-30)) for state in part]
        for name, (prm, bounded) in prms.items():
            f = score_states(prm, ids, here)
            q = (f.sigmoid() if bounded else f).double().cpu().numpy()
            said[name] += [row[:n] for row, n in zip(q, counts)]
            if bounded:
                ahead = iter(expected(score_states(policy, sequences, there, c.args.temperature),
                                      score_states(prm, sequences, there).sigmoid()).tolist()
                             if going else [])
                q = [c.args.gamma * next(ahead) if ended is None else ended for ended, *_ in next_]
                said[f"one step ahead by {name}"] += np.split(np.array(q), np.cumsum(counts)[:-1])
    return said


def advantages(q, pi):
    """Q (A,) less its mean under π."""
    return q - (pi * q).sum() / pi.sum()


def compare(said, states, beta):
    """What a judge says, a list of (A,), against the truth -> dict of the columns above."""
    pis = [np.array(s["pi"]) for s in states]
    true, errors = ([np.array(s[k]) for s in states] for k in ("q", "error"))
    own, A = ([advantages(q, pi) for q, pi in zip(qs, pis)] for qs in (said, true))
    upper = lambda rows, combine=np.subtract: np.concatenate(
        [combine.outer(x, x)[np.triu_indices(len(x), 1)] for x in rows])
    differs, error = upper(true), np.sqrt(upper([e ** 2 for e in errors], np.add))
    right = 0.5 + 0.5 * np.sign(upper(said)) * np.sign(differs)
    noise = np.concatenate([e ** 2 * (1 - 2 * w) + (w ** 2 * e ** 2).sum()
                            for e, w in zip(errors, (pi / pi.sum() for pi in pis))])
    pairs = {}
    for gap in GAPS:
        far = (np.abs(differs) >= gap) & (np.abs(differs) > 2 * error)
        pairs[gap] = int(far.sum()), float(right[far].mean()) if far.any() else None
    tilted = [pi * np.exp((s - s.max()) / beta) for s, pi in zip(said, pis)]
    gain = [(w * a).sum() / w.sum() for w, a in zip(tilted, A)]
    own, A = np.concatenate(own), np.concatenate(A)
    return {"q": pearson(np.concatenate(said), np.concatenate(true)), "advantage": pearson(own, A),
            "spread": float((own ** 2).mean() ** 0.5),
            "true_spread": float(max(0, (A ** 2 - noise).mean()) ** 0.5),
            "gain": float(np.mean(gain)), "pairs": pairs}


# --- command line --------------------------------------------------------------------------------

def main():
    parser = Parser(__doc__)
    add = adder(parser)
    run_flags(add)
    add("--prm", None, "folders of PRMs, separated by commas (default: RUN/iterI/prm)", type=str,
        metavar="DIR,DIR")
    add("--states", 100, "states, each of another episode", type=at_least_one)
    add("--likely", 3, "candidates of each state that π finds most likely", type=at_least_one)
    add("--others", 1, "candidates of each state that are drawn from the rest",
        type=between(1, 100, int))
    add("--rollouts", 64, "rollouts from each", type=between(2, 10 ** 5, int))
    add("--beta", None, "of the column gain (default: the run's)", type=between(1e-4, 1e9))
    add("--seed", 0, "of states and rollouts", type=a_seed)
    add("--out", None, "results (default: RUN/truth-policyI)", type=str, metavar="DIR")
    args = parser.parse_args()
    set_up_torch(args.threads)
    (c, _), i = read_run(args.run, "dev", args.device, args.data), args.iteration
    policy, folder = c.policy(i - 1), c.run.path / f"iter{i - 1}/policy"
    folders = args.prm.split(",") if args.prm else [str(c.run.path / f"iter{i}/prm")]
    prms = {name: read_judge(c, name) for name in folders}
    settings = {"policy": i - 1, "gamma": c.args.gamma, "temperature": c.args.temperature,
                "max_steps": c.args.max_steps,
                **{k: getattr(args, k) for k in ("states", "likely", "others", "rollouts", "seed")}}
    out = Path(args.out or c.run.path / f"truth-policy{i - 1}")
    run = Run(out, settings, {"dev": fingerprint(c.dev)})
    states = run.once("truth/states", lambda state: {"states": play_truth(
        c, find_states(c, policy, args, c.args.temperature), args, folder, out)})["states"]
    said = judge_states(c, policy, prms, states)
    said[TRUTH] = [np.array(state["q"]) for state in states]
    beta = args.beta or c.args.beta
    rows = [{"judge": name, **compare(values, states, beta)} for name, values in said.items()]
    rows[0]["gain"] = None  # log π is no Q
    number = lambda x: "–" if x is None else f"{x:.2f}"
    ranked = lambda pair: "–" if pair[1] is None else f"{100 * pair[1]:.0f} %"
    head = [f"≥ {gap} ({n} pairs)" for gap, (n, _) in rows[0]["pairs"].items()]
    write_table(out, rows, ["judge", "Q", "A", "spread", "gain", *head], lambda r: [
        r["judge"], number(r["q"]), number(r["advantage"]),
        f"{r['true_spread' if r['judge'] == TRUTH else 'spread']:.3f}",
        "–" if r["gain"] is None else f"{r['gain']:+.4f}",
        *map(ranked, r["pairs"].values())])


if __name__ == "__main__":
    command_line(main, "interrupted; the same command continues where it stopped")
