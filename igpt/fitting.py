"""Pictures of any size into the pixels of a token grid and back; the parts of two pictures in one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter
from torch import Tensor

from tokenizer_vq.images import fit_cover

from .bundle import Bundle
from .sizes import Grid
from .tiling import decode, encode, wrapped

FADE = 8  # pixels over which a drawn part turns into the picture around it
WRAP_MARGIN = 64  # pixels beyond an edge that wraps: more than Lanczos looks at when it halves or doubles
LANCZOS, NEAREST, BOX = Image.Resampling.LANCZOS, Image.Resampling.NEAREST, Image.Resampling.BOX


class Canvas(NamedTuple):
    """What a picture is drawn on."""

    size: tuple[int, int]  # width and height in pixels
    levels: list[Grid]  # its pyramid of token grids: the composition first, the finest last
    wraps: bool = False  # whether it is a texture that goes on at its other side


class PartialGrid(NamedTuple):
    """The tokens of one picture on its way."""

    tokens_hw: Tensor
    known_hw: Tensor  # bool


class Inpainting(NamedTuple):
    """A picture of which a part is to be drawn."""

    picture: Image.Image  # RGB
    mask: Image.Image  # "L", of the same size: 255 where to draw, 0 elsewhere
    tokens_hw: Tensor | None = None  # the picture's own, if it carries them
    original: Image.Image | None = None  # RGBA, where it is transparent anywhere


def canvas_for(model: Bundle, size: tuple[int, int], wraps: bool = False) -> Canvas:
    """The canvas on which the model draws a picture of that size."""
    return Canvas(size, model.grids.pyramid(*size), wraps)


# Into a grid


def letterbox(model: Bundle, picture: Image.Image, grid: Grid, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """A picture in the pixels of a grid: as large as fits into the middle, continued at its edges.

    The inverse of `cover`. BOX is for masks.
    """
    if model.downsample == 1:
        return _letterbox_sprite(model, picture, grid, mask=resample == BOX)
    height, width = (side * model.downsample for side in grid)
    scale = min(width / picture.width, height / picture.height)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    small = picture if picture.size == inner else picture.resize(inner, resample)
    return continued(small, (width, height), (width - inner[0]) // 2, (height - inner[1]) // 2)


def continued(picture: Image.Image, size: tuple[int, int], left: int, top: int) -> Image.Image:
    """The picture at that place of a larger one, its outermost pixels repeated all around."""
    right, bottom = size[0] - picture.width - left, size[1] - picture.height - top
    values = np.asarray(picture)
    return Image.fromarray(np.pad(values, ((top, bottom), (left, right), (0, 0))[: values.ndim], mode="edge"))


def _letterbox_sprite(model: Bundle, picture: Image.Image, grid: Grid, mask: bool) -> Image.Image:
    """`letterbox` where a token is a pixel. Nothing is resampled: of the pixels that `cover` makes of a token the
    middle one is taken, of a mask the brightest."""
    values, (finest, times) = np.asarray(picture), _enlargement(model, picture.size)
    for axis, (tokens, side) in enumerate(zip(grid, finest, strict=True)):
        length, before = side * times, (side * times - values.shape[axis]) // 2
        if mask:
            starts = np.arange(tokens) * length // tokens - before
            values = np.maximum.reduceat(values, starts.clip(0, values.shape[axis] - 1), axis)
        else:
            middles = (2 * np.arange(tokens) + 1) * length // (2 * tokens) - before
            values = values.take(middles.clip(0, values.shape[axis] - 1), axis)
    return Image.fromarray(values)


def _enlargement(model: Bundle, size: tuple[int, int]) -> tuple[Grid, int]:
    """Where a token is a pixel: the last grid of a picture of that size, and how many pixels a side each token gets."""
    rows, columns = model.grids.pyramid(*size)[-1]
    return (rows, columns), max(-(-size[0] // columns), -(-size[1] // rows))


def mask_tokens(model: Bundle, mask: Image.Image, grid: Grid) -> Tensor:
    """Bool [h, w]: the tokens of which at least a pixel is to be drawn."""
    mask_HW = torch.from_numpy(np.array(letterbox(model, mask, grid, BOX))).float()
    return F.max_pool2d(mask_HW[None, None], model.downsample)[0, 0] > 0


def on_grid(model: Bundle, given: Inpainting, grid: Grid) -> PartialGrid:
    """The given picture on a grid, in its own tokens where they are on that grid, or else encoded; what its mask
    touches is not known."""
    tokens_hw = given.tokens_hw
    if tokens_hw is None or tokens_hw.shape != grid:
        tokens_hw = encode(model, letterbox(model, given.picture, grid))
    return PartialGrid(tokens_hw, ~mask_tokens(model, given.mask, grid))


# Out of a grid


def finish(model: Bundle, tokens_Bhw: Tensor, canvas: Canvas) -> list[Image.Image]:
    """The pictures of grids in exactly the size of the canvas."""
    pictures = decode(model, tokens_Bhw, canvas.wraps)
    if canvas.wraps:
        return [resized(model, picture, canvas.size, True) for picture in pictures]
    return [cover(model, picture, canvas.size) for picture in pictures]


def cover(model: Bundle, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture of a grid in exactly `size` pixels: its middle, resized. Where a token is a pixel, each of the last
    grid becomes a whole number of pixels a side."""
    if model.downsample > 1:
        return fit_cover(picture, *size)
    (rows, columns), times = _enlargement(model, size)
    width, height = columns * times, rows * times
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    across, down = picture.width / width, picture.height / height
    box = (left * across, top * down, (left + size[0]) * across, (top + size[1]) * down)
    return picture.resize(size, NEAREST, box)


def resized(model: Bundle, picture: Image.Image, size: tuple[int, int], wraps: bool) -> Image.Image:
    """The whole picture in another size, with its other side beyond every edge where it wraps."""
    resample = LANCZOS if model.downsample > 1 else NEAREST
    if not wraps or picture.size == size:
        return picture.resize(size, resample)
    box = (WRAP_MARGIN, WRAP_MARGIN, WRAP_MARGIN + picture.width, WRAP_MARGIN + picture.height)
    return wrapped(picture, WRAP_MARGIN).resize(size, resample, box)


def composite(model: Bundle, given: Inpainting, drawn: Image.Image) -> Image.Image:
    """The given picture with the drawn one where its mask is white; all other pixels are the given ones.

    Within FADE pixels inside the edge of the mask one turns into the other; where it is too thin for that, the result
    is wholly the drawn one, and likewise where a token is a pixel, as mixed colours would be of no palette.
    """
    if model.downsample == 1:
        return Image.composite(drawn, given.picture, given.mask)
    if given.original is not None:  # outside the mask it stays as transparent as it was
        whole = composite(model, given._replace(original=None), drawn).convert("RGBA")
        return Image.composite(whole, given.original, given.mask.point(lambda value: 255 * (value > 0)))
    depth, inner = Image.new("L", given.mask.size), given.mask
    for _ in range(FADE):  # how many pixels from the edge, up to FADE
        depth = ImageChops.add(depth, inner.point(lambda value: value and 1))
        inner = inner.filter(ImageFilter.MinFilter(3))
    deepest = depth.filter(ImageFilter.MaxFilter(2 * FADE + 1))
    share = np.asarray(depth).astype(np.float32) / np.maximum(1, np.asarray(deepest))
    return Image.composite(drawn, given.picture, Image.fromarray((share * 255).round().astype(np.uint8)))
