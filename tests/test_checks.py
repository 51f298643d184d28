"""Checks: a wrong action differs from the demonstrated one in a name and in nothing else, and the PRM learns to tell them apart."""

import numpy as np
import pytest
import torch

from checks import against_chance, against_policy, train_checks, wrong
from common import key
from env import AlfworldEnv
from prm import bt_loss
from tellings import expert_trajectories
from tiny import tell, games, prior, random_model, taught, tokenizer
from tokenizer import END
from tree import propose


@pytest.fixture(scope="module")
def demonstrations():
    return expert_trajectories(games(), prior(), tokenizer(), demos=30, seed=0, mistakes=0.3, max_steps=30)


def test_every_name_with_a_number_is_known_by_its_base():
    tok = tokenizer()
    for game in games()[:10]:
        for name in game.counts:
            assert all(tok.base_of[int(i)] == name for i in tok.instances(name)) and tok.hf.token_to_id(f" {name}") not in tok.base_of
    assert all(tok.tokens[i].rsplit(" ", 1)[0] == f" {base}" and i in tok.instances(base) for i, base in tok.base_of.items())


def test_a_wrong_action_was_done_before_or_has_one_other_name_from_the_text_or_with_another_number(demonstrations):
    tok, rng, kinds = tokenizer(), np.random.default_rng(0), {"done": 0, "number": 0, "name": 0, "none": 0}
    for t, _ in demonstrations:
        for k, (start, end) in enumerate(t.spans):
            action, before = t.ids[start:end], t.ids.copy()
            other = wrong(action, t.ids[:start], tok, rng)
            assert (t.ids == before).all()
            if other is None:
                kinds["none"] += 1
                continue
            assert not np.array_equal(other, action) and other[-1] == END
            if any(np.array_equal(other, t.ids[slice(*span)]) for span in t.spans[:k]):
                kinds["done"] += 1
                continue
            places = np.nonzero(other != action)[0]
            assert len(other) == len(action) and len(places) == 1
            old, new = int(action[places[0]]), int(other[places[0]])
            kinds["number" if new in tok.instances(tok.base_of[old]) else "name"] += 1
            assert new in tok.instances(tok.base_of[old]) or (new in t.ids[:start] and new in tok.base_of)
    assert min(kinds[kind] for kind in ("done", "number", "name")) > sum(kinds.values()) / 6, kinds


def test_where_nothing_can_be_wrong_there_is_none():
    tok, rng = tokenizer(), np.random.default_rng(0)
    look, text = np.array(tok.action("look")), np.array(tok.prompt("look around.", "You see nothing."))
    assert all(wrong(look, text, tok, rng) is None for _ in range(30))
    again = np.concatenate([text, look, tok.turn("You see nothing.")])
    assert all(wrong(look, again, tok, rng) is None for _ in range(30))  # it was done before, and is no other


def fit(demonstrations, state, updates, seed=0):
    prm = random_model(head="score", dim=64, scale=0.05)
    return prm, train_checks(prm, tokenizer(), demonstrations, tell(), updates=updates, lr=5e-3, batch=8, seed=seed, state=state)


def test_scores_are_those_of_the_action_and_of_the_wrong_one_each_read_by_itself(demonstrations, tmp_path, monkeypatch):
    """By what the loss was given, against one sequence after the other; mistakes are left out."""
    given, told = [], []
    monkeypatch.setattr("checks.bt_loss", lambda better, worse: given.append((better.detach(), worse.detach())) or bt_loss(better, worse))
    heard = lambda *a, **k: told.append(tell()(*a, **k)) or told[-1]
    monkeypatch.setattr("checks.wrong", lambda action, text, *_: np.roll(action, 1))
    some = demonstrations[:8]
    train_checks(random_model(head="score", dim=64, scale=0.05), tokenizer(), some, heard, updates=1, lr=1e-9, batch=8, seed=0, state=tmp_path / "state")
    prm = random_model(head="score", dim=64, scale=0.05)
    (better, worse), = given
    expected = []
    by_text = {tuple(t.spans.flatten()): (t, taught) for t, taught in some}
    for ids in told:
        places = np.nonzero(ids == END)[0] + 1
        t, taught = next((t, taught) for t, taught in by_text.values() if len(t.ids) == len(ids) and (t.spans[:, 1] == places).all())
        for start, end in t.spans[taught]:
            for sequence in (ids[:end], np.concatenate([ids[:start], np.roll(ids[start:end], 1)])):
                with torch.no_grad():
                    expected.append(prm.scores(prm(torch.from_numpy(sequence)[None])[0, -1]))
    expected = torch.stack(expected).view(-1, 2)
    assert len(expected) == sum(taught.sum() for _, taught in some) and not all(taught.all() for _, taught in some)
    torch.testing.assert_close(better, expected[:, 0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(worse, expected[:, 1], atol=1e-4, rtol=1e-3)


def test_a_prm_learns_to_tell_right_from_wrong(demonstrations, tmp_path):
    _, log = fit(demonstrations, tmp_path / "state", 60)
    assert np.mean([line["accuracy"] for line in log[-6:]]) > 0.58 and log[-1]["loss"] < log[0]["loss"] - 0.05


def test_the_seed_names_the_training(demonstrations, tmp_path):
    weights = [torch.cat([p.detach().flatten() for p in fit(demonstrations, tmp_path / str(n), 2, seed)[0].parameters()]) for n, seed in enumerate((0, 0, 1))]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_nothing_to_check_teaches_nothing(demonstrations, tmp_path):
    mistakes_only = [(t, np.zeros(len(t), bool)) for t, _ in demonstrations]
    prm, log = fit(mistakes_only, tmp_path / "state", 2)
    assert all(torch.equal(a, b) for a, b in zip(prm.parameters(), random_model(head="score", dim=64, scale=0.05).parameters()))


def test_each_action_of_the_expert_meets_another_admissible_one():
    by_id, rng = {game.id: game for game in games()}, np.random.default_rng(0)
    for t, _ in expert_trajectories(games(), prior(), tokenizer(), demos=10, seed=0, mistakes=0.0, max_steps=20):
        pairs, env = against_chance(t, tokenizer(), by_id[t.game], rng), AlfworldEnv()
        commands = env.reset(by_id[t.game])[1]["admissible_commands"]
        assert [k for k, _ in pairs] == list(range(len(t)))
        for (_, other), (start, end) in zip(pairs, t.spans):
            action = tokenizer().decode(t.ids[start:end])
            assert tokenizer().decode(other) in commands and tokenizer().decode(other) != action and other[-1] == END
            commands = env.step(action)[-1]["admissible_commands"]


def test_against_the_policy_stands_whatever_else_it_proposes():
    """At every state the texts of its proposals, without the expert's own, each once."""
    tok, found = tokenizer(), 0
    for t, _ in expert_trajectories(games(), prior(), tok, demos=5, seed=0, mistakes=0.0, max_steps=30):
        pairs, own = against_policy(t, tok, taught(), 6, 3), list(tok.actions(t.ids))
        assert pairs == sorted(pairs, key=lambda pair: pair[0])
        words = [(k, tok.decode(action).strip()) for k, action in pairs]
        assert len(set(words)) == len(words) and all(word != own[k] for k, word in words)
        drawn = propose(taught(), [t.ids.astype(np.int64)], [(0, int(s)) for s in t.spans[:, 0]], 6, 1.0, (3, key(t.game), np.arange(len(t))))
        assert set(words) == {(k, tok.decode(a).strip()) for k, some in enumerate(drawn) for a, _ in some} - set(enumerate(own))
        found += len(pairs)
    assert found
