"""AgentPRM on ALFWorld, from games to a table of π_0 … π_3.

    python train.py --iters 3 --rollouts 70000             # the whole method; on two CPU cores an afternoon
    python train.py --iters 3 --rollouts 4000              # a small one
    python train.py --smoke                                # every stage, tiny, on generated games
    torchrun --nproc_per_node=2 train.py --iters 3 --rollouts 70000    # the same on several GPUs or machines

One iteration i: roll out π_{i−1} → Monte Carlo labels Q̂ → train the PRM Q_i → improve π_{i−1} to π_i by online DPO.
The same command on an existing --out goes on where it stopped, after Ctrl-C, a kill or a power cut.
"""

import sys

import numpy as np
from tqdm import tqdm

import ranks
from common import Parser, UserError, command_line, generator, key, read_model, save_model, set_up_torch
from dpo import better_than_expected, imitated, online_dpo, progress
from eval import evaluate_policy
from expert import fit_prior
from inverse_prm import train_inverse_prm
from model import Config, Transformer
from prm import actions_of, fit_labels, prefer, promise_and_progress, report, score, train_prm
from qestimate import held_out_check, labels_of, preference_pairs, q_table, sarsa, td_gae, visit_statistics
from runs import Run, estimate, final_table, load_games
from sft import expert_trajectories, train_sft, train_tokenizer
from shards import load_trajectories, play_shards
from tokenizer import Tokenizer


def main():
    args = parse_flags()
    ranks.join(args.out)
    set_up_torch(args.threads)
    run = Run(args)
    games = load_games(args, run)  # .train, .dev, .test {split: games}, .by_id
    estimate(args, run, games)
    supervised(args, run, games)
    for i in range(1, args.iters + 1):
        trajectories = roll_out(args, run, games, i)
        process_reward_model(args, run, games, i, trajectories)
        improve(args, run, games, i, trajectories)
    for i in range(args.iters + 1):
        evaluate(args, run, i, "dev", games.dev, args.dev_episodes)
        for split, test in games.test.items():
            evaluate(args, run, i, split, test, args.episodes_per_game)
    final_table(args, run)
    ranks.leave()


def supervised(args, run, games):
    """π_0: fine-tuned on demonstrations, or given by --init."""
    with run.stage("iter0/sft") as stage:
        if stage.done:
            return
        if args.init:
            policy, tokenizer = read_model(args.init, run.device)
            log = []
        else:
            prior = fit_prior(games.train)
            tokenizer = train_tokenizer(games.train, prior, args.seed)
            run.seed_torch("policy")
            policy = Transformer(Config(len(tokenizer), args.dim, args.layers, args.heads, args.kv_heads, args.hidden, args.context)).to(run.device)
            log = train_sft(policy, tokenizer, games.train, prior, demos=args.demos, updates=args.sft_updates, glanced=args.glances, lr=args.sft_lr,
                            batch=args.sft_batch, seed=args.seed, mistakes=args.mistakes, obs_weight=args.obs_weight, max_steps=args.max_steps,
                            state=stage.state)
        save_model(run.path / "iter0/policy", policy, tokenizer)
        stage.finish({"parameters": policy.n_parameters(), "log": log})


FROM_DEMONSTRATION = 10 ** 6  # episodes with numbers from here on began at a state of a demonstration


