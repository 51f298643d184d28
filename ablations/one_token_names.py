"""A name and its number as one token, " desk 1", instead of two, " desk" and " 1".

Paper: none. As one token, the desk in view and the desk that the task asks for have nothing in
    common; a sketch measured 54.5 instead of 73.0 % of dev for SFT on 4,000 demonstrations.
Changes `tokenizer`.
Command: python train.py --ablation one_token_names --iters 0
Ours: not measured yet.
"""

from ablations import trains_policy
from sft import train_tokenizer


def check(args):
    trains_policy(args, "one_token_names")


def tokenizer(c):
    """-> Tokenizer"""
    return train_tokenizer(c.train, c.prior, c.args.seed, joined=True)
