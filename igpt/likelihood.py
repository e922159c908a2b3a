"""How likely a GPT finds pictures: bits of every token, and the label under which a picture surprises it least."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import GPT, cell_positions, to_cells, to_grid

GRIDS_AT_ONCE = 16
CELLS_ASKED = 64  # known cells of a picture by which its label is guessed; twice as many guess no better


@torch.inference_mode()
def token_nats(gpt: GPT, cells_BLn: Tensor, positions_BL2: Tensor, labels_B: Tensor) -> Tensor:
    """Negative log likelihood in nats of every token, [B, L, n] float32 on the CPU: each cell given those before it."""
    nats = []
    for batch in zip(*(torch.split(x, GRIDS_AT_ONCE) for x in (cells_BLn, positions_BL2, labels_B)), strict=True):
        cells, positions, labels = (x.to(gpt.query.device) for x in batch)
        logits_KN = gpt(cells, positions, labels).float().flatten(0, 2)
        nats.append(F.cross_entropy(logits_KN, cells.flatten(), reduction="none").view(cells.shape).cpu())
    return torch.cat(nats)


def bits_per_token(gpt: GPT, tokens_Bhw: Tensor, labels_B: Tensor, seeds: Iterable[int] = (0,)) -> Tensor:
    """Bits of every token of grids of whole cells, [B, h, w] float64, given its label and what comes before it.

    The mean over random orders, one for each of `seeds`: picture b has orders of its own, from a seed and b. The mean
    of a picture over its tokens is its negative log likelihood in bits a token.
    """
    cell, (count, h, w) = gpt.config.cell, tokens_Bhw.shape
    cells_BLn, positions_L2 = to_cells(tokens_Bhw.cpu(), cell), cell_positions(h // cell, w // cell)
    total_BLn, seeds = torch.zeros(cells_BLn.shape, dtype=torch.float64), list(seeds)
    for seed in seeds:
        generators = (torch.Generator().manual_seed(seed * 1_000_003 + b) for b in range(count))
        orders_BL = torch.stack([torch.randperm(len(positions_L2), generator=g) for g in generators])
        places_BLn = orders_BL.unsqueeze(-1).expand_as(cells_BLn)
        nats_BLn = token_nats(gpt, cells_BLn.gather(1, places_BLn), positions_L2[orders_BL], labels_B.cpu())
        total_BLn.scatter_add_(1, places_BLn, nats_BLn.double())
    return to_grid(total_BLn / (len(seeds) * math.log(2)), h // cell, cell)


def label_nats(gpt: GPT, tokens_hw: Tensor, known_hw: Tensor) -> Tensor:
    """Mean nats a token of some of the cells that are known whole, under every label and the null label, [labels + 1].

    The same cells in the same order every time. Where no cell is known whole, all are 0.
    """
    cell, (h, w) = gpt.config.cell, tokens_hw.shape
    known_L = to_cells(known_hw[None].cpu(), cell)[0].all(-1).nonzero().squeeze(-1)
    chosen_L = known_L[torch.randperm(len(known_L), generator=torch.Generator().manual_seed(0))][:CELLS_ASKED]
    labels_B = torch.arange(gpt.config.labels + 1)
    if not len(chosen_L):
        return torch.zeros(len(labels_B))
    cells_BLn = to_cells(tokens_hw[None].cpu(), cell)[:, chosen_L].expand(len(labels_B), -1, -1)
    positions_BL2 = cell_positions(h // cell, w // cell)[chosen_L].expand(len(labels_B), -1, -1)
    return token_nats(gpt, cells_BLn, positions_BL2, labels_B).mean((1, 2))
