"""A small decoder transformer: RMSNorm, rotary positions, grouped-query attention with normed queries and keys, SwiGLU.

    model = Transformer(Config(vocab_size=700))               # policy: logits over the vocabulary
    prm = Transformer(Config(vocab_size=700, head="score"))   # PRM: one number a token
    h = model(ids)                                            # (B, S) -> hidden states (B, S, D)
    logits = model.logits(h[:, -1])                           # (B, V)

Layout and tensor names are Qwen3's (Llama's, and a norm of queries and keys): a saved model is a folder (`config.json`,
`model.safetensors`) that `transformers` opens as Qwen3ForCausalLM or Qwen3ForTokenClassification. The default has about a
million parameters.
"""

import json
import os
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

# fuse what is small in a layer: fewer kernels for a GPU to start; on a CPU 1.1 × in training, after a minute and a half (LOG.md)
COMPILE = os.environ.get("COMPILE") == "1"
AUTOCAST = {"cuda": torch.bfloat16}  # what layers compute in, and the cache holds, by type of device; the stream, weights and losses are float32


@dataclass
class Config:
    vocab_size: int
    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = 2
    hidden: int = 384
    max_len: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    head: str = "lm"  # "lm": logits, tied to the embedding; "score": one scalar a token; "relative": one that compares tokens of one state only


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, c):
        super().__init__()
        self.head_dim = c.dim // c.n_heads
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.self_attn = nn.ModuleDict({
            "q_proj": nn.Linear(c.dim, c.n_heads * self.head_dim, bias=False),
            "k_proj": nn.Linear(c.dim, c.n_kv_heads * self.head_dim, bias=False),
            "v_proj": nn.Linear(c.dim, c.n_kv_heads * self.head_dim, bias=False),
            "o_proj": nn.Linear(c.n_heads * self.head_dim, c.dim, bias=False),
            "q_norm": nn.RMSNorm(self.head_dim, eps=c.norm_eps),  # attention by content is learned many times sooner with them (LOG.md)
            "k_norm": nn.RMSNorm(self.head_dim, eps=c.norm_eps)})
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.mlp = nn.ModuleDict({
            "gate_proj": nn.Linear(c.dim, c.hidden, bias=False),
            "up_proj": nn.Linear(c.dim, c.hidden, bias=False),
            "down_proj": nn.Linear(c.hidden, c.dim, bias=False)})

        if COMPILE:  # all but attention, for any number of tokens
            self.project, self.finish = (torch.compile(half, dynamic=True) for half in (self.project, self.finish))

    def forward(self, x, cos, sin, attend):
        """x (…, D); cos, sin (…, head_dim); attend(q, k, v) -> (…, heads, head_dim) decides who sees whom."""
        return self.finish(x, attend(*self.project(x, cos, sin)))

    def project(self, x, cos, sin):
        """-> queries (…, heads, head_dim), keys and values (…, kv heads, head_dim)"""
        a, h = self.self_attn, self.input_layernorm(x)
        q, k, v = (a[p](h).float().unflatten(-1, (-1, self.head_dim)) for p in ("q_proj", "k_proj", "v_proj"))
        return rotate(a["q_norm"](q), cos, sin), rotate(a["k_norm"](k), cos, sin), v

    def finish(self, x, o):
        """The stream x (…, D) with what attention o (…, heads, head_dim) and the feed-forward add. -> (…, D)"""
        x, m = x + self.self_attn["o_proj"](o.flatten(-2)), self.mlp
        h = self.post_attention_layernorm(x)
        return x + m["down_proj"](F.silu(m["gate_proj"](h)) * m["up_proj"](h))


