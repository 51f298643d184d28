"""Fixtures of all tests: the published games where there are any, and a few generated ones."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for more threads
sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def data_dir():
    """The folder `json_2.1.1` of the published games; without it, tests that ask are skipped."""
    from fast_alfworld import find_data
    folder = find_data()
    if folder is None:
        pytest.skip("no published games: `python -m fast_alfworld download`, or set $ALFWORLD_DATA")
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A whole tiny run by the real command line: its folder, its output, when it began."""
    import time
    from tiny import TINY, train
    folder, began = tmp_path_factory.mktemp("run") / "run", time.time()
    done = train(folder, *TINY)
    assert done.returncode == 0, done.stderr
    return folder, done, began


@pytest.fixture(scope="session")
def some_games():
    """Sixty generated games, of all six task types."""
    pytest.importorskip("alfworld")
    from fast_alfworld import generated_split
    return generated_split("train", 60, seed=0)
