"""Text goes through tokens without loss, a name and its number are one token, and renumbering tells the same episode."""

import random
import re

import numpy as np
import pytest

from common import save_model
from env import AlfworldEnv
from expert import Expert, demonstrate
from tellings import demonstration_tokens
from tiny import games, played, prior, random_model, tokenizer
from tokenizer import ACT, CHARACTERS, END, OBS, SPECIAL, TASK, UNK, Tokenizer, split_intro


def demos(mistakes=0.2):
    for number, game in enumerate(games()):
        rng = np.random.default_rng(number)
        yield game, demonstrate(AlfworldEnv(), game, Expert(prior(), rng), rng, mistakes=mistakes)


# --- text to tokens and back -----------------------------------------------------------------------------------------------

def test_nothing_printable_is_lost():
    """Random characters, and random pieces of the vocabulary glued together, special tokens spelled out among them."""
    rng, tok = random.Random(0), tokenizer()
    for _ in range(2000):
        pieces = CHARACTERS if rng.random() < 0.3 else [*tok.tokens, *CHARACTERS, " desk 999", "desk 1", "Desk 1", "  "]
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        ids = tok.encode(text)
        assert "".join(tok.tokens[i] for i in ids) == text
        assert all(i >= len(SPECIAL) for i in ids)


def test_what_is_not_printable_becomes_unknown_and_nothing_around_it_is_lost():
    tok = tokenizer()
    assert tok.decode(tok.encode("go to π, then ∞ desk 1")) == "go to <unk>, then <unk> desk 1"


def test_everything_the_game_says_survives():
    tok = tokenizer()
    for game, demo in demos():
        for text in (*split_intro(demo.observation), *(text for step in demo.steps for text in (step.action, step.observation))):
            assert tok.decode(tok.encode(text)) == text and UNK not in tok.encode(text)


def test_an_intro_is_split_into_task_and_observation_with_and_without_the_welcome():
    for game in games():
        task, observation = split_intro(AlfworldEnv().reset(game)[0])
        assert task == game.task and observation.startswith("You are in the middle of a room.") and "task" not in observation
        assert split_intro(f"{observation}\n\nYour task is to: {task}") == (task, observation)


def test_the_transcript_format():
    tok = tokenizer()
    ids = tok.prompt("put a mug in desk.", "You see nothing.") + tok.action("go to desk 1") + tok.turn("On the desk 1, you see a mug 2.")
    shown = "".join(tok.tokens[i] for i in ids)
    assert shown == "<task>put a mug in desk.<obs>You see nothing.<act>go to desk 1<end>On the desk 1, you see a mug 2.<act>"
    assert [i for i in ids if i < len(SPECIAL)] == [TASK, OBS, ACT, END, ACT]
    assert tok.decode(ids) == re.sub("<[a-z]+>", "", shown)


# --- short: a name and its number are one token --------------------------------------------------------------------------------

def test_a_name_and_its_number_are_one_token():
    tok = tokenizer()
    for game in games():
        for base, n in game.counts.items():
            for k in range(1, n + 1):
                word = tok.tokens.index(f" {base} {k}")
                assert tok.encode(f"examine {base} {k}")[-1] == word
                assert word in tok.encode(f"On the {base} {k}, you see nothing.") and word in tok.encode(f"X, a {base} {k}, and Y")


def test_an_action_is_three_to_six_tokens_and_an_observation_about_twenty():
    tok = tokenizer()
    steps = [step for _, demo in demos(mistakes=0) for step in demo.steps]
    lengths = [len(tok.action(step.action)) for step in steps]
    assert 3 <= min(lengths) and max(lengths) <= 6
    assert np.mean([len(tok.turn(step.observation)) for step in steps]) < 20


# --- renumbering -----------------------------------------------------------------------------------------------------------------

NUMBERED = r"\b([a-z]+) (\d+)\b"


def test_renumbering_tells_the_same_episode_with_its_numbers_permuted():
    """Base names and all other words stay; within an episode a number always becomes the same one, and no two the same."""
    tok, moved = tokenizer(), 0
    for number, (game, demo) in enumerate(demos()):
        ids, _ = demonstration_tokens(demo, tok, 0.3)
        told = tok.renumber(ids, game.counts, np.random.default_rng(number))
        before, after = ("".join(tok.tokens[i] for i in x) for x in (ids, told))
        assert re.sub(NUMBERED, r"\1 #", before) == re.sub(NUMBERED, r"\1 #", after)
        pairs = set(zip(re.findall(NUMBERED, before), re.findall(NUMBERED, after)))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert all(base == other for (base, _), (other, _) in pairs)
        assert all(k == m for (base, k), (_, m) in pairs if base not in game.counts or f" {base} {k}" not in tok.tokens)
        assert tok.encode(tok.decode(told)) == tok.encode(after.replace("<task>", "").replace("<obs>", "").replace("<act>", "").replace("<end>", ""))
        moved += sum(a != b for a, b in pairs)
    assert moved > 200


