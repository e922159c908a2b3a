"""Edits of a picture: what of it stays, and what is to be drawn. The drawing itself is that of canvas.py.

A picture made by the same model brings its exact tokens along, as long as nobody has changed its pixels since; any
other one is encoded. Pixels that nobody asked to change stay exactly as they are. The parameters of the five functions
are the flags of the five commands.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from tokenizer_vq.base import MAX_PIXELS, UserError, flatten
from tokenizer_vq.images import as_rgba, fit_cover, open_picture
from tokenizer_vq.palette import PaletteConfig

from .bundle import Bundle
from .canvas import Task
from .config import ANCHORS, AS_DRAWN, check_share, keep_of
from .device import own_settings
from .fitting import LANCZOS, NEAREST, Inpainting, PartialGrid, canvas_for, continued, finish, mask_tokens, on_grid
from .recipe import UntrustedRecipe, is_unchanged, read_recipe
from .sizes import Size, parse_size
from .sprites import OPAQUE

BLOBS = 4  # a side, of the pattern in which two pictures are blended
DRAWN_SHARE = 0.4  # of a blend, between the parts of the two pictures

log = logging.getLogger("igpt")

# A file may carry tokens, what is in memory carries none; an array is [H, W] or [H, W, C].
Picture = str | Path | Image.Image | NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right and bottom in pixels


class Source(NamedTuple):
    """A picture to edit."""

    picture: Image.Image  # RGB
    tokens_hw: Tensor | None = None  # if it carries those of this model
    label: str | None = None
    original: Image.Image | None = None  # RGBA, where it is transparent anywhere


@own_settings()
def open_source(model: Bundle, picture: Picture) -> Source:
    """A picture of any size and mode, with its tokens where it carries trustworthy ones of this model. Of sprites what
    is transparent is the ground of the palette.

    Raises UserError when there is no such picture. An igpt chunk that does not fit is ignored with a warning.
    """
    rgba, config = _rgba(picture), model.tokenizer.config
    if isinstance(config, PaletteConfig):
        source = Source(flatten(rgba, config.ground or "white", OPAQUE))
    else:
        source = Source(flatten(rgba, "white"), original=rgba if _is_transparent(rgba) else None)
    if not isinstance(picture, str | Path):
        return source
    try:
        recipe = read_recipe(picture)
        if recipe is None:
            return source
        if recipe.weights_hash != model.weights_hash:
            raise UntrustedRecipe(f"it was made by {recipe.model!r:.50}, a model with other weights")
        if max(recipe.tokens) >= model.tokenizer.vocab_size:
            raise UntrustedRecipe("it has tokens that the model has not")
        scale = recipe.sprite.scale
        if rgba.size != (recipe.size[0] * scale, recipe.size[1] * scale) or not is_unchanged(picture, recipe):
            raise UntrustedRecipe("its pixels were changed since")
    except UntrustedRecipe as error:
        log.warning("the igpt chunk of %s is ignored and the picture encoded anew: %s", picture, error)
        return source
    tokens_hw = torch.tensor(recipe.tokens).view(*recipe.grid)
    if recipe.sprite != AS_DRAWN:  # enlarged, or in other colours
        source = Source(finish(model, tokens_hw[None], canvas_for(model, recipe.size, recipe.tile))[0])
    return source._replace(tokens_hw=tokens_hw, label=recipe.label if recipe.label in model.labels else None)


def _rgba(picture: Picture) -> Image.Image:
    """A picture in a file or in memory. Raises UserError for what is none or too large."""
    if isinstance(picture, str | Path):
        return open_picture(Path(picture), mode="RGBA")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim < 2 or picture.shape[2:] not in ((), (3,), (4,)):
            wanted = "[H, W], [H, W, 3] or [H, W, 4] of uint8 is wanted"
            raise UserError(f"got an array {picture.shape} of {picture.dtype}; {wanted}")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise UserError(f"got a {type(picture).__name__} for a picture; a path, Pillow's Image or an array is wanted")
    if picture.width * picture.height > MAX_PIXELS:
        most = MAX_PIXELS // 10**6
        raise UserError(f"the picture has {_size(picture)} pixels; at most {most} million are wanted")
    return as_rgba(picture)


def _size(picture: Image.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _is_transparent(rgba: Image.Image) -> bool:
    return rgba.getchannel("A").getextrema() != (255, 255)


def _white(mask: Image.Image) -> Image.Image:
    """Where a mask asks for drawing, "L" of 0 and 255: its white; on a transparent layer whatever is painted there in
    white, or in another colour if nothing is."""
    white = flatten(mask, "black").convert("L").point(lambda value: 255 * (value >= OPAQUE))
    if white.getextrema() == (0, 0) and _is_transparent(mask):
        return mask.getchannel("A").point(lambda value: 255 * (value >= OPAQUE))
    return white


# The five edits


def complete(model: Bundle, picture: Picture, keep: str | float) -> Task:
    """Keeps one half (top, bottom, left, right), or that share from the top, and draws the rest."""
    side, share = keep_of(keep)
    source = open_source(model, picture)
    size, axis = source.picture.size, int(side in ("top", "bottom"))
    if size[axis] < 2:
        raise UserError(f"a picture of {size[0]}x{size[1]} pixels is too small to keep a part of it")
    part = min(max(1, round(size[axis] * share)), size[axis] - 1)
    mask = _all_but(_place(size, (size[0], part) if axis else (part, size[1]), side), size)
    return _inpainting(model, "complete", source, mask)


def inpaint(model: Bundle, picture: Picture, mask: Picture | None = None) -> Task:
    """Draws where the mask is white, without one where the picture is transparent. Raises UserError for a mask of
    another size, all white or all black."""
    source = open_source(model, picture)
    if mask is None:
        white = _rgba(picture).getchannel("A").point(lambda value: 255 * (value < OPAQUE))
        if white.getextrema() == (0, 0):
            raise UserError("the picture is nowhere transparent, so a mask is wanted that is white where to draw")
    else:
        white = _white(_rgba(mask))
    if white.size != source.picture.size:
        size = _size(source.picture)
        raise UserError(f"the mask has {_size(white)} pixels and the picture {size}: scale the mask to {size}")
    if white.getextrema() in ((0, 0), (255, 255)):
        colour, what = ("black", "nothing") if white.getextrema() == (0, 0) else ("white", "everything")
        raise UserError(f"the mask is all {colour}, which asks for {what} to be drawn: make white what is to be drawn")
    return _inpainting(model, "inpaint", source, white)


@own_settings()
def extend(model: Bundle, picture: Picture, size: Size, anchor: str) -> Task:
    """Draws around the picture until it has the size; `anchor` says where in it the picture stays.

    Raises UserError where the size is not larger.
    """
    (width, height), token = parse_size(size), model.downsample
    if anchor not in ANCHORS:
        raise UserError(f"anchor is {anchor!r}; one of {', '.join(ANCHORS)} is wanted")
    source = open_source(model, picture)
    old = source.picture
    if width < old.width or height < old.height or (width, height) == old.size:
        wanted = "neither side may be smaller, and one must be larger"
        raise UserError(f"the size {width}x{height} does not extend a picture of {_size(old)} pixels: {wanted}")
    # In the middle a picture with tokens keeps to whole ones, so that they are needed no second time.
    box = _place((width, height), old.size, anchor, token if source.tokens_hw is not None else 1)
    tokens_hw = None
    if source.tokens_hw is not None and not any(number % token for number in (width, height, *box)):
        left, top, right, bottom = (side // token for side in box)
        if source.tokens_hw.shape == (bottom - top, right - left):
            tokens_hw = torch.zeros(height // token, width // token, dtype=torch.long)
            tokens_hw[top:bottom, left:right] = source.tokens_hw
    original = None
    if source.original:
        original = Image.new("RGBA", (width, height))
        original.paste(source.original, box)
    larger = Source(continued(old, (width, height), *box[:2]), tokens_hw, source.label, original)
    return _inpainting(model, "extend", larger, _all_but(box, (width, height)))


def vary(model: Bundle, picture: Picture, strength: float) -> Task:
    """Draws that share of the composition's cells anew, wherever they lie; 0 leaves the picture as it is.

    Raises UserError for a strength outside 0 to 1.
    """
    check_share("strength", strength)
    source = open_source(model, picture)
    nowhere = Image.new("L", source.picture.size, 0)
    if strength == 0:
        return _inpainting(model, "vary", source, nowhere)
    unchanged = Inpainting(source.picture, nowhere, source.tokens_hw)
    canvas, cell = canvas_for(model, source.picture.size), model.gpt.config.cell
    grid = canvas.levels[0]

    def start(seed: int) -> PartialGrid:
        cells_hw = torch.rand([side // cell for side in grid], generator=Generator().manual_seed(seed)) >= strength
        known_hw = cells_hw.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return PartialGrid(on_grid(model, unchanged, grid).tokens_hw, known_hw)

    return Task("vary", canvas, start, source.label)


def blend(model: Bundle, picture: Picture, other: Picture, mix: float) -> Task:
    """Parts of two pictures in a random pattern of blobs, and what lies between drawn; `mix` is the share of the other.

    That one is cut to the proportions of the first. Raises UserError for a mix outside 0 to 1.
    """
    check_share("mix", mix)
    a, b = open_source(model, picture), open_source(model, other)
    size = a.picture.size
    resample = NEAREST if model.downsample == 1 else LANCZOS  # where a token is a pixel its colours stay
    picture_b = b.picture if b.picture.size == size else fit_cover(b.picture, *size, resample)

    def start(seed: int) -> Inpainting:
        blobs = torch.rand(1, 1, BLOBS, BLOBS, generator=Generator().manual_seed(seed))
        field_HW = F.interpolate(blobs, size[::-1], mode="bicubic", align_corners=True)[0, 0]
        ordered = field_HW.flatten().sort().values
        places = [(1 - mix) * (1 - DRAWN_SHARE), 1 - mix, 1 - mix * (1 - DRAWN_SHARE)]
        low, middle, high = (float(ordered[round(place * (len(ordered) - 1))]) for place in places)
        of_b, mask = _mask(field_HW >= middle), _mask((field_HW > low) & (field_HW < high))
        tokens_hw = None
        if a.tokens_hw is not None and b.tokens_hw is not None and a.tokens_hw.shape == b.tokens_hw.shape:
            of_b_hw = mask_tokens(model, of_b, (a.tokens_hw.shape[0], a.tokens_hw.shape[1]))
            tokens_hw = torch.where(of_b_hw, b.tokens_hw, a.tokens_hw) if b.picture.size == size else None
        return Inpainting(Image.composite(picture_b, a.picture, of_b), mask, tokens_hw)

    return Task("blend", canvas_for(model, size), start, a.label if a.label == b.label else None)


def _inpainting(model: Bundle, command: str, source: Source, mask: Image.Image) -> Task:
    given = Inpainting(source.picture, mask, source.tokens_hw, source.original)
    return Task(command, canvas_for(model, mask.size), lambda seed: given, source.label)


def _place(size: tuple[int, int], inner: tuple[int, int], anchor: str, step: int = 1) -> Box:
    """Where in a picture a smaller one lies; in the middle at a multiple of `step` pixels."""
    left, top = ((whole - part) // 2 // step * step for whole, part in zip(size, inner, strict=True))
    left = 0 if "left" in anchor else size[0] - inner[0] if "right" in anchor else left
    top = 0 if "top" in anchor else size[1] - inner[1] if "bottom" in anchor else top
    return left, top, left + inner[0], top + inner[1]


def _all_but(box: Box, size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 255)
    mask.paste(0, box)
    return mask


def _mask(where_HW: Tensor) -> Image.Image:
    return Image.fromarray((where_HW.to(torch.uint8) * 255).numpy())
