"""The drawing of a picture as an animated GIF or WebP."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO

from PIL import Image

from igpt.canvas import Batch
from igpt.fitting import PartialGrid

FRAMES = 48  # about
FRAME_TIME = 80  # milliseconds
LAST_FRAME_TIME = 2500  # the finished picture stays so long
WEBP_QUALITY = 90  # up to 100
LARGEST_FRAME = 512  # pixels a side


def recorded(batch: Batch, frames: list[Image.Image]) -> Iterator[list[PartialGrid]]:
    """Steps of a batch of one picture, while what it looks like is added to the frames."""
    for grids in batch.some_steps(FRAMES):
        frame = batch.preview(grids[0]).convert("RGB")
        frame.thumbnail((LARGEST_FRAME, LARGEST_FRAME), Image.Resampling.LANCZOS)
        frames.append(frame)
        yield grids


def animation(frames: list[Image.Image], kind: str, *, exact: bool) -> bytes:
    """The frames as a "gif" or "webp" that repeats for ever; `exact` is for sprites, of which a lossy WebP would blur
    the pixels."""
    if kind == "gif":  # one palette, that of the finished picture and mid-grey: changing colours would flicker
        last = frames[-1]
        with_grey = Image.new("RGB", (last.width, last.height + max(1, last.height // 16)), (128, 128, 128))
        with_grey.paste(last, (0, 0))
        palette = with_grey.quantize(256)
        frames = [frame.quantize(palette=palette) for frame in frames]
    times, data = [FRAME_TIME] * (len(frames) - 1) + [LAST_FRAME_TIME], BytesIO()
    more = {"append_images": frames[1:], "duration": times, "loop": 0, "quality": WEBP_QUALITY, "lossless": exact}
    frames[0].save(data, kind, save_all=True, **more)
    return data.getvalue()
