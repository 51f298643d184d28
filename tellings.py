"""What an agent learns from demonstrations, as texts:
each told again and again with other numbers and names, in rooms with less in them, with mistakes and detours that are shown and not taught;
in glances, single turns in which nothing but looking helps; and in searches of their rooms, from place to place as listed."""

import re
from dataclasses import replace
from functools import lru_cache

import numpy as np

from common import generator
from detours import detour
from env import NOTHING_HAPPENS, AlfworldEnv
from expert import TOOLS, Demonstration, Expert, Step, base, demonstrate, names, parse_task
from rollout import MAX_ACTION, Trajectory
from tokenizer import ACT, END, OBS, TASK, split_intro


def demonstration_tokens(demo, tokenizer, obs_weight):
    """A Demonstration -> ids (L,) int64 and the weight of each token in the loss (L,) float32.

    Actions of the expert weigh 1, its mistakes 0 (they are shown, not taught), observations `obs_weight`, the prompt 0.
    """
    ids = list(tokenizer.prompt(*split_intro(demo.observation)))
    weights = [0.0] * len(ids)
    for i, (action, observation, trained) in enumerate(demo.steps):
        tokens = tokenizer.action(action)
        ids += tokens
        weights += [float(trained)] * len(tokens)
        if i + 1 < len(demo.steps):
            turn = tokenizer.turn(observation)
            ids += turn
            weights += [obs_weight] * len(turn)
    return np.array(ids), np.array(weights, np.float32)


def game_of(games, number, seed):
    """The game of demonstration `number`: in shuffled order, each once before any twice."""
    lap, place = divmod(number, len(games))
    return games[generator(seed, "demo order", lap).permutation(len(games))[place]]


def demonstration(env, games, prior, number, seed, mistakes, steer=None, noise=0.0):
    """Demonstration `number`, played by the expert. -> (Game, Demonstration)

    steer: a generator that picks a receptacle type for the expert to search first, which the task then tells (`hinted`). mistakes, noise:
    as in `demonstrate`.
    """
    game = game_of(games, number, seed)
    rng, first = generator(seed, "demo", number), steer and steer.choice(receptacle_types(game))
    demo = demonstrate(env, game, Expert(prior, rng, first=first), rng, mistakes=mistakes, max_steps=env.max_steps, noise=noise)
    return game, demo._replace(observation=hinted(demo.observation, first)) if first else demo


def strayed(game, demo, rng):
    """The same demonstration told with a detour before one of the places it goes to, if there is one. -> Demonstration"""
    ways = [k for k, step in enumerate(demo.steps) if step.trained and step.action.startswith("go to ")]
    taken = detour(game, [step.action for step in demo.steps], [step.observation for step in demo.steps], ways, rng)
    if taken is None:
        return demo
    k, walk = taken
    return demo._replace(steps=[*demo.steps[:k], *(Step(*turn, False) for turn in walk), *demo.steps[k:]])


LISTED = re.compile(r"you see (a \w+ \d+(?:, (?:and )?a \w+ \d+)*)\.")


def sparser(game, demo, rng):
    """The same demonstration in a room with less in it: of the places and things that neither its actions name nor the task is about,
    a share is left. -> Demonstration

    What is right stays right, as the expert would have passed over them. But a game is no longer known by its room, nor a place by where it stands
    in the list, so what to do is less easily learned by heart than by looking (LOG.md).
    """
    task, named, kept = parse_task(game.task), {name for step in demo.steps for name in names(step.action)}, rng.random()
    stays = lru_cache(None)(lambda name: name in named or base(name) in (task.object, task.place, TOOLS.get(task.kind)) or rng.random() < kept)

    def fewer(match):
        left = [f"a {name}" for name in names(match[1]) if stays(name)]
        return f"you see {', '.join([*left[:-1], ('and ' if left[1:] else '') + left[-1]]) if left else 'nothing'}."

    tell = lambda text: LISTED.sub(fewer, text)
    return demo._replace(observation=tell(demo.observation), steps=[step._replace(observation=tell(step.observation)) for step in demo.steps])


# --- steered exploration: a strategy in the prompt, learned here, asked for in rollouts, unknown to the PRM and in evaluation ----------

HINT = re.compile(r" Look at a \w+ first\.$")


