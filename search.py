"""Acting with a PRM. What compares: actions at one state, imagined futures, histories kept side by side, whole episodes.

    rollout(policy, tokenizer, episodes, choose=best_of_n(prm, 16))            # Best-of-N: the world moves once for each choice
    rollout(policy, tokenizer, episodes, choose=best_of_n(prm, 16, depth=2))   # by what the policy imagines to come of each
    beam_search(policy, prm, tokenizer, episodes, keep=4, expand=4)            # in a world that can be set back
    best_episodes(trajectories, last_scores(prm, trajectories), 16)            # in a world that can be played again

None of them looks at rewards or at `won`; beam search does put an episode that ended by itself before others. All compare f, which ranks as Q = σ(f)
does; ties go to the first.
"""

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from common import UserError, pad, read_model
from env import AlfworldEnv
from flags import origin
from model import Cache
from prm import answer_tokens, score
from rollout import MAX_ACTION, Row, act, action_logprobs, begin, branch, copied_rows, feed, sample_actions, slots_for
from tokenizer import ACT, END
from tree import Tree, distinct

MAX_ANSWER = 64  # tokens of an imagined answer, <act> included; the longest seen in 28,000 had 56


def read_prm(folder, tokenizer, device, one_state=False):
    """A PRM to act with. UserError if its vocabulary is not the policy's, or if it cannot compare what is to be compared.

    Best-of-N over actions compares at `one_state`; everything else here compares Q of different states, for which f must mean the
    same everywhere. A PRM trained on preferences between actions of one state (`--prm-loss bt`) has a constant of its own at every
    state, that of InversePRM falls as an episode nears its end, and the labels of --shape-with are no values: they are refused.
    """
    prm, words = read_model(folder, device, "score")
    if prm.config.head == "relative" and not one_state:
        raise UserError(f"{folder} was trained to compare actions of one state (--prm-loss bt, --algo inverseprm): it is for --best-of alone")
    if origin(folder)[0].get("shape_with") and not one_state:
        raise UserError(f"{folder} was trained on shaped labels (--shape-with), which are no values: it is for --best-of alone")
    if words.tokens != tokenizer.tokens:
        raise UserError(f"{folder} has another vocabulary than the policy")
    return prm


# --- one action at a time ----------------------------------------------------------------------------------------------

def best_of_n(prm, n, depth=0):
    """Sample n actions, drop duplicates by text, take the one of highest Q (P1, section 2.4): a chooser for `rollout`.

    With a depth D, candidates are compared by γ^D Q of what the policy imagines after them, D answers of the world and D more
    actions (P1, model-predictive reasoning). All of one state are imagined to the same depth, so γ^D changes nothing and is left
    out. Where D turns might not fit the context, it is as many as do.
    """

    def choose(policy, tokenizer, cache, rows, lengths, h, names, temperature, histories):
        drawn = branch(policy, cache, rows, lengths[rows], h, n, names, temperature)
        drawn = [distinct(state, tokenizer) for state in drawn]
        branches = [(j, len(histories[j]), action, forced) for j, state in enumerate(drawn) for action, _, forced in state]
        if depth:
            state = np.array([j for j, *_ in branches])
            number = np.concatenate([np.arange(len(some)) for some in drawn])
            room = (policy.config.max_len - lengths[rows][state] - MAX_ACTION) // (MAX_ANSWER + MAX_ACTION)
            futures = imagine(policy, cache, rows[state], lengths[rows][state], [action for _, _, action, _ in branches],
                              np.vstack([names[:, state], number]), temperature, np.minimum(depth, room))
            branches = [(j, start, action + future, False) for (j, start, action, _), future in zip(branches, futures)]
        q = Tree(histories, branches, policy.cos.device).scores(prm).cpu().numpy()  # at the last <end> of each
        ends = np.cumsum([len(state) for state in drawn])
        best = [state[int(part.argmax())] for state, part in zip(drawn, np.split(q, ends[:-1]))]
        return tuple(map(list, zip(*best)))

    return choose


