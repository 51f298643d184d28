"""What all stages share: command line, files, random numbers by key, ranks, training loop, run."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import distributed as dist
from tqdm import tqdm

from model import Transformer
from tokenizer import Tokenizer

# --- command line --------------------------------------------------------------------------------


class UserError(Exception):
    """The caller's mistake: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """--help shows the module's docstring and every default; a bad flag is a UserError."""

    def __init__(self, doc, usage="%(prog)s [flags]"):
        super().__init__(description=doc, usage=usage, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if "(default: " in action.help or action.default is argparse.SUPPRESS:
            return action.help
        words = {"False": "off", "True": "on", "None": "none"}
        value = words.get(str(action.default), action.default)
        return f"{action.help} (default: {value})"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, action.dest.upper())


def between(low, high=math.inf, kind=float):
    """The type of a flag that is a number in low … high."""
    def number(text):
        x = kind(text)  # argparse reports its ValueError
        if not (low <= x <= high and (x < math.inf or high == math.inf and kind is float)):
            end = f"be at least {low:g}" if high == math.inf else f"lie in {low:g} … {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must {end}")
        return x

    number.__name__ = kind.__name__
    return number


at_least_one = between(1, 10 ** 9, int)
a_seed = between(0, 2 ** 31, int)


def a_temperature(text):
    """The type of a flag: 0 (greedy) or 0.001 … 100."""
    return float(text) if text in ("0", "0.0") else between(1e-3, 100)(text)


def command_line(main, interrupted="interrupted"):
    """Run `main`: the user's mistakes and Ctrl-C become one line on stderr.

    A plain ValueError is a bug and keeps its traceback; GameError and DataError are kinds of it.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left: `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or type(error) is ValueError:
            raise
        print(f"error: {error}".splitlines()[0][:500], file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        sys.exit(130)


def set_up_torch(threads=None):
    """Use all cores, or so many threads; keep freed memory, which saves page faults (glibc)."""
    cores = cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(min(threads or share, 4 * cores))
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never serve a large block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    except (OSError, AttributeError):
        pass  # another C library


def cpu_count():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device; UserError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: must be auto, cpu or cuda")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def end_with(parent):
    """Have the system kill this process when its parent ends, even by SIGKILL (Linux)."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass
    if os.getppid() != parent:
        os._exit(1)


def peak_memory():
    """Bytes of memory that this process has held at most, 0 where that is unknown."""
    try:
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:
        return 0


# --- files, written whole and renamed into place -------------------------------------------------

def write_file(path, write):
    """write(temporary path), then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a power cut leaves no empty file under the new name
        os.replace(temporary, path)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{path}: cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or a damaged one ({error})") from None


def read_model(folder, device="cpu", head="lm"):
    """A folder written by `save_model` -> (model, tokenizer). head: "lm" (policy), "score" (PRM)."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no model there ({name} is missing)")
    try:
        model, tokenizer = Transformer.load(folder, device).eval(), Tokenizer.load(folder)
    except Exception as error:  # each of the three files has errors of its own library
        raise UserError(f"{folder}: not a model of this program, or a damaged one "
                        f"({error!r})") from error
    if model.config.head != head:
        raise UserError(f"{folder}: that is not a {'policy' if head == 'lm' else 'PRM'}")
    if model.config.vocab_size != len(tokenizer):
        raise UserError(f"{folder}: its model and its tokenizer differ in vocabulary size")
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{folder}: its weights are not all finite numbers")
    return model, tokenizer


def save_model(folder, model, tokenizer):
    """Write a policy or PRM as a folder, file by file; config.json comes last."""
    if rank():
        return
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    model.save(temporary)
    tokenizer.save(temporary)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        write_file(folder / name, lambda p: os.replace(temporary / name, p))
    temporary.rmdir()


# --- random numbers by key -----------------------------------------------------------------------

def key(text):
    """A stable 63-bit number for a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*keys):
    """A number in [0, 1) for each tuple of integers (arrays broadcast): splitmix64 of the keys.

    The same keys give the same number, whatever the batch, the order or the process.
    """
    with np.errstate(over="ignore"):
        h = np.uint64(0x243F6A8885A308D3)
        for k in keys:
            h = (h ^ np.asarray(k).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            h = h ^ (h >> np.uint64(31))
    return (h >> np.uint64(11)).astype(np.float64) / 2.0 ** 53


def generator(*keys):
    """A numpy generator for a tuple of integers and texts."""
    return np.random.default_rng([key(k) if isinstance(k, str) else k for k in (*keys, 1)])


def pad(rows, value=0, dtype=torch.long):
    """List of 1-D arrays -> (B, longest) tensor, padded at the end."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


# --- ranks: what `torchrun --nproc_per_node=N train.py …` needs ----------------------------------

def join_ranks(device):
    """Meet the other ranks, if torchrun started this process; each takes a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3))
    if rank():
        sys.stdout = sys.stderr = open(os.devnull, "w")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def mine(items):
    """This rank's part of a list."""
    return items[rank()::dist.get_world_size()] if dist.is_initialized() else items


def wait_for_ranks():
    if dist.is_initialized():
        dist.barrier()


def all_gather(value):
    """The values of all ranks, in order."""
    if not dist.is_initialized():
        return [value]
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def sum_gradients(model):
    """Sum the gradients over the ranks, in place; without a loss they are 0."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if dist.is_initialized():
            dist.all_reduce(p.grad)


# --- one training loop for every stage, resumable after a kill -----------------------------------

SAVE_EVERY = 10.0  # seconds

def optimise(model, loss_of, updates, *, lr, state, name, weight_decay=0.01, watch=None):
    """Train by AdamW for `updates` steps of loss_of(step) -> (loss, {metric: (sum, count)}). -> log

    The learning rate rises over the first 5 % of the updates, then falls linearly to 0. The loss
    must depend on the step and the weights alone: then a run that was killed and continued from the
    file `state` equals an undisturbed one. The log holds means of the metrics over about 20
    stretches, each with what watch() -> {metric: value} says at its end. Of several ranks each
    returns its part of the loss. UserError where the loss is no finite number.
    """
    optimizers = optimizers_of(model, lr, weight_decay)
    step, log, sums = _load_state(state, model, optimizers)
    saved, stretch = time.monotonic(), max(1, -(-updates // 20))
    model.train()
    bar = tqdm(total=updates, initial=step, desc=name, unit="update", dynamic_ncols=True)
    while step < updates:
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = lr * min((step + 1) / max(1, 0.05 * updates), 1 - step / updates)
        model.zero_grad(set_to_none=True)
        loss, metrics = loss_of(step)
        if loss is not None:
            if not loss.isfinite():
                raise UserError(f"{name}: the loss is {loss.item()} at update {step}; "
                                "try a smaller learning rate")
            loss.backward()
        sum_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        for metric, (total, n) in metrics.items():
            before = sums.get(metric, (0.0, 0.0))
            sums[metric] = before[0] + float(total), before[1] + float(n)
        bar.update()
        if step % stretch == 0 or step == updates:
            gathered = all_gather(sums)
            means = {m: sum(s.get(m, (0, 0))[0] for s in gathered) / n for m in sums
                     if (n := sum(s.get(m, (0, 0))[1] for s in gathered))}
            log.append({"step": step, **means, **(watch() if watch else {})})
            sums = {}
            bar.set_postfix({k: f"{v:.3f}" for k, v in list(log[-1].items())[1:6]})
            model.train()
        if time.monotonic() - saved > SAVE_EVERY or step == updates:
            if rank() == 0:
                _save_state(state, model, optimizers, step, log, sums)
            saved = time.monotonic()
    bar.close()
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"{name}: the weights are not all finite numbers after update {step}; "
                        "try a smaller learning rate")
    model.eval()
    return log


def optimizers_of(model, lr, weight_decay):
    """Muon for the matrices inside the layers, AdamW for the rest, at one learning rate.

    Muon's updates are scaled to the size of AdamW's. In-context copying, the bottleneck of SFT
    here, is learned in a fraction of the updates that AdamW alone needs (docs/results.md).
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = set(map(id, inner))
    rest = [p for p in model.parameters() if id(p) not in known]
    if os.environ.get("ADAMW"): inner, rest = [], list(model.parameters())
    return [*([torch.optim.Muon(inner, lr=lr, weight_decay=weight_decay,
                             adjust_lr_fn="match_rms_adamw")] if inner else []),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)]


def _save_state(path, model, optimizers, step, log, sums):
    tensors = {f"weight {name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for kind, value in optimizer.state.get(p, {}).items():
                tensors[f"{kind} {name}"] = value.contiguous()
    progress = {"progress": json.dumps({"step": step, "log": log, "sums": sums})}
    write_file(path, lambda p: save_file(tensors, str(p), metadata=progress))


def _load_state(path, model, optimizers):
    """-> (step, log, sums) of an interrupted training, its weights and moments loaded."""
    if not Path(path).exists():
        return 0, [], {}
    try:
        with safe_open(str(path), "pt") as f, torch.no_grad():
            stored = {}
            for full in f.keys():
                kind, name = full.split(" ", 1)
                stored.setdefault(name, {})[kind] = f.get_tensor(full)
            progress = json.loads(f.metadata()["progress"])
            owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
            for name, p in model.named_parameters():
                p.copy_(stored[name].pop("weight"))
                if stored[name]:
                    owner[p].state[p] = {k: v.to(p.device) for k, v in stored[name].items()}
    except Exception as error:  # of safetensors, JSON, or a missing tensor
        raise UserError(f"{path}: damaged ({error!r}); delete it to start this stage again") from error
    return progress["step"], progress["log"], {k: tuple(v) for k, v in progress["sums"].items()}
