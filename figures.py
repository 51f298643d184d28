"""The figures of a report: what each one draws, from a run as `report.read_run` gives it, and two ways to draw it, SVG and PNG.

A figure is a dict: name, title, note, legend [(colour, text)], x and y (label, low, high, [(value, text)]), and marks
(kind, colour, points [(x, y)], text): line, dashes, dots, or bar (between two corners). A colour is a number or "grey"; the text
says the mark's numbers in words. A figure for which the run has no numbers is None.
"""

import re
from html import escape
from math import floor, log10

AGENT_PRM = (0.649, 0.739, 0.858, 0.881)  # π_0 … π_3 of arXiv 2502.10325: 3B parameters, valid_unseen, cap 30, temperature 0.3
KINDS = {"pick_and_place_simple": "put", "look_at_obj_in_light": "look", "pick_clean_then_place_in_recep": "clean",
         "pick_heat_then_place_in_recep": "heat", "pick_cool_then_place_in_recep": "cool",
         "pick_two_obj_and_place": "two"}  # task type -> what a report calls it
STAGES = {"sft": "SFT", "rollouts": "rollouts", "forks": "forks", "checks": "checks", "prm": "PRM", "dpo": "DPO", "eval": "evaluation"}
TENTHS, FIFTHS = [(v / 10, f"{10 * v} %") for v in range(11)], [(v / 5, f"{v / 5:.1f}") for v in range(6)]
COLOURS = ("#8892a0", "#2f7fd1", "#d9730d", "#1a936f", "#b5459b", "#7a5cc9", "#c43d3d", "#7c6a2e")  # as c0 … c7 of report.html, in a light scheme

INTERVALS = "95 % intervals, bootstrap over games; of games all won or all lost it gives none"


def pi(i, letter="π"):
    return letter + str(i).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def percent(x):
    return "–" if x is None else f"{100 * x:.1f} %"


def shade(colour):
    """The colour's name in the page: there are eight, and grey."""
    return colour if colour == "grey" else colour % len(COLOURS)


def span(low, high):
    return f"{100 * low:.1f} … {100 * high:.1f}"


def figures_of(run):
    """All figures that the run has numbers for."""
    made = (success(run), demonstrations(run), *(task_types(run, split) for split in run.splits), calibration(run), *best_of_n(run),
            hacking(run), visits(run), time(run))
    return [figure for figure in made if figure]


# --- what is drawn -----------------------------------------------------------------------------------------------------

def curve(colour, points, texts, kind="line"):
    """Marks of a line with a dot at each point, and the dots' texts."""
    return [(kind, colour, points, ""), *(("dots", colour, [point], text) for point, text in zip(points, texts))]


def success_axis(values):
    """The axis of games won, from the tenth below the least of the values."""
    low = min(9, floor(10 * min(values))) / 10
    return "games won", low, 1, [t for t in TENTHS if t[0] >= low]


def round_ticks(high, n=5):
    """At most n + 1 round numbers from 0 to `high`."""
    step = next(s for e in range(-6, 9) for s in (10.0 ** e, 2 * 10.0 ** e, 5 * 10.0 ** e) if s * n >= high)
    return [(k * step, f"{k * step:,.4g}") for k in range(int(high / step) + 1)]


def success(run):
    marks, legend = [], []
    for c, split in enumerate(run.splits, 1):
        rows = [row for row in run.rows if row["split"] == split]
        xs = [row["i"] + 0.05 * (c - (len(run.splits) + 1) / 2) for row in rows]  # beside each other, for the intervals to be seen
        marks += [("line", c, [(x, p) for p in row["interval"]], "") for x, row in zip(xs, rows)]
        marks += curve(c, [(x, row["success"]) for x, row in zip(xs, rows)],
                       [f"{pi(row['i'])} on {split}: {percent(row['success'])} ({span(*row['interval'])})" for row in rows])
        legend.append((c, f"{split}, {rows[0]['games']} games"))
    last = max(run.iterations)
    theirs = list(enumerate(AGENT_PRM))[:last + 1]
    marks += curve("grey", theirs, [f"the paper's {pi(i)}, 3B parameters, on valid_unseen: {percent(p)}" for i, p in theirs], "dashes")
    return dict(name="success", title="Success by iteration", x=("iteration", -0.25, last + 0.25, [(i, pi(i)) for i in range(last + 1)]),
                y=success_axis(y for _, _, points, _ in marks for _, y in points), marks=marks,
                legend=[*legend, ("grey", "the paper, 3B parameters, valid_unseen")], note=f"Upright lines: {INTERVALS}.")