def imagine(policy, cache, owner, lengths, actions, names, temperature, depth):
    """What might follow each of B actions, by the policy alone: an answer of the world, an action, `depth` (B,) times.

    Action b stands behind the first lengths[b] places of cache row owner[b], which stays as it is. Answers are the most probable
    tokens, one after the other, actions are sampled; names (k, B) as in `sample_actions`. -> B lists of ids, to the last <end>

    The transcript ends with the action that wins, so the policy has not learned that an episode can end: it imagines on.
    """
    futures, going = [[] for _ in actions], np.arange(len(actions))
    cache, lengths, said = copied_rows(policy, cache, owner, int(lengths.max())), lengths.copy(), actions
    for turn in range(depth.max(initial=0)):
        on = np.nonzero(depth[going] > turn)[0]
        going, cache, lengths, said = going[on], cache.take(on), lengths[on], [said[i] for i in on]
        rows, named = np.arange(len(on)), np.vstack([names[:, going], np.full(len(on), turn)])
        h = feed(policy, cache, rows, lengths, said)  # (B, D)
        answers, _, _ = sample_actions(policy, cache, lengths, h, named, 0, last=ACT, most=MAX_ANSWER)
        h = feed(policy, cache, rows, lengths, [[ACT]] * len(on))
        actions, _, _ = sample_actions(policy, cache, lengths, h, named, temperature)
        for b, answer, action in zip(going, answers, actions):
            futures[b] += answer + action
        said = [[END]] * len(on)  # what the cache still lacks
    return futures


@torch.no_grad()
def prediction_accuracy(policy, trajectories, batch=64):
    """How well does the policy know the world? Its answers as `imagine` has them, against the real ones to the actions taken.

    The most probable answer is the real one exactly if each token of it is the most probable after the real ones before, so one
    pass over a trajectory tells. -> {"answers": how many, "exact": share that is right to the last token, "tokens": share of tokens
    that are right, given the ones before}; the shares are None where there are no answers.
    """
    right, lengths = [], []
    for start in range(0, len(trajectories), batch):
        part = trajectories[start:start + batch]
        ids, spans = pad([t.ids for t in part]).to(policy.cos.device), [t.spans for t in part]
        row, place = answer_tokens(spans, ids.device)
        guess = action_logprobs(policy.logits(policy(ids)[row, place - 1]), 1, last=ACT).argmax(-1)
        right.append((guess == ids[row, place]).cpu().numpy())
        lengths += [s[1:, 0] - s[:-1, 1] for s in spans]
    right, lengths = np.concatenate(right), np.concatenate(lengths)
    if not len(lengths):
        return {"answers": 0, "exact": None, "tokens": None}
    exact = np.logical_and.reduceat(right, lengths.cumsum() - lengths) & (lengths <= MAX_ANSWER)
    return {"answers": len(lengths), "exact": float(exact.mean()), "tokens": float(right.mean())}


# --- whole episodes ----------------------------------------------------------------------------------------------------

def last_scores(prm, trajectories):
    """f of the last action of each episode, (n,)."""
    return np.array([f[-1] for f in score(prm, trajectories)])


def best_episodes(trajectories, q, n):
    """Best-of-N over whole episodes (P2): of every n of a game, numbers 0 … n−1, n … 2n−1, …, the one of highest q.

    q: `last_scores`. An episode cut by the step cap stands there with the Q of its last action, as any other. -> those trajectories
    """
    best = {}
    for i in sorted(range(len(trajectories)), key=lambda i: (trajectories[i].game, trajectories[i].episode)):
        group = trajectories[i].game, trajectories[i].episode // n
        if group not in best or q[i] > q[best[group]]:
            best[group] = i
    return [trajectories[i] for i in best.values()]


# --- beams -------------------------------------------------------------------------------------------------------------

@dataclass
class Beam(Row):
    """One of the histories that a search keeps."""
    world: tuple = ()  # a snapshot: the world as it stands there
    q: float = 0.0  # of the last action
    parent: int = 0  # the row of both caches that holds its first `fed` tokens
    fed: int = 0


@dataclass
class Search:
    """The search for one episode."""
    live: list  # of Beam, best first
    ended: list = field(default_factory=list)  # (ended by itself, q of the last action, Trajectory)
    tried: int = 0  # actions taken to the world


