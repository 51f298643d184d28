"""Acting with a PRM: what scores candidates at one state, imagined futures, beams, whole episodes.

    rollout(policy, tokenizer, episodes, prm=prm, act=best_of_n(16))      # P1, Best-of-N
    rollout(policy, tokenizer, episodes, prm=prm, act=tilted(0.1))        # π(a|s) · exp(Q(s,a)/β)
    rollout(policy, tokenizer, episodes, act=look_ahead(prm, 16, 2))      # P1, model-predictive
    beam_search(policy, prm, tokenizer, episodes, keep=4, expand=4)       # P2, step-level beams
    best_episodes(trajectories, last_scores(prm, trajectories), 16)       # P2, whole episodes

The first three are `act` functions of rollout.py and take one action a turn to the world. Beam
search needs a world whose state can be restored, whole episodes one that can be played again.
None of them looks at rewards. Q = σ(f) is monotone in f, so f is compared; ties go to the first.
"""

import json
import math
from collections import deque
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from candidates import PrefixTree, draw, extend, score_states, tilt, tree_builder
from fast_alfworld import AlfworldEnv
from model import Cache
from rollout import MAX_ACTION, Row, begin, generate, sample, slots_for, step
from tokenizer import ACT, END, SPECIAL
from utils import UserError, key, pad, read_model, uniform

MAX_ANSWER = 128  # tokens of an imagined answer, its <act> included


def read_prm(folder, tokenizer, device="cpu", within_state=False):
    """Read a PRM to act with. UserError if it does not fit the policy or the use.

    within_state: it will compare actions of one state only. The score of a PRM trained by the
    relative loss (BT) is defined up to a constant per state, InversePRM's falls towards the end of
    an episode, and shaped labels are no values: these are refused for everything else.
    """
    prm, own = read_model(folder, device, "score")
    if own.tokens != tokenizer.tokens:
        raise UserError(f"{folder}: this PRM has another vocabulary than the policy")
    if not within_state and (why := relative(folder)):
        raise UserError(f"{folder}: a PRM trained with {why} compares actions of one state only; "
                        "use --best-of or --act-beta")
    return prm


