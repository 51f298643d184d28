"""Supervised fine-tuning: what is taught is what the expert did, every demonstration is named by its number, and it is learned."""

import json
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from env import AlfworldEnv
from expert import Expert, demonstrate, names, parse_task
from sft import sft_loss, train_sft, train_tokenizer
from sft import main as sft_main
from tellings import demonstration, demonstration_tokens, expert_trajectories, glances, hinted, receptacle_types, searches, sparser, strayed, teller, tellings, without_hint
from tiny import assert_refused, demonstrations, games, in_process, play, prior, random_model, taught, tokenizer
from tokenizer import ACT, END, OBS, TASK, split_intro


def test_the_experts_actions_are_taught_its_mistakes_and_the_prompt_are_not():
    tok, mistakes = tokenizer(), 0
    for number, game in enumerate(games()[:20]):
        rng = np.random.default_rng(number)
        demo = demonstrate(AlfworldEnv(), game, Expert(prior(), rng), rng, mistakes=0.3)
        ids, weights = demonstration_tokens(demo, tok, 0.3)
        prompt = tok.prompt(game.task, demo.observation.split("\n\n")[-2])
        assert tuple(ids[:len(prompt)]) == prompt and not weights[:len(prompt)].any()
        place = len(prompt)
        for k, (action, observation, trained) in enumerate(demo.steps):
            for piece, weight in ((tok.action(action), float(trained)), (tok.turn(observation), 0.3)):
                if k < len(demo.steps) - 1 or piece[-1] == END:  # nothing follows the last answer
                    assert tuple(ids[place:place + len(piece)]) == piece
                    np.testing.assert_allclose(weights[place:place + len(piece)], weight)
                    place += len(piece)
            mistakes += not trained
        assert place == len(ids) == len(weights)
        assert ids[0] == TASK and ids[-1] == END and (ids == ACT).sum() == (ids == END).sum() == len(demo.steps) and (ids == OBS).sum() == 1
    assert mistakes > 20


def test_the_loss_is_the_weighted_mean_of_torchs():
    g = torch.Generator().manual_seed(0)
    logits, targets, weights = torch.randn(3, 7, 11, generator=g), torch.randint(11, (3, 7), generator=g), torch.rand(3, 7, generator=g)
    weights[1, 4:] = 0
    expected = sum(w * F.cross_entropy(l, t) for row in zip(logits, targets, weights) for l, t, w in zip(*row)) / weights.sum()
    torch.testing.assert_close(sft_loss(logits, targets, weights), expected)
    logits[1, 4:] = 100 * torch.randn(3, 11)  # what weighs nothing says nothing
    torch.testing.assert_close(sft_loss(logits, targets, weights), expected)


def demos_of(numbers, seed=0, **options):
    return tellings(games(), prior(), tokenizer(), numbers, seed=seed, **dict(demos=10**6, mistakes=0.2, obs_weight=0.3, max_steps=30) | options)


def test_a_demonstration_is_named_by_its_number():
    together = demos_of(range(10))
    for number in (0, 3, 9):
        (ids, weights), = demos_of([number])
        assert ids.tolist() == together[number][0].tolist() and weights.tolist() == together[number][1].tolist()
    assert any(a[0].tolist() != b[0].tolist() for a, b in zip(together, demos_of(range(10), seed=1)))


def test_every_game_is_shown_once_before_any_twice():
    """By the words of task and first observation, numbers taken out."""
    words = lambda text: "".join(c for c in text if not c.isdigit())
    shown = lambda ids: words(tokenizer().decode(ids[:np.argmax(ids == ACT)]))
    of_game = sorted(words(tokenizer().decode(tokenizer().prompt(game.task, AlfworldEnv().reset(game)[0].split("\n\n")[1]))) for game in games())
    n = len(games())
    both = [shown(ids) for ids, _ in demos_of(range(2 * n), demos=2 * n)]
    assert sorted(both) == sorted(2 * of_game)
    assert sorted(shown(ids) for ids, _ in demos_of(range(n), demos=n)) == of_game


