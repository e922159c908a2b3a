"""The last stage of the tokenizer: encoder and codes stay as they are, the decoder learns to paint sharply.

An adversary would move the codes if it could; here it cannot. And some of the codes are wrong ones, as a GPT will send
them (TiTok, Yu et al. 2024, arXiv 2406.07550, section 3.3, also trains its decoder in two stages).
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from igpt.evaluation.perceptual import Distance
from tokenizer_vq.vq import VQTokenizer

from .discriminator import adaptive_gan_gradient, discriminator_for, hinge_loss, mean_score
from .folder import Run
from .options import TrainOptions
from .state import seeded
from .tokenizer import TokenizerTask, adamw

CORRUPTION = 0.03  # share of the tokens exchanged for others of the same batch
STRUCTURE_WEIGHT = 0.3  # of edges and SSIM beside a discriminator, which they contradict: they reward blur
ADVERSARIAL_START, ADVERSARIAL_RAMP = 0.1, 0.2  # shares of the run: without the discriminator, and while it fades in
DISCRIMINATOR_RATE = 0.5  # over that of the decoder
WINNING_LOSS = 0.1  # below this hinge loss a discriminator is never wrong, and teaches nothing


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