def task_types(run, split):
    rows = [row for row in run.rows if row["split"] == split]
    kinds = [kind for kind in KINDS if kind in rows[0]["by_task"]]
    marks = []
    for k, kind in enumerate(kinds):
        for row in rows:
            part = row["by_task"][kind]
            y = len(kinds) - k - (row["i"] + 1) / (max(run.iterations) + 2)
            marks.append(("line", row["i"], [(p, y) for p in part["interval"]], ""))
            text = f"{KINDS[kind]} ({part['games']} games), {pi(row['i'])}: {percent(part['success'])} ({span(*part['interval'])})"
            marks.append(("dots", row["i"], [(part["success"], y)], text))
    return dict(name=f"tasks-{split}", title=f"By task type, {split}", x=("games won", -0.02, 1.02, TENTHS[::2]),
                y=("", 0, len(kinds), [(len(kinds) - k - 0.5, KINDS[kind]) for k, kind in enumerate(kinds)]), marks=marks,
                legend=[(row["i"], pi(row["i"])) for row in rows], note=f"Lines: {INTERVALS}.")


def demonstrations(run):
    """SFT alone on more and more demonstrations (sft.py --curve), and what the iterations made of the run's few."""
    if not run.sft:
        return None
    split, own = run.sft[0]["split"], run.config["flags"]["demos"]
    ours = {row["i"]: (log10(own), row["success"]) for row in run.rows if row["split"] == split}
    won = {own: ours[0][1], **{row["demos"]: row["success"] for row in run.sft}}  # π_0 is SFT alone, too
    alone = [(log10(n), won[n]) for n in sorted(won)]
    points = [*alone, *ours.values()]
    left, right = min(points)[0] - 0.1, max(points)[0] + 0.1
    marks = [*curve("grey", alone, [f"SFT on {n:,} demonstrations: {percent(won[n])}" for n in sorted(won)]),
             *curve(1, list(ours.values()), [f"{pi(i)}: {percent(p)}" for i, (_, p) in ours.items()]),
             *(("dashes", 1, [(x, p), (right, p)], "") for i, (x, p) in ours.items() if i == run.best)]
    return dict(name="demonstrations", title="How many demonstrations is that worth?",
                x=("demonstrations", left, right, [(log10(n), f"{n / 1000:g}k" if n >= 1000 else str(n)) for n in sorted(won)]),
                y=success_axis(p for _, p in points), marks=marks, legend=[("grey", "SFT alone"), (1, f"{pi(0)} … {pi(max(ours))} of this run")],
                note=f"Games of {split}. Each dot of SFT alone is a policy of its own; "
                     f"the dashes say which of them the best policy, {pi(run.best)}, stands with.")


def best_of_n(run):
    """What curves.py has measured for the run: a figure for actions or episodes, split and temperature.
    N = 1 leaves no choice: it begins the curves of all PRMs."""
    kinds = {}
    for row in run.curves:
        kinds.setdefault((row["over"], row["split"], row["temperature"]), []).append(row)
    return [best_of_n_figure(*kind, rows) for kind, rows in kinds.items() if any(row["prm"] is not None for row in rows)]


def best_of_n_figure(over, split, temperature, rows):
    pairs, ns = sorted({(row["policy"], row["prm"]) for row in rows if row["prm"] is not None}), sorted({row["n"] for row in rows})
    marks, legend = [], []
    for c, (k, i) in enumerate(pairs, 1):
        name = f"{pi(k)} by {pi(i, 'Q')}"
        mine = sorted((row for row in rows if row["policy"] == k and row["prm"] in (i, None)), key=lambda row: row["n"])
        marks += curve(c, [(ns.index(row["n"]), row["success"]) for row in mine],
                       [f"{name}, {over}, {split}: best of {row['n']} wins {percent(row['success'])} ({span(*row['interval'])})" for row in mine])
        legend.append((c, name))
    return dict(name=f"best-of-n-{over}-{split}-{temperature:g}", title=f"Best-of-N {over}, {split}, temperature {temperature:g}",
                x=("N", -0.25, len(ns) - 0.75, [(k, str(n)) for k, n in enumerate(ns)]), y=success_axis(row["success"] for row in rows),
                marks=marks, legend=legend,
                note={"actions": "Of N actions at every step the one of highest Q is taken. "
                                 "The paper, N = 16: from 64.9 to 69.0 % with the first PRM on π₀.",
                      "episodes": "Of N whole episodes the one whose last action has the highest Q is taken."}[over]
                     + " Intervals are with the numbers.")


