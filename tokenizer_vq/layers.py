"""Convolutional parts of the VQ tokenizer: residual block, down- and upsampling, noise.

The layers are those of VQGAN (Esser et al. 2021, arXiv 2012.09841, table 7): GroupNorm and SiLU before every
convolution, strided convolutions down, interpolation plus a convolution up. Two ideas of StyleGAN2 (Karras et al. 2020,
arXiv 1912.04958, section 2) prevent grid artifacts: upsampling with a low-pass filter, and noise to make texture of.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHED_PIXELS = 512 * 512  # a larger piece of noise (1 MB) is not cached


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups as in VQGAN, fewer for few channels: with one or two a group the mean colour would be lost."""
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
        """[B, C, H, W] to as many pixels of `channels_out`."""
        y_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.skip(x_BCHW) + self.conv2(F.silu(self.norm2(y_BCHW)))


class Downsample(nn.Module):
    """Halves both sides with a strided convolution; pads right and below only, as VQGAN does."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, H / 2, W / 2]."""
        width = x_BCHW.shape[-1] // 2
        # Never one column alone: in bfloat16 on CPUs with AMX, oneDNN then reads memory that nobody has written.
        return self.conv(F.pad(x_BCHW, (0, 3 if width == 1 else 1, 0, 1)))[..., :width]


class Upsample(nn.Module):
    """Doubles both sides by bilinear interpolation, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 H, 2 W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="bilinear"))


class ShuffleUp(nn.Module):
    """Doubles both sides by a sub-pixel convolution, which is cheap where channels are few, and a blur.

    The four phases of the convolution are initialised alike (ICNR, Aitken et al. 2017, arXiv 1707.02937): no
    checkerboard at the start. The blur, [1 2 1] / 4 in each direction, is zero at a period of 2 pixels: none later.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, 4 * channels_out, 3, padding=1)
        with torch.no_grad():
            for parameter in self.conv.parameters():
                parameter.copy_(parameter[::4].repeat_interleave(4, dim=0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] to [B, channels_out, 2 H, 2 W]."""
        padded_BCHW = _framed(F.pixel_shuffle(self.conv(x_BCHW), 2))
        return F.avg_pool2d(F.avg_pool2d(padded_BCHW, 2, 1), 2, 1)  # [1 1] / 2 twice is [1 2 1] / 4


def _framed(x_BCHW: Tensor) -> Tensor:
    """With a frame of one pixel, like those next to it. Where compiled it is put together: of F.pad's gradient Inductor
    expects other strides than it has on a CPU, and gives up."""
    if not torch.compiler.is_compiling():
        return F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
    x_BCHW = torch.cat([x_BCHW[..., :1, :], x_BCHW, x_BCHW[..., -1:, :]], -2)
    return torch.cat([x_BCHW[..., :1], x_BCHW, x_BCHW[..., -1:]], -1)


def fixed_noise(top: int, left: int, height: int, width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Nearly normal noise [height, width], a function of row, column and `seed` alone, the same on every machine: the
    sum of the four bytes of a hash of the position, scaled to mean 0 and variance 1."""
    rows = torch.arange(top, top + height, device="cpu").unsqueeze(1)
    columns = torch.arange(left, left + width, device="cpu")
    hash_HW = (rows * 0x9E3779B1 ^ columns * 0x85EBCA77 ^ seed * 0xC2B2AE3D) & 0xFFFFFFFF
    for _ in range(2):
        hash_HW = ((hash_HW ^ (hash_HW >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    hash_HW ^= hash_HW >> 16
    sum_HW = torch.stack([(hash_HW >> shift) & 255 for shift in (0, 8, 16, 24)]).sum(0)
    return ((sum_HW - 510) / 147.8).to(device)  # a byte has mean 127.5 and variance 5461


# A decoder needs the same few pieces for every picture of a size. No inference tensors: gradients may flow through.
cached_noise = lru_cache(maxsize=32)(torch.inference_mode(False)(fixed_noise))


class NoiseInjection(nn.Module):
    """x + 10 * strength * noise, with one learned strength per channel: fine texture that the codes do not describe.

    Without noise a decoder can make texture from smooth features only by repeating a pattern. In training the noise is
    fresh; in evaluation it is a function of the position, so that the same tokens give the same picture.
    """

    LR_MULTIPLIER = 10.0  # of the strengths over the weights: they start at zero and are to grow faster

    def __init__(self, channels: int):
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: Tensor, top: int, left: int) -> Tensor:
        """[B, C, H, W] to the same; `top` and `left` are the position of x in the whole picture at this scale."""
        batch, channels, height, width = x_BCHW.shape
        if self.training:
            noise = torch.randn(batch, 1, height, width, device=x_BCHW.device)
        else:
            make = cached_noise if height * width <= CACHED_PIXELS else fixed_noise
            noise = make(top, left, height, width, channels, x_BCHW.device)
        return x_BCHW + (noise * (self.LR_MULTIPLIER * self.strength).view(1, -1, 1, 1)).to(x_BCHW.dtype)
