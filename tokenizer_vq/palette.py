"""The palette tokenizer: one token per pixel, the index of its colour, as in image-GPT (Chen et al. 2020, section 3.2).

Notable choices: the colours stand in the config as text, so that a palette model is readable and needs no table among
its weights; distances are taken between 8-bit values, which float32 holds exactly, so the nearest colour is the same on
every device; `fit` counts the colours of all pixels, and a collection of few colours keeps exactly those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor, nn

from .base import UserError
from .images import from_uint8, to_tensor, to_uint8

MAX_COLOURS = 4096


@dataclass(frozen=True)
class PaletteConfig:
    """The colours of a palette as "#rrggbb", in the order of their tokens. Any sequence is taken, "#" is optional."""

    colours: tuple[str, ...]
    ground: str = ""  # the one of them that stands for transparency
    ground_inside: bool = True  # whether all of its pixels are transparent, or only those that reach the edge

    def __post_init__(self) -> None:
        """Raises UserError for a colour that is none, and for none or too many colours. Repeated ones count once."""
        for colour in self.colours:
            if not isinstance(colour, str) or not re.fullmatch("#?[0-9a-fA-F]{6}", colour):
                raise UserError(f"got {colour!r:.60} in a palette, wanted a colour such as #ffcc00")
        colours = tuple(dict.fromkeys("#" + colour.removeprefix("#").lower() for colour in self.colours))
        if not 1 <= len(colours) <= MAX_COLOURS:
            raise UserError(f"got a palette of {len(colours)} colours, wanted 1 to {MAX_COLOURS}")
        if self.ground and self.ground not in colours:
            raise UserError(f"got {self.ground!r:.60} as the ground of a palette, wanted one of its colours")
        object.__setattr__(self, "colours", colours)  # the way to set a field of a frozen dataclass


# Colours: P points and K centres in RGB, float32 from 0 to 255


def _nearest(points_P3: Tensor, palette_K3: Tensor) -> Tensor:
    """For each point the index of the nearest colour, argmin |p - c|^2 = argmin |c|^2 - 2 p c."""
    with torch.autocast(points_P3.device.type, enabled=False):  # bfloat16 has 8 bits, the products need 18
        lengths_K = palette_K3.square().sum(1)
        pieces = torch.split(points_P3, max(1, 2**24 // len(palette_K3)))  # P x K distances may exceed the memory
        return torch.cat([(lengths_K - 2 * piece @ palette_K3.T).argmin(1) for piece in pieces])


def _count_colours(pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
    """The different colours of the pictures, and how many pixels have each (float64)."""
    counts = torch.zeros(2**24, dtype=torch.int64)
    for picture in pictures:
        red, green, blue = to_uint8(to_tensor(picture)).long().flatten(1)
        codes = (red << 16) + (green << 8) + blue
        counts.index_add_(0, codes, torch.ones_like(codes))
    codes = counts.nonzero().squeeze(1)
    return torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).float(), counts[codes].double()


def _cluster_means(points_P3: Tensor, weights_P: Tensor, cluster_P: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The weighted mean of each cluster of points (NaN of an empty one), and its weight."""
    weights_K = torch.zeros(count, dtype=torch.float64).index_add_(0, cluster_P, weights_P)
    sums_K3 = torch.zeros(count, 3, dtype=torch.float64).index_add_(0, cluster_P, points_P3 * weights_P[:, None])
    return (sums_K3 / weights_K[:, None]).float(), weights_K


def _k_means(points_P3: Tensor, weights_P: Tensor, count: int, rng: Generator, rounds: int = 25) -> Tensor:
    """`count` centres for more than `count` different points: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd."""
    bits = 8
    while len(points_P3) > 8 * MAX_COLOURS:  # merge colours with the same leading bits; more than an eighth remain
        bits -= 1
        boxes, box_P = torch.unique(points_P3.long() >> (8 - bits), dim=0, return_inverse=True)
        points_P3, weights_P = _cluster_means(points_P3, weights_P, box_P, len(boxes))
    centres_K3 = points_P3[weights_P.argmax()].repeat(count, 1)
    distances_P = torch.full_like(weights_P, torch.inf)
    for k in range(1, count):
        distances_P = torch.minimum(distances_P, (points_P3 - centres_K3[k - 1]).square().sum(1))
        centres_K3[k] = points_P3[torch.multinomial(weights_P * distances_P, 1, generator=rng)]
    for _ in range(rounds):
        means_K3, weights_K = _cluster_means(points_P3, weights_P, _nearest(points_P3, centres_K3), count)
        centres_K3 = torch.where(weights_K[:, None] > 0, means_K3, centres_K3)
    return centres_K3


