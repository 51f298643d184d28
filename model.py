"""A decoder transformer in plain PyTorch, with a KV cache, for the policy and for the PRM.

    policy = Transformer(Config(vocab_size=800))             # logits of the next token
    prm = Transformer(Config(vocab_size=800, head="score"))  # one scalar f a token
    h = policy(ids)                                          # (B, S) -> hidden states (B, S, D)
    logits = policy.logits(h[:, -1])                         # (B, V)

RMSNorm, rotary positions, grouped-query attention with normalised queries and keys, SwiGLU. The
layout and the tensor names are Qwen3's, so transformers opens a saved model as Qwen3ForCausalLM
(policy) or Qwen3ForTokenClassification (PRM). The default has about 0.9 million parameters."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

# The type that layers compute in and the cache holds. Weights and losses stay float32.
AUTOCAST = {"cuda": torch.bfloat16}
STRETCH = {"cpu": 4, "cuda": 1024}  # cache rows that attend together; padding costs more on a CPU
NO_TREE = np.empty(0, np.int64), np.empty((0, 0), bool)  # for `extend`: a chain alone
QWEN3 = {  # our names of sizes -> transformers'
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "hidden": "intermediate_size", "max_len": "max_position_embeddings",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps"}


@dataclass
class Config:
    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 2
    n_kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 384
    max_len: int = 2048
    rope_theta: float = 100_000.0
    norm_eps: float = 1e-5
    head: str = "lm"  # "lm": logits, tied to the embedding; "score": one scalar a token


class Layer(nn.Module):
    """Attention and feed-forward, each with a norm before it and a residual connection."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = head_dim = c.head_dim
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.dim, c.n_heads * head_dim, bias=False),
            "k_proj": nn.Linear(c.dim, c.n_kv_heads * head_dim, bias=False),
            "v_proj": nn.Linear(c.dim, c.n_kv_heads * head_dim, bias=False),
            "o_proj": nn.Linear(c.n_heads * head_dim, c.dim, bias=False),
            "q_norm": nn.RMSNorm(head_dim, eps=c.norm_eps),
            "k_norm": nn.RMSNorm(head_dim, eps=c.norm_eps)})
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.dim, c.hidden, bias=False),
            "up_proj": nn.Linear(c.dim, c.hidden, bias=False),
            "down_proj": nn.Linear(c.hidden, c.dim, bias=False)})

    def forward(self, x, cos, sin, attend):
        """x (…, D), cos and sin (…, head_dim); attend(q, k, v) -> (…, heads, head_dim)."""
        a, m, h = self.self_attn, self.mlp, self.input_layernorm(x)
        q, k, v = (a[p](h).float().unflatten(-1, (-1, self.head_dim))
                   for p in ("q_proj", "k_proj", "v_proj"))  # (…, heads or kv heads, head_dim)
        o = attend(rotate(a["q_norm"](q), cos, sin), rotate(a["k_norm"](k), cos, sin), v)
        x = x + a["o_proj"](o.flatten(-2))
        h = self.post_attention_layernorm(x)
        return x + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


