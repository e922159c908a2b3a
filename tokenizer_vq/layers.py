"""Convolutional parts of the VQ tokenizer: residual block, attention, down- and upsampling.

The parts are those of the VQGAN family (Esser et al. 2021, arXiv 2012.09841, table 7): GroupNorm and SiLU before
every convolution, strided convolutions down, nearest-neighbour resizing plus a convolution up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


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


class AttnBlock(nn.Module):
    """One head of self-attention over all positions. Off by default: its cost grows with the picture's area squared."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.norm(x_BCHW)
        q, k, v = (rearrange(conv(y_BCHW), "b c h w -> b (h w) c") for conv in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x_BCHW + self.out(rearrange(mixed, "b (h w) c -> b c h w", h=x_BCHW.shape[2]))
        return out


class Downsample(nn.Module):
    """Halves both sides. Pads right and below only, as VQGAN does, so that its published weights fit."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution, which leaves no checkerboard."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out


def shuffle_up(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Doubles both sides where channels are few: a convolution at the low side whose channels become pixels.

    The four convolutions start alike (ICNR, Aitken et al. 2017, arXiv 1707.02937), so that no checkerboard is there to
    unlearn.
    """
    conv = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))
    return [conv, nn.PixelShuffle(2), nn.SiLU()]


def bottom(channels: int, attention: bool) -> nn.Sequential:
    """The lowest level of VQGAN: two residual blocks with attention between them if asked for."""
    middle = [AttnBlock(channels)] if attention else []
    return nn.Sequential(ResBlock(channels, channels), *middle, ResBlock(channels, channels))