def rotate(x, cos, sin):
    """Rotary position embedding in Llama's half-split layout: x (…, heads, head_dim), cos and sin (…, head_dim)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(-2)


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        if c.dim % c.n_heads or c.n_heads % c.n_kv_heads or c.dim // c.n_heads % 2:
            raise ValueError(f"dim {c.dim} must be an even multiple of heads {c.n_heads}, and heads a multiple of kv heads {c.n_kv_heads}")
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(c.vocab_size, c.dim),
                                    "layers": nn.ModuleList(Layer(c) for _ in range(c.n_layers)),
                                    "norm": nn.RMSNorm(c.dim, eps=c.norm_eps)})
        if c.head != "lm":
            self.score = nn.Linear(c.dim, 1)
        half = c.dim // c.n_heads // 2
        angles = torch.outer(torch.arange(c.max_len), c.rope_theta ** (-torch.arange(half) / half))  # (T, head_dim / 2)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)
        self.apply(self._init)

    def _init(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, Layer):  # keep the stream's variance independent of depth, as GPT-2 does
            for p in (module.self_attn["o_proj"], module.mlp["down_proj"]):
                nn.init.normal_(p.weight, std=0.02 / (2 * self.config.n_layers) ** 0.5)

    def forward(self, ids, positions=None, mask=None):
        """Hidden states of whole sequences.

        ids (B, S); positions (B, S) and mask (B, S, S), True where row i may look at column j, for sequences that branch
        (tree.py); without them plain causal attention. Padding belongs at the end. -> (B, S, D)
        """
        x = self.model["embed_tokens"](ids)  # (B, S, D)
        positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
        cos, sin = self.cos[positions], self.sin[positions]
        mask = None if mask is None else mask.unsqueeze(1)

        def attend(q, k, v):  # (B, S, heads, head_dim)
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            return o.transpose(1, 2)

        return self._run(x, cos, sin, lambda layer: attend)

    def ragged(self, ids, lengths, positions=None, mask=None):
        """`forward` of a batch of sequences of very different lengths (B,) -> (B, S, D); what stands behind their ends means nothing.

        In random batches half of the places are padding. On a CPU that costs more than four passes over sequences of like length.
        """
        if ids.device.type != "cpu":
            return self(ids, positions, mask)
        S = ids.shape[1]
        cut = lambda t, rows, n: None if t is None else t[rows, :n] if t.ndim == 2 else t[rows, :n, :n]
        order, parts = torch.argsort(lengths), []
        for rows in order.chunk(4):
            longest = int(lengths[rows].max())
            h = self(cut(ids, rows, longest), cut(positions, rows, longest), cut(mask, rows, longest))
            parts.append(F.pad(h, (0, 0, 0, S - longest)))
        return torch.cat(parts)[torch.argsort(order)]

    def extend(self, ids, rows, slots, cache):
        """Append tokens to cached rows and return their hidden states.

        ids, rows, slots (N,): token n goes to place slots[n] of cache row rows[n]. The tokens of a row stand next to each
        other, in order, behind what the row already holds; rows ascend. -> (N, D)

        Rows bring different numbers of tokens: the matrix multiplications run on the N tokens without padding, and only
        attention pads, to the longest.
        """
        cache.reserve(int(slots.max()) + 1)
        last = torch.cat([rows[1:] != rows[:-1], rows.new_ones(1, dtype=torch.bool)])  # of its row's tokens
        groups = []  # (tokens, stretch of the cache), each to be attended by itself
        if 2 * int(last.sum()) > cache.rows:  # most rows are here: the last token of each, without padding, and those before it, by stretches
            for which, least in (last, 32), (~last, 4):
                step = max(least, -(-cache.rows // 4))
                for first in range(0, cache.rows, step):
                    stretch = slice(first, min(first + step, cache.rows))
                    groups.append((((rows >= stretch.start) & (rows < stretch.stop) & which).nonzero()[:, 0], stretch))
        else:
            groups.append((torch.arange(len(ids), device=ids.device), slice(0, cache.rows)))
        parts = [_Queries(self.config, rows[tokens], slots[tokens], tokens, stretch) for tokens, stretch in groups if len(tokens)]

        def attend_in(layer):
            def attend(q, k, v):  # (N, heads, head_dim)
                cache.k[layer][rows, :, slots] = k.to(cache.k.dtype)
                cache.v[layer][rows, :, slots] = v.to(cache.v.dtype)
                o = torch.empty_like(q)
                for part in parts:
                    o[part.tokens] = part.attend(q[part.tokens], cache.k[layer], cache.v[layer]).to(o.dtype)
                return o
            return attend

        return self._run(self.model["embed_tokens"](ids), self.cos[slots], self.sin[slots], attend_in)

    def _run(self, x, cos, sin, attend_in):
        dtype = AUTOCAST.get(x.device.type)
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            for i, layer in enumerate(self.model["layers"]):
                x = layer(x, cos, sin, attend_in(i))
        return self.model["norm"](x)

    def logits(self, h):
        """(…, D) -> (…, V); the output matrix is the embedding."""
        return h @ self.model["embed_tokens"].weight.T

    def scores(self, h):
        """(…, D) -> (…): the PRM's f, before any sigmoid."""
        return self.score(h).squeeze(-1)

    def with_score_head(self, head="score"):
        """A PRM that starts from this model's weights; its new head starts at zero."""
        prm = Transformer(Config(**{**asdict(self.config), "head": head})).to(self.cos.device)
        prm.model.load_state_dict(self.model.state_dict())
        nn.init.zeros_(prm.score.weight)
        return prm

    def n_parameters(self):
        return sum(p.numel() for p in self.parameters())

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder):
        """Write `config.json` and `model.safetensors` into an existing folder."""
        c, folder = self.config, Path(folder)
        architecture = "Qwen3ForCausalLM" if c.head == "lm" else "Qwen3ForTokenClassification"
        (folder / "config.json").write_text(json.dumps({
            "architectures": [architecture], "head": c.head, "model_type": "qwen3", "torch_dtype": "float32", "vocab_size": c.vocab_size,
            "hidden_size": c.dim, "intermediate_size": c.hidden, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
            "num_key_value_heads": c.n_kv_heads, "head_dim": c.dim // c.n_heads, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
            "num_labels": 1, "max_position_embeddings": c.max_len, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
            "bos_token_id": None, "eos_token_id": 5, "pad_token_id": 0}, indent=2) + "\n")
        save_file({k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}, str(folder / "model.safetensors"),
                  metadata={"format": "pt"})

    @classmethod
    def load(cls, folder, device="cpu"):
        """Read a folder written by `save` (or by transformers, for a Qwen3 with tied embeddings)."""
        folder = Path(folder)
        d = json.loads((folder / "config.json").read_text())
        rope_theta = d["rope_theta"] if "rope_theta" in d else d["rope_parameters"]["rope_theta"]  # transformers 4, 5
        model = cls(Config(d["vocab_size"], d["hidden_size"], d["num_hidden_layers"], d["num_attention_heads"], d["num_key_value_heads"],
                           d["intermediate_size"], d["max_position_embeddings"], rope_theta, d["rms_norm_eps"],
                           d.get("head", "lm" if d["architectures"] == ["Qwen3ForCausalLM"] else "score")))
        weights = load_file(str(folder / "model.safetensors"))
        weights.pop("lm_head.weight", None)
        model.load_state_dict(weights)
        return model.to(device)