def roll_out(args, run, games, i):
    """Stage 1a: --rollouts episodes of π_{i−1}, shard by shard. -> all trajectories"""
    with run.stage(f"iter{i}/rollouts") as stage:
        order = generator(args.seed, "games", i).permutation(len(games.train))
        each = episodes_of_each_game(args)
        todo = [(games.train[order[g % len(order)]], g // len(order) * each + k)
                for g in range(-(-args.rollouts // each)) for k in range(each)][:args.rollouts]
        if args.reset_frac:
            todo = from_demonstrations(args, run, games, i, todo)
        shards = [(run.path / f"iter{i}/rollouts/{n:05d}.safetensors", todo[start:start + args.shard])
                  for n, start in enumerate(range(0, len(todo), args.shard))]
        if not ranks.first_says(all(file.exists() for file, _ in shards)):
            with tqdm(total=sum(len(episodes) for _, episodes in ranks.mine(shards)), desc=f"rollouts {i}", unit="episode", dynamic_ncols=True) as bar:
                for ended, won in play_shards(ranks.mine(shards), run.path / f"iter{i - 1}/policy", run.device, run.workers, temperature=args.rollout_temperature,
                                              seed=key(f"rollouts {args.seed} {i}"), slots=args.slots, max_steps=args.max_steps):
                    bar.update(ended - bar.n)
                    bar.set_postfix(won=f"{won / max(1, ended):.1%}", refresh=False)
        ranks.wait()
        trajectories = stored_rollouts(run, i)
        if not stage.done:
            actions = sum(map(len, trajectories))
            plain = [t.won for t in trajectories if t.episode < FROM_DEMONSTRATION]
            stage.finish({"episodes": len(trajectories), "success": sum(plain) / len(plain) if plain else None, "begun_in_demonstrations": len(trajectories) - len(plain),
                          "mean_actions": actions / len(trajectories), "inadmissible": float(sum(t.inadmissible.sum() for t in trajectories) / actions),
                          "q_hat_check": held_out_check(trajectories, Tokenizer.load(run.path / f"iter{i - 1}/policy"), args.gamma)})
        return trajectories


def from_demonstrations(args, run, games, i, todo):
    """Reset distribution (P1): let a share of the episodes begin at a random state of a random demonstration."""
    demos = [demo for demo, _ in demonstrations(args, games, Tokenizer.load(run.path / f"iter{i - 1}/policy"))]
    by_id, out = {game.id: game for game in games.train}, []
    for n, episode in enumerate(todo):
        rng = generator(args.seed, "reset", i, n)
        if rng.random() < args.reset_frac:
            demo = demos[rng.integers(len(demos))]
            episode = by_id[demo.game], FROM_DEMONSTRATION + n, demo.ids[:demo.spans[rng.integers(len(demo)), 0]]
        out.append(episode)
    return out


def stored_rollouts(run, i):
    """The rollouts of π_{i−1}."""
    return [t for file in sorted(run.path.glob(f"iter{i}/rollouts/*.safetensors")) for t in load_trajectories(file)]


def episodes_of_each_game(args):
    """--rollouts-per-game, or fewer where --rollouts would not reach --min-games games that way: 16 of 70,000, 1 of 4,000."""
    return max(1, min(args.rollouts_per_game, args.rollouts // args.min_games))


def process_reward_model(args, run, games, i, trajectories):
    """Stage 1b and 2: labels of the rollouts, held out by task folder; Q_i starts from π_{i−1}."""
    with run.stage(f"iter{i}/prm") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i - 1}/policy", run.device)
        folders = sorted({t.game.split("/")[0] for t in trajectories})
        chosen = generator(args.seed, "held out", i).permutation(len(folders))[:max(1, min(round(args.held_out * len(folders)), len(folders) - 1))]
        held = {folders[f] for f in chosen}
        fit, test = ([t for t in trajectories if (t.game.split("/")[0] in held) == out] for out in (False, True))
        table, test_table = q_table(fit, tokenizer, args.gamma), q_table(test, tokenizer, args.gamma)
        prm = policy.with_score_head("relative" if args.prm_loss == "bt" else "score")
        options = dict(lr=args.prm_lr, batch=args.prm_batch, obs_weight=args.prm_obs_weight, seed=key(f"prm {args.seed} {i}"), state=stage.state, name=f"PRM {i}")
        if args.algo == "inverseprm":
            rollouts = [t for j in range(1, i) for t in stored_rollouts(run, j)] + fit
            log = train_inverse_prm(prm, policy, tokenizer, demonstrations(args, games, tokenizer, held), rollouts, games.counts, gamma=args.gamma,
                                    updates=args.inverse_updates, temperature=args.rollout_temperature, hide_ends=args.hide_ends, **options)
        else:
            log = train_prm(prm, tokenizer, fit, objective(args, fit, table), games.counts, epochs=args.prm_epochs, **options)
        prm.eval()
        save_model(run.path / f"iter{i}/prm", prm, tokenizer)
        stage.finish({"held_out": report(prm, test, labels_of(test, test_table), test_table, preference_pairs(test, test_table, args.delta)[0]),
                      "visits": visit_statistics(table), "preferences": preference_pairs(fit, table, args.delta)[1], "log": log})


def objective(args, trajectories, table):
    """What --prm-loss and --targets ask of Q."""
    labels = labels_of(trajectories, table)
    if args.prm_loss == "bt":
        return prefer(trajectories, preference_pairs(trajectories, table, args.delta)[0])
    if args.prm_loss == "promise-progress":
        targets = {"mc": lambda i, M: (labels[i][0], np.diff(labels[i][0], prepend=0)),
                   "td-gae": lambda i, M: td_gae(M, 0, trajectories[i].reward, args.gamma, args.gae_lambda),  # M_{−1} cancels in Q̂_0
                   "sarsa": lambda i, M: sarsa(M, 0, trajectories[i].reward, args.gamma, args.gae_lambda)}
        return promise_and_progress(trajectories, targets[args.targets], args.progress_weight)
    return fit_labels(labels, actions_of(trajectories))


def demonstrations(args, games, tokenizer, held=()):
    """Those that π_0 was trained on, without those of the task folders `held`. -> [(Trajectory, taught (T,) bool)]"""
    demos = expert_trajectories(games.train, fit_prior(games.train), tokenizer, demos=args.demos, seed=args.seed, mistakes=args.mistakes,
                                max_steps=args.max_steps, context=args.context)
    return [demo for demo in demos if demo[0].game.split("/")[0] not in held]


def improve(args, run, games, i, trajectories):
    """Stage 3: online DPO from π_{i−1}, judged by Q_i, held near π_{i−1} (or π_0: --ref init), at states of all rollouts so far."""
    with run.stage(f"iter{i}/dpo") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i - 1}/policy", run.device)
        reference, _ = read_model(run.path / f"iter{i - 1 if args.ref == 'prev' else 0}/policy", run.device)
        prm, _ = read_model(run.path / f"iter{i}/prm", run.device, "score")
        earlier = [t for j in range(1, i) for t in stored_rollouts(run, j)] if args.states_of == "all" else []
        q = lambda f: 1 / (1 + np.exp(-f))
        gain = {("win", "score"): lambda t, f: better_than_expected(t, q(f), args.gamma), ("progress", "score"): lambda t, f: progress(t, q(f)),
                ("win", "relative"): lambda t, f: better_than_expected(t, np.zeros(len(t)), args.gamma)}[args.imitate_by, prm.config.head]
        weigh = lambda some: [imitated(t, gain(t, f), args.obs_weight) for t, f in zip(some, score(prm, some))]
        judge = lambda tree: tree.scores(prm) if prm.config.head == "relative" else tree.scores(prm).sigmoid()
        log = online_dpo(policy, reference, judge, tokenizer, earlier + trajectories, games.counts, pairs=args.pairs,
                         beta=args.beta, lr=args.dpo_lr, temperature=args.dpo_temperature, proposals=args.proposals, seed=key(f"dpo {args.seed} {i}"),
                         state=stage.state, trunks=args.dpo_batch, states_per_trunk=args.states_per_trajectory, min_gap=args.min_gap,
                         imitate=args.imitate, weigh=weigh, name=f"DPO {i}")
        save_model(run.path / f"iter{i}/policy", policy, tokenizer)
        stage.finish({"log": log})


def evaluate(args, run, i, split, games, episodes_per_game):
    """Success of π_i on a split."""
    with run.stage(f"iter{i}/eval-{split}") as stage:
        if stage.done:
            return
        policy, tokenizer = read_model(run.path / f"iter{i}/policy", run.device)
        stage.finish({"split": split, **evaluate_policy(policy, tokenizer, games, episodes_per_game=episodes_per_game, slots=args.slots,
                                                       temperature=args.eval_temperature, max_steps=args.max_steps, seed=args.seed,
                                                       name=f"π_{i} on {split}")})


# --- flags -------------------------------------------------------------------------------------------------------------

SMOKE = dict(games="generated", n_generated=120, dev_games=16, glances=150, demos=300, sft_updates=250, sft_lr=5e-3, rollouts=96, min_games=12, shard=48, pairs=256,
             dpo_batch=4, dpo_lr=3e-4, min_gap=0.0, iters=3, dim=64, layers=2, heads=4, kv_heads=2, hidden=128, episodes_per_game=1, dev_episodes=1)


def parse_flags(argv=None):
    """The command line -> namespace. UserError for values out of range."""
    parser = Parser(__doc__)
    small = []  # flags that are whole numbers of at least 1

    def add(group, flag, default, help, **kw):
        if type(default) in (int, float) and "type" not in kw:
            kw["type"] = type(default)
        if kw.get("type", type(default)) is int and flag not in ("--seed", "--glances"):
            small.append(flag[2:].replace("-", "_"))
        group.add_argument(flag, default=default, help=help, **kw)

    g = parser.add_argument_group("run")
    add(g, "--iters", 3, "iterations of rollouts, PRM and DPO")
    add(g, "--rollouts", 70000, "episodes an iteration, in all")
    add(g, "--rollouts-per-game", 16, "episodes of each game, at most; games in shuffled order, each once before any twice")
    add(g, "--min-games", 4000, "games an iteration plays at least, if there are so many: where --rollouts are few, there are fewer of each game", metavar="N")
    add(g, "--max-steps", 30, "actions after which an episode is cut")
    add(g, "--out", "runs/default", "the run directory; an existing one is continued", metavar="DIR")
    add(g, "--seed", 0, "names all randomness")
    add(g, "--device", "auto", "auto, cpu or cuda")
    add(g, "--threads", None, "CPU threads (default: all cores)", type=int, metavar="N")
    g.add_argument("--smoke", action="store_true", help="every stage at tiny size, on generated games")
    g = parser.add_argument_group("games")
    add(g, "--data", None, "folder that holds json_2.1.1 (default: $ALFWORLD_DATA, else alfworld's cache)", metavar="DIR")
    add(g, "--games", "auto", "where games come from: auto takes ALFWorld's if there, else generates", choices=("auto", "alfworld", "generated"))
    add(g, "--n-generated", 3553, "generated train games (a quarter as many for each test split)", metavar="N")
    add(g, "--dev-games", 200, "train games held out by task folder, for every choice", metavar="N")
    add(g, "--test-splits", ["valid_seen", "valid_unseen"], "splits to report on, where they exist", nargs="*", metavar="NAME")
    g = parser.add_argument_group("model")
    add(g, "--dim", 128, "width")
    add(g, "--layers", 4, "layers")
    add(g, "--heads", 4, "attention heads")
    add(g, "--kv-heads", 2, "heads of keys and values (grouped-query attention)")
    add(g, "--hidden", 384, "width of the feed-forward")
    add(g, "--context", 2048, "longest episode, in tokens; longer ones are cut as by the step cap")
    g = parser.add_argument_group("π_0: supervised fine-tuning")
    add(g, "--init", None, "start from this policy instead", metavar="DIR")
    add(g, "--demos", 700, "demonstrations")
    add(g, "--sft-updates", 500, "updates at least; demonstrations are told again with other numbers")
    add(g, "--glances", 300, "updates before them on single turns of the demonstrations, for the policy to learn to look")
    add(g, "--mistakes", 0.15, "chance that the demonstrator makes a mistake at a step, which is shown but not taught")
    add(g, "--obs-weight", 0.3, "weight of observation tokens in the loss")
    add(g, "--sft-lr", 2.5e-3, "learning rate")
    add(g, "--sft-batch", 16, "demonstrations an update")
    g = parser.add_argument_group("stage 1: rollouts and labels")
    add(g, "--rollout-temperature", 1.0, "sampling temperature of rollouts")
    add(g, "--reset-frac", 0.0, "share of the rollouts that begin at a random state of a demonstration (Reset-50-50: 0.5)", metavar="P")
    add(g, "--slots", None, "episodes in flight at once in a process (default: 128 on a CPU, 1024 on a GPU, fewer of a large model)", type=int, metavar="N")
    add(g, "--shard", 1000, "episodes a shard, the unit of resuming")
    add(g, "--gamma", 0.95, "discount")
    g = parser.add_argument_group("stage 2: PRM")
    add(g, "--prm-lr", 2e-3, "learning rate")
    add(g, "--prm-epochs", 2.0, "passes over the labels")
    add(g, "--prm-batch", 16, "trajectories an update")
    add(g, "--prm-obs-weight", 1.0, "weight of a second loss, on the world's answers to the actions")
    add(g, "--algo", "agentprm", "agentprm: Q from the rollouts' outcomes; inverseprm: from the demonstrations alone", choices=("agentprm", "inverseprm"))
    add(g, "--prm-loss", "bce", "bce: Q near its label; bt: f higher for the better of two actions of a state; promise-progress: Q and its change near their labels",
        choices=("bce", "bt", "promise-progress"))
    add(g, "--targets", "mc", "labels of promise and progress: mc, Monte Carlo; td-gae and sarsa bootstrap on the PRM's own values", choices=("mc", "td-gae", "sarsa"))
    add(g, "--delta", 0.03, "bt: how much better the better action must be")
    add(g, "--gae-lambda", 0.95, "td-gae, sarsa: λ")
    add(g, "--progress-weight", 1.0, "promise-progress: weight of progress")
    add(g, "--inverse-updates", 500, "inverseprm: updates")
    g.add_argument("--hide-ends", action="store_true", help="inverseprm: do not show that an episode ended by itself")
    add(g, "--held-out", 0.15, "share of task folders held out of the labels, to judge the PRM")
    g = parser.add_argument_group("stage 3: online DPO")
    add(g, "--ref", "prev", "reference policy: prev is π_{i−1}, init is π_0", choices=("prev", "init"))
    add(g, "--beta", 0.03, "weight of the KL to the reference")
    add(g, "--pairs", 12500, "states an iteration at which the policy proposes actions; the best and the worst make a pair")
    add(g, "--proposals", 4, "actions it proposes at each (the paper: 2)")
    add(g, "--dpo-lr", 2.5e-3, "learning rate")
    add(g, "--dpo-temperature", 1.0, "temperature at which they are sampled, and of their log-probabilities")
    add(g, "--dpo-batch", 16, "trajectories an update")
    add(g, "--states-per-trajectory", 1, "states of each")
    add(g, "--states-of", "all", "whose rollouts give the states: all, those of every iteration so far; last, those of π_{i−1} alone (the paper)", choices=("all", "last"))
    add(g, "--imitate", 5.0, "weight of the likelihood of what won rollouts did better than the PRM expected; 0: DPO alone")
    add(g, "--imitate-by", None, "win: what won rollouts did better than the PRM expected; progress: what raised the PRM's value, won or not "
        "(default: win, for inverseprm progress)", choices=("win", "progress"))
    add(g, "--min-gap", 0.02, "smallest difference of Q that makes a preference")
    g = parser.add_argument_group("evaluation")
    add(g, "--eval-temperature", 0.3, "sampling temperature")
    add(g, "--dev-episodes", 2, "episodes a dev game")
    add(g, "--episodes-per-game", 5, "episodes a test game")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    for name in small:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name, low, high in (("gamma", 0, 1), ("mistakes", 0, 0.9), ("held_out", 0, 0.9), ("beta", 1e-9, 1e9), ("rollout_temperature", 0, 100),
                            ("eval_temperature", 0, 100), ("dpo_temperature", 1e-3, 100), ("seed", 0, 2 ** 31), ("glances", 0, 1e9), ("prm_epochs", 1e-9, 1e9),
                            *((lr, 1e-12, 10) for lr in ("sft_lr", "prm_lr", "dpo_lr")), ("obs_weight", 0, 10), ("prm_obs_weight", 0, 10), ("min_gap", 0, 1), ("imitate", 0, 1e9),
                            ("delta", 0, 1), ("reset_frac", 0, 1), ("gae_lambda", 0, 1), ("progress_weight", 0, 1e9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie in {low:g} … {high:g}")
    if args.rollouts <= episodes_of_each_game(args):
        raise UserError(f"--rollouts {args.rollouts}: must be enough for two games, one of them is held out of the labels")
    inverse, bt = args.algo == "inverseprm", args.prm_loss == "bt"
    if inverse and args.prm_loss != "bce":
        raise UserError(f"--prm-loss {args.prm_loss}: --algo inverseprm has a loss of its own")
    if args.targets != "mc" and args.prm_loss != "promise-progress":
        raise UserError(f"--targets {args.targets}: labels that bootstrap are for --prm-loss promise-progress")
    if args.imitate_by is None:
        args.imitate_by = "progress" if inverse else "win"
    if inverse and args.imitate_by == "win":
        raise UserError("--imitate-by win reads outcomes, which --algo inverseprm does without: progress")
    if bt and args.imitate_by == "progress":
        raise UserError("--imitate-by progress compares values of different states, which --prm-loss bt leaves open: win")
    if args.proposals < 2:
        raise UserError(f"--proposals {args.proposals}: it takes two to compare")
    if args.context < 256:
        raise UserError(f"--context {args.context}: must be at least 256, to hold a first observation")
    return args


if __name__ == "__main__":
    sys.exit(command_line(main))
