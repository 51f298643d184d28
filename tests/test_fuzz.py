"""A sample of tests/fuzz_test.py: damaged and foreign input ends well or with one line."""

import shutil
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("needs fork and /proc", allow_module_level=True)

import fuzz_test
from fuzz_test import attempt, complaint, fuzz, sources
from fast_alfworld.cli import UserError


@pytest.mark.parametrize("kind, n", (("games", 60), ("models", 60), ("runs", 5), ("commands", 25)))
def test_no_traceback_no_hang_and_nothing_lost(kind, n, run, tmp_path):
    source = sources(tmp_path)
    shutil.copytree(run[0], tmp_path / "runs/run")
    wrong = [(k, found) for k in range(n)
             if (found := fuzz(kind, k, source[kind], 0, tmp_path))]
    assert wrong == []


def test_the_harness_finds_what_it_looks_for(capsys):
    def fail(error):
        def run():
            raise error
        return run

    def eat():
        return bytearray(3 * 2 ** 30)

    def say(text):
        return lambda: print(text)

    assert complaint(*attempt(say("fine"))[:2]) is None
    assert complaint(*attempt(fail(UserError("no such thing")))[:2]) is None
    assert "Traceback" in complaint(*attempt(fail(KeyError("x")))[:2])
    assert "MemoryError" in complaint(*attempt(eat)[:2])
    assert complaint(*attempt(lambda: fuzz_test.time.sleep(9), seconds=0.3)[:2]) == "took too long"
    assert "lines of error" in complaint(2, "")
