"""The learning curves of the method: SFT, acting by a PRM, and stage 3, on the same games.

    python tools/curves.py sft --demos 250,1000,4000 --seeds 0,1,2     # π_0 by demonstrations
    python tools/curves.py act --run runs/default --iteration 1        # π·exp(Q/β), Best-of-N
    python tools/curves.py improve --run runs/default --lrs 1e-5,1e-4  # the losses of stage 3

Each writes to its --out: rows/ (a file a row, episodes included), rows.json, table.md and
figure.png. The same command continues where it stopped; processes with different --seeds,
--methods, --lrs or --demos may share an --out, and a last one with all of them collects the rows.
The policy, the games and the random numbers are those of the run; choices are made on dev.
"""

import math
import sys
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dpo
from candidates import expected, kl, score_states
from eval import evaluate_policy, play
from fast_alfworld import fingerprint
from fast_alfworld.cli import UserError, a_seed, at_least_one, between, command_line
from fast_alfworld.score import paired_bootstrap, points
from results import result_of
from rollout import SHARDS, load_trajectories, rollout, states_of
from run import Run
from search import best_of_n, read_prm, tilted
from tools.experiment import (list_of, new_figure, parser_of, percent, read_run, run_flags,
                              run_part, save_figure, span, write_table)
from tools.sft_curve import sft
from train import DEV_EPISODES
from utils import generator, key, set_up_torch

# --- acting by a PRM -----------------------------------------------------------------------------

KINDS = {"beta": ("π(a|s) · exp(Q(s,a)/β)", "β"), "best_of": ("Best-of-N", "N")}


def act(argv):
    """Success of acting by π·exp(Q/β) and by Best-of-N, on the same games with the same keys."""
    parser, add = parser_of(act)
    run_flags(add)
    add("--policy", None, "act with π_K (default: π_{i−1}, on whose rollouts Q_i was trained)",
        type=between(0, 100, int), metavar="K")
    add("--betas", "inf,1,0.5,0.2,0.1,0.05,0.02", "values of β; inf is the policy alone",
        type=list_of(between(1e-4)))
    add("--best-of", "1,2,4,8,16,32,64", "values of N", type=list_of(between(1, 1024, int)))
    add("--split", "dev", "dev, valid_seen or valid_unseen")
    add("--episodes-per-game", DEV_EPISODES, "episodes of each game", type=at_least_one)
    add("--seed", None, "of the episodes (default: the run's)", type=a_seed)
    add("--out", None, "results (default: RUN/curves/act-SPLIT-…)", type=str, metavar="DIR")
    args = parser.parse_args(argv)
    set_up_torch(args.threads)
    (c, games), i = read_run(args.run, args.split, args.device, args.data), args.iteration
    k = i - 1 if args.policy is None else args.policy
    seed = c.args.seed if args.seed is None else args.seed
    policy = c.policy(k)
    prm = read_prm(c.run.path / f"iter{i}/prm", c.tokenizer, c.device, within_state=True)
    settings = {"policy": k, "iteration": i, "split": args.split, "seed": seed, "actions":
                c.args.actions, "episodes_per_game": args.episodes_per_game,
                "temperature": c.args.temperature, "max_steps": c.args.max_steps}
    out = Path(args.out or c.run.path / f"curves/act-{args.split}-policy{k}-prm{i}")
    run = Run(out, settings, {args.split: fingerprint(games)})

    def row(kind, x):
        plain = x == {"beta": math.inf, "best_of": 1}[kind]

        def make(state):
            acting = tilted(x, prm.bounded) if kind == "beta" else best_of_n(x)
            return evaluate_policy(
                policy, c.tokenizer, games, episodes_per_game=args.episodes_per_game, seed=seed,
                temperature=c.args.temperature, max_steps=c.args.max_steps,
                name=f"π_{k}" if plain else f"π_{k}, {KINDS[kind][1]} = {x:g}",
                **({} if plain else {"prm": prm, "act": acting}))

        record = run.once("rows/plain" if plain else f"rows/{kind}-{x:g}", make)
        return {"kind": kind, "x": None if plain and kind == "beta" else x, **record}

    plain, rows = row("beta", math.inf), []
    for kind, values in (("beta", args.betas), ("best_of", args.best_of)):
        for x in values:
            rows.append(row(kind, x))
            rows[-1]["gain"] = paired_bootstrap(plain["episodes"], rows[-1]["episodes"])
    shown = lambda x: "∞" if x is None else f"{x:g}"
    write_table(out, rows, ["acting by", "success", "95 % interval", f"gain over π_{k}, points",
                            "actions"], lambda r: [
        f"{KINDS[r['kind']][0]}, {KINDS[r['kind']][1]} = {shown(r['x'])}", percent(r["success"]),
        span(r["interval"]), points(r["gain"]), f"{r['mean_actions']:.1f}"])
    figure, axes = new_figure(2, title=f"π_{k} with Q_{i} on {args.split}, {len(games)} games, cap "
                                       f"{c.args.max_steps}")
    for axis, kind in zip(axes, KINDS):
        own = [r for r in rows if r["kind"] == kind]
        at, y = range(len(own)), np.array([r["success"] for r in own])
        error = np.abs(np.array([r["interval"] for r in own]).reshape(-1, 2).T - y)
        axis.errorbar(at, y, error, marker="o", capsize=3)
        axis.axhline(plain["success"], color="gray", linestyle="--", label=f"π_{k} alone")
        axis.set_xticks(at, [shown(r["x"]) for r in own])
        axis.set(title=KINDS[kind][0], xlabel=KINDS[kind][1], ylabel="success")
        axis.legend()
    save_figure(figure, out / "figure.png")


