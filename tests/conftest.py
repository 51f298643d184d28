"""What all tests share: the published games where there are any, a few generated ones, and a finished run."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def data_dir():
    """The folder `json_2.1.1` of the published games; tests that ask for it are skipped where there is none."""
    from games import find_data
    folder = find_data()
    if folder is None:
        pytest.skip("no published games: `python games.py --download` fetches them, or $ALFWORLD_DATA names them")
    return folder


@pytest.fixture(scope="session")
def some_games():
    """Sixty generated games, of all six task types."""
    pytest.importorskip("alfworld")
    from games import generated_split
    return generated_split("train", 60, seed=0)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished tiny run: its folder, what it printed, when it began."""
    from tiny import TINY, command
    folder, began = tmp_path_factory.mktemp("runs") / "tiny", time.time()
    done = command("train.py", *TINY, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done, began
