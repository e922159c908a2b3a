"""The drawing of a picture as an animated GIF or WebP."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from igpt.bundle import Bundle
from igpt.canvas import PartialGrid, now_and_then, preview
from igpt.fitting import Canvas

FRAMES_KEPT = 48  # about
FRAME_TIME = 80  # milliseconds
LAST_TIME = 2500  # the finished picture stays so long
QUALITY = 90  # of WebP, up to 100
LARGEST_FRAME = 512  # pixels a side


class Timelapse:
    """Watches one picture being drawn."""

    def __init__(self, model: Bundle, canvas: Canvas):
        self.model, self.canvas = model, canvas
        self.frames: list[Image.Image] = []

    def recording(self, grids: Iterator[list[PartialGrid]]) -> Iterator[list[PartialGrid]]:
        """The same grids, of one picture each, while frames of it are kept."""
        for grid in now_and_then(grids, self.canvas, FRAMES_KEPT):
            frame = preview(self.model, grid[0], self.canvas)
            frame.thumbnail((LARGEST_FRAME, LARGEST_FRAME), Image.Resampling.LANCZOS)
            self.frames.append(frame)
            yield grid

    def encoded(self, kind: str) -> bytes:
        """The frames as a "gif" or "webp" that repeats for ever."""
        frames = self.frames
        if kind == "gif":  # one palette, that of the finished picture and mid-grey: changing colours would flicker
            palette = _with_grey(frames[-1]).quantize(256)
            frames = [frame.quantize(palette=palette) for frame in frames]
        times = [FRAME_TIME] * (len(frames) - 1) + [LAST_TIME]
        data = BytesIO()
        exact = self.model.downsample == 1  # what a lossy WebP does to single pixels is not to be looked at
        frames[0].save(
            data, kind, save_all=True, append_images=frames[1:], duration=times, loop=0, quality=QUALITY, lossless=exact
        )
        return data.getvalue()


def _with_grey(picture: Image.Image) -> Image.Image:
    """The picture above a strip of the grey that stands for what is not drawn yet."""
    both = Image.new("RGB", (picture.width, picture.height + max(1, picture.height // 16)), (128, 128, 128))
    both.paste(picture, (0, 0))
    return both
