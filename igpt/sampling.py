"""Drawing tokens: pure functions (how many cells a step, filter, guide, draw) and one generator that uses them.

`draw` yields the grid after every step; progress, previews and time-lapses are built on it. Randomness comes from one
CPU generator a picture, so a seed means the same picture in any batch and on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    if not cells:
        return []
    steps = min(steps, cells)
    counts, left = [], cells
    for step in range(1, steps + 1):
        wanted = int(cells * math.acos(step / steps) / (math.pi / 2))
        remaining = max(min(wanted, left - 1), steps - step)
        counts.append(left - remaining)
        left = remaining
    return counts


def keep_top_k(logits_K: Tensor, k: int) -> Tensor:
    """All but the k largest along the last axis become -inf; 0 keeps all."""
    if not 0 < k < logits_K.shape[-1]:
        return logits_K
    smallest_kept = logits_K.topk(k, dim=-1).values[..., -1:]
    return logits_K.masked_fill(logits_K < smallest_kept, -math.inf)


def keep_top_p(logits_K: Tensor, p: float) -> Tensor:
    """The fewest likeliest tokens that hold the probability p together (Holtzman et al. 2020, arXiv 1904.09751)."""
    if p >= 1:
        return logits_K
    # numpy, because it sorts values alone, which is five times as fast as torch's sorting of values and places.
    rising = torch.from_numpy(np.sort(logits_K.numpy(), axis=-1))
    too_many = (rising.softmax(-1).cumsum(-1) <= 1 - p).sum(-1, keepdim=True).clamp(max=logits_K.shape[-1] - 1)
    return logits_K.masked_fill(logits_K < rising.gather(-1, too_many), -math.inf)


def guide(with_label: Tensor, without: Tensor, weight: Tensor | float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6): without + weight * (with - without).

    A weight of 1 leaves the logits as they are, 0 forgets the label.
    """
    return without + weight * (with_label - without)


def sample_token(logits_K: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """The token at quantile `uniform` (0..1, shape of the logits less the last axis) of the filtered distribution."""
    if options.temperature < COLDEST:
        return logits_K.argmax(-1)
    logits_K = keep_top_p(keep_top_k(logits_K / options.temperature, options.top_k), options.top_p)
    # float64, because the sum of thousands of float32 probabilities would move the borders between tokens.
    cumulative = logits_K.softmax(-1).cumsum(-1, dtype=torch.float64)
    targets = uniform.double().unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, targets, right=True).squeeze(-1).clamp(max=logits_K.shape[-1] - 1)


# The sampler


class Step(NamedTuple):
    tokens_Bhw: Tensor  # drawn and given tokens; 0 where nothing is known yet
    known_Bhw: Tensor  # bool


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the first is seeded with `seed`, the next with `seed + 1`, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def drawing_orders(cells_BL: Tensor, order: str, seeds: Sequence[torch.Generator]) -> Tensor:
    """The numbers of the cells that a bool mask names, equally many in each row, in the order of drawing, [B, M]."""
    rows = []
    for cells_L, generator in zip(cells_BL, seeds, strict=True):
        cells = cells_L.nonzero().squeeze(-1)
        rows.append(cells if order == "raster" else cells[torch.randperm(len(cells), generator=generator)])
    return torch.stack(rows)


