"""Damaged and foreign input of every kind: each attempt must end well or with one line.

    python tests/fuzz_test.py                                # hours; a sample runs in CI
    python tests/fuzz_test.py --only games --games 200 --seed 7

games      a game file, damaged: loaded, then played at random and by the expert if accepted
models     a policy's folder, damaged: read, then played if accepted
runs       a finished run, damaged: the same command again. Where it asks to delete a file, that is
           done, and then everything must be made again, byte for byte
commands   random command lines of all programs, among them absurd values

Each attempt is a process of its own. It fails by a traceback, more than one line of error, an exit
code other than 0 and 2, more than 5 seconds (of work on damaged input) or 2 GiB. The number of a
failed attempt and --seed repeat it.
"""

import argparse
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch

import tiny
import train
from fast_alfworld import AlfworldEnv, Expert, Game, demonstrate, fit_prior, generate, write_games
from fast_alfworld.cli import command_line
from kill_test import files
from rollout import Episode, rollout
from tools.experiment import run_part
from utils import read_model, save_model

PROGRAMS = ("train", "eval", "fast_alfworld.__main__", "ablations.__main__", "tools.bench",
            "tools.curves", "tools.q_ground_truth", "tools.q_checks", "tools.report")
ODD = ("", "0", "-1", "1e300", "nan", "inf", "-inf", "1e-300", "9" * 25, "99999999", "2000000000",
       "0.5", "--", "-", "None", "true", "[]", "{}", "π", "\n", "a" * 5000, "a,b", ",",
       "1,2,3", "/dev/null", "/dev/full", "/nowhere/at/all", "~nobody/x", ".", "..", "/", "meta",
       "cuda", "cuda:99", "cpu:7", "10x10", "3000x3000", "0x0", "1,,2", "%s%d", "../../x", " ")


# --- damage --------------------------------------------------------------------------------------

def damaged_bytes(data, rng):
    """Some bytes of a file changed, lost or doubled."""
    data, kind = bytearray(data), rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        return b""
    for _ in range(rng.choice((1, 1, 3, 30))):
        at = rng.randrange(len(data) + 1)
        if kind == 2 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 3:
            del data[at:at + rng.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at:at + rng.randrange(1, 200)]
        else:
            data[at:at] = rng.choice((b"\x00", b"\xff\xfe", b'"', b"{", b")", b"(", b"9", b"\n"))
    return bytes(data)


def nodes_of(value, path=()):
    """The paths of all values within a JSON value."""
    yield path
    for k, v in (value.items() if isinstance(value, dict) else
                 enumerate(value) if isinstance(value, list) else ()):
        yield from nodes_of(v, (*path, k))


def damaged_json(data, rng):
    """A value within a JSON file lost, exchanged or of another type."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        paths = [p for p in nodes_of(value) if p]
        if not paths:
            break
        *way, last = rng.choice(paths)
        inner = value
        for step in way:
            inner = inner[step]
        other = rng.choice(paths)
        source = value
        for step in other:
            source = source[step]
        new = rng.choice((None, True, 0, -1, 1e308, 10 ** 30, "", "x", [], {}, [[]], "a\nb", 0.5,
                          "\ud800", json.loads(json.dumps(source))))
        if rng.random() < 0.3:
            del inner[last]
        else:
            inner[last] = new
    text = json.dumps(value)
    return (text if rng.random() < 0.98 else "[" * 10 ** 5).encode()


def damaged_words(data, rng):
    """Words in the texts of a JSON file exchanged, doubled or lost: facts, sentences of a game."""
    value = json.loads(data)
    text_keys = [k for k, v in value.items() if isinstance(v, str) and len(v) > 20]
    k = rng.choice(text_keys)
    words = re.split(r"(\s+|[()])", value[k])
    for _ in range(rng.choice((1, 2, 10))):
        a, b = rng.randrange(len(words)), rng.randrange(len(words))
        way = rng.randrange(4)
        if way == 0:
            words[a], words[b] = words[b], words[a]
        elif way == 1:
            words[a] = ""
        elif way == 2:
            words[a] = words[b]
        else:
            words[a] *= 2
    value[k] = "".join(words)
    return json.dumps(value).encode()


def damage(file, rng):
    """Damage a file in one of the ways that fit it; or take it away; or put another thing there."""
    way, data = rng.random(), file.read_bytes()
    if way < 0.04:
        file.unlink()
    elif way < 0.06:
        file.unlink(), file.mkdir()
    elif way < 0.07:
        file.unlink(), os.mkfifo(file)
    elif way < 0.6 and file.suffix in (".json", ".tw-pddl"):
        words = file.suffix == ".tw-pddl" and rng.random() < 0.6
        file.write_bytes((damaged_words if words else damaged_json)(data, rng))
    else:
        file.write_bytes(damaged_bytes(data, rng))


# --- attempts ------------------------------------------------------------------------------------

def attempt(function, seconds=5):
    """Run function() in a process of its own. -> (exit code, its output, seconds)"""
    with tempfile.TemporaryFile("w+") as output:
        began, pid = time.monotonic(), os.fork()
        if pid == 0:
            try:
                os.setsid()
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
                held = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (held + 2 ** 31,) * 2)
                code = 0
                try:
                    command_line(function)
                except SystemExit as end:
                    code = end.code
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush(), sys.stderr.flush()
            finally:
                os._exit(code or 0)
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            if time.monotonic() - began > seconds:
                os.killpg(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
                break
            time.sleep(0.002)
        output.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), output.read(), time.monotonic() - began


def complaint(code, text):
    """What is wrong with the end of an attempt, or None."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.startswith("error:")]
    if code == -signal.SIGKILL:
        return "took too long"
    if "Traceback" in text or code not in (0, 2):
        return f"exit code {code}: {text[-1500:]}"
    if code == 2 and (len(lines) != 1 or len(lines[0]) > 500):
        return f"{len(lines)} lines of error: {text[-500:]}"
    return None


