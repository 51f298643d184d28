"""InversePRM: transitions, the loss as a naive loop, re-sampled next actions, a toy domain."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import inverse_prm
from candidates import prefix_tree, score_states
from fast_alfworld import fit_prior
from inverse_prm import inverse_loss, inverse_objective, transitions
from prm import Fit, fit
from rollout import Episode, replay, states_of
from sft import demonstrations
from tiny import (brute_force, by_id, games, play, played, prm, random_model, taught, tokenizer)
from tokenizer import END

GAMMA = 0.9


def demos(n=24, mistakes=0.2):
    return demonstrations(games(), fit_prior(games()), tokenizer(), n, max_steps=15,
                          mistakes=mistakes)


def objective_of(policy=None, some=None, learners=None, **options):
    options = dict(gamma=GAMMA, temperature=1.0, seed=3) | options
    return inverse_objective(policy or taught(), some or demos(), learners or played(), by_id(),
                             tokenizer(), **options)


# --- transitions and the loss --------------------------------------------------------------------

@pytest.mark.parametrize("hide_ends", (False, True))
def test_transitions_are_the_actions_with_a_next_one_and_an_end_that_was_seen(hide_ends):
    cut = 0
    for n, t in enumerate(played()[:30]):
        cut += t.truncated
        mask = np.random.default_rng(n).random(len(t)) < 0.6
        for trained in (None, mask):
            want = []
            for k in range(len(t)):
                last = k == len(t) - 1
                if last and (t.truncated or hide_ends) or trained is not None and not trained[k]:
                    continue
                want.append((k, last))
            before = mask.copy()
            assert [*zip(*transitions(t, trained, hide_ends))] == want
            assert np.array_equal(mask, before)
    assert 0 < cut < 30


def test_the_loss_is_the_cross_entropy_and_its_gradient_goes_through_both_terms():
    g = torch.Generator().manual_seed(0)
    f, then = (torch.randn(40, generator=g).requires_grad_() for _ in range(2))
    expert = torch.rand(40, generator=g) < 0.5
    losses = inverse_loss(f - GAMMA * then, expert)
    p = torch.sigmoid(f - GAMMA * then)
    torch.testing.assert_close(losses, -torch.where(expert, p, 1 - p).log())
    losses.sum().backward()
    torch.testing.assert_close(f.grad, (p - expert.float()).detach())
    torch.testing.assert_close(then.grad, -GAMMA * f.grad)


def picked_trajectories(monkeypatch, objective, model, picked, share, step):
    """-> (loss, metrics), the batch [(Trajectory, trained, expert)] of this step."""
    seen = []
    real = inverse_prm.score_states
    monkeypatch.setattr(inverse_prm, "score_states",
                        lambda m, sequences, *a: seen.append(sequences) or real(m, sequences, *a))
    out = objective(model, picked, share, step)
    monkeypatch.undo()
    return out, seen[-1]


def sequence_score(model, ids):
    """f at the last token of a sequence of its own."""
    return model.scores(model(torch.as_tensor(np.asarray(ids), dtype=torch.long)[None]))[0, -1]


@pytest.mark.parametrize("hide_ends", (False, True))
def test_the_loss_of_an_update_is_a_naive_loop_with_its_gradient(hide_ends, monkeypatch):
    """One sequence a score; the expert's next action is drawn here by another route.

    Every transition has the next action of its own next state (docs/results.md, mistake 7).
    """
    model, policy, experts, learners = prm(), taught(), demos(), played()
    known = {tuple(t.ids): (t, trained) for t, trained in experts}
    known |= {tuple(t.ids): (t, None) for t in learners if tuple(t.ids) not in known}
    asked = []
    real = inverse_prm.draw

    def draw(log_pi, u):
        asked.append((log_pi, real(log_pi, u)))
        return asked[-1][1]

    objective = objective_of(policy, experts, learners, hide_ends=hide_ends)
    monkeypatch.setattr(inverse_prm, "draw", draw)
    (loss, metrics), sequences = picked_trajectories(monkeypatch, objective, model, [4, 1, 8], 3, 5)
    (log_pi, drawn), = asked
    mean = {True: np.mean([len(transitions(t, w, hide_ends)[0]) for t, w in experts]),
            False: np.mean([len(transitions(t, None, hide_ends)[0]) for t in learners])}
    total, row, right, n = 0, 0, 0, 0
    assert len(sequences) == 6
    for b, ids in enumerate(sequences):
        (t, trained), expert = known[tuple(ids)], b < 3
        commands = replay(t, by_id()[t.game], tokenizer())
        for k in range(len(t)):
            last = k == len(t) - 1
            if last and (t.truncated or hide_ends) or expert and not trained[k]:
                continue
            z = sequence_score(model, t.ids[:t.spans[k, 1]])
            if not last:
                begun = t.ids[:t.spans[k + 1, 0]]
                action = t.ids[slice(*t.spans[k + 1])]
                if expert:  # π at the next state, and the candidate that was drawn there
                    tree = prefix_tree(commands[k + 1], tokenizer())
                    p, = brute_force(policy, [begun], [(0, len(begun), tree)])
                    torch.testing.assert_close(log_pi[row, :len(p)], p, atol=1e-4, rtol=1e-4)
                    action = [*tokenizer().encode(commands[k + 1][drawn[row]]), END]
                    row += 1
                z = z - GAMMA * sequence_score(model, [*begun, *action])
            total = total + F.softplus(-z if expert else z) / (2 * 3 * mean[expert])
            right, n = right + int((z > 0) == expert), n + 1
    assert row == len(drawn) > 3
    assert loss.item() == pytest.approx(total.item(), rel=1e-4)
    assert (int(metrics["accuracy"][0]), metrics["accuracy"][1]) == (right, n)
    gradients = []
    for one in (loss, total):
        model.zero_grad()
        one.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    model.zero_grad(set_to_none=True)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(*gradients, atol=1e-4 * scale, rtol=1e-3)


def test_next_actions_follow_the_policy_at_the_next_state_and_change_with_the_step(monkeypatch):
    """Frequencies over 300 updates, at the temperature that is asked for."""
    (t, trained), = [demo for demo in demos(mistakes=0) if len(demo[0]) > 3][:1]
    drawn, real = [], inverse_prm.draw
    monkeypatch.setattr(inverse_prm, "draw",
                        lambda log_pi, u: drawn.append(real(log_pi, u)) or drawn[-1])
    monkeypatch.setattr(inverse_prm, "score_states", lambda m, sequences, states, *a: (
        table if m is policy else torch.zeros(len(states), 1)))
    policy, table = object(), None
    states = states_of(t, by_id()[t.game], tokenizer())[1:]
    with torch.no_grad():
        table = score_states(taught(), [t.ids], states, 2.0)
    objective = objective_of(policy, [(t, trained)], [played()[0]], temperature=2.0)
    for step in range(300):
        objective(prm(), [0], 1, step)
    p, seen = table[0].exp(), torch.stack(drawn)[:, 0]
    share = torch.bincount(seen, minlength=len(p)) / 300
    assert len(set(seen.tolist())) > 2
    torch.testing.assert_close(share, p, atol=0.1, rtol=0)


def test_no_outcome_is_read():
    """Rewards and `won` change nothing; that an episode was cut matters, but for hidden ends."""
    poison = lambda t, **more: replace(t, reward=float("nan"), won=not t.won, **more)
    ask = lambda change, **options: float(objective_of(
        some=[(change(t), w) for t, w in demos()], learners=[change(t) for t in played()],
        **options)(prm(), [*range(12)], 12, 0)[0].detach())
    flip = lambda t: poison(t, truncated=not t.truncated)
    assert ask(lambda t: t) == ask(poison) != ask(flip)
    assert ask(lambda t: t, hide_ends=True) == ask(flip, hide_ends=True)


def test_the_parts_of_ranks_add_up_to_the_update():
    objective, picked = objective_of(), [3, 1, 4, 15, 9]
    whole, metrics = objective(prm(), picked, 5, 2)
    parts = [objective(prm(), picked[r::2], 5, 2) for r in (0, 1)]
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole.item(), rel=1e-4)
    for name, (total, n) in metrics.items():
        gathered = [sum(float(m[name][k]) for _, m in parts) for k in (0, 1)]
        assert gathered == pytest.approx([float(total), float(n)], rel=1e-3, abs=1e-4), name


def test_experts_and_learners_are_drawn_in_equal_numbers_from_all_of_them(monkeypatch):
    objective, experts = objective_of(), {tuple(t.ids) for t, _ in demos()}
    learners, seen = {tuple(t.ids) for t in played()}, set()
    for step in range(8):
        _, sequences = picked_trajectories(monkeypatch, objective, prm(), range(12), 12, step)
        keys = [tuple(ids) for ids in sequences]
        assert len(keys) == 24 and {*keys[:12]} <= experts and {*keys[12:]} <= learners
        seen |= {*keys}
    assert len(seen) > 0.85 * len(experts) + 0.6 * len(learners)


# --- a toy domain --------------------------------------------------------------------------------

def test_the_score_ranks_the_actions_of_a_rule_based_expert_first(tmp_path):
    """Tiny games, a learner that plays at random: f of the expert's action against the others."""
    small = games()[-12:]
    experts = demonstrations(small, fit_prior(games()), tokenizer(), 96, max_steps=12)
    learners = play(random_model(1, scale=0.02), [Episode(game, k) for game in small
                                                  for k in range(8)],
                    temperature=3.0, max_steps=12)
    model = taught().with_score_head()
    objective = inverse_objective(random_model(1, scale=0.02), experts, learners, by_id(),
                                  tokenizer(), gamma=GAMMA, temperature=3.0, seed=0)
    log = fit(model, 96, objective, Fit(lr=1e-2, batch=12, epochs=5), 0, tmp_path / "state")
    assert log[0]["loss"] == pytest.approx(np.log(2), rel=0.3) and log[-1]["accuracy"] > 0.75
    assert log[-1]["reward/expert"] > 0 > log[-1]["reward/learner"]
    better, first = [], []
    with torch.no_grad():
        for t, _ in experts[:24]:
            states = states_of(t, by_id()[t.game], tokenizer())
            f = score_states(model, [t.ids], states)
            for row, tree, c in zip(f, (tree for *_, tree in states), t.choice):
                others = np.delete(row[:len(tree)].numpy(), c)
                better.append(np.mean(float(row[c]) > others))
                first.append(float(row[c]) > others.max())
    assert np.mean(better) > 0.85 and np.mean(first) > 0.4, (np.mean(better), np.mean(first))
