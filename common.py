"""What several stages share: the command line, files written whole, randomness by name, and one resumable training loop."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from model import AUTOCAST, Transformer
from ranks import everyones, rank, sum_gradients
from tokenizer import Tokenizer


class UserError(Exception):
    """A mistake of the caller's: shown as one line, exit code 2."""


class Parser(argparse.ArgumentParser):
    """The flags of a command: --help shows the module's docstring and every default; a bad flag is a UserError, in one line."""

    def __init__(self, doc, usage="%(prog)s [flags]"):
        super().__init__(description=doc, usage=usage, formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        raise UserError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        if "(default: " in action.help or action.default is argparse.SUPPRESS:  # said in better words, or --help itself
            return action.help
        values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        words = {"None": "none", "False": "off", "True": "on"}
        return f"{action.help} (default: {' '.join(words.get(str(v), str(v)) for v in values)})"

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type, action.dest.upper())


def between(low, high, kind=float):
    """The type of a flag that is a number in low … high (math.inf: no end)."""
    def number(text):
        x = kind(text)  # its ValueError is argparse's to tell
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"{text}: must " + (f"be at least {low:g}" if high == math.inf else f"lie in {low:g} … {high:g}"))
        return x

    number.__name__ = kind.__name__
    return number


def a_temperature(text):
    """The type of a flag: 0, greedy, or a temperature that a sample can be taken at."""
    x = float(text)
    if x and not 1e-3 <= x <= 100:
        raise argparse.ArgumentTypeError(f"{text}: must be 0, which is greedy, or lie in 0.001 … 100")
    return x


def command_line(main):
    """Run a command's `main`, with mistakes of the user as one line and exit code 2, and Ctrl-C as one line."""
    try:
        main()
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        raise SystemExit(_fail(f"error: {error}")) from None
    except KeyboardInterrupt:
        raise SystemExit(_fail("interrupted; the same command continues where it stopped", 130)) from None


def _fail(text, code=2):
    print("\n".join(text.splitlines()[:1]), file=os.sys.stderr)
    return code


def set_up_torch(threads=None):
    """Threads once, and glibc kept from returning every tensor over 32 MB to the system only to fault its pages in again.

    threads: all cores, unless this or $OMP_NUM_THREADS says; of several processes of torchrun (which sets that to 1) each has its share.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    cores, processes = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(threads or (max(1, cores // processes) if processes > 1 else int(os.environ.get("OMP_NUM_THREADS", cores))))
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never serve a large block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    except OSError:
        pass  # not glibc: nothing to tune


def peak_memory():
    """Bytes of memory that this process has held at most, as Linux counts them; elsewhere 0."""
    try:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def end_with(parent):
    """Have the system kill this process when its parent ends, even by SIGKILL (Linux)."""
    try:
        ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    except OSError:
        pass
    if os.getppid() != parent:
        os._exit(1)


# --- files, written whole and renamed into place -----------------------------------------------------------------------

def write_file(path, write):
    """write(temporary path), then rename: a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(temporary)
    os.replace(temporary, path)


def write_json(path, value):
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path}: not a JSON file, or a damaged one ({error})") from None


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device; UserError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None


def read_model(folder, device="cpu", head="lm"):
    """A folder written by `save_model` -> (model, tokenizer); head "lm": a policy, "score": a PRM of either kind. UserError where there is none."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no model there ({name} is missing)")
    try:
        model, tokenizer = Transformer.load(folder, device).eval(), Tokenizer.load(folder)
    except Exception as error:  # each of the three files has errors of its own library, tokenizers' a bare Exception
        raise UserError(f"{folder}: not a model of this program, or a damaged one ({error!r}): copy it again, or name another") from error
    if (model.config.head == "lm") != (head == "lm"):
        raise UserError(f"{folder}: that is not a {'policy' if head == 'lm' else 'PRM'}")
    return model, tokenizer


def save_model(folder, model, tokenizer):
    """Write a policy or PRM as a folder, whole: config.json (last) says that it is complete. The first of several ranks does."""
    if rank():
        return
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    model.save(temporary)
    tokenizer.save(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        os.replace(temporary / name, folder / name)
    temporary.rmdir()


# --- randomness by name ------------------------------------------------------------------------------------------------

def key(text):
    """A stable 63-bit number for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def uniform(*keys):
    """A number in [0, 1) for each tuple of integers (arrays broadcast): splitmix64 of the keys, one after the other.

    The same keys give the same number, in whatever batch, order or process it is asked for.
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
    """A numpy generator named by integers and texts."""
    return np.random.default_rng([key(k) if isinstance(k, str) else k for k in keys])


# --- padding -----------------------------------------------------------------------------------------------------------

def pad(rows, value=0, dtype=torch.long):
    """List of 1-D arrays -> (B, longest) tensor, padded at the end."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.as_tensor(row, dtype=dtype)
    return out