def calibration(run):
    cards = [(i, record["held_out"]) for i, record in run.stages("prm") if "calibration" in record["held_out"]]  # not of --prm-loss bt
    if not cards:
        return None
    marks = [("dashes", "grey", [(0, 0), (1, 1)], "")]
    for i, card in cards:
        marks += curve(i, [(q, G) for q, G, _ in card["calibration"]],
                       [f"{pi(i, 'Q')}: mean Q {q:.3f}, mean return {G:.3f}, {n:,} actions" for q, G, n in card["calibration"]])
    return dict(name="calibration", title="Is Q what it says?", x=("Q, in ten bins", -0.02, 1.02, FIFTHS),
                y=("mean discounted return", -0.02, 1.02, FIFTHS),
                marks=marks, legend=[(i, f"{pi(i, 'Q')}, mean gap {card['ece']:.3f}") for i, card in cards],
                note="Dots: bins of Q with their mean return. On the diagonal Q is the return that came; below it Q hopes for too much.")


def hacking(run):
    """The PRM's score during stage 3, and what became of success on dev: where they part, the PRM is hacked (P1).

    Success of each π_i. With --track-hacking also of the policy on the way there, and the score is the mean Q of all that it plays on dev;
    without, of its proposals at states of rollouts. A PRM of --prm-loss bt or --algo inverseprm has no Q to draw.
    """
    evaluated = {row["i"]: row["success"] for row in run.rows if row["split"] == "dev"}
    judges = {i for i, record in run.stages("prm") if "calibration" in record["held_out"]}
    marks, legend, done, won = [], [], 0, [(0, evaluated[0], f"{pi(0)} wins {percent(evaluated[0])} of dev")]
    for i, record in run.stages("dpo"):
        log, stretch = record["log"], record["log"][0]["step"]  # updates a line of the log is the mean of; what remains at the end are too few
        tracked = [line for line in log if "true/success" in line]
        of, name = ("what is played on dev", "prm/q") if tracked else ("proposals", "score/mean")
        points = [(done + line["step"], line[name]) for line in log if name in line and line["step"] % stretch == 0]
        if points and i in judges:
            (first, low), (last, high) = points[0], points[-1]
            marks.append(("line", i, points, f"{pi(i, 'Q')} of {of}: {low:.3f} at update {first:,}, {high:.3f} at update {last:,}"))
            legend.append((i, f"{pi(i, 'Q')} of {of}"))
        won += [(done + line["step"], line["true/success"],
                 f"at update {done + line['step']:,} {percent(line['true/success'])} of dev are won") for line in tracked]
        done += log[-1]["step"]
        if i in evaluated:
            won.append((done, evaluated[i], f"{pi(i)} wins {percent(evaluated[i])} of dev"))
    if not marks:
        return None
    marks += curve("grey", [(x, p) for x, p, _ in won], [text for *_, text in won], "dashes")
    return dict(name="score-and-success", title="PRM score and success", x=("updates of stage 3", -0.02 * done, 1.02 * done, round_ticks(done)),
                y=("Q, and games won", 0, 1, FIFTHS), marks=marks, legend=[*legend, ("grey", "success on dev")],
                note="A score that rises while success falls is a PRM being hacked. Q is discounted and success is not: compare directions, not "
                     "heights. Q of proposals is the mean of different proposals where there is more than one, and such states become fewer: alone "
                     "it proves little (train.py --track-hacking). On the way there the weights are not yet averaged, and dev is played once.")


