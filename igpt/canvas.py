"""Pictures of any size: composed small, where the model sees the whole, then refined upwards window by window.

Notable choices:
- one step up enlarges the picture about twice and says it in tokens again; a few cells of these stay, so that the
  composition does, and the GPT draws the others anew, seeing known cells on all sides of them;
- each window draws its core only; around that it sees what is known, drawn by a neighbour or kept; windows that do
  not see each other's cores are drawn together, a quarter of all in a round;
- an edit goes the same way: at every size what the user gave is known, and only the rest is drawn;
- a texture that wraps is drawn, encoded, decoded and resized with its other side beyond every edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor

from .bundle import Bundle
from .config import SamplingOptions
from .fitting import BOX, Canvas, Inpainting, cover, finish, letterbox, mask_tokens, resized, tokens_on
from .model import to_cells, to_grid
from .sampling import Known, Step, sample
from .sizes import Grid
from .tiling import decode, encode
from .windows import cell_windows

CELLS_KEPT = 1  # of every 2x2 cells of an enlarged picture; with 2 what is added looks blurred
TOKENS_CLEARED = 2  # tokens around what was given of which none is kept
WINDOWS_TOGETHER = 8  # that are drawn at once
FRAMES = 64  # about so many unfinished pictures are shown


class PartialGrid(NamedTuple):
    """The tokens of one picture on its way."""

    tokens_hw: Tensor
    known_hw: Tensor  # bool


def generate_grids(
    model: Bundle,
    canvas: Canvas,
    labels_B: Tensor,
    seeds: Sequence[Generator],
    options: SamplingOptions,
    start: Inpainting | PartialGrid | None = None,
) -> Iterator[list[PartialGrid]]:
    """Draws a picture for each generator and label (`Bundle.label_numbers`), yielding all of them after every step;
    those of the last one are complete.

    To start from an `Inpainting` only its masked part is drawn, from a `PartialGrid` only the unknown tokens of the
    composition, from which the rest follows.
    """
    given = start if isinstance(start, Inpainting) else None
    composition = canvas.levels[0]
    if given is not None:
        start = PartialGrid(tokens_on(model, given, composition), ~mask_tokens(model, given.mask, composition))
    known = Known(*start) if isinstance(start, PartialGrid) else None
    for step in compose(model, canvas, labels_B, seeds, options, known):
        grids = [PartialGrid(*pair) for pair in zip(step.tokens_Bhw, step.known_Bhw, strict=True)]
        yield grids
    for i, generator in enumerate(seeds):
        for finer in canvas.levels[1:]:
            enlarged = _enlarged(model, grids[i].tokens_hw, finer, generator, given, canvas.wraps)
            for grid in refine(model, enlarged, int(labels_B[i]), generator, options, canvas.wraps):
                grids = [*grids[:i], grid, *grids[i + 1 :]]
                yield grids


def compose(
    model: Bundle,
    canvas: Canvas,
    labels_B: Tensor,
    seeds: Sequence[Generator],
    options: SamplingOptions,
    known: Known | None,
) -> Iterator[Step]:
    """The first grid of a canvas, step by step."""
    grid, cell, step = canvas.levels[0], model.gpt.config.cell, None
    for step in sample(model.gpt, labels_B, grid, options, seeds, known):
        yield step
    if not canvas.wraps or step is None:
        return
    # Rolled by half, the edges meet in a cross in the middle, which is drawn anew with both sides in sight.
    known_hw, shifts = torch.ones(grid, dtype=torch.bool), []
    for axis, length in enumerate(grid):
        middle, band = length // cell // 2, max(1, length // cell // 8)
        known_hw.index_fill_(axis, torch.arange((middle - band) * cell, (middle + band) * cell) % length, False)
        shifts.append(middle * cell)
    rolled_Bhw = step.tokens_Bhw.roll(shifts, (1, 2))
    for step in sample(model.gpt, labels_B, grid, options, seeds, Known(rolled_Bhw, known_hw)):
        yield Step(*(x.roll([-shift for shift in shifts], (1, 2)) for x in step))


def _enlarged(
    model: Bundle, tokens_hw: Tensor, grid: Grid, generator: Generator, given: Inpainting | None, wraps: bool
) -> PartialGrid:
    """The picture of the tokens on a finer grid; known are the tokens that are kept and those that were given."""
    size = grid[1] * model.downsample, grid[0] * model.downsample
    picture = resized(model, decode(model, tokens_hw, wraps), size, wraps)
    kept_hw = keep_mask(grid, model.gpt.config.cell, generator)
    if given is None:
        return PartialGrid(encode(model, picture, wraps), kept_hw)
    mask = letterbox(model, given.mask, grid, BOX)
    finer_hw = encode(model, Image.composite(picture, letterbox(model, given.picture, grid), mask))
    unknown_hw = mask_tokens(model, given.mask, grid)
    if given.tokens_hw is not None and given.tokens_hw.shape == grid:
        finer_hw = torch.where(unknown_hw, finer_hw, given.tokens_hw)
    # Next to what was given nothing of the enlarged picture is kept, so that the one is drawn into the other.
    given_11hw = (~unknown_hw).float()[None, None]
    near_hw = F.max_pool2d(given_11hw, 2 * TOKENS_CLEARED + 1, 1, TOKENS_CLEARED)[0, 0] > 0
    return PartialGrid(finer_hw, (kept_hw & ~near_hw) | ~unknown_hw)


def keep_mask(grid: Grid, cell: int, generator: Generator) -> Tensor:
    """Bool [h, w]: CELLS_KEPT random cells of every 2x2, so that windows know equally many and can go together."""
    h, w = (side // cell for side in grid)
    blocks_hwK = torch.rand((h + 1) // 2, (w + 1) // 2, 4, generator=generator).argsort(-1) < CELLS_KEPT
    cells_hw = rearrange(blocks_hwK, "h w (a b) -> (h a) (w b)", a=2)[:h, :w]
    return cells_hw.repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def refine(
    model: Bundle, start: PartialGrid, label: int, generator: Generator, options: SamplingOptions, wraps: bool
) -> Iterator[PartialGrid]:
    """Draws the unknown tokens of a grid of any size, yielding again and again. Known ones are never redrawn.

    Tokens still unknown in what is yielded are those of the enlarged picture.
    """
    cell = model.gpt.config.cell
    rows, columns = (side // cell for side in start.known_hw.shape)
    tokens_Ln, known_Ln = (to_cells(x[None], cell)[0].clone() for x in start)
    for cells_Whw, core_Whw in cell_windows(rows, columns, model.gpt.config.cells, wraps):
        window = cells_Whw.shape[1], cells_Whw.shape[2]
        whole_Whw = known_Ln[cells_Whw].all(-1)
        wanted_Whw = core_Whw & ~whole_Whw
        numbers = torch.randint(2**62, (len(cells_Whw),), generator=generator).tolist()
        # Only windows with equally many cells to see and to draw make a batch.
        counts = whole_Whw.sum((1, 2)) * 2 * cells_Whw[0].numel() + wanted_Whw.sum((1, 2))
        for count in sorted(set(counts.tolist())):
            for some in (counts == count).nonzero().squeeze(-1).split(WINDOWS_TOGETHER):
                cells_Bhw, wanted_Bhw = cells_Whw[some], wanted_Whw[some]
                share = float(wanted_Bhw.float().mean())
                if not share:
                    continue
                fewer = replace(options, steps=math.ceil(options.steps * share**0.5))  # what is known helps
                wanted_Bhwn = wanted_Bhw.unsqueeze(-1).expand(*wanted_Bhw.shape, cell**2)
                parts = (tokens_Ln[cells_Bhw], known_Ln[cells_Bhw], wanted_Bhwn)
                known = Known(*(to_grid(x.flatten(1, 2), window[0], cell) for x in parts))
                seeds, labels_B = [Generator().manual_seed(numbers[i]) for i in some], torch.full((len(some),), label)
                grid = window[0] * cell, window[1] * cell
                *_, step = sample(model.gpt, labels_B, grid, fewer, seeds, known)
                drawn_Bhwn = to_cells(step.tokens_Bhw, cell).view(*wanted_Bhwn.shape)
                tokens_Ln[cells_Bhw[wanted_Bhw]] = drawn_Bhwn[wanted_Bhw]
                known_Ln[cells_Bhw[wanted_Bhw]] = True
                yield PartialGrid(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))
    yield PartialGrid(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))


# Watching


def share_drawn(canvas: Canvas, grids: Sequence[PartialGrid]) -> float:
    """How much of the work is done, 0 to 1, counting the tokens of all levels."""
    tokens = [h * w for h, w in canvas.levels]
    done = 0
    for grid in grids:
        level = canvas.levels.index((grid.tokens_hw.shape[0], grid.tokens_hw.shape[1]))
        done += sum(tokens[:level]) + int(grid.known_hw.sum())
    return done / (sum(tokens) * len(grids))


def now_and_then(
    frames: Iterable[list[PartialGrid]], canvas: Canvas, most: int = FRAMES
) -> Iterator[list[PartialGrid]]:
    """About `most` of all frames, equally far apart in what is drawn, and the first and the last one."""
    shown, grids = -1.0, None
    for grids in frames:
        share = share_drawn(canvas, grids)
        if share >= shown + 1 / most and share < 1:
            shown = share
            yield grids
    if grids is not None:
        yield grids


def preview(model: Bundle, grid: PartialGrid, canvas: Canvas) -> Image.Image:
    """An unfinished picture in its final size. What is not drawn yet is mid-grey in a composition; later on it is the
    enlarged composition."""
    if bool(grid.known_hw.all()) or grid.known_hw.shape != canvas.levels[0]:
        return finish(model, grid.tokens_hw, canvas)
    (picture,) = model.decode(grid.tokens_hw[None], grid.known_hw[None])
    return cover(model, picture, canvas.size)
