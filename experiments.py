"""The ablations of the README, each a run of train.py with some more flags from the same π_0, and their table.

    python experiments.py                                        # what there is, and the flags of each
    python experiments.py plain bt promise --seeds 0,1,2         # run what is missing, print the rows
    python experiments.py q-hat reference pilot                  # three first experiments, on small games of short tasks

A run lives in runs/experiments/SEED/NAME (the first experiments' in tiny/NAME) and is resumed where it stopped; report.py and curves.py open those
that have an iteration. What it has in common with the plain run, it takes from there: π_0 and, of iteration 1, what no flag of its own changes.
"""

import shlex
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import RESUMED, Parser, UserError, command_line, pad, read_json, read_model, set_up_torch, whole_numbers
from expert import fit_prior
from figures import COLOURS
from flags import parse_flags
from games import games_for, split_dev
from qestimate import held_out_check, history_keys, q_table, visit_statistics, world_keys
from rollout import action_logprobs, rollout
from runs import provenance, same_flags
from tellings import expert_trajectories

# the paper's stage 3; at the learning rate of imitation it drives the policy out of its language (LOG.md)
DPO_ALONE = "--imitate 0 --average 0 --dpo-lr 3e-5"
WIDE = "--min-gap 0.05 --states-per-trajectory 8 --pairs 100000 --track-hacking"  # as many updates, of eight times as many states and of wider gaps
# as wide, and stops before it is hacked
STEPS = f"{DPO_ALONE} --min-gap 0.05 --states-per-trajectory 8 --pairs 10000 --dpo-temperature 0.4 --states-of last"
# what is left of InversePRM without the learned reward: its own admissible actions, all of them, so that unlearning weighs less beside them
CONTROL = "--imitate-by all --proposals 0"
HACKED = f"--imitate 0 --average 0 --dpo-lr 1e-4 {WIDE}"  # three times faster
BASELINES = {  # flags of π_0, which wins about as much as the paper's: 47 to 75 % of dev by the seed (few), 66 (paper)
    # told again and again; without shared names, sparser rooms and searches, with which they would win far more (LOG.md)
    "few": "--demos 230 --own-names --sparse 0 --glances 300 --searches 0",
    # told once each and as they are: the paper's number of them
    "paper": "--demos 10000 --sft-updates 1 --glances 0 --exchange 0 --detours 0 --own-names --sparse 0 --searches 0 --sft-weight-decay 0.01",
}
ABLATIONS = {  # name: flags of train.py beside --iters 1 --rollouts 4000 and those of the baseline; {home} is the folder of the seed's runs
    "plain": "",
    "three": "--iters 3",
    # the paper's method alone, of 16 rollouts a game
    "as-published": f"{DPO_ALONE} --proposals 2 --states-of last --checks 0 --exchange 0 --prm-obs-weight 0 --min-games 1",
    "ref-init": "--iters 3 --ref init",
    "longer": "--pairs 50000",
    "imitation-alone": "--proposals 0",
    "rejection": "--imitate-by outcome --unlearn 0 --proposals 0",  # what won rollouts did, and no PRM: rejection sampling
    "surplus": "--imitate-by surplus",
    "without-checks": "--checks 0",
    "without-exchange": "--exchange 0",
    "shared-names": "--no-own-names",
    "sparse": "--sparse 0.7",
    "searches": "--searches 60",
    "little-decay": "--sft-weight-decay 0.01",
    "without-detours": "--detours 0 --imitate-detours 0",
    "without-unlearning": "--unlearn 0",
    "few-detours": "--imitate-detours 0",  # in demonstrations alone
    "last-states": "--iters 3 --states-of last",
    "longer-sft": "--iters 0 --sft-updates 2281",  # as many updates more as one iteration has
    "longest-sft": "--iters 0 --sft-updates 3843",  # as three iterations have
    "dpo-alone": f"{DPO_ALONE} --track-hacking",
    "dpo-alone-many": f"{DPO_ALONE} --track-hacking --rollouts 16000",
    "dpo-wide": f"{DPO_ALONE} {WIDE}",
    "dpo-wide-many": f"{DPO_ALONE} {WIDE} --rollouts 16000",
    "dpo-steps": f"{STEPS} --iters 3",
    "hacking": HACKED,
    "hacking-many": f"{HACKED} --rollouts 16000",
    "dpo-wide-ensemble": f"{DPO_ALONE} {WIDE} --ensemble 3 --ensemble-by min",  # hacked more slowly
    "of-each": f"{DPO_ALONE} --min-games 250",  # 16 rollouts of each game: what bt is to be compared with
    "bt": f"{DPO_ALONE} --min-games 250 --prm-loss bt",  # it needs states with several actions; and it has no V, so imitation would not be the same
    "inverse": "--algo inverseprm --iters 2",
    "inverse-rest": "--algo inverseprm --iters 2 --rest",
    **{f"inverse-steps{name}": f"--algo inverseprm {STEPS}{flags}" for name, flags in {  # DPO alone by f: what f knows of actions
        "": "", "-rest": " --rest", "-hidden": " --hide-ends",
        "-reset": " --rest --reset-frac 0.5"}.items()},  # the learner acts where the expert stood
    "inverse-control": f"--algo inverseprm --iters 2 {CONTROL}",
    "promise": "--prm-loss promise-progress --targets td-gae",
    "progress": "--prm-loss promise-progress --targets td-gae --imitate-by progress",
    # labels compared: nothing but the PRM is trained
    **{f"labels-{name}": f"--prm-loss promise-progress --prm-obs-weight 0 --pairs 16 {flags}" for name, flags in {
        "mc": "", "td": "--targets td-gae", "td-1": "--targets td-gae --gamma 1", "sarsa": "--targets sarsa",
        "forks": "--forks 4 --rollouts 90 --prm-epochs 88",  # as many sampled tokens as 4,000 rollouts, as many updates
        "forks-8": "--forks 4 --rollouts 720 --prm-epochs 11"}.items()},  # eight times as many tokens
    "reset": "--reset-frac 0.5",
    "steer": "--steer 0.5",
    "unsteered": "",  # from the policy of steer, not told any strategy
    "shape": "--shape-with {home}/three/iter3",
    "shape-potential": "--shape-with {home}/three/iter3 --shape potential",
    "world": "--state world",
    "curiosity": "--state world --curiosity 0.1",  # hardly any history is met twice
    "ensemble": "--ensemble 3",
    "ensemble-min": "--ensemble 3 --ensemble-by min",
    "without-heat": "--without pick_heat_then_place_in_recep",
    **{f"noise-{p}": f"--demo-noise {p / 100} --algo inverseprm" for p in (10, 25, 50)},
    **{f"noise-{p}-sft": f"--iters 0 --demo-noise {p / 100} --sft-updates 2281" for p in (10, 25, 50)},  # cloning for as many updates
}
OWN_POLICY = ("plain", "shared-names", "sparse", "searches", "without-exchange", "little-decay", "without-detours", "longer-sft", "longest-sft",
              "steer", "without-heat", *(name for name in ABLATIONS if name.startswith("noise")))  # where π_0 is trained
