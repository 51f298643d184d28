"""A rollout told with a detour: the world's own answers, what is taught untouched, and what stage 3 learns from it."""

from dataclasses import replace

import numpy as np

from detours import WALK, detour, replay, with_detour
from env import AlfworldEnv
from expert import Expert, base, demonstrate, fit_prior, names, parse_task
from games import load_split
from rollout import MAX_ACTION
from tiny import expert_trajectories, games, played, tokenizer
from tokenizer import split_intro

GAMES = {game.id: game for game in games()}


def told(t, seed=0, longest=1024, teaches=lambda action: True):
    """-> ids, starts, weights, the weights before; each action that is taught weighs its number from 1 on, what the world says a half."""
    weights = np.zeros(len(t.ids), np.float32)
    weights[t.spans[0, 0]:] = 0.5
    for k, ((start, end), action) in enumerate(zip(t.spans, tokenizer().actions(t.ids)[-len(t):])):
        weights[start:end] = (k + 1) * teaches(action)
    return *with_detour(t, weights, GAMES[t.game], tokenizer(), np.random.default_rng(seed), longest), weights


def test_what_a_rollout_teaches_stands_as_it_was_behind_a_walk_that_the_world_has_answered():
    took = 0
    whole = [*played(), *expert_trajectories()[:60]]
    for number, t in enumerate((*whole, *(replace(t, spans=t.spans[len(t) // 2:]) for t in whole))):  # those of the second half began in a demonstration
        ids, starts, weights, before = told(t, number)
        own = tokenizer().actions(t.ids)
        earlier = len(own) - len(t)
        longer = len(ids) - len(t.ids)
        for start, (first, end), k in zip(starts, t.spans, range(len(t))):
            assert ids[start:start + end - first].tolist() == t.ids[first:end].tolist() and (weights[start:start + end - first] == k + 1).all()
        if not longer:
            assert (ids == t.ids).all() and (weights == before).all()
            continue
        took += 1
        actions = tokenizer().actions(ids)
        k = int(np.flatnonzero(starts > t.spans[:, 0])[0])
        at, k = t.spans[k, 0], k + earlier
        assert own[k].startswith("go to ") and 1 <= len(actions) - len(own) <= WALK
        assert [*actions[:k], *actions[k + len(actions) - len(own):]] == own
        assert all(action.startswith("go to ") for action in actions[k:k + len(actions) - len(own)])
        assert not weights[at:at + longer].any() and np.delete(weights, np.s_[at:at + longer]).tolist() == before.tolist()
        assert np.delete(ids, np.s_[at:at + longer]).tolist() == t.ids.tolist()
        n, answers = len(actions) - len(own), replay(GAMES[t.game], actions)
        assert ids[at:at + longer].tolist() == [x for i in range(k, k + n) for x in (*tokenizer().action(actions[i]), *tokenizer().turn(answers[i]))]
        assert answers[:k] + answers[k + n:] == replay(GAMES[t.game], own)  # it changed nothing
    assert took > 80


def test_no_detour_where_nothing_is_taught_or_where_it_would_be_too_long():
    for t in played():
        for ids, starts, weights, before in (told(t, longest=len(t.ids)), told(t, teaches=lambda action: not action.startswith("go to "))):
            assert (ids == t.ids).all() and (starts == t.spans[:, 0]).all() and (weights == before).all()


def test_behind_a_detour_there_is_room_for_any_action():
    longer = []
    for seed, t in enumerate([*played(), *expert_trajectories()]):
        longest = t.spans[-1, 0] + MAX_ACTION + 60
        ids, starts, *_ = told(t, seed, longest)
        longer.append(len(ids) - len(t.ids))
        assert starts[-1] + MAX_ACTION <= longest
    assert 0 in longer and max(longer) > 40


def test_replay_says_what_was_seen():
    for t in expert_trajectories()[:10]:
        actions, env = tokenizer().actions(t.ids), AlfworldEnv(100)
        env.reset(GAMES[t.game])
        assert replay(GAMES[t.game], actions) == [env.step(action)[0] for action in actions]


def test_no_walk_ends_where_the_thing_could_be_put_as_well():
    """At the end of a walk to another receptacle of the goal's kind, to go on to the one that the episode chose would be taught in vain."""
    took = 0
    for game in games():
        task, view = split_intro(game.intro)
        kind = parse_task(task).place
        places = [name for name in names(view) if base(name) == kind]
        if len(places) > 1:
            actions = [f"go to {places[0]}"]
            answers = replay(game, actions)
            for seed in range(20):
                taken = detour(game, actions, answers, [0], np.random.default_rng(seed))
                took += taken is not None
                assert taken is None or not taken[1][-1][0].startswith(f"go to {kind} ")
    assert took > 20


def test_behind_a_walk_past_another_lamp_the_expert_does_the_same(data_dir):
    """Of all tasks, those that look at a thing under a lamp search for two things."""
    looks = [game for game in load_split(data_dir, "train") if parse_task(game.task).kind == "look"]
    prior, took = fit_prior(looks), 0
    for number, game in enumerate(looks[:200]):
        demo = demonstrate(AlfworldEnv(), game, Expert(prior), np.random.default_rng(0))
        actions, answers = ([getattr(step, part) for step in demo.steps] for part in ("action", "observation"))
        ways = [k for k, action in enumerate(actions) if action.startswith("go to ")]
        for draw in range(8):
            taken = detour(game, actions, answers, ways, np.random.default_rng([number, draw]))
            if taken:
                took += 1
                k, walk = taken
                expert = Expert(prior)
                expert.reset(game.task, demo.observation)
                for action, answer in (*zip(actions[:k], answers), *walk, *zip(actions[k:], answers[k:])):
                    assert (action, answer) in walk or expert.act() == action
                    expert.observe(action, answer)
    assert took > 1000
