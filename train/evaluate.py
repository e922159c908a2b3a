"""Measurements on held-out pictures: PSNR, SSIM and the perceptual distance of reconstructions, codebook health."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tokenizer_vq.quantizer import codebook_usage
from tokenizer_vq.vq import VQTokenizer

from .losses import Perceptual, ssim


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB a picture, [B], for pictures in [-1, 1] (a data range of 2)."""
    mse_B = (a_BCHW.float() - b_BCHW.float()).pow(2).mean((1, 2, 3))
    return 10 * torch.log10(4 / mse_B)


@torch.no_grad()
def reconstruction(
    tokenizer: VQTokenizer, batches: Iterable[Tensor], distance: Perceptual
) -> dict[str, float]:
    """Mean PSNR, SSIM and perceptual distance of pictures against their decoded tokens, and the use of the codes.

    Reconstructions are clamped to [-1, 1] first, as a picture file would be.
    """
    rows: list[Tensor] = []
    tokens: list[Tensor] = []
    for images_BCHW in batches:
        tokens_Bhw = tokenizer.encode(images_BCHW)
        painted_BCHW = tokenizer.decode(tokens_Bhw).float().clamp(-1, 1)
        scores = (psnr(images_BCHW, painted_BCHW), ssim(images_BCHW, painted_BCHW), distance(images_BCHW, painted_BCHW))
        rows.append(torch.stack([score.cpu() for score in scores]))
        tokens.append(tokens_Bhw.flatten().cpu())
    means = torch.cat(rows, dim=1).mean(1)
    usage = codebook_usage(torch.cat(tokens), tokenizer.vocab_size)
    return {
        "psnr": float(means[0]), "ssim": float(means[1]), distance.name: float(means[2]),
        "codes_used": usage.used, "perplexity": usage.perplexity,
    }  # fmt: skip
