"""Pictures of any size: composed small, where the model sees the whole, then refined upwards window by window.

Notable choices:
- one step up enlarges the picture about twice and says it in tokens again; a few cells of these stay, so that the
  composition does, and the GPT draws the others anew, seeing known cells on all sides of them;
- each window draws its core only; around that it sees what is known, drawn by a neighbour or kept; windows that do
  not see each other's cores are drawn together, a quarter of all in a round;
- an edit goes the same way: at every size what the user gave is known, and only the rest is drawn;
- a texture that wraps (`wraps`) is drawn, encoded, decoded and resized with its other side beyond every edge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageChops, ImageFilter
from torch import Generator, Tensor

from tokenizer_vq.images import fit_cover

from .bundle import Bundle
from .config import SamplingOptions
from .model import to_cells, to_grid
from .sampling import Known, Step, draw
from .sizes import Grid
from .tiling import Span, decode, encode, window_for, wrapped

KEPT = 1  # of every 2x2 cells of an enlarged picture stays; with 2 what is added looks blurred
BESIDE = 2  # tokens around what was given of which none stays
TOGETHER = 8  # windows that are drawn at once
BORDER = 8  # pixels over which a drawn part turns into the picture around it
LANCZOS, NEAREST, BOX = Image.Resampling.LANCZOS, Image.Resampling.NEAREST, Image.Resampling.BOX


class Drawing(NamedTuple):
    """One picture on its way."""

    tokens_hw: Tensor
    known_hw: Tensor  # bool


class Given(NamedTuple):
    """A picture of which a part is to be drawn."""

    picture: Image.Image  # RGB
    wanted: Image.Image  # "L", of the same size: 255 where to draw, 0 elsewhere
    tokens_hw: Tensor | None = None  # the picture's own, if it carries them


# Pixels and tokens


def lay(model: Bundle, picture: Image.Image, grid: Grid, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """A picture in the pixels of a grid: as large as fits into the middle, continued at its edges.

    The inverse of `cover`. BOX is for masks.
    """
    height, width = (side * model.downsample for side in grid)
    if model.downsample == 1:
        return _laid_pixels(model, picture, grid, mask=resample == BOX)
    scale = min(width / picture.width, height / picture.height)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture if picture.size == inner else picture.resize(inner, resample)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    margins = ((top, height - inner[1] - top), (left, width - inner[0] - left), (0, 0))
    values = np.asarray(small)
    return Image.fromarray(np.pad(values, margins[: values.ndim], mode="edge"))


def _laid_pixels(model: Bundle, picture: Image.Image, grid: Grid, mask: bool) -> Image.Image:
    """`lay` where a token is a pixel. Nothing is resampled: of the pixels that `cover` makes of a token the middle one
    is taken, of a mask the brightest."""
    values, (finest, times) = np.asarray(picture), _sprite(model, picture.size)
    for axis, (tokens, side) in enumerate(zip(grid, finest, strict=True)):
        length, before = side * times, (side * times - values.shape[axis]) // 2
        if mask:
            begins = np.arange(tokens) * length // tokens - before
            values = np.maximum.reduceat(values, begins.clip(0, values.shape[axis] - 1), axis)
        else:
            middles = (2 * np.arange(tokens) + 1) * length // (2 * tokens) - before
            values = values.take(middles.clip(0, values.shape[axis] - 1), axis)
    return Image.fromarray(values)


def _sprite(model: Bundle, size: tuple[int, int]) -> tuple[Grid, int]:
    """Where a token is a pixel: the last grid of a picture of that size, and how many pixels a side each token gets."""
    rows, columns = levels_for(model, size)[-1]
    return (rows, columns), max(-(-size[0] // columns), -(-size[1] // rows))


def cover(model: Bundle, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture of a grid in exactly `size` pixels: its middle, resized. Where a token is a pixel, each of the last
    grid becomes a whole number of pixels a side."""
    if model.downsample > 1:
        return fit_cover(picture, *size)
    (rows, columns), times = _sprite(model, size)
    width, height = columns * times, rows * times
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + size[0]) * across, (top + size[1]) * down)
    return picture.resize(size, NEAREST, box)


def wanted_tokens(model: Bundle, wanted: Image.Image, grid: Grid) -> Tensor:
    """Bool [h, w]: the tokens of which at least a pixel is to be drawn."""
    levels_HW = torch.from_numpy(np.array(lay(model, wanted, grid, BOX))).float()
    return F.max_pool2d(levels_HW[None, None], model.downsample)[0, 0] > 0


