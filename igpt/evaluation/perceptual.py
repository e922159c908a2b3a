"""How near one picture comes to another: PSNR, SSIM, LPIPS and distances without its weights. Also training losses.

Pictures are [B, 3, H, W] in [-1, 1] everywhere in this file, and every measure is one number a picture, [B].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from igpt import checkpoint
from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.quantizer import codebook_usage
from tokenizer_vq.vq import Encoder, VQTokenizer

SQUEEZENET = "squeezenet1_1_features.safetensors"
LPIPS_LINEAR = "lpips_squeeze_lin.safetensors"
NO_WEIGHTS = "none"  # asks for the distance that needs none


def load_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where there is none or it is damaged."""
    with complaint(f"the weights {file} cannot be read", OSError, SafetensorError):
        return load_file(file)


# Pixels


def psnr(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB (a data range of 2)."""
    mse_B = (a_BCHW.float() - b_BCHW.float()).pow(2).mean((1, 2, 3))
    return 10 * torch.log10(4 / mse_B)


def ssim(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Structural similarity, mean over channels (Wang et al. 2004, equation 13).

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
        """The distance of pictures, [B]."""
        distance_B = 1 - ssim(a_BCHW, b_BCHW)
        error = a_BCHW.float() - b_BCHW.float()  # the difference of edges is the edge of the difference
        for _ in range(3):
            for axis in (-1, -2):
                distance_B = distance_B + error.diff(dim=axis).abs().mean((1, 2, 3))
            error = F.avg_pool2d(error, 2)
        return 0.5 * distance_B


# Features


def normalize_channels(y_BCHW: Tensor, eps: float) -> Tensor:
    """Every vector [:, C] scaled to unit length, in the precision of the map. `eps` is added to every length, and
    bounds the gradient where a vector is zero."""
    length = torch.linalg.vector_norm(y_BCHW, dim=1, keepdim=True, dtype=torch.float32) + eps
    return y_BCHW / length.to(y_BCHW.dtype)


class LPIPS(nn.Module):
    """LPIPS v0.1 with SqueezeNet (Zhang et al. 2018, arXiv 1801.03924, equation 1). `folder` holds the SqueezeNet 1.1
    features and the linear weights as safetensors. Raises UserError if it does not."""

    name = "lpips-squeeze"
    LAYERS = (1, 4, 7, 9, 10, 11, 12)
    mean: Tensor
    std: Tensor

    def __init__(self, folder: str | Path):
        super().__init__()
        from torchvision.models import squeezenet1_1  # 2.5 s to import: only when a training asks for it

        weights, linear = (load_weights(Path(folder) / name) for name in (SQUEEZENET, LPIPS_LINEAR))
        self.net = squeezenet1_1().features
        self.net.load_state_dict(weights, strict=True)
        for module in self.net.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # the features taken here must survive the next layer
        self.linear = nn.ParameterList(linear[f"lin{i}"].view(1, -1, 1, 1) for i in range(len(self.LAYERS)))
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """Seven feature maps, each vector scaled to unit length."""
        x, features = (x_BCHW - self.mean) / self.std, []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in self.LAYERS:
                features.append(normalize_channels(x, 1e-10))  # as in the published code
        return features

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distance [B] of pictures with these feature maps."""
        parts = [F.conv2d((x - y).square(), weights) for x, y, weights in zip(a, b, self.linear, strict=True)]
        return torch.stack([part.float().mean((1, 2, 3)) for part in parts]).sum(0)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """The distance of pictures, [B]."""
        return self.between(self.features(a_BCHW), self.features(b_BCHW))


class EncoderDistance(nn.Module):
    """As LPIPS, but with the features of a trained tokenizer's encoder, all channels weighted alike."""

    name = "encoder"
    WEIGHT = 2.0  # about as large as LPIPS for the same pictures

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder.float().eval().requires_grad_(False)
        self.multiple = encoder.patch * 2 ** (len(encoder.levels) - 1)  # of which a side has to be one

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The map after every layer, each vector scaled to unit length."""
        height, width = (side // self.multiple * self.multiple for side in x_BCHW.shape[-2:])
        x, features = self.encoder.stem(F.pixel_unshuffle(x_BCHW[..., :height, :width], self.encoder.patch)), []
        for level in self.encoder.levels:
            for layer in level:  # type: ignore[attr-defined]
                x = layer(x)
                features.append(normalize_channels(x, 1e-5))
        return features

    def between(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """The distance [B] of pictures with these feature maps."""
        distances = [(x - y).float().square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]
        return self.WEIGHT * torch.stack(distances).mean(0)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """The distance of pictures, [B]."""
        return self.between(self.features(a_BCHW), self.features(b_BCHW))


Distance = LPIPS | EncoderDistance | GradientSSIM


def perceptual(source: str | None) -> Distance:
    """LPIPS from the weights in the folder `source`, or the distance by the encoder of the model `source`; without one,
    or for NO_WEIGHTS, the substitute that needs no weights. Raises UserError where `source` is neither."""
    if source in (None, NO_WEIGHTS):
        return GradientSSIM()
    if Path(source).is_dir() and not (Path(source) / checkpoint.CONFIG).is_file():
        return LPIPS(source)
    tokenizer = checkpoint.load(source).tokenizer
    if not isinstance(tokenizer, VQTokenizer):
        raise UserError(f"the model {source!r} has no encoder to compare pictures with: its tokens are colours")
    return EncoderDistance(tokenizer.encoder)


# A tokenizer


@torch.no_grad()
def reconstruction(
    tokenizer: checkpoint.Tokenizer,
    batches: Iterable[Tensor],
    distance: Distance,
    total: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, float]:
    """Mean PSNR, SSIM and perceptual distance of pictures to their decoded tokens, clamped to [-1, 1] as in a file; and
    the use of the codes. Where processes share the pictures out, `total` adds the sums of all of them up."""
    sums = torch.zeros(4 + tokenizer.vocab_size, dtype=torch.float64)
    for images_BCHW in batches:
        tokens_Bhw = tokenizer.encode(images_BCHW)
        recon_BCHW = tokenizer.decode(tokens_Bhw).float().clamp(-1, 1)
        sums[:3] += torch.stack([f(images_BCHW, recon_BCHW).cpu().sum() for f in (psnr, ssim, distance)])
        sums[3] += len(images_BCHW)
        sums[4:] += torch.bincount(tokens_Bhw.flatten().cpu(), minlength=tokenizer.vocab_size)
    sums = total(sums).cpu()
    values = *(sums[:3] / sums[3]).tolist(), *codebook_usage(sums[4:])
    return dict(zip(("psnr", "ssim", distance.name, "codes_used", "perplexity"), values, strict=True))