# --- training ----------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum of which every direction counts alike (Jordan et al. 2024), scaled to the step length of AdamW (Liu et al. 2025).

    `torch.optim.Muon(…, adjust_lr_fn="match_rms_adamw")`, but in float32 on a CPU, where bfloat16 without hardware for it is ten times as slow
    (`python bench.py muon`), and with all matrices of one shape at once.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), some in shapes.items():
                buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in some]
                for buffer, p in zip(buffers, some):
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                ahead = torch.stack([p.grad.lerp(buffer, group["momentum"]) for buffer, p in zip(buffers, some)])  # Nesterov's
                for p, update in zip(some, orthogonalised(ahead)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def orthogonalised(matrices, iterations=5):
    """Matrices (n, A, B) -> the same with their singular values at about one (0.7 … 1.2), by Newton-Schulz iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(AUTOCAST.get(matrices.device.type, torch.float32))
    wide = x.size(1) <= x.size(2)
    x = x if wide else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT  # (n, min(A, B), min(A, B))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


def optimisers(model, lr, weight_decay):
    """Muon for the matrices inside the layers, AdamW for the rest (embedding, norms, head), at one learning rate.

    In-context copying, the bottleneck of SFT here, is learned in about half the updates of AdamW alone (LOG.md).
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = set(map(id, matrices))
    rest = [p for p in model.parameters() if id(p) not in known]
    return Muon(matrices, lr, weight_decay), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def optimise(model, loss_of, steps, lr, state, name, *, warmup=0.05, clip=1.0, weight_decay=0.01, averaged=0.0, save_every=10.0, logs=20, watch=None):
    """Train for `steps` updates of loss_of(step) -> (scalar loss, or None to skip; {metric: (sum, count)}). -> log

    Learning rate: linear warm-up over the fraction `warmup`, then linearly down to a tenth of `lr`. The weights it ends with are the last ones, or their mean after each of
    the last updates, the fraction `averaged` of them (Polyak and Juditsky 1992): a policy wins two to five points more by it (LOG.md). `loss_of` must depend on
    nothing but the step and the weights: then a run killed and continued from the file `state` (written every `save_every`
    seconds, removed by the caller) equals an undisturbed one. The log holds means of the metrics over `logs` stretches. With
    several ranks `loss_of` gives this rank's part of the loss. `watch`() -> {metric: value} is asked at the end of each stretch.
    """
    optimizers = optimisers(model, lr, weight_decay)
    mean, first = [p.detach().clone() for p in model.parameters()], int((1 - averaged) * steps)  # the mean is of the weights after that many updates
    step, log, sums = _load_state(state, model, optimizers, mean)
    sums = {} if rank() else sums
    saved = time.monotonic()
    stretch = max(1, steps // logs)
    model.train()
    with tqdm(total=steps, initial=step, desc=name, unit="update", dynamic_ncols=True) as bar:
        while step < steps:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = lr * min((step + 1) / max(1, warmup * steps), 1 - 0.9 * step / steps)
            model.zero_grad(set_to_none=True)
            loss, metrics = loss_of(step)
            if loss is not None:
                loss.backward()
            step += 1
            learned, save = sum_gradients(model, loss is not None, rank() == 0 and (time.monotonic() - saved > save_every or step == steps))
            if learned:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                for optimizer in optimizers:
                    optimizer.step()
            for m, p in zip(mean, model.parameters()):
                m.lerp_(p.detach(), 1 / max(1, step - first))
            bar.update()
            sums = _add_up([sums, metrics])
            if step % stretch == 0 or step == steps:
                log.append({"step": step, **{k: total / n for k, (total, n) in _add_up(everyones(sums)).items() if n}, **(watch() if watch else {})})
                sums = {}
                bar.set_postfix({k: f"{v:.3f}" for k, v in list(log[-1].items())[1:5]})
            if save:
                everything = _add_up(everyones(sums))
                sums = {}
                if rank() == 0:
                    sums = everything
                    _save_state(state, model, optimizers, mean, step, log, sums)
                saved = time.monotonic()
    with torch.no_grad():
        for m, p in zip(mean, model.parameters()):
            p.copy_(m)
    model.eval()
    return log


def _add_up(parts):
    """Dictionaries of (sum, count) -> one."""
    out = {}
    for part in parts:
        for k, (total, n) in part.items():
            before = out.get(k, (0.0, 0))
            out[k] = (before[0] + float(total), before[1] + float(n))
    return out


def _save_state(path, model, optimizers, mean, step, log, sums):
    tensors = {f"weight {name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for m, (name, p) in zip(mean, model.named_parameters()):
        tensors[f"mean {name}"] = m
        for optimizer in optimizers:
            for k, v in optimizer.state.get(p, {}).items():
                tensors[f"{k} {name}"] = v.contiguous()
    metadata = {"progress": json.dumps({"step": step, "log": log, "sums": sums})}
    write_file(path, lambda temporary: save_file(tensors, str(temporary), metadata=metadata))


def _load_state(path, model, optimizers, mean):
    """-> (step, log, sums) of an interrupted training, its weights, their mean and moments loaded; (0, [], {}) without one."""
    if not Path(path).exists():
        return 0, [], {}
    with safe_open(str(path), "pt") as f, torch.no_grad():
        stored = {}
        for full in f.keys():
            kind, name = full.split(" ", 1)
            stored.setdefault(name, {})[kind] = f.get_tensor(full)
        progress = json.loads(f.metadata()["progress"])
        owner = {id(p): o for o in optimizers for group in o.param_groups for p in group["params"]}
        for m, (name, p) in zip(mean, model.named_parameters()):
            p.copy_(stored[name].pop("weight"))
            m.copy_(stored[name].pop("mean"))
            if stored[name]:
                owner[id(p)].state[p] = {k: v.to(p.device) for k, v in stored[name].items()}
    return progress["step"], progress["log"], {k: tuple(v) for k, v in progress["sums"].items()}
