"""Acting with a PRM: choosers that take the place of plain sampling in `rollout(…, choose=…)`."""

import numpy as np

from rollout import branch
from tree import Tree, distinct


def best_of_n(prm, n):
    """Sample n actions, drop duplicates by text, take the one of highest Q; ties go to the first (P1, section 2.4)."""

    def choose(policy, tokenizer, cache, rows, lengths, h, names, temperature, histories):
        drawn = branch(policy, cache, rows, lengths[rows], h, n, names, temperature)
        drawn = [distinct(state, tokenizer) for state in drawn]
        branches = [(j, len(histories[j]), a, f) for j, state in enumerate(drawn) for a, _, f in state]
        q = Tree(histories, branches, policy.cos.device).scores(prm).cpu().numpy()
        ends = np.cumsum([len(state) for state in drawn])
        best = [state[int(part.argmax())] for state, part in zip(drawn, np.split(q, ends[:-1]))]
        return tuple(map(list, zip(*best)))

    return choose

