"""Fixtures of the tests of fast_alfworld: the published games, if any, and some generated ones."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def data_dir():
    """The folder json_2.1.1 of the published games; without it the test is skipped."""
    from fast_alfworld import find_data
    folder = find_data()
    if folder is None:
        pytest.skip("no published games: `python -m fast_alfworld download` fetches them")
    return folder


@pytest.fixture(scope="session")
def published(data_dir):
    """The published train games."""
    from fast_alfworld.games import load_split
    return load_split(data_dir, "train")


@pytest.fixture(scope="session")
def some_games():
    """Sixty generated games, of all six task types."""
    pytest.importorskip("alfworld")
    from fast_alfworld import generated_split
    return generated_split("train", 60, seed=0)
