"""Starting from another model's weights instead of from random ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer

VOCABULARIES = ("codebook_KE", "tokens.weight", "head.weight")  # one row a token
WORTHWHILE = 0.1  # share of the weights that must fit
SPLIT_NOISE = 0.03  # how far the children of a split code start from their parent, which has length 1


def start_from(new: nn.Module, old: nn.Module) -> set[str]:
    """Copy into `new` every weight of `old` that has its name and shape; the others stay as they are. Their names.

    A vocabulary that is a multiple of the old one is copied that many times over: code, embedding and output of token
    k, k + K, k + 2K all start from those of the old token k. Raises UserError if next to nothing fits.
    """
    weights, own, fitted = old.state_dict(), new.state_dict(), set()
    with torch.no_grad():
        for name, value in own.items():
            source = weights.get(name)
            if source is None:
                continue
            if name.endswith(VOCABULARIES) and source.dim() == 2 and len(value) % len(source) == 0:
                source = source.repeat(len(value) // len(source), 1)
            if source.shape == value.shape:
                value.copy_(source)
                fitted.add(name)
    if sum(own[name].numel() for name in fitted) < WORTHWHILE * sum(value.numel() for value in own.values()):
        raise UserError("the model to start from has other shapes than are wanted here: next to no weights fit")
    return fitted


def split_codes(tokenizer: VQTokenizer, parents: int, generator: torch.Generator) -> None:
    """Move all codes but the first `parents`, which are copies of those, a little apart (Linde, Buzo & Gray 1980,
    section 3), and let learning go on from there. The decoder understands all of them at once, as it did their parent.
    """
    quantizer = tokenizer.quantizer
    children_KE = quantizer.codebook_KE[parents:]
    noise_KE = torch.randn(children_KE.shape, generator=generator) * SPLIT_NOISE
    quantizer.codebook_KE[parents:] = F.normalize(children_KE + noise_KE, dim=-1)
    quantizer.reset_ema()
