"""Pictures already turned into tokens: grids of many shapes, and endless training windows of them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import shuffled

from .config import GPTConfig
from .model import cell_positions, to_cells


class TokenCache(Protocol):
    """Pictures in tokens: of each the same number of views."""

    views: int

    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""

    def label(self, picture: int) -> int:
        """The number of the label of a picture."""


@dataclass(eq=False)
class TokenWindows(Dataset[dict[str, Tensor]]):
    """Endless training sequences: sample number k is a pure function of (seed, k).

    A sample is a window of at most `config.cells` cells of a random view of a picture, padded to `config.cells`:
    {"cells" [L, n] (with noise), "targets" [L, n] (-1 in the padding), "positions" [L, 2], "label" []}.
    """

    cache: TokenCache
    pictures: Sequence[int]
    config: GPTConfig
    seed: int
    noise: float = 0.0  # share of the input tokens that are replaced by random ones
    label_dropout: float = 0.0  # share of samples without their label

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        config = self.config
        rng = random.Random(f"window/{self.seed}/{k}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        picture = self.pictures[shuffled(len(self.pictures), k, self.seed)]
        grid_hw = window(self.cache.grid(picture, rng.randrange(self.cache.views)), config, rng)
        targets_Ln = to_cells(grid_hw[None], config.cell)[0]
        positions_L2 = cell_positions(*(side // config.cell for side in grid_hw.shape))
        order_L = torch.randperm(len(targets_Ln), generator=generator)
        targets_Ln, positions_L2 = targets_Ln[order_L], positions_L2[order_L]
        noisy_Ln = torch.rand(targets_Ln.shape, generator=generator) < self.noise
        random_Ln = torch.randint(config.vocab_size, targets_Ln.shape, generator=generator)
        label = config.labels if rng.random() < self.label_dropout else self.cache.label(picture)
        padding = (0, 0, 0, config.cells - len(targets_Ln))
        return {
            "cells": F.pad(torch.where(noisy_Ln, random_Ln, targets_Ln), padding),
            "targets": F.pad(targets_Ln, padding, value=-1),
            "positions": F.pad(positions_L2, padding),
            "label": torch.tensor(label),
        }


def window(grid_hw: Tensor, config: GPTConfig, rng: random.Random) -> Tensor:
    """A random part of the grid with whole cells, as large as `config.cells` allow and as square as can be.
    Raises UserError for a grid that has not even one cell."""
    h, w = (side // config.cell for side in grid_hw.shape)
    if not h * w:
        raise UserError(f"a grid of {'x'.join(map(str, grid_hw.shape))} tokens has no cell of {config.cell} a side")
    short = min(h, w, math.isqrt(config.cells))
    long = min(max(h, w), config.cells // short)
    rows, columns = (side * config.cell for side in ((short, long) if h < w else (long, short)))
    top, left = rng.randint(0, grid_hw.shape[0] - rows), rng.randint(0, grid_hw.shape[1] - columns)
    return grid_hw[top : top + rows, left : left + columns]
