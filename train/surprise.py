"""`igpt surprise`: a picture beside a map of how many bits each of its tokens costs the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from igpt.image_gpt import ImageGPT
from igpt.likelihood import bits_per_token
from igpt.sheet import MARGIN
from tokenizer_vq.images import fit_cover, open_picture, to_tensor

# From nothing to much: dark violet, red, orange, pale yellow; brightness rises all the way, so it also reads in grey.
HEAT = (
    (0.0, (20, 11, 52)), (0.35, (132, 32, 107)), (0.65, (229, 92, 48)), (0.85, (251, 180, 26)), (1.0, (252, 255, 200)),
)  # fmt: skip
LEGEND = 20  # pixels
SHOWN_SIDE = 512  # smaller pictures are enlarged to about this width


class Surprise(NamedTuple):
    bits_hw: Tensor  # of each token, float64
    sheet: Image.Image
    sentence: str


def opened(sources: Sequence[Path]) -> Iterator[tuple[Path, Image.Image]]:
    """The pictures, one after another. Raises UserError for any that cannot be read before it yields the first."""
    for source in sources:
        open_picture(source)
    return ((source, open_picture(source)) for source in sources)


def surprise_map(model: ImageGPT, picture: Image.Image, label: int, *, orders: int, seed: int) -> Surprise:
    """The picture on the grid that fits it, cut at the edges if it must be, beside its surprise.

    Each token is asked for in `orders` random drawing orders: on average half of the picture is known by then.
    """
    h, w = model.grids.composition(picture.width, picture.height)
    fitted = fit_cover(picture, w * model.downsample, h * model.downsample)
    with torch.inference_mode():
        tokens_Bhw = model.tokenizer.encode(to_tensor(fitted)[None].to(model.device)).cpu()
    bits_hw = bits_per_token(model.gpt, tokens_Bhw, torch.tensor([label]), range(seed, seed + orders))[0]
    most = int(bits_hw.argmax())
    where = _place(most // w, h, ("top", "middle", "bottom")), _place(most % w, w, ("left", "centre", "right"))
    sentence = (
        f"{float(bits_hw.mean()):.2f} bits per token on average, {float(bits_hw.min()):.2f} to "
        f"{float(bits_hw.max()):.2f}; the most surprising place is at the {' '.join(where)}"
    )
    return Surprise(bits_hw, _sheet(fitted, bits_hw), sentence)


def _place(cell: int, cells: int, names: tuple[str, str, str]) -> str:
    return names[min(2, 3 * cell // cells)]


def heat(values: Tensor) -> Tensor:
    """Values from 0 to 1, of any shape, to colours [..., 3], uint8."""
    colours = torch.zeros(*values.shape, 3, dtype=torch.float64)
    for (low, dark), (high, bright) in pairwise(HEAT):
        share = ((values.double() - low) / (high - low)).clamp(0, 1).unsqueeze(-1)
        step = torch.tensor(bright).double() - torch.tensor(dark).double()
        colours += share * step
    return (colours + torch.tensor(HEAT[0][1])).round().to(torch.uint8)


def _picture(colours_HW3: Tensor) -> Image.Image:
    height, width, _ = colours_HW3.shape
    return Image.frombytes("RGB", (width, height), colours_HW3.contiguous().numpy().tobytes())


def _sheet(fitted: Image.Image, bits_hw: Tensor) -> Image.Image:
    """Picture, map, and below the map its scale in bits."""
    scale = max(1, round(SHOWN_SIDE / fitted.width))
    width, height = fitted.width * scale, fitted.height * scale
    low, high = float(bits_hw.min()), float(bits_hw.max())
    cells = _picture(heat((bits_hw - low) / max(high - low, 1e-9)))
    page = Image.new("RGB", (2 * width + 3 * MARGIN, height + LEGEND + 3 * MARGIN), "white")
    page.paste(fitted.resize((width, height), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    left = 2 * MARGIN + width
    page.paste(cells.resize((width, height), Image.Resampling.NEAREST), (left, MARGIN))
    font, pen, top = ImageFont.load_default(), ImageDraw.Draw(page), height + 2 * MARGIN
    least, most = f"{low:.1f} ", f" {high:.1f} bits"
    start, end = left + int(font.getlength(least)), left + width - int(font.getlength(most))
    if end > start:
        page.paste(_picture(heat(torch.linspace(0, 1, end - start).expand(LEGEND, -1))), (start, top))
    pen.text((left, top + 4), least, fill="black", font=font)
    pen.text((max(end, left), top + 4), most, fill="black", font=font)
    return page
