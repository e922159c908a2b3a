"""Contact sheets: many pictures on one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN = 8
CAPTION_HEIGHT = 16
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
    """All pictures in rows on white, each in the middle of its cell, with its caption below where there are captions.

    Raises ValueError when there are no pictures, or captions for only some of them.
    """
    if not pictures or len(captions) not in (0, len(pictures)):
        raise ValueError(f"{len(pictures)} pictures with {len(captions)} captions make no sheet")
    columns = columns_for(len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    strip = CAPTION_HEIGHT if captions else 0
    step_x, step_y = width + MARGIN, height + strip + MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + MARGIN), "white")
    for i, picture in enumerate(pictures):
        left, top = MARGIN + i % columns * step_x, MARGIN + i // columns * step_y
        sheet.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
        if captions:
            sheet.paste(_caption(captions[i], width), (left, top + height))
    return sheet


def _caption(text: str, width: int) -> Image.Image:
    """A strip of its own, so that a long caption ends at its cell."""
    strip = Image.new("RGB", (width, CAPTION_HEIGHT), "white")
    ImageDraw.Draw(strip).text((0, 2), text, fill="black", font=ImageFont.load_default())
    return strip
