"""Online DPO: its loss against TRL's, the tree of branches against separate sequences, and that it does what the score says."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import dpo
from common import pad, save_model
from credit import SETBACK, better_than_expected, imitated, no_setback, progress, worth
from dpo import dpo_loss, imitation_loss, online_dpo, unlikelihood
from inverse_prm import Ends, like_the_expert
from qestimate import returns
from rollout import FROM_DEMONSTRATION
from sft import sft_loss
from tiny import tell, expert_trajectories, played, random_model, some_branches, taught, tokenizer
from tokenizer import END, PAD
from test_tree import separate
from tree import Tree, propose


# --- the loss ------------------------------------------------------------------------------------------------------------------

def test_worked_losses():
    loss, chosen, rejected = dpo_loss(*map(torch.tensor, ([-2.0], [-3.0], [-2.5], [-2.0])), 0.1)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.05), pytest.approx(-0.1))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.15)))
    same = torch.randn(5)
    assert dpo_loss(same, same - 1, same, same - 1, 0.5)[0].tolist() == pytest.approx([math.log(2)] * 5)  # at the reference: log 2
    assert dpo_loss(*map(torch.tensor, ([-900.0], [-1.0], [-1.0], [-900.0])), 1.0)[0].item() == pytest.approx(1798)  # no overflow


def test_the_gradient_raises_the_chosen_and_lowers_the_rejected_until_beta_is_met():
    pi = torch.tensor([-2.0, -2.0], requires_grad=True)
    dpo_loss(pi[:1], pi[1:], torch.tensor([-2.0]), torch.tensor([-2.0]), 0.2)[0].sum().backward()
    assert pi.grad.tolist() == pytest.approx([-0.1, 0.1])  # β σ(−margin)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of trl about transformers
def test_the_loss_and_its_gradient_are_trls(monkeypatch, tmp_path):
    """TRL's DPOTrainer on our saved models and padded pairs, against one tree of branches."""
    trl, transformers, datasets = (pytest.importorskip(name) for name in ("trl", "transformers", "datasets"))
    policy, reference = random_model(0), random_model(1)
    for name, model in (("policy", policy), ("reference", reference)):
        save_model(tmp_path / name, model, tokenizer())
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "policy")
    words.pad_token, words.eos_token = "<pad>", "<end>"
    trainer = trl.DPOTrainer(
        *(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("policy", "reference")), processing_class=words,
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.1, loss_type="sigmoid", report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list([{"prompt": "go", "chosen": " to", "rejected": " on"}]))
    trunks, branches = some_branches(n=24)
    branches = [(b, start, action, False) for b, start, action, _ in branches]
    at = {}
    for branch in branches:  # the pairs: two branches of the same state
        at.setdefault(branch[:2], []).append(branch)
    pairs = [state[:2] for state in at.values() if len(state) > 1]
    assert len(pairs) > 2
    rows = [[*trunks[b][:start].tolist(), *action] for k in (0, 1) for b, start, action, _ in (pair[k] for pair in pairs)]
    starts = [pair[0][1] for pair in pairs] * 2
    batch = {"input_ids": pad(rows, PAD), "attention_mask": pad([[1] * len(row) for row in rows]),
             "completion_mask": pad([[0] * start + [1] * (len(row) - start) for row, start in zip(rows, starts)])}
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    monkeypatch.setattr("tree.action_logprobs", lambda logits, temperature: logits.log_softmax(-1))  # TRL masks no special tokens
    tree = Tree(trunks, [branch for pair in pairs for branch in pair])
    pi, ref = (tree.logprobs(model, 1.0).view(-1, 2) for model in (policy, reference))
    ours = dpo_loss(pi[:, 0], pi[:, 1], ref.detach()[:, 0], ref.detach()[:, 1], 0.1)[0].mean()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4) and abs(ours.item() - math.log(2)) > 0.03
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, p in policy.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-4 * float(p.grad.abs().max()), rtol=1e-2)


# --- training ----------------------------------------------------------------------------------------------------------------------