def laid_tokens(model: Bundle, given: Given, grid: Grid) -> Tensor:
    """Tokens of the given picture on a grid: its own where they are on that grid, or else it is encoded."""
    if given.tokens_hw is not None and given.tokens_hw.shape == grid:
        return given.tokens_hw.clone()
    return encode(model, lay(model, given.picture, grid))


def put_in(model: Bundle, given: Given, painted: Image.Image) -> Image.Image:
    """The given picture with the painted one where it was to be drawn; all other pixels are the given ones.

    Within BORDER pixels inside the edge of the drawn part one turns into the other; where the part is too thin for that
    it is wholly the painted one, and likewise where a token is a pixel, as mixed colours would be of no palette.
    """
    if model.downsample == 1:
        return Image.composite(painted, given.picture, given.wanted)
    depth, inner = Image.new("L", given.wanted.size), given.wanted
    for _ in range(BORDER):  # how many pixels from the edge, up to BORDER
        depth = ImageChops.add(depth, inner.point(lambda level: level and 1))
        inner = inner.filter(ImageFilter.MinFilter(3))
    deepest = depth.filter(ImageFilter.MaxFilter(2 * BORDER + 1))
    share = np.asarray(depth).astype(np.float32) / np.maximum(1, np.asarray(deepest))
    return Image.composite(painted, given.picture, Image.fromarray((share * 255).round().astype(np.uint8)))


def finish(model: Bundle, tokens_hw: Tensor, size: tuple[int, int], wraps: bool = False) -> Image.Image:
    """The picture of a grid in exactly `size` pixels."""
    picture = decode(model, tokens_hw, wraps)
    return _resized(model, picture, size, wraps=True) if wraps else cover(model, picture, size)


def _resized(model: Bundle, picture: Image.Image, size: tuple[int, int], wraps: bool) -> Image.Image:
    resample = LANCZOS if model.downsample > 1 else NEAREST
    if not wraps or picture.size == size:
        return picture.resize(size, resample)
    margin = 64  # pixels beyond the edge: more than Lanczos looks at when it halves or doubles
    box = (margin, margin, margin + picture.width, margin + picture.height)
    return wrapped(picture, margin).resize(size, resample, box)


# Drawing


def paint(
    model: Bundle, levels: Sequence[Grid], labels_B: Tensor, seeds: Sequence[Generator], options: SamplingOptions, *,
    given: Given | None = None, start: Drawing | None = None, wraps: bool = False,
) -> Iterator[list[Drawing]]:  # fmt: skip
    """Draws a picture for each generator and label (`Bundle.label_numbers`), yielding all of them after every step;
    those of the last one are complete.

    `levels` is the picture's pyramid of grids. With `given` only the wanted part is drawn, with `start` only the
    unknown tokens of the composition, from which the rest follows.
    """
    if given is not None:
        unknown_hw = wanted_tokens(model, given.wanted, levels[0])
        start = Drawing(laid_tokens(model, given, levels[0]), ~unknown_hw)
    for step in _compose(model, levels[0], labels_B, seeds, options, start, wraps):
        drawings = [Drawing(*pair) for pair in zip(step.tokens_Bhw, step.known_Bhw, strict=True)]
        yield drawings
    for i, generator in enumerate(seeds):
        for fine in levels[1:]:
            begun = _enlarged(model, drawings[i].tokens_hw, fine, generator, given, wraps)
            for drawing in redraw(model, begun, int(labels_B[i]), generator, options, wraps):
                drawings = [*drawings[:i], drawing, *drawings[i + 1 :]]
                yield drawings


def share_drawn(levels: Sequence[Grid], drawings: Sequence[Drawing]) -> float:
    """How much of the work is done, 0 to 1, counting the tokens of all levels."""
    tokens = [h * w for h, w in levels]
    done = 0
    for drawing in drawings:
        level = list(levels).index(tuple(drawing.tokens_hw.shape))  # type: ignore[arg-type]
        done += sum(tokens[:level]) + int(drawing.known_hw.sum())
    return done / (sum(tokens) * len(drawings))


def _compose(
    model: Bundle, grid: Grid, labels_B: Tensor, seeds: Sequence[Generator], options: SamplingOptions,
    start: Drawing | None, wraps: bool,
) -> Iterator[Step]:  # fmt: skip
    known = None if start is None else Known(start.tokens_hw, start.known_hw)
    step = None
    for step in draw(model.gpt, labels_B, grid, options, seeds, known):
        yield step
    if not wraps or step is None:
        return
    # Rolled by half, the edges meet in a cross in the middle, which is drawn anew with both sides in sight.
    cell, known_hw = model.gpt.config.cell, torch.ones(grid, dtype=torch.bool)
    shifts = []
    for axis, length in enumerate(grid):
        middle, band = length // cell // 2, max(1, length // cell // 8)
        known_hw.index_fill_(axis, torch.arange((middle - band) * cell, (middle + band) * cell) % length, False)
        shifts.append(middle * cell)
    rolled_Bhw = step.tokens_Bhw.roll(shifts, (1, 2))
    for step in draw(model.gpt, labels_B, grid, options, seeds, Known(rolled_Bhw, known_hw)):
        yield Step(*(x.roll([-shift for shift in shifts], (1, 2)) for x in step))


