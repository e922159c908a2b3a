"""The last stage of the tokenizer: the encoder and the codes stay as they are, the decoder learns to paint sharply.

An adversary would pull the codes about if it could; here it cannot. And the decoder meets wrong codes now and then, as
a GPT will send them (TiTok, Yu et al. 2024, section 3.3, trains its decoder in two stages likewise).
"""

from __future__ import annotations

import torch
from PIL.Image import Image
from torch import Tensor, nn

from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.vq import VQTokenizer

from .critic import balanced, discriminator, hinge, mean_score
from .options import Preset, TrainOptions
from .tokenizer import TokenizerStage, another_corner, total

SWAPPED = 0.03  # share of the codes exchanged for others of the same batch
STRUCTURE = 0.3  # weight of edges and SSIM beside a discriminator: they want no stroke but the very same
CRITIC_ENTERS = 0.1  # share of the run after which the discriminator's verdict counts: it is not blind when it does ...
CRITIC_RAMP = 0.2  # ... growing to full weight over this share
CRITIC_LR = 0.5  # learning rate of the discriminator over that of the decoder
WINNING = 0.1  # a discriminator with a hinge loss below this is never wrong, and teaches nothing

Seen = tuple[Tensor, list[Tensor]]  # pictures and their feature maps: what a discriminator is shown


class FrozenCodes(nn.Module):
    """A tokenizer of which only the way from codes to pictures learns."""

    def __init__(self, tokenizer: VQTokenizer):
        super().__init__()
        self.tokenizer = tokenizer
        self.tokenizer.requires_grad_(False)
        for part in (tokenizer.from_code, tokenizer.decoder):
            part.requires_grad_(True)

    def train(self, mode: bool = True) -> FrozenCodes:
        super().train(mode)
        self.tokenizer.quantizer.eval()  # a codebook of moving averages would go on learning
        return self

    def forward(self, images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            tokens_Bhw = swap(self.tokenizer.encode(images_BCHW), SWAPPED, generator)
        return self.tokenizer.decode(tokens_Bhw)


def swap(tokens_Bhw: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The tokens, about `share` of them exchanged for tokens from anywhere in the batch (drawn on the CPU)."""
    shape, device = tokens_Bhw.shape, tokens_Bhw.device
    others = tokens_Bhw.flatten()[torch.randint(tokens_Bhw.numel(), shape, generator=generator).to(device)]
    return torch.where((torch.rand(shape, generator=generator) < share).to(device), others, tokens_Bhw)


class DecoderStage(TokenizerStage):
    """A `loop.Stage`: the decoder on frozen codes, and the discriminator that helps it."""

    name = "decoder"

    def __init__(
        self, art: ArtFolder, train: list[int], held_out: list[int], preset: Preset, options: TrainOptions,
        tokenizer: VQTokenizer,
    ):  # fmt: skip
        super().__init__(art, train, held_out, preset, options, tokenizer)
        self.modules = {"model": FrozenCodes(tokenizer)}
        if options.adversarial > 0:
            self.modules["critic"] = discriminator(self.distance).to(memory_format=torch.channels_last)
            self.structure_weight = STRUCTURE
        self._settled, self._progress = options.adversarial == 0, 0.0
        self._real: Seen | None = None  # of the batch that the decoder has just learned from
        self._painted: Seen | None = None

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        critic, rate = name == "critic", self.options.tokenizer_lr
        parameters = [p for p in self.modules[name].parameters() if p.requires_grad]
        return torch.optim.AdamW(
            parameters, lr=rate * (CRITIC_LR if critic else 1), betas=(0.5 if critic else 0.9, 0.95),
            weight_decay=0.01, fused=True,
        )  # fmt: skip

    def turns(self, progress: float) -> list[str]:
        return list(self.modules)

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: Tensor, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if turn == "critic":
            assert self._real is not None and self._painted is not None
            real, fake = ready["critic"](*self._real), ready["critic"](*self._painted)
            loss = hinge(real, fake)
            return loss, {"critic": loss, "critic_real": mean_score(real), "critic_fake": mean_score(fake)}
        images_BCHW = batch.contiguous(memory_format=torch.channels_last)
        painted_BCHW = ready["model"](images_BCHW, generator).float()
        corner = another_corner(generator)  # the discriminator, too, looks from another corner every time
        leaf_BCHW = painted_BCHW.detach().requires_grad_()
        with torch.no_grad():
            self._real = images_BCHW[corner], self.features(images_BCHW[corner])
        seen = leaf_BCHW[corner], self.features(leaf_BCHW[corner])
        self._painted = seen[0].detach(), [each.detach() for each in seen[1]]
        losses = self.reconstruction_losses(images_BCHW, leaf_BCHW, self._real[1], seen[1])
        ramp = min(max((progress - CRITIC_ENTERS) / CRITIC_RAMP, 0.0), 1.0)
        self._progress = progress
        self._settled, weight = ramp == 1 or "critic" not in ready, self.options.adversarial * ramp
        # The bare module: with several processes, the prepared one would wait for gradients of its own weights.
        fooled = -mean_score(self.modules["critic"](*seen)) if weight else None
        loss = balanced(painted_BCHW, total(losses), fooled, weight, leaf_BCHW)
        return loss, losses if fooled is None else losses | {"fooled": fooled}

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Beside a discriminator the newest averaged weights are the best, once it has its full say: what it teaches,
        no distance to the one right picture tells."""
        numbers = super().measure(model)
        if "critic" in self.modules:
            numbers["score"] = -self._progress
        return {name: value for name, value in numbers.items() if self._settled or name != "score"}

    def measure_all(self, model: nn.Module, indices: list[int] | None = None) -> dict[str, float]:
        return super().measure_all(model.tokenizer if isinstance(model, FrozenCodes) else model, indices)

    def sheet(self, model: nn.Module) -> Image:
        return super().sheet(model.tokenizer if isinstance(model, FrozenCodes) else model)

    def worries(self, progress: float, numbers: dict[str, float]) -> list[str]:
        """A discriminator that wins, in plain words."""
        if "critic" not in numbers or progress < CRITIC_ENTERS or numbers["critic"] >= WINNING:
            return []
        return [
            f"the discriminator wins: its loss is {numbers['critic']:.3f}, it knows every reconstruction; "
            "if the pictures get worse from here, a lower --adversarial is wanted"
        ]
