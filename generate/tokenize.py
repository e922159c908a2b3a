"""What a tokenizer makes of pictures: each beside its reconstruction, with numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from igpt.evaluation.perceptual import psnr, ssim
from igpt.files import Output, write_picture
from igpt.sheet import sheet
from tokenizer_vq.base import ImageTokenizer, UserError
from tokenizer_vq.images import open_picture, to_picture, to_tensor

LONGEST_SIDE = 1024  # pixels; larger pictures are made smaller first
SHORTEST_SIDE = 8  # pixels; SSIM looks through windows of 7


class Tokenized(NamedTuple):
    original: Image.Image  # as it was encoded, at most LONGEST_SIDE a side
    reconstruction: Image.Image
    tokens_hw: Tensor
    bits_per_pixel: float  # at log2(vocabulary) bits a token


@torch.inference_mode()
def tokenize(tokenizer: ImageTokenizer, picture: Image.Image, device: torch.device) -> Tokenized:
    """A picture through the codes. Sides that do not divide into tokens are continued at the edge, and cut again."""
    picture = picture.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    width, height = picture.size
    side = tokenizer.downsample
    image_BCHW = F.pad(to_tensor(picture)[None], (0, -width % side, 0, -height % side), mode="replicate")
    tokens_hw = tokenizer.encode(image_BCHW.to(device))[0]
    painted_CHW = tokenizer.decode(tokens_hw[None])[0, :, :height, :width].float().cpu()
    bits = tokens_hw.numel() * math.log2(tokenizer.vocab_size) / (width * height)
    return Tokenized(picture, to_picture(painted_CHW), tokens_hw.cpu(), bits)


def tokenize_files(
    tokenizer: ImageTokenizer,
    sources: list[Path],
    out: Output | None,
    *,
    device: torch.device,
    force: bool = False,
    quiet: bool = False,
) -> list[Path]:
    """Writes NAME-tokens.png, original and reconstruction side by side, into `out` or (None) beside each original, and
    prints what it measured. Raises UserError, before anything is written, if one of the pictures cannot be read."""
    for source in sources:
        width, height = open_picture(source).size
        if min(width, height) * min(1.0, LONGEST_SIDE / max(width, height)) < SHORTEST_SIDE:
            raise UserError(
                f"{source} is too small or too thin: {width}x{height} pixels, wanted at least {SHORTEST_SIDE} a side "
                f"when the longer one is at most {LONGEST_SIDE}"
            )
    paths: list[Path] = []
    for source in sources:
        found = tokenize(tokenizer, open_picture(source), device)
        place = (out or Output(source.parent)).picture(f"{source.stem}-tokens")
        pair = [to_tensor(picture)[None] for picture in (found.original, found.reconstruction)]
        numbers = [f"{name} {float(measure(*pair)):.4g}" for name, measure in (("PSNR", psnr), ("SSIM", ssim))]
        rows, columns = found.tokens_hw.shape
        numbers += [f"{rows * columns} tokens ({columns}x{rows})", f"{found.bits_per_pixel:.4f} bits per pixel"]
        both = sheet([[(found.original, "original"), (found.reconstruction, "in tokens")]])
        path = write_picture(both, place, force=force and place not in paths)  # two originals may share a name
        paths.append(path)
        print(path if quiet else f"{path}: {', '.join(numbers)}", flush=True)
    return paths
