"""Pixel art to learn from: whether a folder is that, its palette, and what lies under transparent pixels.

Notable choices:
- transparency is a token of its own, with a colour that no picture has: all other code sees plain RGB;
- opaque sprites on a plain ground keep it as the colour that is transparent where it reaches the edge;
- the palette is exact up to MOST_COLOURS, and has as many centres (k-means) beyond.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from igpt.sizes import LARGEST_SPRITE, SMALLEST_SIDE
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import laid_on, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

LARGEST_LEARNED = 64  # pixels a side of a sprite that is learned as a whole
FEW_COLOURS = 1024  # in all pictures of a folder: with more it is no pixel art
MOST_COLOURS = 254  # with a ground and an entry for what is transparent they fit into an indexed picture
GROUNDS = ("#ffffff", "#ff00ff", "#00ff00", "#00ffff", "#fe01fe")  # the first that is free stands for transparency
PLAIN = 0.5  # share of the pixels at the edges which is one colour: that is the ground then
OPAQUE = 128  # alpha from which on a pixel counts


class SpritePalette(NamedTuple):
    """The palette for a folder of sprites."""

    config: PaletteConfig
    colours: int  # different ones in the folder
    lost: int  # of these, how many are learned as the nearest of the palette


def is_pixel_art(art: ArtFolder) -> bool:
    """Whether all pictures are small and their colours few."""
    return max(map(max, art.sizes)) <= LARGEST_LEARNED and len(np.unique(_colours(art)[0])) <= FEW_COLOURS


def sprite_palette(art: ArtFolder, wanted: str | None) -> SpritePalette:
    """The palette of a folder: its own colours, so many of them ("64"), or those of a .gpl or .hex file.

    Raises UserError for a number or a file that is none.
    """
    opaque_P, edges_P, clear = _colours(art)
    present = [f"#{code:06x}" for code in np.unique(opaque_P)]
    if wanted and not wanted.isdecimal():
        colours = PaletteTokenizer.from_file(wanted).config.colours
    else:
        values_P3 = np.stack([opaque_P >> 16, opaque_P >> 8 & 255, opaque_P & 255], -1).astype(np.uint8)
        colours = PaletteTokenizer.fit([Image.fromarray(values_P3[None])], int(wanted or MOST_COLOURS)).config.colours
    lost = len(set(present) - set(colours))
    if clear:
        free = next((colour for colour in GROUNDS if colour not in {*present, *colours}), None)
        if free is None:
            raise UserError(f"the pictures have all of {', '.join(GROUNDS)}; one is wanted free, to mean transparent")
        return SpritePalette(PaletteConfig((*colours, free), free), len(present), lost)
    codes, counts = np.unique(edges_P, return_counts=True)
    ground = f"#{codes[counts.argmax()]:06x}"
    if counts.max() < PLAIN * counts.sum() or ground not in colours:
        return SpritePalette(PaletteConfig(colours), len(present), lost)
    return SpritePalette(PaletteConfig(colours, ground, ground_inside=False), len(present), lost)


def added_colours(art: ArtFolder, palette: PaletteConfig) -> tuple[str, ...]:
    """The colours of a folder that a palette lacks, the most frequent first, as far as MOST_COLOURS allows."""
    codes, counts = np.unique(_colours(art)[0], return_counts=True)
    lacking = [f"#{code:06x}" for code in codes[(-counts).argsort(kind="stable")]]
    return tuple(colour for colour in lacking if colour not in palette.colours)[
        : max(0, MOST_COLOURS - len(palette.colours))
    ]


def _colours(art: ArtFolder) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
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
    small = laid_on(sprite(picture), ground, OPAQUE)
    width, height = (-(-side // cell) * cell for side in small.size)
    page = Image.new("RGB", (width, height), ground)
    left, top = (width - small.width) // 2, (height - small.height) // 2
    page.paste(ImageOps.mirror(small) if mirrored else small, (left, top))
    return to_tensor(page)
