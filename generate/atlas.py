"""An atlas: many sprites on one PNG, and beside it the JSON by which a game engine finds each of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from PIL import Image

import igpt
from tokenizer_vq.base import UserError

LARGEST_ATLAS = 16_384  # pixels a side: what graphics cards take as one texture


class Sprite(NamedTuple):
    """A picture of an atlas and how it was drawn."""

    name: str
    picture: Image.Image
    label: str | None
    seed: int


def atlas_shape(count: int, width: int, height: int) -> tuple[int, int]:
    """Columns and rows, about square, for `count` sprites of one size. Raises UserError where they are too many."""
    columns = math.ceil(math.sqrt(count * height / width))
    rows = math.ceil(count / columns)
    if max(columns * width, rows * height) > LARGEST_ATLAS:
        raise UserError(
            f"an atlas of {count} sprites of {width}x{height} pixels would have {columns * width}x{rows * height}; at "
            f"most {LARGEST_ATLAS} a side are wanted: fewer sprites, or a smaller --scale"
        )
    return columns, rows


def atlas(sprites: Sequence[Sprite], image_name: str) -> tuple[Image.Image, str]:
    """The sprites, all of one size, row by row, and the JSON that describes the atlas called `image_name`.

    The JSON is the hash form that Aseprite and TexturePacker write and engines read; each frame also has the label and
    the seed of its sprite, which engines ignore. Raises UserError as `atlas_shape`.
    """
    width, height = sprites[0].picture.size
    columns, rows = atlas_shape(len(sprites), width, height)
    sheet = _empty(sprites, (columns * width, rows * height))
    frames: dict[str, Any] = {}
    for i, sprite in enumerate(sprites):
        x, y = i % columns * width, i // columns * height
        sheet.paste(sprite.picture if sprite.picture.mode == sheet.mode else sprite.picture.convert("RGBA"), (x, y))
        frames[sprite.name] = {
            "frame": {"x": x, "y": y, "w": width, "h": height},
            "rotated": False,
            "trimmed": False,
            "spriteSourceSize": {"x": 0, "y": 0, "w": width, "h": height},
            "sourceSize": {"w": width, "h": height},
            "label": sprite.label,
            "seed": sprite.seed,
        }
    meta = {
        "app": "igpt",
        "version": igpt.__version__,
        "image": image_name,
        "format": "I8" if sheet.mode == "P" else "RGBA8888",
        "size": {"w": sheet.width, "h": sheet.height},
        "scale": "1",
    }
    return sheet, json.dumps({"frames": frames, "meta": meta}, indent=1) + "\n"


def _empty(sprites: Sequence[Sprite], size: tuple[int, int]) -> Image.Image:
    """A transparent sheet, in indexed colour where the sprites are: those of one model have one palette."""
    first = sprites[0].picture
    palettes = {bytes(sprite.picture.getpalette() or ()) for sprite in sprites}
    if len(palettes) > 1 or first.mode != "P":
        return Image.new("RGBA", size)
    sheet = Image.new("P", size, first.info.get("transparency", 0))
    sheet.putpalette(palettes.pop())
    sheet.info.update(first.info)
    return sheet