# --- the losses of stage 3 -----------------------------------------------------------------------

METHODS = {"exact": "exact: distillation of the closed form", "dpo-hard": "DPO, hard labels",
           "dpo-soft": "DPO, soft labels", "dpo-hard-kl": "DPO, hard labels, exact KL",
           "dpo-soft-kl": "DPO, soft labels, exact KL"}


def improve(argv):
    """Stage 3 by several losses, from one π_{i−1}, its rollouts and Q_i: success on dev by update.

    At about 20 points of each training also, over fixed states, exactly: KL(π ‖ π_{i−1}), the gain
    in E_π[Q], and the distillation loss KL(π* ‖ π) to the closed form. "dev": states of π_{i−1} on
    dev, which no training has seen; "train": states of the rollouts.
    """
    parser, add = parser_of(improve)
    run_flags(add)
    add("--methods", "exact,dpo-hard,dpo-hard-kl,dpo-soft", "any of " + ", ".join(METHODS),
        type=list_of(str))
    add("--lrs", "1e-5,3e-5,1e-4,3e-4,1e-3", "learning rates", type=list_of(between(1e-12, 10)))
    add("--seeds", "0", "seeds of stage 3", type=list_of(a_seed))
    add("--beta", None, "weight of the KL in the objective (default: the run's)",
        type=between(1e-9, 1e9))
    add("--kl", 0.1, "weight of the exact KL in the methods …-kl", type=between(0, 1e9))
    add("--updates", None, "updates (default: the run's)", type=at_least_one)
    add("--batch", None, "trajectories an update (default: the run's)", type=at_least_one)
    add("--states", dpo.Improve.states, "states of each trajectory", type=at_least_one)
    add("--evaluations", 5, "times that success on dev is measured in a training, at most 20",
        type=between(1, 20, int))
    add("--episodes-per-game", DEV_EPISODES, "episodes of each dev game", type=at_least_one)
    add("--out", None, "results (default: RUN/curves/improve-I)", type=str, metavar="DIR")
    args = parser.parse_args(argv)
    set_up_torch(args.threads)
    if wrong := set(args.methods) - METHODS.keys():
        raise UserError(f"--methods {wrong.pop()}: must be among {', '.join(METHODS)}")
    (c, _), i = read_run(args.run, "dev", args.device, args.data), args.iteration
    base = dpo.Improve(beta=args.beta or c.args.beta, updates=args.updates or c.args.updates,
                       trajectories=args.batch or c.args.dpo_batch, states=args.states,
                       temperature=c.args.dpo_temperature)
    out = Path(args.out or c.run.path / f"curves/improve-{i}")
    settings = {**asdict(base), "iteration": i, "kl": args.kl, "evaluations": args.evaluations,
                "episodes_per_game": args.episodes_per_game}
    run = Run(out, {k: v for k, v in settings.items() if k not in ("how", "labels", "lr")},
              {"train": fingerprint(c.train), "dev": fingerprint(c.dev)})
    stage = Stage(c, i, base, args)
    start, rows = run.once("rows/start", stage.before), []
    for seed, lr, method in product(args.seeds, args.lrs, args.methods):
        record = run.once(f"rows/{method}-{lr:g}-{seed}",
                          lambda state: stage.train(method, lr, seed, state))
        first = {"step": 0, **{k: start[k] for k in record["log"][-1] if k in start}}
        rows.append({"method": method, "lr": lr, "seed": seed, "log": [first, *record["log"]]})
    write_table(out, groups(rows), [
        "method", "learning rate", "seeds", "success at the start", "at the end", "range",
        "lowest", "highest", "KL at the end", "gain in E[Q]", "distillation loss"], improve_cells)
    draw_improve(rows, out / "figure.png", f"stage 3 from π_{i - 1} and Q_{i}, β = {base.beta:g}, "
                 f"at each method's best learning rate ({len(c.dev)} dev games)")