def fit(tmp_path, score, *, seed=0, pairs=1280, **options):
    policy, reference = copy.deepcopy(taught()), copy.deepcopy(taught())
    options = dict(beta=0.1, lr=2e-3, temperature=1.0, trunks=4, states_per_trunk=8) | options
    log = online_dpo(policy, reference, score, tokenizer(), expert_trajectories(), tell(), pairs=pairs, seed=seed, state=tmp_path / f"{seed}", **options)
    assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), taught().parameters()))  # frozen
    return policy, log


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def begins_with(words):
    """A score of branches: 1 if the action begins with these words (one token)."""
    first, = tokenizer().encode(words)
    return lambda tree: (tree.ids[tree.branch_row, [int(tree.token_place[tree.token_branch == n].min()) for n in range(len(tree.branch_end))]] == first).float()


def share(policy, words):
    """How often a policy's actions begin so, at states of the expert."""
    trajectories = expert_trajectories()[:30]
    states = [(b, int(start)) for b, t in enumerate(trajectories) for start, _ in t.spans[:6]]
    drawn = propose(policy, [t.ids for t in trajectories], states, 4, 1.0, (5, np.arange(len(states))))
    return np.mean([tokenizer().decode(action).startswith(words) for state in drawn for action, _ in state])


def test_the_policy_learns_to_say_what_the_score_prefers(tmp_path):
    policy, log = fit(tmp_path, begins_with("open"))
    assert share(policy, "open") > 0.3 + share(taught(), "open")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=0.1) and np.mean([entry["rewards/margins"] for entry in log[-5:]]) > log[0]["rewards/margins"] + 0.03
    assert np.mean([entry["rewards/accuracies"] for entry in log[-5:]]) > 0.6
    policy, _ = fit(tmp_path, lambda tree: -begins_with("go to")(tree), seed=1, pairs=640)  # and to avoid what it does not
    assert share(policy, "go to") < 0.5 * share(taught(), "go to")


def test_the_seed_names_the_training(tmp_path):
    runs = [fit(tmp_path / str(i), begins_with("open"), seed=seed, pairs=160) for i, seed in enumerate((1, 1, 2))]
    assert torch.equal(weights(runs[0][0]), weights(runs[1][0])) and runs[0][1] == runs[1][1]
    assert not torch.equal(weights(runs[0][0]), weights(runs[2][0]))


def test_a_pair_is_the_best_and_the_worst_of_the_distinct_proposals(tmp_path, monkeypatch):
    shown, scored = [], []
    logprobs = Tree.logprobs
    monkeypatch.setattr(Tree, "logprobs", lambda tree, *a: shown.append(tree) or logprobs(tree, *a))

    def score(tree):  # the sum of the action's tokens: as good as random, and seen again below
        totals = torch.zeros(len(tree.branch_end)).index_add(0, tree.token_branch, tree.ids[tree.token_row, tree.token_place].float())
        scored.append(totals)
        return totals

    fit(tmp_path, score, pairs=96, proposals=6, lr=1e-9)
    for totals, reference_pass, policy_pass in zip(scored, shown[0::2], shown[1::2]):
        assert reference_pass is policy_pass
        pairs = torch.zeros(len(policy_pass.branch_end)).index_add(
            0, policy_pass.token_branch, policy_pass.ids[policy_pass.token_row, policy_pass.token_place].float()).view(-1, 2)
        assert (pairs[:, 0] > pairs[:, 1]).all() and len(pairs) < len(totals) / 2  # more than two were scored at some states
        assert {*pairs.flatten().tolist()} <= {*totals.tolist()} and pairs.max() == totals.max() and pairs.min() == totals.min()
    assert len(scored) == 3 and len(shown) == 6


