"""The model equals transformers' Qwen3, its cache equals no cache, and a tree equals its paths."""

import json

import numpy as np
import pytest
import torch

import model as model_file
from model import Cache, Config, Transformer
from tiny import random_model, tokenizer
from tokenizer import END
from utils import pad, read_model, save_model

# Grouped, full and single-query attention.
SHAPES = ({}, {"n_kv_heads": 4}, {"n_kv_heads": 1, "n_layers": 3, "dim": 48, "hidden": 80})


def random_ids(*shape, seed=0):
    return torch.randint(len(tokenizer()), shape, generator=torch.Generator().manual_seed(seed))


def append(model, cache, starts, rows):
    """`extend` by chains. -> list of (n, D), a part for each row"""
    h = model.extend(cache, np.array(starts), [np.asarray(row).astype(np.int64) for row in rows])
    return h.split([len(row) for row in rows])


# --- the same as transformers --------------------------------------------------------------------

@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_opens_a_saved_policy_with_equal_logits_and_greedy_text(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    policy, ids = random_model(**shape), random_ids(3, 40)
    save_model(tmp_path, policy, tokenizer())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Qwen3ForCausalLM)
    ours = policy.logits(policy(ids))
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-5, rtol=1e-5)

    text = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=30, eos_token_id=None)
    cache, ours = Cache(policy.config, 3), []
    h = append(policy, cache, [0] * 3, ids)
    for place in range(40, 70):
        ours.append(torch.stack([policy.logits(part[-1]).argmax() for part in h]))
        h = append(policy, cache, [place] * 3, ours[-1][:, None])
    assert torch.stack(ours, 1).tolist() == text[:, 40:].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_opens_a_saved_prm_with_equal_scores(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    prm, ids = random_model(head="score", **shape), random_ids(3, 40)
    save_model(tmp_path, prm, tokenizer())
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Qwen3ForTokenClassification)
    ours, scores = prm.scores(prm(ids)), theirs(ids).logits
    assert scores.shape == (3, 40, 1) and ours.std() > 0.1
    torch.testing.assert_close(ours, scores[..., 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ("Qwen3ForCausalLM", "Qwen3ForTokenClassification"))
@torch.no_grad()
def test_a_folder_saved_by_transformers_is_read(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
        rms_norm_eps=1e-3, tie_word_embeddings=True, num_labels=1, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0})).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = Transformer.load(tmp_path), torch.randint(300, (2, 100))
    h = ours(ids)
    ours = ours.logits(h) if kind == "Qwen3ForCausalLM" else ours.scores(h)[..., None]
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=1e-5)


# --- one sequence, a batch, a cache, a tree ------------------------------------------------------