def test_renumbering_is_a_permutation_of_numbers_only():
    """Within the instances of a name in the game; everything else stays."""
    tok, tables, counts = tokenizer(), set(), games()[0].counts
    for seed in range(10):
        table = tok.renumber(np.arange(len(tok)), counts, np.random.default_rng(seed))
        assert sorted(table) == list(range(len(tok)))
        for i, j in enumerate(table):
            name, told = (re.fullmatch(" ([a-z]+) ([0-9]+)", tok.tokens[k]) for k in (i, j))
            if name and int(name[2]) <= counts.get(name[1], 0):
                assert told[1] == name[1] and int(told[2]) <= counts[name[1]]
            else:
                assert i == j
        assert (table == tok.renumber(np.arange(len(tok)), counts, np.random.default_rng(seed))).all()
        tables.add(table.tobytes())
    assert len(tables) == 10


def test_with_any_number_no_two_names_become_one():
    """Neither those of the game nor the others, which a mistake may name: a wrong number stays wrong."""
    tok, counts = tokenizer(), games()[0].counts
    tables = [tok.renumber(np.arange(len(tok)), counts, np.random.default_rng(seed), any_number=True) for seed in range(10)]
    assert all(sorted(table) == list(range(len(tok))) for table in tables) and len({table.tobytes() for table in tables}) == 10
    name = max(counts, key=lambda name: len(tok.instances(name)) - counts[name])
    assert {int(table[tok.instances(name)[0]]) for table in tables} - set(tok.instances(name)[:counts[name]])  # numbers that the game has not


def test_every_permutation_of_the_numbers_is_equally_likely():
    tok, rng = tokenizer(), np.random.default_rng(0)
    ids = [tok.tokens.index(f" mug {k}") for k in (1, 2, 3)]
    seen = [tuple(tok.renumber(np.array(ids), {"mug": 3}, rng)) for _ in range(1200)]
    assert len(set(seen)) == 6 and min(seen.count(s) for s in set(seen)) > 150


def test_actions_of_a_policy_keep_their_places_when_renumbered():
    tok = tokenizer()
    for t in played()[:8]:
        told = tok.renumber(t.ids, next(game.counts for game in games() if game.id == t.game), np.random.default_rng(0))
        assert ((told < len(SPECIAL)) == (t.ids < len(SPECIAL))).all() and (told[t.spans[:, 1] - 1] == END).all()


def test_numbers_outside_the_vocabulary_are_spelled_out_and_not_permuted():
    tok = tokenizer()
    assert tok.decode(tok.encode("go to mug 999")) == "go to mug 999" and " mug 999" not in tok.tokens
    ids = np.array(tok.encode("mug 1, mug 2, mug 3, shelf 1, shelf 2, shelf 3, shelf 4"))
    told = [tok.decode(tok.renumber(ids, {"mug": 999, "shelf": 4, "spaceship": 3}, np.random.default_rng(seed))) for seed in range(5)]
    assert all(text.startswith("mug 1, mug 2, mug 3, shelf ") for text in told) and len(set(told)) > 1


# --- files -------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def texts():
    return [step.observation for _, demo in demos() for step in demo.steps][:200] + ["", " ", "go to π"]


def test_saving_and_loading_changes_nothing(texts, tmp_path):
    tokenizer().save(tmp_path)
    read = Tokenizer.load(tmp_path)
    assert read.tokens == tokenizer().tokens and tuple(read.tokens[:len(SPECIAL)]) == SPECIAL
    assert [read.encode(text) for text in texts] == [tokenizer().encode(text) for text in texts]


def test_training_twice_gives_the_same_vocabulary(texts):
    a, b = (Tokenizer.train(texts, {"mug": 3, "desk": 2}) for _ in range(2))
    assert a.tokens == b.tokens and " mug 3" in a.tokens and " mug 4" not in a.tokens


def test_transformers_reads_the_same_tokens(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, random_model(), tokenizer())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert [tuple(theirs(text).input_ids) for text in texts] == [tokenizer().encode(text) for text in texts]
    for text in texts[:-1]:
        assert theirs.decode(tokenizer().action(text), skip_special_tokens=True) == text
