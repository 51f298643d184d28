"""The flags of train.py, in groups, with their defaults, and what they may be."""

import math
import sys
from argparse import BooleanOptionalAction
from pathlib import Path

from common import Parser, UserError, a_temperature, changes, read_json
from env import TASK_TYPES
from games import COMPLETE, GAMES

SMOKE = dict(out="runs/smoke", games="generated", n_generated=120, dev_games=16, dim=64, layers=2, heads=4, kv_heads=2, hidden=128, demos=300,
             glances=150, searches=10, sft_updates=250, sft_lr=5e-3, rollouts=96, min_games=12, shard=48, checks=50, check_batch=8,
             inverse_updates=50, pairs=256, dpo_batch=4, dpo_lr=3e-4, min_gap=0.0, iters=3, episodes_per_game=1, dev_episodes=1)
# without effect beside --init
OF_SFT = "dim layers heads kv_heads hidden sft_updates glances searches detours sparse own_names sft_lr sft_weight_decay sft_batch".split()
OF_DEMONSTRATIONS = "demos mistakes demo_noise max_steps seed".split()
MANY = 20_000  # rollouts an iteration, from which on the PRM looks at each once, and the policy has more to learn from


def episodes_of_each_game(args):
    """--rollouts-per-game, or fewer where --rollouts would not reach --min-games games that way: 16 of 70,000, 1 of 4,000."""
    return max(1, min(args.rollouts_per_game, args.rollouts // args.min_games))


def parse_flags(argv=None, doc=None):
    """The command line -> namespace. UserError for values out of range, and for flags that contradict each other."""
    parser = Parser(doc)
    ranges = {}  # of flags that are numbers

    def add(group, flag, default, help, low=None, high=None, **kw):
        """A flag; a whole number is at least 1 where nothing else is said."""
        if type(default) in (int, float):
            kw.setdefault("type", type(default))
        if kw.get("type") in (int, float):
            ranges[flag] = (1 if low is None and kw["type"] is int else low, high)
        group.add_argument(flag, default=default, help=help, **kw)

    g = parser.add_argument_group("run")
    add(g, "--iters", 3, "iterations of rollouts, PRM and DPO; 0: π_0 alone", low=0)
    add(g, "--rollouts", 70000, "episodes an iteration, in all")
    add(g, "--rollouts-per-game", 16, "episodes of each game, at most; games in shuffled order, each once before any twice")
    add(g, "--min-games", 4000, "games an iteration plays at least, if there are so many: where --rollouts are few, there are fewer of each game",
        metavar="N")
    add(g, "--max-steps", 30, "actions after which an episode is cut")
    add(g, "--out", "runs/default", "the run directory; an existing one is continued", metavar="DIR")
    add(g, "--seed", 0, "names all randomness", low=0, high=2 ** 31)
    add(g, "--device", "auto", "auto, cpu or cuda")
    add(g, "--threads", None, "CPU threads (default: all cores)", type=int, metavar="N")
    g.add_argument("--smoke", action="store_true", help="every stage at tiny size, on generated games")
    g = parser.add_argument_group("games")
    add(g, "--data", None, "folder that holds json_2.1.1 (default: $ALFWORLD_DATA, else alfworld's cache)", metavar="DIR")
    add(g, "--games", "auto", "where games come from: auto takes ALFWorld's if there, else generates; tiny: small generated ones of short tasks",
        choices=GAMES)
    add(g, "--n-generated", COMPLETE["train"], "generated train games (a quarter as many for each test split)", metavar="N")
    add(g, "--dev-games", 200, "train games held out by task folder, for every choice", metavar="N")
    add(g, "--without", None, "leave the games of a task type out of train and dev, to see how it fares untrained", choices=TASK_TYPES)
    add(g, "--test-splits", ["valid_seen", "valid_unseen"], "splits to report on, where they exist", nargs="*", metavar="NAME")
    g = parser.add_argument_group("model")
    add(g, "--dim", 128, "width")
    add(g, "--layers", 4, "layers")
    add(g, "--heads", 4, "attention heads")
    add(g, "--kv-heads", 2, "heads of keys and values (grouped-query attention)")
    add(g, "--hidden", 384, "width of the feed-forward")
    add(g, "--context", 2048, "longest episode, in tokens; longer ones are cut as by the step cap", low=256)
    g = parser.add_argument_group("π_0: supervised fine-tuning")
    add(g, "--init", None, "start from this policy instead; it keeps its size, and of the flags here --demos, --mistakes, --demo-noise, --exchange "
        "and --obs-weight still count (and --seed, for the demonstrations to be the same)", metavar="DIR")
    add(g, "--demos", 400, "demonstrations")
    add(g, "--sft-updates", 1500, "updates at least; demonstrations are told again with other numbers each time")
    add(g, "--glances", 400, "updates before them on single turns of the demonstrations, for the policy to learn to look", low=0)
    add(g, "--searches", 60, "rooms of the demonstrations gone through in order, told in each of these updates too (none with --demo-noise)", low=0)
    add(g, "--mistakes", 0.15, "chance that the demonstrator makes a mistake at a step, which is shown but not taught", low=0, high=0.9)
    add(g, "--demo-noise", 0.0, "chance that the demonstrator acts at random, which is taught as if it were right", metavar="P", low=0, high=1)
    add(g, "--exchange", 0.3, "share of the demonstrations, and of the rollouts in training, in which the name of the wanted thing and another are "
        "exchanged throughout", metavar="P", low=0, high=1)
    add(g, "--detours", 0.5, "share of the demonstrations told with a walk that leads nowhere before one of their actions, shown and not taught",
        metavar="P", low=0, high=1)
    add(g, "--sparse", 0.7, "SFT: share of the demonstrations told in a room with less in it of what they do not need, another each time",
        metavar="P", low=0, high=1)
    g.add_argument("--own-names", action=BooleanOptionalAction, default=False,
                   help="SFT: no part of the embedding is shared among the numbers of a name, and of a number among names")
    add(g, "--obs-weight", 0.3, "weight of observation tokens in the loss, and in what stage 3 imitates", low=0, high=10)
    add(g, "--sft-lr", 2.5e-3, "learning rate", low=1e-12, high=10)
    add(g, "--sft-weight-decay", 0.5, "weight decay: the few demonstrations are told again and again, and would be learned by heart", low=0, high=10)
    add(g, "--sft-batch", 16, "demonstrations an update")
    g = parser.add_argument_group("stage 1: rollouts and labels")
    add(g, "--rollout-temperature", 1.0, "sampling temperature of rollouts; 0 is greedy", type=a_temperature, metavar="X")
    add(g, "--reset-frac", 0.0, "share of the rollouts that begin at a random state of a demonstration (Reset-50-50: 0.5)",
        metavar="P", low=0, high=1)
    add(g, "--steer", 0.0, "share of the rollouts that are told a strategy, which π_0 learns in as large a share of its lessons, demonstrated anew "
        "for each (0.5)", metavar="P", low=0, high=1)
    add(g, "--slots", None, "episodes in flight at once in a process (default: 128 on a CPU, 1024 on a GPU, fewer of a large model)",
        type=int, metavar="N")
    add(g, "--shard", 1000, "episodes a shard, the unit of resuming")
    add(g, "--gamma", 0.95, "discount", low=0.01, high=1)
    add(g, "--forks", 0, "rollouts forked behind every action of every rollout, whose returns make its label (the second paper's baseline); 0: none",
        metavar="K", low=0)
    g = parser.add_argument_group("stage 2: PRM")
    add(g, "--checks", 1000, "updates before the lessons on the demonstrations' actions, each against a wrong one, for the PRM to learn to check "
        "(inverseprm goes on with it beside them); 0: none", metavar="N", low=0)
    add(g, "--check-batch", 16, "demonstrations an update")
    add(g, "--prm-lr", 2e-3, "learning rate, of the checks too", low=1e-12, high=10)
    add(g, "--prm-epochs", None, f"passes over the labels (default: 1, as in the paper; 2 of fewer than {MANY:,} rollouts)",
        type=float, metavar="N", low=1e-9)
    add(g, "--prm-batch", 16, "trajectories an update")
    add(g, "--prm-obs-weight", 1.0, "weight of a second loss, on the world's answers to the actions", low=0, high=10)
    add(g, "--algo", "agentprm", "agentprm: Q from the rollouts' outcomes; inverseprm: from the demonstrations alone",
        choices=("agentprm", "inverseprm"))
    add(g, "--prm-loss", "bce", "bce: Q near its label; bt: f higher for the better of two actions of a state; "
        "promise-progress: Q and its change near their labels", choices=("bce", "bt", "promise-progress"))
    add(g, "--targets", "mc", "labels of promise and progress: mc, Monte Carlo; td-gae and sarsa bootstrap on the PRM's own values",
        choices=("mc", "td-gae", "sarsa"))
    add(g, "--delta", 0.03, "how much better the better action of a pair must be: of those that bt learns from, and that the PRM's report card asks",
        low=0, high=1)
    add(g, "--gae-lambda", 0.95, "td-gae, sarsa: λ", low=0, high=1)
    add(g, "--progress-weight", 1.0, "promise-progress: weight of progress", low=0)
    add(g, "--inverse-updates", 500, "inverseprm: updates")
    g.add_argument("--hide-ends", action="store_true", help="inverseprm: do not show that an episode ended by itself")
    g.add_argument("--rest", action="store_true", help="inverseprm: an episode that ended goes on resting, counted until the cap, which the expert "
                   "does longer, and valued for ever; without, the paper's reward")
    add(g, "--state", "history", "what returns are averaged over: rollouts with the same history (the paper), or with the same state of the world "
        "(ours)", choices=("history", "world"))
    add(g, "--curiosity", 0.0, "bonus for rarely visited (s, a): this much over the root of its visits, added to Q̂", metavar="C", low=0, high=1)
    add(g, "--shape-with", None, "shape Q̂ by the values of a reference policy, which the PRM in this iteration of a run has learned, "
        "such as runs/default/iter3", metavar="DIR")
    add(g, "--shape", "difference", "difference: Q̂ + γV(s') − V(s), as in the public code; potential: Q̂ − V(s)",
        choices=("difference", "potential"))
    add(g, "--ensemble", 1, "PRMs, which differ in the order of their lessons")
    add(g, "--ensemble-by", "mean", "how they judge together", choices=("mean", "min"))
    add(g, "--held-out", 0.15, "share of task folders held out of the labels, at least one, to judge the PRM", low=0, high=0.9)
    g = parser.add_argument_group("stage 3: online DPO")
    add(g, "--ref", "prev", "reference policy: prev is π_{i−1}, init is π_0", choices=("prev", "init"))
    add(g, "--beta", 0.03, "weight of the KL to the reference", low=1e-9)
    add(g, "--pairs", None, f"states an iteration at which the policy proposes actions; the best and the worst make a pair (default: 12,500; 50,000 "
        f"from {MANY:,} rollouts on). Stage 3 has --pairs / (--dpo-batch × --states-per-trajectory) updates, with --proposals 0 too",
        type=int, metavar="N")
    add(g, "--proposals", 4, "actions it proposes at each, at least 2 (the paper); 0: no pairs, imitation alone", low=0)
    add(g, "--dpo-lr", 2.5e-3, "learning rate", low=1e-12, high=10)
    add(g, "--dpo-temperature", 1.0, "temperature at which they are sampled, and of their log-probabilities", low=0.001, high=100)
    add(g, "--dpo-batch", 16, "trajectories an update")
    add(g, "--states-per-trajectory", 1, "states of each")
    add(g, "--states-of", "all", "whose rollouts give the states: all, those of every iteration so far; last, those of π_{i−1} alone (the paper)",
        choices=("all", "last"))
    add(g, "--imitate", 5.0, "weight of the likelihood of what won rollouts did, setbacks left out; 0: DPO alone", low=0)
    add(g, "--imitate-by", None, "win: what won rollouts did that was no setback by the PRM's values; surplus: what they did by how much better they "
        "went than the PRM expected (self-imitation); progress: what raised the PRM's value, won or not; outcome: all that won rollouts did, no PRM "
        "asked; all: every admissible action alike, a control (default: win; inverseprm imitates rollouts by how much more their learned return is "
        "than the average)", choices=("win", "surplus", "progress", "outcome", "all"))
    add(g, "--imitate-detours", 1.0, "share of what is imitated that is told with a walk that leads nowhere, as demonstrations are by --detours",
        metavar="P", low=0, high=1)
    add(g, "--unlearn", 1.0, "weight, beside what is imitated, of unlearning what the world did not accept, in all rollouts: "
        "−log(1 − π(a|s)); 0: none", low=0)
    add(g, "--average", 0.5, "share of the updates, the last ones, whose weights' mean is the new policy; 0: the last weights (the paper)",
        metavar="P", low=0, high=1)
    g.add_argument("--track-hacking", action="store_true", help="log the PRM's score beside true success on dev, some twenty times an iteration")
    add(g, "--min-gap", 0.02, "smallest difference of Q (of f, where the PRM compares actions of one state only) that makes a preference", low=0)
    g = parser.add_argument_group("evaluation")
    add(g, "--eval-temperature", 0.3, "sampling temperature; 0 is greedy", type=a_temperature, metavar="X")
    add(g, "--dev-episodes", 2, "episodes a dev game")
    add(g, "--episodes-per-game", 5, "episodes a test game")
    if "--smoke" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    for flag, (low, high) in ranges.items():
        x = getattr(args, flag[2:].replace("-", "_"))
        if x is not None and not ((low is None or low <= x) and (high is None or x <= high) and math.isfinite(x)):
            raise UserError(f"{flag} {x:g}: must " + (f"be at least {low:g}" if high is None else f"lie in {low:g} … {high:g}"))
    for complaint in complaints(args, lambda flag: getattr(args, flag[2:].replace("-", "_")) != parser.get_default(flag[2:].replace("-", "_"))):
        raise UserError(complaint)
    if args.prm_epochs is None:
        args.prm_epochs = 1.0 if args.rollouts >= MANY else 2.0
    if args.pairs is None:
        args.pairs = 50_000 if args.rollouts >= MANY else 12_500
    # they are told in the updates of glances, and are what a demonstrator does who is never at random
    args.searches *= bool(args.glances and not args.demo_noise)
    args.imitate_by = args.imitate_by or ("expert" if args.algo == "inverseprm" else "win")
    return args


def complaints(args, changed):
    """What does not go together, or would be ignored, one line each. `changed`(flag): whether it is not at its default."""
    inverse, bt, promise, bootstrapped = args.algo == "inverseprm", args.prm_loss == "bt", args.prm_loss == "promise-progress", args.targets != "mc"
    for flag, needs, there in (
            ("--hide-ends", "--algo inverseprm", inverse), ("--rest", "--algo inverseprm that sees ends", inverse and not args.hide_ends),
            ("--targets", "--prm-loss promise-progress", promise), ("--gae-lambda", "--targets td-gae or sarsa", bootstrapped),
            ("--shape", "--shape-with", args.shape_with), ("--ensemble-by", "--ensemble of at least 2", args.ensemble > 1),
            ("--imitate-by", "--imitate", args.imitate), ("--imitate-detours", "--imitate", args.imitate), ("--unlearn", "--imitate", args.imitate),
            *((flag, "--proposals", args.proposals) for flag in ("--beta", "--min-gap", "--ref", "--dpo-temperature")),
            ("--inverse-updates", "--algo inverseprm", inverse), ("--data", "ALFWorld's games", args.games not in ("generated", "tiny")),
            ("--progress-weight", "--prm-loss promise-progress", promise),
            ("--prm-epochs", "--algo agentprm", not inverse), ("--check-batch", "--checks", args.checks),
            ("--searches", "--glances, or with --demo-noise", args.glances and not args.demo_noise or not args.searches)):
        if changed(flag) and not there:
            x = getattr(args, flag[2:].replace("-", "_"))
            yield f"{flag}{'' if x is True else f' {x}'} does nothing without {needs}"
    new = lambda record: not Path(args.out, record).exists()  # a run that is continued keeps a copy of what it began from
    init = origin(args.init)[0] if args.init and new("iter0/sft.json") else None
    shape = origin(args.shape_with, "..")[0] if args.shape_with and new("iter0/value.json") else None
    for wrong, complaint in (
            (args.rollouts <= episodes_of_each_game(args),
             f"--rollouts {args.rollouts}: must be enough for two games, one of them is held out of the labels"),
            (args.proposals == 1 or not (args.proposals or args.imitate), f"--proposals {args.proposals}: a pair needs two"
             + (", and without pairs or --imitate stage 3 learns nothing" * (not args.imitate))),
            (inverse and args.prm_loss != "bce", f"--prm-loss {args.prm_loss}: --algo inverseprm has a loss of its own"),
            (inverse and args.imitate_by not in (None, "all"),
             f"--imitate-by {args.imitate_by}: --algo inverseprm imitates by the reward it has learned from the expert"),
            (args.rest and args.gamma == 1, "--rest goes on for ever, which needs --gamma below 1"),
            (inverse and args.prm_batch < 2,
             f"--prm-batch {args.prm_batch}: --algo inverseprm needs a trajectory of the expert's and one of the learner's in each"),
            (args.state == "world" and (inverse or bootstrapped),
             "--state world changes Monte Carlo labels: neither --algo inverseprm nor --targets td-gae has any"),
            ((args.shape_with or args.curiosity or args.forks) and (inverse or bt or bootstrapped),
             "--shape-with, --curiosity and --forks change Monte Carlo labels: "
             "neither --algo inverseprm nor --prm-loss bt nor --targets td-gae has any"),
            (args.forks and (args.shape_with or args.curiosity or args.state == "world"),
             "--forks makes the labels of single rollouts: not with --shape-with, --curiosity or --state world"),
            (args.track_hacking and (inverse or bt),
             "--track-hacking compares values of different states, which neither --prm-loss bt nor --algo inverseprm gives"),
            (args.ensemble_by == "min" and (inverse or bt),
             "--ensemble-by min: each PRM of --prm-loss bt or --algo inverseprm has a constant of its own at every state, "
             "so their least means nothing: mean"),
            (bt and args.imitate_by == "progress", "--imitate-by progress compares values of different states, which --prm-loss bt leaves open: win"),
            (args.reset_frac + args.steer > 1,
             f"--reset-frac {args.reset_frac} and --steer {args.steer}: shares of the same rollouts, together at most 1"),
            (args.dim % args.heads or args.heads % args.kv_heads or args.dim // args.heads % 2,
             f"--dim {args.dim} must be an even multiple of --heads {args.heads}, and these a multiple of --kv-heads {args.kv_heads}"),
            (args.shape_with and (promise or args.track_hacking or args.imitate_by == "progress"),
             "--shape-with: Q is then no value, and --prm-loss promise-progress, --track-hacking and --imitate-by progress take it for one"),
            (shape is not None and not Path(args.shape_with, "prm/config.json").exists(),
             f"--shape-with {args.shape_with}: no PRM there; name an iteration of a run, such as runs/default/iter3"),
            (shape is not None and (shape.get("prm_loss"), shape.get("algo")) != ("bce", "agentprm"),
             f"--shape-with {args.shape_with}: only a PRM of a run with --algo agentprm and --prm-loss bce knows the states' values"),
            *complaints_of_init(args, init, changed)):
        if wrong:
            yield complaint


def complaints_of_init(args, init, changed):
    """What does not go with --init; init: the flags of its run, {} where they are not known, None for a run that needs it no longer.
    -> [(wrong, complaint)]"""
    if init is None:
        return []
    if not Path(args.init, "config.json").exists():
        return [(True, f"--init {args.init}: no model there")]
    context = read_json(Path(args.init, "config.json")).get("max_position_embeddings", args.context)
    unseen = changes({"without": None, "dev_games": 200, **init}, vars(args), ("without", "dev_games")) if init else []  # sft.py has neither flag
    ignored = [flag for flag in (f"--{name.replace('_', '-')}" for name in OF_SFT)
               if changed(flag) and init.get(flag[2:].replace("-", "_")) != getattr(args, flag[2:].replace("-", "_"))]
    return [(args.steer and not init.get("steer"),
             f"--steer {args.steer}: {args.init} is no policy of a run with --steer, and has not learned to follow a strategy; leave --init out"),
            (unseen, f"--init {args.init}: it has been trained on what its run did not hold out and this one does ({'; '.join(unseen)})"),
            (args.context != context, f"--context {args.context}: the policy of --init {args.init} has {context}, give the same"),
            (ignored, f"--init {args.init}: its π_0 was not trained with this {', '.join(ignored)}, which would have no effect")]


def origin(folder, up="../.."):
    """The run that a policy's folder belongs to (of train.py or sft.py, or kept beside the policy): its flags and its games,
    {} where nothing tells them."""
    read = lambda path: read_json(path) if path.exists() else {}
    kept = read(Path(folder, "../run.json"))
    return read(Path(folder, up, "config.json")).get("flags") or kept.get("flags", {}), read(Path(folder, up, "data.json")) or kept.get("data", {})
