"""Stage one: the tokenizer learns to say a picture in codes. L1, a perceptual distance, and later a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.crops import Crops
from tokenizer_vq.images import fit_cover, to_picture, to_tensor
from tokenizer_vq.vq import VQConfig, VQTokenizer

from .evaluate import reconstruction
from .losses import PatchDiscriminator, hinge, perceptual
from .options import Preset, TrainOptions

COMMITMENT = 0.25
WIDEST = 0.7  # crops are taken from pictures scaled to between this and 1 times their native side
QUANTIZED_AFTER = 0.05  # share of the run in which the encoder learns to say something before it is quantized
CRITIC_STARTS = 0.45  # share of the run after which the discriminator trains ...
CRITIC_ENTERS = 0.50  # ... after which its verdict counts, so that it is not blind when it does ...
CRITIC_RAMP = 0.05  # ... growing to full weight over this share
MEASURED = 96  # held-out pictures looked at during training
SHOWN = 8


class TokenizerStage:
    """A `loop.Stage`: the tokenizer, and the discriminator that helps it."""

    name = "tokenizer"

    def __init__(self, art: ArtFolder, train: list[int], held_out: list[int], preset: Preset, options: TrainOptions):
        torch.manual_seed(options.seed)
        config = VQConfig(channels=preset.channels, codes=preset.codes)
        self.options, self.art = options, art
        # channels_last is what convolutions on both CPU and GPU run fastest in
        model = VQTokenizer(config).to(memory_format=torch.channels_last)
        self.modules: dict[str, nn.Module] = {"model": model}
        if options.adversarial > 0:
            critic = PatchDiscriminator().to(memory_format=torch.channels_last)
            self.modules["critic"] = critic
        side = int(preset.cells**0.5) * model.downsample
        scales = (max(1.0, WIDEST * side / preset.crop), max(1.0, side / preset.crop))
        self.dataset: Dataset[Any] = Crops(art, train, preset.crop, options.seed, scales, options.flip)
        self.distance = perceptual(options.perceptual)
        self.all_held_out = held_out or train[:SHOWN]
        self.held_out = self.all_held_out[:: max(1, len(self.all_held_out) // MEASURED)][:MEASURED]
        self.side = side
        self._painted: Tensor | None = None

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        betas = (0.9, 0.95) if name == "model" else (0.5, 0.9)
        parameters = self.modules[name].parameters()
        return torch.optim.AdamW(parameters, lr=self.options.tokenizer_lr, betas=betas, weight_decay=0.01, fused=True)

    def turns(self, progress: float) -> list[str]:
        return ["model", "critic"] if "critic" in self.modules and progress >= CRITIC_STARTS else ["model"]

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: Tensor, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "critic":
            assert self._painted is not None
            real, fake = ready["critic"](batch), ready["critic"](self._painted)
            loss = hinge(real, fake)
            return loss, {"critic": loss, "critic_real": real.mean(), "critic_fake": fake.mean()}
        images_BCHW = batch.contiguous(memory_format=torch.channels_last)
        painted_BCHW, quantized = ready["model"](images_BCHW, generator, progress < QUANTIZED_AFTER)
        painted_BCHW = painted_BCHW.float()
        self._painted = painted_BCHW.detach()
        l1 = F.l1_loss(painted_BCHW, images_BCHW)
        seen = self.distance.to(batch.device)(images_BCHW, painted_BCHW).mean()
        loss = l1 + seen + COMMITMENT * quantized.commitment
        logs = {"l1": l1, "perceptual": seen, "commitment": quantized.commitment}
        weight = self.options.adversarial * min(max((progress - CRITIC_ENTERS) / CRITIC_RAMP, 0.0), 1.0)
        if weight > 0:
            fooled = -ready["critic"](painted_BCHW).float().mean()
            loss, logs["fooled"] = loss + weight * fooled, fooled
        return loss, logs

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
        """`evaluate.reconstruction` on all held-out pictures."""
        assert isinstance(model, VQTokenizer)
        device = next(model.parameters()).device
        batches = (batch.to(device) for batch in self.pictures(indices or self.all_held_out))
        return reconstruction(model, batches, self.distance.to(device))

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image:
        """Held-out pictures above, their reconstructions below."""
        assert isinstance(model, VQTokenizer)
        device = next(model.parameters()).device
        images = next(self.pictures(self.held_out[:SHOWN])).to(device)
        painted = model.decode(model.encode(images))
        return to_picture(rearrange([images, painted], "two b c h w -> c (two h) (b w)").cpu())

