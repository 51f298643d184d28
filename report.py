"""A run as one page: success by iteration, the PRM's report card, where the time went, and episodes with Q at every action.

    python report.py runs/default                     # -> runs/default/report/index.html, and every figure as PNG
    python report.py runs/default --episodes 0        # numbers and figures alone: no model, no games
    python report.py runs/default --sft-curve runs/sft-curve    # with SFT on more and more demonstrations beside it, of sft.py --curve

The page (its template is report.html) asks for nothing: figures are inline SVG, episodes lie in it as JSON. PNGs need
matplotlib (requirements-dev.txt); without it the page is written all the same. A run that is not finished is reported as far
as it goes, once π_0 and π_1 are evaluated.
"""

import json
import re
import sys
from html import escape
from pathlib import Path
from types import SimpleNamespace

from tqdm import tqdm

from common import Parser, UserError, a_seed, command_line, generator, pick_device, read_json, read_model, set_up_torch, write_file
from eval import paired_bootstrap
from figures import AGENT_PRM, STAGES, figures_of, percent, pi, shade, span, stage_of, svg, write_png
from flags import parse_flags
from games import kind_of, same_games
from play import PROPOSALS, told
from prm import score, sigmoid
from rollout import rollout
from runs import load_games, records_of

UNSEEN = "valid_unseen, cap 30; "  # of arXiv 2502.10325, as AGENT_PRM
PUBLISHED = [*((f"AgentPRM {pi(i)}", p, UNSEEN + "3B parameters" + ", 70,000 rollouts an iteration" * (i > 0)) for i, p in enumerate(AGENT_PRM)),
             (f"AgentPRM, Best-of-16 on {pi(0)}", 0.69, UNSEEN + "3B, by the first PRM"), (f"AgentPRM, Best-of-16 on {pi(1)}", 0.88, UNSEEN + "3B"),
             ("AgentPRM, Best-of-16, the best", 0.91, UNSEEN + "3B"), ("SFT", 0.634, UNSEEN + "3B, 10,000 demonstrations"),
             ("InversePRM, one iteration", 0.828, UNSEEN + "3B, 10,000 demonstrations, no reward"),
             ("InversePRM, two iterations", 0.866, UNSEEN + "3B, 10,000 demonstrations, no reward"),
             ("GPT-4o", 0.649, UNSEEN + "prompted; 65.7 elsewhere"), ("LEAP, the paper's expert", 0.886, UNSEEN + "about 91 elsewhere"),
             *((f"{who}, {size}", p, f"valid_seen, cap 50; {size}, no demonstrations (arXiv {source})") for who, size, p, source in (
                 ("GiGPO", "1.5B", 0.867, "2505.10978"), ("GiGPO", "7B", 0.908, "2505.10978"),
                 ("HGPO", "1.5B", 0.928, "2602.22817, second-hand"), ("HGPO", "7B", 0.954, "2602.22817, second-hand")))]


