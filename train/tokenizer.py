"""Stage one: the tokenizer learns to say a picture in codes. L1 and a perceptual distance; no adversary yet."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from igpt.evaluation.perceptual import GradientSSIM, perceptual, reconstruction
from igpt.sizes import Grids
from tokenizer_vq.dataset import ArtFolder, Crops
from tokenizer_vq.images import fit_cover, to_picture, to_tensor
from tokenizer_vq.vq import VQConfig, VQTokenizer

from .options import Preset, TrainOptions

WIDEST = 0.7  # crops are taken from pictures scaled to between this and 1 times their native side
QUANTIZED_AFTER = 0.05  # share of the run in which the encoder learns to say something before it is quantized
MEASURED = 96  # held-out pictures looked at during training
SHOWN = 8
JITTER = 4  # pixels: the perceptual distance looks from another corner every time, up to this far in
COLLAPSED = 0.5  # share of the codes in use below which a codebook is said to collapse


class TokenizerStage:
    """A `loop.Stage`: encoder, codebook and decoder."""

    name = "tokenizer"
    divisible = False
    structure_weight = 1.0

    def __init__(
        self, art: ArtFolder, train: list[int], held_out: list[int], preset: Preset, options: TrainOptions,
        tokenizer: VQTokenizer | None = None,
    ):  # fmt: skip
        torch.manual_seed(options.seed)
        self.options, self.art = options, art
        if tokenizer is None:
            tokenizer = VQTokenizer(VQConfig(channels=preset.channels, codes=preset.codes))
        # channels_last is what convolutions on both CPU and GPU run fastest in
        self.modules: dict[str, nn.Module] = {"model": tokenizer.to(memory_format=torch.channels_last)}
        self.side, _ = Grids(tokenizer.downsample, preset.cell, preset.cells).native_size
        scales = (max(1.0, WIDEST * self.side / preset.crop), max(1.0, self.side / preset.crop))
        self.dataset: Dataset[Any] = Crops(art, train, preset.crop, options.seed, scales, options.flip)
        self.distance = perceptual(options.perceptual)
        self.structure = self.distance if isinstance(self.distance, GradientSSIM) else GradientSSIM()
        self.used_K = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)  # in training, since somebody last worried
        self.all_held_out = held_out or train[:SHOWN]
        self.held_out = spread(self.all_held_out, MEASURED)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        parameters = self.modules[name].parameters()
        return torch.optim.AdamW(
            parameters, lr=self.options.tokenizer_lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        )

    def turns(self, progress: float) -> list[str]:
        return ["model"]

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: Tensor, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images_BCHW = batch.contiguous(memory_format=torch.channels_last)
        painted_BCHW, quantized = ready["model"](images_BCHW, generator, progress < QUANTIZED_AFTER)
        self.used_K[quantized.tokens_Bhw.flatten().cpu()] = True
        painted_BCHW, corner = painted_BCHW.float(), another_corner(generator)
        with torch.no_grad():
            features = self.features(images_BCHW[corner])
        losses = self.reconstruction_losses(images_BCHW, painted_BCHW, features, self.features(painted_BCHW[corner]))
        losses["quantizer"] = quantized.loss
        return total(losses), losses

    def features(self, images_BCHW: Tensor) -> list[Tensor]:
        """The feature maps that the perceptual distance has of pictures; none without weights."""
        if isinstance(self.distance, GradientSSIM):
            return []
        return self.distance.to(images_BCHW.device).features(images_BCHW)

    def reconstruction_losses(
        self, images_BCHW: Tensor, painted_BCHW: Tensor, features: list[Tensor], painted_features: list[Tensor]
    ) -> dict[str, Tensor]:
        """What is summed: L1, edges and structure, and the distance of feature maps where there are any.

        LPIPS alone leaves its stamp on every token: it does not see what falls between the strides of its network.
        The others do, and it looks from another corner every time.
        """
        losses = {
            "l1": F.l1_loss(painted_BCHW, images_BCHW),
            "structure": self.structure_weight * self.structure(images_BCHW, painted_BCHW).mean(),
        }
        if not isinstance(self.distance, GradientSSIM):
            losses["perceptual"] = self.distance.between(features, painted_features).mean()
        return losses

    def pictures(self, indices: list[int]) -> Iterator[Tensor]:
        """Centre crops of the native size, in batches [B, 3, H, W]."""
        for first in range(0, len(indices), 8):
            chosen = [self.art.picture(i) for i in indices[first : first + 8]]
            yield torch.stack([to_tensor(fit_cover(picture, self.side, self.side)) for picture in chosen])

    def measure(self, model: nn.Module) -> dict[str, float]:
        """On a part of the held-out pictures, for use during training."""
        numbers = self.measure_all(model, self.held_out)
        return numbers | {"score": numbers[self.distance.name]}

    def measure_all(self, model: nn.Module, indices: list[int] | None = None) -> dict[str, float]:
        """`perceptual.reconstruction` on all held-out pictures."""
        assert isinstance(model, VQTokenizer)
        device = next(model.parameters()).device
        batches = (batch.to(device) for batch in self.pictures(indices or self.all_held_out))
        return reconstruction(model, batches, self.distance.to(device))

    def worries(self, progress: float, numbers: dict[str, float]) -> list[str]:
        """A codebook that collapses, in plain words."""
        used = float(self.used_K.float().mean())
        self.used_K.zero_()
        if progress < 2 * QUANTIZED_AFTER or used >= COLLAPSED:
            return []
        return [
            f"the codebook is collapsing: {used:.0%} of its {len(self.used_K)} codes were used of late; a lower "
            "--tokenizer-lr or fewer --codes may help"
        ]

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image:
        """Held-out pictures above, their reconstructions below."""
        assert isinstance(model, VQTokenizer)
        device = next(model.parameters()).device
        images = next(self.pictures(spread(self.all_held_out, SHOWN))).to(device)
        painted = model.decode(model.encode(images))
        return to_picture(rearrange([images, painted], "two b c h w -> c (two h) (b w)").cpu())


def another_corner(generator: torch.Generator) -> tuple[EllipsisType, slice, slice]:
    """What to cut from pictures so that they begin up to JITTER - 1 pixels further in."""
    y, x = torch.randint(JITTER, (2,), generator=generator).tolist()
    return ..., slice(y, None), slice(x, None)


def spread(indices: list[int], n: int) -> list[int]:
    """At most `n` of them, from all over the list: neighbours share a label."""
    return indices[:: max(1, len(indices) // n)][:n]


def total(losses: dict[str, Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(list(losses.values())).sum()
