"""Acting with a PRM: it scores candidates of one state, imagined futures, beams, whole episodes.

    rollout(policy, tokenizer, episodes, prm=prm, act=best_of_n(16))  # P1, Best-of-N
    rollout(policy, tokenizer, episodes, prm=prm, act=tilted(0.1))    # π(a|s) · exp(Q(s,a)/β)
    rollout(policy, tokenizer, episodes, act=look_ahead(prm, 16, 2))  # P1, model-predictive
    beam_search(policy, prm, tokenizer, episodes, keep=4, expand=4)   # P2, step-level beams
    best_episodes(prm, trajectories, 16)                              # P2, whole episodes

None of them looks at rewards. Q = σ(f), so f is compared; ties go to the first."""

from collections import deque
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from candidates import PrefixTree, draw, extend, prefix_tree, score_states, tilt
from fast_alfworld import AlfworldEnv
from fast_alfworld.cli import UserError
from model import Cache
from prm import score
from rollout import MAX_ACTION, Row, begin, generate, sample, slots_for, step
from tokenizer import ACT, END
from utils import key, read_model, run_config, uniform

MAX_ANSWER = 96  # tokens of an imagined answer, <act> included; of 4,000 real ones the longest: 77


def read_prm(folder, tokenizer, device="cpu", within_state=False):
    """Read a PRM to act with; its `bounded`: is Q = σ(f)? UserError if it does not fit.

    within_state: it will compare actions of one state only. A PRM trained by BT, InversePRM or on
    shaped labels is refused for anything else: its f is no value, and differs by state."""
    prm, own = read_model(folder, device, "score")
    if own.tokens != tokenizer.tokens:
        raise UserError(f"{folder}: this PRM has another vocabulary than the policy")
    flags = run_config(folder).get("flags", {})
    relative = (flags.get("prm_loss") == "bt" or flags.get("algo") == "inverseprm"
                or "shaping" in str(flags.get("ablation")))
    if relative and not within_state:
        raise UserError(f"{folder}: a PRM trained by BT, InversePRM or on shaped labels compares "
                        "actions of one state only; use --best-of or --act-beta")
    prm.bounded = not relative
    return prm


def draws(log_pi, names, n):
    """n samples a state, log_pi (B, C), names (4, B) -> (B, n). The first is that of `sample`."""
    u = [uniform(*names), *(uniform(*names, i) for i in range(1, n))]
    return torch.stack([draw(log_pi, x) for x in u], dim=1)


def best_of_n(n):
    """act: sample n actions, take the one of highest Q (P1). Duplicates change nothing."""
    def act(turn):
        drawn = draws(turn.log_pi, turn.names, n)
        best = turn.f.gather(1, drawn).argmax(1, keepdim=True)
        return drawn.gather(1, best)[:, 0]

    return act


def tilted(beta, bounded=True):
    """act: sample from π(a|s)·exp(Q(s,a)/β)/Z(s), as dpo.py; β = ∞ is the policy. Q = σ(f), or f
    itself where it is known up to a constant per state only."""
    def act(turn):
        q = turn.f.sigmoid() if bounded else turn.f
        return draw(tilt(turn.log_pi, q, beta), uniform(*turn.names))

    return sample if beta == np.inf else act


