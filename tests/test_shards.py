"""Shards: read as they were written, the same whoever plays them, and a process that dies is told."""

import multiprocessing
import shutil

import pytest
import torch

from common import UserError, save_model
from shards import load_trajectories, play_shards, save_trajectories
from tiny import assert_same, games, played, taught, tokenizer


def test_a_shard_is_read_as_it_was_written(tmp_path):
    file = tmp_path / "deep/00000.safetensors"
    for trajectories in (played(), played()[:1]):
        save_trajectories(file, trajectories)
        read = load_trajectories(file)
        assert len(read) == len(trajectories)
        for a, b in zip(trajectories, read):
            assert_same(a, b)
            assert (a.logp == b.logp).all() and a.ids.dtype == b.ids.dtype and a.spans.dtype == b.spans.dtype
            assert type(b.won) is bool and type(b.reward) is float and type(b.seed) is int and len(a) == len(b)
    assert [f.name for f in file.parent.iterdir()] == ["00000.safetensors"]


def shards(folder, n=3):
    return [(folder / f"{k}.safetensors", [(game, k) for game in games()[:5]]) for k in range(n)]


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a policy."""
    folder = tmp_path_factory.mktemp("policy")
    save_model(folder, taught(), tokenizer())
    return folder


OPTIONS = dict(temperature=0.7, seed=1, max_steps=6, slots=4)


def test_a_shard_is_the_same_whoever_plays_it(saved, tmp_path):
    """One process or two, with one thread or two, some shards there already."""
    for name, workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        *_, (ended, won, memory) = play_shards(shards(tmp_path / name), saved, "cpu", workers, **OPTIONS)
        assert ended == 15 and (memory > 2 * 10 ** 8) == (workers > 1)  # of two processes with torch in them
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    assert list(play_shards(shards(tmp_path / "one"), saved, "cpu", 2, **OPTIONS)) == [[15, won, 0]]  # nothing to do
    (tmp_path / "one/1.safetensors").unlink()
    torch.set_num_threads(2)
    try:
        first, *_, last = play_shards(shards(tmp_path / "one"), saved, "cpu", 1, **OPTIONS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert first[0] == 10 and last == [15, won, 0] and contents(tmp_path / "one") == before


def test_a_process_that_dies_ends_the_job(saved, tmp_path, monkeypatch):
    playing = play_shards(shards(tmp_path, 6), saved, "cpu", 2, **OPTIONS)
    next(playing), next(playing)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    workers[0].kill()
    with pytest.raises(UserError, match="continues"):
        list(playing)
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_what_a_process_cannot_read_is_told_in_one_line(saved, tmp_path, capfd):
    damaged = tmp_path / "policy"
    shutil.copytree(saved, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="has died"):
        list(play_shards(shards(tmp_path / "rollouts"), damaged, "cpu", 2, **OPTIONS))
    told = capfd.readouterr().err
    assert "damaged one" in told and "Traceback" not in told
