"""AgentPRM on ALFWorld: roll out, estimate Q̂, train a PRM, improve the policy; repeat.

    python train.py --iters 3 --rollouts 70000    # the paper's size
    python train.py --iters 3 --rollouts 4000     # a small one, within an hour on two cores
    python train.py --smoke                       # every stage, tiny, on generated games
    python train.py --ablation reset              # one of ablations/: it replaces steps of the loop
    torchrun --nproc_per_node=2 train.py …        # several GPUs, or machines that share --out

The same command on an existing --out continues where it stopped. In the help and in the code, P1
is Choudhury, arXiv 2502.10325, and P2 is Xi et al., arXiv 2511.08325."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import dpo
import prm as prms
from fast_alfworld import COMPLETE, GAMES, fingerprint, task_folder
from fast_alfworld.cli import (Parser, UserError, a_seed, a_temperature, at_least_one, between,
                               command_line)
from inverse_prm import inverse_objective
from qestimate import labels_of, preference_pairs, q_table, returns, td_gae
from results import final_table, result_of
from rollout import Episode, load_trajectories, play_shards
from run import Context, Run, games_of
from sft import Sft, demonstrations, train_sft, train_tokenizer, untrained
from utils import (generator, join_ranks, key, mine, pick_device, read_model, save_model,
                   set_up_torch, wait_for_ranks)

DEV_EPISODES = 2  # of each dev game
SHARD = 256  # episodes
HELD_OUT = 0.15  # share of the task folders whose rollouts validate the PRM
MISTAKES = 0.15  # share of the demonstrations' actions that are random and masked (DART)
DELTA = 0.03  # P1's δ: the smallest difference of Q̂ that makes a pair


def main():
    c = set_up()
    supervised(c)
    evaluate(c, 0)
    for i in range(1, c.args.iters + 1):
        trajectories = roll_out(c, i)                      # stage 1: π_{i−1} plays
        train_prm(c, i, trajectories)                      # stage 2: Q̂, then Q_i
        improve_policy(c, i, trajectories)                 # stage 3: π_i
        evaluate(c, i)
    final_table(c)


# --- the named steps: an ablation's function of the same name takes the place of one --------------

def tokenizer(c):
    """The vocabulary of π_0, and so of all models. -> Tokenizer"""
    return train_tokenizer(c.train, c.prior, c.args.seed)


def demonstrations_(c):
    """What π_0 learns from, and InversePRM's expert. -> [(Trajectory, trained (T,) bool)]"""
    return demonstrations(c.train, c.prior, c.tokenizer, c.args.demos, seed=c.args.seed,
                          max_steps=c.args.max_steps, mistakes=MISTAKES)


def labels(c, i, some):
    """Q̂ of every action, Monte Carlo (P1, eq. 1). -> [(q_hat (T,), weight (T,))]"""
    return labels_of(some, q_table(some, c.tokenizer, c.args.gamma))


def prm_loss(c, i, some, hide_ends=False):
    """The objective of stage 2 on trajectories. -> objective(prm, picked, share, step)"""
    args = c.args
    if args.algo == "inverseprm":
        held = held_out(args, roll_out(c, i))  # out of what is learned from, on both sides
        kept = lambda t: task_folder(t.game) not in held
        learners = [t for j in range(1, i + 1) for t in roll_out(c, j) if kept(t)]
        demos = [demo for demo in c.demonstrations if kept(demo[0])]
        return inverse_objective(c.policy(i - 1), demos, learners, c.by_id,
                                 c.tokenizer, gamma=args.gamma, temperature=args.temperature,
                                 seed=key(f"inverse {args.seed} {i}"), hide_ends=hide_ends)
    if args.prm_loss == "bt":
        table = q_table(some, c.tokenizer, args.gamma)
        return prms.bt_objective(some, preference_pairs(some, table, DELTA), c.tokenizer)
    if args.targets == "td-gae":  # P2: from the current PRM
        return prms.promise_progress_objective(
            some, lambda n, M, v_0: td_gae(M, v_0, some[n].reward, args.gamma, 0.95))
    if args.prm_loss == "promise-progress":
        q = [q_hat for q_hat, _ in c.steps.labels(c, i, some)]
        return prms.promise_progress_objective(
            some, lambda n, M, v_0: (q[n], np.diff(q[n], prepend=q[n][:1])))
    return prms.bce_objective(some, c.steps.labels(c, i, some))


def judge(c, i, prm):
    """What scores candidates in stage 3: Q_i. -> judge(sequences, states) -> Q (B, C), or None"""
    return dpo.prm_judge(prm, bounded=absolute(c.args))


