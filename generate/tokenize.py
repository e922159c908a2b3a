"""`igpt tokenize`: pictures next to their reconstructions from tokens, with numbers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from igpt.checkpoint import Tokenizer
from igpt.evaluation.perceptual import psnr, ssim
from igpt.files import Output, write_picture
from igpt.sheet import sheet
from tokenizer_vq.base import UserError
from tokenizer_vq.images import open_picture, to_picture, to_tensor

LONGEST_SIDE = 1024  # pixels; larger pictures are made smaller first
SHORTEST_SIDE = 8  # pixels; SSIM uses windows of 7


@torch.inference_mode()
def tokenize(
    tokenizer: Tokenizer, picture: Image.Image, device: torch.device
) -> tuple[Image.Image, Image.Image, Tensor]:
    """A picture, made smaller if need be, its reconstruction and its tokens [h, w]. Sides that do not divide into
    tokens are padded with their edge, and cut again."""
    picture, downsample = picture.copy(), tokenizer.downsample
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    padding = (0, -picture.width % downsample, 0, -picture.height % downsample)
    tokens_1hw = tokenizer.encode(F.pad(to_tensor(picture)[None], padding, mode="replicate").to(device))
    recon_CHW = tokenizer.decode(tokens_1hw)[0, :, : picture.height, : picture.width]
    return picture, to_picture(recon_CHW), tokens_1hw[0].cpu()


def tokenize_files(
    tokenizer: Tokenizer,
    sources: list[Path],
    out: Output | None,
    *,
    device: torch.device,
    force: bool = False,
    quiet: bool = False,
) -> list[Path]:
    """Writes NAME-tokens.png, original and reconstruction side by side, into `out` or (None) next to each original, and
    prints its measures. Raises UserError, before anything is written, if one of the pictures cannot be read."""
    for source in sources:
        width, height = open_picture(source).size
        if min(width, height) * min(1.0, LONGEST_SIDE / max(width, height)) < SHORTEST_SIDE:
            raise UserError(
                f"{source} is too small or too thin: {width}x{height} pixels, wanted at least {SHORTEST_SIDE} a side "
                f"when the longer one is at most {LONGEST_SIDE}"
            )
    paths: list[Path] = []
    for source in sources:
        original, reconstruction, tokens_hw = tokenize(tokenizer, open_picture(source), device)
        place = (out or Output(source.parent)).picture(f"{source.stem}-tokens")
        both = sheet([[(original, "original"), (reconstruction, "in tokens")]])
        path = write_picture(both, place, force=force and place not in paths)  # two originals may share a name
        paths.append(path)
        pair = to_tensor(original)[None], to_tensor(reconstruction)[None]
        (rows, columns), bits = tokens_hw.shape, tokens_hw.numel() * math.log2(tokenizer.vocab_size)
        measures = (
            f"PSNR {float(psnr(*pair)):.4g}, SSIM {float(ssim(*pair)):.4g}, {tokens_hw.numel()} tokens "
            f"({columns}x{rows}), {bits / (original.width * original.height):.4f} bits per pixel"
        )
        print(path if quiet else f"{path}: {measures}", flush=True)
    return paths