def test_a_detour_leads_nowhere_and_the_expert_goes_on_as_it_would():
    env, took, agrees, taught_after = AlfworldEnv(100), 0, 0, 0
    for number in range(120):
        game, demo = demonstration(AlfworldEnv(30), games(), prior(), number, 0, 0.15)
        told = strayed(game, demo, np.random.default_rng(number))
        assert [step.action for step in told.steps if step.trained] == [step.action for step in demo.steps if step.trained]
        first, _ = env.reset(game)
        assert [env.step(step.action)[0] for step in told.steps] == [step.observation for step in told.steps]  # the world's own answers
        assert env.won == demo.won
        longer = len(told.steps) - len(demo.steps)
        if not longer:
            assert told == demo
            continue
        took += 1
        assert 1 <= longer <= 10
        k = next(k for k in range(len(told.steps)) if told.steps[:k] + told.steps[k + longer:] == demo.steps and not any(step.trained for step in told.steps[k:k + longer]))
        assert all(step.action.startswith("go to ") for step in told.steps[k:k + longer]) and demo.steps[k].trained
        assert told.steps[k + longer - 1].action != demo.steps[k].action
        env.reset(game)
        expert = Expert(prior(), np.random.default_rng(0))  # one that reads along
        expert.reset(game.task, first)
        for n, step in enumerate(told.steps):
            if n >= k + longer and step.trained:
                taught_after, agrees = taught_after + 1, agrees + (expert.act() == step.action)
            expert.observe(step.action, env.step(step.action)[0])
    assert took > 80 and agrees == taught_after > 200


def test_a_share_of_the_demonstrations_takes_a_detour_another_each_time():
    longer = [np.array([len(a) > len(b) for (a, _), (b, _) in zip(demos_of(numbers, demos=50, detours=p), demos_of(numbers, demos=50))])
              for p, numbers in ((0.0, range(50)), (1.0, range(50)), (0.5, range(100)))]
    assert not longer[0].any() and longer[1].mean() > 0.6 and 0.25 < longer[2].mean() < 0.6
    one, again = ({tokenizer().decode(ids) for ids, _ in demos_of(range(start, start + 50), demos=50, detours=1.0)} for start in (0, 0))
    assert one == again


def test_an_episode_is_told_anew_with_other_numbers_or_of_another_thing():
    """Told back by the same exchanges, it is the same again; what is asked for is then what is brought."""
    tok, all_told, asked = tokenizer(), teller(games(), tokenizer(), 1.0), set()
    things = {parse_task(game.task).object for game in games()}
    for number, (t, _) in enumerate(demonstrations()[:120]):
        game = next(game for game in games() if game.id == t.game)
        told = all_told(t.ids, t.game, np.random.default_rng(number))
        assert len(told) == len(t.ids) and (told[t.ids < 6] == t.ids[t.ids < 6]).all()
        table = {}
        assert all(table.setdefault(int(a), int(b)) == b for a, b in zip(t.ids, told)) and len(set(table.values())) == len(table)  # one to one
        mine, other = (parse_task(tok.decode(ids[:int(np.argmax(ids == OBS))])).object for ids in (t.ids, told))
        bases = {(tok.base_of[a], tok.base_of[b]) for a, b in table.items() if a in tok.base_of}
        assert all(b == {mine: other, other: mine}.get(a, a) for a, b in bases) and other in things
        asked.add((mine, other))
    assert sum(mine != other for mine, other in asked) > len(asked) / 2 and len({other for _, other in asked}) > len(things) / 2
    tables = {tuple(teller(games(), tok, 0.0)(np.arange(len(tok)), game.id, np.random.default_rng(seed))) for seed in range(3)}
    assert len(tables) == 3 and all(tok.base_of.get(b) == tok.base_of.get(a) for table in tables for a, b in enumerate(table))  # numbers alone


