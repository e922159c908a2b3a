"""The one road from what is asked for to pictures of any size, for every command and every library call.

Pictures are composed small, where the model sees the whole, then refined upwards window by window. Notable choices:
- one step up enlarges the picture about twice and says it in tokens again; a few cells of these stay, so that the
  composition does, and the GPT draws the others anew, seeing known cells on all sides of them;
- each window draws its core only; around that it sees what is known, drawn by a neighbour or given; windows that do
  not see each other's cores are drawn together, a quarter of all in a round;
- an edit goes the same way: at every size what the user gave is known, and only the rest is drawn;
- a texture that wraps is drawn, encoded, decoded and resized with its other side beyond every edge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Generator, Tensor

from tokenizer_vq.palette import PaletteConfig

from . import fitting
from .bundle import Bundle
from .config import AS_DRAWN, SamplingOptions, SpriteOptions
from .fitting import Canvas, Inpainting, PartialGrid, on_grid
from .model import to_cells, to_grid
from .recipe import Recipe, digest
from .sampling import Known, Step, generators, sample
from .sizes import Grid
from .sprites import finish_sprite
from .tiling import cell_windows, decode, encode

KNOWN_CELLS = 1  # of every 2x2 cells of an enlarged picture; with 2 what is added looks blurred
CLEARED_BORDER = 2  # tokens around what was given of which none is known
WINDOWS_AT_ONCE = 8  # that are drawn together
PREVIEWS = 64  # of one drawing, about


class Task(NamedTuple):
    """What to draw, whatever the seed: a new picture, or with a `start` an edit of one.

    `start` makes of a seed what is known: an `Inpainting`, of which only the masked part is drawn, or a `PartialGrid`,
    of which only the unknown tokens of the composition are drawn, from which the rest follows.
    """

    command: str
    canvas: Canvas
    start: Callable[[int], Inpainting | PartialGrid] | None = None
    label: str | None = None  # of the picture that is edited
    sprite: SpriteOptions = AS_DRAWN


class Result(NamedTuple):
    """A finished picture and all that made it."""

    picture: Image.Image
    recipe: Recipe


class Batch:
    """Pictures of seeds that follow one another, drawn at once: one for each label, and one only for an edit."""

    def __init__(
        self, model: Bundle, task: Task, labels: Sequence[str | None], seed: int, options: SamplingOptions
    ) -> None:
        self.model, self.task, self.labels, self.options = model, task, labels, options
        self.canvas, self.seeds = task.canvas, range(seed, seed + len(labels))
        self.start = task.start(seed) if task.start is not None else None
        self.given = self.start if isinstance(self.start, Inpainting) else None

    def draw(self) -> list[Result]:
        """All steps at once."""
        *_, grids = self.steps()
        return self.results(grids)

    def steps(self) -> Iterator[list[PartialGrid]]:
        """The grids of all its pictures after every step; those of the last one are complete."""
        labels_B, count = self.model.label_numbers(self.labels), len(self.labels)
        rows = count if self.start is not None else max(count, self.model.rows)  # more than asked for are left out
        seeds = generators(self.seeds[0], rows)
        for step in self._compose(F.pad(labels_B, (0, rows - count), value=int(labels_B[-1])), seeds):
            grids = [PartialGrid(*pair) for pair in zip(step.tokens_Bhw, step.known_Bhw, strict=True)][:count]
            yield grids
        for i, generator in enumerate(seeds[:count]):
            for finer in self.canvas.levels[1:]:
                enlarged = self._enlarged(grids[i].tokens_hw, finer, generator)
                for grid in self.refine(enlarged, int(labels_B[i]), generator):
                    grids = [*grids[:i], grid, *grids[i + 1 :]]
                    yield grids

    def _compose(self, labels_B: Tensor, seeds: Sequence[Generator]) -> Iterator[Step]:
        """The first grid of the canvas, step by step."""
        gpt, grid, step = self.model.gpt, self.canvas.levels[0], None
        start = on_grid(self.model, self.given, grid) if self.given is not None else self.start
        known = Known(*start) if isinstance(start, PartialGrid) else None
        for step in sample(gpt, labels_B, grid, self.options, seeds, known):
            yield step
        if not self.canvas.wraps or step is None:
            return
        # Rolled by half, the edges meet in a cross in the middle, which is drawn anew with both sides in sight.
        known_hw, shifts, cell = torch.ones(grid, dtype=torch.bool), [], gpt.config.cell
        for axis, length in enumerate(grid):
            middle, band = length // cell // 2, max(1, length // cell // 8)
            known_hw.index_fill_(axis, torch.arange((middle - band) * cell, (middle + band) * cell) % length, False)
            shifts.append(middle * cell)
        rolled_Bhw = step.tokens_Bhw.roll(shifts, (1, 2))
        for step in sample(gpt, labels_B, grid, self.options, seeds, Known(rolled_Bhw, known_hw)):
            yield Step(*(x.roll([-shift for shift in shifts], (1, 2)) for x in step))

    def _enlarged(self, tokens_hw: Tensor, grid: Grid, generator: Generator) -> PartialGrid:
        """The picture of the tokens on a finer grid; known are some of its tokens and those that were given."""
        model, given, wraps = self.model, self.given, self.canvas.wraps
        size = grid[1] * model.downsample, grid[0] * model.downsample
        (picture,) = decode(model, tokens_hw[None], wraps)
        picture = fitting.resized(model, picture, size, wraps)
        known_hw = keep_mask(grid, model.gpt.config.cell, generator)
        if given is None:
            return PartialGrid(encode(model, picture, wraps), known_hw)
        mask = fitting.letterbox(model, given.mask, grid, fitting.BOX)
        finer_hw = encode(model, Image.composite(picture, fitting.letterbox(model, given.picture, grid), mask))
        given_hw = ~fitting.mask_tokens(model, given.mask, grid)
        if given.tokens_hw is not None and given.tokens_hw.shape == grid:
            finer_hw = torch.where(given_hw, given.tokens_hw, finer_hw)
        # Next to what was given nothing of the enlarged picture is known, so that the one is drawn into the other.
        near_hw = F.max_pool2d(given_hw.float()[None, None], 2 * CLEARED_BORDER + 1, 1, CLEARED_BORDER)[0, 0] > 0
        return PartialGrid(finer_hw, (known_hw & ~near_hw) | given_hw)

    def refine(self, start: PartialGrid, label: int, generator: Generator) -> Iterator[PartialGrid]:
        """Draws the unknown tokens of a grid of any size, yielding again and again. Known ones are never redrawn.

        Tokens still unknown in what is yielded are those of the enlarged picture.
        """
        gpt, cell = self.model.gpt, self.model.gpt.config.cell
        rows, columns = (side // cell for side in start.known_hw.shape)
        tokens_Ln, known_Ln = (to_cells(x[None], cell)[0].clone() for x in start)
        for cells_Whw, core_Whw in cell_windows(rows, columns, gpt.config.cells, self.canvas.wraps):
            height, width = cells_Whw.shape[1:]
            # As it is before the round: at the edges of some grids a window has a cell of another's core in sight.
            tokens_Whwn, known_Whwn = tokens_Ln[cells_Whw], known_Ln[cells_Whw]
            whole_Whw = known_Whwn.all(-1)
            mask_Whw = core_Whw & ~whole_Whw
            numbers = torch.randint(2**62, (len(cells_Whw),), generator=generator).tolist()
            # Only windows with equally many cells to see and to draw make a batch.
            counts = whole_Whw.sum((1, 2)) * 2 * height * width + mask_Whw.sum((1, 2))
            for count in sorted(set(counts.tolist())):
                for window_B in (counts == count).nonzero().squeeze(-1).split(WINDOWS_AT_ONCE):
                    cells_Bhw, mask_Bhw = cells_Whw[window_B], mask_Whw[window_B]
                    if not mask_Bhw.any():
                        continue
                    share = float(mask_Bhw.float().mean())
                    fewer = replace(self.options, steps=math.ceil(self.options.steps * share**0.5))  # known cells help
                    mask_Bhwn = mask_Bhw.unsqueeze(-1).expand(*mask_Bhw.shape, cell**2)
                    parts = (tokens_Whwn[window_B], known_Whwn[window_B], mask_Bhwn)
                    known = Known(*(to_grid(x.flatten(1, 2), height, cell) for x in parts))
                    seeds = [Generator().manual_seed(numbers[i]) for i in window_B]
                    labels_B, grid = torch.full((len(window_B),), label), (height * cell, width * cell)
                    *_, step = sample(gpt, labels_B, grid, fewer, seeds, known)
                    drawn_Bhwn = to_cells(step.tokens_Bhw, cell).view(*mask_Bhwn.shape)
                    tokens_Ln[cells_Bhw[mask_Bhw]] = drawn_Bhwn[mask_Bhw]
                    known_Ln[cells_Bhw[mask_Bhw]] = True
                    yield PartialGrid(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))
        yield PartialGrid(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))

    def results(self, grids: Sequence[PartialGrid]) -> list[Result]:
        """The pictures of complete grids, with their recipes."""
        results, tokens_Bhw = [], torch.stack([tokens_hw for tokens_hw, _ in grids])
        parts = torch.split(tokens_Bhw, self.model.rows)  # what is decoded at once, as large pictures fill the memory
        pictures = (picture for part in parts for picture in fitting.finish(self.model, part, self.canvas))
        grid = (tokens_Bhw.shape[1], tokens_Bhw.shape[2])
        for label, seed, tokens_hw, picture in zip(self.labels, self.seeds, tokens_Bhw, pictures, strict=True):
            known_hw = torch.zeros(0, dtype=torch.bool)
            if self.given is not None:
                picture = fitting.composite(self.model, self.given, picture)
                known_hw = ~fitting.mask_tokens(self.model, self.given.mask, grid)
            elif isinstance(self.start, PartialGrid) and self.start.known_hw.shape == grid:
                known_hw = self.start.known_hw
            size, picture = picture.size, self._sprite(picture)
            recipe = Recipe(
                model=self.model.name,
                weights_hash=self.model.weights_hash,
                label=label,
                seed=seed,
                size=size,
                options=self.options,
                grid=grid,
                tokens=tuple(tokens_hw.flatten().tolist()),
                command=self.task.command,
                tile=self.canvas.wraps,
                given=tuple(known_hw.flatten().tolist()),
                sprite=self.task.sprite,
                pixels=digest(picture),
            )
            results.append(Result(picture, recipe))
        return results

    def _sprite(self, picture: Image.Image) -> Image.Image:
        """A finished picture as `task.sprite` says, where a token is a pixel."""
        config, how = self.model.tokenizer.config, self.task.sprite
        return finish_sprite(picture, config, how, self.canvas.wraps) if isinstance(config, PaletteConfig) else picture

    # Watching

    def some_steps(self, most: int = PREVIEWS) -> Iterator[list[PartialGrid]]:
        """About `most` of all steps, equally far apart in what is drawn, and the first and the last one."""
        last_share, grids = -1.0, None
        for grids in self.steps():
            share = self.share_drawn(grids)
            if last_share + 1 / most <= share < 1:
                last_share = share
                yield grids
        if grids is not None:
            yield grids

    def share_drawn(self, grids: Sequence[PartialGrid]) -> float:
        """How much of the work is done, 0 to 1, counting the tokens of all levels."""
        tokens = [h * w for h, w in self.canvas.levels]
        known = [int(grid.known_hw.sum()) for grid in grids]
        below = [count for grid in grids for count in tokens if count < grid.known_hw.numel()]
        return (sum(known) + sum(below)) / (sum(tokens) * len(grids))

    def preview(self, grid: PartialGrid) -> Image.Image:
        """An unfinished picture in its final size. What is not drawn yet is mid-grey in a composition; later on it is
        the enlarged composition."""
        if bool(grid.known_hw.all()) or grid.known_hw.shape != self.canvas.levels[0]:
            return self._sprite(*fitting.finish(self.model, grid.tokens_hw[None], self.canvas))
        (picture,) = self.model.decode(grid.tokens_hw[None], grid.known_hw[None])
        return self._sprite(fitting.cover(self.model, picture, self.canvas.size))


def keep_mask(grid: Grid, cell: int, generator: Generator) -> Tensor:
    """Bool [h, w]: KNOWN_CELLS random cells of every 2x2, so that windows know equally many and can go together."""
    h, w = (side // cell for side in grid)
    blocks_hwK = torch.rand((h + 1) // 2, (w + 1) // 2, 4, generator=generator).argsort(-1) < KNOWN_CELLS
    cells_hw = rearrange(blocks_hwK, "h w (a b) -> (h a) (w b)", a=2)[:h, :w]
    return cells_hw.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
