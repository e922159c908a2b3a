"""Drawing tokens: pure functions (how many cells a step, filter, guide, draw) and one generator that uses them.

`draw` yields the grid after every step; progress, previews and time-lapses are built on it. Randomness comes from one
CPU generator a picture, so a seed means the same picture in any batch and on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import SamplingOptions
from .model import GPT, cell_positions

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


def guide(good: Tensor, bad: Tensor, strength: float) -> Tensor:
    """What to add to `good` to go on from `bad` through it: nothing at a strength of 1, more above.

    `bad` is without the label in classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6) and of a
    worse version of the same model in autoguidance (Karras et al. 2024, arXiv 2406.02507, equation 3).
    """
    return (good - bad) * (strength - 1)


def pick(logits_K: Tensor, uniform: Tensor, options: SamplingOptions) -> Tensor:
    """The token at quantile `uniform` (0..1, shape of the logits less the last axis) of the filtered distribution."""
    if options.temperature == 0:
        return logits_K.argmax(-1)
    logits_K = keep_top_p(keep_top_k(logits_K / options.temperature, options.top_k), options.top_p)
    # float64, because the sum of thousands of float32 probabilities would move the borders between tokens.
    heights = logits_K.softmax(-1).cumsum(-1, dtype=torch.float64)
    targets = uniform.double().unsqueeze(-1) * heights[..., -1:]
    return torch.searchsorted(heights, targets, right=True).squeeze(-1).clamp(max=logits_K.shape[-1] - 1)


# The sampler


class Step(NamedTuple):
    tokens_Bhw: Tensor  # drawn and given tokens; 0 where nothing is known yet
    known_Bhw: Tensor  # bool


def generators(seed: int, n: int) -> list[torch.Generator]:
    """One CPU generator a picture: the first is seeded with `seed`, the next with `seed + 1`, ..."""
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


@cache
def spread(h: int, w: int) -> Tensor:
    """Every cell's turn, [h, w], so that whatever few come first lie evenly over the grid, and neighbours far apart.

    The Halton sequence of bases 2 and 3 (Besnier et al. 2025, arXiv 2503.17076, section 3.2). Its points name a cell
    more than once; the first time counts. The few cells that eight points a cell do not name come last.
    """
    rows, columns = _radical_inverse(8 * h * w, 2) * h, _radical_inverse(8 * h * w, 3) * w
    named = (rows.long() * w + columns.long()).tolist()
    return torch.tensor(list(dict.fromkeys([*named, *range(h * w)]))).argsort().view(h, w)


def _radical_inverse(n: int, base: int) -> Tensor:
    """The numbers 1 to n with their digits mirrored behind the point, [n] float64 in 0..1."""
    left, place, mirrored = torch.arange(1, n + 1), 1.0, torch.zeros(n, dtype=torch.float64)
    while bool(left.any()):
        place /= base
        mirrored += left % base * place
        left = left // base
    return mirrored


def drawing_order(unknown_hw: Tensor, order: str, generator: torch.Generator) -> Tensor:
    """The numbers of the unknown cells (a bool mask) in the order in which they will be drawn."""
    h, w = unknown_hw.shape
    cells = unknown_hw.flatten().nonzero().squeeze(-1)
    if order == "raster":
        return cells
    if order == "spread":  # moved about at random, so that no two pictures begin with the same cells
        shifts = [int(torch.randint(side, (), generator=generator)) for side in (h, w)]
        turns = spread(h, w).roll(shifts, (0, 1)).flatten()
        return cells[turns[cells].argsort()]
    return cells[torch.randperm(len(cells), generator=generator)]


def _orders(unknown_Bhw: Tensor, order: str, seeds: Sequence[torch.Generator]) -> Tensor:
    pairs = zip(unknown_Bhw, seeds, strict=True)
    return torch.stack([drawing_order(unknown, order, generator) for unknown, generator in pairs])


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
    """Draw len(labels_B) grids of h x w tokens, yielding after every step; the last one is complete.

    Cells where the bool mask `given_hw` is true are taken from `given_Bhw` and never redrawn. With `wanted_hw` only the
    cells it names are drawn, and the others that are not given stay unknown. Both may be [B, h, w] too, with equally
    many cells in all grids. The first thing yielded is the grid as given, before any step.
    """
    (h, w), batch, device = grid, len(labels_B), gpt.query.device
    cells = h * w
    positions_L2 = cell_positions(h, w, gpt.config.centred).to(device)
    known_BL = torch.zeros(batch, cells, dtype=torch.bool)
    if given_hw is not None:
        known_BL |= given_hw.flatten(-2).cpu()
    missing_BL = ~known_BL if wanted_hw is None else wanted_hw.flatten(-2).cpu() & ~known_BL
    tokens_BL = torch.zeros(batch, cells, dtype=torch.long)
    orders_BL = _orders(missing_BL.view(batch, h, w), options.order, seeds)
    guided = options.guidance != 1 and bool((labels_B != gpt.null_label).any())
    copies = 2 if guided else 1  # with guidance, every picture is drawn a second time without its label
    labels_B = labels_B.to(device)
    cache = gpt.start(torch.cat([labels_B, torch.full_like(labels_B, gpt.null_label)][:copies]), cells)

    def show(cells_BM: Tensor) -> None:
        """Let the model see the tokens of these cells."""
        shown = tokens_BL.gather(1, cells_BM).to(device)
        gpt.remember(shown.repeat(copies, 1), positions_L2[cells_BM.to(device)].repeat(copies, 1, 1), cache)

    if given_Bhw is not None and known_BL.any():
        tokens_BL = torch.where(known_BL, given_Bhw.cpu().flatten(1), 0)
        show(_orders(known_BL.view(batch, h, w), "random", seeds))
    yield Step(tokens_BL.view(batch, h, w).clone(), known_BL.view(batch, h, w).clone())

    steps = orders_BL.shape[1] if options.order == "raster" else options.steps
    drawn = 0
    for count in cells_per_step(orders_BL.shape[1], steps):
        cells_BM = orders_BL[:, drawn : drawn + count]
        drawn += count
        found, before = gpt.predict(positions_L2[cells_BM.to(device)].repeat(copies, 1, 1), cache)
        answers = found[:batch]
        pull = guide(answers, before[:batch], options.autoguidance)
        if guided:
            pull = pull + guide(answers, found[batch:], options.guidance)
        # The pull grows with the share that is drawn: strong early guidance would make all pictures alike.
        logits = gpt.head(answers + pull * (drawn / orders_BL.shape[1])).float().cpu()
        uniform_BM = torch.stack([torch.rand(count, generator=generator, dtype=torch.float64) for generator in seeds])
        tokens_BL.scatter_(1, cells_BM, pick(logits, uniform_BM, options))
        known_BL.scatter_(1, cells_BM, True)
        yield Step(tokens_BL.view(batch, h, w).clone(), known_BL.view(batch, h, w).clone())
        if drawn < orders_BL.shape[1]:
            show(cells_BM)