def receptacle_types(game):
    """The kinds of receptacle that a game's first observation names, sorted."""
    return sorted({base(name) for name in names(split_intro(game.intro)[1])})


def hinted(intro, kind):
    """A game's first text with a strategy behind the task (P1, steered exploration)."""
    return f"{intro} Look at a {kind} first."


def without_hint(trajectory, tokenizer):
    """The same rollout as if it had not been steered."""
    ids = trajectory.ids
    end = int(np.argmax(ids == OBS))
    task = tokenizer.decode(ids[:end])
    if not HINT.search(task):
        return trajectory
    plain = np.array([TASK, *tokenizer.encode(HINT.sub("", task))], ids.dtype)
    return replace(trajectory, ids=np.concatenate([plain, ids[end:]]), spans=trajectory.spans + np.int32(len(plain) - end))


def expert_trajectories(games, prior, tokenizer, *, demos, seed, mistakes, max_steps, noise=0.0, context=2048):
    """The demonstrations as the rollouts of a policy would be stored, those that outgrow its context cut as there.

    -> [(Trajectory, taught (T,) bool: not a mistake)]
    """
    env, out = AlfworldEnv(max_steps), []
    for number in range(demos):
        game, demo = demonstration(env, games, prior, number, seed, mistakes, noise=noise)
        ids, _ = demonstration_tokens(demo, tokenizer, 0)
        spans = np.stack([np.nonzero(ids == ACT)[0] + 1, np.nonzero(ids == END)[0] + 1], axis=1)  # (T, 2)
        T = int((spans[:, 0] + MAX_ACTION <= context).sum())  # actions that fit
        cut, won = T < len(spans), demo.won and T == len(spans)
        taught, inadmissible = (np.array([f(step) for step in demo.steps[:T]])
                                for f in (lambda s: s.trained, lambda s: s.observation == NOTHING_HAPPENS))
        out.append((Trajectory(game.id, ids[:spans[T - 1, 1]].astype(np.int32), spans[:T].astype(np.int32), np.zeros(T, np.float32),
                               np.zeros(T, bool), inadmissible, float(won), won, cut or not demo.won, seed, number), taught))
    return out


def teller(games, tokenizer, exchange):
    """-> tell(ids, game id, rng, any_number): another telling of an episode of one of the games, the same story with other names.

    This is data augmentation, of every training text: instance numbers are permuted (`Tokenizer.renumber`), and in a share `exchange` of the
    tellings two names trade places throughout, that of the thing the task asks for and that of another which some game's task does ("put a mug in
    desk" becomes "put a vase in desk", mugs vases, and vases mugs). Without that, what few demonstrations ask for is seldom brought, and what none
    does never (LOG.md). Numbers do not change what is right; an exchange does a little, for then things are not where they use to be.
    """
    by_id = {game.id: game for game in games}
    wanted = {game.id: parse_task(game.task).object for game in games}
    things = sorted(set(wanted.values()))

    def tell(ids, game, rng, any_number=False):
        counts = by_id[game].counts
        if rng.random() < exchange:
            asked, known, there = wanted[game], tokenizer.instances, np.zeros(len(tokenizer), bool)
            there[ids] = True
            highest = lambda name: max(np.flatnonzero(there[known(name)]), default=-1) + 1  # number of it that is told of
            fit = [name for name in things if highest(asked) <= len(known(name)) and highest(name) <= len(known(asked))]
            other = fit[rng.integers(len(fit))]
            ids, counts = tokenizer.swap_names(ids, asked, other), {**counts, other: counts.get(asked, 0), asked: counts.get(other, 0)}
        return tokenizer.renumber(ids, counts, rng, any_number)

    return tell


