"""How much a model still knows of the art it learned from: bits a token of the pictures held out there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from igpt.checkpoint import Checkpoint
from igpt.token_cache import TokenCache
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor

from .options import TuneOptions
from .tune import bits_of

MOST = 128  # pictures


@dataclass(frozen=True)
class Remembered:
    """Token grids of held-out pictures, with the base's labels."""

    plain: TokenCache

    def bits(self, gpt: nn.Module, seed: int) -> float:
        """Bits a token, each picture with its label. Old labels keep their numbers in a tuned model."""
        return bits_of(gpt, self.plain, seed, len(self.plain))

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
        for i in known:
            image_CHW = to_tensor(fit_cover(art.picture(i), pixels, pixels))
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens_hw = base.tokenizer.encode(image_CHW.unsqueeze(0).to(device))[0].cpu()
            cache.labels.append(base.labels.index(art.labels[art.label_of[i]]))
            cache.shapes.append((side, side))
            cache.grids.append(tokens_hw.flatten().to(torch.uint16))
        return cls(cache)