def look_ahead(prm, n, depth, temperature=0.3):
    """act: Best-of-n by imagined futures of equal depth D (P1, model-predictive reasoning).

    A candidate's value is γ^D Q of what the policy imagines after it: D answers of the world and D
    actions, fewer where the context has no room. All of a state share D, so γ^D is left out."""
    def act(turn):
        drawn = [list(dict.fromkeys(row)) for row in draws(turn.log_pi, turn.names, n).tolist()]
        state, candidate = np.array([(b, c) for b, row in enumerate(drawn) for c in row]).T
        actions = [turn.trees[b].ids[turn.trees[b].paths[c]] for b, c in zip(state, candidate)]
        room = turn.policy.config.max_len - turn.lengths[turn.rows] - MAX_ACTION
        depths = np.minimum(depth, room // (MAX_ANSWER + MAX_ACTION))[state]
        keys = np.vstack([turn.names[:, state], candidate])
        futures = iter(imagine(turn, turn.rows[state], actions, depths, temperature, keys))
        trees = [PrefixTree([next(futures) for _ in row], tuple) for row in drawn]
        f = score_states(prm, turn.histories, [(b, len(turn.histories[b]), tree)
                                               for b, tree in enumerate(trees)])
        best = [row[int(values[:len(row)].argmax())] for row, values in zip(drawn, f)]
        return torch.tensor(best, device=turn.log_pi.device)

    return act


def imagine(turn, rows, actions, depths, temperature, keys):
    """What may follow each of n actions according to the policy's own language model.

    Action i (ids without <end>) stands behind cache row rows[i] of the turn. Then come, depths[i]
    times, an answer of the world (its most probable tokens) and an action (sampled by keys (k, n));
    also after a win, as transcripts end there. -> n lists of ids, without the last <end>"""
    cache, lengths = copy(turn.cache), turn.lengths[rows]
    cache.take(rows)  # of the copy; the rollout's own rows stay as they are
    futures = [[*ids.tolist(), END] for ids in actions]
    pending = [list(ids) for ids in futures]  # what the cache lacks
    for d in range(depths.max(initial=0)):
        on = np.nonzero(depths > d)[0]
        named = np.vstack([keys[:, on], np.full(len(on), d)])
        for last, most, t in ((ACT, MAX_ANSWER, 0), (END, MAX_ACTION, temperature)):
            tokens = [ids if depth > d else [] for ids, depth in zip(pending, depths)]
            h = turn.policy.extend(cache, lengths, tokens)
            ends = np.cumsum([len(ids) for ids in tokens])[on] - 1
            lengths[on] += [len(tokens[i]) for i in on]
            said, _ = generate(turn.policy, cache, on, lengths, h[ends], t, named, last, most)
            for i, ids in zip(on, said):
                futures[i] += [*ids, last]
                pending[i] = [last]
                lengths[i] += len(ids)
    return [ids[:-1] for ids in futures]


def best_episodes(prm, trajectories, n):
    """Best-of-n over whole episodes (P2): of episodes 0 … n−1, n … 2n−1, … of each game, the one
    whose last action has the highest Q. -> list of Trajectory"""
    groups = {}
    scored = zip(score(prm, trajectories), trajectories)
    for f, t in sorted(scored, key=lambda x: (x[1].game, x[1].episode)):
        groups.setdefault((t.game, t.episode // n), []).append((f[-1], t))
    return [max(group, key=lambda x: x[0])[1] for group in groups.values()]


@dataclass
class Beam(Row):
    """One of the histories that a search keeps."""
    world: tuple = ()  # a snapshot of its world
    f: float = 0.0  # of its last action
    row: int = 0  # of both caches, which holds its first `fed` tokens
    fed: int = 0


@dataclass
class Search:
    """The search for one episode."""
    live: list  # of Beam, best first
    ended: list = field(default_factory=list)  # (ended by the world, f of last action, Trajectory)
    tried: int = 0  # actions taken in the world


@torch.no_grad()
def beam_search(policy, prm, tokenizer, episodes, keep, expand, *, temperature=0.3, max_steps=30,
                seed=0, slots=None):
    """Step-level beam search, keep × expand (Snell et al. 2024, section 5.2; P2).

    Each of `keep` histories samples `expand` candidates (the first step keep · expand), duplicates
    are dropped, and the `keep` of highest Q are taken to the world, each from its own state. A
    history that the world ends leaves the beam. When the beam is empty, or none in it has a higher
    Q than the best that the world ended, that one is the result; if all were cut, the best of them.
    slots: searches at once. Yields (Trajectory, actions taken in the world) for each Episode."""
    env, waiting, searches = AlfworldEnv(max_steps), deque(episodes), []
    slots = slots or max(1, slots_for(policy) // keep)
    caches = [Cache(model.config, 1, model.device) for model in (policy, prm)]
    while waiting or searches:
        while waiting and len(searches) < slots:
            row = begin(env, tokenizer, waiting.popleft(), policy)
            searches.append(Search([Beam(**vars(row), world=env.snapshot())]))
        beams = [beam for search in searches for beam in search.live]
        for cache in caches:
            cache.take([beam.row for beam in beams])
        starts, chains = np.array([beam.fed for beam in beams]), [b.ids[b.fed:] for b in beams]
        trees = [prefix_tree(beam.commands, tokenizer) for beam in beams]
        log_pi = extend(policy, caches[0], starts, chains, trees, temperature)
        f = extend(prm, caches[1], starts, chains, trees).tolist()
        counts = [expand if beam.taken else keep * expand for beam in beams]
        # The best beam's random numbers are those of Best-of-N, the others' those of later steps.
        names = np.array([
            (seed, key(b.episode.game.id), b.episode.number, len(b.taken) + rank * max_steps)
            for search in searches for rank, b in enumerate(search.live)]).T
        drawn = draws(log_pi, names, max(counts)).tolist()
        for row, beam in enumerate(beams):
            beam.row = row
        for search in searches:
            options = [(f[beam.row][c], beam, c) for beam in search.live
                       for c in dict.fromkeys(drawn[beam.row][:counts[beam.row]])]
            search.live = []
            for value, parent, c in sorted(options, key=lambda o: -o[0])[:keep]:
                tree, beam = trees[parent.row], replace(
                    parent, ids=[*parent.ids], taken=[*parent.taken], f=value, fed=len(parent.ids))
                env.restore(beam.world)
                trajectory = step(beam, tokenizer, policy, seed, tree.commands[c],
                                  tree.ids[tree.paths[c]].tolist(), c, float(log_pi[beam.row, c]))
                search.tried += 1
                if trajectory:
                    search.ended.append((not trajectory.truncated, value, trajectory))
                else:
                    beam.world = env.snapshot()
                    search.live.append(beam)
            if not search.live or any(by_world and value >= search.live[0].f
                                      for by_world, value, _ in search.ended):
                yield max(search.ended, key=lambda e: e[:2])[2], search.tried
                search.live = []
        searches = [search for search in searches if search.live]
