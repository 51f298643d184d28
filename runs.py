"""The run directory: what was asked for, what is done, what came out; everything written whole, so that a run can be killed.

    config.json      flags, seed, git commit, versions       data.json      the games
    state.json       time, memory by stage                   metrics.jsonl  one line a finished stage
    result.json      π_0 … π_N, and which is best on dev     best/          that policy, and its PRM
    iter0/policy     π_0        iter<i>/rollouts, checks, prm, policy       rollouts of π_{i−1}, what Q_i starts from, Q_i, π_i
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

from common import UserError, changes, forget_peak_memory, peak_memory, pick_device, read_json, write_file, write_json
from eval import paired_bootstrap
from games import DataError, games_for, same_games, split_dev
from model import Config, Transformer
from ranks import everyones, first_says, rank, ranks, wait

UNCOMPARED = ("out", "threads", "device", "data")  # flags that may differ when a run is continued


def same_flags(path, flags, but=()):
    """UserError where the run in that folder was started with other flags, `but` for those named."""
    old = read_json(path / "config.json")["flags"]
    if differ := changes(old, flags, sorted({*old, *flags} - {*UNCOMPARED, *but})):
        raise UserError(f"{path} holds a run with other flags ({'; '.join(differ)}): give them as they were, or another --out")


def provenance():
    """Where a result comes from: git commit, versions, machine."""
    here = Path(__file__).parent
    git = lambda *command: subprocess.run(["git", "-C", str(here), *command], capture_output=True, text=True)
    commit = git("rev-parse", "HEAD") if (here / ".git").exists() else None
    return {"commit": commit.stdout.strip() + "+changes" * bool(git("status", "--porcelain", "-uno").stdout)
                      if commit and not commit.returncode else None,
            "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "alfworld", "numpy", "tokenizers", "safetensors")}},
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores" + (f", {ranks()} processes" if ranks() > 1 else "")
                       + (f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "")}


def begun(path):
    """Whether any stage of the run has left something: until then a mistaken flag may be mended."""
    return any(path.glob("*/*"))


def settle_flags(path, flags):
    """Record the flags of a new run in its config.json, and where it comes from; those of a continued one must be the same (`same_flags`),
    but that more iterations may follow those it has."""
    config, new = path / "config.json", {"flags": flags, "command": " ".join(sys.argv)}
    if first_says(config.exists() and begun(path)):
        old = read_json(config)
        more = {"iters": flags["iters"]} if flags.get("iters", 0) > old["flags"].get("iters", 0) else {}
        same_flags(path, flags, but=more)
        wait()
        if more and rank() == 0:
            (path / "result.json").unlink(missing_ok=True)  # it is no longer whole
            write_json(config, {**old, **new, "flags": old["flags"] | more})
    elif rank() == 0:
        write_json(config, {**new, **provenance()})
    wait()


def records_of(path):
    """-> {(iteration, stage): record} of a run's finished stages, in order of both"""
    files = [f for f in path.glob("iter*/*.json") if f.parent.name[4:].isdecimal()]
    return {(int(f.parent.name[4:]), f.stem): read_json(f) for f in sorted(files, key=lambda f: (int(f.parent.name[4:]), f.name))}


class Stage:
    """One stage of one iteration; `done` when its record exists. `state` is where its training keeps its place."""

    def __init__(self, run, name):
        self.run, self.name, self.start, self.cores = run, name, time.monotonic(), sum(os.times()[:4])
        forget_peak_memory()
        self.workers_memory = 0  # bytes that the processes of this stage have held at most
        self.record, self.state = run.path / f"{name}.json", run.path / f"{name}.state.safetensors"
        self.done = first_says(self.record.exists())
        if self.done and rank() == 0:
            self.state.unlink(missing_ok=True)  # killed between the two lines of `finish`

    def cost(self):
        """-> seconds of all cores, and the most bytes held, so far, by this process and its workers"""
        return sum(os.times()[:4]) - self.cores, peak_memory() + self.workers_memory

    def finish(self, record):
        if rank() == 0:
            write_json(self.record, {"stage": self.name, "commit": self.run.commit, **record})
            self.state.unlink(missing_ok=True)
            self.run.write_metrics()


BEAT = 30.0  # seconds between two notes of what a stage has cost so far