def test_the_loss_of_an_update_written_out(monkeypatch):
    """Pairs weigh as many states as they stand for, of trajectories of different length, beside what is imitated; all at the temperature that is asked for."""
    told, trees, rng = [], [], np.random.default_rng(0)
    monkeypatch.setattr(dpo, "Tree", lambda ids, branches, *a, **named: trees.append((ids, branches, named)) or Tree(ids, branches, *a, **named))
    monkeypatch.setattr(dpo, "optimise", lambda policy, loss_of, *_, **__: loss_of(0))
    trajectories = [t for t in expert_trajectories() if 2 <= len(t) <= 12][:6]
    weigh = lambda some: [rng.random(len(t.ids)).astype(np.float32) for t in some]
    worth = {}
    keep = lambda some: [worth.setdefault(id(t), w) for t, w in zip(some, weigh(some))]
    policy, reference = copy.deepcopy(taught()), copy.deepcopy(taught())
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    loss, _ = online_dpo(policy, reference, begins_with("go to"), tokenizer(), trajectories, lambda ids, game, rng: told.append(ids) or ids,
                         pairs=18, beta=0.4, lr=1.0, temperature=0.5, proposals=4, trunks=6, states_per_trunk=3, imitate=1.7, weigh=keep, seed=2, state=None)
    ids, branches, named = next(tree for tree in trees[1:] if "whole" not in tree[2])  # the first is what was scored
    assert len(branches) >= 4 and len({len(t) for t in trajectories}) > 2
    picked = [next(t for t in trajectories if np.array_equal(t.ids, one)) for one in told]
    with torch.no_grad():
        pi, ref = (separate(model, ids, branches, 0.5).view(-1, 2) for model in (policy, reference))
    losses = -torch.nn.functional.logsigmoid(0.4 * ((pi - ref)[:, 0] - (pi - ref)[:, 1]))
    lengths = np.array([len(t) for t in picked])
    stands_for = np.array([lengths[b] / min(lengths[b], 3) for b, *_ in branches[::2]])
    expected = float((torch.from_numpy(stands_for) * losses).sum()) / lengths.sum()
    weighed, total = 0.0, 0.0
    for t in picked:
        with torch.no_grad():
            logp = policy.logits(policy(torch.from_numpy(t.ids.astype(np.int64))[None])[0]).log_softmax(-1)
        weighed -= sum(float(worth[id(t)][n]) * float(logp[n - 1, t.ids[n]]) for n in range(1, len(t.ids)))
        total += float(worth[id(t)][1:].sum())
    assert expected > 0.05 and loss.item() == pytest.approx(expected + 1.7 * weighed / total, rel=1e-3)


def test_pairs_without_a_preference_change_nothing(tmp_path, monkeypatch):
    policy, log = fit(tmp_path, lambda tree: torch.zeros(len(tree.branch_end)), pairs=160)
    assert torch.equal(weights(policy), weights(taught())) and log[-1]["pairs/kept"] == 0 and log[-1]["pairs/differ"] > 0.1
    policy, log = fit(tmp_path / "gap", begins_with("go to"), pairs=160, min_gap=1.0)  # a gap of 1 is not more than 1
    assert torch.equal(weights(policy), weights(taught()))
    policy, log = fit(tmp_path / "less", begins_with("go to"), pairs=1280, min_gap=0.99, temperature=0.3, lr=1e-5)
    assert not torch.equal(weights(policy), weights(taught()))
    assert all(0 < entry["pairs/kept"] < entry["pairs/differ"] for entry in log) and min(entry["pairs/differ"] for entry in log) < 1

    # equal text is no pair, however it is spelled in tokens
    tok = tokenizer()
    look = [list(tok.encode("look")) + [END], [i for c in "look" for i in tok.encode(c)] + [END]]
    assert look[0] != look[1]
    monkeypatch.setattr(dpo, "propose", lambda policy, trunks, states, *_: [[(look[0], False), (look[1], False)] for _ in states])
    policy, log = fit(tmp_path / "text", lambda tree: pytest.fail("was asked to score"), pairs=160)
    assert torch.equal(weights(policy), weights(taught())) and log[-1]["pairs/differ"] == 0