def test_demonstrations_are_told_again_in_another_order_with_other_numbers():
    words = lambda ids: "".join(c for c in tokenizer().decode(ids) if not c.isdigit())
    tellings = [demos_of(range(12 * time, 12 * (time + 1)), demos=12) for time in range(3)]
    texts = [[words(ids) for ids, _ in told] for told in tellings]
    assert sorted(texts[0]) == sorted(texts[1]) == sorted(texts[2]) and texts[0] != texts[1] != texts[2]
    numbered = [{tokenizer().decode(ids) for ids, _ in told} for told in tellings]
    assert len(numbered[0] & numbered[1]) < 12


def test_the_same_game_is_told_with_other_numbers_each_time():
    told = [tokenizer().decode(ids[:np.argmax(ids == ACT)]) for ids, _ in tellings(
        games()[:1], prior(), tokenizer(), range(6), demos=3, seed=0, mistakes=0, obs_weight=0.3, max_steps=30)]
    assert len(set(told)) == 6 and len({"".join(c for c in text if not c.isdigit()) for text in told}) == 1


def test_the_cap_counts():
    assert all((ids == END).sum() <= 4 for ids, _ in demos_of(range(10), max_steps=4))


def test_the_vocabulary_has_every_name_with_every_number_of_the_games():
    tok = train_tokenizer(games(), prior(), seed=0, sample=3)  # few texts: the names come from the games
    for game in games():
        assert all(f" {base} {k}" in tok.tokens for base, n in game.counts.items() for k in range(1, n + 1))
    assert train_tokenizer(games(), prior(), seed=0, sample=3).tokens == tok.tokens


def train(tmp_path, demos, seed=0, updates=1):
    policy = random_model(scale=0.1)
    log = train_sft(policy, tokenizer(), games(), prior(), demos=demos, updates=updates, glanced=0, lr=1e-2, batch=8, seed=seed, state=tmp_path / "state", mistakes=0.1, obs_weight=0.3, max_steps=20)
    return policy, log


def test_actions_are_learned(tmp_path):
    _, log = train(tmp_path, 40, updates=50)
    assert log[-1]["accuracy"] > 0.4 > log[0]["accuracy"] + 0.3 and log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["step"] == 50


def test_every_demonstration_is_told(tmp_path):
    _, log = train(tmp_path, 41)
    assert log[-1]["step"] == 6  # batches of 8


def test_a_demonstration_that_outgrows_the_context_is_cut(tmp_path):
    policy = random_model(context=150)
    assert max(len(ids) for ids, _ in demos_of(range(16))) > 151
    log = train_sft(policy, tokenizer(), games(), prior(), demos=16, updates=1, glanced=1, searched=5, lr=1e-3, batch=8, seed=0, state=tmp_path / "state", mistakes=0.2, obs_weight=0.3, max_steps=30)
    assert log[-1]["step"] == 3


def test_the_seed_names_the_training(tmp_path):
    runs = [train(tmp_path / str(i), 48, seed) for i, seed in enumerate((1, 1, 2))]
    weights = [torch.cat([p.detach().flatten() for p in policy.parameters()]) for policy, _ in runs]
    assert torch.equal(weights[0], weights[1]) and runs[0][1] == runs[1][1] and not torch.equal(weights[0], weights[2])


def test_a_glance_teaches_to_take_what_is_wanted_where_it_is_in_view_and_only_there():
    tok, takes, swapped = tokenizer(), 0, 0
    told = glances(games(), prior(), tok, range(60), demos=40, seed=0, mistakes=0.2, max_steps=30)
    tasks = {game.task for game in games()}
    for ids, weights in told:
        text = [tok.tokens[i] for i in ids]
        obs, act = text.index("<obs>"), text.index("<act>")
        task, view, action = ("".join(text[a:b]) for a, b in ((1, obs), (obs + 1, act), (act + 1, len(text) - 1)))
        wanted = parse_task(task).object
        assert list(ids).count(ACT) == list(ids).count(END) == 1 and not weights[:act + 1].any()
        taking = action.startswith("take ")
        assert taking == (f"a {wanted} " in view)
        assert weights[act + 1:].tolist() == ([1] * (len(ids) - act - 1) if taking else [1] + [0] * (len(ids) - act - 2))
        if taking:
            assert action.split(" from ")[0].removeprefix("take ") in view and action.split()[1] == wanted
        takes += taking
        swapped += task not in tasks
    assert takes > 10 and len(told) - takes > 10 and swapped > len(told) / 2