def relative(folder):
    """Why the scores of a PRM in a run directory (RUN/iterI/prm) do not compare across states."""
    try:
        flags = json.loads((Path(folder).resolve().parents[1] / "config.json").read_text())["flags"]
        reasons = {"--prm-loss bt": flags.get("prm_loss") == "bt",
                   "--algo inverseprm": flags.get("algo") == "inverseprm",
                   "--ablation shaping": "shaping" in (flags.get("ablation") or "")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # not part of a run
    return next((reason for reason, holds in reasons.items() if holds), None)


# --- acting at one state -------------------------------------------------------------------------

def draws(log_pi, names, n):
    """n samples of π(·|s) at each state, (B, n); the first is the action that `sample` takes.

    log_pi (B, C), names (4, B): RNG keys.
    """
    u = [uniform(*names), *(uniform(*names, i) for i in range(1, n))]
    return torch.stack([draw(log_pi, x) for x in u], dim=1)


def best_of_n(n):
    """act: sample n actions, take the one of highest Q (P1). Duplicates change nothing."""
    def act(turn):
        drawn = draws(turn.log_pi, turn.names, n)
        best = turn.f.gather(1, drawn).argmax(1, keepdim=True)
        return drawn.gather(1, best)[:, 0]

    return act


def tilted(beta):
    """act: sample from π(a|s) · exp(Q(s,a)/β) / Z(s) (METHOD, equation 1); β = ∞ is the policy."""
    def act(turn):
        return draw(tilt(turn.log_pi, turn.f.sigmoid(), beta), uniform(*turn.names))

    return sample if beta == math.inf else act


# --- look-ahead ----------------------------------------------------------------------------------

def look_ahead(prm, n, depth, temperature=0.3):
    """act: Best-of-n by imagined futures of equal depth D (P1, model-predictive reasoning).

    A candidate's value is γ^D Q of what the policy imagines after it: D answers of the world and D
    actions. All candidates of a state share D, so γ^D is left out. Where the context has no room
    for D turns, as many as fit are imagined.
    """
    def act(turn):
        drawn = [list(dict.fromkeys(row)) for row in
                 draws(turn.log_pi, turn.names, n).tolist()]  # distinct, in the order drawn
        state = np.repeat(np.arange(len(drawn)), [len(row) for row in drawn])
        candidate = np.concatenate(drawn)
        paths = [turn.trees[b].ids[turn.trees[b].paths[c]] for b, c in zip(state, candidate)]
        used = np.array([len(ids) for ids in turn.histories])
        room = (turn.policy.config.max_len - used - MAX_ACTION) // (MAX_ANSWER + MAX_ACTION)
        depths = np.minimum(depth, room)[state]
        names = np.vstack([turn.names[:, state], candidate])
        futures = imagine(turn, turn.rows[state], paths, depths, temperature, names)
        trees = [PrefixTree([ids for b, ids in zip(state, futures) if b == own], tuple)
                 for own in range(len(drawn))]
        f = score_states(prm, turn.histories, [(b, len(ids), tree) for b, (ids, tree) in
                                               enumerate(zip(turn.histories, trees))])
        best = [row[int(values[:len(row)].argmax())] for row, values in zip(drawn, f)]
        return torch.tensor(best, device=turn.log_pi.device)

    return act


def imagine(turn, rows, actions, depths, temperature, names):
    """What may follow each of n actions according to the policy, by free generation.

    Action i (ids without <end>) stands behind cache row rows[i] of the turn. Then come, depths[i]
    times, an answer of the world (its most probable tokens) and an action (sampled). names (k, n):
    RNG keys. -> n lists of ids, without the last <end>

    A transcript ends with the action that wins, so the policy has not learned that an episode can
    end: it imagines on.
    """
    cache, lengths = copy(turn.cache), turn.lengths[rows]
    cache.take(rows)  # of the copy; the rollout's own rows stay as they are
    futures = [[*ids.tolist(), END] for ids in actions]
    pending = [list(ids) for ids in futures]  # what the cache lacks
    for d in range(depths.max(initial=0)):
        on = np.nonzero(depths > d)[0]
        keys = np.vstack([names[:, on], np.full(len(on), d)])
        for last, most, t in ((ACT, MAX_ANSWER, 0), (END, MAX_ACTION, temperature)):
            tokens = [ids if depth > d else [] for ids, depth in zip(pending, depths)]
            h = turn.policy.extend(cache, lengths, tokens)
            ends = np.cumsum([len(ids) for ids in tokens])[on] - 1
            lengths[on] += [len(tokens[i]) for i in on]
            said, _ = generate(turn.policy, cache, on, lengths, h[ends], t, keys, last, most)
            for i, ids in zip(on, said):
                futures[i] += [*ids, last]
                pending[i] = [last]
                lengths[i] += len(ids)
    return [ids[:-1] for ids in futures]


@torch.no_grad()
def prediction_accuracy(policy, trajectories, batch=64):
    """How well the policy predicts the world's answers to the actions taken.

    The most probable answer is the real one exactly if each of its tokens is the most probable
    after the real ones before it, so one pass over a trajectory suffices. -> {"answers": their
    number, "exact": share predicted in whole, "tokens": share of tokens}; None without answers.
    """
    special, right = [i for i in range(len(SPECIAL)) if i != ACT], []
    for low in range(0, len(trajectories), batch):
        part = trajectories[low:low + batch]
        for t, h in zip(part, hidden_states(policy, part)):
            logits = policy.logits(h[:len(t.ids) - 1])
            logits[:, special] = -torch.inf
            hit = logits.argmax(-1).cpu().numpy() == t.ids[1:]  # hit[i]: token i + 1
            right += [hit[end - 1:start - 1] for end, start in zip(t.spans[:-1, 1], t.spans[1:, 0])]
    if not right:
        return {"answers": 0, "exact": None, "tokens": None}
    exact = np.mean([r.all() and len(r) <= MAX_ANSWER for r in right])
    return {"answers": len(right), "exact": float(exact),
            "tokens": float(np.concatenate(right).mean())}


def hidden_states(model, trajectories):
    """(B, longest, D) of whole trajectories."""
    lengths = torch.tensor([len(t.ids) for t in trajectories])
    return model.ragged(pad([t.ids for t in trajectories]).to(model.device), lengths)


# --- whole episodes ------------------------------------------------------------------------------

@torch.no_grad()
def last_scores(prm, trajectories, batch=64):
    """f of the last action of each episode. -> (n,) array"""
    f = []
    for low in range(0, len(trajectories), batch):
        part = trajectories[low:low + batch]
        f += [float(prm.scores(h[len(t.ids) - 1]))
              for t, h in zip(part, hidden_states(prm, part))]
    return np.array(f)


def best_episodes(trajectories, f, n):
    """Best-of-n over whole episodes (P2): of episodes 0 … n−1, n … 2n−1, … of each game, the one
    whose last action has the highest Q; an episode cut by the step cap competes like any other.

    f: `last_scores`. -> list of Trajectory
    """
    best = {}
    order = sorted(range(len(trajectories)),
                   key=lambda i: (trajectories[i].game, trajectories[i].episode))
    for i in order:
        group = trajectories[i].game, trajectories[i].episode // n
        if group not in best or f[i] > f[best[group]]:
            best[group] = i
    return [trajectories[i] for i in best.values()]


# --- beams ---------------------------------------------------------------------------------------

@dataclass
class Beam(Row):
    """One of the histories that a search keeps."""
    world: tuple = ()  # a snapshot of its world
    f: float = 0.0  # of its last action
    parent: int = 0  # the row of both caches that holds its first `fed` tokens
    fed: int = 0

    def child(self, parent, f):
        """A copy, to be extended by one action."""
        own = {name: list(getattr(self, name))
               for name in ("ids", "spans", "choice", "counts", "logp")}
        return replace(self, **own, f=f, parent=parent, fed=len(self.ids))


@dataclass
class Search:
    """The search for one episode."""
    live: list  # of Beam, best first
    ended: list = field(default_factory=list)  # (ended by itself, f of last action, Trajectory)
    tried: int = 0  # actions taken in the world


@torch.no_grad()
def beam_search(policy, prm, tokenizer, episodes, keep, expand, *, temperature=0.3, max_steps=30,
                seed=0, slots=None):
    """Step-level beam search, keep × expand (Snell et al. 2024, section 5.2; P2).

    Each of `keep` histories samples `expand` candidates (the first step keep · expand), duplicates
    are dropped, and the `keep` of highest Q are taken to the world, each from its own state. A
    history that the world ended leaves the beam. The search stops when no history in the beam has
    a higher Q than the best of those, or when the beam is empty. It returns the one of highest Q
    that the world ended; without any, of those that were cut.
    slots: searches at once. Yields (Trajectory, actions taken in the world) for each Episode.
    """
    env, tree_of, context = AlfworldEnv(max_steps), tree_builder(tokenizer), policy.config.max_len
    waiting, searches = deque(episodes), []
    slots = slots or max(1, slots_for(policy) // keep)
    caches = [Cache(model.config, 1, model.device) for model in (policy, prm)]
    while waiting or searches:
        while waiting and len(searches) < slots:
            row = begin(env, tokenizer, waiting.popleft(), context)
            searches.append(Search([Beam(**vars(row), world=env.snapshot())]))
        beams = [beam for search in searches for beam in search.live]  # cache row by row
        for cache in caches:
            cache.take([beam.parent for beam in beams])
        starts, chains = np.array([beam.fed for beam in beams]), [b.ids[b.fed:] for b in beams]
        trees = [tree_of(beam.commands) for beam in beams]
        log_pi = extend(policy, caches[0], starts, chains, trees, temperature)
        f = extend(prm, caches[1], starts, chains, trees).tolist()
        counts = [expand if beam.spans else keep * expand for beam in beams]
        # The best beam's random numbers are those of Best-of-N, the others' those of later steps.
        names = np.array([(seed, key(beam.episode.game.id), beam.episode.number,
                           len(beam.spans) + rank * max_steps)
                          for search in searches for rank, beam in enumerate(search.live)]).T
        drawn = [dict.fromkeys(row[:count]) for row, count in
                 zip(draws(log_pi, names, max(counts)).tolist(), counts)]
        first = 0
        for search in searches:
            own = range(first, first + len(search.live))
            first, search.live = own.stop, []
            options = [(f[j][c], j, c) for j in own for c in drawn[j]]
            for value, j, c in sorted(options, key=lambda o: -o[0])[:keep]:
                beam, ids = beams[j].child(j, value), trees[j].ids[trees[j].paths[c]].tolist()
                env.restore(beam.world)
                trajectory = step(beam, tokenizer, context, seed, trees[j].commands[c], ids, c,
                                  float(log_pi[j, c]))
                search.tried += 1
                if trajectory:
                    search.ended.append((not trajectory.truncated, value, trajectory))
                else:
                    beam.world = env.snapshot()
                    search.live.append(beam)
            if not search.live or any(ended and value >= search.live[0].f
                                      for ended, value, _ in search.ended):
                yield max(search.ended, key=lambda e: e[:2])[2], search.tried
                search.live = []
        searches = [search for search in searches if search.live]
