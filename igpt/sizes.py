"""How large a picture may be, and which token grid to draw for it. Imports no torch, as checks come first."""

from __future__ import annotations

import math
import re

from tokenizer_vq.base import UserError

DEFAULT_SIZE = 256
SMALLEST_SIDE = 8
LARGEST_SIDE = 4096
SMALLEST_GRID_SIDE = 4  # cells; thinner grids look like nothing the model has seen
LARGEST_GRID = 2**18  # cells: 4096x4096 pixels in tokens of 8; a recipe with more would be too long
ENOUGH = 1.25  # a picture this much larger than its composition is resampled, not refined


def parse_size(size: str | int | tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels of 256, "256", "640x384" or (640, 384). Raises UserError for anything else."""
    text = "x".join(map(str, size)) if isinstance(size, tuple) else str(size)
    match = re.fullmatch(r"(-?[0-9]{1,18})(?:[xX×]([0-9]{1,18}))?", text.strip())
    if match is None:
        raise UserError(f"the size {text!r} is neither one number of pixels, as 256, nor width x height, as 640x384")
    width = int(match[1])
    height = int(match[2]) if match[2] else width
    if not (SMALLEST_SIDE <= width <= LARGEST_SIDE and SMALLEST_SIDE <= height <= LARGEST_SIDE):
        raise UserError(f"the size {text} is out of reach: each side may have {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
    return width, height


def grid_for(width: int, height: int, downsample: int, native_cells: int) -> tuple[int, int]:
    """Rows and columns (h, w) of the token grid to draw for a picture of width x height pixels.

    Of all grids of at most `native_cells` cells it is the one in which the largest rectangle of the wanted aspect fits,
    and of equal ones the smallest: as large as the model can draw, with little to crop. Where a token is a single pixel
    (`downsample` 1) and the picture is small enough, the grid is the picture itself, so that no pixel is resampled.
    """
    if downsample == 1 and width * height <= native_cells:
        return height, width
    smallest = SMALLEST_GRID_SIDE if native_cells >= SMALLEST_GRID_SIDE**2 else 1
    sides = range(smallest, native_cells // smallest + 1)
    grids = ((h, w) for h in sides for w in sides if h * w <= native_cells)
    return max(grids, key=lambda grid: (min(grid[0] * width, grid[1] * height), -grid[0] * grid[1]))


def ladder(width: int, height: int, downsample: int, native_cells: int) -> list[tuple[int, int]]:
    """The grids on which a picture of width x height pixels is drawn: its composition, then each about twice as fine.

    All have the proportions of the first. The last covers the picture pixel by pixel, as far as LARGEST_GRID allows; a
    picture about as large as its composition, or smaller, has that one only.
    """
    h, w = grid_for(width, height, downsample, native_cells)
    scale = max(width / (w * downsample), height / (h * downsample))
    scale = min(scale, math.sqrt(LARGEST_GRID / (h * w)) * (1 - 1e-9))
    if scale <= ENOUGH:
        return [(h, w)]
    steps = math.ceil(math.log2(scale) - 1e-9)
    factors = [scale ** (step / steps) for step in range(1, steps)]
    grids = [(h, w), *((round(h * factor), round(w * factor)) for factor in factors)]
    # The last one rounds up, so that nothing is enlarged; a hair less, so that 4.0000001 is 4.
    last = math.ceil(h * scale - 1e-6), math.ceil(w * scale - 1e-6)
    return [*grids, last if last[0] * last[1] <= LARGEST_GRID else (int(h * scale), int(w * scale))]
