"""What a reconstruction is judged by besides L1: perceptual distances with LPIPS weights and without.

Pictures are [B, 3, H, W] in [-1, 1] everywhere in this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from igpt import checkpoint
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import Encoder, VQTokenizer

SQUEEZENET = "squeezenet1_1_features.safetensors"
LPIPS_LINEAR = "lpips_squeeze_lin.safetensors"


class Perceptual(Protocol):
    """A distance between pictures that agrees with the eye better than pixels do."""

    name: str

    def __call__(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """One distance a picture, [B]."""


# Perceptual distances


class _Unit(torch.autograd.Function):
    """Every vector [:, C] scaled to unit length. Torch's own way back goes over memory twice as often, and the maps of
    a perceptual distance are large."""

    @staticmethod
    def forward(ctx: Any, y_BCHW: Tensor, least: float) -> Tensor:
        length = torch.linalg.vector_norm(y_BCHW, dim=1, keepdim=True, dtype=torch.float32) + least
        unit_BCHW: Tensor = y_BCHW / length.to(y_BCHW.dtype)
        ctx.save_for_backward(unit_BCHW, length)
        return unit_BCHW

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        unit_BCHW, length = ctx.saved_tensors
        along = (gradients[0] * unit_BCHW).sum(1, keepdim=True)
        gradient: Tensor = (gradients[0] - unit_BCHW * along) / length.to(unit_BCHW.dtype)
        return gradient, None


def unit(y_BCHW: Tensor, least: float) -> Tensor:
    """Every vector [:, C] scaled to unit length, in the precision of the map. `least` is added to every length, and
    bounds the gradient where a vector is zero."""
    out: Tensor = _Unit.apply(y_BCHW, least)
    return out


class LPIPS(nn.Module):
    """LPIPS v0.1 with SqueezeNet (Zhang et al. 2018, arXiv 1801.03924, equation 1).

    `folder` holds the SqueezeNet 1.1 features and the linear weights as safetensors. Raises UserError if it does not.
    """

    name = "lpips-squeeze"
    TAPS = (1, 4, 7, 9, 10, 11, 12)
    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path):
        super().__init__()
        from torchvision.models import squeezenet1_1  # 2.5 s to import: only when a training asks for it

        for name in (SQUEEZENET, LPIPS_LINEAR):
            if not (Path(folder) / name).is_file():
                raise UserError(f"the folder of perceptual weights {str(folder)!r} has no file {name}")
        self.features = squeezenet1_1().features
        self.features.load_state_dict(load_file(Path(folder) / SQUEEZENET), strict=True)
        for module in self.features.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the tapped maps must survive the next layer
        linear = load_file(Path(folder) / LPIPS_LINEAR)
        for i in range(len(self.TAPS)):
            self.register_buffer(f"linear{i}", linear[f"lin{i}"].view(1, -1, 1, 1))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def linear(self, tap: int) -> Tensor:
        """The weights of the channels of feature map `tap`, [1, C, 1, 1]."""
        weights: Tensor = getattr(self, f"linear{tap}")
        return weights

    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        """The seven feature maps, each vector scaled to unit length."""
        x, maps = (x_BCHW - self.mean) / self.std, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.TAPS:
                maps.append(unit(x, 1e-10))  # as in the published code
        return maps

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distance of pictures whose feature maps these are, [B]."""
        parts = [F.conv2d((x - y).square(), self.linear(i)) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return torch.stack([part.float().mean((1, 2, 3)) for part in parts]).sum(0)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        return self.between(self.taps(a_BCHW), self.taps(b_BCHW))


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity a picture, [B], mean over channels (Wang et al. 2004, equation 13).

    A 7x7 uniform window, sample covariance and a data range of 1, as scikit-image's default does on pictures in [0, 1].
    They are brought there first: SSIM compares brightness too, and that must not be negative.
    """
    a, b, n = (a_BCHW.float().contiguous() + 1) / 2, (b_BCHW.float().contiguous() + 1) / 2, 49.0

    def blur(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.avg_pool2d(x, (7, 1), stride=1), (1, 7), stride=1)  # half the time of 7x7 at once

    mean_a, mean_b = blur(a), blur(b)
    var_a = (blur(a * a) - mean_a**2) * n / (n - 1)
    var_b = (blur(b * b) - mean_b**2) * n / (n - 1)
    covariance = (blur(a * b) - mean_a * mean_b) * n / (n - 1)
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean((1, 2, 3))


class GradientSSIM(nn.Module):
    """The weight-free substitute for LPIPS: differences of edges at three scales, plus one minus SSIM."""

    name = "gradient-ssim"

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        distance_B = 1 - ssim(a_BCHW, b_BCHW)
        error = a_BCHW.float() - b_BCHW.float()  # the difference of edges is the edge of the difference
        for _ in range(3):
            for axis in (-1, -2):
                distance_B = distance_B + error.diff(dim=axis).abs().mean((1, 2, 3))
            error = F.avg_pool2d(error, 2)
        return 0.5 * distance_B


class EncoderDistance(nn.Module):
    """The features of a trained tokenizer's encoder, compared as LPIPS does, with all channels alike: what it keeps of
    a painting is what a painting is known by. For those who have no LPIPS weights."""

    name = "encoder"
    WEIGHT = 2.0  # about as large as LPIPS for the same pictures

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder.float().eval().requires_grad_(False)
        self.multiple = encoder.patch * 2 ** (len(encoder.levels) - 1)  # of which a side has to be one

    def taps(self, x_BCHW: Tensor) -> list[Tensor]:
        """The maps after every layer, each vector scaled to unit length."""
        height, width = (side // self.multiple * self.multiple for side in x_BCHW.shape[-2:])
        x, maps = self.encoder.stem(F.pixel_unshuffle(x_BCHW[..., :height, :width], self.encoder.patch)), []
        for level in self.encoder.levels:
            for layer in level:  # type: ignore[attr-defined]
                x = layer(x)
                maps.append(unit(x, 1e-5))
        return maps

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distance of pictures whose feature maps these are, [B]."""
        distances = [(x - y).float().square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
        return self.WEIGHT * torch.stack(distances).mean(0)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        return self.between(self.taps(a_BCHW), self.taps(b_BCHW))


NO_WEIGHTS = "none"


def perceptual(source: str | None) -> LPIPS | EncoderDistance | GradientSSIM:
    """LPIPS from the weights in the folder `source`, or what the encoder of the model `source` sees; without one, or
    for NO_WEIGHTS, the substitute that needs no weights. Raises UserError where there is neither."""
    if source in (None, NO_WEIGHTS):
        return GradientSSIM()
    if Path(source).is_dir() and not (Path(source) / checkpoint.CONFIG).is_file():
        return LPIPS(source)
    tokenizer = checkpoint.load(source).tokenizer
    if not isinstance(tokenizer, VQTokenizer):
        raise UserError(f"the model {source!r} has no encoder that could judge pictures: its tokens are colours")
    return EncoderDistance(tokenizer.encoder)
