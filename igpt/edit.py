"""Edits of a picture: what of it stays, and what is to be drawn. The drawing itself is that of canvas.py.

A picture made by the same model brings its exact tokens along, as long as nobody has changed its pixels since; any
other one is encoded. Pixels that nobody asked to change stay exactly as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from tokenizer_vq.base import MAX_PIXELS, UserError
from tokenizer_vq.images import as_rgb, fit_cover, open_picture

from .bundle import Bundle
from .canvas import PartialGrid, generate_grids
from .config import SamplingOptions, check_anchor, check_share, keep_of
from .fitting import LANCZOS, NEAREST, Inpainting, canvas_for, composite, finish, mask_tokens, tokens_on
from .recipe import Recipe, digest, read_recipe
from .sampling import generators

FIELD = 4  # blobs a side of the pattern in which two pictures are blended
DRAWN = 0.4  # share of a blend that is drawn, between the parts of the two pictures

log = logging.getLogger("igpt")

Picture = str | Path | Image.Image  # a picture in memory carries no tokens


class Source(NamedTuple):
    """A picture to edit."""

    picture: Image.Image  # RGB
    tokens_hw: Tensor | None = None  # if it carries those of this model
    label: str | None = None


class Edit(NamedTuple):
    """What to draw. `begin` makes of a seed what `generate_grids` starts from."""

    command: str
    size: tuple[int, int]
    label: str | None
    begin: Callable[[int], Inpainting | PartialGrid]


class EditResult(NamedTuple):
    """An edited picture, and what its recipe has to tell."""

    picture: Image.Image
    tokens_hw: Tensor
    given_hw: Tensor  # bool


# Reading


def open_source(model: Bundle, source: Picture) -> Source:
    """A picture of any size and mode, with its tokens where it carries trustworthy ones of this model.

    Raises UserError when there is no such picture. An igpt chunk that does not fit is ignored with a warning.
    """
    if isinstance(source, Image.Image):
        (width, height), most = source.size, MAX_PIXELS // 10**6
        if width * height > MAX_PIXELS:
            raise UserError(f"the picture has {width}x{height} pixels; at most {most} million are wanted")
        return Source(as_rgb(source))
    picture = open_picture(Path(source))
    recipe = read_recipe(source)
    if recipe is None:
        return Source(picture)
    if (why := _unfit(model, picture, recipe)) is not None:
        log.warning("the igpt chunk of %s is ignored and the picture encoded anew: %s", source, why)
        return Source(picture)
    label = recipe.label if recipe.label in model.labels else None
    return Source(picture, torch.tensor(recipe.tokens).view(*recipe.grid), label)


def _unfit(model: Bundle, picture: Image.Image, recipe: Recipe) -> str | None:
    """Why the tokens of a recipe are not those of the picture for this model; None if they are."""
    if recipe.weights_hash != model.weights_hash:
        return f"it was made by {recipe.model!r:.50}, a model with other weights"
    if max(recipe.tokens) >= model.tokenizer.vocab_size:
        return "it has tokens that the model has not"
    if recipe.size != picture.size or (recipe.pixels and recipe.pixels != digest(picture)):
        return "its pixels were changed since"
    return None


# The five edits


def complete(source: Source, keep: str | float) -> Edit:
    """Keeps one half (top, bottom, left, right), or that share from the top, and draws the rest."""
    side, share = keep_of(keep)
    width, height = source.picture.size
    length = height if side in ("top", "bottom") else width
    if length < 2:
        raise UserError(f"a picture of {width}x{height} pixels is too small to keep a part of it")
    kept = min(max(1, round(length * share)), length - 1)
    box = {
        "top": (0, kept, width, height),
        "bottom": (0, 0, width, height - kept),
        "left": (kept, 0, width, height),
        "right": (0, 0, width - kept, height),
    }[side]
    mask = Image.new("L", source.picture.size, 0)
    mask.paste(255, box)
    return _fixed("complete", source, Inpainting(source.picture, mask, source.tokens_hw))


def inpaint(source: Source, painted: Source) -> Edit:
    """Draws where the mask is white. Raises UserError for a mask of another size, all white or all black."""
    size = source.picture.size
    mask = painted.picture.convert("L").point(lambda level: 255 if level >= 128 else 0)
    if mask.size != size:
        raise UserError(
            f"the mask has {mask.width}x{mask.height} pixels and the picture {size[0]}x{size[1]}: scale the mask "
            f"to {size[0]}x{size[1]}"
        )
    if mask.getextrema() in ((0, 0), (255, 255)):
        colour, what = ("black", "nothing") if mask.getextrema() == (0, 0) else ("white", "everything")
        raise UserError(f"the mask is all {colour}, which asks for {what} to be drawn: make white what is to be drawn")
    return _fixed("inpaint", source, Inpainting(source.picture, mask, source.tokens_hw))


def extend(source: Source, size: tuple[int, int], anchor: str, token: int) -> Edit:
    """Draws around the picture until it has the size; `anchor` says where in it the picture stays.

    Raises UserError where the size is not larger.
    """
    check_anchor(anchor)
    (width, height), (old_width, old_height) = size, source.picture.size
    if width < old_width or height < old_height or size == source.picture.size:
        raise UserError(
            f"the size {width}x{height} does not extend a picture of {old_width}x{old_height} pixels: neither side may "
            "be smaller, and one must be larger"
        )
    # In the middle a picture with tokens keeps to whole ones, so that they are needed no second time.
    step = token if source.tokens_hw is not None else 1
    left, top = (width - old_width) // 2 // step * step, (height - old_height) // 2 // step * step
    left = 0 if "left" in anchor else width - old_width if "right" in anchor else left
    top = 0 if "top" in anchor else height - old_height if "bottom" in anchor else top
    margins = ((top, height - old_height - top), (left, width - old_width - left), (0, 0))
    picture = Image.fromarray(np.pad(np.asarray(source.picture), margins, mode="edge"))
    mask = Image.new("L", size, 255)
    mask.paste(0, (left, top, left + old_width, top + old_height))
    tokens_hw = _placed(source, size, left, top, token)
    return _fixed("extend", source, Inpainting(picture, mask, tokens_hw))


def _placed(source: Source, size: tuple[int, int], left: int, top: int, token: int) -> Tensor | None:
    """The source's tokens on the larger grid, where both grids agree pixel by pixel."""
    if source.tokens_hw is None or any(number % token for number in (*size, left, top)):
        return None
    h, w = source.tokens_hw.shape
    if (w * token, h * token) != source.picture.size:
        return None
    tokens_hw = torch.zeros(size[1] // token, size[0] // token, dtype=torch.long)
    tokens_hw[top // token : top // token + h, left // token : left // token + w] = source.tokens_hw
    return tokens_hw


def vary(model: Bundle, source: Source, strength: float) -> Edit:
    """Draws that share of the composition's cells anew, wherever they lie; 0 leaves the picture as it is.

    Raises UserError for a strength outside 0 to 1.
    """
    check_share("strength", strength)
    size = source.picture.size
    nothing = Inpainting(source.picture, Image.new("L", size, 0), source.tokens_hw)
    if strength == 0:
        return _fixed("vary", source, nothing)
    grid = model.grids.composition(*size)

    def begin(seed: int) -> PartialGrid:
        cell = model.gpt.config.cell
        cells_hw = torch.rand([side // cell for side in grid], generator=Generator().manual_seed(seed)) >= strength
        known_hw = cells_hw.repeat_interleave(cell, 0).repeat_interleave(cell, 1)
        return PartialGrid(tokens_on(model, nothing, grid), known_hw)

    return Edit("vary", size, source.label, begin)


def blend(model: Bundle, a: Source, b: Source, mix: float) -> Edit:
    """Parts of A and parts of B in a random pattern of blobs, with what lies between drawn; `mix` is the share of B.

    B is cut to the proportions of A. Raises UserError for a mix outside 0 to 1.
    """
    check_share("mix", mix)
    size = a.picture.size
    resample = NEAREST if model.downsample == 1 else LANCZOS  # where a token is a pixel its colours stay
    other = b.picture if b.picture.size == size else fit_cover(b.picture, *size, resample)
    same_grid = a.tokens_hw is not None and b.tokens_hw is not None and a.tokens_hw.shape == b.tokens_hw.shape
    own_tokens = same_grid and b.picture.size == size

    def begin(seed: int) -> Inpainting:
        blobs = torch.rand(1, 1, FIELD, FIELD, generator=Generator().manual_seed(seed))
        field_HW = F.interpolate(blobs, size[::-1], mode="bicubic", align_corners=True)[0, 0]
        ordered = field_HW.flatten().sort().values
        places = [(1 - mix) * (1 - DRAWN), 1 - mix, 1 - mix * (1 - DRAWN)]
        low, middle, high = (float(ordered[round(place * (len(ordered) - 1))]) for place in places)
        of_b = _mask(field_HW >= middle)
        mask = _mask((field_HW > low) & (field_HW < high))
        tokens_hw = None
        if own_tokens and a.tokens_hw is not None and b.tokens_hw is not None:
            from_b_hw = mask_tokens(model, of_b, (a.tokens_hw.shape[0], a.tokens_hw.shape[1]))
            tokens_hw = torch.where(from_b_hw, b.tokens_hw, a.tokens_hw)
        return Inpainting(Image.composite(other, a.picture, of_b), mask, tokens_hw)

    return Edit("blend", size, a.label if a.label == b.label else None, begin)


def _mask(where_HW: Tensor) -> Image.Image:
    return Image.fromarray((where_HW.to(torch.uint8) * 255).numpy())


def _fixed(command: str, source: Source, given: Inpainting) -> Edit:
    return Edit(command, given.picture.size, source.label, lambda seed: given)


# Doing them


def labelled(model: Bundle, edit: Edit, label: str | None) -> Edit:
    """The edit with the label it is drawn as: the one asked for, or its source's, or the one that fits best to what
    of the picture is given; none for NO_LABEL. Raises UserError for a label that the model has not."""
    if label is not None or edit.label is not None or not model.labels:
        return edit._replace(label=model.labels_for(label or edit.label, 0)[0])
    start, grid = edit.begin(0), model.grids.composition(*edit.size)
    if isinstance(start, Inpainting):
        start = PartialGrid(tokens_on(model, start, grid), ~mask_tokens(model, start.mask, grid))
    known_hw = start.known_hw if start.known_hw.any() else torch.ones_like(start.known_hw)
    return edit._replace(label=model.guess_label(start.tokens_hw, known_hw))


def draw_edit(model: Bundle, edit: Edit, seed: int, options: SamplingOptions) -> Iterator[list[PartialGrid]]:
    """The edit drawn from one seed, step by step, as `generate_grids` does."""
    start = edit.begin(seed)
    canvas, labels_B = canvas_for(model, edit.size), model.label_numbers([edit.label])
    return generate_grids(model, canvas, labels_B, generators(seed, 1), options, start)


def finish_edit(model: Bundle, edit: Edit, seed: int, tokens_hw: Tensor) -> EditResult:
    """The picture of a drawn edit."""
    start, grid = edit.begin(seed), (tokens_hw.shape[0], tokens_hw.shape[1])
    drawn = finish(model, tokens_hw, canvas_for(model, edit.size))
    if isinstance(start, Inpainting):
        return EditResult(composite(model, start, drawn), tokens_hw, ~mask_tokens(model, start.mask, grid))
    on_one_level = start.known_hw.shape == grid
    return EditResult(drawn, tokens_hw, start.known_hw if on_one_level else torch.zeros(grid, dtype=torch.bool))


def edited(
    model: Bundle, edit: Edit, n: int, label: str | None, seed: int, options: SamplingOptions
) -> list[Image.Image]:
    """n pictures of an edit, for the library; picture i has the seed `seed + i`."""
    edit = labelled(model, edit, label)
    pictures = []
    for number in range(seed, seed + n):
        *_, (grid,) = draw_edit(model, edit, number, options)
        pictures.append(finish_edit(model, edit, number, grid.tokens_hw).picture)
    return pictures
