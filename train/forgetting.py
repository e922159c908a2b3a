"""How much a model still knows of the art it learned from: bits a token of the pictures held out there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from igpt.checkpoint import Checkpoint, Tokenizer
from igpt.token_cache import TokenCache
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor

from .evaluate import psnr
from .options import TuneOptions
from .tune import bits_of

MOST, PAINTED = 128, 32  # pictures whose tokens are judged, and that are painted


@dataclass(frozen=True)
class Remembered:
    """Token grids of held-out pictures, with the base's labels."""

    plain: TokenCache
    images: list[Tensor]  # [3, H, W], PAINTED of them

    def bits(self, gpt: nn.Module, seed: int) -> float:
        """Bits a token, each picture with its label. Old labels keep their numbers in a tuned model."""
        return bits_of(gpt, self.plain, seed, len(self.plain))

    @torch.inference_mode()
    def psnr(self, tokenizer: Tokenizer) -> float:
        """Of reconstructions, in dB: a decoder that learned other pictures paints these otherwise."""
        device = next(tokenizer.parameters()).device
        images_BCHW = [image_CHW.unsqueeze(0).to(device) for image_CHW in self.images]
        painted = [tokenizer.decode(tokenizer.encode(image)).float().clamp(-1, 1) for image in images_BCHW]
        return float(torch.cat([psnr(a, b) for a, b in zip(images_BCHW, painted, strict=True)]).mean())

    @classmethod
    @torch.inference_mode()
    def of(cls, options: TuneOptions, base: Checkpoint, device: torch.device, bf16: bool) -> Remembered | None:
        """None where no such art is named. Raises UserError where it has no held-out picture of a known label."""
        if options.remember is None:
            return None
        art = ArtFolder(options.remember, manifest=options.manifest)
        known = [i for i in art.split()[1] if art.labels[art.label_of[i]] in base.labels]
        known = known[:: max(1, -(-len(known) // MOST))]
        if not known:
            raise UserError(f"{options.remember} has no held-out picture of a label that the base knows")
        assert base.gpt is not None
        side = int(base.gpt.config.cells**0.5)
        pixels = side * base.tokenizer.downsample
        cache = TokenCache(1, [], [], [])
        images: list[Tensor] = []
        for number, i in enumerate(known):
            image_CHW = to_tensor(fit_cover(art.picture(i), pixels, pixels))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens_hw = base.tokenizer.encode(image_CHW.unsqueeze(0).to(device))[0].cpu()
            if len(images) < PAINTED and number % max(1, len(known) // PAINTED) == 0:
                images.append(image_CHW)
            cache.labels.append(base.labels.index(art.labels[art.label_of[i]]))
            cache.shapes.append((side, side))
            cache.grids.append(tokens_hw.flatten().to(torch.uint16))
        return cls(cache, images)
