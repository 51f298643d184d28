"""What all stages share: devices, models on disk, random numbers by key, ranks."""

import ctypes
import hashlib
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import distributed as dist

from fast_alfworld.cli import UserError
from fast_alfworld.files import cpu_count, read_json, write_file
from model import Transformer
from tokenizer import Tokenizer


def set_up_torch(threads=None):
    """Use all cores, or so many threads; keep freed memory, which saves page faults (glibc)."""
    share = max(1, cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    torch.set_num_threads(min(threads or share, 4 * cpu_count()))
    torch.set_flush_denormal(True)  # tiny gradients made a backward pass three times as slow
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never serve a large block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    except (OSError, AttributeError):
        pass  # another C library


def pick_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device; UserError where there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.split(":")[0] not in ("cpu", "cuda"):
            raise RuntimeError("must be auto, cpu or cuda")
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


def read_model(folder, device="cpu", head="lm"):
    """A folder of `save_model` -> (model, tokenizer). head: "lm" (policy) or "score" (PRM)."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not Path(folder, name).is_file():
            raise UserError(f"{folder}: no model there ({name} is missing)")
    try:
        model, tokenizer = Transformer.load(folder, device).eval(), Tokenizer.load(folder)
    except Exception as error:  # each of the three files has errors of its own library
        raise UserError(f"{folder}: not a model of this program, or a damaged one "
                        f"({error!r})") from error
    if model.config.head != head:
        raise UserError(f"{folder}: that is not a {'policy' if head == 'lm' else 'PRM'}")
    known = read_json(Path(folder, "config.json")).get("vocabulary", tokenizer.fingerprint)
    if model.config.vocab_size != len(tokenizer) or known != tokenizer.fingerprint:
        raise UserError(f"{folder}: its model was trained with another tokenizer than is there")
    if not model.is_finite():
        raise UserError(f"{folder}: its weights are not all finite numbers")
    return model, tokenizer


def run_config(folder):
    """Dicts of config.json of the run that a model belongs to (RUN of RUN/iter1/prm), or {}."""
    try:
        config = read_json(Path(folder).resolve().parents[1] / "config.json")
    except (OSError, LookupError, UserError):
        return {}
    return {k: v for k, v in config.items() if isinstance(v, dict)}


def save_model(folder, model, tokenizer):
    """Write a policy or PRM as a folder, file by file; config.json comes last."""
    if rank():
        return
    folder, temporary = Path(folder), Path(folder).with_name(f".{Path(folder).name}.tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        model.save(temporary, vocabulary=tokenizer.fingerprint), tokenizer.save(temporary)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{folder}: cannot be written ({error})") from None
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors", "config.json"):
        write_file(folder / name, lambda p: os.replace(temporary / name, p))
    temporary.rmdir()


def key(text):
    """A stable 63-bit number for a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(*keys):
    """A number in [0, 1) for each tuple of integers (arrays broadcast), splitmix64 of the keys: the
    same whatever the batch, the order or the process."""
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
    rows = [torch.as_tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


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
    box = [value]
    if dist.is_initialized():
        box *= dist.get_world_size()
        dist.all_gather_object(box, value)
    return box


def sum_gradients(model):
    """Sum the gradients over the ranks, in place; without a loss they are 0."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if dist.is_initialized():
            dist.all_reduce(p.grad)
