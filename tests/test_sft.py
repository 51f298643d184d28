"""SFT: what carries loss, the loss over candidates, every demonstration once, and learning."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import sft
from candidates import prefix_tree
from fast_alfworld import AlfworldEnv, Expert, demonstrate, fit_prior
from fast_alfworld.gamefile import split_intro
from rollout import Episode, replay
from sft import (Sft, as_trajectory, demonstrations, sft_loss, token_loss, token_weights,
                 train_sft, train_tokenizer)
from tiny import brute_force, by_id, games, play, random_model, same, tokenizer
from tokenizer import ACT, END
from tools import sft_curve
from tools.sft_curve import candidate_loss
from utils import generator

PRIOR = fit_prior(games())
LOSSES = {"tokens": token_loss, "candidates": partial(candidate_loss, games=by_id(),
                                                      tokenizer=tokenizer())}


def demos(n, seed=0, some=None, **options):
    return demonstrations(some or games(), PRIOR, tokenizer(), n, seed=seed, max_steps=15,
                          **options)


# --- demonstrations ------------------------------------------------------------------------------

def test_a_demonstration_is_stored_as_a_rollout_of_the_same_actions():
    """Action by action: text, place, candidates; and nothing behind the last <end>."""
    mistakes = 0
    for number, game in enumerate(games()[::3]):
        rng = generator("stored", number)
        demo = demonstrate(AlfworldEnv(), game, Expert(PRIOR), rng, mistakes=0.3, max_steps=12)
        t, trained = as_trajectory(game, demo, tokenizer(), 7, number)
        assert (t.game, t.seed, t.episode, t.won, t.truncated) == (
            game.id, 7, number, demo.won, not demo.won) and t.reward == demo.won
        assert trained.tolist() == [step.trained for step in demo.steps]
        assert tokenizer().actions(t.ids) == [step.action for step in demo.steps]
        candidates, at = replay(t, game, tokenizer()), t.spans[0, 0]
        assert tuple(t.ids[:at]) == tokenizer().prompt(*split_intro(demo.observation))
        for k, step in enumerate(demo.steps):
            start, end = t.spans[k]
            assert start == at and t.ids[start - 1] == ACT and t.ids[end - 1] == END
            assert tokenizer().decode(t.ids[start:end]) == step.action
            assert candidates[k][t.choice[k]] == step.action
            assert t.n_candidates[k] == len(candidates[k])
            at = end + len(tokenizer().turn(step.observation))
        assert len(t.ids) == t.spans[-1, 1]
        mistakes += (~trained).sum()
    assert mistakes > 10


def test_a_demonstration_that_outgrows_the_context_is_cut(tmp_path):
    demo = demonstrate(AlfworldEnv(), games()[0], Expert(PRIOR), generator(0), mistakes=1.0)
    whole, _ = as_trajectory(games()[0], demo, tokenizer(), 0, 0)
    t, trained = as_trajectory(games()[0], demo, tokenizer(), 0, 0, context=300)
    T = len(t)
    assert 1 < T == len(trained) < len(whole) == 30 and 220 < len(t.ids) <= 300
    assert t.truncated and not t.won and np.array_equal(t.spans, whole.spans[:T])
    assert np.array_equal(t.ids, whole.ids[:t.spans[-1, 1]])
    assert np.array_equal(t.choice, whole.choice[:T]) and (t.n_candidates > 0).all()
    for kind in ("tokens", "candidates"):  # what is left fits a model of that context
        train_sft(random_model(max_len=300), [(t, ~trained)], Sft(), 0, tmp_path / kind,
                  LOSSES[kind])


def test_demonstrations_are_reproducible_and_independent_of_how_many_are_asked_for():
    many, few, other = demos(30, mistakes=0.2), demos(7, mistakes=0.2), demos(7, 1, mistakes=0.2)
    for (a, trained_a), (b, trained_b) in zip(many, few):
        assert (a.game, a.episode) == (b.game, b.episode) and np.array_equal(a.ids, b.ids)
        assert np.array_equal(trained_a, trained_b)
    assert [t.game for t, _ in other] != [t.game for t, _ in few]
    assert [t.episode for t, _ in many] == list(range(30))


def test_every_game_is_demonstrated_once_before_any_twice():
    n = len(games())
    shown = [t.game for t, _ in demos(2 * n + 3)]
    assert sorted(shown[:n]) == sorted(shown[n:2 * n]) == sorted(by_id())
    assert shown[:n] != shown[n:2 * n]


def test_mistakes_are_masked_and_noise_is_trained():
    share = {}
    for kind in ("mistakes", "noise"):
        everything = demos(60, **{kind: 0.3})
        trained = np.concatenate([trained for _, trained in everything])
        share[kind] = float(trained.mean())
        assert any((t.choice < 0).any() for t, _ in everything) is False
    assert 0.6 < share["mistakes"] < 0.8 and share["noise"] == 1
    plain = {tuple(t.ids) for t, _ in demos(36)}
    assert len(plain & {tuple(t.ids) for t, _ in demos(36, noise=0.3)}) < 18


def test_the_vocabulary_has_every_name_and_number_of_the_games():
    small = train_tokenizer(games(), PRIOR, seed=0, sample=3)  # few texts: names are of the games
    for game in games():
        for name, n in game.counts.items():
            assert {f" {name}", f" {n}"} <= {*small.tokens}
    assert train_tokenizer(games(), PRIOR, seed=0, sample=3).tokens == small.tokens
    texts = [step.observation for step in demonstrate(
        AlfworldEnv(), games()[0], Expert(PRIOR), generator(0)).steps]
    assert all(small.decode(small.encode(text)) == text for text in texts)


# --- the loss over tokens ------------------------------------------------------------------------

@pytest.mark.parametrize("obs_weight", (0.0, 0.1, 1.0))
def test_prompts_and_untrained_actions_carry_no_loss(obs_weight):
    masked = 0
    for t, trained in demos(20, mistakes=0.3):
        weights = token_weights(t, trained, obs_weight)
        want = []
        for n in range(len(t.ids)):
            inside = [k for k, (start, end) in enumerate(t.spans) if start <= n < end]
            want.append(float(trained[inside[0]]) if inside else
                        0.0 if n < t.spans[0, 0] else obs_weight)
        np.testing.assert_allclose(weights, want, rtol=1e-6)
        masked += (~trained).sum()
    assert masked > 10


def test_the_loss_is_the_weighted_cross_entropy_over_a_given_total():
    g = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(9, 11, generator=g), torch.rand(9, generator=g)
    targets = torch.randint(11, (9,), generator=g)
    want = sum(w * -torch.log_softmax(l, -1)[t] for l, t, w in zip(logits, targets, weights)) / 5
    torch.testing.assert_close(sft_loss(logits, targets, weights, 5), want)


def captured(monkeypatch, some, settings, policy=None, part=None, kind="tokens"):
    """loss_of(step) of a training, without the training."""
    monkeypatch.setattr(sft, "optimise", lambda policy, loss_of, updates, **_: (loss_of, updates))
    if part:
        monkeypatch.setattr(sft, "mine", part)
        monkeypatch.setattr(sft_curve, "mine", part)
    return train_sft(policy or random_model(), some, settings, 3, None, LOSSES[kind])


@pytest.mark.parametrize("obs_weight", (0.0, 0.3))
def test_the_loss_of_an_update_is_a_loop_over_tokens(obs_weight, monkeypatch):
    some, model = demos(8, mistakes=0.3), random_model()
    loss_of, _ = captured(monkeypatch, some, Sft(batch=8, obs_weight=obs_weight), model)
    loss, metrics = loss_of(0)
    total = weight = 0
    with torch.no_grad():
        for t, trained in some:
            ids = torch.from_numpy(t.ids.astype(np.int64))
            losses = F.cross_entropy(model.logits(model(ids[None])[0])[:-1], ids[1:],
                                     reduction="none")
            for (start, end), learn in zip(t.spans, trained):
                total += float(losses[start - 1:end - 1].sum()) * learn
                weight += (end - start) * learn
            for end, start in zip(t.spans[:-1, 1], t.spans[1:, 0]):
                total += obs_weight * float(losses[end - 1:start - 1].sum())
                weight += obs_weight * (start - end)
    assert loss.item() == pytest.approx(total / weight, rel=1e-4)
    logged, n = metrics["loss"]
    assert float(logged) / float(n) == pytest.approx(total / weight, rel=1e-4)


@pytest.mark.parametrize("kind", ("tokens", "candidates"))
def test_the_parts_of_ranks_add_up_to_the_batch(kind, monkeypatch):
    some = demos(7, mistakes=0.3)
    update = lambda part: captured(monkeypatch, some, Sft(batch=7), part=part, kind=kind)[0](0)
    whole, metrics = update(lambda items: items)
    parts = [update(lambda items, r=r: items[r::2]) for r in (0, 1)]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-4)
    total, n = (sum(float(m["loss"][k]) for _, m in parts) for k in (0, 1))
    assert total / n == pytest.approx(whole.item(), rel=1e-4)
    assert float(metrics["loss"][0]) / float(metrics["loss"][1]) == pytest.approx(whole.item())


@pytest.mark.parametrize("n, batch, epochs", ((16, 8, 1), (17, 8, 2), (5, 8, 3)))
def test_every_demonstration_is_seen_once_an_epoch(n, batch, epochs, monkeypatch):
    some, seen = demos(n), []
    monkeypatch.setattr(sft, "token_weights", lambda t, *a: seen.append(t.episode)
                        or token_weights(t, *a))
    loss_of, updates = captured(monkeypatch, some, Sft(batch=batch, epochs=epochs))
    assert updates == epochs * -(-n // batch)
    for step in range(updates):
        loss_of(step)
    order = [seen[k * n:(k + 1) * n] for k in range(epochs)]
    assert all(sorted(epoch) == list(range(n)) for epoch in order)
    assert len({tuple(epoch) for epoch in order}) == epochs


# --- the loss over candidates --------------------------------------------------------------------

def test_the_loss_over_candidates_equals_brute_force():
    model, some = random_model(), demos(6, mistakes=0.3)
    total = sum(int(trained.sum()) for _, trained in some)
    loss, metrics = LOSSES["candidates"](model, some, Sft())
    states, picked = [], []
    for b, (t, trained) in enumerate(some):
        commands = replay(t, by_id()[t.game], tokenizer())
        for k in np.nonzero(trained)[0]:
            states.append((b, int(t.spans[k, 0]), prefix_tree(commands[k], tokenizer())))
            picked.append(commands[k].index(tokenizer().actions(t.ids)[k]))
    log_pi = brute_force(model, [t.ids for t, _ in some], states)
    want = -np.mean([float(row[c]) for row, c in zip(log_pi, picked)])
    assert loss.item() == pytest.approx(want, rel=1e-4) and len(picked) == total
    assert float(metrics["loss"][0]) / metrics["loss"][1] == pytest.approx(want, rel=1e-4)


def test_a_batch_of_masked_actions_alone_has_no_loss_over_candidates():
    (t, trained), = demos(1)
    loss, _ = LOSSES["candidates"](random_model(), [(t, trained & False)], Sft())
    assert loss is None


# --- learning ------------------------------------------------------------------------------------

SMALL = games()[-12:]


@pytest.mark.parametrize("kind", ("tokens", "candidates"))
def test_a_tiny_policy_learns_tiny_games(kind, tmp_path):
    """From next to nothing; a mistake that is masked is not learned."""
    some = demos(96, some=SMALL, mistakes=0.1)
    policy, before = random_model(scale=0.1), random_model(scale=0.1)
    settings = Sft(lr=2e-2, batch=8, epochs=2)
    log = train_sft(policy, some, settings, 0, tmp_path / "state", LOSSES[kind])
    assert log[-1]["loss"] < 0.5 * log[0]["loss"] and log[-1]["step"] == 24
    won = [np.mean([t.won for t in play(model, [Episode(game, k) for game in SMALL
                                                for k in range(2)], max_steps=12)])
           for model in (before, policy)]
    assert won[1] > won[0] + 0.2, won


def test_the_seed_decides_the_training(tmp_path):
    some, runs = demos(12), []
    for k, seed in enumerate((1, 1, 2)):
        model = random_model(scale=0.1)
        log = train_sft(model, some, Sft(batch=4), seed, tmp_path / str(k))
        runs.append((model, log))
    (a, log_a), (b, log_b), (c, _) = runs
    assert same(a, b) and log_a == log_b and not same(a, c)