@torch.no_grad()
def test_a_padded_batch_equals_each_sequence_alone():
    model, rows = random_model(), [random_ids(n, seed=n) for n in (1, 9, 30, 17)]
    for row, h in zip(rows, model(pad(rows))):
        torch.testing.assert_close(h[:len(row)], model(row[None])[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", ([40], [40, 3], [7, 40, 12, 1, 33, 5, 9, 2, 17]))
def test_sequences_of_like_length_run_together_equal_the_padded_batch(lengths):
    """`ragged` and `forward`, values and gradients."""
    model, ids, S = random_model(), random_ids(len(lengths), 40), 40
    values, gradients = [], []
    for h in (model(ids), model.ragged(ids, torch.tensor(lengths))):
        assert h.shape == (len(lengths), S, 32)
        h = torch.cat([row[:n] for n, row in zip(lengths, h)])
        values.append(h.detach())
        model.zero_grad()
        (h * torch.linspace(0, 1, 32)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5 * float(gradients[0].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("shape, seed, n", [*((shape, seed, 6) for shape in SHAPES
                                              for seed in range(3)), ({}, 3, 70)])
@torch.no_grad()
def test_growing_a_cache_by_random_chunks_equals_whole_sequences(shape, seed, n):
    """Any rows, any number of tokens at a time; the rest of the cache holds rubbish."""
    rng, g = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    model = random_model(seed, **shape)
    texts = [random_ids(int(length), seed=k) for k, length in enumerate(rng.integers(1, 60, n))]
    cache, filled, got = Cache(model.config, n), np.zeros(n, int), [[] for _ in texts]
    cache.reserve(64)
    cache.k.normal_(generator=g), cache.v.normal_(generator=g)
    while any(filled < [len(t) for t in texts]):
        sizes = rng.integers(1, 8, n) * (rng.random(n) < 0.6)
        chunks = [t[f:f + size] for t, f, size in zip(texts, filled, sizes)]
        if not any(map(len, chunks)):
            continue
        for parts, h in zip(got, append(model, cache, filled, chunks)):
            parts.append(h)
        filled += [len(chunk) for chunk in chunks]
    for parts, text in zip(got, texts):
        torch.testing.assert_close(torch.cat(parts), model(text[None])[0], atol=1e-5, rtol=1e-5)


def random_tree(rng, n):
    """n nodes, each behind an earlier one or at the root. -> paths, depth (n,), seen (n, n)"""
    paths, seen = [], np.zeros((n, n), bool)
    for i in range(n):
        parent = int(rng.integers(max(-1, i - 5), i)) if i else -1
        paths.append([*(paths[parent] if parent >= 0 else []), i])
        seen[i, paths[i]] = True
    return paths, np.array([len(path) - 1 for path in paths]), seen


@pytest.mark.parametrize("seed", range(3))
def test_trees_behind_sequences_in_one_pass_equal_each_of_their_paths(seed):
    """Without a cache: values, and gradients through the sequences that trees share."""
    model, rng = random_model(seed), np.random.default_rng(seed)
    own, trees = [random_ids(int(n), seed=k) for k, n in enumerate((9, 30, 15))], []
    for row in rng.integers(3, size=11):
        n = int(rng.integers(1, 40))
        trees.append((row, int(rng.integers(1, len(own[row]) + 1)), random_ids(n, seed=n),
                      *random_tree(rng, n)))
    nothing = np.empty(0, np.int64), np.empty((0, 0), bool)
    h = model.extend(None, np.array([0] * 3 + [start for _, start, *_ in trees]),
                     [*(x.numpy() for x in own), *(ids.numpy() for _, _, ids, *_ in trees)],
                     [nothing] * 3 + [(depth, seen) for *_, depth, seen in trees],
                     np.array([0, 1, 2, *(row for row, *_ in trees)]))
    alone = [model(ids[None])[0] for ids in own]
    for row, start, ids, paths, *_ in trees:
        alone.append(torch.stack([model(torch.cat((own[row][:start], ids[path]))[None])[0, -1]
                                  for path in paths]))
    assert 2 < max(len(path) for *_, paths, _, _ in trees for path in paths) < 25
    gradients = []
    for x in (h, torch.cat(alone)):
        model.zero_grad()
        (x * torch.linspace(-1, 1, 32)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(h, torch.cat(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(*gradients, atol=1e-5 * float(gradients[0].abs().max()), rtol=1e-3)


@torch.no_grad()
def test_chains_with_trees_behind_them_extend_a_cache():
    """40 rows in one pass: some without tokens, some without a tree, some with a tree alone."""
    model, rng, n = random_model(), np.random.default_rng(0), 40
    held = [random_ids(int(k), seed=i) for i, k in enumerate(rng.integers(1, 20, n))]
    cache = Cache(model.config, n)
    append(model, cache, [0] * n, held)
    tokens, trees, paths = [], [], []
    for i in range(n):
        m, k = (0, 0) if i % 5 == 0 else (rng.integers(0, 9), rng.integers(0, 12))
        tokens.append(random_ids(int(m + k), seed=100 + i).numpy())
        *own, depth, seen = random_tree(rng, int(k))
        trees.append((depth.astype(int), seen))
        paths.append(own[0])
    h = model.extend(cache, np.array([len(t) for t in held]), tokens, trees)
    assert any(map(len, paths)) and len(h) == sum(map(len, tokens))
    for before, new, own, part in zip(held, tokens, paths, h.split([len(t) for t in tokens])):
        m = len(new) - len(own)
        for i, path in enumerate([[]] * m + own):
            seen = [*range(i + 1)] if i < m else [*range(m), *(m + k for k in path)]
            ids = torch.tensor([*before, *new[seen]])
            torch.testing.assert_close(part[i], model(ids[None])[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_a_cache_are_copied_taken_and_started_from_a_saved_prefix():
    model, ids = random_model(), random_ids(30)
    cache = Cache(model.config, 3)
    append(model, cache, [0] * 3, [[], [], ids[:20]])
    saved = cache.read(2, 15)
    append(model, cache, [0] * 3, [[], [], random_ids(30, seed=1)])  # what is saved is a copy
    cache.write(0, saved)
    cache.take([2, 0, 0])
    h = append(model, cache, [30, 15, 15], [[], ids[15:], ids[15:20]])
    whole = model(ids[None])[0]
    torch.testing.assert_close(h[1], whole[15:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(h[2], whole[15:20], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_in_bfloat16_as_on_a_gpu_a_cache_still_equals_whole_sequences(monkeypatch):
    policy, ids = random_model(), random_ids(3, 40)
    exact = policy(ids)
    monkeypatch.setitem(model_file.AUTOCAST, "cpu", torch.bfloat16)
    cache, half = Cache(policy.config, 3), policy(ids)
    assert cache.k.dtype == torch.bfloat16 and half.dtype == torch.float32
    assert not torch.equal(half, exact)
    parts = [torch.stack(append(policy, cache, [a] * 3, ids[:, a:b]))
             for a, b in ((0, 20), (20, 21), (21, 40))]
    for a, b in ((torch.cat(parts, 1), half), (half, exact)):
        assert (a - b).std() < 0.03 * exact.std()


# --- heads, files, sizes -------------------------------------------------------------------------

@torch.no_grad()
def test_a_new_prm_is_the_policy_with_a_head_at_zero_and_its_own_weights():
    policy, ids = random_model(), random_ids(2, 20)
    prm = policy.with_score_head()
    assert torch.equal(prm(ids), policy(ids)) and (prm.scores(prm(ids)) == 0).all()
    before = policy(ids)
    for p in prm.parameters():
        p.add_(1)
    assert torch.equal(policy(ids), before)


@pytest.mark.parametrize("head", ("lm", "score"))
@torch.no_grad()
def test_saving_and_reading_keeps_every_bit(head, tmp_path):
    model, ids = random_model(head=head), random_ids(2, 20)
    for _ in range(2):  # over itself, too
        save_model(tmp_path / "model", model, tokenizer())
    read, words = read_model(tmp_path / "model", head=head)
    assert torch.equal(read(ids), model(ids)) and read.config == model.config
    last = [(m.scores if head == "score" else m.logits)(m(ids)) for m in (read, model)]
    assert torch.equal(*last)
    assert words.tokens == tokenizer().tokens and [f.name for f in tmp_path.iterdir()] == ["model"]
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["eos_token_id"] == END and config["vocab_size"] == len(tokenizer())


def test_sizes_that_do_not_fit_are_refused():
    for wrong in ({"n_heads": 3}, {"n_kv_heads": 3}, {"head_dim": 3}):
        with pytest.raises(ValueError, match="must be even, and heads"):
            Transformer(Config(100, **wrong))


def test_the_default_has_about_a_million_parameters():
    assert 0.7e6 < Transformer(Config(700)).n_parameters() < 1.1e6