OF_STAGE_2 = {*"algo inverse_updates hide_ends rest prm_loss targets state curiosity shape_with shape ensemble ensemble_by prm_epochs "
               "prm_obs_weight".split()}  # but not of the checks before it
OF_STAGE_3 = {*"ref beta pairs proposals dpo_lr dpo_temperature imitate imitate_by imitate_detours unlearn average states_of "
               "states_per_trajectory min_gap track_hacking".split()}
GAMES, DEV = 1200, 200  # of the first experiments
TINY = f"--games tiny --n-generated {GAMES} --dev-games {DEV} --max-steps 15 --glances 300 --searches 0 --checks 300 --demos 400 " \
       "--sft-updates 400 --sft-lr 5e-3 --sparse 0 --sft-weight-decay 0.01 --rollouts 2000 --min-games 1000 --pairs 4800 --dim 64 --layers 2 " \
       "--hidden 128 --test-splits valid_unseen --episodes-per-game 2"  # an iteration takes a minute or two
PILOT = "--iters 2 --algo inverseprm --inverse-updates 200"
OF_EACH, PLAYED = (16, 64, 256), 6400  # q-hat: rollouts of each game, and in all
NOISE = (0.0, 0.1, 0.25, 0.5)  # pilot: chances that the demonstrator acts at random


