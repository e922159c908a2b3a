"""`igpt surprise`: a picture, and next to it a map of how many bits each of its tokens costs the model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from igpt.bundle import Bundle
from igpt.config import SurpriseOptions
from igpt.likelihood import bits_per_token
from igpt.sheet import sheet
from tokenizer_vq.images import fit_cover, to_tensor

MAP_SIDE = 512  # pixels; smaller pictures are enlarged to about this width


class Surprise(NamedTuple):
    """A surprise map."""

    bits_hw: Tensor  # of each token, float64
    sheet: Image.Image
    sentence: str


def surprise_map(model: Bundle, picture: Image.Image, label: int, options: SurpriseOptions) -> Surprise:
    """Bits of each token of the picture, cut to the grid that fits it. Half of the picture is known on average."""
    h, w = model.grids.composition(picture.width, picture.height)
    fitted = fit_cover(picture, w * model.downsample, h * model.downsample)
    with torch.inference_mode():
        tokens_Bhw = model.tokenizer.encode(to_tensor(fitted)[None].to(model.device)).cpu()
    seeds = range(options.seed, options.seed + options.orders)
    bits_hw = bits_per_token(model.gpt, tokens_Bhw, torch.tensor([label]), seeds)[0]
    low, high, (row, column) = float(bits_hw.min()), float(bits_hw.max()), divmod(int(bits_hw.argmax()), w)
    sentence = (
        f"{float(bits_hw.mean()):.2f} bits per token on average, {low:.2f} to {high:.2f}; the most surprising place is "
        f"at the {('top', 'middle', 'bottom')[3 * row // h]} {('left', 'centre', 'right')[3 * column // w]}"
    )
    scale = max(1, round(MAP_SIDE / fitted.width))
    size = fitted.width * scale, fitted.height * scale
    left = fitted.resize(size, Image.Resampling.LANCZOS), " "
    right = heat_map(bits_hw).resize(size, Image.Resampling.NEAREST), f"{low:.1f} bits (dark) to {high:.1f} (bright)"
    return Surprise(bits_hw, sheet([[left, right]]), sentence)


def heat_map(values_HW: Tensor) -> Image.Image:
    """The least to the greatest value as dark violet, red, pale yellow: ever brighter, so it also reads in grey."""
    share_HW = (values_HW - values_HW.min()) / (values_HW.max() - values_HW.min()).clamp(min=1e-9)
    grey = Image.fromarray((255 * share_HW).round().byte().numpy())
    return ImageOps.colorize(grey, (20, 11, 52), (252, 255, 200), mid=(177, 56, 82))
