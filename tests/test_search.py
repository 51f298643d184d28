"""Acting with a PRM against the same written out without caches, snapshots or batches; what scores highest is taken, the first where several do."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

import search
from common import key, uniform
from env import NOTHING_HAPPENS, AlfworldEnv
from prm import score
from rollout import MAX_ACTION, branch, rollout
from search import MAX_ANSWER, beam_search, best_episodes, best_of_n, last_scores, prediction_accuracy
from tiny import assert_same, games, play, played, random_model, taught, tokenizer
from tokenizer import ACT, END, SPECIAL, split_intro
from tree import Tree, propose


def some(n=4, k=2):
    return [(game, episode) for game in games()[:n] for episode in range(k)]


@pytest.fixture
def candidates(monkeypatch):
    """Filled while playing: {(number of the game, episode, step): [(action, logp, forced)], as sampled}."""
    seen = {}

    def note(policy, cache, rows, lengths, h, n, names, temperature):
        drawn = branch(policy, cache, rows, lengths, h, n, names, temperature)
        seen.update({tuple(name[1:].tolist()): state for name, state in zip(names.T, drawn)})
        return drawn

    monkeypatch.setattr(search, "branch", note)
    return seen


@pytest.mark.parametrize("temperature", (0.7, 1.5))
@torch.no_grad()
def test_it_plays_the_candidate_of_highest_q(candidates, temperature):
    model, ranks = random_model(head="score"), Counter()
    trajectories = play(taught(), some(), temperature=temperature, max_steps=6, choose=best_of_n(model, 5))
    assert len(candidates) == sum(map(len, trajectories))
    for t in trajectories:
        for k, (start, end) in enumerate(t.spans):
            state = candidates[key(t.game), t.episode, k]
            q = [model.scores(model(torch.tensor([[*t.ids[:start].tolist(), *action]])))[0, -1].item() for action, *_ in state]
            mine = [action for action, *_ in state].index(t.ids[start:end].tolist())
            assert q[mine] == pytest.approx(max(q), abs=1e-4)
            assert t.logp[k] == pytest.approx(state[mine][1], abs=1e-5) and t.forced[k] == state[mine][2]
            ranks[mine] += 1
    assert len(ranks) == 5  # the best stands anywhere among the five


def test_ties_go_to_the_first(candidates):
    """A PRM that knows nothing: best-of-N plays its first sample, whatever came twice after it."""
    for t in play(taught(), some(), temperature=0.7, max_steps=6, choose=best_of_n(taught().with_score_head(), 6)):
        for k, (start, end) in enumerate(t.spans):
            first = candidates[key(t.game), t.episode, k][0]
            assert tokenizer().decode(first[0]).strip() == tokenizer().decode(t.ids[start:end]).strip()
    assert any(len({tuple(action) for action, *_ in state}) < 6 for state in candidates.values())


def test_duplicates_are_scored_once(candidates, monkeypatch):
    sizes = []

    class Counting(search.Tree):
        def __init__(self, trunks, branches, device="cpu"):
            sizes.append([sum(branch[0] == j for branch in branches) for j in range(len(trunks))])
            super().__init__(trunks, branches, device)

    monkeypatch.setattr(search, "Tree", Counting)
    play(taught(), some(2, 1), temperature=0.5, max_steps=4, choose=best_of_n(random_model(head="score"), 8))
    distinct = [len({tokenizer().decode(action).strip() for action, *_ in state}) for state in candidates.values()]
    assert [n for step in sizes for n in step] == distinct and 1 < np.mean(distinct) < 8


def test_best_of_one_samples_as_the_policy_does():
    """First actions of 2,000 episodes each way, by a chi-square of two samples."""
    options = dict(temperature=0.7, max_steps=1, slots=500)
    episodes = [(games()[0], k) for k in range(2000)]
    first = lambda choose: Counter(tokenizer().decode(t.ids[slice(*t.spans[0])]) for t in rollout(taught(), tokenizer(), episodes, choose=choose, **options))
    a, b = first(None), first(best_of_n(random_model(head="score"), 1))
    common = [text for text in a if a[text] + b[text] >= 10]
    chi2 = sum((a[text] - b[text]) ** 2 / (a[text] + b[text]) for text in common)
    assert len(common) > 8 and chi2 < len(common) + 4 * (2 * len(common)) ** 0.5
    assert a != b  # other random numbers


def test_a_seed_names_it_and_neighbours_do_not_matter():
    choose = best_of_n(random_model(head="score"), 3)
    a, b, c = (play(taught(), some(), temperature=0.7, max_steps=5, choose=choose, slots=slots, seed=seed) for slots, seed in ((16, 0), (3, 0), (16, 1)))
    assert [t.ids.tolist() for t in a] == [t.ids.tolist() for t in b] != [t.ids.tolist() for t in c]


def test_more_candidates_score_higher():
    model = random_model(head="score")
    one, four = (np.concatenate(score(model, play(taught(), some(6), temperature=1.0, max_steps=6, choose=best_of_n(model, n)))).mean() for n in (1, 4))
    assert four > one + 0.1


# --- look-ahead --------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def written_by_hand(model, ids, last, most, temperature, names=None):
    """The next action or answer from plain passes over everything: the most probable tokens, or sampled by the names. -> ids, with `last`"""
    out = []
    while len(out) < most - 1 and last not in out:
        logits = model.logits(model(torch.tensor([[*ids, *out]])))[0, -1]
        logits[[i for i in range(len(SPECIAL)) if i != last]] = -torch.inf
        if temperature:
            cdf = (logits / temperature).softmax(-1).double().cumsum(0)
            out.append(int((cdf <= uniform(*names, len(out)) * cdf[-1]).sum()))
        else:
            out.append(int(logits.argmax()))
    return out if last in out else [*out, last]


@torch.no_grad()
def q_by_hand(prm, ids):
    return prm.scores(prm(torch.tensor([ids])))[0, -1].item()


@pytest.mark.parametrize("little", (False, True), ids=("", "little context"))
@pytest.mark.parametrize("depth", (1, 2))
def test_look_ahead_plays_the_action_whose_imagined_future_scores_highest(candidates, little, depth, monkeypatch):
    if little:
        monkeypatch.setattr(search, "MAX_ANSWER", 10)
    longest, context = search.MAX_ANSWER, 130 + 26 * depth if little else 1024
    policy = random_model(1, context=context) if little else taught()
    model, ranks, depths = random_model(head="score"), Counter(), Counter()
    trajectories = play(policy, some(3 if little else 8, 1), temperature=0.9, max_steps=4, seed=5, choose=best_of_n(model, 3, depth))
    for t in trajectories:
        for k, (start, end) in enumerate(t.spans):
            name, q, texts = (key(t.game), t.episode, k), [], {}
            for action, *_ in candidates[name]:
                texts.setdefault(tokenizer().decode(action).strip(), action)
            turns = min(depth, (context - start - MAX_ACTION) // (longest + MAX_ACTION))
            for number, action in enumerate(texts.values()):
                ids = [*t.ids[:start].tolist(), *action]
                for turn in range(turns):
                    ids += written_by_hand(policy, ids, ACT, longest, 0)
                    ids += written_by_hand(policy, ids, END, MAX_ACTION, 0.9, (5, *name, number, turn))
                q.append(q_by_hand(model, ids))
            mine = list(texts.values()).index(t.ids[start:end].tolist())
            assert q[mine] == pytest.approx(max(q), abs=1e-4)
            ranks[mine] += 1
            depths[turns] += 1
    assert len(ranks) == 3 and len(depths) == 1 + little


def test_look_ahead_leaves_the_world_alone():
    class Watched(AlfworldEnv):
        choosing = False

        def untouched(name):
            def method(self, *arguments):
                assert not Watched.choosing, name
                return getattr(AlfworldEnv, name)(self, *arguments)
            return method

        step, reset, snapshot, restore, admissible_commands = map(untouched, ("step", "reset", "snapshot", "restore", "admissible_commands"))

    look_ahead = best_of_n(random_model(head="score"), 3, 2)

    def choose(*arguments):
        Watched.choosing = True
        chosen = look_ahead(*arguments)
        Watched.choosing = False
        return chosen

    watched, plain = (play(taught(), some(2, 1), temperature=0.7, max_steps=3, choose=c, make_env=env) for c, env in ((choose, Watched), (look_ahead, AlfworldEnv)))
    assert [t.ids.tolist() for t in watched] == [t.ids.tolist() for t in plain]


def test_a_seed_names_look_ahead_and_neighbours_do_not_matter():
    choose = best_of_n(random_model(head="score"), 3, 1)
    a, b, c = (play(taught(), some(), temperature=0.7, max_steps=3, choose=choose, slots=slots, seed=seed) for slots, seed in ((16, 0), (3, 0), (16, 1)))
    assert [t.ids.tolist() for t in a] == [t.ids.tolist() for t in b] != [t.ids.tolist() for t in c]
    without = play(taught(), some(), temperature=0.7, max_steps=3, choose=best_of_n(random_model(head="score"), 3))
    assert [t.ids.tolist() for t in a] != [t.ids.tolist() for t in without]


@torch.enable_grad()
def knowing(t):
    """A policy that has learned one episode by heart, or nearly."""
    policy, ids = deepcopy(taught()), torch.from_numpy(t.ids.astype(np.int64))[None]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(policy.logits(policy(ids[:, :-1]))[0], ids[0, 1:]).backward()
        optimizer.step()
    return policy


def test_predictions_are_counted_against_what_the_world_said():
    trajectories, right, exact = played()[:12:4], [], []
    policy = knowing(trajectories[0])
    for t in trajectories:
        for (_, end), (start, _) in zip(t.spans, t.spans[1:]):
            real = t.ids[end:start].tolist()
            exact.append(written_by_hand(policy, t.ids[:end], ACT, MAX_ANSWER, 0) == real)
            right += [written_by_hand(policy, [*t.ids[:end], *real[:i]], ACT, 2, 0)[0] == token for i, token in enumerate(real)]
    told = prediction_accuracy(policy, trajectories, batch=2)
    assert told == {"answers": len(exact), "exact": pytest.approx(np.mean(exact)), "tokens": pytest.approx(np.mean(right))}
    assert 0 < told["exact"] < 1 and 0 < told["tokens"] < 1 and told["exact"] != told["tokens"]
    assert prediction_accuracy(policy, [replace(t, spans=t.spans[:1])]) == {"answers": 0, "exact": None, "tokens": None}


# --- whole episodes ------------------------------------------------------------------------------------------------------------------

def test_the_best_episode_is_that_of_highest_q_at_its_end_whatever_was_won():
    model = random_model(head="score")
    q = last_scores(model, played())
    np.testing.assert_allclose(q, [q_by_hand(model, t.ids.tolist()) for t in played()], atol=1e-4)
    for n in (1, 2, 4):
        expected = set()
        for game in {t.game for t in played()}:
            for group in range(4 // n):
                numbers = range(group * n, group * n + n)
                expected.add((game, max(numbers, key=lambda e: next(x for t, x in zip(played(), q) if (t.game, t.episode) == (game, e)))))
        order = np.random.default_rng(n).permutation(len(played()))
        poisoned = [replace(played()[i], won=bool(i % 2), reward=float(i % 2), truncated=not i % 2) for i in order]
        chosen = best_episodes(poisoned, last_scores(model, poisoned), n)
        assert len(chosen) == 48 // n and {(t.game, t.episode) for t in chosen} == expected
    assert {t.episode for t in best_episodes(list(reversed(played())), np.zeros(48), 4)} == {0}  # ties go to the first


# --- beams -----------------------------------------------------------------------------------------------------------------------------

class Ends(AlfworldEnv):
    """A world whose episodes end soon: with the second thing opened, or at the third way to something of number 1. Its reward says nothing."""

    def reset(self, game):
        self.count = 0
        return super().reset(game)

    def snapshot(self):
        return super().snapshot(), self.count

    def restore(self, snapshot):
        super().restore(snapshot[0])
        self.count = snapshot[1]

    def step(self, action):
        observation, _, _, truncated, info = super().step(action)
        self.count += 3 * observation.startswith("You open") + 2 * (action.startswith("go to") and action.endswith(" 1"))
        return observation, 0.5, self.count >= 6, truncated and self.count < 6, info


def search_by_hand(policy, prm, game, episode, keep, expand, temperature, seed, max_steps, context, make_env):
    """The same search with every history encoded afresh and played again from the start. -> (ids, actions tried, was it the world that ended it)"""
    intro, _ = make_env(max_steps).reset(game)
    live, ended, tried = [(list(tokenizer().prompt(*split_intro(intro))), [])], [], 0
    for step in range(max_steps):
        found = {}  # texts of the history -> (q, its ids)
        for rank, (ids, texts) in enumerate(live):
            for beam in [rank] if step else range(keep):
                for c in range(expand):
                    action = written_by_hand(policy, ids, END, MAX_ACTION, temperature, (seed, key(game.id), episode, step + beam * max_steps, c))
                    history = (*texts, tokenizer().decode(action).strip())
                    if history not in found:
                        found[history] = q_by_hand(prm, ids + action), ids + action
        live, best_live = [], None
        for history, (q, ids) in sorted(found.items(), key=lambda item: -item[1][0])[:keep]:
            env = make_env(max_steps)
            env.reset(game)
            observation, _, terminated, truncated, _ = [env.step(text) for text in history][-1]
            tried += 1
            answer = list(tokenizer().turn(observation))
            if terminated or truncated or len(ids + answer) + MAX_ACTION > context:
                ended.append((terminated, q, ids))
            else:
                live.append((ids + answer, list(history)))
                best_live = q if best_live is None else best_live
        if not live or any(terminated and q >= best_live for terminated, q, _ in ended):
            break
    terminated, _, ids = max(ended, key=lambda e: e[:2])
    return ids, tried, terminated


@pytest.mark.parametrize("keep, expand", ((1, 1), (1, 3), (3, 1), (2, 3)))
@pytest.mark.parametrize("make_env, context", ((Ends, 1024), (AlfworldEnv, 180)), ids=("ends", "little context"))
def test_beam_search_equals_one_without_cache_or_snapshots(keep, expand, make_env, context):
    policy = taught() if context == 1024 else random_model(2, context=context)
    prm, options = random_model(head="score", context=context), dict(temperature=1.0, seed=3, max_steps=6, make_env=make_env)
    kinds = Counter()
    found = list(beam_search(policy, prm, tokenizer(), some(4, 1), keep, expand, **options))
    assert len(found) == 4
    for t, tried in found:
        game = next(game for game in games() if game.id == t.game)
        ids, expected_tried, by_itself = search_by_hand(policy, prm, game, t.episode, keep, expand, context=context, **options)
        assert (t.ids.tolist(), tried, not t.truncated) == (ids, expected_tried, by_itself)
        kinds[by_itself, len(t)] += 1
    assert len(kinds) > 1 or keep * expand == 1


def test_a_single_beam_is_best_of_n():
    prm = random_model(head="score")
    for n in (1, 4):
        beams = sorted(found(some(), 1, n, prm), key=lambda t: (t.game, t.episode))
        for a, b in zip(beams, play(taught(), some(), temperature=0.7, max_steps=5, choose=best_of_n(prm, n)), strict=True):
            assert_same(a, b)


def found(episodes, keep, expand, prm, policy=None, **options):
    options = {"temperature": 0.7, "max_steps": 5, **options}
    return [t for t, _ in beam_search(policy or taught(), prm, tokenizer(), episodes, keep, expand, **options)]


def test_what_beam_search_finds_happened_so():
    """The actions, played again, get the answers that stand in the trajectory; its log-probabilities are those of the policy."""
    for t in found(some(), 3, 3, random_model(head="score")):
        env = AlfworldEnv(5)
        intro, _ = env.reset(next(game for game in games() if game.id == t.game))
        ids = list(tokenizer().prompt(*split_intro(intro)))
        for k, (start, end) in enumerate(t.spans):
            assert len(ids) == start
            ids += t.ids[start:end].tolist()
            observation, reward, won, truncated, _ = env.step(tokenizer().decode(t.ids[start:end]))
            assert t.inadmissible[k] == (observation == NOTHING_HAPPENS)
            ids += tokenizer().turn(observation) * (k < len(t) - 1)
        assert ids == t.ids.tolist() and (t.reward, t.won, t.truncated) == (reward, won, truncated)
        branches = [(0, int(start), t.ids[start:end].tolist(), bool(cut)) for (start, end), cut in zip(t.spans, t.forced)]
        np.testing.assert_allclose(Tree([t.ids], branches).logprobs(taught(), 0.7).detach(), t.logp, atol=1e-3)


def test_a_seed_names_a_search_and_neighbours_do_not_matter():
    prm = random_model(head="score")
    a, b, c, d = ({(t.game, t.episode): t.ids.tolist() for t in found(episodes, 2, 3, prm, slots=slots, seed=seed, make_env=Ends)}
                  for episodes, slots, seed in ((some(), 16, 0), (some()[::-1], 3, 0), (some(), 16, 1), (some()[2:3], None, 0)))
    assert len(a) == 8 and a == b != c and d.items() <= a.items()


def test_ties_between_beams_go_to_the_first():
    """A PRM that knows nothing: the first sample of the first beam, all along."""
    know_nothing = taught().with_score_head()
    a, b = ({(t.game, t.episode): t.ids.tolist() for t in found(some(), keep, 2, know_nothing)} for keep in (1, 3))
    assert a == b


# --- samples of a state ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", (0.3, 1.5))
def test_samples_that_share_rows_are_those_drawn_alone(temperature):
    """Each sample has its random numbers and its log-probability, however many there are; the cache of the states stays as it was."""
    states = [(0, int(played()[0].spans[3, 0])), (1, int(played()[9].spans[1, 0])), (1, int(played()[9].spans[4, 0]))]
    trunks = [played()[i].ids for i in (0, 9)]
    draw = lambda n, states=states: propose(taught(), trunks, states, n, temperature, (5, np.array([start for _, start in states])))
    many = draw(12)
    assert [state[:3] for state in many] == draw(3) and [draw(12, [state])[0] for state in states] == many
    for (b, start), state in zip(states, many):
        for number, (action, _) in enumerate(state):
            assert action == written_by_hand(taught(), trunks[b][:start], END, MAX_ACTION, temperature, (5, start, number))
    assert temperature < 1 or min(len({tuple(action) for action, _ in state}) for state in many) > 6