def test_beta_holds_the_policy_near_its_reference(tmp_path):
    """At equal steps a large β saturates the loss sooner: the implicit rewards grow, the distance to the reference does not."""
    moved = {}
    for beta in (0.05, 5.0):
        policy, _ = fit(tmp_path / str(beta), begins_with("open"), beta=beta, pairs=640)
        t = expert_trajectories()[:20]
        branches = [(b, int(s), x.ids[s:e].tolist(), False) for b, x in enumerate(t) for s, e in x.spans]
        tree = Tree([x.ids for x in t], branches)
        with torch.no_grad():
            moved[beta] = (tree.logprobs(policy, 1.0) - tree.logprobs(taught(), 1.0)).abs().mean().item()
    assert moved[5.0] < 0.75 * moved[0.05]


# --- imitation of what won -----------------------------------------------------------------------------------------------------------

def test_of_a_won_rollout_what_went_better_than_expected_is_imitated_and_of_a_lost_one_nothing():
    """Against the sum written out, with a critic of random numbers."""
    rng, seen = np.random.default_rng(0), set()
    for t in (*played(), *expert_trajectories()[:10]):
        V = rng.random(len(t)).astype(np.float32)
        weights = imitated(t, better_than_expected(t, V, 0.9), 0.3)
        seen.add((t.won, bool(t.inadmissible.any())))
        if not t.won:
            assert not weights.any()
            continue
        by_hand = np.zeros(len(t.ids))
        worth = [0 if wrong else max(0, 0.9 ** (len(t) - 1 - k) - V[k]) for k, wrong in enumerate(t.inadmissible)]
        for k, (start, end) in enumerate(t.spans):
            by_hand[start:end] = worth[k]
            if k + 1 < len(t):
                by_hand[end:t.spans[k + 1, 0]] = 0.3 * np.mean(worth)
        np.testing.assert_allclose(weights, by_hand, rtol=1e-4, atol=1e-6)
        assert not imitated(t, better_than_expected(t, np.ones(len(t)), 0.9), 0.3).any()  # nothing went better than that
        cut = copy.copy(t)
        cut.forced = np.arange(len(t)) == len(t) // 2  # an <end> that was not sampled is neither learned nor unlearned
        changed = imitated(cut, better_than_expected(t, V, 0.9), 0.3) != weights
        assert set(np.nonzero(changed)[0]) <= {t.spans[len(t) // 2, 1] - 1} and imitated(cut, better_than_expected(t, V, 0.9), 0.3)[t.spans[len(t) // 2, 1] - 1] == 0
    assert {won for won, _ in seen} == {True, False}


def test_a_won_rollout_that_went_as_expected_teaches_nothing():
    for t in (t for t in expert_trajectories()[:10] if t.won):
        np.testing.assert_allclose(better_than_expected(t, returns(t, 0.9), 0.9), 0, atol=1e-12)


def test_of_a_won_rollout_what_was_no_setback_is_imitated_alike_and_of_a_lost_one_nothing():
    """Against the rule written out, with a critic of random numbers; one that expects to win, and sooner with each action, leaves nothing out."""
    rng, kept = np.random.default_rng(0), set()
    for t in (*played(), *expert_trajectories()[:10]):
        V = rng.random(len(t)) * 0.2
        after = [0.9 * V[k + 1] if k + 1 < len(t) else 1 for k in range(len(t))]
        expected = [float(t.won and after[k] - V[k] > -SETBACK) for k in range(len(t))]
        assert no_setback(t, V, 0.9).tolist() == expected and no_setback(t, returns(t, 0.9), 0.9).tolist() == [float(t.won)] * len(t)
        kept |= set(expected) if t.won else set()
    assert kept == {0.0, 1.0}


def test_progress_is_what_an_action_added_and_reads_no_outcome():
    for t in played():
        q = np.random.default_rng(0).random(len(t))
        expected = [max(0, q[k] - q[k - 1]) if k else 0 for k in range(len(t))]
        np.testing.assert_allclose(progress(q), expected)
        weights, other = imitated(t, progress(q), 0.3), copy.copy(t)
        other.won, other.reward = not t.won, 1 - t.reward
        assert (imitated(other, progress(q), 0.3) == weights).all()
        assert [weights[start] for start, _ in t.spans] == [pytest.approx(e * (not bad)) for e, bad in zip(expected, t.inadmissible)]


@pytest.mark.parametrize("by, rule", (("win", no_setback), ("surplus", better_than_expected)))
@pytest.mark.parametrize("prm_loss", ("bce", "bt", "promise-progress"))
def test_won_rollouts_are_measured_by_the_value_that_their_prm_knows(prm_loss, by, rule):
    """Read at the state; the promise of the action before, which plays V there, the first having neither gained nor lost; nothing of a PRM of preferences."""
    prms, some = [random_model(head="relative" if prm_loss == "bt" else "score", seed=seed, scale=0.05) for seed in (1, 2)], played()[:6]
    gains = worth(prms, some, by, how="min", prm_loss=prm_loss, ends=Ends(0.9))
    for t, gain in zip(some, gains):
        with torch.no_grad():
            f = torch.stack([prm.scores(prm(torch.from_numpy(t.ids.astype(np.int64))[None])[0]) for prm in prms]).sigmoid().min(0).values.numpy()
        ends = f[t.spans[:, 1] - 1]
        V = {"bce": f[t.spans[:, 0] - 1], "bt": np.zeros(len(t)), "promise-progress": np.array([ends[k - 1] if k else 0.9 * ends[0] for k in range(len(t))])}[prm_loss]
        np.testing.assert_allclose(gain, rule(t, V, 0.9), atol=1e-5)


def test_by_the_outcome_all_that_won_rollouts_did_is_imitated_and_no_prm_is_asked():
    some = [*played(), *expert_trajectories()[:10]]
    ask = lambda by: [gain.tolist() for gain in worth([], some, by, how="mean", prm_loss="bce", ends=Ends(0.9))]
    assert ask("outcome") == [[float(t.won)] * len(t) for t in some] and {t.won for t in some} == {True, False}
    assert ask("all") == [[1.0] * len(t) for t in some]


@pytest.mark.parametrize("hide, rest", ((False, None), (True, None), (False, 0.4)))
def test_rollouts_of_more_learned_return_are_imitated_by_how_much_it_is_more(hide, rest):
    """Σ f − γ f', f at an end; where a rollout was cut, or ends are hidden, its last action has no next one, and no reward. Outcomes are not read.

    With rest, a cut rollout's last action is followed by itself, an end by Σ_k γ^k rest, and what counts is what is more than a step of rest has."""
    some, rng, ends = [*played(), *expert_trajectories()[:10]], np.random.default_rng(0), Ends(0.9, hide, rest)
    scores = [rng.normal(size=len(t)) * 3 for t in some]
    last = lambda t, f: 0 if hide or t.truncated and rest is None else f[-1] * (0.1 if t.truncated else 1) - (0 if t.truncated or rest is None else 0.9 * rest / 0.1)
    returns = [sum(f[k] - 0.9 * f[k + 1] for k in range(len(t) - 1)) + last(t, f) - (rest or 0) * len(t) for t, f in zip(some, scores)]
    worth_of = like_the_expert(some, scores, ends)
    above = [r - np.mean(returns) for r in returns if r > np.mean(returns)]
    for t, r, w in zip(some, returns, worth_of):
        np.testing.assert_allclose(w, [max(0, r - np.mean(returns)) / np.mean(above)] * len(t))
    turned = [replace(t, won=not t.won, reward=1 - t.reward) for t in some]
    assert all((a == b).all() for a, b in zip(worth_of, like_the_expert(turned, scores, ends)))
    assert {t.truncated for t in some} == {True, False}
    midway = [replace(t, episode=FROM_DEMONSTRATION + n) for n, t in enumerate(some)]
    both = like_the_expert(some + midway, scores + [f + 100 for f in scores], ends)
    assert all(np.allclose(a, b) for a, b in zip(both, worth_of)) and not any(w.any() for w in both[len(some):])  # those begun in a demonstration have no part in it
    assert not any(w.any() for w in like_the_expert(midway, scores, ends))
    assert rest or [w.tolist() for w in like_the_expert(some[:2], [f * 0 for f in scores[:2]], ends)] == [[0.0] * len(t) for t in some[:2]]  # nothing learned, nothing imitated


def test_the_imitation_loss_is_sfts_with_branches_or_without():
    model, (trunks, branches) = random_model(), some_branches()
    w = torch.rand(len(trunks), max(map(len, trunks)), generator=torch.Generator().manual_seed(0))
    for row, trunk in zip(w, trunks):
        row[len(trunk):] = 0
        row[:5] = 0
    ids = pad(trunks)
    expected = sft_loss(model.logits(model(ids)[:, :-1]), ids[:, 1:], w[:, 1:])
    for tree in (Tree(trunks, branches, whole=range(len(trunks))), Tree(trunks, [], whole=range(len(trunks)))):
        torch.testing.assert_close(imitation_loss(model, tree.hidden(model), tree.ids, w), expected, atol=1e-3, rtol=1e-4)


def test_actions_that_weigh_less_than_nothing_are_unlearned_whole():
    """Action by action: −log(1 − π(a|s) + 0.05), beside the likelihood of the rest."""
    model, some, rng = random_model(scale=0.05), played()[:6], np.random.default_rng(0)
    trunks = [t.ids.astype(np.int64) for t in some]
    gains = [rng.choice([-2.0, -0.5, 0.0, 1.0], len(t)) for t in some]
    rows = [np.zeros(len(t.ids), np.float32) for t in some]
    for row, t, gain in zip(rows, some, gains):
        for (start, end), g in zip(t.spans, gain):
            row[start:end] = g
    w = pad(rows, dtype=torch.float32)
    tree, p = Tree(trunks, [], whole=range(len(some))), []
    for t, trunk in zip(some, trunks):
        logp = model.logits(model(torch.from_numpy(trunk)[None]))[0].log_softmax(-1)
        p += [torch.stack([logp[place - 1, trunk[place]] for place in range(start, end)]).sum().exp() for start, end in t.spans]
    p, g = torch.stack(p), torch.from_numpy(np.concatenate(gains))
    expected = -(g * torch.where(g > 0, p.log(), 0)).sum() + (g.clamp(max=0) * torch.log(1 - p + 0.05)).sum()
    assert (g < 0).sum() > 10 < (g > 0).sum()
    torch.testing.assert_close(imitation_loss(model, tree.hidden(model), tree.ids, w, total=7.0).double(), expected / 7, atol=1e-4, rtol=1e-4)
    certain = unlikelihood(torch.tensor([0.0, -1e-3, -1.0, -50.0]))
    assert certain.isfinite().all() and (certain.diff() < 0).all()


def test_what_the_world_did_not_accept_is_unlearned_in_every_rollout():
    seen = set()
    for t in played():
        weights = imitated(t, np.ones(len(t)), 0.3, unlearn=0.7)
        assert [weights[s] for s, _ in t.spans] == pytest.approx([-0.7 if wrong else 1 for wrong in t.inadmissible])
        assert (imitated(t, np.ones(len(t)), 0.3).clip(0) == weights.clip(0)).all()  # of the rest, and of the answers, as much as without
        seen |= set(t.inadmissible)
    assert seen == {True, False}


def test_imitation_makes_what_won_likelier_and_needs_no_preference(tmp_path):
    same = lambda tree: torch.zeros(len(tree.branch_end))
    worth = lambda some: [imitated(t, better_than_expected(t, np.zeros(len(t)), 0.95), 0.3) for t in some]
    policy, log = fit(tmp_path, same, pairs=1280, imitate=0.1, weigh=worth, lr=1e-2)
    assert log[-1]["pairs/kept"] == 0 and log[-1]["imitation"] < 0.9 * log[0]["imitation"] and "loss" not in log[-1]
    alone, log = fit(tmp_path / "alone", None, pairs=1280, imitate=0.1, weigh=worth, lr=1e-2, proposals=0)  # no score is asked
    assert torch.equal(weights(alone), weights(policy)) and "pairs/kept" not in log[-1]
    both, log = fit(tmp_path / "both", begins_with("open"), pairs=640, imitate=0.1, weigh=worth)
    assert "loss" in log[-1] and "imitation" in log[-1]
    assert share(taught(), "open") + 0.1 < share(both, "open")