# The tokenizer


def _parse_gpl(text: str) -> list[str]:
    """The colours of a GIMP palette: a title, headers and comments, then lines of "red green blue name"."""
    title, *lines = [line.strip() for line in text.splitlines()] or [""]
    if title != "GIMP Palette":
        raise UserError('its first line is not "GIMP Palette"')
    colours = []
    for line in lines:
        if re.match("#|$|(Name|Columns|Channels):", line):
            continue
        numbers = re.match(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})\b", line, re.ASCII)
        if numbers is None or max(map(int, numbers.groups())) > 255:
            raise UserError(f"got the line {line[:60]!r}, wanted three numbers from 0 to 255 and a name")
        colours.append(bytes(map(int, numbers.groups())).hex())
    return colours


class PaletteTokenizer(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to tokens [B, H, W], the nearest colours, and back to exactly these colours."""

    kind = "palette"
    palette_K3: Tensor

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config = config
        values = [list(bytes.fromhex(colour[1:])) for colour in config.colours]
        # uint8: a cast of the model to bfloat16 leaves it alone. Not persistent: the config has it.
        self.register_buffer("palette_K3", torch.tensor(values, dtype=torch.uint8), persistent=False)

    @property
    def vocab_size(self) -> int:
        return len(self.config.colours)

    @property
    def downsample(self) -> int:
        return 1

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures to int64 tokens [B, H, W]."""
        pixels_BHWC = to_uint8(images_BCHW).permute(0, 2, 3, 1)
        return _nearest(pixels_BHWC.reshape(-1, 3).float(), self.palette_K3.float()).view(pixels_BHWC.shape[:3])

    def decode(self, tokens_Bhw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Tokens to pictures [B, 3, h, w], float32; `at` makes no difference."""
        return from_uint8(self.palette_K3[tokens_Bhw].permute(0, 3, 1, 2).contiguous())

    @classmethod
    def fit(cls, pictures: Iterable[Image.Image], colours: int = 512, seed: int = 0) -> PaletteTokenizer:
        """A palette of at most `colours` colours for these pictures, dark to light; the same for the same seed.

        Raises UserError when there are no pictures, or for a number of colours outside 1 to MAX_COLOURS.
        """
        if not 1 <= colours <= MAX_COLOURS:
            raise UserError(f"got {colours} colours, wanted 1 to {MAX_COLOURS}")
        points_P3, weights_P = _count_colours(pictures)
        if len(points_P3) == 0:
            raise UserError("got no pictures to take a palette from, wanted at least one")
        if len(points_P3) > colours:
            points_P3 = _k_means(points_P3, weights_P, colours, Generator().manual_seed(seed)).round()
        luma_P = points_P3 @ torch.tensor([0.299, 0.587, 0.114])  # ITU-R BT.601
        values = points_P3[luma_P.argsort(stable=True)].to(torch.uint8).tolist()
        return cls(PaletteConfig(tuple(bytes(value).hex() for value in values)))

    @classmethod
    def from_file(cls, path: str | Path) -> PaletteTokenizer:
        """The palette in a .gpl file (GIMP, Krita, Inkscape, Aseprite) or a .hex file (Lospec: a colour a line).

        Raises UserError for a file that is missing or not in one of these forms.
        """
        path, kind = Path(path), Path(path).suffix.lower()
        if kind not in (".gpl", ".hex"):
            raise UserError(f"got {path} as a palette, wanted a .gpl or a .hex file")
        try:
            # Only names of colours can be other than ASCII, and old files have them in any encoding.
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            return cls(PaletteConfig(tuple(_parse_gpl(text) if kind == ".gpl" else text.split())))
        except (OSError, UserError) as error:
            raise UserError(f"the palette {path} cannot be read: {getattr(error, 'strerror', error)}") from error

    def to_text(self, suffix: str) -> str:
        """What a ".gpl" or ".hex" file of this palette holds; the inverse of `from_file`."""
        if suffix == ".hex":
            return "".join(f"{colour[1:]}\n" for colour in self.config.colours)
        rows = [
            f"{red:3} {green:3} {blue:3}\t#{bytes((red, green, blue)).hex()}"
            for red, green, blue in self.palette_K3.tolist()
        ]
        return "\n".join(["GIMP Palette", "Name: igpt", "#", *rows]) + "\n"
