"""How likely the model finds pictures: bits a token, and the map of surprise over a picture."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from igpt.image_gpt import ImageGPT
from igpt.model import cell_positions

from .features import watched

BATCH = 16


@torch.inference_mode()
def surprise(
    model: ImageGPT, tokens_Bhw: Tensor, labels_B: Tensor, *, order: str, orders: int = 1, seed: int = 0,
    quiet: bool = True,
) -> Tensor:  # fmt: skip
    """Bits of every token, [B, h, w], given its label and what comes before it, mean over `orders` drawing orders.

    `order` is "random" (picture b has orders of its own, from `seed` and b) or "raster", of which there is only one.
    The mean of a picture over its cells is its negative log likelihood in bits a token.
    """
    count, h, w = tokens_Bhw.shape
    positions_L2 = cell_positions(h, w, model.gpt.config.centred)
    rounds = orders if order == "random" else 1
    sums_BL = torch.zeros(count, h * w, dtype=torch.float64)
    for turn in range(rounds):
        for first in watched(range(0, count, BATCH), f"likelihood, {order}", quiet):
            tokens_BL = tokens_Bhw[first : first + BATCH].flatten(1)
            orders_BL = torch.arange(h * w).expand(len(tokens_BL), -1)
            if order == "random":
                seeds = ((seed * rounds + turn) * 1_000_003 + first + b for b in range(len(tokens_BL)))
                generators = (torch.Generator().manual_seed(number) for number in seeds)
                orders_BL = torch.stack([torch.randperm(h * w, generator=generator) for generator in generators])
            targets_BL = tokens_BL.gather(1, orders_BL)
            logits_BLK = model.gpt(
                targets_BL.to(model.device), positions_L2[orders_BL].to(model.device),
                labels_B[first : first + BATCH].to(model.device),
            )  # fmt: skip
            nats_BL = F.cross_entropy(logits_BLK.float().transpose(1, 2).cpu(), targets_BL, reduction="none")
            sums_BL[first : first + BATCH].scatter_add_(1, orders_BL, nats_BL.double())
    return (sums_BL / rounds / math.log(2)).view(count, h, w)