def visits(run):
    marks, legend, last, cards = [], [], 0, run.stages("prm")
    for k, (i, record) in enumerate(cards):
        least = [(int(name[:-1]), n) for name, n in record["visits"]["visits"].items()]  # (visits, pairs with at least as many)
        names = [str(a) if b == a + 1 else f"{a}–{b - 1}" for (a, _), (b, _) in zip(least, least[1:])] + [f"{least[-1][0]}+"]
        for c, ((_, n), (_, more)) in enumerate(zip(least, [*least[1:], (None, 0)])):
            if n > more:
                last, left, wide = max(last, c), c + 0.1 + 0.8 * k / len(cards), 0.8 / len(cards)
                text = f"rollouts of {pi(i - 1)}: {n - more:,} pairs with {names[c]} visits"
                marks.append(("bar", i, [(left, -0.3), (left + wide, log10(n - more))], text))
        legend.append((i, f"rollouts of {pi(i - 1)}"))
    high = floor(max(points[1][1] for _, _, points, _ in marks)) + 1
    return dict(name="visits", title="How often (s, a) was visited",
                x=("visits", 0, last + 1, [(c + 0.5, name) for c, name in enumerate(names[:last + 1])]),
                y=("pairs (s, a)", -0.3, high, [(e, "1" + "0" * (e % 3) + " kM"[e // 3].strip()) for e in range(high + 1)]),
                marks=marks, legend=legend,
                note="A logarithmic scale. A label is the mean return of all rollouts through (s, a): of a pair seen once it is a single throw.")


def stage_of(name):
    """A stage's name in state.json -> its iteration and kind, one of STAGES: "iter3/eval-dev" -> 3, "eval"; "iter1/prm2" -> 1, "prm"."""
    i, kind = re.match(r"iter(\d+)/([a-z]+)", name).groups()
    return int(i), "prm" if kind == "value" else kind  # --shape-with


def time(run):
    minutes = {}
    for name, seconds in run.cost["seconds"].items():
        i, stage = stage_of(name)
        minutes.setdefault(i, dict.fromkeys(STAGES, 0.0))[stage] += seconds / 60
    marks, last, high = [], max(minutes), max(sum(stages.values()) for stages in minutes.values())
    for i, stages in minutes.items():
        start = 0.0
        for c, (stage, spent) in enumerate(stages.items()):
            if spent:
                marks.append(("bar", c, [(start, last - i + 0.2), (start + spent, last - i + 0.8)], f"{pi(i)}, {STAGES[stage]}: {spent:.1f} min"))
                start += spent
    return dict(name="time", title="Where the time went", x=("minutes", 0, 1.02 * high, round_ticks(high)),
                y=("", 0, last + 1, [(last - i + 0.5, pi(i)) for i in minutes]), marks=marks,
                legend=[(c, text) for c, (stage, text) in enumerate(STAGES.items()) if any(stages[stage] for stages in minutes.values())],
                note=f"What each policy cost, its rollouts and its PRM included; {run.config['machine']}.")


# --- how it is drawn ---------------------------------------------------------------------------------------------------

def svg(figure):
    """A figure -> SVG for the page, whose style sheet says what c0, c1, … and cgrey look like."""
    (x_label, x_low, x_high, x_ticks), (y_label, y_low, y_high, y_ticks) = figure["x"], figure["y"]
    left, right, top, bottom = 62, 404, 28 if y_label else 6, 252
    X = lambda x: round(left + (right - left) * (x - x_low) / (x_high - x_low), 1)
    Y = lambda y: round(bottom - (bottom - top) * (y - y_low) / (y_high - y_low), 1)
    # rows without a unit need none
    grid = [f"M{left} {Y(v)}H{right}" for v, _ in y_ticks] if y_label else [f"M{X(v)} {top}V{bottom}" for v, _ in x_ticks]
    out = [f'<svg viewBox="0 0 430 296" role="img" aria-label="{escape(figure["title"])}: numbers below"><path class="grid" d="{"".join(grid)}"/>',
           *(f'<text x="{left - 8}" y="{Y(v) + 5}" text-anchor="end">{escape(t)}</text>' for v, t in y_ticks),
           *(f'<text x="{X(v)}" y="{bottom + 20}" text-anchor="middle">{escape(t)}</text>' for v, t in x_ticks),
           f'<text x="2" y="13">{escape(y_label)}</text><text x="{right}" y="{bottom + 40}" text-anchor="end">{escape(x_label)}</text>']
    for kind, colour, points, text in figure["marks"]:
        tip = f"<title>{escape(text)}</title>" if text else ""
        if kind == "bar":
            (a, b), (c, d) = points
            out.append(f'<rect class="c{shade(colour)}" x="{X(a)}" y="{Y(d)}" width="{max(1, X(c) - X(a) - 1):.1f}" '
                       f'height="{Y(b) - Y(d):.1f}">{tip}</rect>')
        elif kind == "dots":
            out += [f'<circle class="c{shade(colour)}" cx="{X(x)}" cy="{Y(y)}" r="4">{tip}</circle>' for x, y in points]
        else:
            out.append(f'<polyline class="c{shade(colour)} {kind}" points="{" ".join(f"{X(x)},{Y(y)}" for x, y in points)}">{tip}</polyline>')
    return "\n".join([*out, "</svg>"])


def write_png(figure, path):
    """The same with matplotlib; ImportError without it."""
    from matplotlib.figure import Figure
    canvas = Figure(figsize=(6.4, 4.8), dpi=150, layout="constrained")
    axes = canvas.subplots()
    colour_of = lambda colour: "#777777" if colour == "grey" else COLOURS[shade(colour)]
    for kind, colour, points, _ in figure["marks"]:
        if kind == "bar":
            (a, b), (c, d) = points
            axes.bar(a, d - b, c - a, b, align="edge", color=colour_of(colour))
        else:
            axes.plot(*zip(*points), {"line": "-", "dashes": "--", "dots": "o"}[kind], color=colour_of(colour))
    for of, (label, low, high, ticks) in (("x", figure["x"]), ("y", figure["y"])):
        axes.set(**{f"{of}label": label, f"{of}lim": (low, high), f"{of}ticks": [v for v, _ in ticks], f"{of}ticklabels": [t for _, t in ticks]})
    for colour, text in figure["legend"]:
        axes.plot([], [], "s", color=colour_of(colour), label=text)
    axes.set_title(figure["title"])
    axes.grid(axis="y" if figure["y"][0] else "x", alpha=0.3)
    axes.legend(fontsize="small")
    canvas.savefig(path)
