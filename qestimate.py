"""Labels: the trajectories of stage 1 -> Q̂(s, a), the mean return over G(s, a) (P1, eq. 1).

    labels = labels_of(trajectories, q_table(trajectories, tokenizer, gamma=0.95))

A state is the text of its history, so episodes of different games whose texts agree so far share
their returns. `td_gae` bootstraps on the PRM's own values instead (P2)."""

import hashlib

import numpy as np

from tokenizer import ACT, END


def returns(trajectory, gamma):
    """Discounted return-to-go of each action: G_t = γ^(T−1−t) R, (T,) float64."""
    return trajectory.reward * gamma ** np.arange(len(trajectory) - 1, -1, -1.0)


def history_keys(trajectory, tokenizer):
    """64-bit hashes of the states s_t and of the pairs (s_t, a_t), two (T,) uint64 arrays.

    They hash the text, whatever its tokens, without the spaces around an action."""
    history, number = hashlib.blake2b(digest_size=8), lambda h: int.from_bytes(h.digest(), "little")
    states, pairs, seen, ids = [], [], 0, trajectory.ids
    for start, end in zip(np.nonzero(ids == ACT)[0] + 1, np.nonzero(ids == END)[0] + 1):
        history.update(b"\0" + tokenizer.decode(ids[seen:start]).encode())
        states.append(number(history))
        history.update(b"\1" + tokenizer.decode(ids[start:end]).strip().encode())
        pairs.append(number(history))
        seen = end
    own = slice(-len(trajectory), None)  # without the actions of a demonstration it started from
    return np.array(states[own], np.uint64), np.array(pairs[own], np.uint64)


def q_table(trajectories, tokenizer, gamma, keys=history_keys):
    """Q̂ of every action taken: the mean return of all rollouts through the same (s, a) (eq. 1).

    -> dict of flat arrays over the N actions of all trajectories, in order: `q_hat` and `returns`
    in [0, 1], `count` (rollouts through this (s, a)), `state` and `pair` (as from `keys`)."""
    state, pair = map(np.concatenate, zip(*(keys(t, tokenizer) for t in trajectories)))
    G = np.concatenate([returns(t, gamma) for t in trajectories])
    _, inverse, count = np.unique(pair, return_inverse=True, return_counts=True)
    q_hat = np.bincount(inverse, weights=G) / count
    return {"q_hat": q_hat[inverse], "count": count[inverse], "returns": G,
            "state": state, "pair": pair}


def labels_of(trajectories, table):
    """-> for each trajectory (q_hat (T,), weight (T,)); an occurrence of (s, a) weighs 1/count."""
    ends = np.cumsum([len(t) for t in trajectories])[:-1]
    cut = lambda values: np.split(values.astype(np.float32), ends)
    return list(zip(cut(table["q_hat"]), cut(1.0 / table["count"])))


def preference_pairs(trajectories, table, gap):
    """Pairs of actions of one state with Q̂(s, a⁺) > Q̂(s, a⁻) + gap, for P1's relative loss.

    Each distinct (s, a⁺, a⁻) occurs once, in the first trajectory that took a⁺ at s.
    -> for each trajectory a list of (k, ids of a⁻ with its <end>), a⁺ being its action k"""
    owner = [(i, k) for i, t in enumerate(trajectories) for k in range(len(t))]
    _, first = np.unique(table["pair"], return_index=True)  # first occurrence of each (s, a)
    of_state = {}
    for n in sorted(first.tolist()):
        of_state.setdefault(int(table["state"][n]), []).append(n)
    out = [[] for _ in trajectories]
    for actions in of_state.values():
        q_hat = table["q_hat"][actions]
        for a, b in zip(*np.nonzero(q_hat[:, None] > q_hat + gap)):
            (i, k), (j, l) = owner[actions[a]], owner[actions[b]]
            out[i].append((k, trajectories[j].ids[slice(*trajectories[j].spans[l])]))
    return out


def td_gae(M, v_0, R, gamma, lam):
    """Labels by temporal differences and GAE(λ) from the PRM's own promises (P2).

    M (T,): promise M_t = M(s_t, a_t), M_{t−1} standing for V(s_t); v_0: value of the first state;
    R: final reward. δ_t = γ M_t − M_{t−1}, the last one R − M_{T−2}; Â_t = Σ_k (γλ)^k δ_{t+k}.
    -> Q̂_t = M_{t−1} + Â_t and Â_t, each (T,)"""
    before = np.concatenate([[v_0], M[:-1]])
    delta = np.concatenate([gamma * M[:-1], [R]]) - before
    advantage, ahead = np.zeros(len(M)), 0.0
    for t in reversed(range(len(M))):
        advantage[t] = ahead = delta[t] + gamma * lam * ahead
    return before + advantage, advantage


def pearson(x, y):
    """Correlation of two arrays; None for fewer than 3 numbers, or where one array is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 1e-12 < y.std() else None
