"""Measurements on held-out pictures: PSNR, SSIM and the perceptual distance of reconstructions, codebook health."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tokenizer_vq.base import ImageTokenizer
from tokenizer_vq.quantizer import codebook_usage

from .losses import Perceptual, ssim


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB a picture, [B], for pictures in [-1, 1] (a data range of 2)."""
    mse_B = (a_BCHW.float() - b_BCHW.float()).pow(2).mean((1, 2, 3))
    return 10 * torch.log10(4 / mse_B)


def edge_profile(images_BCHW: Tensor, period: int) -> Tensor:
    """How strong edges are at each of the `period` places between neighbouring pixels, [period], mean over both axes.

    Flat for a picture; a grid of `period` pixels or a part of it makes it uneven. Sides are multiples of `period`.
    """
    profile = images_BCHW.new_zeros(period, dtype=torch.float32)
    for x in (images_BCHW.float(), images_BCHW.float().transpose(-1, -2)):
        edges_W = x.diff(dim=-1).abs().mean((0, 1, 2))
        # The last pixel has no neighbour: its place is left out of the mean.
        profile += torch.cat([edges_W, edges_W.new_full((1,), torch.nan)]).view(-1, period).nanmean(0) / 2
    return profile


@torch.no_grad()
def reconstruction(
    tokenizer: ImageTokenizer, batches: Iterable[Tensor], distance: Perceptual
) -> dict[str, float]:
    """Mean PSNR, SSIM and perceptual distance of pictures against their decoded tokens, the use of the codes, and the
    `grid`: the relative deviation of edges over the pixels of a token (`edge_profile`; that of pictures is about 0.02).

    Reconstructions are clamped to [-1, 1] first, as a picture file would be.
    """
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    profile = torch.zeros(tokenizer.downsample)
    for images_BCHW in batches:
        tokens_Bhw = tokenizer.encode(images_BCHW)
        painted_BCHW = tokenizer.decode(tokens_Bhw).float().clamp(-1, 1)
        scores = (psnr(images_BCHW, painted_BCHW), ssim(images_BCHW, painted_BCHW), distance(images_BCHW, painted_BCHW))
        rows.append(torch.stack([score.cpu() for score in scores]))
        tokens.append(tokens_Bhw.flatten().cpu())
        profile += edge_profile(painted_BCHW, tokenizer.downsample).cpu() * len(images_BCHW)
    means = torch.cat(rows, dim=1).mean(1)
    usage = codebook_usage(torch.cat(tokens), tokenizer.vocab_size)
    return {
        "psnr": float(means[0]), "ssim": float(means[1]), distance.name: float(means[2]),
        "codes_used": usage.used, "perplexity": usage.perplexity,
        "grid": float(profile.std(correction=0) / profile.mean()),
    }  # fmt: skip
