"""Control: Q shuffled among the candidates of each state; stage 3 must then gain nothing.

Paper: none. If this run gains, then what stage 3 gains is not due to the ranking by the PRM.
Changes `judge`: the candidates' Q of a state are permuted at random, always in the same way for
    the same history.
Command: python train.py --ablation shuffled
Ours: not measured yet.
"""

import torch

import train
from utils import generator


def shuffle(q, sequences, states, *keys):
    """q (B, C), `states` as for `candidates.score_states`; keys: RNG keys. -> (B, C)"""
    order = torch.arange(q.shape[1]).repeat(len(q), 1)
    for row, (b, start, tree) in zip(order, states):
        rng = generator(*keys, sequences[b][:start].tobytes().hex())
        row[:len(tree)] = torch.from_numpy(rng.permutation(len(tree)))
    return q.gather(1, order.to(q.device))


def judge(c, i, prm):
    """-> judge(sequences, states) -> Q (B, C)"""
    plain = train.judge(c, i, prm)
    return lambda sequences, states: shuffle(plain(sequences, states), sequences, states,
                                             c.args.seed, "shuffled", i)