def _enlarged(
    model: Bundle, tokens_hw: Tensor, grid: Grid, generator: Generator, given: Given | None, wraps: bool
) -> Drawing:
    """The picture of the tokens on a finer grid; known are the tokens that stay and those that were given."""
    size = grid[1] * model.downsample, grid[0] * model.downsample
    picture = _resized(model, decode(model, tokens_hw, wraps), size, wraps)
    known_hw = scattered(grid, model.gpt.config.cell, generator)
    if given is None:
        return Drawing(encode(model, picture, wraps), known_hw)
    finer_hw = encode(
        model, Image.composite(picture, lay(model, given.picture, grid), lay(model, given.wanted, grid, BOX))
    )
    unknown_hw = wanted_tokens(model, given.wanted, grid)
    if given.tokens_hw is not None and given.tokens_hw.shape == grid:
        finer_hw = torch.where(unknown_hw, finer_hw, given.tokens_hw)
    # Beside what was given nothing of the enlarged picture stays, so that the one is drawn into the other.
    beside_hw = F.max_pool2d((~unknown_hw).float()[None, None], 2 * BESIDE + 1, 1, BESIDE)[0, 0] > 0
    return Drawing(finer_hw, (known_hw & ~beside_hw) | ~unknown_hw)


def scattered(grid: Grid, cell: int, generator: Generator) -> Tensor:
    """Bool [h, w]: KEPT random cells of every 2x2, so that windows know equally many and can be drawn together."""
    h, w = (side // cell for side in grid)
    blocks_hwK = torch.rand((h + 1) // 2, (w + 1) // 2, 4, generator=generator).argsort(-1) < KEPT
    cells_hw = rearrange(blocks_hwK, "h w (a b) -> (h a) (w b)", a=2)[:h, :w]
    return cells_hw.repeat_interleave(cell, 0).repeat_interleave(cell, 1)


def redraw(
    model: Bundle, begun: Drawing, label: int, generator: Generator, options: SamplingOptions, wraps: bool
) -> Iterator[Drawing]:
    """Draws the unknown tokens of a grid of any size, yielding again and again. Known ones are never redrawn.

    Tokens still unknown in what is yielded are those of the enlarged picture.
    """
    cell = model.gpt.config.cell
    rows, columns = (side // cell for side in begun.known_hw.shape)
    tokens_Ln, known_Ln = (to_cells(x[None], cell)[0].clone() for x in begun)
    for cells_Whw, core_Whw in cell_windows(rows, columns, model.gpt.config.cells, wraps):
        window = cells_Whw.shape[1], cells_Whw.shape[2]
        whole_Whw = known_Ln[cells_Whw].all(-1)
        wanted_Whw = core_Whw & ~whole_Whw
        numbers = torch.randint(2**62, (len(cells_Whw),), generator=generator).tolist()
        # Only windows with equally many cells to see and to draw make a batch.
        counts = whole_Whw.sum((1, 2)) * 2 * cells_Whw[0].numel() + wanted_Whw.sum((1, 2))
        for count in sorted(set(counts.tolist())):
            for some in (counts == count).nonzero().squeeze(-1).split(TOGETHER):
                cells_Bhw, wanted_Bhw = cells_Whw[some], wanted_Whw[some]
                share = float(wanted_Bhw.float().mean())
                if not share:
                    continue
                own = replace(options, steps=math.ceil(options.steps * share**0.5))  # what is known helps
                wanted_Bhwn = wanted_Bhw.unsqueeze(-1).expand(*wanted_Bhw.shape, cell**2)
                known = Known(*(
                    to_grid(x.flatten(1, 2), window[0], cell)
                    for x in (tokens_Ln[cells_Bhw], known_Ln[cells_Bhw], wanted_Bhwn)
                ))  # fmt: skip
                *_, step = draw(
                    model.gpt, torch.full((len(some),), label), (window[0] * cell, window[1] * cell), own,
                    [Generator().manual_seed(numbers[i]) for i in some], known,
                )  # fmt: skip
                drawn_Bhwn = to_cells(step.tokens_Bhw, cell).view(*wanted_Bhwn.shape)
                tokens_Ln[cells_Bhw[wanted_Bhw]] = drawn_Bhwn[wanted_Bhw]
                known_Ln[cells_Bhw[wanted_Bhw]] = True
                yield Drawing(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))
    yield Drawing(*(to_grid(x[None], rows, cell)[0] for x in (tokens_Ln, known_Ln)))


# Windows of cells


def cell_windows(h: int, w: int, native_cells: int, wraps: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of windows of at most `native_cells`: the numbers of their cells and their cores (bool), both [W, h, w].

    Cores tile the grid; no window of a round has another's core in sight.
    """
    shape = window_for(h, w, math.isqrt(native_cells))
    for rows in turns_of(cores(h, shape[0], wraps)):
        for columns in turns_of(cores(w, shape[1], wraps)):
            row, inside_rows = _spread(rows, shape[0], h)
            column, inside_columns = _spread(columns, shape[1], w)
            cells = rearrange(row, "y h -> y 1 h 1") * w + rearrange(column, "x w -> 1 x 1 w")
            core = rearrange(inside_rows, "y h -> y 1 h 1") & rearrange(inside_columns, "x w -> 1 x 1 w")
            yield cells.flatten(0, 1), core.flatten(0, 1)


def turns_of(windows: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Every other window of an axis, then those between; the last by itself where it may reach to another of its turn.

    That is so where it is the next but one of the first, around the edge, or its core shorter than the others.
    """
    (_, first), (_, last) = windows[0], windows[-1]
    alone = len(windows) > 1 and (len(windows) % 2 or last.stop - last.start < first.stop - first.start)
    paired = windows[:-1] if alone else windows
    return [turn for turn in (paired[::2], paired[1::2], windows[-1:] if alone else []) if turn]


def _spread(windows: list[tuple[int, Span]], window: int, length: int) -> tuple[Tensor, Tensor]:
    """Of windows along one axis the numbers of their cells, and which of these are in the core."""
    cells = (torch.tensor([[first] for first, _ in windows]) + torch.arange(window)) % length
    start, stop = (torch.tensor([[core[side]] for _, core in windows]) for side in (0, 1))
    return cells, (cells >= start) & (cells < stop)


def cores(length: int, window: int, wraps: bool) -> list[tuple[int, Span]]:
    """Along one axis: where each window begins, and the middle half of it that it draws (all of it, at an edge)."""
    if window == length and not wraps:
        return [(0, Span(0, length))]
    core = max(1, window // 2)
    found = []
    for start in range(0, length, core):
        first = start - (window - core) // 2
        first = first if wraps else min(max(0, first), length - window)
        found.append((first, Span(start, min(start + core, length))))
    return found


# Whole pictures


def levels_for(model: Bundle, size: tuple[int, int]) -> list[Grid]:
    return model.grids.pyramid(*size)


def pictures(
    model: Bundle, labels_B: Tensor, size: tuple[int, int], seeds: Sequence[Generator], options: SamplingOptions,
    wraps: bool, previews: bool,
) -> Iterator[list[Image.Image]]:  # fmt: skip
    """A new picture for each label and generator; with `previews` also what there is of them again and again."""
    levels = levels_for(model, size)
    frames = paint(model, levels, labels_B, seeds, options, wraps=wraps)
    if previews:
        for drawings in now_and_then(frames, levels):
            yield [preview(model, drawing, size, wraps) for drawing in drawings]
    else:
        *_, drawings = frames
        yield [finish(model, drawing.tokens_hw, size, wraps) for drawing in drawings]


def now_and_then(frames: Iterable[list[Drawing]], levels: Sequence[Grid], most: int = 64) -> Iterator[list[Drawing]]:
    """About `most` of all frames, equally far apart in what is drawn, and the first and the last one."""
    shown, drawings = -1.0, None
    for drawings in frames:
        share = share_drawn(levels, drawings)
        if share >= shown + 1 / most and share < 1:
            shown = share
            yield drawings
    if drawings is not None:
        yield drawings


def preview(model: Bundle, drawing: Drawing, size: tuple[int, int], wraps: bool) -> Image.Image:
    """An unfinished picture in its final size. What is not drawn yet is mid-grey in a composition; later on it is the
    enlarged composition."""
    h, w = drawing.known_hw.shape
    if bool(drawing.known_hw.all()) or h * w > model.gpt.config.cells * model.gpt.config.cell**2:
        return finish(model, drawing.tokens_hw, size, wraps)
    (picture,) = model.decode(drawing.tokens_hw[None], drawing.known_hw[None])
    return cover(model, picture, size)