STEPS = {
    "games": lambda args, some: some,  # filters the games of train, and those of dev -> [Game]
    "tokenizer": tokenizer,
    "demonstrations": demonstrations_,
    "start_states": lambda c, i, episodes: episodes,  # where rollouts start -> [Episode]
    "trajectories": lambda c, i, played: played,  # what is learned from -> [Trajectory]
    "labels": labels,
    "prm_loss": prm_loss,
    "start_prm": lambda c, i, policy: policy.with_score_head(),  # None in its place: no PRM
    "judge": judge,
    "policy_loss": lambda c, i, some: dpo.policy_loss}  # (Batch, settings) -> losses (B,), metrics


def absolute(args):
    """Is Q = σ(f) an estimate of Q̂? BT and InversePRM leave f open up to a constant per state."""
    return args.algo == "agentprm" and args.prm_loss != "bt"


# --- the stages ----------------------------------------------------------------------------------

def supervised(c):
    """π_0: fine-tuned on demonstrations, or the policy of --init."""
    args, folder = c.args, c.run.path / "iter0/policy"

    def make(state):
        log = []
        if args.init:
            policy, c.tokenizer = read_model(args.init, c.device)
        else:
            c.tokenizer = c.steps.tokenizer(c)
            policy = untrained(len(c.tokenizer), args.dim, args.layers, args.seed)
            settings = Sft(lr=args.sft_lr, batch=args.sft_batch)
            log = train_sft(policy.to(c.device), c.demonstrations, settings, args.seed, state)
        save_model(folder, policy, c.tokenizer)
        return {"parameters": policy.n_parameters(), "log": log}

    c.run.once("iter0/sft", make)
    c.tokenizer = read_model(folder)[1]  # also where the stage was done earlier


