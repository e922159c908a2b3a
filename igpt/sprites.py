"""Pictures of a palette model as games want them: indexed colours, a transparent ground, enlarged by whole pixels.

Where a token is a pixel, a finished picture has no colours but those of the palette. People get it in indexed colour
(Pillow's mode "P"), or in RGBA where the colours are too many for that. The palette says which colour is the ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from tokenizer_vq.base import UserError
from tokenizer_vq.images import open_picture
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

from .config import SpriteOptions

OPAQUE = 128  # alpha from which on a pixel counts
INDEXED_COLOURS = 256  # of a picture in mode "P"

# CIE 1976 L*a*b* of sRGB (IEC 61966-2-1) under D65: linear light to XYZ, relative to white.
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))

Tokens = NDArray[np.int64]
Mask = NDArray[np.bool_]


def colours_of(palette: PaletteConfig, file: str | Path, ground: str) -> tuple[str, ...]:
    """The colour of a .gpl or .hex file that each of a palette becomes; a ground that is seen as none stays.

    Raises UserError for a file that is none or has one colour only.
    """
    own, other = PaletteTokenizer(palette), PaletteTokenizer.from_file(file)
    drawn = [k for k, colour in enumerate(palette.colours) if colour != palette.ground or ground == "keep"]
    colours = list(palette.colours)
    for k, chosen in zip(drawn, match_palette(own.palette_K3[drawn], other.palette_K3), strict=True):
        colours[k] = other.config.colours[chosen]
    return tuple(colours)


def palette_of_pictures(paths: Sequence[Path], colours: int, suffix: str) -> str:
    """A palette of at most so many colours for what is opaque in pictures, as the text of a .hex or .gpl file.

    Raises UserError for what is no picture, and where nothing is opaque.
    """
    opaque = []
    for path in paths:
        values_HW4 = np.asarray(open_picture(path, mode="RGBA"))
        opaque.append(values_HW4[values_HW4[..., 3] >= OPAQUE][:, :3])
    values_P3 = np.concatenate(opaque)
    pictures = [Image.fromarray(values_P3[None])] if len(values_P3) else []
    return PaletteTokenizer.fit(pictures, colours).to_text(suffix)


def finish_sprite(
    picture: Image.Image, palette: PaletteConfig, options: SpriteOptions, wraps: bool = False
) -> Image.Image:
    """An RGB picture in the palette's colours as a person wants it. A texture (`wraps`) keeps its ground; a picture
    with other colours, as an edited photograph, is only enlarged."""
    tokens_HW = _tokens_of(picture, palette)
    if tokens_HW is None:
        return enlarged(picture, options.scale)
    colours = options.colours or palette.colours
    if not palette.ground or options.ground == "keep" or wraps:
        return enlarged(_indexed(tokens_HW, colours), options.scale)
    ground = palette.colours.index(palette.ground)
    clear_HW = tokens_HW == ground
    if not palette.ground_inside:
        clear_HW = _reached_from_edge(clear_HW)
    # Programs that know no transparency see the colour of the ground.
    tokens_HW = np.where(clear_HW, len(colours), tokens_HW)
    return enlarged(_indexed(tokens_HW, colours, colours[ground]), options.scale)


def enlarged(picture: Image.Image, scale: int) -> Image.Image:
    """Every pixel a square of `scale` pixels a side."""
    if scale == 1:
        return picture
    large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    large.info.update(picture.info)
    return large


def _tokens_of(picture: Image.Image, palette: PaletteConfig) -> Tokens | None:
    """The token of every pixel, [H, W]; None where a colour is not of the palette."""
    codes_HW = np.asarray(picture.convert("RGB")).astype(np.int64) @ (65536, 256, 1)
    token_of = {int(colour[1:], 16): token for token, colour in enumerate(palette.colours)}
    present, where = np.unique(codes_HW, return_inverse=True)
    tokens = [token_of.get(int(code), -1) for code in present]
    return None if -1 in tokens else np.array(tokens)[where].reshape(codes_HW.shape)


def _indexed(tokens_HW: Tokens, colours: tuple[str, ...], clear: str = "") -> Image.Image:
    """In the colours of the tokens, each once and in their order. With `clear`, the colour of transparent pixels, the
    next token after the last is transparent."""
    distinct = list(dict.fromkeys(colours))
    index_K = np.array([*map(distinct.index, colours), len(distinct)])
    entries = b"".join(bytes.fromhex(colour[1:]) for colour in (*distinct, *([clear] if clear else [])))
    if len(entries) > 3 * INDEXED_COLOURS:
        values_M3 = np.frombuffer(entries, dtype=np.uint8).reshape(-1, 3)
        alpha_HW = np.where(tokens_HW == len(colours), 0, 255).astype(np.uint8)
        return Image.fromarray(np.dstack([values_M3[index_K[tokens_HW]], alpha_HW]))
    index_HW = index_K[tokens_HW].astype(np.uint8)
    picture = Image.frombytes("P", (index_HW.shape[1], index_HW.shape[0]), index_HW.tobytes())
    picture.putpalette(entries)
    if clear:
        picture.info["transparency"] = len(distinct)
    return picture


def _reached_from_edge(open_HW: Mask) -> Mask:
    """The open pixels that a path of open pixels, side by side, joins to the edge of the picture."""
    picture = Image.fromarray(np.pad(open_HW, 1, constant_values=True).astype(np.uint8)).copy()  # to be drawn on
    ImageDraw.floodfill(picture, (0, 0), 2)
    return np.asarray(picture)[1:-1, 1:-1] == 2


# Colours: P, K and M are numbers of them; each is three 8-bit sRGB values


def to_lab(colours_P3: Tensor) -> Tensor:
    """8-bit sRGB to CIELAB [P, 3], float64: L* from 0 to 100. Euclidean distance is CIE76's measure of difference."""
    srgb_P3 = colours_P3.double() / 255
    linear_P3 = torch.where(srgb_P3 <= 0.04045, srgb_P3 / 12.92, ((srgb_P3 + 0.055) / 1.055) ** 2.4)
    matrix_33 = torch.tensor(_TO_XYZ, dtype=torch.float64)
    xyz_P3 = linear_P3 @ matrix_33.T / matrix_33.sum(1)
    delta = 6 / 29
    f_P3 = torch.where(xyz_P3 > delta**3, xyz_P3.clamp(min=1e-12) ** (1 / 3), xyz_P3 / (3 * delta**2) + 4 / 29)
    x, y, z = f_P3.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def match_palette(colours_K3: Tensor, palette_M3: Tensor) -> list[int]:
    """For each colour the index of the one that it becomes in another palette: the nearest in CIELAB.

    Where the palette has at least as many colours, no two colours become one: the closest pairs are joined first.
    Raises UserError for a palette of fewer than two colours, in which nothing could be seen.
    """
    if len(palette_M3) < 2:
        raise UserError(f"got a palette of {len(palette_M3)} colours to draw in, wanted 2 or more")
    distance_KM = torch.cdist(to_lab(colours_K3), to_lab(palette_M3))
    nearest = distance_KM.argmin(1).tolist()
    if len(palette_M3) < len(colours_K3):
        return nearest
    chosen: dict[int, int] = {}
    free = set(range(len(palette_M3)))
    for pair in distance_KM.flatten().argsort(stable=True).tolist():
        colour, other = divmod(pair, len(palette_M3))
        if colour not in chosen and other in free:
            chosen[colour] = other
            free.remove(other)
            if len(chosen) == len(colours_K3):
                break
    return [chosen[colour] for colour in range(len(colours_K3))]
