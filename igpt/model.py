"""The GPT that draws in any order: a causal transformer over tokens in drawing order, with position-aware queries.

After ARPG (Li et al. 2025, arXiv 2503.10568, section 3.2). Notable choices:
- content blocks read [label, x_1, ..., x_(n-1)] in drawing order; each token is rotated by its own cell (2-D RoPE), so
  the order itself needs no code and any grid shape is legal;
- query blocks ask "what is at this cell?": one learned vector rotated by the *target* cell, cross-attending to keys and
  values projected once from the content stream and shared by all query blocks (YOCO, arXiv 2405.05254);
- queries do not see each other, so many cells can be drawn in one step with an exact cache;
- RMSNorm, SwiGLU, QK-norm, no biases, head that starts at zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import GPTConfig
from .linear import Linear

# Positions


def cell_positions(h: int, w: int, centred: bool) -> Tensor:
    """Row and column of every cell of a grid in raster order, [h * w, 2] float32.

    Centred grids have (0, 0), where the unrotated label sits, in their middle, whatever their shape.
    """
    rows, columns = torch.arange(h).float(), torch.arange(w).float()
    if centred:
        rows, columns = rows - (h - 1) / 2, columns - (w - 1) / 2
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)


def turns(positions_BL2: Tensor, head_width: int, base: float) -> Tensor:
    """Unit complex numbers [B, 1, L, E/2] by which `rotate` turns: half of the pairs by row, half by column.

    2-D RoPE (Su et al. 2021, arXiv 2104.09864, section 3.4.2, applied to each axis as in LlamaGen).
    """
    half = head_width // 2
    frequencies = base ** -(torch.arange(0, half, 2, device=positions_BL2.device).float() / half)
    angles = rearrange(positions_BL2.unsqueeze(-1) * frequencies, "b l side f -> b 1 l (side f)")
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x_BNLE: Tensor, turns_B1LF: Tensor) -> Tensor:
    """Turn neighbouring pairs of x, as complex numbers; float32 in and out."""
    pairs = torch.view_as_complex(rearrange(x_BNLE, "b n l (f two) -> b n l f two", two=2))
    return torch.view_as_real(pairs * turns_B1LF).flatten(-2)


# Dropout


class Dropout(nn.Dropout):
    """nn.Dropout, which on a CPU draws a random number for every element: a tenth of a training step.

    Here every element has 16 of a number's 64 bits, so that p is met to 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = bits.view(torch.int16)[: x.numel()].view_as(x)  # -32768 to 32767
        kept = round((1 - self.p) * 65536)
        return x * (levels < kept - 32768).type_as(x).mul_(65536 / max(1, kept))


# Attention


def attend(q_BNLE: Tensor, k_BNLE: Tensor, v_BNLE: Tensor) -> Tensor:
    """Causal attention by plain products, for training in bfloat16 on a CPU: torch's fused kernel there takes two to
    three times as long, most of it on the way back. Scores are rounded to bfloat16, which only training can bear."""
    hidden = torch.ones(q_BNLE.shape[-2], k_BNLE.shape[-2], dtype=torch.bool, device=q_BNLE.device).triu(1)
    scores_BNLL = q_BNLE * q_BNLE.shape[-1] ** -0.5 @ k_BNLE.mT
    weights_BNLL: Tensor = scores_BNLL.masked_fill(hidden, -torch.inf).softmax(-1).type_as(v_BNLE)
    return weights_BNLL @ v_BNLE


# Cache


class Cache:
    """Keys and values of everything drawn so far: one slot for each content block and one that the queries share.

    Allocated once for `capacity` positions (label and cells); `length` says how many are filled.
    """

    def __init__(self, config: GPTConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.layers // 2 + 1, batch, config.heads, capacity, config.width // config.heads)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, slot: int, k_BNLE: Tensor, v_BNLE: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled part; the whole of it with them. `length` moves later, once."""
        end = self.length + k_BNLE.shape[2]
        self.keys[slot, :, :, self.length : end] = k_BNLE
        self.values[slot, :, :, self.length : end] = v_BNLE
        return self.keys[slot, :, :, :end], self.values[slot, :, :, :end]


# Blocks


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202); gate and value come from one product."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        hidden = config.hidden or -(-8 * config.width // (3 * 64)) * 64
        self.gate_and_value = Linear(config.width, 2 * hidden)
        self.out = Linear(hidden, config.width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x_BLD).chunk(2, dim=-1)
        out: Tensor = self.out(F.silu(gate) * value)
        return out


