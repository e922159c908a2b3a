"""The palette tokenizer: one token per pixel, the index of its colour, as in image-GPT (Chen et al. 2020, section 3.2).

Notable choices: the colours live in the config as text, so that a palette model is readable and its weights hold no
table; distances are taken between whole 8-bit levels, which float32 holds exactly, so the nearest colour is the same on
every device; `fit` counts every colour of every picture, and a collection of few colours keeps exactly those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .base import UserError
from .images import from_uint8, to_tensor, to_uint8

MAX_COLOURS = 4096


@dataclass(frozen=True)
class PaletteConfig:
    """The colours of a palette as "#rrggbb", in the order of their tokens. Any sequence is taken, "#" is optional."""

    colours: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises UserError for a colour that is none, and for none or too many colours. Repeated ones count once."""
        for colour in self.colours:
            if not isinstance(colour, str) or not re.fullmatch("#?[0-9a-fA-F]{6}", colour):
                raise UserError(f"got {colour!r:.60} in a palette, wanted a colour such as #ffcc00")
        colours = tuple(dict.fromkeys("#" + colour.removeprefix("#").lower() for colour in self.colours))
        if not 1 <= len(colours) <= MAX_COLOURS:
            raise UserError(f"got a palette of {len(colours)} colours, wanted 1 to {MAX_COLOURS}")
        object.__setattr__(self, "colours", colours)  # the way to tidy a field of a frozen dataclass