def test_noise_is_not_mended_by_glances():
    """Where a quarter of the demonstrator's actions are random, so is what glances teach: things taken that are not wanted, and the wanted left where it is."""
    tok, wrong = tokenizer(), {True: 0, False: 0}
    for ids, _ in glances(games(), prior(), tok, range(120), demos=40, seed=0, mistakes=0.0, max_steps=30, noise=0.25):
        text = "".join(tok.tokens[i] for i in ids)
        task, view, action = re.fullmatch(r"<task>(.*)<obs>(.*)<act>(.*)<end>", text, re.DOTALL).groups()
        taking = action.startswith("take ")
        wrong[taking] += taking != (f"a {parse_task(task).object} " in view)
    assert min(wrong.values()) > 0


def test_a_glance_is_named_by_its_number():
    told = lambda numbers: [ids.tolist() for ids, _ in glances(games(), prior(), tokenizer(), numbers, demos=9, seed=0, mistakes=0.1, max_steps=30)]
    apart = [ids for number in range(10) for ids in told([number])]
    assert apart == told(range(10)) and len(apart) > 10


def test_a_search_is_what_the_expert_does_who_looks_into_that_kind_of_place_first():
    """It reads along, in every telling: each action taught is its own, until it would take the thing; and the first place can be any."""
    tok, told, firsts, lengths = tokenizer(), searches(games(), tokenizer(), range(200), demos=40, seed=0), [], []
    for ids, weights in told:
        obs, act = int(np.argmax(ids == OBS)), int(np.argmax(ids == ACT))
        task, room, rest = (tok.decode(ids[a:b]) for a, b in ((1, obs), (obs + 1, act), (act, len(ids))))
        starts = np.flatnonzero(ids == ACT) + 1
        turns = [(tok.decode(ids[a:b]), tok.decode(ids[b + 1:c - 1])) for a, b, c in zip(starts, np.flatnonzero(ids == END), [*starts[1:], len(ids) + 1])]
        place = turns[0][0].removeprefix("go to ")
        expert = Expert({}, first=place.split()[0])
        expert.reset(task, room)
        rooms = names(room)
        taught = 0
        for (action, answer), a in zip(turns, starts):
            own = names(action)[0] != place
            assert set(weights[a:a + len(tok.action(action)) - 1].tolist()) == {float(own)} and (not own or expert.act() == action)
            expert.observe(action, answer)
            taught += own
        assert taught and not weights[:starts[0]].any() and weights.sum() == sum(len(tok.action(action)) for action, _ in turns if names(action)[0] != place)
        firsts.append(rooms.index(place))
        lengths.append(taught)
    assert len(told) > 100 and len(set(firsts)) > 10 and max(lengths) > 6


def test_a_search_is_named_by_its_number():
    told = lambda numbers: [ids.tolist() for ids, _ in searches(games(), tokenizer(), numbers, demos=9, seed=0)]
    apart = [ids for number in range(20) for ids in told([number])]
    assert apart == told(range(20)) and len(apart) > 5


