"""Sampling tokens: pure functions (how many cells a step, filters, guidance) and one generator that uses them.

`sample` yields the grid after every step; progress, previews and time-lapses are built on it. Randomness comes from one
CPU generator a picture, so a seed means the same picture in any batch and on any device. All that a drawing starts with
(`Plan`) goes to the device at once; `draw` then never waits for the device, and its shapes do not depend on what is
drawn, so that a GPU may replay it whole (`device.Graphs`).
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
    rising = torch.from_numpy(np.sort(logits_K.numpy(), axis=-1)) if logits_K.is_cpu else logits_K.sort(-1).values
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


class Plan(NamedTuple):
    """What a drawing starts with: cells that are seen (S of them) and cells to draw (M), in order."""

    labels_B: Tensor
    seen_BSn: Tensor
    seen_BS2: Tensor  # their places
    tokens_BMn: Tensor  # 0 where not given
    given_BMn: Tensor  # bool: tokens that are not drawn
    positions_BM2: Tensor
    uniform_BMn: Tensor  # float64: the quantiles at which tokens are drawn


def draw(gpt: GPT, plan: Plan, counts: Sequence[int], options: SamplingOptions, guided: bool) -> Iterator[Tensor]:
    """The tokens of the cells of a plan, [B, M, n], after every step; so many cells are drawn in each."""
    device, total, drawn = gpt.query.device, plan.tokens_BMn.shape[1], 0
    # Where guidance compares, every grid is in the batch a second time, without its label.
    copies, labelled_B11 = 1 + guided, (plan.labels_B != gpt.null_label).view(-1, 1, 1)
    both = torch.cat([plan.labels_B, torch.full_like(plan.labels_B, gpt.null_label)][:copies])
    cache = gpt.init_cache(both.to(device), plan.seen_BSn.shape[1] + total)

    def copied(x: Tensor) -> Tensor:
        return x.to(device).repeat(copies, 1, 1)

    if plan.seen_BSn.shape[1]:
        gpt.append(copied(plan.seen_BSn), copied(plan.seen_BS2), cache)
    tokens_BMn = plan.tokens_BMn.clone()
    for count in counts:
        # All cells of a step at once, and within each one token after the other.
        now = slice(drawn, drawn + count)
        drawn += count
        hidden = gpt.query_hidden(copied(plan.positions_BM2[:, now]), cache)
        # Guidance grows with the share that is drawn: strong early guidance would make all pictures alike.
        weight_B11 = torch.where(labelled_B11, 1 + (options.guidance - 1) * (drawn / total), 1.0)
        for j in range(tokens_BMn.shape[2]):
            logits_BMK = gpt.next_token(hidden, copied(tokens_BMn[:, now, :j])).float().to(tokens_BMn.device)
            if guided:
                cond, uncond = logits_BMK.chunk(2)
                logits_BMK = uncond + guidance_delta(cond, uncond, weight_B11)
            token_BM = sample_token(logits_BMK, plan.uniform_BMn[:, now, j], options)
            tokens_BMn[:, now, j] = torch.where(plan.given_BMn[:, now, j], tokens_BMn[:, now, j], token_BM)
        yield tokens_BMn
        # They become content of all later ones.
        if drawn < total:
            gpt.append(copied(tokens_BMn[:, now]), copied(plan.positions_BM2[:, now]), cache)


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
    cell, (rows, columns), labels_B = gpt.config.cell, (side // gpt.config.cell for side in grid), labels_B.cpu()
    tokens_BLn, known_BLn, mask_BLn = _in_cells(known, len(labels_B), grid, cell)
    yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))
    # The cells that are given whole become the first of the content, in a random order.
    whole_BL, grids_B1 = known_BLn.all(-1), torch.arange(len(labels_B)).unsqueeze(1)  # x[grids_B1, cells_BM]: of each
    orders_BM = drawing_orders(mask_BLn.any(-1) & ~whole_BL, options.order, seeds)
    seen_BS = drawing_orders(whole_BL, "random" if whole_BL.any() else "raster", seeds)
    positions_L2, total = cell_positions(rows, columns), orders_BM.shape[1]
    counts = cells_per_step(total, total if options.order == "raster" else options.steps)
    uniform_BMn = torch.stack([torch.rand(total, cell**2, generator=g, dtype=torch.float64) for g in seeds])
    seen, asked = (tokens_BLn[grids_B1, seen_BS], positions_L2[seen_BS]), tokens_BLn[grids_B1, orders_BM]
    parts = (labels_B, *seen, asked, known_BLn[grids_B1, orders_BM], positions_L2[orders_BM], uniform_BMn)
    # Apple's GPUs have no float64: there tokens are drawn on the CPU, and only the GPT is on the GPU.
    plan = Plan(*(x.to("cpu" if gpt.query.device.type == "mps" else gpt.query.device) for x in parts))
    guided = options.guidance != 1 and bool((labels_B != gpt.null_label).any())
    for step, tokens_BMn in enumerate(_drawn(gpt, plan, counts, options, guided)):
        new = grids_B1, orders_BM[:, : sum(counts[: step + 1])]
        tokens_BLn, known_BLn = tokens_BLn.clone(), known_BLn.clone()
        tokens_BLn[new], known_BLn[new] = tokens_BMn[:, : new[1].shape[1]], True
        yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))


def _drawn(gpt: GPT, plan: Plan, counts: Sequence[int], options: SamplingOptions, guided: bool) -> Iterator[Tensor]:
    """`draw`, on the CPU: step by step, or where a GPU may replay it, all steps before the first is seen."""
    if gpt.graphs is None or not counts:
        return (tokens_BMn.cpu() for tokens_BMn in draw(gpt, plan, counts, options, guided))

    def work(*parts: Tensor) -> Tensor:
        *_, tokens_BMn = draw(gpt, Plan(*parts), counts, options, guided)
        return tokens_BMn

    weights = [(weight.data_ptr(), weight.is_inference() or weight._version) for weight in gpt.parameters()]
    key = (weights, counts, options, guided, [x.shape for x in plan])
    return iter([gpt.graphs(key, work, plan).cpu()] * len(counts))
