"""How large a picture may be, and which token grid to draw for it. Imports no torch, as checks come first."""

from __future__ import annotations

import re

from tokenizer_vq.base import UserError

DEFAULT_SIZE = 256
SMALLEST_SIDE = 8
LARGEST_SIDE = 1024
SMALLEST_GRID_SIDE = 4  # cells; thinner grids look like nothing the model has seen


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
