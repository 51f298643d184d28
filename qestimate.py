"""Labels: trajectories -> Q̂(s, a), exactly as the table G(s, a) of the paper, and what is to be known about it.

A state is the text of its history, so episodes of different games that read the same so far share their returns. Beside these
Monte Carlo labels: preferences between actions of one state, and labels that bootstrap on the PRM's own values.
"""

import hashlib

import numpy as np

from env import AlfworldEnv
from tokenizer import ACT, END


def returns(trajectory, gamma):
    """Discounted return-to-go of each action: G_t = gamma^(T-1-t) R, (T,) float64 (P1, eq. 1 for one rollout)."""
    T = len(trajectory)
    return trajectory.reward * gamma ** np.arange(T - 1, -1, -1.0)


def history_keys(trajectory, tokenizer):
    """64-bit names of the states s_t and of the pairs (s_t, a_t), two (T,) uint64 arrays, from text: equal history, equal name."""
    history = hashlib.blake2b(digest_size=8)
    number = lambda h: int.from_bytes(h.digest(), "little")
    states, pairs, seen, ids = [], [], 0, trajectory.ids
    for start, end in zip(np.nonzero(ids == ACT)[0] + 1, np.nonzero(ids == END)[0] + 1):
        history.update(b"\0" + tokenizer.decode(ids[seen:start]).encode())
        states.append(number(history))
        history.update(b"\1" + tokenizer.command(ids[start:end]).encode())
        pairs.append(number(history))
        seen = end
    own = slice(-len(trajectory), None)  # what came before was a demonstration's
    return np.array(states[own], np.uint64), np.array(pairs[own], np.uint64)


def world_keys(trajectory, tokenizer, game):
    """The same with the state of the world in the place of the history: where histories meet again, they share their returns.

    Ours, for comparison; only an exact world allows it. What was seen on the way differs, though the world does not.
    """
    env = AlfworldEnv()
    env.reset(game)
    name = lambda *parts: int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
    states, pairs = [], []
    for action in tokenizer.actions(trajectory.ids):
        _, _, *state, taken = env.snapshot()  # without the game and the number of steps
        states.append(name(game.id, state, sorted(at for at in taken.items() if at[1])))  # one put back is as if it had never been taken
        pairs.append(name(states[-1], action.strip()))
        env.step(action)
    own = slice(-len(trajectory), None)  # what came before was a demonstration's
    return np.array(states[own], np.uint64), np.array(pairs[own], np.uint64)


def q_table(trajectories, tokenizer, gamma, keys=history_keys):
    """Q̂ of every action taken: the mean return of all rollouts through the same (s, a) (P1, eq. 1), as `keys` tells them apart.

    -> one dict of flat arrays over all actions, in order: `q_hat`, `count` (visits of its (s, a)), `returns`, `state`, `pair`.
    """
    named = [keys(t, tokenizer) for t in trajectories]
    pair = np.concatenate([p for _, p in named])
    G = np.concatenate([returns(t, gamma) for t in trajectories])
    _, inverse, count = np.unique(pair, return_inverse=True, return_counts=True)
    q_hat = np.bincount(inverse, weights=G) / count
    return {"q_hat": q_hat[inverse], "count": count[inverse], "returns": G, "state": np.concatenate([s for s, _ in named]), "pair": pair}


def labels_of(trajectories, table):
    """Cut the flat table into per-trajectory (q_hat (T,), weight (T,)): each distinct (s, a) weighs one, an occurrence 1/count."""
    ends = np.cumsum([len(t) for t in trajectories])[:-1]
    return list(zip(np.split(table["q_hat"].astype(np.float32), ends), np.split((1.0 / table["count"]).astype(np.float32), ends)))


def preference_pairs(trajectories, table, gap):
    """Actions of the same state of which one is better by more than `gap`: Q̂(s, a⁺) > Q̂(s, a⁻) + δ (P1, relative loss).

    Each distinct (s, a⁺, a⁻) comes once, with the rollout in which a⁺ was seen first. -> for each trajectory a list of (number of
    its action a⁺, ids of a⁻); {"pairs", "states", "dropped": states with one action, or with none that is better}
    """
    owner = [(i, k) for i, t in enumerate(trajectories) for k in range(len(t))]
    pair, first = np.unique(table["pair"], return_index=True)  # every distinct (s, a), where it was seen first
    of_state = {}
    for n in sorted(first.tolist()):
        of_state.setdefault(int(table["state"][n]), []).append(n)
    out, states = [[] for _ in trajectories], 0
    for actions in of_state.values():
        q_hat = table["q_hat"][actions]
        found = [(actions[a], actions[b]) for a, b in zip(*np.nonzero(q_hat[:, None] > q_hat + gap))]
        states += bool(found)
        for better, worse in found:
            (i, k), (j, l) = owner[better], owner[worse]
            out[i].append((k, trajectories[j].ids[slice(*trajectories[j].spans[l])]))
    return out, {"pairs": sum(map(len, out)), "states": states, "dropped": len(of_state) - states}


def state_labels(trajectories, table):
    """The value of the states themselves: V(s) = mean return of all rollouts through s. -> as `labels_of`, weights 1/visits of s"""
    _, inverse, count = np.unique(table["state"], return_inverse=True, return_counts=True)
    value = np.bincount(inverse, weights=table["returns"]) / count
    return labels_of(trajectories, {"q_hat": value[inverse], "count": count[inverse]})


def forks_of(trajectories, K):
    """Where rollouts fork from every step: (number of the trajectory, of the action behind which they begin), K times each.

    Not behind the last action: nothing is left to be sampled there.
    """
    return [(i, k) for i, t in enumerate(trajectories) for k in range(len(t) - 1) for _ in range(K)]


