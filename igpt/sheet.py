"""Contact sheets: pictures in rows, with a line below each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

MARGIN, CAPTION = 8, 16  # pixels between pictures, and of the height of a line
LARGEST_SHEET = 4096  # pixels a side, about

Row = Sequence[tuple[Image.Image, str]]  # pictures and what stands below them


def sheet(rows: Sequence[Row]) -> Image.Image:
    """Rows of pictures on white, each in the middle of a cell that fits the largest. Where no picture of a row has a
    caption it takes no room."""
    pictures = [picture for row in rows for picture, _ in row]
    width, height = max(picture.width for picture in pictures), max(picture.height for picture in pictures)
    strips = [CAPTION if any(caption for _, caption in row) else 0 for row in rows]
    columns = max(len(row) for row in rows)
    size = (columns * (width + MARGIN) + MARGIN, sum(strips) + len(rows) * (height + MARGIN) + MARGIN)
    page, top = Image.new("RGB", size, "white"), MARGIN
    for row, strip in zip(rows, strips, strict=True):
        for i, (picture, caption) in enumerate(row):
            left = MARGIN + i * (width + MARGIN)
            page.paste(picture, (left + (width - picture.width) // 2, top + (height - picture.height) // 2))
            if caption:
                page.paste(_line(caption, width), (left, top + height))
        top += height + strip + MARGIN
    return page


def square_sheet(pictures: Row) -> Image.Image:
    """Any number of pictures in as many rows as columns, made smaller where there would be too large a sheet."""
    columns, cells = math.ceil(math.sqrt(len(pictures))), []
    for picture, caption in pictures:
        small = picture.copy()
        small.thumbnail((LARGEST_SHEET // columns,) * 2, Image.Resampling.LANCZOS)
        cells.append((small, caption))
    return sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def _line(text: str, width: int) -> Image.Image:
    """A strip with as much of the text as fits: the end of a name says more than its beginning."""
    font = ImageFont.load_default()
    while len(text) > 4 and font.getlength(text) > width:
        text = "..." + text.removeprefix("...")[1:]
    strip = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(strip).text((0, 2), text, fill="black", font=font)
    return strip
