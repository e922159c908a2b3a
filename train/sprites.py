"""Pixel art to learn from: whether a folder is that, its palette, and what lies under transparent pixels.

Notable choices:
- transparency is a token of its own, with a colour that no picture has: all other code sees plain RGB;
- opaque sprites on a plain ground keep it as the colour that is transparent where it reaches the edge;
- the palette is exact up to MOST_COLOURS, and has as many centres (k-means) beyond.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from igpt.image_gpt import ImageGPT
from igpt.lora import with_tokens
from igpt.sizes import LARGEST_SPRITE, SMALLEST_SIDE
from igpt.sprites import OPAQUE
from tokenizer_vq.base import UserError, flatten
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import from_uint8, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

from .options import TrainOptions

LARGEST_LEARNED = 64  # pixels a side of a sprite that is learned as a whole
FEW_COLOURS = 1024  # in all pictures of a folder: with more it is no pixel art
MOST_COLOURS = 254  # with a ground and an entry for what is transparent they fit into an indexed picture
FREE_COLOURS = ("#ffffff", "#ff00ff", "#00ff00", "#00ffff", "#fe01fe")  # the first that is free stands for transparency
EXAMINED = 8  # pictures, to see whether a folder has few colours
PLAIN = 0.5  # share of the pixels at the edges which is one colour: that is the ground then


Codes = NDArray[np.int64]  # of colours, 0xrrggbb


class SpritePalette(NamedTuple):
    """The palette for a folder of sprites."""

    config: PaletteConfig
    colours: int  # different ones in the folder
    lost: int  # of these, how many are learned as the nearest of the palette
    reason: str  # a sentence on why the folder has a palette


def palette_for(art: ArtFolder, options: TrainOptions) -> SpritePalette | None:
    """The palette with which a folder is learned, pixel by pixel, where it is asked for or the folder is pixel art.

    Of no option it has the folder's own colours, of "64" so many, of a .gpl or .hex file those. Raises UserError for a
    number or a file that is none, and where codes and a palette are both asked for.
    """
    if options.tokens == "vq" and options.palette:
        raise UserError(f"--tokens vq learns codes and has no --palette {options.palette}; one of them is wanted")
    small, asked = max(map(max, art.sizes)) <= LARGEST_LEARNED, bool(options.palette) or options.tokens == "palette"
    if options.tokens == "vq" or not (small or asked):
        return None
    opaque_P, edges_P, clear = _colours(art)
    present = [f"#{code:06x}" for code in np.unique(opaque_P)]
    if len(present) > FEW_COLOURS and not asked:
        return None
    colours = _palette(opaque_P, options.palette)
    lost = len(set(present) - set(colours))
    why = "as asked" if asked else f"no picture has more than {LARGEST_LEARNED} pixels a side, --tokens vq learns codes"
    how = f"{lost} are learned as the nearest of {len(colours)}" if lost else "all are learned as they are"
    reason = f"a token is a pixel ({why}); of {len(present)} colours {how}"
    if clear:
        free = next((colour for colour in FREE_COLOURS if colour not in {*present, *colours}), None)
        if free is None:
            raise UserError(f"the pictures have all of {', '.join(FREE_COLOURS)}; one is wanted, to mean transparent")
        return SpritePalette(PaletteConfig((*colours, free), free), len(present), lost, reason)
    codes, counts = np.unique(edges_P, return_counts=True)
    ground = f"#{codes[counts.argmax()]:06x}"
    if counts.max() < PLAIN * counts.sum() or ground not in colours:
        ground = ""
    return SpritePalette(PaletteConfig(colours, ground, ground_inside=False), len(present), lost, reason)


def advice(art: ArtFolder) -> str:
    """What to do where pictures of few colours are too large to be learned as sprites; "" where they are not."""
    few = all(art.picture(i).getcolors(MOST_COLOURS) for i in range(min(len(art), EXAMINED)))
    largest = max(map(max, art.sizes))
    if largest <= LARGEST_LEARNED or not few:
        return ""
    return (
        f"few colours, but up to {largest} pixels a side: --grid 32 cuts sheets into sprites of 32, --tokens palette "
        f"learns the pictures pixel by pixel, made smaller than {LARGEST_SPRITE + 1}"
    )


def _palette(opaque_P: Codes, wanted: str | None) -> tuple[str, ...]:
    if wanted and not wanted.isdecimal():
        return PaletteTokenizer.from_file(wanted).config.colours
    values_P3 = np.stack([opaque_P >> 16, opaque_P >> 8 & 255, opaque_P & 255], -1).astype(np.uint8)
    return PaletteTokenizer.fit([Image.fromarray(values_P3[None])], int(wanted or MOST_COLOURS)).config.colours


def with_colours_of(art: ArtFolder, base: ImageGPT) -> ImageGPT:
    """A palette model that also knows the colours of a folder, the most frequent first and as far as MOST_COLOURS
    allows, so that its pixels come out exactly. Each begins as the nearest that the model has; another model stays."""
    if not isinstance(base.tokenizer, PaletteTokenizer):
        return base
    known = base.tokenizer.config.colours
    codes, counts = np.unique(_colours(art)[0], return_counts=True)
    codes = codes[(-counts).argsort(kind="stable")]
    colours = [colour for code in codes if (colour := f"#{code:06x}") not in known][: max(0, MOST_COLOURS - len(known))]
    if not colours:
        return base
    values_3HW = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in colours], dtype=torch.uint8).T[:, None]
    nearest = base.tokenizer.encode(from_uint8(values_3HW)[None]).flatten()
    tokenizer = PaletteTokenizer(replace(base.tokenizer.config, colours=(*known, *colours)))
    gpt = with_tokens(base.gpt, nearest)
    parts = tokenizer.to(base.device), gpt, base.labels
    return ImageGPT(*parts, name=base.name, weights_hash=base.weights_hash, provenance=base.provenance)


def _colours(art: ArtFolder) -> tuple[Codes, Codes, bool]:
    """The 24-bit colours of all opaque pixels, of those at the edges of pictures, and whether any is transparent."""
    opaque, edges, clear = [], [], False
    for i in range(len(art)):
        values_HW4 = np.asarray(sprite(art.picture(i, "RGBA"))).astype(np.int64)
        codes_HW, seen_HW = values_HW4[..., :3] @ (65536, 256, 1), values_HW4[..., 3] >= OPAQUE
        opaque.append(codes_HW[seen_HW])
        edges += [codes_HW[0], codes_HW[-1], codes_HW[:, 0], codes_HW[:, -1]]
        clear = clear or not seen_HW.all()
    return np.concatenate(opaque), np.concatenate(edges), clear


# Views


def sprite(picture: Image.Image) -> Image.Image:
    """The sprite that was enlarged by a whole number to make this picture, as pixel art is mostly shared; or the
    picture, made smaller where it is larger than any sprite."""
    width, height = picture.size
    largest = min(picture.size) // SMALLEST_SIDE if max(picture.size) > LARGEST_LEARNED else 1
    for times in range(largest, 1, -1):
        if width % times == height % times == 0:
            small = picture.resize((width // times, height // times), Image.Resampling.NEAREST)
            if small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
                return small
    scale = LARGEST_SPRITE / max(picture.size)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return picture.resize(size, Image.Resampling.BOX) if scale < 1 else picture


def sprite_view(picture: Image.Image, palette: PaletteConfig, cell: int, mirrored: bool) -> Tensor:
    """An RGBA picture, pixel by pixel in the middle of whole cells of ground, as [3, H, W] in [-1, 1]."""
    ground = palette.ground or "#ffffff"
    small = flatten(sprite(picture), ground, OPAQUE)
    width, height = (-(-side // cell) * cell for side in small.size)
    page = Image.new("RGB", (width, height), ground)
    left, top = (width - small.width) // 2, (height - small.height) // 2
    page.paste(ImageOps.mirror(small) if mirrored else small, (left, top))
    return to_tensor(page)
