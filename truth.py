"""Does a PRM know which action is better? Against the truth, by brute force.

    python truth.py --run runs/default                       # π_0 of a run; every PRM of its iteration 1
    python truth.py --run runs/default --policy 1            # π_1, and the PRMs of iteration 2
    python truth.py --run runs/default --prm DIR --prm DIR   # other PRMs of rollouts of the same policy

At one state of each of --states episodes of π_k on dev, --rollouts more go on from there. Their first actions are counted, the mean
return of each is its true Q, and what it is above the mean of its state its true advantage. That Q correlates with returns says
little about that: most of what there is to know of a return is the state's. Printed, of actions with at least --least rollouts:

    Q, A            correlation of Q(s, a) with the true one, and of Q(s, a) − Σ π(a | s) Q(s, a) with the true advantage
    far             pairs of actions of one state whose true Q are more than 0.15 and more than three standard errors apart: how many,
                    and in which share Q says which is better
    gap of 0.05 …   pairs that Q holds for so far apart: how many, in which share the better one is better, and by how much, on average

The truth is a mean of a few rollouts, and its noise lowers everything for every judge alike: compare rows, not a row with 1.
The first row is log π(a | s) in the place of Q, and of a PRM that compares actions of one state only it is f: their gaps are not Q's.
The rollouts stay in the run (truth-K.json), and are not played again.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import Parser, UserError, a_seed, command_line, generator, pick_device, read_json, read_model, same_settings, set_up_torch, write_json
from games import games_of_run
from qestimate import pearson
from rollout import rollout
from search import read_prm
from tree import Tree

FAR, GAPS = 0.15, (0.02, 0.05, 0.1, 0.2)


def play_truth(policy, tokenizer, games, *, states, rollouts, gamma, max_steps, temperature, seed):
    """Rollouts of `policy` from states of its own. -> [{"game", "ids": those of the state, "actions": {text: {"ids", "returns"}}}]

    returns: discounted, counted from the state, of the rollouts that began with the action.
    """
    options = dict(temperature=temperature, max_steps=max_steps)
    played = list(rollout(policy, tokenizer, [(games[n % len(games)], n) for n in range(states)], seed=seed, **options))
    by_id, found, todo = {game.id: game for game in games}, [], []
    for n, t in enumerate(sorted(played, key=lambda t: t.episode)):
        k = int(generator(seed, "state", n).integers(len(t)))
        ids = t.ids[:t.spans[k, 0]]
        found.append({"game": t.game, "ids": ids.tolist(), "actions": {}})
        todo += [(by_id[t.game], n * rollouts + j, ids, k) for j in range(rollouts)]
    for t in tqdm(rollout(policy, tokenizer, todo, seed=seed + 1, **options), "rollouts", len(todo), unit="episode", dynamic_ncols=True):
        action = t.ids[slice(*t.spans[0])]
        one = found[t.episode // rollouts]["actions"].setdefault(tokenizer.command(action), {"ids": action.tolist(), "returns": []})
        one["returns"].append(t.reward * gamma ** (len(t) - 1))
    return found


@torch.no_grad()
def judged(score, found, device, least):
    """For every state with two actions or more of at least `least` rollouts:
    `score`(Tree) of them, their true q, their share, the variance of that q, each (actions,)."""
    out = []
    for state in tqdm(found, "score", unit="state", leave=False, dynamic_ncols=True):
        actions = [a for a in state["actions"].values() if len(a["returns"]) >= least]
        if len(actions) > 1:
            tree = Tree([np.array(state["ids"])], [(0, len(state["ids"]), a["ids"], False) for a in actions], device)
            G = [np.array(a["returns"]) for a in actions]
            n = np.array([len(g) for g in G])
            spread = sum(((g - g.mean()) ** 2).sum() for g in G) / max(1, n.sum() - len(n))  # of all actions: four lost rollouts alone have 0
            variance = spread / n
            out.append((score(tree).double().cpu().numpy(), np.array([g.mean() for g in G]), n / n.sum(), variance))
    return out


def against_truth(states):
    """What a judge says, the truth, its share of the state and the truth's variance, (n,) each, for every state
    -> {"q", "advantage": correlations, "far", "gaps"}

    far, and each of the gaps: (pairs, share in which the judge is right, how much better the one it prefers is); None where no pairs are.
    """
    pairs = lambda k, combine=np.subtract: np.concatenate([combine.outer(x[k], x[k])[np.triu_indices(len(x[k]), 1)] for x in states])
    advantages = lambda k: np.concatenate([x[k] - (x[2] * x[k]).sum() for x in states])
    said, true, error = pairs(0), pairs(1), np.sqrt(pairs(3, np.add))

    def of(where):
        right, gain = said * true > 0, np.sign(said) * true
        return int(where.sum()), float(right[where].mean()) if where.any() else None, float(gain[where].mean()) if where.any() else None

    values = [np.concatenate([x[k] for x in states]) for k in (0, 1)]
    return {"q": pearson(*values), "advantage": pearson(advantages(0), advantages(1)), "actions": len(values[0]),
            "far": of((abs(true) > FAR) & (abs(true) > 3 * error)), "gaps": {gap: of((abs(said) > gap) & (true != 0)) for gap in GAPS}}


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--run", default="runs/default", help="a run directory of train.py", metavar="DIR")
    add("--policy", type=int, default=0, help="whose actions: π_k", metavar="K")
    add("--prm", action="append", help="a PRM of that policy's rollouts; may be given more than once (default: those of iteration k + 1)",
        metavar="DIR")
    add("--states", type=int, default=600, help="states, each of another episode")
    add("--rollouts", type=int, default=64, help="rollouts from each state")
    add("--least", type=int, default=4, help="rollouts that an action must have, to count")
    add("--data", help="folder that holds json_2.1.1 (default: the run's)", metavar="DIR")
    add("--seed", type=a_seed, default=0, help="names all randomness")
    add("--threads", type=int, help="CPU threads (default: all cores)", metavar="N")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    run = Path(args.run)
    if min(args.states, args.rollouts, args.least) < 1 or args.policy < 0:
        raise UserError("--states, --rollouts and --least are at least 1, --policy at least 0")
    if 2 * args.least > args.rollouts:
        raise UserError(f"--rollouts {args.rollouts}: two actions with --least {args.least} need {2 * args.least}")
    if not (run / "data.json").exists():
        raise UserError(f"{run}: no run of train.py there (data.json is missing)")
    set_up_torch(args.threads)
    device, flags = pick_device(args.device), read_json(run / "config.json")["flags"]
    policy, tokenizer = read_model(run / f"iter{args.policy}/policy", device)
    folders = args.prm or sorted(f.parent for f in run.glob(f"iter{args.policy + 1}/prm*/config.json"))
    if not folders:
        raise UserError(f"{run}: no PRM of the rollouts of π_{args.policy} there; another --policy, or --prm DIR")
    prms = {str(folder): read_prm(folder, tokenizer, device, one_state=True) for folder in folders}
    settings = {"policy": args.policy, "states": args.states, "rollouts": args.rollouts, "seed": args.seed,
                "gamma": flags["gamma"], "max_steps": flags["max_steps"], "temperature": flags["rollout_temperature"]}
    file = run / f"truth-{args.policy}.json"
    if file.exists():
        known = read_json(file)
        same_settings(file, known, settings, "give the same flags, or move it away")
    else:
        games, _ = games_of_run(run, "dev", args.data)
        known = {**settings, "found": play_truth(policy, tokenizer, games, **{k: v for k, v in settings.items() if k != "policy"})}
        write_json(file, known)
    scores = {f"log π_{args.policy}(a | s)": lambda tree: tree.logprobs(policy, flags["rollout_temperature"]),
              **{name: lambda tree, prm=prm: tree.scores(prm) if prm.config.head == "relative" else tree.scores(prm).sigmoid()
                 for name, prm in prms.items()}}
    percent, number = lambda x: "–" if x is None else f"{x:.0%}", lambda x: f"{'–':>6}" if x is None else f"{x:6.2f}"
    for n, (name, score) in enumerate(scores.items()):
        states = judged(score, known["found"], device, args.least)
        if not states:
            raise UserError(f"no state where two actions have {args.least} rollouts: more --states or --rollouts")
        r = against_truth(states)
        if not n:
            heads = [f"{r['far'][0]} far", *(f"gap of {gap}" for gap in GAPS)]
            print(f"{r['actions']} actions of {len(states)} states\n{'Q':>6}{'A':>6}" + "".join(f"{head:>20}" for head in heads))
        cells = [percent(r["far"][1]), *(f"{n}, {percent(right)}, {gain or 0:+.2f}" for n, right, gain in r["gaps"].values())]
        print(f"{number(r['q'])}{number(r['advantage'])}" + "".join(f"{cell:>20}" for cell in cells) + f"   {name}")


if __name__ == "__main__":
    command_line(main)