def forked(trajectories, forks, K, gamma):
    """Labels by Monte Carlo from every step: Q̂(s_t, a_t) = mean return of K rollouts forked behind a_t and of the trajectory itself.

    forks: the rollouts, in the order of `forks_of`. -> as `labels_of`, every action weighing one
    """
    q_hat = [returns(t, gamma) for t in trajectories]
    for (i, k), fork in zip(forks_of(trajectories, K), forks, strict=True):
        q_hat[i][k] += gamma * returns(fork, gamma)[0]
    return [((q / np.append(np.full(len(q) - 1, K + 1), 1)).astype(np.float32), np.ones(len(q), np.float32)) for q in q_hat]


def shaped(q_hat, V, gamma, how):
    """Process reward shaping by the values V (T,) that a reference policy has at the states of a rollout (P1, process reward shaping).

    "difference", as in the public code: Q̂(s, a) + γ V(s') − V(s), V(s') = 0 after the last action. "potential": Q̂(s, a) − V(s),
    which is what comes of shaping the *reward* by the potential V. -> (T,)
    """
    return q_hat - V if how == "potential" else q_hat + gamma * np.append(V[1:], 0) - V


def squashed(values):
    """Shaped targets (n,) -> [0, 1]: a sigmoid centred on their mean with slope 3/IQR, 1 where the IQR is 0 (public code)."""
    low, high = np.quantile(values, (0.25, 0.75))
    return 1 / (1 + np.exp(np.minimum(700, (values.mean() - values) * (3 / (high - low) if high > low else 1))))  # exp(710) overflows


def td_gae(M, v_0, R, gamma, lam):
    """Labels that bootstrap on the PRM's promises M (T,) and the value v_0 of the first state (P2, TD + GAE).

    M_{t−1} stands for V(s_t): δ_t = γ M_t − M_{t−1}, at the end R − M_{T−2}; Â_t = Σ_k (γλ)^k δ_{t+k}. -> Q̂_t = M_{t−1} + Â_t
    and Â_t, each (T,)
    """
    before = np.concatenate([[v_0], M[:-1]])
    delta = np.concatenate([gamma * M[:-1], [R]]) - before
    advantage, ahead = np.zeros(len(M)), 0.0
    for t in reversed(range(len(M))):
        advantage[t] = ahead = delta[t] + gamma * lam * ahead
    return before + advantage, advantage


def sarsa(M, v_0, R, gamma, lam):
    """The same with ordinary SARSA(λ): Q̂_t = γ((1−λ) M_{t+1} + λ Q̂_{t+1}), at the end R. -> Q̂_t and Q̂_t − M_{t−1}, each (T,)"""
    q_hat = np.zeros(len(M))
    q_hat[-1] = R
    for t in reversed(range(len(M) - 1)):
        q_hat[t] = gamma * ((1 - lam) * M[t + 1] + lam * q_hat[t + 1])
    return q_hat, q_hat - np.concatenate([[v_0], M[:-1]])


def visit_statistics(table):
    """How often (s, a) were visited, and how far single returns lie from Q̂ where there are several.

    `by_visits`: of the pairs (s, a) with at least 1, 2, 4, … visits but fewer than the next: how many, their mean Q̂ (the better a
    policy does there, the higher), each pair weighing once, and the variance of their returns around it (with Bessel's correction),
    each visit weighing once.
    """
    pair, first = np.unique(table["pair"], return_index=True)
    count = table["count"][first]
    again = table["count"] > 1
    error = (table["returns"] - table["q_hat"]) ** 2 * np.where(again, table["count"] / np.maximum(1, table["count"] - 1), 0)
    edges, by_visits = (1, 2, 4, 8, 16, 32, 64), {}
    for low, high in zip(edges, (*edges[1:], np.inf)):
        here = (table["count"] >= low) & (table["count"] < high)
        if here.any():
            by_visits[f"{low}+"] = {"pairs": int((1 / table["count"][here]).sum().round()),
                                    "q_hat": float(np.average(table["q_hat"][here], weights=1 / table["count"][here])),
                                    "variance": float(error[here].mean()) if low > 1 else None}
    return {"actions": len(table["pair"]), "distinct_pairs": len(pair), "distinct_states": len(np.unique(table["state"])),
            "visits": {f"{a}+": int((count >= a).sum()) for a in edges}, "by_visits": by_visits,
            "label_variance_where_revisited": float(error[again].mean()) if again.any() else None}


def held_out_check(trajectories, tokenizer, gamma, keys=history_keys):
    """Is Q̂ worth learning? Correlate Q̂ from every other rollout with the returns of the others, where both pass (s, a), told apart by `keys`.

    -> {"pairs", "pearson"}; pearson is None where too few pairs are shared.
    """
    halves = [q_table(part, tokenizer, gamma, keys) if part else None for part in (trajectories[0::2], trajectories[1::2])]
    if None in halves:
        return {"pairs": 0, "pearson": None}
    known = dict(zip(halves[0]["pair"].tolist(), halves[0]["q_hat"]))
    both = [(known[p], g) for p, g in zip(halves[1]["pair"].tolist(), halves[1]["returns"]) if p in known]
    return {"pairs": len(both), "pearson": pearson(*np.array(both).T) if len(both) > 2 else None}


def pearson(x, y):
    """Correlation of two arrays, None where one is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 2 or x.std() < 1e-12 or y.std() < 1e-12:
        return None
    return float(np.corrcoef(x, y)[0, 1])