def train(folder, flags):
    """One run of train.py, unless it is there already. -> its result.json. UserError if what is there had other flags"""
    words = [*shlex.split(flags), "--out", str(folder)]
    flags = vars(parse_flags(words))
    if (folder / "result.json").exists() and read_json(folder / "config.json")["flags"]["iters"] >= flags["iters"]:
        same_flags(folder, flags)
        made, now = (read_json(folder / "config.json").get("commit"), provenance()["commit"])
        if made != now:
            print(f"{folder}: made by commit {made}; this is {now}", file=sys.stderr)
    else:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *words]
        print("$", shlex.join(command), flush=True)
        code = subprocess.run(command, stdout=2).returncode
        if code == 2:
            raise SystemExit(2)  # a mistake that train.py has told
        if code:
            raise UserError(f"{folder}: the run did not finish; the same command goes on with it")
    return read_json(folder / "result.json")


def ablation(args, name, seed):
    """The run of an ablation. -> its folder"""
    home = args.out / str(seed)
    plain = f"--iters 1 --rollouts {args.rollouts} {BASELINES[args.baseline]} --seed {seed} {args.flags} "
    flags = plain + ABLATIONS[name].format(home=shlex.quote(str(home)))
    if name in OWN_POLICY and name != "plain" and parse_flags(shlex.split(flags)) == parse_flags(shlex.split(plain)):
        raise UserError(f"{name}: {ABLATIONS[name]} is in --baseline {args.baseline} already")
    if "--shape-with" in flags:
        ablation(args, "three", seed)
    if name not in OWN_POLICY:
        start = ablation(args, "steer" if name == "unsteered" else "plain", seed)
        flags += f" --init {shlex.quote(str(start / 'iter0/policy'))}"
        share(home / name, flags, start)
    train(home / name, flags)
    return home / name


def in_common(flags, others):
    """The stages of iteration 1 that two runs from one π_0 do alike, by their parsed flags: rollouts and checks, or with the PRM, or none."""
    differ = {flag for flag in others if flags.get(flag) != others[flag]} - {"iters", "out", "init"}
    return [] if differ - OF_STAGE_2 - OF_STAGE_3 else ["rollouts", "checks"] if differ & OF_STAGE_2 else ["rollouts", "checks", "prm"]


def share(folder, flags, start):
    """Copy what the run with these flags has in common with that of its π_0, whose folder is `start`, to where train.py looks for its own work."""
    for stage in in_common(vars(parse_flags(shlex.split(flags))), read_json(start / "config.json")["flags"]):
        done, ours = start / f"iter1/{stage}.json", folder / f"iter1/{stage}.json"
        if done.exists() and not ours.exists():
            shutil.copytree(done.with_suffix(""), ours.with_suffix(""), dirs_exist_ok=True)
            shutil.copy(done, ours)  # last: it says that the stage is done


def spread(values, scale=100, digits=1):
    """Mean and standard deviation, as text."""
    values = [scale * v for v in values if v is not None]
    return "–" if not values else f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def row(folders):
    """What the runs of one ablation came to, over seeds: success of π_0, π_1 and the last policy, and the report card of the first PRM.
    -> cells of text"""
    results = [read_json(folder / "result.json")["rows"] for folder in folders]
    if "--pairs 16 " in ABLATIONS.get(folders[0].name, ""):  # stage 3 was left out
        results = [rows[:1] for rows in results]
    last = len(results[0]) - 1
    cells = [spread([rows[i][split]["success"] for rows in results]) if i <= last and split in results[0][0] else "–"
             for split in ("dev", "valid_seen") for i in (0, 1, max(1, last))]
    if not (folders[0] / "iter1/prm.json").exists():
        return [*cells, *"––––"]
    prms = [read_json(folder / "iter1/prm.json") for folder in folders]
    held_out = [prm["held_out"] for prm in prms]
    return cells + [spread([h.get("pearson_returns") for h in held_out], 1, 2), spread([h["pair_accuracy"] for h in held_out]),
                    *(spread([prm["expert_preferred"][to] for prm in prms]) for to in ("to_policy", "to_chance"))]


HEAD = ("", "dev: π_0", "π_1", "π_last", "valid_seen: π_0", "π_1", "π_last", "correlation with returns", "better of two actions",
        "expert's over the policy's", "over one by chance")


def hacking_curve(folder):
    """What --track-hacking has logged in the first iteration. -> updates, success on dev, mean Q of what is played there"""
    lines = [line for line in read_json(folder / "iter1/dpo.json")["log"] if "true/success" in line]
    return tuple([line[name] for line in lines] for name in ("step", "true/success", "prm/q"))


