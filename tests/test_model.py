"""The model equals transformers' Qwen3, its cache equals no cache, and a tree of branches equals separate sequences."""

import json
import shutil

import pytest
import torch

import model
from common import pad, read_model, save_model
from model import Cache, Config, Transformer
from rollout import action_logprobs
from tiny import random_model, tokenizer
from tokenizer import END

SHAPES = ({}, {"kv_heads": 4}, {"kv_heads": 1, "layers": 3, "dim": 48, "hidden": 80})  # grouped, full and single-query attention


def random_ids(*shape, seed=0):
    return torch.randint(len(tokenizer()), shape, generator=torch.Generator().manual_seed(seed))


# --- the same as transformers --------------------------------------------------------------------------------------------

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
    torch.testing.assert_close(ours, theirs(ids).logits, atol=1e-4, rtol=0)

    text = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=30, eos_token_id=None)
    cache, rows = Cache(policy.config, 3, 70), torch.arange(3)
    h = policy.extend(ids.flatten(), rows.repeat_interleave(40), torch.arange(40).repeat(3), cache).view(3, 40, -1)[:, -1]
    ours = []
    for place in range(40, 70):
        ours.append(policy.logits(h).argmax(-1))
        h = policy.extend(ours[-1], rows, torch.full((3,), place), cache)
    assert torch.stack(ours, 1).tolist() == text[:, 40:].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_transformers_opens_a_saved_prm_with_equal_scores(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    prm, ids = random_model(head="score", **shape), random_ids(3, 40)
    save_model(tmp_path, prm, tokenizer())
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.Qwen3ForTokenClassification) and theirs.config.num_labels == 1
    torch.testing.assert_close(prm.scores(prm(ids)), theirs(ids).logits[..., 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ("Qwen3ForCausalLM", "Qwen3ForTokenClassification"))
@torch.no_grad()
def test_a_folder_saved_by_transformers_is_read(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, rms_norm_eps=1e-3, tie_word_embeddings=True, num_labels=1, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0})).eval()
    theirs.save_pretrained(tmp_path)
    ours, ids = Transformer.load(tmp_path), torch.randint(300, (2, 100))
    h = ours(ids)
    torch.testing.assert_close(ours.logits(h) if kind == "Qwen3ForCausalLM" else ours.scores(h)[..., None], theirs(ids).logits, atol=1e-4, rtol=0)


# --- one sequence, a batch, a cache, a tree ------------------------------------------------------------------------------