@torch.inference_mode()
def draw(
    gpt: GPT,
    labels_B: Tensor,
    grid: tuple[int, int],
    options: SamplingOptions,
    seeds: Sequence[torch.Generator],
    given_Bhw: Tensor | None = None,
    given_hw: Tensor | None = None,
    wanted_hw: Tensor | None = None,
) -> Iterator[Step]:
    """Draw len(labels_B) grids of h x w tokens (whole cells), yielding after every step; the last one is complete.

    Tokens where the bool mask `given_hw` is true are taken from `given_Bhw` and never redrawn. The model sees the cells
    that are given whole; of a cell given in part, the rest is drawn to what comes before it in the cell. With
    `wanted_hw` only the cells are drawn in which it names a token, and what else is not given stays unknown. Both masks
    may be [B, h, w] too, with equally many cells to see and to draw in all grids. The first thing yielded is the grid
    as given, before any step.
    """
    batch, device, cell = len(labels_B), gpt.query.device, gpt.config.cell
    rows, columns = grid[0] // cell, grid[1] // cell
    positions_L2 = cell_positions(rows, columns).to(device)

    def cells_of(mask_hw: Tensor | None, otherwise: bool) -> Tensor:
        """A mask as [B, L, n]."""
        mask_hw = torch.full(grid, otherwise) if mask_hw is None else mask_hw.cpu()
        return to_cells(mask_hw.expand(batch, *grid), cell)

    known_BLn = cells_of(given_hw, False).clone()
    tokens_BLn = torch.zeros_like(known_BLn, dtype=torch.long)
    if given_Bhw is not None:
        tokens_BLn = torch.where(known_BLn, to_cells(given_Bhw.cpu(), cell), 0)
    whole_BL = known_BLn.all(-1)
    orders_BM = drawing_orders(cells_of(wanted_hw, True).any(-1) & ~whole_BL, options.order, seeds)
    total = orders_BM.shape[1]
    labelled_B11 = (labels_B != gpt.null_label).view(-1, 1, 1)
    guided = options.guidance != 1 and bool(labelled_B11.any())
    copies = 2 if guided else 1  # with guidance, every picture is drawn a second time without its label
    labels_B = labels_B.to(device)
    cache = gpt.init_cache(torch.cat([labels_B, torch.full_like(labels_B, gpt.null_label)][:copies]), rows * columns)

    def places(cells_BM: Tensor) -> Tensor:
        return positions_L2[cells_BM.to(device)].repeat(copies, 1, 1)

    def append(cells_BM: Tensor) -> None:
        """Let the model see these cells."""
        gpt.append(_at(tokens_BLn, cells_BM).to(device).repeat(copies, 1, 1), places(cells_BM), cache)

    def step() -> Step:
        return Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))

    if whole_BL.any():
        append(drawing_orders(whole_BL, "random", seeds))
    yield step()

    drawn = 0
    for count in cells_per_step(total, total if options.order == "raster" else options.steps):
        cells_BM = orders_BM[:, drawn : drawn + count]
        drawn += count
        # Guidance grows with the share that is drawn: strong early guidance would make all pictures alike.
        weight_B11 = torch.where(labelled_B11, 1 + (options.guidance - 1) * drawn / total, 1.0)
        answers_BMD = gpt.answers(places(cells_BM), cache)
        uniform_BMn = torch.stack([torch.rand(count, cell**2, generator=g, dtype=torch.float64) for g in seeds])
        given_BMn, tokens_BMn = _at(known_BLn, cells_BM), _at(tokens_BLn, cells_BM)
        for j in range(cell**2):
            logits = gpt.next_token(answers_BMD, tokens_BMn[..., :j].to(device).repeat(copies, 1, 1)).float().cpu()
            if guided:
                logits = guide(logits[:batch], logits[batch:], weight_B11)
            token_BM = sample_token(logits, uniform_BMn[..., j], options)
            tokens_BMn[..., j] = torch.where(given_BMn[..., j], tokens_BMn[..., j], token_BM)
        places_BMn = cells_BM.unsqueeze(-1).expand_as(tokens_BMn)
        tokens_BLn = tokens_BLn.scatter(1, places_BMn, tokens_BMn)
        known_BLn = known_BLn.scatter(1, places_BMn, True)
        yield step()
        if drawn < total:
            append(cells_BM)


def _at(values_BLn: Tensor, cells_BM: Tensor) -> Tensor:
    """The values of these cells, [B, M, n]."""
    return values_BLn.gather(1, cells_BM.unsqueeze(-1).expand(-1, -1, values_BLn.shape[-1]))