def draw(path, curves, titles, x, what):
    """Curves {name: (xs, ys of the first figure, of the second)} in two figures side by side, as PNG; needs matplotlib."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no figure: matplotlib is not installed (requirements-dev.txt)", file=sys.stderr)
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5))
    for colour, (name, (xs, *series)) in zip(cycle(COLOURS[1:]), curves.items()):
        for axis, ys in zip(axes, series):
            axis.plot(xs, ys, marker="o", color=colour, label=name)
    for axis, title in zip(axes, titles):
        axis.set(title=title, xlabel=x)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(axis="y", alpha=0.3)
    axes[-1].legend(title=what, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"figure: {path}")


def markdown(head, rows):
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


# --- first experiments, on small games ------------------------------------------------------------------------------------

def tiny_games():
    """-> train, dev; as in the runs with the flags TINY."""
    return split_dev(games_for("tiny", None, "train", GAMES)[0], DEV)


def tiny_start(args):
    """-> folder of the π_0 that q-hat and reference begin with"""
    train(args.out / "tiny/start", f"{TINY} --iters 0 {args.flags}")
    return args.out / "tiny/start/iter0/policy"


def q_hat(args):
    """Is Q̂ of a random policy, and of π_0, worth anything? Against the returns of rollouts that had no part in it, by visits."""
    games, _ = tiny_games()
    prior = fit_prior(games)
    policy, tokenizer = read_model(tiny_start(args))

    def by_chance(games, each, cap=30):  # 30: in 15 it hardly ever wins
        return [t for t, _ in expert_trajectories([game for game in games for _ in range(each)], prior, tokenizer, demos=len(games) * each,
                                                  seed=0, mistakes=0.0, noise=1.0, max_steps=cap)]

    def by_policy(games, each):
        return list(rollout(policy, tokenizer, [(game, k) for game in games for k in range(each)], temperature=1.0, max_steps=15))

    by_id, rows = {game.id: game for game in games}, []
    for who, play in (("a random policy", by_chance), ("π_0", by_policy)):
        for each in tqdm(OF_EACH, who):
            trajectories = play(games[:PLAYED // each], each)
            cells = [who, str(each), f"{np.mean([t.won for t in trajectories]):.1%}"]
            for keys in (history_keys, lambda t, tokenizer: world_keys(t, tokenizer, by_id[t.game])):
                check, table = held_out_check(trajectories, tokenizer, 0.95, keys), visit_statistics(q_table(trajectories, tokenizer, 0.95, keys))
                cells += [f"{table['actions'] / table['distinct_pairs']:.1f}", spread([table['label_variance_where_revisited']], 1, 3),
                          f"{spread([check['pearson']], 1, 2)} ({check['pairs']:,})"]
            rows.append(cells)
    per_state = "visits of an (s, a)", "variance of returns about Q̂", "correlation (pairs)"
    print(f"{PLAYED:,} rollouts; Q̂ of one half against the returns of the other, by equal histories and by equal states of the world")
    print(markdown(("who plays", "rollouts of each game", "won", *(f"{what}, {by}" for by in ("histories", "world") for what in per_state)), rows))


@torch.no_grad()
def divergence(policy, other, trajectories):
    """KL(policy ‖ other) of the next token, mean over the tokens of the trajectories' actions."""
    total = n = 0
    for t in trajectories:
        places = np.concatenate([np.arange(start - 1, end - 1) for start, end in t.spans])
        ids = pad([t.ids])
        p, q = (action_logprobs(model.logits(model(ids)[0, places]), 1.0) for model in (policy, other))
        total, n = total + float((p.exp() * (p - q)).nan_to_num(0).sum()), n + len(places)
    return total / n


