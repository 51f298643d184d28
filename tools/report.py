"""A run as one HTML page: success, the PRM's calibration, stage 3, time, and some episodes.

    python tools/report.py runs/default                 # -> runs/default/report/index.html
    python tools/report.py runs/default --episodes 0    # without episodes: no model, no games

The figures lie beside the page as PNG. An unfinished run is reported as far as it got.
"""

import argparse
import sys
from html import escape
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import play
from fast_alfworld.cli import Parser, UserError, a_seed, between, command_line
from fast_alfworld.files import write_file
from fast_alfworld.score import paired_bootstrap, points
from results import explain
from rollout import rollout
from tools.experiment import (adder, common_flags, new_figure, open_run, percent, read_run,
                              save_figure, span)
from utils import generator, set_up_torch

PAPER = (0.649, 0.739, 0.858, 0.881)  # π_0 … π_3 on valid_unseen, cap 30 (arXiv 2502.10325)
SHOWN = 5  # candidates of a state in an episode
CURVES = {"kl": "KL(π_i ‖ reference), nats", "gain": "gain in E_π[Q_i]",
          "distillation": "distillation loss KL(π* ‖ π_i)"}
STYLE = """body { font: 16px/1.5 sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em }
img { max-width: 100% } table { border-collapse: collapse; margin: 1em 0 }
td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ccc }
td:first-child, th:first-child { text-align: left } .taken { font-weight: bold }
pre { white-space: pre-wrap }"""

# --- figures -------------------------------------------------------------------------------------


