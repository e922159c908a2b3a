"""Pictures beside one another with a line below each: what reports and audits show."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from tokenizer_vq.images import fit_cover

MARGIN, CAPTION = 8, 16

Row = Sequence[tuple[Image.Image, str]]  # pictures and what stands below them


def sheet(rows: Sequence[Row], side: int, height: int | None = None) -> Image.Image:
    """Rows of squares of `side` pixels (or of that height) on white. Where no picture of a row has a caption it takes
    no room."""
    tall = height or side
    heights = [tall + MARGIN + (CAPTION if any(caption for _, caption in row) else 0) for row in rows]
    width = max(len(row) for row in rows) * (side + MARGIN) + MARGIN
    page = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, row_height in zip(rows, heights, strict=True):
        for i, (picture, caption) in enumerate(row):
            left = MARGIN + i * (side + MARGIN)
            page.paste(fit_cover(picture, side, tall), (left, top))
            if caption:
                page.paste(_line(caption, side), (left, top + tall))
        top += row_height
    return page


def _line(text: str, width: int) -> Image.Image:
    """A strip with as much of the text as fits: the end of a name tells more than its beginning."""
    font = ImageFont.load_default()
    while len(text) > 4 and font.getlength(text) > width:
        text = "..." + text.removeprefix("...")[1:]
    strip = Image.new("RGB", (width, CAPTION), "white")
    ImageDraw.Draw(strip).text((0, 2), text, fill="black", font=font)
    return strip


def data_address(picture: Image.Image) -> str:
    """The picture as an address that holds it, for a page that needs no other file."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