class Stage:
    """Stage 3 of iteration i of a run, to be repeated by several losses."""

    def __init__(self, c, i, base, args):
        files = sorted((c.run.path / f"iter{i}/rollouts").glob(SHARDS))
        if not (c.run.path / f"iter{i}/rollouts.json").exists() or not files:
            raise UserError(f"{c.run.path}: the rollouts of iteration {i} are not finished")
        played = [t for file in files for t in load_trajectories(file)]
        self.c, self.i, self.base, self.args = c, i, base, args
        self.trajectories = c.steps.trajectories(c, i, played)
        self.reference, self.judge = c.policy(i - 1), c.steps.judge(c, i, c.prm(i))
        self.games, self.probes = c.by_id, {}
        dev = self.play(self.reference, f"π_{i - 1}")
        self.start = {"success": result_of(dev, c.dev)["success"]}
        for name, some in (("dev", dev), ("train", self.trajectories)):
            self.probes[name] = Probe(self, some, c.dev if name == "dev" else c.train)

    def play(self, policy, name):
        """Trajectories on dev, the same games and keys for every policy."""
        c, each = self.c, self.args.episodes_per_game
        return play(lambda todo: rollout(policy, c.tokenizer, todo, seed=c.args.seed,
                                         temperature=c.args.temperature,
                                         max_steps=c.args.max_steps), c.dev, each, name)

    def measure(self, policy, success):
        """-> {metric: value} of a policy at the fixed states, and on dev"""
        out = {f"{name}_{k}": v for name, probe in self.probes.items()
               for k, v in probe(policy, self.base.beta).items()}
        return out | ({"success": result_of(self.play(policy, "dev"), self.c.dev)["success"]}
                      if success else {})

    def before(self, state):
        return self.measure(self.reference, False) | self.start

    def train(self, method, lr, seed, state):
        """-> {"log": …}, as from dpo.improve, with `measure`"""
        how, *rest = method.split("-")
        settings = replace(self.base, how=how, labels=rest[0] if rest else "hard", lr=lr,
                           kl=self.args.kl if "kl" in rest else 0.0)
        policy, done = self.c.policy(self.i - 1), [0]
        stretch = -(-settings.updates // 20)  # as in optim.optimise
        marks = {round(n * settings.updates / self.args.evaluations / stretch)
                 for n in range(1, self.args.evaluations + 1)}

        def loss(batch, settings):
            done[0] = batch.keys[2] + 1  # updates, this one included
            return dpo.policy_loss(batch, settings)

        def watch():
            policy.eval()
            last = done[0] == settings.updates
            return self.measure(policy, last or done[0] // stretch in marks)

        return {"log": dpo.improve(
            policy, self.reference, self.judge, self.c.tokenizer, self.trajectories, self.games,
            settings, seed=key(f"dpo {seed} {self.i}"), state=state, loss=loss, watch=watch,
            name=f"{method} {lr:g} seed {seed}")}


class Probe:
    """Fixed states at which policies are compared with the reference and the PRM."""

    def __init__(self, stage, trajectories, games, n=32, each=6):
        rng, games = generator("probe"), {game.id: game for game in games}
        T = stage.base.temperature
        order = rng.permutation(len(trajectories))[:n]
        self.sequences, self.states, self.temperature = [], [], T
        for b, t in enumerate(trajectories[j] for j in order):
            every = states_of(t, games[t.game], stage.c.tokenizer, b)
            self.sequences.append(t.ids)
            self.states += [every[k] for k in
                            sorted(rng.choice(len(t), min(len(t), each), replace=False))]
        with torch.no_grad():
            self.log_ref = score_states(stage.reference, self.sequences, self.states, T)
            self.q = stage.judge(self.sequences, self.states)

    @torch.no_grad()
    def __call__(self, policy, beta):
        """-> means over the states: KL to the reference, gain in E[Q], distillation loss"""
        log_pi = score_states(policy, self.sequences, self.states, self.temperature)
        return {"kl": float(kl(log_pi, self.log_ref).mean()),
                "gain": float((expected(log_pi, self.q) - expected(self.log_ref, self.q)).mean()),
                "distillation": float(dpo.exact_loss(log_pi, self.log_ref, self.q, beta).mean())}


PANELS = {"success": "success on dev", "dev_kl": "KL(π ‖ π_{i−1}), nats",
          "dev_gain": "gain in E_π[Q]", "dev_distillation": "distillation loss KL(π* ‖ π)"}


def groups(rows):
    """Rows of single trainings -> for each method and learning rate {"method", "lr", "seeds",
    "steps": {panel: updates}, panel: (seeds, points)}"""
    found = defaultdict(list)
    for row in rows:
        found[row["method"], row["lr"]].append(row)
    take = lambda row, key, panel: [e[key] for e in row["log"] if panel in e]
    return [{"method": method, "lr": lr, "seeds": [row["seed"] for row in some],
             "steps": {panel: take(some[0], "step", panel) for panel in PANELS},
             **{panel: [take(row, panel, panel) for row in some] for panel in PANELS}}
            for (method, lr), some in sorted(found.items())]


def improve_cells(g):
    success = np.array(g["success"])  # (seeds, points)
    mean, end = success.mean(0), success[:, -1]
    last = lambda panel: f"{np.mean([curve[-1] for curve in g[panel]]):.4f}"
    first = np.mean([curve[0] for curve in g["dev_distillation"]])
    return [METHODS[g["method"]], f"{g['lr']:g}", str(len(g["seeds"])), percent(mean[0]),
            percent(mean[-1]), f"{percent(end.min())} … {percent(end.max())}", percent(mean.min()),
            percent(mean.max()), last("dev_kl"), last("dev_gain"),
            f"{first:.4f} → {last('dev_distillation')}"]


def draw_improve(rows, path, title):
    """Four panels by update; of each method the learning rate with most success at the end."""
    best = {}
    for g in groups(rows):
        end = np.mean([curve[-1] for curve in g["success"]])
        if g["method"] not in best or end > best[g["method"]][0]:
            best[g["method"]] = end, g
    figure, axes = new_figure(4, 2, title)
    for axis, (panel, name) in zip(axes, PANELS.items()):
        for method, (_, g) in best.items():
            curves = np.array(g[panel])
            line, = axis.plot(g["steps"][panel], curves.mean(0), marker=".",
                              label=f"{METHODS[method]}, lr {g['lr']:g}")
            axis.fill_between(g["steps"][panel], curves.min(0), curves.max(0), alpha=0.2,
                              color=line.get_color())
        axis.set(title=name, xlabel="updates")
    axes[0].legend(fontsize="small")
    save_figure(figure, path)


PARTS = {"sft": sft, "act": act, "improve": improve}

if __name__ == "__main__":
    command_line(lambda: run_part(__doc__, PARTS, sys.argv[1:]),
                 "interrupted; the same command continues where it stopped")