class Block(nn.Module):
    """Norm, attention, norm, feed-forward around a residual stream."""

    def __init__(self, config: GPTConfig, projections: int):
        super().__init__()
        self.heads = config.heads
        head_width = config.width // config.heads
        self.norm1 = nn.RMSNorm(config.width, config.norm_eps)
        self.project = Linear(config.width, projections * config.width)
        self.q_norm = nn.RMSNorm(head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.attention_out = Linear(config.width, config.width)
        self.norm2 = nn.RMSNorm(config.width, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def mix(self, x_BLD: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """The rest of the block once queries, keys and values [B, N, L, E] are there."""
        learning = causal and q.is_cpu and q.dtype == torch.bfloat16 and q.requires_grad
        attended = attend(q, k, v) if learning else F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        x_BLD = x_BLD + self.dropout(self.attention_out(rearrange(attended, "b n l e -> b l (n e)")))
        out: Tensor = x_BLD + self.dropout(self.feed_forward(self.norm2(x_BLD)))
        return out


class ContentBlock(Block):
    """Causal self-attention over what is drawn."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, projections=3)
        head_width = config.width // config.heads
        self.k_norm = nn.RMSNorm(head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x_BLD: Tensor, turns_B1LF: Tensor, mask: Tensor | None, cache: Cache | None, slot: int
    ) -> Tensor:
        q, k, v = rearrange(self.project(self.norm1(x_BLD)), "b l (qkv n e) -> qkv b n l e", qkv=3, n=self.heads)
        q = rotate(self.q_norm(q.float()), turns_B1LF).type_as(v)
        k = rotate(self.k_norm(k.float()), turns_B1LF).type_as(v)
        if cache is not None:
            k, v = cache.extend(slot, k, v)
        return self.mix(x_BLD, q, k, v, mask, causal=mask is None and q.shape[2] > 1)


class QueryBlock(Block):
    """Cross-attention from target cells to the shared keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, projections=1)

    def forward(self, x_BLD: Tensor, turns_B1LF: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        q = rearrange(self.project(self.norm1(x_BLD)), "b l (n e) -> b n l e", n=self.heads)
        q = rotate(self.q_norm(q.float()), turns_B1LF).type_as(v)
        return self.mix(x_BLD, q, k, v, mask=None, causal=causal)


# Model


class GPT(nn.Module):
    """Logits for any cell, given a label and any other cells in the order they were drawn."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.layers % 2 or config.width % (4 * config.heads):
            raise ValueError(
                f"got {config.layers} layers, {config.width} wide, {config.heads} heads; an even number of layers and "
                "a width that is a multiple of 4 * heads are wanted"
            )
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.labels = nn.Embedding(config.labels + 1, config.width)  # the last one is the null label
        self.query = nn.Parameter(torch.empty(config.width))
        self.content_blocks = nn.ModuleList(ContentBlock(config) for _ in range(config.layers // 2))
        self.shared_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.shared_kv = Linear(config.width, 2 * config.width)
        head_width = config.width // config.heads
        self.shared_k_norm = nn.RMSNorm(head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.query_blocks = nn.ModuleList(QueryBlock(config) for _ in range(config.layers // 2))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size)
        self.dropout = Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02, smaller where they enter the residual stream (GPT-2), and a head of zeros."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 or name == "query":
                into_stream = name.endswith(("attention_out.weight", "feed_forward.out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if into_stream else 0.02)
        nn.init.zeros_(self.head.weight)

    @property
    def null_label(self) -> int:
        """The label that means "no label in particular"."""
        return self.config.labels

    def draw_in(self, dtype: torch.dtype) -> None:
        """Multiply in this precision when drawing on a CPU (see `linear.py`). The head stays in float32: guidance
        multiplies differences between what it is given."""
        for module in self.modules():
            if isinstance(module, Linear) and module is not self.head:
                module.drawing_dtype = dtype

    def forward(self, tokens_BL: Tensor, positions_BL2: Tensor, labels_B: Tensor) -> Tensor:
        """Logits [B, L, K] of every token of a sequence in drawing order, each given the label and those before it.

        `positions_BL2` are the tokens' cells (`cell_positions`) in the same order. The last token is only a target.
        """
        turns_B1LF = self.turns(positions_BL2)
        content_BLD = torch.cat([self.labels(labels_B).unsqueeze(1), self.tokens(tokens_BL[:, :-1])], dim=1)
        known = torch.cat([self.label_turn(turns_B1LF), turns_B1LF[:, :, :-1]], dim=2)
        k, v = self.read(self.dropout(content_BLD), known)
        logits_BLK: Tensor = self.head(self.norm(self.ask(turns_B1LF, k, v, causal=True)[0]))
        return logits_BLK

    @torch.inference_mode()
    def start(self, labels_B: Tensor, capacity: int) -> Cache:
        """A cache that holds the labels and has room for `capacity` cells."""
        cache = Cache(self.config, len(labels_B), capacity + 1, self.query.device, self.query.dtype)
        nowhere = torch.zeros(len(labels_B), 1, 2, device=self.query.device)
        self.read(self.labels(labels_B).unsqueeze(1), self.label_turn(self.turns(nowhere)), cache)
        return cache

    @torch.inference_mode()
    def remember(self, tokens_BL: Tensor, positions_BL2: Tensor, cache: Cache) -> None:
        """Add drawn tokens to the cache."""
        self.read(self.tokens(tokens_BL), self.turns(positions_BL2), cache)

    @torch.inference_mode()
    def predict(self, positions_BL2: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
        """What belongs at cells, each given what the cache holds and nothing of one another, [B, L, D]: the last word,
        and the opinion before the last query block. `head` makes logits [B, L, K] of either, or of a mixture: it is
        linear, so guidance can come before it."""
        k, v = cache.keys[-1, :, :, : cache.length], cache.values[-1, :, :, : cache.length]
        last, before = self.ask(self.turns(positions_BL2), k, v, causal=False)
        return self.norm(last), self.norm(before.expand_as(last))

    # The two streams

    def read(self, x_BLD: Tensor, turns_B1LF: Tensor, cache: Cache | None = None) -> tuple[Tensor, Tensor]:
        """The content stream, down to the keys and values [B, N, L, E] that all query blocks share."""
        new, mask = x_BLD.shape[1], None
        if cache is not None and cache.length and new > 1:  # each new token sees the old ones and the new up to itself
            mask = torch.ones(new, cache.length + new, dtype=torch.bool, device=x_BLD.device).tril(cache.length)
        for slot, block in enumerate(self.content_blocks):
            x_BLD = block(x_BLD, turns_B1LF, mask, cache, slot)
        kv = self.shared_kv(self.shared_norm(x_BLD))
        k, v = rearrange(kv, "b l (kv n e) -> kv b n l e", kv=2, n=self.config.heads)
        k = rotate(self.shared_k_norm(k.float()), turns_B1LF).type_as(v)
        if cache is not None:
            k, v = cache.extend(len(self.content_blocks), k, v)
            cache.length += x_BLD.shape[1]
        return k, v

    def ask(self, turns_B1LF: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        """The query stream of the cells that `turns_B1LF` point at, after its last block and before it."""
        before = x_BLD = self.query.view(1, 1, -1)  # the same for all until the first block turns its query
        for block in self.query_blocks:
            before, x_BLD = x_BLD, block(x_BLD, turns_B1LF, k, v, causal)
        return x_BLD, before

    def turns(self, positions_BL2: Tensor) -> Tensor:
        return turns(positions_BL2, self.config.width // self.config.heads, self.config.rope_base)

    def label_turn(self, turns_B1LF: Tensor) -> Tensor:
        """The label is not rotated: it is turned by one, everywhere (or blanked, see GPTConfig)."""
        return torch.full_like(turns_B1LF[:, :, :1], self.config.label_turn)
