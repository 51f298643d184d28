"""What the numbers of a name share while the embedding is learned, and that nothing of it is left behind."""

import copy

import pytest
import torch

from names import Shared, shared_names
from tiny import random_model, tokenizer


def parts(token):
    """A token's kind and number, None where it has none."""
    kind, _, number = token[1:].rpartition(" ")
    if number.isdigit() and f" {kind}" in tokenizer().tokens:
        return kind, int(number)
    return (token[1:], None) if f"{token} 1" in tokenizer().tokens and token.startswith(" ") else (None, None)


def test_a_vector_is_its_own_and_those_of_its_kind_and_number():
    torch.manual_seed(0)
    shared, own = Shared(tokenizer(), 8), torch.randn(len(tokenizer()), 8)
    rest = shared(own) - own
    kinds, numbers = {}, {}
    for i, token in enumerate(tokenizer().tokens):
        kind, number = parts(token)
        if kind is None:
            assert not rest[i].any()
        elif number is None:
            kinds[kind] = rest[i]
    assert len(kinds) > 50 and len({tuple(v.tolist()) for v in kinds.values()}) == len(kinds)
    for i, token in enumerate(tokenizer().tokens):
        kind, number = parts(token)
        if number is not None:
            torch.testing.assert_close(rest[i] - kinds[kind], numbers.setdefault(number, rest[i] - kinds[kind]))
    assert len(numbers) > 5 and {parts(token) for token in (" desk 1", " desk", " you")} == {("desk", 1), ("desk", None), (None, None)}


def test_a_lesson_about_one_mug_is_one_about_all():
    model = random_model()
    before = model.model["embed_tokens"].weight.detach().clone()
    first, second, bare = (tokenizer().hf.token_to_id(name) for name in (" cabinet 1", " cabinet 2", " cabinet"))
    other = next(i for i, kind in tokenizer().base_of.items() if kind != "cabinet" and tokenizer().tokens[i].endswith(" 1"))
    with shared_names(model, tokenizer(), 0):
        within = model.model["embed_tokens"].weight
        assert not torch.equal(within, before)
        within[first].sum().backward()
        with torch.no_grad():
            for p in model.model["embed_tokens"].parameters():
                p -= 0.1 * p.grad
        moved = (model.model["embed_tokens"].weight - within).detach()
        assert moved[first, 0] == pytest.approx(-0.3) and moved[[second, bare, other], 0].tolist() == pytest.approx([-0.1] * 3)
        last = model.model["embed_tokens"].weight.detach().clone()
    assert torch.equal(model.model["embed_tokens"].weight, last)


def test_behind_it_the_model_is_as_any_other(tmp_path):
    model, same = random_model(), copy.deepcopy(random_model())
    ids = torch.arange(40)[None] % len(tokenizer())
    names = [name for name, _ in model.named_parameters()]
    with shared_names(model, tokenizer(), 3):
        inside = model.logits(model(ids))
    with shared_names(same, tokenizer(), 3):
        pass
    assert [name for name, _ in model.named_parameters()] == names and torch.equal(model.logits(model(ids)), inside)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))  # the seed names them
    model.save(tmp_path)
    loaded = type(model).load(tmp_path)
    assert torch.equal(loaded.logits(loaded(ids)), inside)
    copy.deepcopy(model)
