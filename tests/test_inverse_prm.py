"""InversePRM: its loss against torch's, transitions by brute force, that outcomes are never read, and that it tells expert from learner."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import inverse_prm
from checks import check_loss
from common import UserError
from inverse_prm import Ends, inverse_loss, learned_rewards, rest_odds, told_apart, train_inverse_prm
from prm import score
from rollout import FROM_DEMONSTRATION
from tiny import as_it_is, tell, demonstrations, expert_trajectories, played, random_model, taught, tokenizer


def test_the_loss_is_torchs_on_the_difference_and_its_gradient_flows_through_both_scores():
    g = torch.Generator().manual_seed(0)
    f, f_next = (torch.randn(50, generator=g).requires_grad_() for _ in range(2))
    ended, expert = torch.rand(50, generator=g) < 0.3, torch.rand(50, generator=g) < 0.5
    losses = inverse_loss(Ends(0.9).logit(f, f_next, ended), expert)
    want = [F.binary_cross_entropy(torch.sigmoid(a if e else a - 0.9 * b), x.float()) for a, b, e, x in zip(f, f_next, ended, expert)]
    torch.testing.assert_close(losses, torch.stack(want))
    losses.sum().backward()
    assert (f.grad != 0).all() and torch.equal(f_next.grad != 0, ~ended)
    torch.testing.assert_close(f_next.grad[~ended], -0.9 * f.grad[~ended])


def test_rest_is_a_state_like_any_other_whose_score_is_known():
    """Brute force: a classifier of whose steps of rest they are, at each side's weight of a transition; and resting for ever is worth the sum of its steps."""
    demos, cap, gamma = demonstrations(), 30, 0.9
    rollouts = [replace(t, truncated=n % 3 > 0, spans=t.spans[:len(t) // (1 + n % 3)]) for n, t in enumerate(played()) if len(t) > 2]
    sides = (1.0, demos), (0.0, [(t, None) for t in rollouts])
    steps = [(expert, 1 / sum(len(Ends(gamma, rest=1.0).transitions(t, m)[0]) for t, m in side)) for expert, side in sides for t, _ in side for _ in range(0 if t.truncated else cap - len(t))]
    logit, (label, weight) = torch.zeros((), requires_grad=True), map(torch.tensor, zip(*steps))
    for _ in range(200):
        loss = F.binary_cross_entropy_with_logits(logit.expand(len(label)), label, weight)
        logit.data -= torch.autograd.grad(loss, logit)[0] * len(label) / weight.sum() * 4
    rest = rest_odds(demos, rollouts, cap)
    assert rest == pytest.approx(logit.item(), abs=1e-3) and len(set(label.tolist())) == 2
    assert rest_odds(demos, [replace(t, truncated=True) for t in rollouts], cap) > rest
    midway = [replace(t, episode=FROM_DEMONSTRATION + n, truncated=False, spans=t.spans[-1:]) for n, t in enumerate(rollouts)]
    assert rest_odds(demos, rollouts + midway, cap) == rest  # they end early for where they began
    ends = Ends(gamma, rest=rest)
    f, f_next, ended = torch.randn(9), torch.randn(9), torch.arange(9) < 3
    resting = sum(gamma ** k * rest for k in range(400))
    torch.testing.assert_close(ends.logit(f, f_next, ended), torch.where(ended, f - gamma * resting, f - gamma * f_next))
    for t in rollouts[:9]:  # an f that is consistent with rest has no more reward than rest
        r = learned_rewards(t, np.full(len(t), resting), ends)
        assert len(r) == len(t) and r == pytest.approx(rest, abs=1e-5)


def test_transitions_are_those_with_a_next_action_or_an_end():
    for t in (*played()[:20], *expert_trajectories()[:20]):
        mask = np.random.default_rng(len(t)).random(len(t)) < 0.7
        for taught_mask in (None, mask):
            for hide, rest in ((False, None), (True, None), (False, 0.0), (False, 0.5)):
                want = [(k, k == len(t) - 1 and not t.truncated) for k in range(len(t))
                        if (taught_mask is None or taught_mask[k]) and (k < len(t) - 1 or not (t.truncated and rest is None or hide))]
                assert list(zip(*Ends(0.9, hide, rest).transitions(t, taught_mask))) == want


@pytest.mark.parametrize("hide", (False, True))
def test_the_report_is_the_reward_of_every_transition_on_either_side(hide):
    rng = np.random.default_rng(0)
    sides = [[(t, mask, rng.normal(size=len(t))) for t, mask in side] for side in (demonstrations()[:9], [(t, None) for t in played()[:9]])]
    r = []
    for side in sides:
        r.append([f[k] - (0 if last else 0.9 * f[k + 1]) for t, mask, f in side for k, last in zip(*Ends(0.9, hide).transitions(t, mask))])
    right = (np.mean([x > 0 for x in r[0]]) + np.mean([x <= 0 for x in r[1]])) / 2
    assert told_apart(*sides, Ends(0.9, hide)) == pytest.approx({"expert": np.mean(r[0]), "learner": np.mean(r[1]), "accuracy": right})
    assert told_apart(sides[0], [], Ends(0.9)) is None


def fit(demonstrations, rollouts, ends=Ends(0.9), updates=3, **options):
    """-> the PRM and its log"""
    prm = taught().with_score_head()
    log = train_inverse_prm(prm, taught(), demonstrations, rollouts, tell(), ends,
                            **dict(updates=updates, lr=3e-3, batch=8, temperature=1.0, seed=0) | options)
    return prm, log


@pytest.fixture
def sides():
    return demonstrations(), played()


def test_no_outcome_is_read(tmp_path, sides):
    """Poisoned rewards and `won` change nothing; only that an episode was cut is read, and with hide_ends not even that."""
    demonstrations, rollouts = sides
    poison = lambda t, **also: replace(t, reward=float("nan"), won=not t.won, **also)
    weights = lambda prm: torch.cat([p.detach().flatten() for p in prm.parameters()])
    for rest in (None, rest_odds(demonstrations, rollouts, 30)):
        clean, log = fit(demonstrations, rollouts, Ends(0.9, rest=rest), state=tmp_path / f"a{rest}")
        poisoned = [(poison(t), m) for t, m in demonstrations], list(map(poison, rollouts))
        assert rest_odds(*poisoned, 30) == rest_odds(demonstrations, rollouts, 30)
        other, other_log = fit(*poisoned, Ends(0.9, rest=rest), state=tmp_path / f"b{rest}")
        assert torch.equal(weights(clean), weights(other)) and log == other_log
    clean, _ = fit(demonstrations, rollouts, Ends(0.9, hide=True), state=tmp_path / "c")
    turned = lambda t: poison(t, truncated=not t.truncated)
    other, _ = fit([(turned(t), m) for t, m in demonstrations], list(map(turned, rollouts)), Ends(0.9, hide=True), state=tmp_path / "d")
    assert torch.equal(weights(clean), weights(other))


def test_scores_are_those_of_the_transitions(monkeypatch, tmp_path, sides):
    """f and, for the learner, f' are what `score` says of a trajectory; for the expert f' is that of an action that the policy drew."""
    demonstrations, rollouts = sides
    drawn = []
    monkeypatch.setattr(inverse_prm, "propose", lambda policy, told, states, *a: drawn.append((told, states)) or [[(tokenizer().action("look"), False)] for _ in states])
    prm = random_model(head="score")
    monkeypatch.setattr(inverse_prm, "optimise", lambda model, loss_of, *a: [loss_of(0)])
    seen = []
    monkeypatch.setattr(Ends, "logit", lambda self, *a, logit=Ends.logit: (seen.append(a), logit(self, *a))[1])
    monkeypatch.setattr(inverse_prm, "inverse_loss", lambda z, expert: (seen.append(expert), inverse_loss(z, expert))[1])
    (loss, _), = train_inverse_prm(prm, taught(), demonstrations, rollouts, as_it_is, Ends(0.9), updates=1, lr=1, batch=6, temperature=1.0, seed=3, state=None)
    ((f, f_next, ended), expert), (told, states) = seen, drawn[0]
    everyone = {tuple(t.ids): t for t in (*expert_trajectories(), *rollouts)}
    picked = [everyone[tuple(ids)] for ids in told]
    want, n = [], 0
    for b, t in enumerate(picked):
        own = score(prm, [t])[0]
        mask = next((m for d, m in demonstrations if d is t), None)
        for k, last in zip(*Ends(0.9).transitions(t, mask)):
            then = own[k + 1] if not last and b >= 3 else None
            if not last and b < 3:
                assert states[n] == (b, t.spans[k + 1, 0])
                n += 1
                branch = replace(t, ids=np.concatenate([t.ids[:t.spans[k + 1, 0]], tokenizer().action("look")]).astype(np.int32),
                                 spans=np.array([*t.spans[:k + 1], (t.spans[k + 1, 0], t.spans[k + 1, 0] + len(tokenizer().action("look")))]))
                then = score(prm, [branch])[0][-1]
            want.append((own[k], then, last, b < 3))
    assert n == len(states) and len(want) == len(f)
    for (a, then, last, side), *got in zip(want, f, f_next, ended, expert):
        assert got[0].item() == pytest.approx(a, abs=1e-4) and bool(got[2]) == last and bool(got[3]) == side
        assert last or got[1].item() == pytest.approx(then, abs=1e-4)
    losses = inverse_loss(Ends(0.9).logit(f, f_next, ended), expert)
    weight = [np.mean([n for n in (len(Ends(0.9).transitions(*one)[0]) for one in side) if n]) for side in (demonstrations, [(t,) for t in rollouts])]  # of a trajectory, on average
    assert float(loss.detach()) == pytest.approx(sum(float(losses[side].sum().detach()) / 3 / w for side, w in zip((expert, ~expert), weight)) / 2, rel=1e-5)


def test_a_demonstration_that_was_cut_can_be_learned_from_with_rest(tmp_path, sides):
    demos = [(replace(t, truncated=True, won=False), m) for t, m in sides[0]]
    for rest in (None, 1.0):
        _, log = fit(demos, sides[1], Ends(0.9, rest=rest), state=tmp_path / str(rest))
        assert np.isfinite(log[-1]["loss"])


def test_it_learns_to_tell_the_expert_from_the_learner(tmp_path, sides):
    prm, log = fit(*sides, updates=120, state=tmp_path / "state")
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=0.15)  # f is zero at first, and batches differ in weight
    end = {k: np.mean([entry[k] for entry in log[-5:]]) for k in log[0]}
    assert end["accuracy"] > 0.6 and end["reward/expert"] > 0 > end["reward/learner"]


def test_checks_are_one_more_loss(monkeypatch, sides):
    """The same classifier's loss, and what check_loss says of the same step on top; a step without any check is the classifier's alone."""
    demonstrations, rollouts = sides
    prm = random_model(head="score", scale=0.05)
    monkeypatch.setattr(inverse_prm, "optimise", lambda model, loss_of, *a: [loss_of(step) for step in (0, 1)])
    options = dict(updates=2, lr=1, batch=6, temperature=1.0, seed=3, state=None)
    checked = lambda step: check_loss(prm, tokenizer(), demonstrations, as_it_is, 4, np.random.default_rng(step))
    for check, more in ((checked, [checked(step)[0] for step in (0, 1)]), (lambda step: (None, {}), [0, 0])):
        alone, both = (train_inverse_prm(prm, taught(), demonstrations, rollouts, as_it_is, Ends(0.9), check=c, **options) for c in (None, check))
        for (a, _), (b, metrics), extra in zip(alone, both, more):
            assert torch.allclose(b, a + extra) and ("checks/accuracy" in metrics) == (check is checked)


def test_a_side_without_transitions_is_refused(sides, tmp_path):
    demonstrations, rollouts = sides
    cut = [replace(t, spans=t.spans[:1], ids=t.ids[:t.spans[0, 1]], truncated=True) for t in rollouts]
    for a, b, batch in (([], rollouts, 8), (demonstrations, cut, 8), (demonstrations, rollouts, 1)):
        with pytest.raises(UserError, match="transitions"):
            train_inverse_prm(taught().with_score_head(), taught(), a, b, tell(), Ends(0.9), updates=1, lr=1e-3, batch=batch, temperature=1.0, seed=0,
                              state=tmp_path / "state")