def draw_success(evals):
    """Success by iteration on each split, with 95 % intervals, beside the paper's numbers."""
    figure, (axis,) = new_figure(1)
    for split in dict.fromkeys(split for split, _ in evals):
        own = sorted((i, r) for (s, i), r in evals.items() if s == split)
        x, y = [i for i, _ in own], np.array([r["success"] for _, r in own])
        ends = np.array([r["interval"] for _, r in own]).T
        axis.errorbar(x, y, np.abs(ends - y), marker="o", capsize=3, label=split)
    axis.plot(range(len(PAPER)), PAPER, "k--", marker="s", label="AgentPRM, 3B, valid_unseen")
    axis.set(xlabel="iteration", ylabel="success", xticks=range(max(4, len(evals) // 2)))
    axis.legend()
    return figure


def draw_calibration(prms):
    """Mean return against mean Q, by bins of Q; the area of a point is its number of actions."""
    figure, axes = new_figure(len(prms))
    for axis, (i, record) in zip(axes, prms):
        q, G, n = map(np.array, zip(*record["validation"]["calibration"]))
        axis.scatter(q, G, s=400 * n / n.sum() + 5)
        axis.axline((0, 0), slope=1, color="gray", linestyle="--")
        axis.set(title=f"Q_{i}: ECE {record['validation']['ece']:.3f}", xlabel="mean Q(s, a)",
                 ylabel="mean discounted return", xlim=(0, 1), ylim=(0, 1))
    return figure


def draw_stage_3(stages):
    """KL, gain in E[Q] and distillation loss at the states of the updates."""
    figure, axes = new_figure(len(CURVES))
    for axis, (name, title) in zip(axes, CURVES.items()):
        for i, record in stages:
            some = [(e["step"], e[name]) for e in record["log"] if name in e]
            axis.plot(*zip(*some) if some else ([], []), marker=".", label=f"π_{i}")
        axis.set(title=title, xlabel="updates")
        axis.legend()
    return figure


def draw_time(costs):
    """Minutes of each stage, over all sittings."""
    figure, (axis,) = new_figure(1)
    axis.barh(list(costs)[::-1], [cost["seconds"] / 60 for cost in costs.values()][::-1])
    axis.set(xlabel="minutes")
    return figure


# --- the page ------------------------------------------------------------------------------------

def table(head, rows):
    """Column names and rows of texts -> HTML"""
    lines = ("".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
             for tag, some in (("th", [head]), ("td", rows)) for row in some)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def number(x):
    return "–" if x is None else f"{x:.3f}"


def success_table(evals):
    rows = [[f"π_{i}", split, percent(r["success"]), span(r["interval"]),
             points(paired_bootstrap(evals[split, 0]["episodes"], r["episodes"])),
             f"{r['mean_actions']:.1f}"] for (split, i), r in sorted(evals.items())]
    return table(["policy", "split", "success", "95 % interval", "gain over π_0, points",
                  "actions"], rows)


def prm_table(prms):
    return table(["PRM", "excess BCE", "ECE", "correlation with returns", "pairs ranked right"],
                 [[f"Q_{i}", *(number(r["validation"][k]) for k in
                               ("excess_bce", "ece", "pearson_returns")),
                   number(r["pair_accuracy"])] for i, r in prms])


def episode_html(episode):
    """What results.explain returns -> a part of the page that opens on a click."""
    steps = []
    for step in episode["steps"]:
        rows = "".join(
            f"<tr{' class=taken' * (o['action'] == step['action'])}><td>{escape(o['action'])}</td>"
            f"<td>{o['pi']:.3f}</td><td>{number(o['q'])}</td></tr>"
            for n, o in enumerate(step["candidates"])
            if n < SHOWN or o["action"] == step["action"])
        steps.append(f"<li><b>{escape(step['action'])}</b><table><tr><th>candidate</th>"
                     f"<th>π(a|s)</th><th>Q(s,a)</th></tr>{rows}</table>"
                     f"<pre>{escape(step['answer'])}</pre></li>")
    end = f"{'won' if episode['won'] else 'not won'} after {len(steps)} actions"
    return (f"<details><summary>{escape(episode['task'])} ({end})</summary>"
            f"<pre>{escape(episode['observation'])}</pre><ol>{''.join(steps)}</ol></details>")


def play_episodes(args, best):
    """Episodes of π_best, explained with the PRM of its iteration. -> [dict]"""
    c, games = read_run(args.run, args.split, args.device, args.data)
    order = generator(args.seed, "report").permutation(len(games))[:args.episodes]
    chosen = {games[g].id: games[g] for g in order}
    policy = c.policy(best)
    prm = next((c.prm(i) for i in (max(best, 1), best + 1)
                if (c.run.path / f"iter{i}/prm/config.json").exists()), None)
    played = play(lambda todo: rollout(policy, c.tokenizer, todo, seed=args.seed,
                                       temperature=c.args.temperature, act=c.act,
                                       max_steps=c.args.max_steps), chosen.values(), 1, "episodes")
    return [explain(chosen[t.game], t, policy, c.tokenizer, c.args.temperature or 1.0, prm)
            for t in sorted(played, key=lambda t: t.game)]


def main():
    parser = Parser(__doc__, "%(prog)s RUN [flags]")
    add = adder(parser)
    parser.add_argument("run", metavar="RUN", default=argparse.SUPPRESS,
                        help="a run directory of train.py")
    add("--episodes", 12, "episodes of the best policy on dev", type=between(0, 1000, int))
    add("--split", "dev", "whose games they are: dev, valid_seen or valid_unseen")
    add("--seed", 0, "of the episodes", type=a_seed)
    add("--out", None, "where the page goes (default: RUN/report)", type=str, metavar="DIR")
    common_flags(add)
    args = parser.parse_args()
    set_up_torch(args.threads)
    run, config = open_run(args.run)
    records = run.records()
    evals = {(name[5:], i): r for (i, name), r in records.items() if name.startswith("eval-")}
    if ("dev", 0) not in evals:
        raise UserError(f"{args.run}: π_0 is not evaluated yet (the same train.py command does)")
    evals = {(s, i): r for (s, i), r in evals.items() if (s, 0) in evals}
    best = max((i for s, i in evals if s == "dev"), key=lambda i: (evals["dev", i]["success"], -i))
    of = lambda stage: [(i, r) for (i, name), r in records.items() if name == stage]
    out, figures = Path(args.out or run.path / "report"), {"success": draw_success(evals)}
    if of("prm"):
        figures["calibration"] = draw_calibration(of("prm"))
    if of("dpo"):
        figures["stage-3"] = draw_stage_3(of("dpo"))
    figures["time"] = draw_time(run.costs())
    images = []
    for name, figure in figures.items():
        save_figure(figure, out / f"{name}.png")
        images.append(f'<h2>{name}</h2><img alt="{name}" src="{name}.png">')
    episodes = play_episodes(args, best) if args.episodes else []
    flags, title = config["flags"], escape(run.path.resolve().name)
    about = (f"Cap {flags['max_steps']}, temperature {flags['temperature']}, actions "
             f"{flags['actions']}, {config['games']['train']}. Best on dev: π_{best}. "
             f"Commit {config['commit']}, {config['machine']}.")
    page = "\n".join((
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>",
        f"<style>{STYLE}</style><h1>{title}</h1><p>{escape(about)}</p>",
        f"<pre>{escape(config['command'])}</pre>", success_table(evals), prm_table(of("prm")),
        *images, f"<h2>{len(episodes)} episodes of π_{best} on {escape(args.split)}</h2>",
        *map(episode_html, episodes), "</html>\n"))
    write_file(out / "index.html", lambda p: p.write_text(page, encoding="utf-8"))
    print(f"{out}/index.html: {len(page) / 1e6:.2f} MB, {len(figures)} figures")


if __name__ == "__main__":
    command_line(main)
