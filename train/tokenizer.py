"""Stage one: the tokenizer learns to say a picture in codes. L1, structure, a perceptual distance; no adversary yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from igpt.evaluation.features import batches
from igpt.evaluation.perceptual import Distance, GradientSSIM, reconstruction
from igpt.sizes import Grids
from tokenizer_vq.dataset import Crops
from tokenizer_vq.images import to_picture
from tokenizer_vq.vq import VQConfig, VQTokenizer

from .crops import Boxes
from .folder import Run
from .loop import Task
from .options import TrainOptions
from .processes import shared_out, total
from .state import seeded

WIDEST_CROP = 0.7  # crops are taken from pictures scaled to between this and 1 times their native side
QUANTIZED_AFTER = 0.05  # share of the run in which the encoder learns to say something before it is quantized
MEASURED_PICTURES, SHEET_PICTURES = 96, 8  # held-out ones
JITTER = 4  # pixels: the perceptual distance looks from another corner every time, up to this far in
COLLAPSED_USAGE = 0.5  # share of the codes in use below which a warning is given

Features = tuple[Tensor, list[Tensor]]  # pictures, and the feature maps that the perceptual distance has of them


class TokenizerTask(Task[VQTokenizer]):
    """A `loop.Task`: encoder, codebook and decoder."""

    name = "tokenizer"
    divisible = False  # the codebook counts the codes of a whole batch
    structure_weight = 1.0

    def __init__(self, run: Run[TrainOptions], distance: Distance, tokenizer: VQTokenizer | None = None):
        self.art, self.options, self.distance, self.pictures = run.art, run.options, distance, run.pictures
        if tokenizer is None:
            with seeded(run.options.seed):
                tokenizer = VQTokenizer(VQConfig(channels=run.preset.channels, codes=run.preset.codes))
        # channels_last is what convolutions on both CPU and GPU run fastest in
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)
        self.modules: dict[str, nn.Module] = {"model": tokenizer}
        self.stages: list[nn.Module] = [tokenizer.encoder, tokenizer.decoder]
        self.side, _ = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells).native_size
        self.crop = crop = run.preset.crop
        scales = (max(1.0, WIDEST_CROP * self.side / crop), max(1.0, self.side / crop))
        crops = Boxes if run.pictures else Crops
        self.dataset: Dataset[Any] = crops(run.art, run.train, crop, run.options.seed, scales, run.options.flip)
        self.structure = distance if isinstance(distance, GradientSSIM) else GradientSSIM()
        self.used_K = torch.zeros(tokenizer.vocab_size, dtype=torch.bool)  # codes chosen since the last warnings
        self.held_out = run.val or run.train[:SHEET_PICTURES]

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW."""
        return adamw(self.modules[name], self.options.tokenizer_lr)

    def prepare(self, batch: Tensor, step: int) -> Tensor:
        """Crops [B, 3, H, W], cut here where the pictures lie on the device."""
        images_BCHW = self.pictures.cut(batch, self.crop, self.crop) if self.pictures else batch
        return images_BCHW.contiguous(memory_format=torch.channels_last)

    def loss(self, batch: Tensor, progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch of crops: `compare` and the quantizer's own."""
        recon_BCHW, quantized = self.tokenizer(batch, generator, progress < QUANTIZED_AFTER)
        self.used_K = self.used_K.to(batch.device)
        self.used_K[quantized.tokens_Bhw.flatten()] = True
        losses, *_ = self.compare(batch, recon_BCHW.float(), generator)
        losses["quantizer"] = quantized.loss
        return torch.stack(list(losses.values())).sum(), losses

    def compare(
        self, images_BCHW: Tensor, recon_BCHW: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], Features, Features]:
        """The losses of reconstructions, to be summed; and what the perceptual distance has seen of both.

        LPIPS alone leaves a pattern in every token, as it does not see what falls between the strides of its network.
        L1, edges and SSIM do, and it looks from another corner every time.
        """
        y, x = torch.randint(JITTER, (2,), generator=generator).tolist()
        below, right = (start + 1 - JITTER + self.crop for start in (y, x))  # always as large: it may be compiled
        real_BCHW, fake_BCHW = (each[..., y:below, x:right] for each in (images_BCHW, recon_BCHW))
        losses = {"l1": F.l1_loss(recon_BCHW, images_BCHW)}
        losses["structure"] = self.structure_weight * self.structure(images_BCHW, recon_BCHW).mean()
        if isinstance(self.distance, GradientSSIM):
            return losses, (real_BCHW, []), (fake_BCHW, [])
        distance = self.distance.to(images_BCHW.device)
        with torch.no_grad():
            real_features = distance.features(real_BCHW)
        fake_features = distance.features(fake_BCHW)
        losses["perceptual"] = distance.between(real_features, fake_features).mean()
        return losses, (real_BCHW, real_features), (fake_BCHW, fake_features)

    def measure(self, model: VQTokenizer, progress: float = 1.0) -> dict[str, float]:
        """The score is the perceptual distance."""
        metrics = self.reconstruction(model, spread(self.held_out, MEASURED_PICTURES))
        return metrics | {"score": metrics[self.distance.name]}

    def reconstruction(self, model: VQTokenizer, pictures: Sequence[int]) -> dict[str, float]:
        """`perceptual.reconstruction` of some pictures, shared out over all processes."""
        distance = self.distance.to(model.quantizer.codebook_KE.device)
        return reconstruction(model, self.squares(model, shared_out(pictures)), distance, total)

    def squares(self, model: VQTokenizer, pictures: Sequence[int]) -> Iterator[Tensor]:
        """The middles of pictures at the native size, in batches [B, 3, H, W] on the device of the model."""
        return batches(map(self.art.picture, pictures), self.side, model.quantizer.codebook_KE.device)

    def warnings(self, progress: float, metrics: dict[str, float]) -> list[str]:
        """Where few of the codes are used."""
        used = float(self.used_K.float().mean())
        self.used_K.zero_()
        if progress < 2 * QUANTIZED_AFTER or used >= COLLAPSED_USAGE:
            return []
        return [
            f"the codebook is collapsing: {used:.0%} of its {len(self.used_K)} codes were used of late; a lower "
            "--tokenizer-lr or fewer --codes may help"
        ]

    @torch.no_grad()
    def sheet(self, model: VQTokenizer) -> Image:
        """Held-out pictures above, their reconstructions below."""
        images_BCHW = next(self.squares(model, spread(self.held_out, SHEET_PICTURES)))
        recon_BCHW = model.decode(model.encode(images_BCHW))
        return to_picture(rearrange([images_BCHW, recon_BCHW], "two b c h w -> c (two h) (b w)").cpu())


def adamw(module: nn.Module, lr: float, beta: float = 0.9) -> torch.optim.Optimizer:
    """For all that learns in a module; `beta` is of the mean of gradients."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    fused = parameters[0].device.type != "mps"  # which older versions of torch cannot do
    return torch.optim.AdamW(parameters, lr=lr, betas=(beta, 0.95), weight_decay=0.01, fused=fused)


def spread(pictures: Sequence[int], n: int) -> Sequence[int]:
    """At most `n` of them, from all over the list: neighbours share a label."""
    return pictures[:: max(1, len(pictures) // n)][:n]
