"""The adversary: discriminators that tell pictures from reconstructions patch by patch, and its weight in the loss.

Pictures are [B, 3, H, W] in [-1, 1]. A discriminator is given pictures and the feature maps that the perceptual
distance has of them anyway, and gives scores at one or more scales: a list of [B, N], one for each of N patches, higher
for real. Every scale counts the same, however many its patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.evaluation.perceptual import LPIPS, Distance


class PatchDiscriminator(nn.Module):
    """Scores patches of 70 pixels, 34 with two layers (pix2pix, Isola et al. 2017, arXiv 1611.07004, section 3.2.2).

    GroupNorm instead of BatchNorm: a score must not depend on the other pictures of the batch.
    """

    def __init__(self, width: int = 64, layers: int = 3):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            before, after = width * 2 ** (i - 1), width * 2 ** min(i, 3)
            stride = 2 if i < layers else 1
            parts += [nn.Conv2d(before, after, 4, stride=stride, padding=1, bias=False), nn.GroupNorm(8, after)]
            parts += [nn.LeakyReLU(0.2)]
        self.net = nn.Sequential(*parts, nn.Conv2d(after, 1, 4, padding=1))

    def forward(self, images_BCHW: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Scores at one scale; features are not looked at."""
        return [self.net(images_BCHW).flatten(1)]


class FeatureDiscriminator(nn.Module):
    """Small heads on frozen features (Projected GANs, Sauer et al. 2021, arXiv 2111.01007, section 3), and one on
    pixels, which show what falls between the strides of LPIPS.

    Useful after a few hundred steps, where a discriminator of pixels first learns that reconstructions are blurred.
    """

    LAYERS = (0, 1, 2, 5)  # of the seven of LPIPS: 1/2, 1/4, 1/8 and 1/16 of the side

    def __init__(self, distance: LPIPS, width: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(_head(distance.linear[layer].numel(), width) for layer in self.LAYERS)
        self.pixels = PatchDiscriminator(width)

    def forward(self, images_BCHW: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Scores of every head, then those of the pixels."""
        # Vectors of unit length have tiny entries where there are many: scale them to about one each.
        heads = zip(self.LAYERS, self.heads, strict=True)
        scores = [head(features[i] * features[i].shape[1] ** 0.5).flatten(1) for i, head in heads]
        return scores + self.pixels(images_BCHW, features)


def _head(channels: int, width: int) -> nn.Sequential:
    first, middle = nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(0.2), middle, nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1))


def discriminator_for(distance: Distance) -> nn.Module:
    """On pixels; with LPIPS also on its features."""
    return FeatureDiscriminator(distance) if isinstance(distance, LPIPS) else PatchDiscriminator()


def mean_score(scores: list[Tensor]) -> Tensor:
    """Over patches, then over scales."""
    return torch.stack([each.float().mean() for each in scores]).mean()


def hinge_loss(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """(mean max(0, 1 - real) + mean max(0, 1 + fake)) / 2 (Lim & Ye 2017, arXiv 1705.02894)."""
    return 0.5 * (
        mean_score([F.relu(1 - scores.float()) for scores in real])
        + mean_score([F.relu(1 + scores.float()) for scores in fake])
    )


def adaptive_gan_gradient(loss: Tensor, g_loss: Tensor | None, weight: float, leaf_BCHW: Tensor) -> Tensor:
    """dloss/dleaf + weight |dloss/dleaf| / |dg_loss/dleaf| dg_loss/dleaf: the gradient for a reconstruction.

    VQGAN's adaptive weight (Esser et al. 2021, arXiv 2012.09841, equation 7), at the picture instead of at the last
    layer of the decoder, where it costs nothing. However sure of itself, a discriminator pulls no harder than `weight`.
    """
    (gradient,) = torch.autograd.grad(loss, leaf_BCHW, retain_graph=g_loss is not None)
    if g_loss is None:
        return gradient
    (adversarial,) = torch.autograd.grad(g_loss, leaf_BCHW)
    scale = weight * gradient.norm() / adversarial.norm().clamp(min=1e-12)
    return torch.add(gradient, scale * adversarial)