@pytest.mark.parametrize("context", (2048, 150))
def test_demonstrations_are_stored_as_rollouts_with_the_mistakes_marked(context):
    stored = expert_trajectories(games(), prior(), tokenizer(), demos=30, seed=3, mistakes=0.3, max_steps=20, context=context)
    shorter = 0
    for number, (t, mask) in enumerate(stored):
        game, demo = demonstration(AlfworldEnv(20), games(), prior(), number, 3, 0.3)
        T = len(t)
        assert t.game == game.id and 0 < T <= len(demo.steps) and len(t.ids) == t.spans[-1, 1] <= context
        assert mask.tolist() == [step.trained for step in demo.steps[:T]]
        assert t.inadmissible.tolist() == [step.observation == "Nothing happens." for step in demo.steps[:T]]
        assert [tokenizer().decode(t.ids[a:b]).strip() for a, b in t.spans] == [step.action for step in demo.steps[:T]]
        assert t.won == (demo.won and T == len(demo.steps)) and t.truncated == (not t.won)
        shorter += T < len(demo.steps)
    assert not all(mask.all() for _, mask in stored) and (shorter > 0) == (context == 150)


def test_a_noisy_demonstrator_acts_at_random_and_is_believed():
    """At noise 1 all is random, in between a share; unlike mistakes it is taught, and always admissible."""
    env, differ = AlfworldEnv(30), {}
    for noise in (0.0, 0.5, 1.0):
        at_random, steps = 0, 0
        for number in range(15):
            game, demo = demonstration(env, games(), prior(), number, 0, 0.0, noise=noise)
            expert = Expert(prior())
            expert.reset(game.task, demo.observation)
            for action, observation, believed in demo.steps:
                at_random += action != expert.act()
                steps += 1
                assert believed and (observation != "Nothing happens." or not noise)
                expert.observe(action, observation)
        differ[noise] = at_random / steps
    assert differ[0.0] == 0 and 0.3 < differ[0.5] < 0.6 and differ[1.0] > 0.8


# --- strategies ------------------------------------------------------------------------------------------------------------------------

def test_a_demonstration_follows_the_strategy_it_is_told():
    env, rng = AlfworldEnv(30), np.random.default_rng(0)
    for number in range(20):
        game, plain = demonstration(env, games(), prior(), number, 0, 0.0)
        same, demo = demonstration(env, games(), prior(), number, 0, 0.0, rng)
        kind = re.search(r" Look at a (\w+) first\.$", demo.observation)[1]
        assert same is game and demo.observation == f"{plain.observation} Look at a {kind} first." and kind in receptacle_types(game)
        first = next(step.action for step in demo.steps if step.action.startswith("go to"))
        assert first.startswith(f"go to {kind} ")


def test_without_the_hint_a_rollout_reads_as_any_other():
    game = games()[0]
    begun = np.array(tokenizer().prompt(*split_intro(hinted(game.intro, "shelf"))), np.int32)
    t, = play(taught(), [(game, 3, begun)], temperature=0.7, max_steps=5)
    plain = without_hint(t, tokenizer())
    assert "Look at a shelf first." in tokenizer().decode(t.ids) and "Look at a" not in tokenizer().decode(plain.ids)
    assert tokenizer().decode(plain.ids) == tokenizer().decode(t.ids).replace(" Look at a shelf first.", "")
    assert plain.ids[:plain.spans[0, 0]].tolist() == list(tokenizer().prompt(*split_intro(game.intro)))
    assert [tokenizer().decode(plain.ids[s:e]) for s, e in plain.spans] == [tokenizer().decode(t.ids[s:e]) for s, e in t.spans]
    assert without_hint(plain, tokenizer()) is plain


def test_a_share_of_the_lessons_names_a_strategy():
    told = lambda steer: tellings(games(), prior(), tokenizer(), range(60), demos=30, seed=0, mistakes=0.1, obs_weight=0.3, max_steps=20, steer=steer)
    share = lambda lessons: np.mean(["Look at a" in tokenizer().decode(ids) for ids, _ in lessons])
    assert share(told(0.0)) == 0 and 0.3 < share(told(0.5)) < 0.7 and share(told(1.0)) == 1