def rotate(x, cos, sin):
    """Rotary position embedding, Llama's half-split layout: x (…, heads, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(-2)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.n_heads % c.n_kv_heads or c.head_dim % 2:
            raise ValueError(f"head_dim {c.head_dim} must be even, and heads {c.n_heads} a "
                             f"multiple of kv heads {c.n_kv_heads}")
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(c.vocab_size, c.dim),
            "layers": nn.ModuleList(Layer(c) for _ in range(c.n_layers)),
            "norm": nn.RMSNorm(c.dim, eps=c.norm_eps)})
        if c.head == "score":
            self.score = nn.Linear(c.dim, 1)
        half = c.head_dim // 2
        frequencies = c.rope_theta ** (-torch.arange(half) / half)
        angles = torch.outer(torch.arange(c.max_len), frequencies)  # (max_len, head_dim / 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Layer):
            # As GPT-2: the variance does not grow with depth.
            for p in (module.self_attn["o_proj"], module.mlp["down_proj"]):
                nn.init.normal_(p.weight, std=0.02 / (2 * self.config.n_layers) ** 0.5)
            # With both normalised, q·k/√d is at most √d: start as sharp as a head of d = 128.
            for p in (module.self_attn["q_norm"], module.self_attn["k_norm"]):
                nn.init.constant_(p.weight, (128 / self.config.head_dim) ** 0.25)

    @property
    def device(self):
        return self.cos.device

    def forward(self, ids):
        """Hidden states of whole sequences, without a cache: ids (B, S), padded at the end.

        -> (B, S, D)"""
        def attend(q, k, v):  # (B, S, heads, head_dim)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

        positions = torch.arange(ids.shape[1], device=ids.device)
        return self._run(self.model["embed_tokens"](ids), positions, lambda layer: attend)

    def ragged(self, ids, lengths):
        """`forward` for sequences of very different lengths (B,): less padding on a CPU."""
        if ids.device.type != "cpu":
            return self(ids)
        S, order, parts = ids.shape[1], torch.argsort(lengths), []
        for rows in order.chunk(4):
            n = int(lengths[rows].max())
            parts.append(F.pad(self(ids[rows, :n]), (0, 0, 0, S - n)))
        return torch.cat(parts)[torch.argsort(order)]

    def extend(self, cache, starts, tokens, trees=None, parents=None):
        """Append new tokens to every row of a cache, in one forward pass. -> (all new tokens, D)

        starts (rows,): tokens that a row holds already. tokens: for every row its new ids (n,),
        perhaps none: a chain, each seeing all before it. With trees[row] = (depth (m,), seen (m, m)
        bool) the last m are a tree behind the chain: at position chain's end + depth, seeing the
        chain and what `seen` says. Only attention pads, a few neighbouring rows alike. cache None,
        to train: the tokens that a row holds are the first of row parents[row], whose own start is
        0; such rows come first."""
        def flat(arrays):
            return torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(self.device)

        counts, positions, masks = np.array([len(t) for t in tokens]), [], []
        for row, (start, n) in enumerate(zip(starts, counts)):
            depth, seen = trees[row] if trees else NO_TREE
            chain = n - len(depth)
            positions.append(start + np.concatenate([np.arange(chain), chain + depth]))
            masks.append(np.tri(n, dtype=bool))  # visibility among a row's new tokens
            masks[-1][chain:, chain:] = seen
        rows = flat([np.repeat(np.arange(len(counts)), counts)])
        slots = flat([start + np.arange(n) for start, n in zip(starts, counts)])
        if cache:
            cache.reserve(int((starts + counts).max()))
        step, whole = STRETCH[self.device.type], 0 if cache else np.count_nonzero(starts == 0)
        cuts = [*range(0, whole, step), *range(whole, len(counts), step), len(counts)]
        groups = [_stretch(self.config, slice(*cut), starts, counts, masks, parents, self.device)
                  for cut in zip(cuts, cuts[1:]) if counts[slice(*cut)].any()]

        def attend_in(layer):
            def attend(q, k, v):  # (N, heads, head_dim)
                if cache:
                    cache.k[layer][rows, :, slots] = k.to(cache.k.dtype)
                    cache.v[layer][rows, :, slots] = v.to(cache.v.dtype)
                    k, v = cache.k[layer], cache.v[layer]
                return torch.cat([group(q, k, v).to(q.dtype) for group in groups])
            return attend

        return self._run(self.model["embed_tokens"](flat(tokens)), flat(positions), attend_in)

    def _run(self, x, positions, attend_in):
        cos, sin, dtype = self.cos[positions], self.sin[positions], AUTOCAST.get(x.device.type)
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            for i, layer in enumerate(self.model["layers"]):
                x = layer(x, cos, sin, attend_in(i))
        return self.model["norm"](x)

    def logits(self, h):
        """(…, D) -> (…, V); the output matrix is the embedding."""
        return h @ self.model["embed_tokens"].weight.T

    def scores(self, h):
        """(…, D) -> (…): the PRM's score f, before any sigmoid."""
        return self.score(h).squeeze(-1)

    def with_score_head(self):
        """A PRM with this model's weights and a new head that starts at zero."""
        prm = Transformer(replace(self.config, head="score")).to(self.device)
        prm.model.load_state_dict(self.model.state_dict())
        nn.init.zeros_(prm.score.weight)
        return prm

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def is_finite(self):
        return all(bool(p.isfinite().all()) for p in self.parameters())

    def save(self, folder, **more):
        """Write `config.json`, with what is given, and `model.safetensors` into a folder."""
        c, folder = self.config, Path(folder)
        name = "Qwen3ForCausalLM" if c.head == "lm" else "Qwen3ForTokenClassification"
        (folder / "config.json").write_text(json.dumps({
            "architectures": [name], "model_type": "qwen3", "torch_dtype": "float32",
            **{theirs: getattr(c, ours) for ours, theirs in QWEN3.items()},
            "num_labels": 1, "tie_word_embeddings": True,
            "hidden_act": "silu", "attention_bias": False, "bos_token_id": None,
            "eos_token_id": 5, "pad_token_id": 0, **more}, indent=2) + "\n")
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})

    @classmethod
    def load(cls, folder, device="cpu"):
        """Read a folder written by `save`, or by transformers for a Qwen3 with tied embeddings."""
        d = json.loads(Path(folder, "config.json").read_text())
        d.setdefault("rope_theta", d.get("rope_parameters", {}).get("rope_theta"))
        if d.get("tie_word_embeddings") is not True:
            raise ValueError("its output matrix is not tied to its embedding")
        sizes = {ours: d[theirs] for ours, theirs in QWEN3.items()}
        if not all(type(x) in (int, float) and 0 < x < 2 ** 31 for x in sizes.values()):
            raise ValueError(f"sizes {sizes}")
        model = cls(Config(head="lm" if d["architectures"] == ["Qwen3ForCausalLM"] else "score",
                           **sizes))
        weights = load_file(str(Path(folder, "model.safetensors")))
        weights.pop("lm_head.weight", None)
        if not all(w.is_floating_point() for w in weights.values()):
            raise ValueError("its weights are not floating-point numbers")
        model.load_state_dict(weights)
        return model.to(device)


