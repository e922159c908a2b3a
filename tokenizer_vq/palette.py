"""The palette tokenizer: one token per pixel, the index of its colour, as in image-GPT (Chen et al. 2020, section 3.2).

Notable choices: the colours stand in the config as text, so that a palette model is readable and needs no table among
its weights; distances are taken between 8-bit values, which float32 holds exactly, so the nearest colour is the same on
every device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .base import UserError, complaint
from .images import from_uint8, to_uint8

MAX_COLOURS = 4096
BT601 = 0.299, 0.587, 0.114  # weights of red, green and blue in the luma (ITU-R)


@dataclass(frozen=True)
class PaletteConfig:
    """The colours of a palette as "#rrggbb", in the order of their tokens. Any sequence is taken, "#" is optional.

    Raises UserError for a colour that is none, and for none or too many colours. Repeated ones count once.
    """

    colours: tuple[str, ...]
    ground: str = ""  # the one of them that stands for transparency
    ground_inside: bool = True  # whether all of its pixels are transparent, or only those that reach the edge

    def __post_init__(self) -> None:
        for colour in self.colours:
            if not isinstance(colour, str) or not re.fullmatch("#?[0-9a-fA-F]{6}", colour):
                raise UserError(f"got {colour!r:.60} in a palette, wanted a colour such as #ffcc00")
        colours = tuple(dict.fromkeys("#" + colour.removeprefix("#").lower() for colour in self.colours))
        if not 1 <= len(colours) <= MAX_COLOURS:
            raise UserError(f"got a palette of {len(colours)} colours, wanted 1 to {MAX_COLOURS}")
        if self.ground and self.ground not in colours:
            raise UserError(f"got {self.ground!r:.60} as the ground of a palette, wanted one of its colours")
        object.__setattr__(self, "colours", colours)  # the way to set a field of a frozen dataclass


class PaletteTokenizer(nn.Module):
    """Pictures to the nearest colours, and back to exactly these."""

    kind = "palette"
    downsample = 1
    palette_K3: Tensor

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config, self.vocab_size = config, len(config.colours)
        values = [list(bytes.fromhex(colour[1:])) for colour in config.colours]
        # uint8: a cast of the model to bfloat16 leaves it alone. Not persistent: the config has it.
        self.register_buffer("palette_K3", torch.tensor(values, dtype=torch.uint8), persistent=False)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to int64 tokens [B, H, W], argmin |p - c|^2 = argmin |c|^2 - 2 p c."""
        pixels_BHWC, palette_K3 = to_uint8(images_BCHW).permute(0, 2, 3, 1).float(), self.palette_K3.float()
        with torch.autocast(images_BCHW.device.type, enabled=False):  # bfloat16 has 8 bits, the products need 18
            lengths_K = palette_K3.square().sum(1)
            pieces = torch.split(pixels_BHWC.reshape(-1, 3), 2**24 // len(palette_K3))  # P x K distances may be many
            tokens_P = torch.cat([(lengths_K - 2 * piece_P3 @ palette_K3.T).argmin(1) for piece_P3 in pieces])
        return tokens_P.view(pixels_BHWC.shape[:3])

    def decode(self, tokens_Bhw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Tokens to pictures [B, 3, h, w], float32; `at` makes no difference."""
        return from_uint8(self.palette_K3[tokens_Bhw].permute(0, 3, 1, 2).contiguous())

    @classmethod
    def fit(cls, pictures: Iterable[Image.Image], colours: int = 256) -> PaletteTokenizer:
        """A palette of at most `colours` colours for these pictures, dark to light: exactly theirs where they have so
        few, else k-means over all pixels. Raises UserError without pictures and for a number outside 1 to 256."""
        if not 1 <= colours <= 256:  # Pillow's limit
            raise UserError(f"got {colours} colours, wanted 1 to 256")
        pixels = [np.asarray(picture.convert("RGB")).reshape(1, -1, 3) for picture in pictures]
        if not pixels:
            raise UserError("got no pictures to take a palette from, wanted at least one")
        strip = Image.fromarray(np.concatenate(pixels, 1))
        if (found := strip.getcolors(colours)) is None:
            strip = strip.quantize(colours, Image.Quantize.MAXCOVERAGE, kmeans=1)  # until at most one pixel moves
            found = strip.convert("RGB").getcolors(colours) or []
        by_luma = sorted((rgb for _, rgb in found if isinstance(rgb, tuple)), key=lambda rgb: np.dot(rgb, BT601))
        return cls(PaletteConfig(tuple(bytes(rgb).hex() for rgb in by_luma)))

    @classmethod
    def from_file(cls, path: str | Path) -> PaletteTokenizer:
        """The palette in a .gpl file (GIMP, Krita, Inkscape, Aseprite) or a .hex file (Lospec: a colour a line).

        Raises UserError for a file that is missing or not in one of these forms.
        """
        path, kind = Path(path), Path(path).suffix.lower()
        if kind not in (".gpl", ".hex"):
            raise UserError(f"got {path} as a palette, wanted a .gpl or a .hex file")
        with complaint(f"the palette {path} cannot be read", OSError, UserError):
            # Only names of colours can be other than ASCII, and old files have them in any encoding.
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            return cls(PaletteConfig(tuple(_parse_gpl(text) if kind == ".gpl" else text.split())))

    def to_text(self, suffix: str) -> str:
        """What a .gpl or .hex file of this palette holds; the inverse of `from_file`."""
        if suffix == ".hex":
            return "".join(f"{colour[1:]}\n" for colour in self.config.colours)
        rows = ["{:3} {:3} {:3}\tcolour".format(*value) for value in self.palette_K3.tolist()]
        return "\n".join(["GIMP Palette", *rows, ""])


def _parse_gpl(text: str) -> list[str]:
    """The colours of a GIMP palette: a title, headers and comments, then lines of "red green blue name"."""
    title, *lines = [line.strip() for line in text.splitlines()] or [""]
    if title != "GIMP Palette":
        raise UserError('its first line is not "GIMP Palette"')
    colours = []
    for line in lines:
        if not re.match("#|$|(Name|Columns|Channels):", line):
            numbers = re.match(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})\b", line, re.ASCII)
            if numbers is None or max(map(int, numbers.groups())) > 255:
                raise UserError(f"got the line {line[:60]!r}, wanted three numbers from 0 to 255 and a name")
            colours.append(bytes(map(int, numbers.groups())).hex())
    return colours