class _Queries:
    """Attention of some tokens (n,) of an `extend`, those of a row padded side by side, over a stretch of cached rows.

    A stretch is read as far as its longest row: rows of like length should stand together.
    """

    def __init__(self, c, rows, slots, tokens, stretch):
        self.tokens, self.kv = tokens, c.n_kv_heads
        used, self.row, count = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
        self.within = torch.arange(len(tokens), device=rows.device) - (count.cumsum(0) - count)[self.row]
        self.S, self.T, size = int(count.max()), int(slots.max()) + 1, stretch.stop - stretch.start
        if 2 * len(used) > size:  # to read the stretch where it lies is cheaper than to copy half of it
            self.row, self.B = rows - stretch.start, size
            self.read = lambda cached: cached[stretch, :, :self.T]
        else:
            self.B = len(used)
            self.read = lambda cached: cached[:, :, :self.T].index_select(0, used)
        seen = torch.arange(self.T, device=rows.device) <= slots.new_zeros(self.B, self.S).index_put((self.row, self.within), slots)[..., None]
        # as a mask of truth values it would be turned into this by every layer
        bias = torch.zeros(seen.shape, device=rows.device).masked_fill_(~seen, -torch.inf)
        self.bias = bias[:, None].repeat(1, 1, c.n_heads // self.kv, 1)  # (B, 1, G·S, T)

    def attend(self, q, k, v):
        """q (n, heads, head_dim); k, v (rows, kv heads, length, head_dim) -> (n, heads, head_dim)"""
        padded = q.new_empty(self.B, self.S, *q.shape[1:])  # what stays empty is attended in vain, and dropped
        padded[self.row, self.within] = q
        # the G query heads that share a kv head become G·S queries of it: (B, kv, G·S, head_dim)
        grouped = padded.unflatten(2, (self.kv, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        o = F.scaled_dot_product_attention(grouped, self.read(k), self.read(v), attn_mask=self.bias)
        o = o.unflatten(2, (-1, self.S)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # (B, S, heads, head_dim)
        return o[self.row, self.within]


class Cache:
    """Keys and values of `rows` sequences of up to `length` tokens: two tensors (layers, rows, kv heads, length, head_dim)."""

    def __init__(self, config, rows, length, device="cpu"):
        dtype = AUTOCAST.get(torch.device(device).type, torch.float32)
        shape = (config.n_layers, rows, config.n_kv_heads, length, config.dim // config.n_heads)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.rows = rows

    def reserve(self, length, step=256):
        """Grow to hold `length` tokens a row, in steps: zeros cost time, and most episodes are short."""
        if length > self.k.shape[3]:
            more = -(-length // step) * step - self.k.shape[3]
            self.k, self.v = F.pad(self.k, (0, 0, 0, more)), F.pad(self.v, (0, 0, 0, more))

    def take(self, rows):
        """A cache of some of the rows alone."""
        other = copy(self)
        other.k, other.v, other.rows = self.k[:, rows], self.v[:, rows], len(rows)
        return other

    def read(self, row, length):
        """A copy of the first `length` places of a row."""
        return self.k[:, row, :, :length].clone(), self.v[:, row, :, :length].clone()

    def write(self, row, saved):
        """Start a row with what `read` returned."""
        k, v = saved
        self.reserve(k.shape[2])
        self.k[:, row, :, :k.shape[2]] = k
        self.v[:, row, :, :v.shape[2]] = v