def _stretch(c, rows, starts, counts, masks, parents, device):
    """Attention of the new tokens of some neighbouring rows, padded side by side (see `extend`).

    -> attend(q (N, heads, head_dim), k and v) -> (n, …). k and v are those of the cache (rows, kv
    heads, length, head_dim), or with `parents` those of all new tokens (N, kv heads, head_dim)."""
    to = lambda array: torch.from_numpy(array).to(device)
    offsets = np.cumsum(counts) - counts  # of each row's first new token
    tokens = slice(offsets[rows][0], offsets[rows][-1] + counts[rows][-1])
    own, (starts, counts, masks) = offsets[rows], (x[rows] for x in (starts, counts, masks))
    b, S, T = len(counts), int(counts.max()), int((starts + counts).max())
    bias = np.full((b, S, T), -np.inf, np.float32)  # added to the attention logits
    for row, start, n, mask in zip(bias, starts, counts, masks):
        row[:n, :start] = 0
        row[:n, start:start + n][mask] = 0
        row[n:, 0] = 0  # padding sees something, so that no softmax is of nothing
    # The G query heads that share a kv head become G·S queries of it.
    bias = to(bias)[:, None].repeat(1, 1, c.n_heads // c.n_kv_heads, 1)
    place = to(np.nonzero((np.arange(S) < counts[:, None]).ravel())[0])  # of each token, padded
    if parents is not None:
        slot, first = np.arange(T), offsets[parents[rows]]
        held, new = slot < starts[:, None], slot - starts[:, None]
        seen = np.where(held, first[:, None] + slot, own[:, None] + new)
        seen = to(np.where(new < counts[:, None], seen, 0).ravel())  # the token in each slot

    def keys(x):  # -> (b, kv heads, T, head_dim)
        if parents is None:
            return x[rows, :, :T]
        return x.index_select(0, seen).unflatten(0, (b, T)).transpose(1, 2)

    def attend(q, k, v):
        padded = q.new_zeros(b * S, *q.shape[1:]).index_copy(0, place, q[tokens])
        q = padded.view(b, S, c.n_kv_heads, -1, q.shape[2]).permute(0, 2, 3, 1, 4).flatten(2, 3)
        k, v = keys(k), keys(v)
        o = F.scaled_dot_product_attention(q.to(k.dtype), k, v, bias.to(k.dtype))
        o = o.unflatten(2, (-1, S)).permute(0, 3, 1, 2, 4).reshape(padded.shape)
        return o.index_select(0, place)

    return attend


class Cache:
    """Keys and values of `rows` sequences: two tensors (layers, rows, kv heads, length, …)."""

    def __init__(self, config, rows, device="cpu"):
        shape = (config.n_layers, rows, config.n_kv_heads, 0, config.head_dim)
        dtype = AUTOCAST.get(torch.device(device).type, torch.float32)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))

    def reserve(self, length, step=256):
        """Make room for `length` tokens a row; the room grows in steps."""
        if length > self.k.shape[3]:
            more = -(-length // step) * step - self.k.shape[3]
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))

    def take(self, rows):
        """Keep these rows alone, in this order; a row may come several times."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def move(self, rows, source, target):
        """Copy the slots source (n,) of rows (n,) to the slots target (n,)."""
        for cached in (self.k, self.v):
            cached[:, rows, :, target] = cached[:, rows, :, source]

    def read(self, row, length):
        """A copy of the first `length` slots of a row."""
        return self.k[:, row, :, :length].clone(), self.v[:, row, :, :length].clone()

    def write(self, row, saved):
        """Put what `read` returned at the beginning of a row."""
        length = saved[0].shape[2]
        self.reserve(length)
        self.k[:, row, :, :length], self.v[:, row, :, :length] = saved
