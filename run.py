"""The run directory: what was asked for, what is done, what came out. A run can be killed anywhere.

    config.json      flags, games, provenance            iter0/policy     π_0
    metrics.jsonl    the records of all finished stages  iter<i>/rollouts rollouts of π_{i−1}
    state.json       seconds and memory by stage         iter<i>/prm      Q_i
    result.json      π_0 … π_N, best on dev              iter<i>/policy   π_i
    best/            that policy, and its PRM            iter<i>/*.json   records
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fast_alfworld import fit_prior, training_games
from fast_alfworld.cli import UserError
from fast_alfworld.files import lock, provenance, read_json, write_file, write_json
from rollout import sample
from utils import rank, read_model, wait_for_ranks


class Run:
    """A run directory, whose stages are each run once."""
    within = np.zeros(2)  # seconds and core-seconds of the stages within the one that is running

    def __init__(self, path, flags, games, free=(), alone=None):
        """Start or continue a run: flags {name: value} and games {split: fingerprint}.

        UserError where they differ from the run that is continued, `free` ones excepted; or,
        with `alone`, with this message where another process is at work there."""
        self.path, config = Path(path), Path(path, "config.json")
        new = {"flags": flags, "games": games}
        old = read_json(config) if config.exists() else None
        if self.path.is_dir() and any(f.name != ".lock" for f in self.path.iterdir()) and not (
                isinstance(old, dict) and new.keys() <= old.keys()):
            raise UserError(f"{path} is not empty and holds no run: use another --out")
        differ = [f"{'--' * (part == 'flags')}{name.replace('_', '-')} {old[part].get(name)} -> "
                  f"{new[part].get(name)}" for part in (new if old else ())
                  for name in sorted({*old[part], *new[part]} - {*free})
                  if old[part].get(name) != new[part].get(name)]
        if differ and any(self.path.glob("*/*")):
            raise UserError(f"{path} holds a run with other settings ({'; '.join(differ)}): "
                            "use them, or another --out")
        self.origin = provenance()
        wait_for_ranks()  # until all have looked
        if rank() == 0:
            if alone:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock = lock(self.path / ".lock", alone)
            write_json(config, {**new, "command": " ".join(sys.argv), **self.origin})
            if self.records():  # a run that was killed may lack the last line
                self._write_metrics()
        wait_for_ranks()

    def once(self, name, make, files=()):
        """make(state) -> {…}, the stage's record, unless there is one. -> the record

        `state`: a file in which make keeps its place, removed at the end. files: what the stage
        writes; if one was deleted, the stage is run again."""
        record, state = self.path / f"{name}.json", self.path / f"{name}.state.safetensors"
        missing = not record.exists() or not all(file.exists() for file in files)
        wait_for_ranks()  # until all have looked
        if missing:
            clock = lambda: np.array([time.monotonic(), sum(os.times()[:4])])
            start, outer, self.within = clock(), self.within, np.zeros(2)
            try:
                made = make(state)
                wait_for_ranks()
                if rank() == 0:
                    write_json(record, {"stage": name, "commit": self.origin["commit"], **made})
                    self._write_metrics()
            finally:
                spent = clock() - start
                self._add_cost(name, *(spent - self.within))
                self.within = outer + spent
        wait_for_ranks()
        if rank() == 0:
            state.unlink(missing_ok=True)
        found = read_json(record)
        if found.get("stage") != name:
            raise UserError(f"{record}: damaged; delete it, and the same command makes it again")
        return found

    def records(self):
        """{(iteration, stage): record} of the finished stages, in order of iteration."""
        files = sorted(self.path.glob("iter[0-9]*/*.json"),
                       key=lambda f: (int(f.parent.name[4:]), f.name))
        return {(int(f.parent.name[4:]), f.stem): read_json(f) for f in files}

    def costs(self):
        """{stage: {"seconds", "core_seconds", "peak_mb"}}, over all sittings."""
        file = self.path / "state.json"
        return read_json(file) if file.exists() else {}

    def _write_metrics(self):
        lines = [json.dumps({k: v for k, v in record.items() if k != "episodes"}) + "\n"
                 for record in self.records().values()]
        write_file(self.path / "metrics.jsonl", lambda p: p.write_text("".join(lines)))

    def _add_cost(self, name, seconds, core_seconds):
        if rank():
            return
        costs, peak = self.costs(), 0  # bytes of memory; unknown on Windows
        if find_spec("resource"):
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        old = costs.get(name, {"seconds": 0, "core_seconds": 0, "peak_mb": 0})
        costs[name] = {"seconds": round(old["seconds"] + seconds, 2),
                       "core_seconds": round(old["core_seconds"] + core_seconds, 2),
                       "peak_mb": max(old["peak_mb"], round(peak / 1e6))}
        write_json(self.path / "state.json", costs)


def games_of(args, steps):
    """-> the train games, dev (held out of them by task folder), {test split: games}"""
    splits = filter(None, args.test_splits.split(","))
    return training_games(args.games, args.data, args.n_generated, splits,
                          lambda some: steps.games(args, some))


@dataclass
class Context:
    """What the stages of a run share."""
    args: SimpleNamespace
    steps: SimpleNamespace  # the named steps
    run: Run
    device: object
    train: list = field(default_factory=list)
    dev: list = field(default_factory=list)
    test: dict = field(default_factory=dict)  # {split: games}
    tokenizer: object = None

    @property
    def act(self):
        """How the policy acts: among candidates, or None: generating freely."""
        return sample if self.args.actions == "candidates" else None

    @cached_property
    def by_id(self):
        return {game.id: game for game in self.train}

    @cached_property
    def prior(self):
        return fit_prior(self.train)

    @cached_property
    def demonstrations(self):
        return self.steps.demonstrations(self)

    def policy(self, i):
        return read_model(self.run.path / f"iter{i}/policy", self.device)[0]

    def prm(self, i, name="prm"):
        return read_model(self.run.path / f"iter{i}/{name}", self.device, "score")[0]