def test_a_curve_is_not_trained_twice_nor_continued_with_other_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sft.games_for", lambda *_: (games()[:12], "twelve games"))
    monkeypatch.setattr("sft.split_dev", lambda some: (some, []))
    words = ["--out", tmp_path, "--glances", 0, "--max-steps", 1, "--episodes-per-game", 1, "--batch", 4]
    told = lambda *more: in_process(sft_main, [*words, *more], monkeypatch, capsys)
    first = told("--curve", "4,8", "--updates", "1")
    assert first.returncode == 0 and len(first.stdout.splitlines()) == 4
    trained = (tmp_path / "4/policy/model.safetensors").stat().st_mtime_ns
    assert told("--demos", "4", "--updates", "1").stdout.splitlines()[2] == first.stdout.splitlines()[2]
    assert (tmp_path / "4/policy/model.safetensors").stat().st_mtime_ns == trained
    assert_refused(told("--demos", "4", "--updates", "2"), "--updates 1 -> 2", "another --out")
    assert told("--demos", "6", "--updates", "1").returncode == 0  # adds to the curve
    assert [row["demos"] for row in json.loads((tmp_path / "curve.json").read_text())] == [4, 6, 8]
    monkeypatch.setattr("sft.games_for", lambda *_: (games()[:12], "twelve others"))
    assert_refused(told("--curve", "4,8", "--updates", "1"), "other games", "twelve others")
    for flag, value in (("--temperature", "-1"), ("--mistakes", "7"), ("--lr", "-1"), ("--seed", "-4"), ("--obs-weight", "nan"), ("--detours", "2"), ("--curve", "4,x"), ("--glances", "-1"), ("--searches", "-1")):
        assert_refused(told(flag, value), flag)


def test_in_a_sparser_room_the_expert_does_the_same():
    """It reads along: what is right is right still, and less is there."""
    shorter, taught = 0, 0
    for number in range(120):
        rng = np.random.default_rng(number)
        game, demo = demonstration(AlfworldEnv(30), games(), prior(), number, 0, 0.15)
        told = sparser(game, strayed(game, demo, rng), rng)
        as_it_was = strayed(game, demo, np.random.default_rng(number))
        assert [(step.action, step.trained) for step in told.steps] == [(step.action, step.trained) for step in as_it_was.steps]
        for less, all_of_it in zip((told.observation, *(step.observation for step in told.steps)), (demo.observation, *(step.observation for step in as_it_was.steps))):
            seen = names(all_of_it)
            assert set(names(less)) <= set(seen) and [name for name in seen if name in names(less)] == list(names(less))
            assert all(name in names(less) for name in seen if any(name in names(step.action) for step in demo.steps))
            assert all(name in names(less) for name in seen if name.startswith(parse_task(game.task).object + " "))
            assert re.sub("you see .*", "", less) == re.sub("you see .*", "", all_of_it) and (less == all_of_it or re.search(r"you see (nothing|(a \w+ \d+, )*(and )?a \w+ \d+)\.", less))
        shorter += len(names(told.observation)) < len(names(demo.observation))
        expert = Expert(prior(), np.random.default_rng(0))
        expert.reset(game.task, told.observation)
        for step in told.steps:
            taught += step.trained
            assert not step.trained or expert.act() == step.action
            expert.observe(step.action, step.observation)
    assert shorter > 80 and taught > 400


def test_a_share_of_the_rooms_is_told_sparser_another_each_time():
    whole, some, every = ([len(names(tokenizer().decode(ids[:int(np.argmax(ids == ACT))]))) for ids, _ in demos_of(range(120), demos=60, sparse=p)] for p in (0, 0.5, 1))
    share = lambda told: np.mean([a < b for a, b in zip(told, whole)])
    assert 0.2 < share(some) < 0.6 and share(every) > 0.7 and every[:60] != every[60:]
    assert some == [len(names(tokenizer().decode(ids[:int(np.argmax(ids == ACT))]))) for ids, _ in demos_of(range(120), demos=60, sparse=0.5)]
