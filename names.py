"""What is known of a name before the first lesson: that "mug 1", "mug 2" and "mug" are of one kind, and "mug 2" and "desk 2" have one number.

A name and its number are one token (tokenizer.py), so to the transformer " mug 1" and " mug" are as different as any two words. That the mug in view
is the mug that the task asks for, the one match that everything hangs on, would have to be learned for each number of each name, from few
demonstrations, and some stay unlearned, which ones is a matter of chance (LOG.md). Sharing a part of their vectors gives that away for nothing. That
it looks at all it does not ensure; it has done so where rooms are told with less in them as well (`tellings.sparser`), with each of three seeds.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from common import key


class Shared(nn.Module):
    """The embedding (V, D), while it is learned: " mug 2" is a vector of its own + that of every mug + that of every 2,
    " mug" its own + that of every mug; what is no name has only its own."""

    def __init__(self, tokenizer, dim):
        super().__init__()
        bare = {tokenizer.hf.token_to_id(f" {base}"): base for base in tokenizer.base_of.values()}
        kind_of, numbered = {**bare, **tokenizer.base_of}, list(tokenizer.base_of)  # ids of names: {id: kind}, and of those with a number
        kinds = {base: n for n, base in enumerate(sorted(set(kind_of.values())))}
        number_of = [int(tokenizer.tokens[i].rsplit(" ", 1)[1]) for i in numbered]
        for name, of in (("named", list(kind_of)), ("kind_of", [kinds[base] for base in kind_of.values()]), ("numbered", numbered),
                         ("number_of", number_of)):
            self.register_buffer(name, torch.tensor(of), persistent=False)
        self.kind = nn.Parameter(0.02 * torch.randn(len(kinds), dim))  # as much as its own vector begins with
        self.number = nn.Parameter(0.02 * torch.randn(max(number_of) + 1, dim))

    def forward(self, own):
        return own.index_add(0, self.named, self.kind[self.kind_of]).index_add(0, self.numbered, self.number[self.number_of])


@contextmanager
def shared_names(model, tokenizer, seed):
    """Within, the embedding of `model` is `Shared`; behind it is a plain table again, of the sums."""
    torch.manual_seed(key(f"names {seed}"))
    parametrize.register_parametrization(model.model["embed_tokens"], "weight", Shared(tokenizer, model.config.dim).to(model.cos.device))
    yield
    parametrize.remove_parametrizations(model.model["embed_tokens"], "weight")
