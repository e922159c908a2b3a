"""Large pictures through the tokenizer in overlapping windows, so that memory grows with the window, not the picture.

Notable choices: a convolution sees nothing beyond the border of its window, and GroupNorm mixes colours over the whole
of it, so two windows never agree exactly where they meet. Decoded windows therefore overlap by several tokens, of which
the outermost are not used at all and the next are blended; encoded windows overlap and give only their inner tokens.
Textures that wrap are continued by their own other side before they enter, and the two ends are blended.
"""

from __future__ import annotations

import torch
from PIL import Image, ImageChops
from torch import Tensor

from tokenizer_vq.images import to_tensor

from .bundle import Bundle
from .windows import spans, window_for

WINDOW = 64  # tokens a side that are encoded or decoded at once; 512 pixels where a token has 8
MARGIN = 4  # tokens at the border of a window that are not used: they saw too little of what is beyond
BLEND = 8  # tokens over which one decoded window turns into the next
OVERLAP = 2 * MARGIN + BLEND
WRAP = OVERLAP  # tokens by which a texture is continued with its other side


# Encoding


@torch.inference_mode()
def encode(model: Bundle, picture: Image.Image, wraps: bool = False, side: int = WINDOW) -> Tensor:
    """Tokens [h, w] of a picture whose sides are multiples of the token's."""
    token = model.downsample
    if wraps:
        picture = wrapped(picture, WRAP * token)
    h, w = picture.height // token, picture.width // token
    rows, columns = window_for(h, w, side)
    tokens_hw = torch.empty(h, w, dtype=torch.long)
    for y in spans(h, rows, OVERLAP):
        for x in spans(w, columns, OVERLAP):
            part = picture.crop((x.start * token, y.start * token, x.stop * token, y.stop * token))
            part_hw = model.tokenizer.encode(to_tensor(part)[None].to(model.device))[0].cpu()
            # Later windows win from the middle of the overlap on; at the border of the picture all is used.
            top, left = (OVERLAP // 2 if y.start else 0), (OVERLAP // 2 if x.start else 0)
            tokens_hw[y.start + top : y.stop, x.start + left : x.stop] = part_hw[top:, left:]
    return tokens_hw[WRAP:-WRAP, WRAP:-WRAP].clone() if wraps else tokens_hw


# Decoding


def decode(model: Bundle, tokens_hw: Tensor, wraps: bool = False, side: int = WINDOW) -> Image.Image:
    """The picture of a token grid, at the grid's own size in pixels."""
    token, (h, w) = model.downsample, tokens_hw.shape
    if wraps:
        rows, columns = (torch.arange(-WRAP, length + WRAP) % length for length in (h, w))
        return _closed(decode(model, tokens_hw[rows][:, columns], side=side), WRAP * token, BLEND * token)
    rows_at_once, columns_at_once = window_for(h, w, side)
    canvas = Image.new("RGB", (w * token, h * token))
    for y in spans(h, rows_at_once, OVERLAP):
        for x in spans(w, columns_at_once, OVERLAP):
            (part,) = model.decode(tokens_hw[None, y.start : y.stop, x.start : x.stop], at=(y.start, x.start))
            fade = _fade(part.size, token if x.start else 0, token if y.start else 0)
            canvas.paste(part, (x.start * token, y.start * token), fade)
    return canvas


def _fade(size: tuple[int, int], across: int, down: int) -> Image.Image:
    """How much of a window covers what lies there already: nothing in the margin, rising over the blend, then all.

    `across` and `down` are pixels per token, 0 where there is no neighbour on that side.
    """
    return ImageChops.multiply(_ramp(size, across), _ramp(size[::-1], down).transpose(Image.Transpose.TRANSPOSE))


def _ramp(size: tuple[int, int], token: int) -> Image.Image:
    """An "L" picture that rises from left to right."""
    start, length = MARGIN * token, BLEND * token
    levels = [255 if x >= start + length else max(0, x - start) * 255 // max(1, length) for x in range(size[0])]
    return Image.frombytes("L", (size[0], 1), bytes(levels)).resize(size)


# Wrapping


def wrapped(picture: Image.Image, margin: int) -> Image.Image:
    """The picture continued by `margin` pixels of its other side all around."""
    width, height = picture.size
    canvas = Image.new(picture.mode, (width + 2 * margin, height + 2 * margin))
    for left in range(margin % width - width, canvas.width, width):
        for top in range(margin % height - height, canvas.height, height):
            canvas.paste(picture, (left, top))
    return canvas


def _closed(picture: Image.Image, margin: int, blend: int) -> Image.Image:
    """The inverse of `wrapped` for a painted picture: what was painted twice turns from one into the other."""
    for _ in range(2):  # across, then down
        width, height = picture.size[0] - 2 * margin, picture.size[1]
        blend = min(blend, width)
        middle = picture.crop((margin, 0, margin + width, height))
        beyond = picture.crop((margin + width, 0, margin + width + blend, height))
        falling = Image.frombytes("L", (blend, 1), bytes(255 - x * 255 // blend for x in range(blend)))
        middle.paste(beyond, (0, 0), falling.resize(beyond.size))
        picture = middle.transpose(Image.Transpose.TRANSPOSE)
    return picture
