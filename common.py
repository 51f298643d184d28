"""What several stages share: the command line, files written whole, and randomness by name."""

import argparse
import ctypes
import hashlib
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch

from model import Transformer
from ranks import rank
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


a_seed = between(0, 2 ** 31, int)  # the type of --seed


def a_temperature(text):
    """The type of a flag: 0, greedy, or a temperature that a sample can be taken at."""
    x = float(text)
    if x and not 1e-3 <= x <= 100:
        raise argparse.ArgumentTypeError(f"{text}: must be 0, which is greedy, or lie in 0.001 … 100")
    return x


def whole_numbers(text):
    """"4,1,16" -> [1, 4, 16]"""
    if not all(n.isdecimal() for n in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is not a list of whole numbers with commas between them")
    return sorted({int(n) for n in text.split(",")})


RESUMED = "interrupted; the same command continues where it stopped"  # said by commands that keep their place


def command_line(main, interrupted="interrupted"):
    """Run a command's `main`, with mistakes of the user as one line and exit code 2, and Ctrl-C as one line, `interrupted`.

    A plain ValueError is a bug, such as tensors of shapes that do not fit, and keeps its traceback;
    DataError and GameError are kinds of it that tell of files.
    """
    try:
        main()
    except (UserError, ValueError, OSError) as error:
        if os.environ.get("TRACEBACK") or type(error) is ValueError:
            raise
        raise SystemExit(_fail(f"error: {error}")) from None
    except KeyboardInterrupt:
        raise SystemExit(_fail(interrupted, 130)) from None


def check_writable(path):
    """OSError, before hours of work, where a file cannot be written in the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.touch()
    temporary.unlink()


def _fail(text, code=2):
    print("\n".join(text.splitlines()[:1]), file=os.sys.stderr)
    return code


def changes(old, new, names):
    """-> ["--name old -> new"] of the flags of those names that differ between two runs ({name: value})."""
    return [f"--{name.replace('_', '-')} {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def same_settings(file, known, settings, advice):
    """UserError, with advice, where what `file` holds, `known`, was made with other settings."""
    if differ := [f"{name} {known.get(name)} -> {value}" for name, value in settings.items() if known.get(name) != value]:
        raise UserError(f"{file} holds other results ({'; '.join(differ)}): {advice}")


def set_up_torch(threads=None):
    """Threads once, and glibc kept from returning every tensor over 32 MB to the system only to fault its pages in again.

    threads: all cores, unless this or $OMP_NUM_THREADS says; of several processes of torchrun (which sets that to 1) each has its share.
    """
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: must be at least 1")
    cores, processes, asked = len(os.sched_getaffinity(0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)), os.environ.get("OMP_NUM_THREADS", "")
    torch.set_num_threads(threads or (max(1, cores // processes) if processes > 1 else int(asked) if asked.isdecimal() and int(asked) else cores))
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: never serve a large block by mmap
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: keep freed memory
    except OSError:
        pass  # not glibc: nothing to tune


def peak_memory():
    """Bytes of memory that this process has held at most (since `forget_peak_memory`), as Linux counts them; elsewhere 0."""
    try:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def forget_peak_memory():
    """Have `peak_memory` count from now on (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


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
    """write(temporary path), then rename: a reader sees the old file or the whole new one, after a power cut too."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_disk(path):
    """Wait until a file's bytes are on the disk: one renamed before that can be found empty after a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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
        to_disk(temporary / name)
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
    """A numpy generator named by integers and texts. A last 0 is no name: generator(s, "x") and generator(s, "x", 0) are the same."""
    return np.random.default_rng([key(k) if isinstance(k, str) else k for k in keys])


# --- padding -----------------------------------------------------------------------------------------------------------

def pad(rows, value=0, dtype=torch.long):
    """List of 1-D arrays -> (B, longest) tensor, padded at the end."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.as_tensor(row, dtype=dtype)
    return out
