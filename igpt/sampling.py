"""Sampling tokens: pure functions (how many cells a step, filters, guidance) and one generator that uses them.

`sample` yields the grid after every step; progress, previews and time-lapses are built on it. Randomness comes from one
CPU generator a picture, so a seed means the same picture in any batch and on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import SamplingOptions
from .model import GPT, cell_positions, to_cells, to_grid

COLDEST = 1e-5  # logits over less would overflow; the likeliest token is what is meant

# Pure functions


def cells_per_step(cells: int, steps: int) -> list[int]:
    """How many cells each step draws: few at first, when little is known, many at the end; at least one each.

    The arccos schedule of ARPG (arXiv 2503.10568, section 4.1): after step t of T, arccos(t / T) / (pi / 2) are left.
    """
    steps, left = min(steps, cells), [cells]
    for t in range(1, steps + 1):
        scheduled = int(cells * math.acos(t / steps) / (math.pi / 2))
        left.append(max(min(scheduled, left[-1] - 1), steps - t))
    return [before - after for before, after in pairwise(left)]


def keep_top_k(logits_K: Tensor, k: int) -> Tensor:
    """All but the k largest along the last axis become -inf; 0 keeps all."""
    if not 0 < k < logits_K.shape[-1]:
        return logits_K
    return logits_K.masked_fill(logits_K < logits_K.topk(k, dim=-1).values[..., -1:], -math.inf)


def keep_top_p(logits_K: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens that hold the probability p together (Holtzman et al. 2020, arXiv 1904.09751)."""
    if p >= 1:
        return logits_K
    # numpy, because it sorts values alone, which is five times as fast as torch's sorting of values and places.
    rising = torch.from_numpy(np.sort(logits_K.numpy(), axis=-1))
    too_many = (rising.softmax(-1).cumsum(-1) <= 1 - p).sum(-1, keepdim=True).clamp(max=logits_K.shape[-1] - 1)
    return logits_K.masked_fill(logits_K < rising.gather(-1, too_many), -math.inf)


def guidance_delta(cond: Tensor, uncond: Tensor, weight: Tensor | float) -> Tensor:
    """weight * (cond - uncond): what classifier-free guidance adds to the logits without label (Ho & Salimans 2022,
    arXiv 2207.12598, equation 6). A weight of 1 leads to those with label, 0 forgets the label."""
    return weight * (cond - uncond)