@contextmanager
def every(seconds, note):
    """Call `note` every so many seconds, beside what is done meanwhile."""
    over = threading.Event()

    def beat():
        while not over.wait(seconds):
            note()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Run:
    def __init__(self, args):
        self.path, self.device = Path(args.out), pick_device(args.device)
        cores = torch.get_num_threads()
        # processes that play rollouts: several keep a GPU from waiting for worlds
        self.workers = cores if self.device.type == "cpu" else min(8, cores)
        settle_flags(self.path, dict(vars(args)))
        self.commit = provenance()["commit"]  # of this sitting; a run may go on by later code

    def note_data(self, source):
        """Record the games of the run; a continued run must have the same ones."""
        file = self.path / "data.json"
        old = read_json(file) if file.exists() and begun(self.path) else source
        if old.keys() != source.keys() or not all(same_games(old[split], source[split]) for split in old):
            raise UserError(f"{self.path} was started on other games ({old}; now {source}): use another --out")
        if rank() == 0:
            write_json(file, source)

    @contextmanager
    def stage(self, name):
        """A Stage; the time spent in it, on the clock and of all cores, is added up in state.json over all sittings,
        and the most memory that this process has held in it, with its workers'; of several ranks, which begin and end it together, the sums.
        A killed sitting counts up to its last BEAT, each rank like the first one, workers not."""
        stage, file = Stage(self, name), self.path / "state.json"
        before = {"last": None, "seconds": {}, "core_seconds": {}, "peak_mb": {}, **(read_json(file) if file.exists() else {})}

        def note(costs=None):
            """Write what the stage has cost: in earlier sittings, and in this one so far; costs: of each rank, where they have told one another."""
            core_seconds, memory = map(sum, zip(*(costs or [stage.cost()] * ranks())))
            added = {kind: {**before[kind], name: round(before[kind].get(name, 0) + spent, 2)}
                     for kind, spent in (("seconds", time.monotonic() - stage.start), ("core_seconds", core_seconds))}
            peak = {**before["peak_mb"], name: max(before["peak_mb"].get(name, 0), round(memory / 1e6))}
            write_json(file, {**before, **added, "peak_mb": peak, "last": name if stage.record.exists() else before["last"]})

        counted, costs = not stage.done and rank() == 0, None
        try:
            with every(BEAT, note) if counted else nullcontext():
                yield stage
                costs = everyones(stage.cost())
        finally:
            if counted:
                note(costs)

    def records(self):
        """All finished stages' records, in order of iteration and name."""
        return list(records_of(self.path).values())

    def write_metrics(self):
        lines = [json.dumps({k: v for k, v in r.items() if k != "episodes" or isinstance(v, int)}) for r in self.records()]
        write_file(self.path / "metrics.jsonl", lambda p: p.write_text("\n".join(lines) + "\n"))