def roll_out(c, i):
    """Stage 1: --rollouts episodes of π_{i−1}, in shards. -> [Trajectory]"""
    args, each, episodes = c.args, c.args.rollouts_per_game, []
    order = generator(args.seed, "games", i).permutation(len(c.train))
    for g in range(-(-args.rollouts // each)):
        lap, place = divmod(g, len(order))
        episodes += [Episode(c.train[order[place]], lap * each + k) for k in range(each)]
    episodes = c.steps.start_states(c, i, episodes[:args.rollouts])
    return c.steps.trajectories(c, i, play(
        c, i, "rollouts", episodes, i - 1, key(f"rollouts {args.seed} {i}"), lambda played: {
            "episodes": len(played), "success": float(np.mean([t.won for t in played])),
            "mean_actions": float(np.mean([len(t) for t in played]))}))


def play(c, i, name, episodes, policy, seed, summary):
    """Play episodes with π_policy in shards; summary(trajectories): the record. -> [Trajectory]"""
    args = c.args
    shards = [(c.run.path / f"iter{i}/{name}/{n:05d}.safetensors", episodes[k:k + SHARD])
              for n, k in enumerate(range(0, len(episodes), SHARD))]

    def make(state):
        here, workers = mine(shards), torch.get_num_threads() if c.device.type == "cpu" else 8
        with tqdm(total=sum(len(some) for _, some in here), desc=f"π_{policy}: {name}",
                  unit="episode", dynamic_ncols=True) as bar:
            for ended, won in play_shards(
                    here, c.run.path / f"iter{policy}/policy", c.device, workers, act=c.act,
                    temperature=args.temperature, max_steps=args.max_steps, seed=seed):
                bar.update(int(ended) - bar.n)
                bar.set_postfix(won=f"{won / max(1, ended):.1%}", refresh=False)
        wait_for_ranks()
        return summary(load())

    def load():
        return [t for file, _ in shards for t in load_trajectories(file)]

    c.run.once(f"iter{i}/{name}", make, [file for file, _ in shards])
    return load()


def train_prm(c, i, some, name="prm"):
    """Stage 2: Q_i learns from the rollouts; those of some task folders are held out."""
    args = c.args
    if c.steps.start_prm is None:
        return
    held = held_out(args, some)
    learned, new = ([t for t in some if (task_folder(t.game) in held) == out]
                    for out in (False, True))

    def make(state):
        prm, objective = c.steps.start_prm(c, i, c.policy(i - 1)), c.steps.prm_loss(c, i, learned)
        settings = prms.Fit(lr=args.prm_lr, batch=args.prm_batch, epochs=args.prm_epochs)
        log = prms.fit(prm, len(learned), objective, settings, key(f"{name} {args.seed} {i}"),
                       state, f"PRM {i}")
        save_model(c.run.path / f"iter{i}/{name}", prm, c.tokenizer)
        table = q_table(new, c.tokenizer, args.gamma)
        pairs = preference_pairs(new, table, DELTA)
        gained = np.concatenate([returns(t, args.gamma) for t in new])
        return {"validation": prms.validation_metrics(prm, new, labels_of(new, table), gained)
                if absolute(args) else None,
                "pair_accuracy": prms.pair_accuracy(prm, new, pairs, c.tokenizer), "log": log}

    c.run.once(f"iter{i}/{name}", make)


def held_out(args, some):
    """The task folders that validate the PRM: the same ones in every iteration."""
    place = lambda folder: key(f"held out {args.seed} {folder}") / 2 ** 63
    folders = sorted({task_folder(t.game) for t in some}, key=place)
    if len(folders) < 2:
        raise UserError("all rollouts are of one task folder, and some must be held out to "
                        "validate the PRM: more --rollouts")
    share = sum(place(folder) < HELD_OUT for folder in folders)
    return set(folders[:min(max(1, share), len(folders) - 1)])


def improve_policy(c, i, some):
    """Stage 3: π_i from π_{i−1}, judged by Q_i, held near π_{i−1} (--ref init: near π_0)."""
    args = c.args

    def make(state):
        policy, reference = c.policy(i - 1), c.policy(i - 1 if args.ref == "prev" else 0)
        judged = c.steps.judge(c, i, c.prm(i) if c.steps.start_prm else None)
        settings = dpo.Improve(args.improve, args.labels, args.beta, args.kl, lr=args.dpo_lr,
                               updates=args.updates, trajectories=args.dpo_batch,
                               temperature=args.dpo_temperature)
        log = dpo.improve(policy, reference, judged, c.tokenizer, some, c.by_id, settings,
                          seed=key(f"dpo {args.seed} {i}"), state=state,
                          loss=c.steps.policy_loss(c, i, some), name=f"policy {i}")
        save_model(c.run.path / f"iter{i}/policy", policy, c.tokenizer)
        return {"log": log}

    c.run.once(f"iter{i}/dpo", make)


def evaluate(c, i):
    """Success of π_i on dev and the test splits: the episodes of eval.py with this --seed."""
    for split, some in {"dev": c.dev, **c.test}.items():
        each = DEV_EPISODES if split == "dev" else c.args.episodes_per_game
        episodes = [Episode(game, k) for game in some for k in range(each)]
        play(c, i, f"eval-{split}", episodes, i, c.args.seed,
             lambda played: {"split": split, **result_of(played, some)})


def set_up():
    """Command line, games and run directory. -> Context"""
    args, steps = parse()
    join_ranks(args.device)
    device = pick_device(args.device)
    set_up_torch(args.threads)
    train, dev, test = games_of(args, steps)
    games = {"train": train, "dev": dev, **test}
    run = Run(args.out, vars(args), {split: fingerprint(some) for split, some in games.items()},
              free=("out", "threads", "device", "data", "iters"),
              alone=f"{args.out}: another train.py is at work there")
    return Context(args, steps, run, device, train, dev, test)


SMOKE = {"games": "generated", "n_generated": 60, "demos": 64, "iters": 1, "rollouts": 64,
         "rollouts_per_game": 4, "updates": 6, "max_steps": 10, "episodes_per_game": 1, "dim": 64,
         "layers": 2, "threads": 1, "out": "runs/smoke"}


def parse(argv=None):
    """The command line -> args, the named steps."""
    parser, rate = Parser(__doc__), between(1e-12, 10)
    g = parser.add_argument_group("run")
    add = lambda flag, default, help, type=None: g.add_argument(
        flag, default=default, help=help, type=type or default.__class__)
    choice = lambda flag, help, *values: g.add_argument(
        flag, default=values[0], choices=values, help=help)
    add("--iters", 3, "iterations", between(0, 100, int))
    add("--out", "runs/default", "run directory")
    add("--seed", 0, "fixes the run, on one machine", a_seed)
    add("--device", "auto", "auto, cpu or cuda")
    add("--threads", None, "CPU threads and processes (default: all cores)", at_least_one)
    add("--ablation", "", "names of ablations/, separated by commas (default: none)")
    g.add_argument("--smoke", action="store_true", help="tiny settings, generated games")
    choice("--algo", "learn from outcomes, or from demonstrations alone", "agentprm", "inverseprm")
    choice("--actions", "choose among the candidates, or generate freely", "candidates", "free")
    add("--temperature", 0.3, "of rollouts and evaluation; 0 is greedy", a_temperature)
    add("--max-steps", 30, "actions after which an episode is cut", at_least_one)
    g = parser.add_argument_group("games")
    choice("--games", "where games come from; tiny: small generated ones", *GAMES)
    add("--data", None, "folder of json_2.1.1 (default: $ALFWORLD_DATA or alfworld's cache)", str)
    add("--n-generated", COMPLETE["train"], "generated train games", at_least_one)
    add("--test-splits", "valid_seen", "evaluated beside dev, separated by commas")
    add("--episodes-per-game", 5, "episodes of each test game", at_least_one)
    g = parser.add_argument_group("π_0: supervised fine-tuning")
    add("--init", None, "folder of a policy to start from instead (default: none)", str)
    add("--demos", 2500, "demonstrations, each seen once", at_least_one)
    add("--sft-lr", Sft.lr, "learning rate", rate)
    add("--sft-batch", Sft.batch, "demonstrations an update", at_least_one)
    add("--dim", 128, "width of the transformer, a multiple of 32", between(32, 8192, int))
    add("--layers", 4, "its layers", between(1, 100, int))
    g = parser.add_argument_group("stage 1: rollouts")
    add("--rollouts", 70_000, "episodes an iteration", between(2, 10 ** 8, int))
    add("--rollouts-per-game", 16, "episodes of each game drawn", at_least_one)
    add("--gamma", 0.95, "discount", between(0, 1))
    g = parser.add_argument_group("stage 2: PRM")
    choice("--prm-loss", "P1's BCE or Bradley-Terry, or P2's loss", "bce", "bt", "promise-progress")
    choice("--targets", "of promise-progress: Monte Carlo or bootstrapped", "mc", "td-gae")
    add("--prm-lr", prms.Fit.lr, "learning rate", rate)
    add("--prm-batch", prms.Fit.batch, "trajectories an update", at_least_one)
    add("--prm-epochs", prms.Fit.epochs, "epochs", between(1e-6, 1000))
    g = parser.add_argument_group("stage 3: policy (--dpo-… for both ways)")
    choice("--improve", "distil the closed form π·exp(Q/β), or online DPO", "exact", "dpo")
    choice("--labels", "of dpo: the better sample is chosen, or σ(Q_a − Q_b)", "hard", "soft")
    add("--beta", dpo.Improve.beta, "of the objective E[Q] − β KL(π ‖ reference)",
        between(1e-9, 1e9))
    add("--kl", dpo.Improve.kl, "weight of that KL, at every state, added to the loss",
        between(0, 1e9))
    choice("--ref", "reference policy: π_{i−1} or π_0", "prev", "init")
    add("--dpo-lr", dpo.Improve.lr, "learning rate", rate)
    add("--updates", dpo.Improve.updates, "updates", at_least_one)
    add("--dpo-batch", dpo.Improve.trajectories, "trajectories an update", at_least_one)
    add("--dpo-temperature", dpo.Improve.temperature, "of π and its reference", between(1e-3, 100))
    return finish(parser, sys.argv[1:] if argv is None else argv)


def finish(parser, argv):
    """Read the command line; ablations add flags of their own and replace named steps."""
    words = [w for w in argv if w.strip("-") not in ("h", "help")]  # --help shows all flags
    names = [n for n in parser.parse_known_args(words)[0].ablation.split(",") if n]
    steps, checks = dict(STEPS), []
    if names:
        steps, checks = importlib.import_module("ablations").load(names, parser, steps)
    if "--smoke" in argv:
        parser.set_defaults(**SMOKE)
    a = parser.parse_args(argv)
    for wrong, complaint in (
            (a.dim % 32, f"--dim {a.dim}: must be a multiple of 32"),
            (a.actions == "free" and a.iters, "--actions free: for π_0 alone (--iters 0)"),
            (a.init and not Path(a.init).is_dir(), f"--init {a.init}: no model there"),
            ("dev" in a.test_splits.split(","), "--test-splits dev: dev is always evaluated"),
            (a.prm_loss != "bce" and a.algo != "agentprm", "--prm-loss: inverseprm has its own"),
            (a.targets != "mc" and a.prm_loss != "promise-progress",
             f"--targets {a.targets}: needs --prm-loss promise-progress"),
            (a.labels != "hard" and a.improve != "dpo", "--labels soft: needs --improve dpo")):
        if wrong:
            raise UserError(complaint)
    for check in checks:
        check(a)  # UserError where the flags leave the ablation nothing to change
    return a, SimpleNamespace(**steps)


if __name__ == "__main__":
    command_line(main, "interrupted; the same command continues where it stopped")
