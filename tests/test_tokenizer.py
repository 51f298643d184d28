"""Text goes through tokens without loss, and a name and its number are two tokens."""

import random
import re

import numpy as np
import pytest

from fast_alfworld import AlfworldEnv
from fast_alfworld.gamefile import split_intro
from rollout import MAX_ACTION
from tiny import (demonstrations, games, random_model, random_play, random_texts, tokenizer,
                  transcript)
from tokenizer import ACT, CHARACTERS, END, OBS, SPECIAL, TASK, UNK, Tokenizer
from utils import save_model


# --- text to tokens and back ---------------------------------------------------------------------

def test_everything_that_random_play_says_survives():
    """Of episodes, too, that the vocabulary was not made from."""
    tok, fresh = tokenizer(), []
    for number, game in enumerate(games()):
        intro, turns = random_play(game, np.random.default_rng(number), 40)
        fresh += [intro, *(text for turn in turns for text in turn)]
    assert len({*fresh} - {*random_texts()}) > 200
    for text in (*random_texts(), *fresh):
        ids = tok.encode(text)
        assert tok.decode(ids) == text and UNK not in ids


def test_no_printable_character_is_lost():
    """Random characters, and pieces of the vocabulary glued together, special tokens too."""
    rng, tok = random.Random(0), tokenizer()
    odd = [" desk 999", "desk 1", "Desk 1", "  ", "desks 12", "1a", "\n\n"]
    for _ in range(2000):
        pieces = CHARACTERS if rng.random() < 0.3 else [*tok.tokens, *CHARACTERS, *odd]
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        ids = tok.encode(text)
        assert "".join(tok.tokens[i] for i in ids) == text
        assert all(i >= len(SPECIAL) for i in ids)  # "<end>" in a text is no <end>


def test_what_is_not_printable_becomes_unknown_and_nothing_around_it_is_lost():
    tok = tokenizer()
    assert tok.decode(tok.encode("go to π, ∞ desk 1")) == "go to <unk>, <unk> desk 1"


def test_an_intro_is_split_into_task_and_observation_with_and_without_the_welcome():
    for game in games():
        task, observation = split_intro(AlfworldEnv().reset(game)[0])
        assert task == game.task and "task" not in observation
        assert observation.startswith("You are in the middle of a room.")
        assert split_intro(f"{observation}\n\nYour task is to: {task}") == (task, observation)


def test_the_transcript_format():
    tok = tokenizer()
    ids = [*tok.prompt("put a mug in desk.", "You see nothing."), *tok.encode("go to desk 1"), END,
           *tok.turn("On the desk 1, you see a mug 2.")]
    shown = "".join(tok.tokens[i] for i in ids)
    assert shown == ("<task>put a mug in desk.<obs>You see nothing.<act>go to desk 1<end>"
                     "On the desk 1, you see a mug 2.<act>")
    assert [i for i in ids if i < len(SPECIAL)] == [TASK, OBS, ACT, END, ACT]
    assert tok.decode(ids) == re.sub("<[a-z]+>", "", shown)
    assert tok.actions(ids) == ["go to desk 1"]


def test_actions_are_read_from_a_transcript():
    for _, demo in demonstrations()[::7]:
        assert tokenizer().actions(transcript(demo)) == [step.action for step in demo.steps]
        prompt = tokenizer().prompt(demo.task, "You see nothing.")
        assert tokenizer().actions([*transcript(demo), ACT, *prompt[1:3]]) == [
            step.action for step in demo.steps]  # one that has not ended does not count


# --- names and numbers ---------------------------------------------------------------------------

def test_a_name_and_its_number_are_two_tokens_wherever_they_stand():
    """So the thing in view and the thing that the task asks for share a token."""
    tok = tokenizer()
    number = [tok.tokens.index(f" {k}") for k in range(1, 10)]
    for game in games():
        for base, n in game.counts.items():
            name = tok.tokens.index(f" {base}")
            assert name in tok.encode(f"put a hot {base} in {base}.")
            for k in range(1, min(n, 9) + 1):
                pair = (name, number[k - 1])
                assert tok.encode(f"examine {base} {k}")[-2:] == pair
                for text in (f"On the {base} {k}, you see nothing.", f"X, a {base} {k}, and Y"):
                    ids = tok.encode(text)
                    assert pair in zip(ids, ids[1:])


def test_every_number_in_what_a_game_says_is_one_token_behind_a_name():
    tok, found = tokenizer(), 0
    names = {f" {base}" for game in games() for base in game.counts}
    for text in random_texts():
        pieces = [tok.tokens[i] for i in tok.encode(text)]
        for before, piece in zip(pieces, pieces[1:]):
            if re.search("[0-9]", piece):
                assert re.fullmatch(" [1-9][0-9]?", piece) and before in names
                found += 1
    assert found > 1000


def test_joined_names_are_one_token_for_comparison():
    counts = {"desk": 2, "desklamp": 1, "mug": 3}
    joined, apart = (Tokenizer.train(["You see a desk 1."] * 9, counts, joined=joined)
                     for joined in (True, False))
    for text in ("go to desk 2", "a desklamp 1, and a desk 1", "move mug 3 to desk 1"):
        long, short = apart.encode(text), joined.encode(text)
        assert apart.decode(long) == joined.decode(short) == text
        assert len(long) - len(short) == len(re.findall("[0-9]", text))
    assert " mug 3" in joined.tokens and " mug 4" not in joined.tokens and " 3" in apart.tokens


def test_a_name_within_a_longer_name_is_not_cut_out():
    for counts in ({"desk": 2, "desklamp": 1}, {"desklamp": 1, "desk": 2}):
        tok = Tokenizer.train(["You see a desk 1, and a desklamp 1"] * 9, counts)
        for text in ("use desklamp 1", "a desk 2, and a desklamp 1", "put a desklamp in desk."):
            pieces = [tok.tokens[i] for i in tok.encode(text)]
            assert pieces.count(" desklamp") == 1
            assert pieces.count(" desk") == len(re.findall(r" desk\b", text))


def test_a_command_takes_about_four_tokens_and_an_answer_about_a_dozen():
    tok = tokenizer()
    steps = [step for _, demo in demonstrations() for step in demo.steps]
    assert 2 < np.mean([len(tok.encode(step.action)) for step in steps]) < 5
    assert np.mean([len(tok.turn(step.observation)) for step in steps]) < 20
    assert max(len(tok.encode(step.action)) for step in steps) < MAX_ACTION


# --- files ---------------------------------------------------------------------------------------

@pytest.fixture
def texts():
    return [*random_texts()[::9], "", " ", "go to π", "<end>"]


def test_saving_and_loading_changes_nothing(texts, tmp_path):
    tokenizer().save(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert read.tokens == tokenizer().tokens and tuple(read.tokens[:len(SPECIAL)]) == SPECIAL
    assert [read.encode(text) for text in texts] == [tokenizer().encode(text) for text in texts]


def test_training_twice_gives_the_same_vocabulary(texts):
    a, b = (Tokenizer.train(texts, {"mug": 3, "desk": 2}) for _ in range(2))
    assert a.tokens == b.tokens and len(set(a.tokens)) == len(a) > len(SPECIAL) + len(CHARACTERS)


def test_transformers_reads_the_same_tokens(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, random_model(), tokenizer())
    theirs, tok = transformers.AutoTokenizer.from_pretrained(tmp_path), tokenizer()
    for text in texts[:-2]:
        assert tuple(theirs(text).input_ids) == tok.encode(text)
        shown = theirs.decode([*tok.encode(text), END], skip_special_tokens=True)
        assert shown == text or "π" in text
