"""What several stages share: files written whole, randomness by name, and one resumable training loop."""

import ctypes
import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the caller's: shown as one line, exit code 2."""


def command_line(main):
    """Run a command's `main`, with mistakes of the user as one line and exit code 2, and Ctrl-C as one line."""
    try:
        main()
    except (UserError, ValueError, FileNotFoundError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        raise SystemExit(_fail(f"error: {error}")) from None
    except KeyboardInterrupt:
        raise SystemExit(_fail("interrupted; the same command continues where it stopped", 130)) from None


def _fail(text, code=2):
    print("\n".join(text.splitlines()[:1]), file=os.sys.stderr)
    return code


def set_up_torch(threads=None):
    """Threads once, and glibc kept from returning every tensor over 32 MB to the system only to fault its pages in again."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never serve a large block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    except OSError:
        pass  # not glibc: nothing to tune


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
    return json.loads(Path(path).read_text())


def save_model(folder, model, tokenizer):
    """Write a policy or PRM as a folder, whole: config.json (last) says that it is complete."""
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    model.save(temporary)
    tokenizer.save(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
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

def optimise(model, loss_of, steps, lr, state, name, *, warmup=0.05, weight_decay=0.01, clip=1.0, save_every=10.0, logs=20):
    """AdamW for `steps` updates of loss_of(step) -> (scalar loss, or None to skip; {metric: number}).

    Learning rate: linear warm-up over the fraction `warmup`, then linearly down to a tenth of `lr`. `loss_of` must depend
    on nothing but the step and the weights: then a run killed and continued from the file `state` (written every
    `save_every` seconds, removed by the caller) equals an undisturbed one. Returns the log: means of the metrics over `logs` stretches.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    step, log, sums = _load_state(state, model, optimizer)
    saved = time.monotonic()
    stretch = max(1, steps // logs)
    model.train()
    with tqdm(total=steps, initial=step, desc=name, unit="update", dynamic_ncols=True) as bar:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / max(1, warmup * steps), 1 - 0.9 * step / steps)
            loss, metrics = loss_of(step)
            if loss is not None:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            step += 1
            bar.update()
            for k, v in metrics.items():
                total, n = sums.get(k, (0.0, 0))
                sums[k] = (total + float(v), n + 1)
            if step % stretch == 0 or step == steps:
                log.append({"step": step, **{k: total / n for k, (total, n) in sums.items()}})
                sums = {}
                bar.set_postfix({k: f"{v:.3f}" for k, v in list(log[-1].items())[1:4]})
            if time.monotonic() - saved > save_every or step == steps:
                _save_state(state, model, optimizer, step, log, sums)
                saved = time.monotonic()
    model.eval()
    return log


def _save_state(path, model, optimizer, step, log, sums):
    tensors = {}
    for name, p in model.named_parameters():
        tensors[f"weight.{name}"] = p.detach().contiguous()
        for k, v in optimizer.state.get(p, {}).items():
            tensors[f"{k}.{name}"] = v.contiguous()
    metadata = {"progress": json.dumps({"step": step, "log": log, "sums": sums})}
    write_file(path, lambda p: save_file(tensors, str(p), metadata=metadata))


def _load_state(path, model, optimizer):
    """-> (step, log, sums) of an interrupted training, its weights and moments loaded; (0, [], {}) without one."""
    if not Path(path).exists():
        return 0, [], {}
    with safe_open(str(path), "pt") as f, torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(f.get_tensor(f"weight.{name}"))
            moments = {k: f.get_tensor(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in f.keys()}
            if moments:
                optimizer.state[p] = moments
        progress = json.loads(f.metadata()["progress"])
    return progress["step"], progress["log"], {k: tuple(v) for k, v in progress["sums"].items()}
