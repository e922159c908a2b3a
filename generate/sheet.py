"""Contact sheets: many pictures on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

from igpt.sheet import sheet

LARGEST_SHEET = 4096  # pixels a side, about


def columns_for(count: int) -> int:
    """How many columns make `count` pictures nearly a square."""
    return math.ceil(math.sqrt(count))


def thumbnail(picture: Image.Image, count: int) -> Image.Image:
    """The picture, made smaller where `count` of its size would make too large a sheet."""
    small = picture.copy()
    side = LARGEST_SHEET // columns_for(count)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return small


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[str] = ()) -> Image.Image:
    """All pictures in rows on white, with their captions below where there are captions.

    Raises ValueError when there are no pictures, or captions for only some of them.
    """
    if not pictures or len(captions) not in (0, len(pictures)):
        raise ValueError(f"{len(pictures)} pictures with {len(captions)} captions make no sheet")
    cells = list(zip(pictures, captions or [""] * len(pictures), strict=True))
    columns = columns_for(len(cells))
    return sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])