def sample_token(logits_K: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """The token at quantile `uniform` (0..1, shape of the logits less the last axis) of the filtered distribution."""
    if options.temperature < COLDEST:
        return logits_K.argmax(-1)
    logits_K = keep_top_p(keep_top_k(logits_K / options.temperature, options.top_k), options.top_p)
    # float64, because the sum of thousands of float32 probabilities would move the borders between tokens.
    cdf_K = logits_K.softmax(-1).cumsum(-1, dtype=torch.float64)
    quantile = uniform.double().unsqueeze(-1) * cdf_K[..., -1:]
    return torch.searchsorted(cdf_K, quantile, right=True).squeeze(-1).clamp(max=logits_K.shape[-1] - 1)


# The sampler


class Step(NamedTuple):
    """Grids of tokens on their way."""

    tokens_Bhw: Tensor  # drawn and given tokens; 0 where nothing is known yet
    known_Bhw: Tensor  # bool


class Known(NamedTuple):
    """What is there before anything is drawn. Masks are bool, [h, w] or [B, h, w]."""

    tokens_Bhw: Tensor
    known_hw: Tensor  # tokens that are taken as they are
    mask_hw: Tensor | None = None  # only cells in which a token is named are drawn; None: all


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the first is seeded with `seed`, the next with `seed + 1`, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def drawing_orders(mask_BL: Tensor, order: str, seeds: Sequence[torch.Generator]) -> Tensor:
    """The numbers of the cells in a bool mask, equally many in each row, in the order of drawing, [B, M]."""
    rows = [mask_L.nonzero().squeeze(-1) for mask_L in mask_BL]
    if order == "random":
        rows = [row[torch.randperm(len(row), generator=g)] for row, g in zip(rows, seeds, strict=True)]
    return torch.stack(rows)


def _in_cells(known: Known | None, batch: int, grid: tuple[int, int], cell: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (0 where unknown), which are known and which to draw, each [B, L, n]: L cells of n tokens."""
    nothing_hw = torch.zeros(grid, dtype=torch.bool)
    given = known or Known(nothing_hw.long(), nothing_hw)
    parts = (given.tokens_Bhw, given.known_hw, ~nothing_hw if given.mask_hw is None else given.mask_hw)
    tokens_BLn, known_BLn, mask_BLn = (to_cells(x.cpu().expand(batch, *grid), cell) for x in parts)
    return torch.where(known_BLn, tokens_BLn, 0), known_BLn, mask_BLn


@torch.inference_mode()
def sample(
    gpt: GPT,
    labels_B: Tensor,
    grid: tuple[int, int],
    options: SamplingOptions,
    seeds: Sequence[torch.Generator],
    known: Known | None = None,
) -> Iterator[Step]:
    """Draw len(labels_B) grids of h x w tokens (whole cells), yielding after every step; the last one is complete.

    Given tokens are never redrawn. The model sees the cells that are given whole; of a cell given in part, the rest is
    drawn to what comes before it in the cell. What is neither given nor to be drawn stays unknown. All grids of a batch
    must have equally many cells to see and to draw. The first thing yielded is the grid as given, before any step.
    """
    cell, device, labels_B = gpt.config.cell, gpt.query.device, labels_B.cpu()
    rows, columns = grid[0] // cell, grid[1] // cell
    tokens_BLn, known_BLn, mask_BLn = _in_cells(known, len(labels_B), grid, cell)
    grids_B1 = torch.arange(len(labels_B)).unsqueeze(1)  # x[grids_B1, cells_BM] are these cells of each grid
    # Where guidance compares, every grid is in the batch a second time, without its label.
    labelled_B11 = (labels_B != gpt.null_label).view(-1, 1, 1)
    copies = 2 if options.guidance != 1 and bool(labelled_B11.any()) else 1
    both = torch.cat([labels_B, torch.full_like(labels_B, gpt.null_label)][:copies])
    positions_L2, cache = cell_positions(rows, columns), gpt.init_cache(both.to(device), rows * columns)

    def copied(x: Tensor) -> Tensor:
        return x.to(device).repeat(copies, 1, 1)

    # The cells that are given whole become the first of the content, in a random order.
    whole_BL = known_BLn.all(-1)
    orders_BM = drawing_orders(mask_BLn.any(-1) & ~whole_BL, options.order, seeds)
    if whole_BL.any():
        seen_BM = drawing_orders(whole_BL, "random", seeds)
        gpt.append(copied(tokens_BLn[grids_B1, seen_BM]), copied(positions_L2[seen_BM]), cache)
    yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))

    total, drawn = orders_BM.shape[1], 0
    for count in cells_per_step(total, total if options.order == "raster" else options.steps):
        # All cells of a step at once, and within each one token after the other.
        cells_BM = orders_BM[:, drawn : drawn + count]
        drawn += count
        hidden = gpt.query_hidden(copied(positions_L2[cells_BM]), cache)
        uniform_BMn = torch.stack([torch.rand(count, cell**2, generator=g, dtype=torch.float64) for g in seeds])
        given_BMn, tokens_BMn = known_BLn[grids_B1, cells_BM], tokens_BLn[grids_B1, cells_BM]
        # Guidance grows with the share that is drawn: strong early guidance would make all pictures alike.
        weight_B11 = torch.where(labelled_B11, 1 + (options.guidance - 1) * (drawn / total), 1.0)
        for j in range(cell**2):
            logits_BMK = gpt.next_token(hidden, copied(tokens_BMn[..., :j])).float().cpu()
            if copies == 2:
                cond, uncond = logits_BMK.chunk(2)
                logits_BMK = uncond + guidance_delta(cond, uncond, weight_B11)
            token_BM = sample_token(logits_BMK, uniform_BMn[..., j], options)
            tokens_BMn[..., j] = torch.where(given_BMn[..., j], tokens_BMn[..., j], token_BM)
        # They become known, and content of all later ones.
        tokens_BLn, known_BLn = tokens_BLn.clone(), known_BLn.clone()
        tokens_BLn[grids_B1, cells_BM], known_BLn[grids_B1, cells_BM] = tokens_BMn, True
        yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))
        if drawn < total:
            gpt.append(copied(tokens_BMn), copied(positions_L2[cells_BM]), cache)
