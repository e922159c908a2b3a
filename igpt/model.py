"""The GPT that draws in any order: a transformer over cells in drawing order, with queries that know where they ask.

A cell is `cell` x `cell` tokens. Two streams of blocks after ARPG (Li et al. 2025, arXiv 2503.10568, section 3.2), and
a local head after the RQ-Transformer (Lee et al. 2022, arXiv 2203.01941, section 3.2.2; here without attention):

    content stream    label --> cell 1 --> cell 2 --> ...        causal self-attention over what is drawn, layers / 2
                        |         |          |                   blocks; each cell is rotated by its place (2-D RoPE)
                       k, v      k, v       k, v                 projected once, shared by all query blocks (YOCO)
                        |         |          |
                        +---------+----+-----+
                                       |
    query stream      place 3? --------+--> hidden state 3       cross-attention, layers / 2 blocks; each place asks
                      place 4? --------+--> hidden state 4       for itself: what belongs here?
                                                 |
    local head        its tokens 1, ..., j ------+--> logits of its token j + 1, by feed-forward layers

Notable choices:
- rotations carry the places, so the drawing order itself needs no code and any grid shape is legal;
- queries do not see each other, so many cells can be drawn in one step with an exact cache (YOCO, arXiv 2405.05254);
- cells drawn in one step cannot see each other, but the tokens within a cell can, thanks to the local head;
- RMSNorm, SwiGLU, QK-norm, no biases, a last layer that starts at zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import GPTConfig
from .cpu import Dropout, Linear, causal_attention
from .device import Graphs

NORM_EPS = 1e-5

# Cells and their places


def to_cells(grid_Bhw: Tensor, cell: int) -> Tensor:
    """Token grids to cells in raster order, the tokens of each likewise: [B, L, n], n = cell^2."""
    return rearrange(grid_Bhw, "b (h y) (w x) -> b (h w) (y x)", y=cell, x=cell)


def to_grid(cells_BLn: Tensor, rows: int, cell: int) -> Tensor:
    """The inverse of `to_cells`, for grids of `rows` rows of cells."""
    return rearrange(cells_BLn, "b (h w) (y x) -> b (h y) (w x)", h=rows, y=cell)


def cell_positions(rows: int, columns: int) -> Tensor:
    """Row and column of every cell in raster order, [rows * columns, 2] float32; (0, 0), the label's place, is the
    middle of the grid."""
    row, column = torch.arange(rows) - (rows - 1) / 2, torch.arange(columns) - (columns - 1) / 2
    return torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1).flatten(0, 1)


def freqs_cis(positions_BL2: Tensor, head_width: int, base: float) -> Tensor:
    """Cosines and sines [B, 1, L, E/2, 2] for `apply_rope`: half of the pairs turn by row, half by column.

    2-D RoPE (Su et al. 2021, arXiv 2104.09864, section 3.4.2, applied to each axis as in LlamaGen).
    """
    half = head_width // 2
    frequencies = base ** -(torch.arange(0, half, 2, device=positions_BL2.device).float() / half)
    angles = rearrange(positions_BL2.unsqueeze(-1) * frequencies, "b l side f -> b 1 l (side f)")
    if torch.compiler.is_compiling():
        return torch.stack([angles.cos(), angles.sin()], -1)
    return torch.view_as_real(torch.polar(torch.ones_like(angles), angles))


def apply_rope(x_BNLE: Tensor, freqs_B1LF2: Tensor) -> Tensor:
    """Turn neighbouring pairs of x; float32 in and out. As complex numbers, which takes a third of the time that
    products and sums of their parts take, except where it is compiled: Inductor knows none, and fuses the parts."""
    pairs = rearrange(x_BNLE, "b n l (f two) -> b n l f two", two=2)
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), freqs_B1LF2.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(freqs_B1LF2)).flatten(-2)


class KVCache:
    """Keys and values of everything drawn so far: one layer for each content block, the last one shared by all queries.

    Allocated once, like the first that comes, for `capacity` positions (label and cells); `length` of them are filled.
    """

    def __init__(self, layers: int, capacity: int):
        self.layers, self.capacity, self.length = layers, capacity, 0

    def extend(self, layer: int, k_BNLE: Tensor, v_BNLE: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values behind the filled part; the whole of it with them. `length` moves later, once."""
        end = self.length + k_BNLE.shape[2]
        if not (self.length or layer):
            shape = (self.layers, *k_BNLE.shape[:2], self.capacity, k_BNLE.shape[3])
            self.keys, self.values = k_BNLE.new_empty(shape), k_BNLE.new_empty(shape)
        self.keys[layer, :, :, self.length : end] = k_BNLE
        self.values[layer, :, :, self.length : end] = v_BNLE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


