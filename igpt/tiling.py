"""Large grids in overlapping windows: tokens through the tokenizer, cells of tokens for the GPT.

Notable choices: a convolution sees nothing beyond the border of its window, and GroupNorm mixes colours over the whole
of it, so two windows never agree exactly where they meet. Decoded windows therefore overlap by several tokens, of which
the outermost are not used at all and the next are blended; encoded windows overlap and give only their inner tokens.
Textures that wrap are continued by their own other side before they enter, and the two ends are blended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from PIL import Image, ImageChops
from torch import Tensor

from tokenizer_vq.images import to_tensor

from .bundle import Bundle

TOKENS_AT_ONCE = 64  # a side of what is encoded or decoded at once; 512 pixels where a token has 8
UNUSED_BORDER = 4  # tokens at the border of a window that are not used: they saw too little of what is beyond
BLENDED_BORDER = 8  # tokens over which one decoded window turns into the next
OVERLAP = 2 * UNUSED_BORDER + BLENDED_BORDER  # also the tokens by which a texture is continued with its other side


def spans(length: int, window: int, overlap: int) -> list[range]:
    """Equal windows that cover `length` tokens, as few and then as small as can be; `overlap` or more are shared."""
    if length <= window:
        return [range(length)]
    count = -(-(length - overlap) // (window - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    return [range(start, start + size) for start in (i * (length - size) // (count - 1) for i in range(count))]


def window_for(h: int, w: int, side: int) -> tuple[int, int]:
    """Rows and columns of a window with at most side * side cells: longer where the grid is narrow."""
    rows = min(h, max(side, side * side // w))
    return rows, min(w, side * side // rows)


# Through the tokenizer


@torch.inference_mode()
def encode(model: Bundle, picture: Image.Image, wraps: bool = False, side: int = TOKENS_AT_ONCE) -> Tensor:
    """Tokens [h, w] of a picture whose sides are multiples of the token's."""
    token = model.downsample
    if wraps:
        picture = wrapped(picture, OVERLAP * token)
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
    return tokens_hw[OVERLAP:-OVERLAP, OVERLAP:-OVERLAP].clone() if wraps else tokens_hw


def decode(model: Bundle, tokens_Bhw: Tensor, wraps: bool = False, side: int = TOKENS_AT_ONCE) -> list[Image.Image]:
    """The pictures of token grids, at the grids' own size in pixels."""
    token, (h, w) = model.downsample, tokens_Bhw.shape[1:]
    if wraps:
        rows, columns = (torch.arange(-OVERLAP, length + OVERLAP) % length for length in (h, w))
        larger = decode(model, tokens_Bhw[:, rows][:, :, columns], side=side)
        return [_closed(picture, OVERLAP * token, BLENDED_BORDER * token) for picture in larger]
    rows_at_once, columns_at_once = window_for(h, w, side)
    pictures = [Image.new("RGB", (w * token, h * token)) for _ in tokens_Bhw]
    for y in spans(h, rows_at_once, OVERLAP):
        for x in spans(w, columns_at_once, OVERLAP):
            parts = model.decode(tokens_Bhw[:, y.start : y.stop, x.start : x.stop], at=(y.start, x.start))
            # Over a neighbour a window is nothing in its unused border, rises over the blended one, and then is all.
            across = _ramp(parts[0].size, token if x.start else 0)
            down = _ramp(parts[0].size[::-1], token if y.start else 0).transpose(Image.Transpose.TRANSPOSE)
            for picture, part in zip(pictures, parts, strict=True):
                picture.paste(part, (x.start * token, y.start * token), ImageChops.multiply(across, down))
    return pictures


def _ramp(size: tuple[int, int], token: int) -> Image.Image:
    """An "L" picture that rises from left to right; white where there is no neighbour, at 0 pixels per token."""
    start, length = UNUSED_BORDER * token, BLENDED_BORDER * token
    values = [255 if x >= start + length else max(0, x - start) * 255 // max(1, length) for x in range(size[0])]
    return Image.frombytes("L", (size[0], 1), bytes(values)).resize(size)


def wrapped(picture: Image.Image, margin: int) -> Image.Image:
    """The picture continued by `margin` pixels of its other side all around."""
    width, height = picture.size
    canvas = Image.new(picture.mode, (width + 2 * margin, height + 2 * margin))
    for left in range(margin % width - width, canvas.width, width):
        for top in range(margin % height - height, canvas.height, height):
            canvas.paste(picture, (left, top))
    return canvas


def _closed(picture: Image.Image, margin: int, blend: int) -> Image.Image:
    """The inverse of `wrapped` for a decoded picture: what was decoded twice turns from one into the other."""
    for _ in range(2):  # across, then down
        width, height = picture.size[0] - 2 * margin, picture.size[1]
        blend = min(blend, width)
        middle = picture.crop((margin, 0, margin + width, height))
        beyond = picture.crop((margin + width, 0, margin + width + blend, height))
        falling = Image.frombytes("L", (blend, 1), bytes(255 - x * 255 // blend for x in range(blend)))
        middle.paste(beyond, (0, 0), falling.resize(beyond.size))
        picture = middle.transpose(Image.Transpose.TRANSPOSE)
    return picture


# Windows of cells


def cell_windows(h: int, w: int, native_cells: int, wraps: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of windows of at most `native_cells`: the numbers of their cells and their cores (bool), both [W, h, w].

    Cores tile the grid; no window of a round has another's core in sight.
    """
    rows, columns = window_for(h, w, math.isqrt(native_cells))
    for row, row_in_core in _rounds(h, rows, wraps):
        for column, column_in_core in _rounds(w, columns, wraps):
            cells = rearrange(row, "y h -> y 1 h 1") * w + rearrange(column, "x w -> 1 x 1 w")
            core = rearrange(row_in_core, "y h -> y 1 h 1") & rearrange(column_in_core, "x w -> 1 x 1 w")
            yield cells.flatten(0, 1), core.flatten(0, 1)


def cores(length: int, window: int, wraps: bool) -> list[tuple[int, range]]:
    """Along one axis: where each window begins, and the middle half of it that it draws (all of it, at an edge)."""
    if window == length and not wraps:
        return [(0, range(length))]
    core, found = max(1, window // 2), []
    for start in range(0, length, core):
        first = start - (window - core) // 2
        first = first if wraps else min(max(0, first), length - window)
        found.append((first, range(start, min(start + core, length))))
    return found


def _rounds(length: int, window: int, wraps: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Along one axis every other window, then those between: their cells, and which are in the core, [W, window].

    The last is by itself where it may reach to another of its round: where it is the next but one of the first, around
    the edge, or its core is shorter than the others.
    """
    windows = cores(length, window, wraps)
    (_, first), (_, last) = windows[0], windows[-1]
    alone = len(windows) > 1 and (len(windows) % 2 or len(last) < len(first))
    paired = windows[:-1] if alone else windows
    for together in filter(None, (paired[::2], paired[1::2], windows[-1:] if alone else [])):
        cells = (torch.tensor([[start] for start, _ in together]) + torch.arange(window)) % length
        lowest, highest = (torch.tensor([[core[end]] for _, core in together]) for end in (0, -1))
        yield cells, (cells >= lowest) & (cells <= highest)
