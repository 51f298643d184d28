"""What the tools share: flags, the games and models of a run, tables, figures."""

import argparse
import math
from inspect import cleandoc
from pathlib import Path

import train
from fast_alfworld import fingerprint, games_for
from fast_alfworld.cli import Parser, UserError, at_least_one
from fast_alfworld.files import read_json, write_file, write_json
from run import Context, Run, games_of
from utils import pick_device, read_model

# --- command line --------------------------------------------------------------------------------


def list_of(kind):
    """The type of a flag that is a list, separated by commas; duplicates are dropped."""
    def values(text):
        return list(dict.fromkeys(kind(word) for word in text.split(",")))

    values.__name__ = f"list of {kind.__name__}"
    return values


def adder(parser):
    """-> add(flag, default, help, …), which takes the type from the default"""
    def add(flag, default, help, **options):
        kind = {} if "action" in options else {"type": type(default)}
        parser.add_argument(flag, default=default, help=help, **{**kind, **options})

    return add


def parser_of(part):
    """The function of a part -> its Parser, `adder` of it"""
    parser = Parser(cleandoc(part.__doc__), f"%(prog)s {part.__name__} [flags]")
    return parser, adder(parser)


def run_flags(add):
    """The flags of all tools that work on a run."""
    add("--run", "runs/default", "a run directory of train.py", metavar="DIR")
    add("--iteration", 1, "whose Q_i; π_{i−1} is the policy it was trained on", type=at_least_one)
    common_flags(add)


def common_flags(add):
    add("--data", None, "folder with json_2.1.1 (default: the run's, else $ALFWORLD_DATA)",
        type=str, metavar="DIR")
    add("--threads", None, "CPU threads (default: all cores)", type=at_least_one)
    add("--device", "auto", "auto, cpu or cuda")


def run_part(doc, commands, argv):
    """Run commands[part](flags), the part being the first word of the command line."""
    if not argv or argv[0] not in commands:
        parser = Parser(doc, "%(prog)s PART [flags]     (PART --help shows the flags)")
        parser.add_argument("part", choices=commands, help="what to do",
                            default=argparse.SUPPRESS)
        parser.parse_args(argv)
    commands[argv[0]](argv[1:])


# --- runs ----------------------------------------------------------------------------------------

def open_run(folder):
    """A run directory of train.py, to be read only. -> Run, its config.json"""
    run = object.__new__(Run)
    run.path = Path(folder)
    if not (run.path / "config.json").exists():
        raise UserError(f"{folder}: no run of train.py there (config.json is missing)")
    config = read_json(run.path / "config.json")
    if not isinstance(config, dict) or "ablation" not in config.get("flags", {}):
        raise UserError(f"{folder}: not a run of this program")
    return run, config


def read_run(folder, split="dev", device="auto", data=None):
    """A run directory -> Context with the games of train and dev, the games of this split.

    UserError where its games are not those it was trained on.
    """
    run, config = open_run(folder)
    args, steps = train.parse(["--ablation", config["flags"]["ablation"] or ""])
    vars(args).update(config["flags"])
    args.data, args.test_splits = data or args.data, ""
    own, dev, _ = games_of(args, steps)
    chosen = dev if split == "dev" else games_for(args.games, args.data, split,
                                                  max(8, args.n_generated // 20))[0]
    for name, games in {"train": own, "dev": dev, split: chosen}.items():
        known, now = config["games"].get(name), fingerprint(games)
        if known not in (None, now):
            raise UserError(f"{folder}: the run had other games of {name} ({known}; now {now}): "
                            "name their folder by --data")
    tokenizer = read_model(run.path / "iter0/policy")[1]
    return Context(args, steps, run, pick_device(device), own, dev, {}, tokenizer), chosen


# --- results -------------------------------------------------------------------------------------

def write_table(out, rows, head, cells):
    """Write OUT/rows.json (without single episodes) and OUT/table.md, and print the table.

    rows: list of dicts; head: column names; cells(row) -> list of texts.
    """
    write_json(Path(out, "rows.json"),
               [{k: v for k, v in row.items() if k != "episodes"} for row in rows])
    lines = [head, ["---"] * len(head), *map(cells, rows)]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    write_file(Path(out, "table.md"), lambda p: p.write_text(text))
    print(text, end="", flush=True)


def percent(x):
    return f"{100 * x:.1f} %"


def span(interval):
    """(low, high) -> text, in percent"""
    return f"{100 * interval[0]:.1f} … {100 * interval[1]:.1f}"


def new_figure(panels, columns=None, title=None):
    """-> matplotlib figure, list of its axes"""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install -r requirements-dev.txt") from None
    columns = columns or panels
    lines = math.ceil(panels / columns)
    figure = Figure((5.2 * columns, 3.8 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title or "")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def save_figure(figure, path):
    write_file(path, lambda p: figure.savefig(p, format=Path(path).suffix[1:], dpi=150))