def tellings(games, prior, tokenizer, numbers, *, demos, seed, mistakes, obs_weight, max_steps, exchange=0.0, detours=0.0, sparse=0.0, steer=0.0,
             noise=0.0):
    """The first `demos` demonstrations, told over and over, in another order and with other numbers each time. -> [(ids, weights)]

    exchange: as in `teller`. detours: the share of them told with a detour, another each time. sparse: the share of them told in a `sparser` room,
    another each time. steer: the share of them in which the expert follows a strategy that the prompt names; it plays each of these anew.
    """
    env, out, tell = AlfworldEnv(max_steps), [], teller(games, tokenizer, exchange)
    for number in numbers:
        time, place = divmod(number, demos)
        rng = generator(seed, "steer", number)
        demo = int(generator(seed, "telling", time).permutation(demos)[place])
        game, demo = demonstration(env, games, prior, demo, seed, mistakes, rng if rng.random() < steer else None, noise)
        around = generator(seed, "detour", number)
        if around.random() < detours:
            demo = strayed(game, demo, around)
        around = generator(seed, "sparse", number)
        if around.random() < sparse:
            demo = sparser(game, demo, around)
        ids, weights = demonstration_tokens(demo, tokenizer, obs_weight)
        out.append((tell(ids, game.id, generator(seed, "numbers", number)), weights))
    return out


GLANCES = 40  # demonstrations a batch of glances is taken from


def glances(games, prior, tokenizer, numbers, *, demos, seed, mistakes, max_steps, noise=0.0):
    """Single turns of the demonstrations, up to the first `take`: <task> … <obs> what is in view <act> take it, or look elsewhere.

    What is usual is no help here: the wanted thing's name is exchanged for that of another, and numbers are any. Of looking
    elsewhere only the verb is taught, for the way there depends on what a glance leaves out. -> [(ids, weights)]
    """
    env, out, tell = AlfworldEnv(max_steps), [], teller(games, tokenizer, 1.0)
    for number in numbers:
        rng = generator(seed, "glance", number)
        game, demo = demonstration(env, games, prior, int(rng.integers(demos)), seed, mistakes, noise=noise)
        task, _ = split_intro(demo.observation)
        asked = parse_task(task).object
        for before, step in zip(demo.steps, demo.steps[1:]):
            taking = step.action.startswith("take ")
            # noise is taught as it is
            if step.trained and "you see" in before.observation and (noise or taking == (f"a {asked} " in before.observation)):
                prompt, action = tokenizer.prompt(task, before.observation), tokenizer.action(step.action)
                ids = tell(np.array(prompt + action), game.id, rng, any_number=True)
                taught = len(action) if taking else 1
                out.append((ids, np.repeat(np.float32([0, 1, 0]), [len(prompt), taught, len(action) - taught])))
            if step.trained and taking:
                break
    return out


CHAIN = 7  # places of a search, at most


def searches(games, tokenizer, numbers, *, demos, seed):
    """Rooms of the demonstrations gone through as the demonstrator would who finds nothing:
    <task> … the room <act> go to a place <obs> … <act> go to the next of its kind as listed.

    In whole episodes this step is rare, and hardly learned (LOG.md): the policy then goes back to where it has been. Here it is all that is taught,
    of any kind of place, from any of its places on, in a `sparser` room with any numbers. No demonstration more is asked for: that the demonstrator
    goes through a kind as listed is taken for granted, and the world says what is there. The first place is shown and not taught; the search ends
    where it comes upon the wanted thing, or would be refused as it is there already. -> [(ids, weights)]
    """
    env, out, tell = AlfworldEnv(2 * CHAIN), [], teller(games, tokenizer, 1.0)
    for number in numbers:
        rng = generator(seed, "search", number)
        game = game_of(games, int(rng.integers(demos)), seed)
        task, view = split_intro(game.intro)
        rooms, wanted = names(view), parse_task(task).object
        starts = [i for i, (place, following) in enumerate(zip(rooms, rooms[1:])) if base(place) == base(following)]
        if not starts:
            continue
        first = starts[rng.integers(len(starts))]
        places = [place for place in rooms[first:first + CHAIN] if base(place) == base(rooms[first])]
        steps = []
        env.reset(game)
        for place in places:
            for verb in ("go to", "open"):
                if verb == "go to" or steps[-1].observation.endswith("is closed."):
                    steps.append(Step(f"{verb} {place}", env.step(f"{verb} {place}")[0], place != places[0]))
            refused = steps[-1].observation == NOTHING_HAPPENS  # it is there already, where the demonstrator would examine it
            if refused or f"a {wanted} " in steps[-1].observation:
                break
        steps = steps[:len(steps) - refused]
        if steps[-1].trained:
            demo = sparser(game, Demonstration(task, game.intro, steps, False), rng)
            ids, weights = demonstration_tokens(demo, tokenizer, 0)
            out.append((tell(ids, game.id, rng, any_number=True), weights))
    return out
