"""Before its lessons, the PRM is taught to check an action against the text before it; and afterwards it is asked whether it does.

Returns are too noisy a teacher for that: most of a return is decided by the state, whichever action is taken (LOG.md). So it first sees the
demonstrations of π_0, and beside each action a `wrong` one, and learns to hold the first for better. Nothing else is read; only the weights below the
head are kept, and the lessons start from them.

InversePRM goes on checking during its lessons: to tell the expert from the learner it need not rank the actions of one state, and forgets how.
"""

import numpy as np

from common import generator, key
from env import AlfworldEnv
from expert import fit_prior
from optim import optimise
from prm import bt_loss, pair_gaps, scores_at, share_right
from ranks import mine, summed
from tellings import expert_trajectories
from tokenizer import ACT, END
from tree import Tree, distinct, propose


def wrong(action, text, tokenizer, rng):
    """Another action that is most likely a mistake, or None: one that stands in the text already, or this one with one of its names
    exchanged, for another of the text or for the same with another number.

    action (n,) ids and text (L,) ids of what came before, up to its <act>. -> (m,) ids
    """
    kind = rng.integers(3)
    if kind == 0:
        starts, ends = np.nonzero(text == ACT)[0][:-1] + 1, np.nonzero(text == END)[0] + 1
        pool = [text[start:end] for start, end in zip(starts, ends) if not np.array_equal(text[start:end], action)]
        return pool[rng.integers(len(pool))] if pool else None
    is_name = lambda token: int(token) in tokenizer.base_of
    places = [k for k, token in enumerate(action) if is_name(token)]
    if not places:
        return None
    k = places[rng.integers(len(places))]
    pool = tokenizer.instances(tokenizer.base_of[int(action[k])]) if kind == 1 else filter(is_name, text)
    pool = [token for token in pool if token != action[k]]
    if not pool:
        return None
    other = action.copy()
    other[k] = pool[rng.integers(len(pool))]
    return other


def check_loss(prm, tokenizer, demonstrations, tell, batch, rng):
    """f higher behind an action of a demonstration than behind a wrong one, by `bt_loss`. -> scalar or None, {metric: (sum, count)}

    Of `batch` of the demonstrations [(Trajectory, taught (T,))] that rng draws, told by `tell` (`tellings.teller`) with any numbers,
    all actions but mistakes.
    """
    texts, pairs = [], []  # of each demonstration: ids; [(start, end of the action, ids of a wrong one)]
    for i in rng.choice(len(demonstrations), batch, replace=len(demonstrations) < batch):
        t, taught = demonstrations[i]
        ids = tell(t.ids.astype(np.int64), t.game, rng, any_number=True)
        others = [(start, end, wrong(ids[start:end], ids[:start], tokenizer, rng)) for start, end in t.spans[taught]]
        texts.append(ids), pairs.append([one for one in others if one[2] is not None])
    total = sum(map(len, pairs))
    texts, pairs = mine(texts), mine(pairs)
    if not any(pairs):
        return None, {"loss": summed(0.0)} if total else {}
    branches = [(b, int(start), other.tolist(), False) for b, some in enumerate(pairs) for start, _, other in some]
    tree = Tree(texts, branches, prm.cos.device, whole=range(len(texts)))
    h = tree.hidden(prm)  # (B, S, D)
    ends = [np.array([end - 1 for _, end, _ in some], np.int64) for some in pairs]
    f_better, f_worse = scores_at(prm, h, ends), prm.scores(h[tree.branch_row, tree.branch_end])
    loss = bt_loss(f_better, f_worse).sum() / total
    return loss, {"loss": summed(loss.detach()), "accuracy": ((f_better > f_worse).sum(), len(branches))}


def train_checks(prm, tokenizer, demonstrations, tell, *, updates, lr, batch, seed, state, name="checks"):
    """Teach f of `prm` to check, by `check_loss`. -> log"""
    loss_of = lambda step: check_loss(prm, tokenizer, demonstrations, tell, batch, generator(seed, "check", step))
    return optimise(prm, loss_of, updates, lr, state, name)


# --- the report card: does it hold an expert's action for better? ---------------------------------------------------------

ASKED = 4  # proposals at a state, whatever --proposals: runs are to be compared


def against_chance(trajectory, tokenizer, game, rng):
    """At each state of an expert's episode its action against another admissible one, as pairs of `qestimate.preference_pairs`."""
    env, pairs = AlfworldEnv(), []
    _, info = env.reset(game)
    for k, action in enumerate(tokenizer.actions(trajectory.ids)):
        others = [command for command in info["admissible_commands"] if command != action]
        pairs.append((k, np.array(tokenizer.action(others[rng.integers(len(others))]))))
        info = env.step(action)[-1]
    return pairs


def against_policy(trajectory, tokenizer, policy, proposals, seed):
    """The same against what else a policy proposes there, where it reads otherwise."""
    states = [(0, int(start)) for start in trajectory.spans[:, 0]]
    drawn = propose(policy, [trajectory.ids.astype(np.int64)], states, proposals, 1.0, (seed, key(trajectory.game), np.arange(len(states))))
    return [(k, np.array(action)) for k, (some, own) in enumerate(zip(drawn, tokenizer.actions(trajectory.ids)))
            for action, _ in distinct(some, tokenizer) if tokenizer.command(action) != own]


def expert_preferred(prm, policy, tokenizer, train, dev, *, seed, max_steps, context):
    """How often the PRM holds an expert's action for better than another, on dev games: an admissible one drawn by chance;
    one that `policy`, π_{i−1}, proposes.

    `by_gap`: the latter of pairs whose scores are further apart than that, and how many they are: about what --min-gap leaves to stage 3.
    """
    rng, game_of = generator(seed, "against chance"), {game.id: game for game in dev}
    episodes = [t for t, _ in expert_trajectories(dev, fit_prior(train), tokenizer, demos=min(300, len(dev)), seed=seed, mistakes=0.0,
                                                  max_steps=max_steps, context=context)]
    chance = pair_gaps(prm, episodes, [against_chance(t, tokenizer, game_of[t.game], rng) for t in episodes])
    gaps = pair_gaps(prm, episodes, [against_policy(t, tokenizer, policy, ASKED, seed) for t in episodes])
    far = {least: gaps[abs(gaps) > least] for least in (0.02, 0.05, 0.1, 0.2)}
    return {"to_chance": share_right(chance), "to_policy": share_right(gaps),
            "by_gap": {least: (share_right(some), len(some)) for least, some in far.items()}}
