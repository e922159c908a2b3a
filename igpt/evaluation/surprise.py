"""`igpt surprise`: a picture beside a map of how many bits each of its tokens costs the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from igpt.bundle import Bundle
from igpt.likelihood import bits_per_token
from igpt.sheet import sheet
from tokenizer_vq.images import fit_cover, from_uint8, to_picture, to_tensor

# From nothing to much: dark violet, red, orange, pale yellow; brightness rises all the way, so it also reads in grey.
HEAT = ((20, 11, 52), (100, 26, 90), (177, 56, 82), (232, 117, 44), (252, 255, 200))
SHOWN_SIDE = 512  # pixels; smaller pictures are enlarged to about this width


class Surprise(NamedTuple):
    bits_hw: Tensor  # of each token, float64
    sheet: Image.Image
    sentence: str


def surprise_map(model: Bundle, picture: Image.Image, label: int, *, orders: int, seed: int) -> Surprise:
    """The picture on the grid that fits it, cut at the edges if it must be, beside its surprise.

    Each token is asked for in `orders` random drawing orders: on average half of the picture is known by then.
    """
    h, w = model.grids.composition(picture.width, picture.height)
    fitted = fit_cover(picture, w * model.downsample, h * model.downsample)
    with torch.inference_mode():
        tokens_Bhw = model.tokenizer.encode(to_tensor(fitted)[None].to(model.device)).cpu()
    bits_hw = bits_per_token(model.gpt, tokens_Bhw, torch.tensor([label]), range(seed, seed + orders))[0]
    low, high, (row, column) = float(bits_hw.min()), float(bits_hw.max()), divmod(int(bits_hw.argmax()), w)
    where = ("top", "middle", "bottom")[3 * row // h], ("left", "centre", "right")[3 * column // w]
    sentence = (
        f"{float(bits_hw.mean()):.2f} bits per token on average, {low:.2f} to {high:.2f}; "
        f"the most surprising place is at the {' '.join(where)}"
    )
    scale = max(1, round(SHOWN_SIDE / fitted.width))
    size = fitted.width * scale, fitted.height * scale
    cells = to_picture(from_uint8(heat((bits_hw - low) / max(high - low, 1e-9)).permute(2, 0, 1)))
    images = fitted.resize(size, Image.Resampling.LANCZOS), cells.resize(size, Image.Resampling.NEAREST)
    captions = " ", f"{low:.1f} bits (dark) to {high:.1f} bits (bright)"
    return Surprise(bits_hw, sheet([list(zip(images, captions, strict=True))]), sentence)


def heat(values: Tensor) -> Tensor:
    """Values from 0 to 1, of any shape, to colours [..., 3] of 8-bit levels."""
    place = values.double().clamp(0, 1) * (len(HEAT) - 1)
    low, colours = place.long().clamp(max=len(HEAT) - 2), torch.tensor(HEAT).double()
    return torch.lerp(colours[low], colours[low + 1], (place - low).unsqueeze(-1)).round()