def load_games(args, run):
    """-> .train, .dev (held out of train by task folder), .test {split: games}, .source of train and dev in words, .by_id {id: train or dev game}."""
    everything, source = games_for(args.games, args.data, "train", args.n_generated)
    train, dev = ([game for game in part if game.task_type != args.without] for part in split_dev(everything, args.dev_games))
    if not dev:
        raise UserError(f"{len(everything)} train games are too few to hold some out as dev (--n-generated, --dev-games)")
    where = "alfworld" if everything[0].path else "tiny" if args.games == "tiny" else "generated"
    test, sources = {}, {"train": source}
    for split in args.test_splits:
        try:
            test[split], sources[split] = games_for(where, args.data, split, args.n_generated // 4)
        except DataError:
            print(f"no games of {split}: not evaluated", file=sys.stderr)
    run.note_data(sources)
    return SimpleNamespace(train=train, dev=dev, test=test, source=source, by_id={game.id: game for game in (*train, *dev)})


def estimate(args, run, games):
    """Say how long the run will take on this machine, from the measured speed of a few passes of a model of this size."""
    if (run.path / "iter0/sft.json").exists():
        print(f"continuing {run.path}", file=sys.stderr)
        return
    model = Transformer(Config(700, args.dim, args.layers, args.heads, args.kv_heads, args.hidden, args.context)).to(run.device)
    ids = torch.randint(700, (16, 160), device=run.device)

    def seconds(step):
        step()
        start = time.monotonic()
        for _ in range(3):
            step()
        return (time.monotonic() - start) / 3 / ids.numel()

    # a token, forward and backward; half as much again goes into the optimiser, the telling of texts and ragged batches, and the ranks share the work
    train = 1.5 / ranks() * seconds(lambda: model.logits(model(ids)).logsumexp(-1).mean().backward())
    # tokens of an episode: about 160 a demonstration, 250 a rollout; an update on glances is worth 2,400, and 100 a search; sampling a token costs
    # about half of training on it
    per_rollout, a_check = 140 * train, args.check_batch * 200 * train
    lessons = (args.inverse_updates * (args.prm_batch * 250 * train + a_check * bool(args.checks)) if args.algo == "inverseprm" else
               args.rollouts * 250 * args.prm_epochs * train)
    stages = {"SFT": (max(args.demos, args.sft_updates * args.sft_batch) * 160
                      + args.glances * (2400 + 100 * args.searches)) * train * (not args.init),
              "rollouts": args.iters * args.rollouts * per_rollout,
              "forks": args.iters * args.rollouts * args.forks * 10 * per_rollout,  # behind each of 13 actions, and three quarters as long
              "checks": args.iters * args.checks * a_check,
              "PRM": args.iters * args.ensemble * lessons,
              "DPO": args.iters * args.pairs / args.states_per_trajectory * 400 * train,
              "evaluation": (args.iters + 1) * (args.dev_episodes * len(games.dev)
                                                + args.episodes_per_game * sum(map(len, games.test.values()))) * per_rollout}
    total = sum(stages.values())
    show = lambda s: f"{s / 3600:.1f} h" if s > 5400 else f"{s / 60:.0f} min" if s > 90 else f"{s:.0f} s"
    print(f"estimate for this machine: {show(total)} (" + ", ".join(f"{k} {show(v)}" for k, v in stages.items() if v) + ")", file=sys.stderr)


def final_table(args, run):
    """Print π_0 … π_N on every split, choose the best on dev, write result.json and best/: policy, prm, and in run.json where they come from."""
    if rank():
        return
    run.write_metrics()  # for a run killed before it had written its last line
    evals = {(i, stage[5:]): record for (i, stage), record in records_of(run.path).items() if stage.startswith("eval-")}
    iterations, splits = sorted({i for i, _ in evals}), sorted({s for _, s in evals}, key=lambda s: (s != "dev", s))
    best = max(iterations, key=lambda i: (evals[i, "dev"]["success"], -i))
    lines = [f"{'':6}" + "".join(f"{s + ', ' + str(evals[0, s]['games']) + ' games':>26}" for s in splits) + f"{'inadmissible':>14}"]
    rows = []
    for i in iterations:
        row = {"iteration": i, **{s: {k: evals[i, s][k] for k in ("success", "mean_actions", "inadmissible", "games")} for s in splits}}
        for s in splits:
            row[s]["gain_over_0"] = paired_bootstrap(evals[0, s]["episodes"], evals[i, s]["episodes"])
        rows.append(row)
        lines.append(f"π_{i}{' *' if i == best else '  '}  " + "".join(f"{row[s]['success']:16.1%}{row[s]['mean_actions']:6.1f} act" for s in splits)
                     + f"{row['dev']['inadmissible']:14.1%}")
    if len(rows) > 1:
        lines.append("gain over π_0 in points (95 % interval, paired bootstrap over games):")
    for row in rows[1:]:
        gains = [f"{s} {100 * gap:+.1f} ({100 * low:+.1f} … {100 * high:+.1f})" for s in splits for gap, low, high in [row[s]["gain_over_0"]]]
        lines.append(f"  π_{row['iteration']}  " + "   ".join(gains))
    seconds = read_json(run.path / "state.json")["seconds"]
    (run.path / "result.json").unlink(missing_ok=True)  # a run that has it is whole
    for kind in ("policy", "prm"):
        source, target = run.path / f"iter{best}/{kind}", run.path / f"best/{kind}"
        shutil.rmtree(target, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, target)
    write_json(run.path / "best/run.json", {
        **read_json(run.path / "config.json"), "commits": list(dict.fromkeys(r.get("commit") for r in run.records())),
        "data": read_json(run.path / "data.json"), "metrics": rows[best]})
    write_json(run.path / "result.json", {"best": best, "rows": rows, "max_steps": args.max_steps, "temperature": args.eval_temperature,
                                          "engine": "fast", "alfworld": version("alfworld"), "data": read_json(run.path / "data.json")})
    print(f"\ncap {args.max_steps}, temperature {args.eval_temperature}, free generation, fast engine; * best on dev -> {run.path}/best")
    print(*lines, sep="\n")
    print(f"{sum(seconds.values()) / 60:.1f} min in all")
