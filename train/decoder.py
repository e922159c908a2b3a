"""The last stage of the tokenizer: encoder and codes stay as they are, the decoder learns to paint sharply.

An adversary would move the codes if it could; here it cannot. And some of the codes are wrong ones, as a GPT will send
them (TiTok, Yu et al. 2024, arXiv 2406.07550, section 3.3, also trains its decoder in two stages).

A discriminator is given pictures and the feature maps that the perceptual distance has of them anyway. It gives scores
at one or more scales: a list of [B, N], one for each of N patches, higher for real. All scales count the same.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.evaluation.perceptual import LPIPS, Distance
from tokenizer_vq.vq import VQTokenizer

from .folder import Run
from .options import TrainOptions
from .state import seeded
from .tokenizer import TokenizerTask, adamw

CORRUPTION = 0.03  # share of the tokens exchanged for others of the same batch
STRUCTURE_WEIGHT = 0.3  # of edges and SSIM beside a discriminator, which they contradict: they reward blur
ADVERSARIAL_START, ADVERSARIAL_RAMP = 0.1, 0.2  # shares of the run: without the discriminator, and while it fades in
DISCRIMINATOR_RATE = 0.5  # over that of the decoder
WINNING_LOSS = 0.1  # below this hinge loss a discriminator is never wrong, and teaches nothing


# The adversary


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


# The decoder


def corrupt_tokens(tokens_Bhw: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The tokens, about `share` of them exchanged for tokens from anywhere in the batch (drawn on the CPU)."""
    shape, device = tokens_Bhw.shape, tokens_Bhw.device
    places = torch.randint(tokens_Bhw.numel(), shape, generator=generator).to(device, non_blocking=True)
    wrong = (torch.rand(shape, generator=generator) < share).to(device, non_blocking=True)
    return torch.where(wrong, tokens_Bhw.flatten()[places], tokens_Bhw)


def discriminator_share(progress: float) -> float:
    """Weight of the discriminator over its full weight: 0 while it still knows nothing, then a ramp to 1."""
    return min(max((progress - ADVERSARIAL_START) / ADVERSARIAL_RAMP, 0.0), 1.0)


class DecoderTask(TokenizerTask):
    """A `loop.Task`: the decoder on frozen codes, and the discriminator that helps it."""

    name = "decoder"

    def __init__(self, run: Run[TrainOptions], distance: Distance, tokenizer: VQTokenizer):
        with seeded(run.options.seed):
            discriminator = discriminator_for(distance) if run.options.adversarial > 0 else None
            super().__init__(run, distance, copy.deepcopy(tokenizer).requires_grad_(False))
        for part in (self.tokenizer.from_code, self.tokenizer.decoder):
            part.requires_grad_(True)
        if discriminator:
            self.modules["discriminator"] = discriminator.to(memory_format=torch.channels_last)
            self.stages.append(discriminator)
            self.structure_weight = STRUCTURE_WEIGHT

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW; of the discriminator slower, and with less momentum."""
        if name == "discriminator":
            return adamw(self.modules[name], DISCRIMINATOR_RATE * self.options.tokenizer_lr, beta=0.5)
        return super().optimizer(name)

    def loss(self, batch: Tensor, progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch of crops: one number whose gradients are those of both modules, each of its own loss."""
        discriminator = self.modules.get("discriminator")
        self.tokenizer.quantizer.eval()  # its moving averages would go on learning
        with torch.no_grad():
            tokens_Bhw = corrupt_tokens(self.tokenizer.encode(batch), CORRUPTION, generator)
        recon_BCHW = self.tokenizer.decode(tokens_Bhw).float()
        leaf_BCHW = recon_BCHW.detach().requires_grad_()
        losses, real, fake = self.compare(batch, leaf_BCHW, generator)
        total, g_loss = torch.stack(list(losses.values())).sum(), None
        weight = self.options.adversarial * discriminator_share(progress)
        if discriminator and weight:
            losses["g_loss"] = g_loss = -mean_score(discriminator(*fake))
        gradient_BCHW = adaptive_gan_gradient(total, g_loss, weight, leaf_BCHW)
        loss = (recon_BCHW * gradient_BCHW).sum()  # of which this is the gradient
        if discriminator:
            real_scores = discriminator(*real)
            fake_scores = discriminator(fake[0].detach(), [each.detach() for each in fake[1]])
            d_loss = hinge_loss(real_scores, fake_scores)
            losses |= {"d_loss": d_loss, "d_real": mean_score(real_scores), "d_fake": mean_score(fake_scores)}
            loss = loss + d_loss
        return loss, losses

    def measure(self, model: VQTokenizer, progress: float = 1.0) -> dict[str, float]:
        """With a discriminator the newest averaged weights are the best, once it has its full weight: what it teaches
        does not lower the distance to the one right picture."""
        metrics = super().measure(model)
        if "discriminator" in self.modules:
            del metrics["score"]
            if discriminator_share(progress) == 1:
                metrics["score"] = -progress
        return metrics

    def warnings(self, progress: float, metrics: dict[str, float]) -> list[str]:
        """Where the discriminator wins."""
        if progress < ADVERSARIAL_START or metrics.get("d_loss", 1.0) >= WINNING_LOSS:
            return []
        return [
            f"the discriminator wins: its loss is {metrics['d_loss']:.3f}, it knows every reconstruction; "
            "if the pictures get worse from here, a lower --adversarial is wanted"
        ]