def main():
    parser = Parser(__doc__, usage="%(prog)s [RUN] [flags]")
    add = parser.add_argument
    add("run", nargs="?", default="runs/default", metavar="RUN", help="a run directory of train.py")
    add("--episodes", type=int, default=40, help="episodes of the best policy in the viewer; 0: no viewer", metavar="N")
    add("--split", default="dev", help="whose games they play: dev, or a test split of the run")
    add("--data", help="folder that holds json_2.1.1 (default: the run's, else $ALFWORLD_DATA, else alfworld's cache)", metavar="DIR")
    add("--sft-curve", help="folder of sft.py --curve, to draw beside the run", metavar="DIR")
    add("--out", help="where the page goes (default: RUN/report)", metavar="DIR")
    add("--seed", type=a_seed, default=0, help="names all randomness")
    add("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.episodes < 0:
        raise UserError("--episodes is at least 0")
    set_up_torch()
    run, out = read_run(args.run, args.sft_curve), Path(args.out or Path(args.run) / "report")
    if args.split not in run.splits:
        raise UserError(f"--split {args.split}: the run was evaluated on {', '.join(run.splits)}")
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is told before playing
    figures, file = figures_of(run), out / "index.html"
    text = page(run, figures, play(run, args) if args.episodes else [], args.split)
    write_file(file, lambda path: path.write_text(text, encoding="utf-8"))
    try:
        for figure in figures:
            write_png(figure, out / f"{figure['name']}.png")
        also = f"{len(figures)} figures beside it as PNG"
    except ImportError:
        also = "no PNGs: they need matplotlib (pip install matplotlib)"
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB; {also}")


def read_run(folder, sft_curve=None):
    """A run directory -> .path .config .commits .data .parameters .cost (state.json) .curves (rows of curves.py) .sft (rows of sft.py --curve)
    .iterations .splits (dev first) .best (on dev), .stages(name) -> [(i, record)], and .rows: of each split and iteration the record of its
    evaluation, with 95 % `interval`s and the `gain` over π_0.

    UserError where π_0 and π_1 are not evaluated, or the curve is not of a split that the run has.
    """
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no run there (config.json is missing)")
    records = records_of(folder)
    evals = {(stage[5:], i): record for (i, stage), record in records.items() if stage.startswith("eval-")}
    if not {("dev", 0), ("dev", 1)} <= evals.keys():
        raise UserError(f"{folder}: π_0 and π_1 are not evaluated yet (train.py with the same flags goes on; a run of --iters 0 has no π_1)")
    rows = []
    for split, i in sorted((e for e in evals if (e[0], 0) in evals), key=lambda e: (e[0] != "dev", *e)):
        row = evals[split, i]
        for kind, part in row["by_task"].items():
            part["interval"] = success_interval([e for e in row["episodes"] if e["game"].startswith(kind)])
        rows.append({**row, "i": i, "interval": success_interval(row["episodes"]),
                     "gain": paired_bootstrap(evals[split, 0]["episodes"], row["episodes"])})
    best = max((row for row in rows if row["split"] == "dev"), key=lambda row: (row["success"], -row["i"]))["i"]
    curves = [read_json(file) for file in sorted(folder.glob("curves-*.json"))]
    commits = list(dict.fromkeys(record.get("commit") or "none" for record in records.values()))
    config, splits = read_json(folder / "config.json"), list(dict.fromkeys(row["split"] for row in rows))
    return SimpleNamespace(
        path=folder, config=config, commits=commits, data=read_json(folder / "data.json"), rows=rows, cost=read_json(folder / "state.json"),
        iterations=sorted({row["i"] for row in rows}), splits=splits, best=best,
        sft=sft_alone(sft_curve, splits, config["flags"]["init"]) if sft_curve else [], parameters=records[0, "sft"]["parameters"],
        curves=[{**row, "split": one["split"], "temperature": one["temperature"], "interval": success_interval(row["episodes"])}
                for one in curves for row in one["rows"]],
        stages=lambda name: sorted(((i, record) for (i, stage), record in records.items() if stage == name), key=lambda pair: pair[0]))


def sft_alone(folder, splits, init):
    """Success of SFT alone by number of demonstrations, as sft.py --curve has left it in `folder`.
    -> rows; UserError where it cannot stand beside the run"""
    file = Path(folder, "curve.json")
    if not file.exists():
        raise UserError(f"--sft-curve {folder}: no curve of sft.py --curve there (curve.json is missing)")
    rows = sorted(read_json(file), key=lambda row: row["demos"])
    if not rows:
        raise UserError(f"--sft-curve {folder}: the curve is empty")
    if rows[0]["split"] not in splits:
        raise UserError(f"--sft-curve {folder}: its games are those of {rows[0]['split']}, the run's those of {', '.join(splits)}")
    if init:
        raise UserError(f"--sft-curve: the run started from --init {init}, and does not say how many demonstrations made that")
    return rows


def success_interval(episodes):
    """95 % interval (low, high) of success, resampling games."""
    return paired_bootstrap([{**e, "won": False} for e in episodes], episodes)[1:]


# --- episodes ----------------------------------------------------------------------------------------------------------

def play(run, args):
    """--episodes games of --split, each played once by the best policy and judged by its PRM. -> list of `told`"""
    device, here = pick_device(args.device), run.config["flags"]
    flags = SimpleNamespace(**{**vars(parse_flags([])), **here, "data": args.data or here["data"],
                               "test_splits": [args.split] * (args.split != "dev")})
    policy, tokenizer = read_model(run.path / f"iter{run.best}/policy", device)
    prm, _ = read_model(run.path / f"iter{max(1, run.best)}/prm", device, "score")  # π_0 is judged by the PRM of its own rollouts

    if prm.config.head == "relative":
        print("no episodes in the page: a PRM of --prm-loss bt or --algo inverseprm says nothing of one state against another", file=sys.stderr)
        return []

    def compare(sources):
        for split, source in sources.items():
            if not same_games(source, run.data[split]):
                raise UserError(f"the run was on other games ({run.data[split]}; now {source}): name their folder by --data")

    games = load_games(flags, SimpleNamespace(note_data=compare))
    if args.split not in ("dev", *games.test):
        raise UserError(f"no games of {args.split}: name their folder by --data")
    games = games.dev if args.split == "dev" else games.test[args.split]
    picked = {games[g].id: games[g] for g in generator(args.seed, "report").permutation(len(games))[:args.episodes]}
    trajectories = list(tqdm(rollout(policy, tokenizer, [(game, 0) for game in picked.values()], temperature=flags.eval_temperature, seed=args.seed,
                                     max_steps=flags.max_steps), "play", len(picked), unit="episode", dynamic_ncols=True))
    trajectories.sort(key=lambda t: list(picked).index(t.game))
    judged = zip(tqdm(trajectories, "judge", unit="episode", dynamic_ncols=True), score(prm, trajectories))
    return [told(picked[t.game], t, policy, tokenizer, flags.dpo_temperature, args.seed, prm, sigmoid(f)) for t, f in judged]


# --- the page ----------------------------------------------------------------------------------------------------------

def page(run, figures, episodes, split):
    """report.html with its <!--places--> filled."""
    flags, best = run.config["flags"], [row for row in run.rows if row["i"] == run.best]
    tiles = [(pi(run.best), "best policy, chosen on dev"),
             *((percent(row["success"]), f"on {row['split']}" + f", {points(row['gain'])} points over {pi(0)}" * (run.best > 0)) for row in best),
             (f"{run.parameters / 1e6:.2f} M", "parameters"), (f"{sum(run.cost['seconds'].values()) / 60:.0f} min", "of training and evaluation")]
    made = {figure["name"]: figure_html(figure) for figure in figures}
    about = {"command": run.config["command"], "commit": ", then ".join(run.commits), "machine": run.config["machine"],
             "versions": ", ".join(f"{name} {version}" for name, version in run.config["versions"].items()),
             "games": "; ".join(source.partition(" from ")[0] for source in run.data.values()), "rollouts an iteration": f"{flags['rollouts']:,}"}
    places = {"title": escape(run.path.resolve().name), "tiles": "".join(f"<li><b>{value}</b> {what}</li>" for value, what in tiles),
              "setting": f"{games_of(run)}, cap {flags['max_steps']} steps, temperature {flags['eval_temperature']}, actions written freely",
              "success": made.pop("success") + made.pop("demonstrations", ""), "success_table": success_table(run),
              "published": published_table(run), "prm_table": prm_table(run),
              "other_games": THE_EXPERT if on_alfworld(run) else f"And ours is on {games_of(run).lower()}: nothing here is to be compared.",
              "cost_table": cost_table(run),
              "tasks": "".join(html for name, html in made.items() if name.startswith("tasks-")),
              "figures": "".join(html for name, html in made.items() if not name.startswith("tasks-")),
              "about": "".join(f"<dt>{what}</dt><dd>{escape(str(value))}</dd>" for what, value in about.items()),
              "viewer": f"{len(episodes)} games of {split}, each played once by {pi(run.best)} at temperature {flags['eval_temperature']} and "
                        f"judged by {pi(max(1, run.best), 'Q')}. At every state the policy made {PROPOSALS} proposals more, "
                        f"at temperature {flags['dpo_temperature']:g}.",
              "episodes": json.dumps(episodes, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")}
    return re.sub(r"<!--(\w+)-->", lambda place: places[place[1]], Path(__file__).with_name("report.html").read_text(encoding="utf-8"))


def points(gain):
    """(mean, low, high) of a difference -> its words."""
    return f"{100 * gain[0]:+.1f} ({100 * gain[1]:+.1f} … {100 * gain[2]:+.1f})"


def figure_html(figure):
    legend = "".join(f'<li class="c{shade(colour)}">{escape(text)}</li>' for colour, text in figure["legend"])
    numbers = "".join(f"<li>{escape(text)}</li>" for *_, text in figure["marks"] if text)
    return (f'<figure id="{figure["name"]}"><h3>{escape(figure["title"])}</h3><ul class="legend">{legend}</ul>{svg(figure)}'
            f"<figcaption>{escape(figure['note'])}</figcaption><details><summary>Numbers</summary><ul>{numbers}</ul></details></figure>")


def table(head, rows, marked=()):
    """Rows of cells (HTML) -> a table; the first cell names its row, the `marked` row numbers stand out."""
    line = lambda n, row: (f'<tr{" class=ours" * (n in marked)}><th scope="row">{row[0]}</th>'
                           + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>")
    names = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(line(n, row) for n, row in enumerate(rows))
    return (f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table><thead><tr>{names}</tr></thead>'
            f'<tbody>{body}</tbody></table></div>')


def success_table(run):
    head = ("policy, split", "success", "95 % interval", f"gain over {pi(0)}, points", "actions", "inadmissible")
    rows = [(f"{pi(row['i'])}, {row['split']}", percent(row["success"]), span(*row["interval"]), points(row["gain"]) if row["i"] else "–",
             f"{row['mean_actions']:.1f}", percent(row["inadmissible"])) for row in run.rows]
    return table(head, rows, [n for n, row in enumerate(run.rows) if row["i"] == run.best])


THE_EXPERT = ("A scripted expert, which knows from the train games what is found where, wins every game of valid_seen within 30 steps "
              "(eval.py --agent expert).")


def on_alfworld(run):
    """Whether the run's games are ALFWorld's own, and not generated."""
    return kind_of(run.data["train"]) == "alfworld"


def games_of(run):
    return "ALFWorld's own games" if on_alfworld(run) else "Generated games, not ALFWorld's"


def published_table(run):
    """Ours (on test splits, if there are any) among the published numbers, best first."""
    flags = run.config["flags"]
    how = f"{'' if on_alfworld(run) else games_of(run).lower() + ', '}cap {flags['max_steps']}; {run.parameters / 1e6:.1f} M parameters, " \
          f"{flags['rollouts']:,} rollouts an iteration"
    ours = [(f"ours, {pi(row['i'])}", row["success"], f"{row['split']}, {how}" + ", chosen on dev" * (row["i"] == run.best), row["i"] == run.best)
            for row in run.rows if row["split"] != "dev" or len(run.splits) == 1]
    rows = sorted(ours + [(who, p, what, False) for who, p, what in PUBLISHED], key=lambda row: -row[1])
    meter = lambda p: f'<span class="meter"><i style="width:{100 * p:.1f}%"></i></span>{percent(p)}'
    return table(("who", "games won", "on what, by what"), [(who, meter(p), what) for who, p, what, _ in rows],
                 [n for n, row in enumerate(rows) if row[3]])


def prm_table(run):
    head = ("PRM", "rollouts won", "Q̂ against other rollouts, correlation", "BCE above the labels' entropy, lower is better",
            "calibration gap, lower is better", "correlation with returns", "mean Q", "mean return")
    rolled, number = dict(run.stages("rollouts")), lambda x: "–" if x is None else f"{x:.3f}"
    rows = [(pi(i, "Q"), percent(rolled[i]["success"]), number(rolled[i]["q_hat_check"]["pearson"]),
             *(number(record["held_out"].get(name)) for name in ("excess_bce", "ece", "pearson_returns", "mean_q", "mean_return")))
            for i, record in run.stages("prm")]
    return table(head, rows)


def cost_table(run):
    """Time on the clock, time of all cores, and the most memory that the run's processes held together, by stage, all iterations together."""
    names = {stage: [name for name in run.cost["seconds"] if stage_of(name)[1] == stage] for stage in STAGES}
    told = lambda kind, names, unit, join: (
        join(there) / unit if (there := [run.cost[kind][name] for name in names if name in run.cost.get(kind, {})]) else None)
    number = lambda x, digits: "–" if x is None else f"{x:,.{digits}f}"
    rows = [(what, number(told("seconds", some, 60, sum), 1), number(told("core_seconds", some, 3600, sum), 2),
             number(told("peak_mb", some, 1000, max), 2))
            for what, some in (*((STAGES[stage], some) for stage, some in names.items() if some), ("all", sum(names.values(), [])))]
    return table(("stage", "minutes", "core-hours", "peak memory, GB"), rows, [len(rows) - 1])


if __name__ == "__main__":
    command_line(main)