def attack_games(folder, rng):
    """-> an attempt on a damaged game file"""
    file = folder / "game.tw-pddl"
    damage(file, rng)

    def play():
        game = Game.load(file)
        env = AlfworldEnv(30)
        _, info = env.reset(game)
        for _ in range(30):
            *_, info = env.step(rng.choice(info["admissible_commands"]))
        demonstrate(env, game, Expert(fit_prior([game])), tiny.generator("fuzz"))

    return play


def attack_models(folder, rng):
    """-> an attempt on a damaged model"""
    damage(rng.choice(sorted(folder.iterdir())), rng)

    def play():
        policy, tokenizer = read_model(folder)
        list(rollout(policy, tokenizer, [Episode(tiny.games()[0], 0)], max_steps=3))

    return play


def attack_runs(folder, rng):
    """-> an attempt on a damaged run"""
    every = [f for f in sorted((folder / "run").rglob("*")) if f.is_file() and f.name != ".lock"]
    victim = rng.choice(every)
    damage(victim, rng)
    if rng.random() < 0.2:
        shutil.copy(rng.choice([f for f in every if f.is_file()]), victim.with_name("other.json"))
    return again(folder)


def again(folder):
    """The command of the run in folder/run."""
    def run():
        os.chdir(folder)
        os.environ["GIT_DIR"] = "/nowhere"
        sys.argv = [str(tiny.ROOT / "train.py"), *tiny.TINY, "--out", "run"]
        train.main()

    return run


def attack_commands(folder, rng):
    """-> a random command line"""
    program = importlib.import_module(rng.choice(PROGRAMS))
    words = Path(program.__file__).read_text()
    flags = sorted({*re.findall(r'"(--[a-z-]+)"', words), "--help", "--seed", "--out", "--threads"})
    argv = rng.choice(([], ["play"], ["act"], ["sft"], ["improve"], ["env"], ["rollout"]))
    for _ in range(rng.randrange(1, 5)):
        argv = [*argv, rng.choice(flags), *[rng.choice(ODD) for _ in range(rng.randrange(3))]]

    def run():
        os.chdir(folder)
        sys.argv = [program.__name__, *argv]
        print(sys.argv)
        if hasattr(program, "main"):
            program.main()
        else:
            run_part(program.__doc__, program.PARTS, argv)

    return run


# --- the whole -----------------------------------------------------------------------------------

def sources(folder):
    """What is damaged: {kind: a folder that each attempt gets a copy of}"""
    for kind in ("games", "models", "commands"):
        (folder / kind).mkdir()
    write_games(generate("train", 1), folder / "written", "train")
    shutil.copy(next((folder / "written").rglob("game.tw-pddl")), folder / "games/game.tw-pddl")
    save_model(folder / "models", tiny.random_model(), tiny.tokenizer())
    return {kind: folder / kind for kind in ("games", "models", "runs", "commands")}


def fuzz(kind, number, source, seed, folder):
    """One attempt. -> what is wrong with it, or None"""
    rng, copy = random.Random(f"{kind} {seed} {number}"), folder / f"{kind}-{number}"
    shutil.copytree(source, copy)
    try:
        function = globals()[f"attack_{kind}"](copy, rng)
        code, text, seconds = attempt(function, 120 if kind == "runs" else 5)
        if kind == "commands" and code == -signal.SIGKILL and "Traceback" not in text:
            return None  # at work
        wrong = complaint(code, text)
        if kind == "runs" and not wrong and code == 2 and "delete" in text:
            named = re.search(r"error: (\S+): ", text)
            lost = copy / named[1]
            shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
            code, text, _ = attempt(again(copy), 120)
            wrong = complaint(code, text) or (code and text)
            if not wrong and files(copy / "run") != files(source / "run"):
                wrong = f"not made again as it was after {named[0]}"
        return wrong
    finally:
        shutil.rmtree(copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"games": 10_000, "models": 1000, "runs": 1000, "commands": 500}
    for kind, n in sizes.items():
        parser.add_argument(f"--{kind}", type=int, default=n, help="(default: %(default)s)")
    parser.add_argument("--only", choices=sizes, help="this kind alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first attempt")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = sources(folder)
        if args.only in (None, "runs"):
            (folder / "runs").mkdir()
            code, text, _ = attempt(again(folder / "runs"), 300)
            assert code == 0, text
        for kind in ([args.only] if args.only else sizes):
            n = getattr(args, kind)
            for number in range(args.first, args.first + n):
                if wrong := fuzz(kind, number, source[kind], args.seed, folder):
                    failed += 1
                    print(f"{kind} {number}, seed {args.seed}: {wrong}", flush=True)
                if number % 100 == 99:
                    print(f"{kind}: {number + 1}", file=sys.stderr, flush=True)
            print(f"{kind}: {n} attempts, seed {args.seed}", flush=True)
    print(f"{failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
