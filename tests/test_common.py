"""Files written whole, randomness by name, and mistakes told in one line."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from common import UserError, command_line, generator, key, pad, pick_device, read_model, save_model, set_up_torch, uniform, write_file, write_json
from generate import DataError
from tiny import random_model, tokenizer


# --- randomness by name --------------------------------------------------------------------------------------------------------

def test_a_name_gives_one_number_in_any_batch_and_any_process():
    names = np.random.default_rng(0).integers(2 ** 62, size=(3, 1000))
    together = uniform(*names)
    assert [uniform(*name) for name in names.T] == together.tolist() and together.tolist() == uniform(*names[:, ::-1])[::-1].tolist()
    assert uniform(1, 2, 3) == 0.8029394358323475 and key("a game") == 740802560869577962  # whatever the machine or the version
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
    code = "from common import uniform, generator; print(uniform(5, 6), generator(3, 'x').random())"
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2)}) == 1


def test_numbers_of_neighbouring_names_are_uniform_and_independent():
    """Counters, as rollouts use them: (seed, game, episode, step, token)."""
    a, b = np.meshgrid(np.arange(300), np.arange(300))
    for u in (uniform(0, a, b), uniform(a, 7, b), uniform(a, b)):
        assert 0 <= u.min() and u.max() < 1
        counts = np.histogram(u, 100, (0, 1))[0]
        assert ((counts - 900) ** 2 / 900).sum() < 99 + 4 * 198 ** 0.5
        for v in (u[1:], u[:, 1:]):  # neighbours
            assert abs(np.corrcoef(u[:len(v), :v.shape[1]].ravel(), v.ravel())[0, 1]) < 0.02


# --- files ---------------------------------------------------------------------------------------------------------------------

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep/file.json"
    write_json(file, {"a": 1})

    def fail(path):
        path.write_text("half")
        raise RuntimeError("no room")

    with pytest.raises(RuntimeError):
        write_file(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [f.name for f in file.parent.iterdir()] == ["file.json"]


def test_pad():
    assert pad([[1, 2], [], [3, 4, 5]], 9).tolist() == [[1, 2, 9], [9, 9, 9], [3, 4, 5]]
    assert pad([np.array([0.5]), np.array([1.5, 2.5])], 0.0, torch.float32).tolist() == [[0.5, 0.0], [1.5, 2.5]]


# --- mistakes of the user ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("error, code, line", ((UserError("no\nway"), 2, "error: no\n"), (DataError("bad"), 2, "error: bad\n"), (KeyboardInterrupt(), 130, "interrupted")))
def test_mistakes_are_one_line(error, code, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        command_line(main)
    assert left.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(line) and shown.count("\n") == 1


def test_what_is_not_the_users_mistake_is_shown_in_full():
    with pytest.raises(ZeroDivisionError):
        command_line(lambda: 1 / 0)


def test_a_missing_model_or_device_is_named(tmp_path):
    with pytest.raises(UserError, match="no model there .config.json is missing"):
        read_model(tmp_path)
    with pytest.raises(UserError, match="--device tpu9"):
        pick_device("tpu9")
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="--threads 0"):
        set_up_torch(0)


@pytest.mark.parametrize("name, damage", (("model.safetensors", lambda b: b[:len(b) // 2]), ("config.json", lambda b: b[:-9]), ("config.json", lambda b: b"{}"),
                                          ("tokenizer.json", lambda b: b[:99])))
def test_a_damaged_model_is_named(tmp_path, name, damage):
    save_model(tmp_path, random_model(), tokenizer())
    file = tmp_path / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{tmp_path}.*damaged"):
        read_model(tmp_path)