# Blocks


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202); gate and value come from one product."""

    def __init__(self, width: int):
        super().__init__()
        hidden = -(-8 * width // (3 * 64)) * 64
        self.gate_and_value = Linear(width, 2 * hidden)
        self.out = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Block(nn.Module):
    """Pre-norm attention and feed-forward around a residual stream."""

    def __init__(self, config: GPTConfig, projections: int):
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.RMSNorm(config.width, NORM_EPS)
        self.project = Linear(config.width, projections * config.width)
        self.q_norm = nn.RMSNorm(config.width // config.heads, NORM_EPS)
        self.attention_out = Linear(config.width, config.width)
        self.norm2 = nn.RMSNorm(config.width, NORM_EPS)
        self.feed_forward = FeedForward(config.width)
        self.dropout = Dropout(config.dropout)

    def residual(self, x_BLD: Tensor, attended_BNLE: Tensor) -> Tensor:
        """x and what attention found, [B, L, D], through the rest of the block."""
        x_BLD = x_BLD + self.dropout(self.attention_out(rearrange(attended_BNLE, "b n l e -> b l (n e)")))
        return x_BLD + self.dropout(self.feed_forward(self.norm2(x_BLD)))


class ContentBlock(Block):
    """Causal self-attention over what is drawn."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, projections=3)
        self.k_norm = nn.RMSNorm(config.width // config.heads, NORM_EPS)

    def forward(
        self, x_BLD: Tensor, freqs_B1LF2: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """[B, L, D] to [B, L, D]. `mask`: bool [L, cached + L]; None is causal, where there is more than one cell."""
        q, k, v = rearrange(self.project(self.norm1(x_BLD)), "b l (qkv n e) -> qkv b n l e", qkv=3, n=self.heads)
        q = apply_rope(self.q_norm(q.float()), freqs_B1LF2).type_as(v)
        k = apply_rope(self.k_norm(k.float()), freqs_B1LF2).type_as(v)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        causal = mask is None and q.shape[2] > 1
        attended = causal_attention(q, k, v) if causal else F.scaled_dot_product_attention(q, k, v, mask)
        return self.residual(x_BLD, attended)


class QueryBlock(Block):
    """Cross-attention from places to the shared keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__(config, projections=1)

    def forward(self, x_BLD: Tensor, freqs_B1LF2: Tensor, k_BNLE: Tensor, v_BNLE: Tensor, causal: bool) -> Tensor:
        """[B, L, D] to [B, L, D]. `causal`: query i sees the first i + 1 keys, else all see all."""
        q_BNLE = rearrange(self.project(self.norm1(x_BLD)), "b l (n e) -> b n l e", n=self.heads)
        q_BNLE = apply_rope(self.q_norm(q_BNLE.float()), freqs_B1LF2).type_as(v_BNLE)
        attention = causal_attention if causal else F.scaled_dot_product_attention
        return self.residual(x_BLD, attention(q_BNLE, k_BNLE, v_BNLE))


# Model


class GPT(nn.Module):
    """Logits for the tokens of any cell, given a label and any other cells in the order they were drawn."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, width = config, config.width
        self.frozen: frozenset[str] = frozenset()  # names of the parameters that a training leaves as they are
        self.draws_in = torch.float32
        self.graphs: Graphs | None = None  # of drawings, on a GPU
        self.tokens = nn.Embedding(config.vocab_size, width // config.cell**2)  # a cell is those of its tokens in a row
        self.labels = nn.Embedding(config.labels + 1, width)  # the last one is the null label
        self.query = nn.Parameter(torch.empty(width))
        self.content_blocks = nn.ModuleList(ContentBlock(config) for _ in range(config.layers // 2))
        self.shared_norm = nn.RMSNorm(width, NORM_EPS)
        self.shared_kv = Linear(width, 2 * width)
        self.shared_k_norm = nn.RMSNorm(width // config.heads, NORM_EPS)
        self.query_blocks = nn.ModuleList(QueryBlock(config) for _ in range(config.layers // 2))
        # Of the local head; `slots` (embeddings of the place within a cell) and `before` are names in model files.
        self.slots = nn.Parameter(torch.zeros(config.cell**2, width))
        self.before = Linear(width, width)
        self.head_norms = nn.ModuleList(nn.RMSNorm(width, NORM_EPS) for _ in range(config.head_layers))
        self.head_blocks = nn.ModuleList(FeedForward(width) for _ in range(config.head_layers))
        self.norm = nn.RMSNorm(width, NORM_EPS)
        self.head = Linear(width, config.vocab_size)
        self.dropout = Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02, smaller where they enter the residual stream (GPT-2), and a last layer of zeros."""
        for name, parameter in self.named_parameters():
            if name == "query" or (parameter.dim() == 2 and name != "slots"):
                into_stream = name.endswith((".attention_out.weight", ".out.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.layers) ** 0.5 if into_stream else 0.02)
        nn.init.zeros_(self.head.weight)

    @property
    def null_label(self) -> int:
        """The label that means "no label in particular"."""
        return self.config.labels

    def draw_in(self, dtype: torch.dtype) -> None:
        """Multiply in this precision when drawing (see `cpu.Linear`) where the GPT is now. The last layer stays in
        float32, as guidance multiplies differences of its logits; a GPU, slow in that, takes float16, eight times finer
        than bfloat16."""
        coarse = dtype == torch.bfloat16 and not self.query.is_cpu
        for module in self.modules():
            if isinstance(module, Linear):
                module.drawing_dtype = dtype
        self.head.drawing_dtype = torch.float16 if coarse else torch.float32
        self.draws_in, self.graphs = dtype, Graphs() if self.query.is_cuda else None

    def forward(
        self, cells_BLn: Tensor, positions_BL2: Tensor, labels_B: Tensor, targets_BLn: Tensor | None = None
    ) -> Tensor:
        """Logits [B, L, n, K] of every token of every cell in drawing order, given the label, the cells before it and
        the tokens before it in its cell.

        `positions_BL2` are the cells' places (`cell_positions`) in the same order. `targets_BLn` (default: the cells)
        are the tokens that the local head sees within a cell, where training puts noise into the cells.
        """
        # The content stream reads the label and all cells but the last; each is rotated by its place, the label by 0.
        content_BLD = torch.cat([self.labels(labels_B).unsqueeze(1), self.embed(cells_BLn[:, :-1])], dim=1)
        k, v = self.encode_content(self.dropout(content_BLD), self.freqs(F.pad(positions_BL2[:, :-1], (0, 0, 1, 0))))
        # The query stream asks for cell i at its place, and sees the first i entries of the content.
        hidden_BLD = self.decode_queries(self.freqs(positions_BL2), k, v, causal=True)
        # The local head gives token j of a cell the embeddings of the tokens before j; the others are zeros.
        embedded_BLnE = self.tokens(cells_BLn if targets_BLn is None else targets_BLn)
        earlier_nn = embedded_BLnE.new_ones(self.slots.shape[0], self.slots.shape[0]).tril(-1)
        earlier_BLnD = (embedded_BLnE.unsqueeze(2) * earlier_nn.unsqueeze(-1)).flatten(-2)
        return self.logits(hidden_BLD.unsqueeze(2) + self.slots + self.before(earlier_BLnD))

    # Drawing

    @torch.inference_mode()
    def init_cache(self, labels_B: Tensor, capacity: int) -> KVCache:
        """A cache that holds the labels and has room for `capacity` cells."""
        cache = KVCache(self.config.layers // 2 + 1, capacity + 1)
        nowhere_BL2 = self.query.new_zeros(len(labels_B), 1, 2)
        self.encode_content(self.labels(labels_B).unsqueeze(1), self.freqs(nowhere_BL2), cache)
        return cache

    @torch.inference_mode()
    def append(self, cells_BLn: Tensor, positions_BL2: Tensor, cache: KVCache) -> None:
        """Add drawn cells to the cache."""
        self.encode_content(self.embed(cells_BLn), self.freqs(positions_BL2), cache)

    @torch.inference_mode()
    def query_hidden(self, positions_BL2: Tensor, cache: KVCache) -> Tensor:
        """Hidden states [B, L, D] of the cells at these places, each given what the cache holds and no other cell."""
        k, v = cache.keys[-1, :, :, : cache.length], cache.values[-1, :, :, : cache.length]
        return self.decode_queries(self.freqs(positions_BL2), k, v, causal=False)

    @torch.inference_mode()
    def next_token(self, hidden_BLD: Tensor, earlier_BLj: Tensor) -> Tensor:
        """Logits [B, L, K] of the token of each cell that follows its first j tokens."""
        x_BLD = hidden_BLD + self.slots[earlier_BLj.shape[-1]]
        if earlier_BLj.shape[-1]:
            earlier_BLD = self.embed(earlier_BLj)
            x_BLD = x_BLD + self.before(F.pad(earlier_BLD, (0, self.config.width - earlier_BLD.shape[-1])))
        return self.logits(x_BLD)

    # The two streams and the head

    def embed(self, cells_BLn: Tensor) -> Tensor:
        """A cell is the embeddings of its tokens, one after another: [B, L, D]."""
        return self.tokens(cells_BLn).flatten(-2)

    def freqs(self, positions_BL2: Tensor) -> Tensor:
        """Rotations [B, 1, L, E/2] of cells at these places."""
        return freqs_cis(positions_BL2, self.config.width // self.config.heads, self.config.rope_base)

    def encode_content(self, x_BLD: Tensor, freqs_B1LF2: Tensor, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        """The content stream, down to the keys and values [B, N, L, E] that all query blocks share."""
        new, mask = x_BLD.shape[1], None
        if cache is not None and cache.length and new > 1:  # each new cell sees the old ones and the new up to itself
            mask = torch.ones(new, cache.length + new, dtype=torch.bool, device=x_BLD.device).tril(cache.length)
        for layer, block in enumerate(self.content_blocks):
            x_BLD = block(x_BLD, freqs_B1LF2, mask, cache, layer)
        kv = self.shared_kv(self.shared_norm(x_BLD))
        k, v = rearrange(kv, "b l (kv n e) -> kv b n l e", kv=2, n=self.config.heads)
        k = apply_rope(self.shared_k_norm(k.float()), freqs_B1LF2).type_as(v)
        if cache is not None:
            k, v = cache.extend(len(self.content_blocks), k, v)
            cache.length += new
        return k, v

    def decode_queries(self, freqs_B1LF2: Tensor, k_BNLE: Tensor, v_BNLE: Tensor, causal: bool) -> Tensor:
        """The query stream: one hidden state [B, L, D] for each place that `freqs_B1LF2` points at."""
        x_BLD = self.query.view(1, 1, -1)  # the same for all until the first block rotates its query
        for block in self.query_blocks:
            x_BLD = block(x_BLD, freqs_B1LF2, k_BNLE, v_BNLE, causal)
        return x_BLD

    def logits(self, x: Tensor) -> Tensor:
        """The feed-forward layers of the local head and the last layer: [..., D] to [..., K]."""
        for norm, feed_forward in zip(self.head_norms, self.head_blocks, strict=True):
            x = x + self.dropout(feed_forward(norm(x)))
        return self.head(self.norm(x))