@torch.no_grad()
def test_a_padded_batch_equals_each_sequence_alone():
    model, rows = random_model(), [random_ids(n, seed=n) for n in (1, 9, 30, 17)]
    for row, h in zip(rows, model(pad(rows))):
        torch.testing.assert_close(h[:len(row)], model(row[None])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", ([40], [40, 3], [7, 40, 12, 1, 33], [5, 9, 40, 2, 2, 17, 28, 31, 11]))
def test_sequences_of_like_length_run_together_are_the_padded_batch(lengths):
    model, ids, S = random_model(), random_ids(len(lengths), 40), 40
    positions = torch.arange(S).flip(0).repeat(len(lengths), 1)  # any
    mask = torch.rand(len(lengths), S, S, generator=torch.Generator().manual_seed(0)) < 0.5
    mask |= torch.eye(S, dtype=torch.bool)
    mask &= torch.arange(S) < torch.tensor(lengths)[:, None, None]  # nothing looks at padding
    for extra in ((), (positions, mask | ~mask.any(-1, keepdim=True))):
        whole, parts = model(ids, *extra), model.ragged(ids, torch.tensor(lengths), *extra)
        assert parts.shape == whole.shape
        for n, a, b in zip(lengths, whole, parts):
            torch.testing.assert_close(a[:n], b[:n], atol=1e-5, rtol=1e-4)
        model.zero_grad()
        sum(h[:n].sum() for n, h in zip(lengths, parts)).backward()
        ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        sum(h[:n].sum() for n, h in zip(lengths, whole)).backward()
        for a, b in zip(ours, [p.grad for p in model.parameters() if p.grad is not None]):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape, seed, n", [*((shape, seed, 6) for shape in SHAPES for seed in range(4)), *(({}, seed, 70) for seed in range(3))])
@torch.no_grad()
def test_growing_a_cache_by_random_chunks_equals_whole_sequences(shape, seed, n):
    """Any rows, any number of tokens at a time; the rest of the cache holds rubbish."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=g))
    model, texts = random_model(seed, **shape), [random_ids(int(length), seed=int(length)) for length in torch.randint(1, 60, (n,), generator=g)]
    cache = Cache(model.config, n, 64)
    cache.k.normal_(generator=g), cache.v.normal_(generator=g)
    whole, got, filled = [model(t[None])[0] for t in texts], [[] for _ in texts], [0] * n
    while any(f < len(t) for f, t in zip(filled, texts)):
        unfinished = [r for r in range(n) if filled[r] < len(texts[r])]
        chosen = [r for r in unfinished if draw(0, 3)] or unfinished
        chunks = {r: min(draw(1, 8) if draw(0, 2) else 1, len(texts[r]) - filled[r]) for r in chosen}
        h = model.extend(torch.cat([texts[r][filled[r]:filled[r] + k] for r, k in chunks.items()]),
                         torch.cat([torch.full((k,), r) for r, k in chunks.items()]),
                         torch.cat([torch.arange(filled[r], filled[r] + k) for r, k in chunks.items()]), cache)
        for (r, k), part in zip(chunks.items(), h.split(list(chunks.values()))):
            got[r].append(part)
            filled[r] += k
    for parts, expected in zip(got, whole):
        torch.testing.assert_close(torch.cat(parts), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_in_bfloat16_as_on_a_gpu_a_cache_still_equals_whole_sequences(monkeypatch):
    policy, ids = random_model(), random_ids(3, 40)
    exact = policy(ids)
    monkeypatch.setitem(model.AUTOCAST, "cpu", torch.bfloat16)
    cache, rows, half = Cache(policy.config, 3, 40), torch.arange(3), policy(ids)
    assert cache.k.dtype == torch.bfloat16 and half.dtype == torch.float32 and not torch.equal(half, exact)
    parts = [policy.extend(ids[:, a:b].flatten(), rows.repeat_interleave(b - a), torch.arange(a, b).repeat(3), cache).view(3, b - a, -1)
             for a, b in ((0, 20), (20, 21), (21, 40))]
    for a, b in ((torch.cat(parts, 1), half), (half, exact)):
        assert (a - b).std() < 0.03 * exact.std()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_compiled_layers_compute_the_same_for_any_number_of_tokens(monkeypatch):
    """COMPILE=1, as for a GPU: whole sequences and their gradients, and a cache that grows by chunks."""
    eager = random_model(layers=1)
    monkeypatch.setattr(model, "COMPILE", True)
    compiled = random_model(layers=1)
    for length in (17, 40):
        ids = random_ids(3, length)
        ours, theirs = (m.logits(m(ids)) for m in (compiled, eager))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for m in (compiled, eager):
        m.logits(m(ids)).logsumexp(-1).mean().backward()
    for p, q in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        h, cache = eager(ids[:1])[0], Cache(compiled.config, 1, 40)
        chunks = [compiled.extend(ids[0, a:b], torch.zeros(b - a, dtype=torch.long), torch.arange(a, b), cache) for a, b in ((0, 30), (30, 31), (31, 40))]
    torch.testing.assert_close(torch.cat(chunks), h, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_row_started_from_the_saved_prefix_of_another():
    model, ids = random_model(), random_ids(30)
    cache, slots = Cache(model.config, 3, 32), torch.arange(30)
    model.extend(ids[:20], torch.full((20,), 2), slots[:20], cache)
    saved = cache.read(2, 15)
    model.extend(random_ids(30, seed=1), torch.full((30,), 2), slots, cache)  # what is saved is a copy
    cache.write(0, saved)
    h = model.extend(ids[15:], torch.zeros(15, dtype=torch.long), slots[15:], cache)
    torch.testing.assert_close(h, model(ids[None])[0, 15:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_tree_in_one_pass_equals_each_of_its_paths(seed):
    """Node n hangs from a random earlier node; it sees its ancestors, at the place it has on the path from the root."""
    g, n = torch.Generator().manual_seed(seed), 40
    parents = [-1, *(max(0, i - int(torch.randint(1, 5, (), generator=g))) for i in range(1, n))]
    paths = []
    for i, parent in enumerate(parents):
        paths.append([*(paths[parent] if i else []), i])
    mask = torch.zeros(1, n, n, dtype=torch.bool)
    for i, path in enumerate(paths):
        mask[0, i, path] = True
    model, ids = random_model(seed), random_ids(n, seed=seed)
    together = model(ids[None], torch.tensor([[len(path) - 1 for path in paths]]), mask)[0]
    assert max(map(len, paths)) < n - 5
    for i, path in enumerate(paths):
        torch.testing.assert_close(together[i], model(ids[path][None])[0, -1], atol=1e-4, rtol=0)


# --- heads, files, sizes ---------------------------------------------------------------------------------------------------

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
    assert torch.equal(read(ids), model(ids)) and read.config == model.config and words.tokens == tokenizer().tokens
    assert [f.name for f in tmp_path.iterdir()] == ["model"]
    assert sorted(f.name for f in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["eos_token_id"] == END and config["vocab_size"] == len(tokenizer())


def test_sizes_that_do_not_fit_are_refused():
    for wrong in ({"n_heads": 3}, {"n_kv_heads": 3}, {"dim": 12}):
        with pytest.raises(ValueError, match="must be an even multiple"):
            Transformer(Config(100, **wrong))


def test_the_default_has_about_a_million_parameters():
    assert 0.7e6 < Transformer(Config(700)).n_parameters() < 1.1e6


def test_only_end_and_ordinary_tokens_can_stand_in_an_action():
    p = action_logprobs(torch.randn(7, 20), 0.5).exp()
    assert (p[:, :END] == 0).all() and (p[:, END:] > 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(7))
