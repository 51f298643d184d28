"""Files that a kill or a full disk cannot leave half written, and where a result comes from."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .cli import UserError


def write_file(path, write):
    """write(temporary path), then rename: a reader sees the old file or the whole new one.

    Raises OSError for whatever `write` raises; the message names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # a power cut leaves no empty file under the new name
        os.replace(temporary, path)
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_file(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def a_file(path):
    """The path as a text. OSError unless a file is there: reading a pipe would hang."""
    if not Path(path).is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    return str(path)


def read_json(path):
    """A file of `write_json` that holds an object -> dict. UserError where it is damaged."""
    try:
        value = json.loads(Path(a_file(path)).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or a damaged one ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a damaged file: it holds no JSON object")
    return value


def lock(path, busy):
    """Hold a lock until this process ends, however it ends. -> the open file, to be kept

    Raises UserError(busy, with the number of the process) where another process has it. No lock on
    Windows, which lacks fcntl.
    """
    file = open(path, "a+")
    if find_spec("fcntl"):
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"{busy} (number {file.read().strip()})") from None
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
    return file


def cpu_count():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def provenance():
    """Where a result comes from: git commit (None without git), machine, versions."""
    def git(*words):
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    packages = ("torch", "alfworld", "numpy", "tokenizers", "safetensors")
    try:
        commit = git("rev-parse", "HEAD") + "+changes" * bool(git("status", "--porcelain", "-uno"))
    except OSError:
        commit = ""
    return {"commit": commit or None, "machine": f"{platform.machine()}, {cpu_count()} cores",
            "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}}}