def reference(args):
    """DPO alone, held near π_{i−1} or near π_0: success, and how far the policy has gone from π_0, by iteration. A figure beside the table.

    Alone, because imitation knows no reference: with it, both do the same (LOG.md).
    """
    curves, start_folder = {}, tiny_start(args)
    _, dev = tiny_games()
    for ref in ("prev", "init"):
        folder = args.out / "tiny" / ref
        rows = train(folder, f"{TINY} --iters 3 --ref {ref} {DPO_ALONE} --init {shlex.quote(str(start_folder))} {args.flags}")["rows"]
        start, tokenizer = read_model(folder / "iter0/policy")
        gone = []
        for i in range(len(rows)):
            policy, _ = read_model(folder / f"iter{i}/policy")
            gone.append(divergence(policy, start, list(rollout(policy, tokenizer, [(game, 0) for game in dev], temperature=1.0, max_steps=15))))
        curves["π_{i−1}" if ref == "prev" else "π_0"] = range(len(rows)), [row["dev"]["success"] for row in rows], gone
    print(markdown(("reference", *(f"π_{i}: won on dev, KL to π_0" for i in range(4))),
                   [(ref, *(f"{won:.1%}, {kl:.3f}" for won, kl in zip(*series))) for ref, (_, *series) in curves.items()]))
    draw(args.out / "tiny/reference.png", curves, ("success on dev", "KL(π_i ‖ π_0), a token"), "iteration", "reference")


def pilot(args):
    """InversePRM with the rule-based expert as demonstrator, more and more of whose actions are random; beside it plain cloning (π_0)
    and, from the same π_0, all but the learned reward."""
    cells = []
    for noise in NOISE:
        folder, control = (args.out / f"tiny/{name}-{noise}" for name in ("inverse", "control"))
        flags = f"{TINY} {PILOT} --demo-noise {noise} {args.flags}"
        rows = train(folder, flags)["rows"] + train(control, f"{flags} {CONTROL} --init {shlex.quote(str(folder / 'iter0/policy'))}")["rows"][1:]
        preferred = read_json(folder / "iter1/prm.json")["expert_preferred"]["to_policy"]
        cells.append((f"{noise:.0%}", *(f"{row['dev']['success']:.1%}" for row in rows), spread([preferred])))
    print(markdown(("random actions", "cloned (π_0)", "InversePRM: π_1", "π_2", "without its reward: π_1", "π_2",
                    "f_1 prefers the expert's action to another that π_0 proposes, %"), cells))


FIRST = {"q-hat": q_hat, "reference": reference, "pilot": pilot}


def main():
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to run: see the list that comes without")
    parser.add_argument("--seeds", type=whole_numbers, default=[0], metavar="S,S,…", help="seeds of the ablations")
    parser.add_argument("--baseline", choices=BASELINES, default="few", help="π_0 of the ablations: few, 230 demonstrations told again and again; "
                        "paper, 10,000 told once each, with nothing of ours to make more of them")
    parser.add_argument("--rollouts", type=int, default=4000, help="episodes an iteration")
    parser.add_argument("--flags", help='more flags for every run of train.py, such as "--threads 1"')
    parser.add_argument("--out", type=Path, help="where runs are kept (default: runs/experiments, or runs/experiments-paper)", metavar="DIR")
    args = parser.parse_args()
    args.out = args.out or Path("runs/experiments" + "-paper" * (args.baseline == "paper"))
    args.flags = args.flags or ""
    try:
        shlex.split(args.flags)
    except ValueError as error:
        raise UserError(f"--flags {args.flags}: {error}") from None
    unknown = [name for name in args.names if name not in {**ABLATIONS, **FIRST}]
    if unknown:
        raise UserError(f"{unknown[0]}: no such experiment; python experiments.py lists them")
    if {*args.names} & {*FIRST} and args.seeds != [0]:
        raise UserError(f"--seeds: {', '.join(FIRST)} have seed 0 alone")
    set_up_torch()
    if not args.names:
        for name, flags in ABLATIONS.items():
            print(f"{name:18} train.py --iters 1 --rollouts {args.rollouts} {BASELINES[args.baseline]}",
                  flags.format(home=args.out / str(args.seeds[0])))
        for name, experiment in FIRST.items():
            print(f"{name:18} {experiment.__doc__.splitlines()[0]}")
    rows = []
    for name in args.names:
        if name in FIRST:
            FIRST[name](args)
        else:
            rows.append((name, *row([ablation(args, name, seed) for seed in args.seeds])))
    if rows:
        print(markdown(HEAD, rows))
    tracked = [name for name in args.names if "--track-hacking" in ABLATIONS.get(name, "")]
    if tracked:
        first = args.out / str(args.seeds[0])
        draw(args.out / "hacking.png",
             {f"{name}, {read_json(first / name / 'config.json')['flags']['rollouts']:,} rollouts": hacking_curve(first / name) for name in tracked},
             ("success on dev", "mean Q of what is played there"), "update of stage 3", "run")


if __name__ == "__main__":
    command_line(main, RESUMED)
