"""Convolutional parts of the VQ tokenizer: residual block, down- and upsampling, noise.

The parts are those of the VQGAN family (Esser et al. 2021, arXiv 2012.09841, table 7): GroupNorm and SiLU before
every convolution, strided convolutions down, resizing plus a convolution up. Two of StyleGAN2's (Karras et al. 2020,
arXiv 1912.04958, section 2) keep lattices out: every doubling is smooth, and texture is made of noise
(`NoiseInjection`).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CPU = torch.device("cpu")
KEPT_PIXELS = 512 * 512  # a larger piece of noise (1 MB) is not kept


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in VQGAN; narrow networks have fewer, or a group of two channels would lose its very colour."""
    return nn.GroupNorm(32 if channels >= 128 else max(1, channels // 32), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a skip; a 1x1 convolution on the skip where the width changes."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        y_BCHW = self.conv2(F.silu(self.norm2(y_BCHW)))
        out: Tensor = self.skip(x_BCHW) + y_BCHW
        return out


class Downsample(nn.Module):
    """Halves both sides. Pads right and below only, as VQGAN does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        width = x_BCHW.shape[-1] // 2
        # Never one column alone: in bfloat16 on CPUs with AMX, oneDNN then reads memory that nobody has written.
        out: Tensor = self.conv(F.pad(x_BCHW, (0, 3 if width == 1 else 1, 0, 1)))
        return out[..., :width]


class Upsample(nn.Module):
    """Doubles both sides smoothly, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="bilinear"))
        return out


class ShuffleUp(nn.Module):
    """Doubles both sides where channels are few: a convolution at the low side whose channels become pixels.

    The four convolutions start alike (ICNR, Aitken et al. 2017, arXiv 1707.02937), so that no checkerboard is there to
    unlearn. A blur of [1 2 1] follows, which lets none come: what repeats every 2 pixels is gone.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        padded_BCHW = F.pad(F.pixel_shuffle(self.conv(x_BCHW), 2), (1, 1, 1, 1), mode="replicate")
        return F.avg_pool2d(F.avg_pool2d(padded_BCHW, 2, 1), 2, 1)  # [1 1] / 2 twice is [1 2 1] / 4


class NoiseInjection(nn.Module):
    """Adds noise, as strong in each channel as that learned: canvas, strokes and foliage that no code can spell out.

    Without it a decoder that is to paint texture from smooth features can only repeat a pattern. In training the noise
    is fresh; a finished model has the same at the same place always, so that tokens give the same picture.
    """

    LR_MULTIPLIER = 10.0  # strengths are small numbers that start at zero: they learn so much faster than weights

    def __init__(self, channels: int):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor, top: int, left: int) -> Tensor:
        """`top` and `left`: where in the whole picture x lies, at this scale; windows of a picture share its noise."""
        batch, channels, height, width = x_BCHW.shape
        if self.training:
            noise = torch.randn(batch, 1, height, width, device=x_BCHW.device)
        else:
            make = kept_noise if height * width <= KEPT_PIXELS else fixed_noise
            noise = make(top, left, height, width, channels, x_BCHW.device)
        return x_BCHW + (noise * (self.LR_MULTIPLIER * self.strength).view(1, -1, 1, 1)).to(x_BCHW.dtype)


def fixed_noise(top: int, left: int, height: int, width: int, seed: int, device: torch.device = CPU) -> Tensor:
    """About normal noise [height, width] that depends on row, column and `seed` alone, the same on every machine.

    The four bytes of a hash of the place, added up: mean 0, variance 1.
    """
    rows = torch.arange(top, top + height, device=CPU).unsqueeze(1)
    columns = torch.arange(left, left + width, device=CPU)
    mixed = (rows * 0x9E3779B1 ^ columns * 0x85EBCA77 ^ seed * 0xC2B2AE3D) & 0xFFFFFFFF
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    mixed ^= mixed >> 16
    total = torch.stack([(mixed >> shift) & 255 for shift in (0, 8, 16, 24)]).sum(0)
    return ((total - 510) / 147.8).to(device)  # a byte has mean 127.5 and variance 5461


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what was made while drawing must also do where gradients flow
def kept_noise(top: int, left: int, height: int, width: int, seed: int, device: torch.device) -> Tensor:
    """`fixed_noise` made once: for every picture of a size a decoder asks for the same few pieces."""
    return fixed_noise(top, left, height, width, seed, device)