class PaletteTokenizer(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] to tokens [B, H, W], the nearest colours, and back to exactly these colours."""

    kind = "palette"
    palette_K3: Tensor

    def __init__(self, config: PaletteConfig) -> None:
        super().__init__()
        self.config = config
        levels = [list(bytes.fromhex(colour[1:])) for colour in config.colours]
        # uint8: a cast of the model to bfloat16 leaves it alone. Not persistent: the config has it.
        self.register_buffer("palette_K3", torch.tensor(levels, dtype=torch.uint8), persistent=False)

    @property
    def vocab_size(self) -> int:
        return len(self.config.colours)

    @property
    def downsample(self) -> int:
        return 1

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures to int64 tokens [B, H, W]."""
        levels_BHWC = to_uint8(images_BCHW).permute(0, 2, 3, 1)
        return _nearest(levels_BHWC.reshape(-1, 3).float(), self.palette_K3.float()).view(levels_BHWC.shape[:3])

    def decode(self, tokens_Bhw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Tokens to pictures [B, 3, h, w], float32; where they lie makes no difference."""
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
            # k-means over all of them would take minutes; merged ones give the same palette, as near as can be seen.
            points_P3, weights_P = _merge_alike(points_P3, weights_P, limit=8 * MAX_COLOURS)
            points_P3 = _k_means(points_P3, weights_P, colours, torch.Generator().manual_seed(seed)).round()
        brightness_P = points_P3 @ torch.tensor([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
        levels = points_P3[brightness_P.argsort(stable=True)].to(torch.uint8).tolist()
        return cls(PaletteConfig(tuple(bytes(colour).hex() for colour in levels)))

    @classmethod
    def from_file(cls, path: str | Path) -> PaletteTokenizer:
        """The palette in a .gpl file (GIMP, Krita, Inkscape, Aseprite) or a .hex file (Lospec: a colour a line).

        Raises UserError for a file that is missing or not in one of these forms.
        """
        path = Path(path)
        parse = {".gpl": _parse_gpl, ".hex": _parse_hex}.get(path.suffix.lower())
        if parse is None:
            raise UserError(f"got {path} as a palette, wanted a .gpl or a .hex file")
        try:
            # Only names of colours can be other than ASCII, and old files have them in any encoding.
            text = path.read_text(encoding="utf-8-sig", errors="replace")
            return cls(PaletteConfig(tuple(parse(text))))
        except OSError as error:
            raise UserError(f"the palette {path} cannot be read: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"the palette {path} is no good: {error}") from error


# Palette files


def _parse_hex(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _parse_gpl(text: str) -> list[str]:
    """The colours of a GIMP palette: a title, headers and comments, then lines of "red green blue name"."""
    lines = [line.strip() for line in text.splitlines()]
    if not lines or lines[0] != "GIMP Palette":
        raise UserError('its first line is not "GIMP Palette"')
    colours = []
    for line in lines[1:]:
        if not line or line.startswith("#") or re.match("(Name|Columns|Channels):", line):
            continue
        numbers = re.match(r"(\d{1,3})\s+(\d{1,3})\s+(\d{1,3})\b", line, re.ASCII)
        if numbers is None or max(map(int, numbers.groups())) > 255:
            raise UserError(f"got the line {line[:60]!r}, wanted three numbers from 0 to 255 and a name")
        colours.append(bytes(map(int, numbers.groups())).hex())
    return colours


# Colours


def _nearest(points_P3: Tensor, palette_K3: Tensor) -> Tensor:
    """For each point the index of the nearest colour; both float32 levels."""
    with torch.autocast(points_P3.device.type, enabled=False):  # bfloat16 has 8 bits, the products need 18
        lengths_K = palette_K3.square().sum(1)
        # |p - c|^2 without |p|^2, which all colours share. In pieces, since P x K may be larger than the memory.
        step = max(1, 2**24 // len(palette_K3))
        pieces = [points_P3[start : start + step] for start in range(0, len(points_P3), step)]
        return torch.cat([(lengths_K - 2 * piece @ palette_K3.T).argmin(1) for piece in pieces])


def _count_colours(pictures: Iterable[Image.Image]) -> tuple[Tensor, Tensor]:
    """The different colours of the pictures, float32 levels, and how many pixels have each (float64)."""
    counts = torch.zeros(2**24, dtype=torch.int64)
    for picture in pictures:
        red, green, blue = to_uint8(to_tensor(picture)).long().flatten(1)
        codes = (red << 16) + (green << 8) + blue
        counts.index_add_(0, codes, torch.ones_like(codes))
    codes = counts.nonzero().squeeze(1)
    return torch.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).float(), counts[codes].double()


def _merge_alike(points_P3: Tensor, weights_P: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """At most `limit` points: those that share their leading bits in all three channels become one, at their mean.

    One bit less divides their number by at most 8, so more than limit / 8 are left.
    """
    bits = 8
    while len(points_P3) > limit:
        bits -= 1
        _, box_P = torch.unique(points_P3.long() >> (8 - bits), dim=0, return_inverse=True)
        weights_P, points_P3 = _weighted_means(points_P3, weights_P, box_P, int(box_P.max()) + 1)
    return points_P3, weights_P


def _weighted_means(points_P3: Tensor, weights_P: Tensor, group_P: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The weight of each group of points, and its mean; NaN for an empty one."""
    totals_K = torch.zeros(groups, dtype=torch.float64).index_add_(0, group_P, weights_P)
    sums_K3 = torch.zeros(groups, 3, dtype=torch.float64).index_add_(0, group_P, points_P3 * weights_P[:, None])
    return totals_K, (sums_K3 / totals_K[:, None]).float()


def _k_means(points_P3: Tensor, weights_P: Tensor, count: int, rng: torch.Generator, rounds: int = 25) -> Tensor:
    """`count` centres of more than `count` different points: Lloyd's rounds after a k-means++ start."""
    centres_K3 = points_P3.new_zeros(count, 3)
    distances_P = torch.ones_like(weights_P)
    for k in range(count):  # drawn the likelier the farther from those before (Arthur and Vassilvitskii 2007)
        centres_K3[k] = points_P3[torch.multinomial(weights_P * distances_P, 1, generator=rng)]
        to_centre_P = (points_P3 - centres_K3[k]).square().sum(1).double()
        distances_P = torch.minimum(distances_P, to_centre_P) if k else to_centre_P
    for _ in range(rounds):
        totals_K, means_K3 = _weighted_means(points_P3, weights_P, _nearest(points_P3, centres_K3), count)
        centres_K3 = torch.where(totals_K[:, None] > 0, means_K3, centres_K3)
    return centres_K3
