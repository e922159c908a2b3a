"""Sampling tokens: pure functions (how many cells a step, filters, guidance) and one generator that uses them.

`sample` yields the grid after every step; progress, previews and time-lapses are built on it. Randomness comes from one
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


class GuidedGPT:
    """A GPT that draws a batch of grids, each a second time without its label where guidance wants to compare."""

    def __init__(self, gpt: GPT, labels_B: Tensor, cells: tuple[int, int], guidance: float):
        self.gpt, self.batch, self.guidance, self.device = gpt, len(labels_B), guidance, gpt.query.device
        self.labelled_B11 = (labels_B != gpt.null_label).view(-1, 1, 1)
        self.copies = 2 if guidance != 1 and bool(self.labelled_B11.any()) else 1
        both = torch.cat([labels_B, torch.full_like(labels_B, gpt.null_label)][: self.copies])
        self.positions_L2 = cell_positions(*cells).to(self.device)
        self.cache = gpt.init_cache(both.to(self.device), len(self.positions_L2))

    def append(self, tokens_BMn: Tensor, cells_BM: Tensor) -> None:
        """Let the model see these cells."""
        self.gpt.append(self._copied(tokens_BMn), self._positions(cells_BM), self.cache)

    def answers(self, cells_BM: Tensor) -> Tensor:
        """What belongs at these cells, for `logits`."""
        return self.gpt.answers(self._positions(cells_BM), self.cache)

    def logits(self, answers: Tensor, earlier_BMj: Tensor, share: float) -> Tensor:
        """Logits [B, M, K] on the CPU of the token that follows `earlier` in each cell. Guidance grows with the share
        that is drawn: strong early guidance would make all pictures alike."""
        logits = self.gpt.next_token(answers, self._copied(earlier_BMj)).float().cpu()
        if self.copies == 1:
            return logits
        weight_B11 = torch.where(self.labelled_B11, 1 + (self.guidance - 1) * share, 1.0)
        return guide(logits[: self.batch], logits[self.batch :], weight_B11)

    def _copied(self, tokens: Tensor) -> Tensor:
        return tokens.to(self.device).repeat(self.copies, 1, 1)

    def _positions(self, cells_BM: Tensor) -> Tensor:
        return self.positions_L2[cells_BM.to(self.device)].repeat(self.copies, 1, 1)


class Known(NamedTuple):
    """What is there before anything is drawn. Masks are bool, [h, w] or [B, h, w]."""

    tokens_Bhw: Tensor
    known_hw: Tensor  # tokens that are taken as they are
    wanted_hw: Tensor | None = None  # only cells in which a token is named are drawn; None: all


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
    drawn to what comes before it in the cell. What is neither given nor wanted stays unknown. All grids of a batch must
    have equally many cells to see and to draw. The first thing yielded is the grid as given, before any step.
    """
    batch, cell = len(labels_B), gpt.config.cell
    rows, columns = grid[0] // cell, grid[1] // cell
    known_BLn = torch.zeros(batch, rows * columns, cell**2, dtype=torch.bool)
    wanted_BLn, tokens_BLn = ~known_BLn, known_BLn.long()
    if known is not None:
        known_BLn = to_cells(known.known_hw.cpu().expand(batch, *grid), cell).clone()
        tokens_BLn = torch.where(known_BLn, to_cells(known.tokens_Bhw.cpu().expand(batch, *grid), cell), 0)
        if known.wanted_hw is not None:
            wanted_BLn = to_cells(known.wanted_hw.cpu().expand(batch, *grid), cell)
    whole_BL = known_BLn.all(-1)
    orders_BM = drawing_orders(wanted_BLn.any(-1) & ~whole_BL, options.order, seeds)
    total, drawn = orders_BM.shape[1], 0
    model = GuidedGPT(gpt, labels_B.cpu(), (rows, columns), options.guidance)
    if whole_BL.any():
        seen_BM = drawing_orders(whole_BL, "random", seeds)
        model.append(_at(tokens_BLn, seen_BM), seen_BM)
    yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))

    for count in cells_per_step(total, total if options.order == "raster" else options.steps):
        cells_BM = orders_BM[:, drawn : drawn + count]
        drawn += count
        answers = model.answers(cells_BM)
        uniform_BMn = torch.stack([torch.rand(count, cell**2, generator=g, dtype=torch.float64) for g in seeds])
        given_BMn, tokens_BMn = _at(known_BLn, cells_BM), _at(tokens_BLn, cells_BM)
        for j in range(cell**2):
            logits_BMK = model.logits(answers, tokens_BMn[..., :j], drawn / total)
            token_BM = sample_token(logits_BMK, uniform_BMn[..., j], options)
            tokens_BMn[..., j] = torch.where(given_BMn[..., j], tokens_BMn[..., j], token_BM)
        places_BMn = cells_BM.unsqueeze(-1).expand_as(tokens_BMn)
        tokens_BLn = tokens_BLn.scatter(1, places_BMn, tokens_BMn)
        known_BLn = known_BLn.scatter(1, places_BMn, True)
        yield Step(to_grid(tokens_BLn, rows, cell), to_grid(known_BLn, rows, cell))
        if drawn < total:
            model.append(tokens_BMn, cells_BM)


def _at(values_BLn: Tensor, cells_BM: Tensor) -> Tensor:
    """The values of these cells, [B, M, n]."""
    return values_BLn.gather(1, cells_BM.unsqueeze(-1).expand(-1, -1, values_BLn.shape[-1]))