@torch.no_grad()
def beam_search(policy, prm, tokenizer, episodes, keep, expand, *, temperature=0.3, seed=0, slots=None, max_steps=30, make_env=AlfworldEnv):
    """Yield (Trajectory, actions tried in the world) for each (game, episode number), in the order in which they are found.

    Step-level beam search, keep × expand (Snell et al. 2024, section 5.2; P2): each of `keep` histories samples `expand` actions (the
    first step samples all keep × expand from the prompt), duplicates by text are dropped, the `keep` of highest Q are taken to
    the world, each from where it was. This needs a world that can be set back, unlike Best-of-N over actions.

    A history that the world ended by itself leaves the beam. The search stops when no history still in it has a higher Q than the best of
    those, or when none is left, and returns the one of highest Q that ended by itself; without any, of those cut by a cap.
    slots: searches in flight (default: by `slots_for`).
    """
    waiting, env, searches, context = deque(episodes), make_env(max_steps), [], policy.config.max_len
    slots = slots or slots_for(policy, keep * expand)
    cache, prm_cache = (Cache(model.config, 1, 0, model.cos.device) for model in (policy, prm))
    while waiting or searches:
        while waiting and len(searches) < slots:
            beam = begin(Beam, env, tokenizer, context, *waiting.popleft())
            beam.world = env.snapshot()
            searches.append(Search([beam]))
        beams = [beam for search in searches for beam in search.live]  # row by row of the caches
        parents, rows, lengths = (np.array(x) for x in ([beam.parent for beam in beams], range(len(beams)), [beam.fed for beam in beams]))
        cache, prm_cache = cache.take(parents), prm_cache.take(parents)
        news = [beam.ids[beam.fed:] for beam in beams]
        feed(prm, prm_cache, rows, lengths.copy(), news)
        h = feed(policy, cache, rows, lengths, news)  # (B, D)
        candidates = next_actions(policy, tokenizer, cache, lengths, h, searches, keep, expand, temperature, seed, max_steps)
        owner = np.array([j for j, *_ in candidates])
        fresh = copied_rows(prm, prm_cache, owner, int(lengths.max()))
        q = prm.scores(feed(prm, fresh, np.arange(len(owner)), lengths[owner], [action for _, action, *_ in candidates])).cpu().numpy()
        of = np.repeat(np.arange(len(searches)), [len(search.live) for search in searches])[owner]  # the search of each candidate
        for s, search in enumerate(searches):
            mine, search.live = np.nonzero(of == s)[0], []
            for c in mine[np.argsort(-q[mine], kind="stable")][:keep]:
                j, action, logp, forced = candidates[c]
                beam = replace(beams[j], **{name: list(getattr(beams[j], name)) for name in ("ids", "spans", "logp", "forced", "inadmissible")},
                               q=float(q[c]), parent=j, fed=lengths[j])
                beam.ids += action[:-1] if forced else action
                beam.action_logp = logp
                env.restore(beam.world)
                trajectory = act(beam, tokenizer, context, seed)
                search.tried += 1
                if trajectory is not None:
                    search.ended.append((not trajectory.truncated, beam.q, trajectory))
                else:
                    beam.world = env.snapshot()
                    search.live.append(beam)
            if not search.live or any(by_itself and value >= search.live[0].q for by_itself, value, _ in search.ended):
                yield max(search.ended, key=lambda e: e[:2])[2], search.tried
                search.live = []
        searches = [search for search in searches if search.live]


def next_actions(policy, tokenizer, cache, lengths, h, searches, keep, expand, temperature, seed, max_steps):
    """Sample actions for every live history; cache row j, lengths[j] and h[j] are those of the j-th. -> [(j, ids, log-probability, forced)]

    No two candidates of a search are the same history: none of one beam read the same, and no two beams do.
    """
    beams = [(beam, rank) for search in searches for rank, beam in enumerate(search.live)]
    states = [(j, rank) for j, (beam, first) in enumerate(beams) for rank in ([first] if beam.spans else range(keep))]
    # the best beam's random numbers are those of Best-of-N at that step, the others' those of steps that no episode reaches
    names = np.array([(seed, beams[j][0].key, beams[j][0].episode, len(beams[j][0].spans) + rank * max_steps) for j, rank in states]).T
    owner, drawn = np.array([j for j, _ in states]), [[] for _ in beams]
    for j, some in zip(owner, branch(policy, cache, owner, lengths[owner], h[owner], expand, names, temperature)):
        drawn[j] += some
    return [(j, *action) for j, some in enumerate(drawn) for action in distinct(some, tokenizer)]
