"""How large a picture may be, and which token grid to draw for it. Imports no torch, as checks come first."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tokenizer_vq.base import UserError

Grid = tuple[int, int]  # rows and columns of tokens
Size = int | str | tuple[int, int]  # in pixels: 256, "640x384" or width and height

SMALLEST_SIDE = 8
LARGEST_SIDE = 4096
SMALLEST_GRID_SIDE = 4  # cells; thinner grids look like nothing the model has seen
LARGEST_GRID = 2**18  # tokens: 4096x4096 pixels in tokens of 8; a recipe with more would be too long
LARGEST_SPRITE = 128  # pixels a side that are drawn one by one where a token is a pixel
ENOUGH = 1.25  # a picture this much larger than its composition is resampled, not refined


def parse_size(size: Size) -> tuple[int, int]:
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


@dataclass(frozen=True)
class Grids:
    """The token grids (rows, columns) on which a model draws: whole cells of `cell` x `cell` tokens."""

    downsample: int  # pixels a side of a token
    cell: int
    cells: int  # of a picture in training

    @property
    def native(self) -> Grid:
        """The grid of the square pictures of the training."""
        return (math.isqrt(self.cells) * self.cell,) * 2

    @property
    def native_size(self) -> tuple[int, int]:
        """Width and height of those in pixels."""
        return (self.native[0] * self.downsample,) * 2

    def composition(self, width: int, height: int) -> Grid:
        """The grid on which a picture of width x height pixels is composed, where the model sees the whole of it.

        Of all grids of at most `cells` cells it is the one in which the largest rectangle of that aspect fits, and of
        equal ones the smallest. Where a token is a pixel it covers the picture itself, so that no pixel is resampled,
        or, where the picture is larger than any sprite, the picture divided by a whole number.
        """
        if self.downsample == 1:
            enlarged = 1 if max(width, height) <= LARGEST_SPRITE else self.enlarged(width, height)
            h, w = (-(-side // (enlarged * self.cell)) for side in (height, width))
            if h * w <= self.cells:
                return h * self.cell, w * self.cell
        smallest = SMALLEST_GRID_SIDE if self.cells >= SMALLEST_GRID_SIDE**2 else 1
        rows = range(smallest, self.cells // smallest + 1)
        grids = ((h, w) for h in rows for w in range(smallest, self.cells // h + 1))
        h, w = max(grids, key=lambda grid: (min(grid[0] * width, grid[1] * height), -grid[0] * grid[1]))
        return h * self.cell, w * self.cell

    def enlarged(self, width: int, height: int) -> int:
        """How many pixels a side each pixel of the composition gets in a picture that is larger than any sprite."""
        times = 1
        while -(-width // (times * self.cell)) * -(-height // (times * self.cell)) > self.cells:
            times += 1
        return times

    def pyramid(self, width: int, height: int) -> list[Grid]:
        """The grids on which a picture is drawn: its composition, then each about twice as fine.

        All have the proportions of the first. The last covers the picture pixel by pixel, as far as LARGEST_GRID
        allows; a picture about as large as its composition, or smaller, has that one only.
        """
        h, w = (side // self.cell for side in self.composition(width, height))
        side = self.cell * self.downsample
        most = LARGEST_GRID // self.cell**2
        scale = min(max(width / (w * side), height / (h * side)), math.sqrt(most / (h * w)) * (1 - 1e-9))
        pixels = self.downsample == 1
        if scale <= (1 if pixels else ENOUGH) or (pixels and max(width, height) > LARGEST_SPRITE):
            return [(h * self.cell, w * self.cell)]
        steps = math.ceil(math.log2(scale) - 1e-9)
        factors = [scale ** (step / steps) for step in range(1, steps)]
        grids = [(h, w), *((round(h * factor), round(w * factor)) for factor in factors)]
        # The last one rounds up, so that nothing is enlarged; a hair less, so that 4.0000001 is 4.
        last = math.ceil(h * scale - 1e-6), math.ceil(w * scale - 1e-6)
        grids.append(last if last[0] * last[1] <= most else (int(h * scale), int(w * scale)))
        return [(rows * self.cell, columns * self.cell) for rows, columns in grids]
