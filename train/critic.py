"""The adversary: discriminators that tell paintings from reconstructions patch by patch, and how much they may say.

Pictures are [B, 3, H, W] in [-1, 1]. A discriminator is given pictures and the feature maps that the perceptual
distance has of them anyway, and gives scores at one or more scales: a list of [B, N], one for each of the N patches
looked at, higher for real. Every scale has the same say, however many its patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.evaluation.perceptual import LPIPS, Distance


class PatchDiscriminator(nn.Module):
    """Judges patches of 70 pixels (34 with two layers) as real or painted (pix2pix, Isola et al. 2017, section 3.2.2).

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
        return [self.net(images_BCHW).flatten(1)]


class FeatureDiscriminator(nn.Module):
    """Small heads on the frozen features of the perceptual distance (Projected GANs, Sauer et al. 2021, section 3).

    What the features know already need not be learned: it is useful after a few hundred steps, where a discriminator
    of pixels first learns that reconstructions are blurred.
    """

    LAYERS = (0, 1, 2, 5)  # of the seven feature maps: 1/2, 1/4, 1/8 and 1/16 of the side

    def __init__(self, distance: LPIPS, width: int = 64):
        super().__init__()
        channels = [distance.linear[layer].numel() for layer in self.LAYERS]
        self.heads = nn.ModuleList(_head(count, width) for count in channels)

    def forward(self, images_BCHW: Tensor, features: list[Tensor]) -> list[Tensor]:
        # Vectors of unit length have tiny entries where there are many: scale them to about one each.
        seen = [features[layer] * features[layer].shape[1] ** 0.5 for layer in self.LAYERS]
        return [head(x).flatten(1) for head, x in zip(self.heads, seen, strict=True)]


class Jury(nn.Module):
    """Several discriminators as one."""

    def __init__(self, *members: nn.Module):
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images_BCHW: Tensor, features: list[Tensor]) -> list[Tensor]:
        return [scores for member in self.members for scores in member(images_BCHW, features)]


def _head(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 3, padding=1),
    )  # fmt: skip


def discriminator(distance: Distance) -> nn.Module:
    """On pixels alone, or also on the features of the perceptual distance if it has any: those know what paintings look
    like, but pixels show what falls between the strides of their network."""
    if isinstance(distance, LPIPS):
        return Jury(FeatureDiscriminator(distance), PatchDiscriminator())
    return PatchDiscriminator()


def mean_score(scores: list[Tensor]) -> Tensor:
    """Over patches, then over scales."""
    return torch.stack([each.float().mean() for each in scores]).mean()


def hinge(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017): real scores above 1, painted ones below -1."""
    return 0.5 * (
        mean_score([F.relu(1 - scores.float()) for scores in real])
        + mean_score([F.relu(1 + scores.float()) for scores in fake])
    )


def balanced(painted: Tensor, wanted: Tensor, also: Tensor | None, weight: float, leaf: Tensor) -> Tensor:
    """A loss whose gradient at `painted` is that of `wanted` plus that of `also` scaled to `weight` times its length.

    Both losses are functions of `leaf`, a detached copy of `painted`. However sure of itself a discriminator is, it
    then never pushes harder than its share (the idea of the adaptive weight of Esser et al. 2021, equation 7, taken at
    the picture instead of at the last layer, where it costs nothing).
    """
    (main,) = torch.autograd.grad(wanted, leaf, retain_graph=also is not None)
    if also is not None:
        (side,) = torch.autograd.grad(also, leaf)
        main = main + weight * main.norm() / side.norm().clamp(min=1e-12) * side
    loss: Tensor = (painted * main).sum()
    return loss
