"""The flags of train.py, in groups, with their defaults, and what they may be."""

import sys
from pathlib import Path

from common import Parser, UserError, read_json
from env import TASK_TYPES
from games import GAMES

SMOKE = dict(games="generated", n_generated=120, dev_games=16, glances=150, checks=50, check_batch=8, demos=300, sft_updates=250, sft_lr=5e-3, rollouts=96, min_games=12, shard=48, pairs=256,
             dpo_batch=4, dpo_lr=3e-4, min_gap=0.0, iters=3, dim=64, layers=2, heads=4, kv_heads=2, hidden=128, episodes_per_game=1, dev_episodes=1, out="runs/smoke")
MANY = 20_000  # rollouts an iteration, from which on the PRM looks at each once, and the policy has more to learn from


def episodes_of_each_game(args):
    """--rollouts-per-game, or fewer where --rollouts would not reach --min-games games that way: 16 of 70,000, 1 of 4,000."""
    return max(1, min(args.rollouts_per_game, args.rollouts // args.min_games))


def parse_flags(argv=None, doc=None):
    """The command line -> namespace. UserError for values out of range, and for flags that contradict each other."""
    parser = Parser(doc)
    small = []  # flags that are whole numbers of at least 1

    def add(group, flag, default, help, **kw):
        if type(default) in (int, float) and "type" not in kw:
            kw["type"] = type(default)
        if kw.get("type", type(default)) is int and flag not in ("--iters", "--seed", "--glances", "--forks", "--checks"):
            small.append(flag[2:].replace("-", "_"))
        group.add_argument(flag, default=default, help=help, **kw)

    g = parser.add_argument_group("run")
    add(g, "--iters", 3, "iterations of rollouts, PRM and DPO; 0: π_0 alone")
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
    add(g, "--games", "auto", "where games come from: auto takes ALFWorld's if there, else generates; tiny: small generated ones of short tasks", choices=GAMES)
    add(g, "--n-generated", 3553, "generated train games (a quarter as many for each test split)", metavar="N")
    add(g, "--dev-games", 200, "train games held out by task folder, for every choice", metavar="N")
    add(g, "--without", None, "leave the games of a task type out of train and dev, to see how it fares untrained", choices=TASK_TYPES)
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
    add(g, "--demos", 400, "demonstrations")
    add(g, "--sft-updates", 1500, "updates at least; demonstrations are told again with other numbers")
    add(g, "--glances", 300, "updates before them on single turns of the demonstrations, for the policy to learn to look")
    add(g, "--mistakes", 0.15, "chance that the demonstrator makes a mistake at a step, which is shown but not taught")
    add(g, "--demo-noise", 0.0, "chance that the demonstrator acts at random, which is taught as if it were right", metavar="P")
    add(g, "--exchange", 0.3, "share of the demonstrations, and of the rollouts in training, told of another thing than the task asked for", metavar="P")
    add(g, "--obs-weight", 0.3, "weight of observation tokens in the loss")
    add(g, "--sft-lr", 2.5e-3, "learning rate")
    add(g, "--sft-batch", 16, "demonstrations an update")
    g = parser.add_argument_group("stage 1: rollouts and labels")
    add(g, "--rollout-temperature", 1.0, "sampling temperature of rollouts")
    add(g, "--reset-frac", 0.0, "share of the rollouts that begin at a random state of a demonstration (Reset-50-50: 0.5)", metavar="P")
    add(g, "--steer", 0.0, "share of the rollouts that are told a strategy, which π_0 learns in as large a share of its lessons, demonstrated anew for each (0.5)", metavar="P")
    add(g, "--slots", None, "episodes in flight at once in a process (default: 128 on a CPU, 1024 on a GPU, fewer of a large model)", type=int, metavar="N")
    add(g, "--shard", 1000, "episodes a shard, the unit of resuming")
    add(g, "--gamma", 0.95, "discount")
    add(g, "--forks", 0, "rollouts forked behind every action of every rollout, whose returns make its label (the second paper's baseline); 0: none", metavar="K")
    g = parser.add_argument_group("stage 2: PRM")
    add(g, "--checks", 1000, "updates before the lessons on the demonstrations' actions, each against a wrong one, for the PRM to learn to check; 0: none", metavar="N")
    add(g, "--check-batch", 16, "demonstrations an update")
    add(g, "--prm-lr", 2e-3, "learning rate")
    add(g, "--prm-epochs", None, f"passes over the labels (default: 1, as in the paper; 2 of fewer than {MANY:,} rollouts)", type=float, metavar="N")
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
    add(g, "--state", "history", "what returns are averaged over: rollouts with the same history (the paper), or with the same state of the world (ours)", choices=("history", "world"))
    add(g, "--curiosity", 0.0, "bonus for rarely visited (s, a): this much over the root of its visits, added to Q̂", metavar="C")
    add(g, "--shape-with", None, "shape Q̂ by the values of a reference policy, which the PRM in this iteration of a run has learned, such as runs/default/iter3", metavar="DIR")
    add(g, "--shape", "difference", "difference: Q̂ + γV(s') − V(s), as in the public code; potential: Q̂ − V(s)", choices=("difference", "potential"))
    add(g, "--ensemble", 1, "PRMs, which differ in the order of their lessons")
    add(g, "--ensemble-by", "mean", "how they judge together", choices=("mean", "min"))
    add(g, "--held-out", 0.15, "share of task folders held out of the labels, to judge the PRM")
    g = parser.add_argument_group("stage 3: online DPO")
    add(g, "--ref", "prev", "reference policy: prev is π_{i−1}, init is π_0", choices=("prev", "init"))
    add(g, "--beta", 0.03, "weight of the KL to the reference")
    add(g, "--pairs", None, f"states an iteration at which the policy proposes actions; the best and the worst make a pair (default: 12,500; 50,000 from {MANY:,} rollouts on)", type=int,
        metavar="N")
    add(g, "--proposals", 4, "actions it proposes at each (the paper: 2)")
    add(g, "--dpo-lr", 2.5e-3, "learning rate")
    add(g, "--dpo-temperature", 1.0, "temperature at which they are sampled, and of their log-probabilities")
    add(g, "--dpo-batch", 16, "trajectories an update")
    add(g, "--states-per-trajectory", 1, "states of each")
    add(g, "--states-of", "all", "whose rollouts give the states: all, those of every iteration so far; last, those of π_{i−1} alone (the paper)", choices=("all", "last"))
    add(g, "--imitate", 5.0, "weight of the likelihood of what won rollouts did better than the PRM expected; 0: DPO alone")
    add(g, "--imitate-by", None, "win: what won rollouts did better than the PRM expected; progress: what raised the PRM's value, won or not; "
        "all: every admissible action alike, a control (default: win; inverseprm imitates what its reward takes for the expert's)", choices=("win", "progress", "all"))
    g.add_argument("--track-hacking", action="store_true", help="log the PRM's score beside true success on dev, some twenty times an iteration")
    add(g, "--min-gap", 0.02, "smallest difference of Q (of f, where the PRM compares actions of one state only) that makes a preference")
    g = parser.add_argument_group("evaluation")
    add(g, "--eval-temperature", 0.3, "sampling temperature")
    add(g, "--dev-episodes", 2, "episodes a dev game")
    add(g, "--episodes-per-game", 5, "episodes a test game")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    if args.prm_epochs is None:
        args.prm_epochs = 1.0 if args.rollouts >= MANY else 2.0
    if args.pairs is None:
        args.pairs = 50_000 if args.rollouts >= MANY else 12_500
    for name in small:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name, low, high in (("gamma", 0.01, 1), ("mistakes", 0, 0.9), ("demo_noise", 0, 1), ("exchange", 0, 1), ("held_out", 0, 0.9), ("beta", 1e-9, 1e9), ("rollout_temperature", 0, 100),
                            ("eval_temperature", 0, 100), ("dpo_temperature", 1e-3, 100), ("seed", 0, 2 ** 31), ("glances", 0, 1e9), ("checks", 0, 1e9), ("forks", 0, 1e6), ("iters", 0, 1e6), ("prm_epochs", 1e-9, 1e9),
                            *((lr, 1e-12, 10) for lr in ("sft_lr", "prm_lr", "dpo_lr")), ("obs_weight", 0, 10), ("prm_obs_weight", 0, 10), ("min_gap", 0, 1e9), ("imitate", 0, 1e9),
                            ("delta", 0, 1), ("curiosity", 0, 1), ("reset_frac", 0, 1), ("steer", 0, 1), ("gae_lambda", 0, 1), ("progress_weight", 0, 1e9)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must lie in {low:g} … {high:g}")
    if args.rollouts <= episodes_of_each_game(args):
        raise UserError(f"--rollouts {args.rollouts}: must be enough for two games, one of them is held out of the labels")
    inverse, bt = args.algo == "inverseprm", args.prm_loss == "bt"
    for flag, used, needs, there in (("--hide-ends", args.hide_ends, "--algo inverseprm", inverse), ("--shape potential", args.shape == "potential", "--shape-with", args.shape_with),
                                     ("--ensemble-by min", args.ensemble_by == "min", "--ensemble of at least 2", args.ensemble > 1)):
        if used and not there:
            raise UserError(f"{flag} does nothing without {needs}")
    if args.state == "world" and (inverse or args.targets != "mc"):
        raise UserError("--state world changes Monte Carlo labels: neither --algo inverseprm nor --targets td-gae has any")
    if args.track_hacking and (inverse or bt):
        raise UserError("--track-hacking compares values of different states, which neither --prm-loss bt nor --algo inverseprm gives")
    if (args.shape_with or args.curiosity or args.forks) and (inverse or bt or args.targets != "mc"):
        raise UserError("--shape-with, --curiosity and --forks change Monte Carlo labels: neither --algo inverseprm nor --prm-loss bt nor --targets td-gae has any")
    if inverse and args.prm_loss != "bce":
        raise UserError(f"--prm-loss {args.prm_loss}: --algo inverseprm has a loss of its own")
    if args.forks and (args.shape_with or args.curiosity or args.state == "world"):
        raise UserError("--forks makes the labels of single rollouts: not with --shape-with, --curiosity or --state world")
    if args.shape_with and not Path(args.shape_with, "prm/config.json").exists():
        raise UserError(f"--shape-with {args.shape_with}: no PRM there; name an iteration of a run, such as runs/default/iter3")
    other = Path(args.shape_with or "", "../config.json")
    if args.shape_with and not (other.exists() and read_json(other)["flags"]["prm_loss"] == "bce" and read_json(other)["flags"]["algo"] == "agentprm"):
        raise UserError(f"--shape-with {args.shape_with}: only a PRM of a run with --algo agentprm and --prm-loss bce knows the states' values")
    config = Path(args.init or "", "../../config.json")
    if args.steer and args.init and not (config.exists() and read_json(config)["flags"].get("steer")):
        raise UserError(f"--steer {args.steer}: {args.init} is no policy of a run with --steer, and has not learned to follow a strategy; leave --init out")
    if args.targets != "mc" and args.prm_loss != "promise-progress":
        raise UserError(f"--targets {args.targets}: labels that bootstrap are for --prm-loss promise-progress")
    if args.ensemble_by == "min" and (inverse or bt):
        raise UserError("--ensemble-by min: each PRM of --prm-loss bt or --algo inverseprm has a constant of its own at every state, so their least means nothing: mean")
    if inverse and args.imitate_by not in (None, "all"):
        raise UserError(f"--imitate-by {args.imitate_by}: --algo inverseprm imitates what its reward takes for the expert's")
    args.imitate_by = args.imitate_by or ("expert" if inverse else "win")
    if bt and args.imitate_by == "progress":
        raise UserError("--imitate-by progress compares values of different states, which --prm-loss bt leaves open: win")
    if args.proposals < 2:
        raise UserError(f"--proposals {args.proposals}: it takes two to compare")
    if args.context < 256:
        raise UserError(f"--context {args.context}: must be at least 256, to hold a first observation")
    return args
