"""Views that nobody has seen before, for the GPT: cut from pictures that lie on the device, and encoded there.

Pictures lie there a little larger than the squares that are cut, so that none is enlarged. Views come in pools.
POOL_STEPS steps learn from one, from each of its views USES times, in another drawing order every time. Where view v of
pool p is cut from which picture follows from (seed, p, v): a run that goes on encodes its pool again, and of several
processes each encodes a part and hears of the others'.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from igpt.checkpoint import Tokenizer
from igpt.model import GPT, cell_positions, to_cells
from igpt.sizes import Grid, Grids
from tokenizer_vq.dataset import shuffled

from .crops import DevicePictures
from .folder import Run
from .gpt import LABEL_DROPOUT, GPTTask
from .options import TrainOptions
from .processes import processes, shared_out, total
from .shards import TokenShards

POOL_STEPS, USES = 128, 4
SQUARES = 0.6  # share of the views that are squares; the others are shaped as their picture is
CLOSEST = 0.85  # a view shows at least this much, across and down, of the largest part of its shape
VIEWS_AT_ONCE = 64


class View(NamedTuple):
    """A part of a picture."""

    picture: int  # its place among those that are learned from
    grid: Grid  # on which it becomes tokens
    box: tuple[float, float, float, float]  # left, top, right, bottom as shares of its sides, as in `crops.Boxes`


class FreshWindows(Dataset[dict[str, Tensor]]):
    """Endless training sequences of views that have no tokens yet: sample number k is a pure function of (seed, k).

    {"view" [], its number in the pool, "order" [L], cells of its grid in the order of drawing (-1 in the padding),
    "positions" [L, 2], "noise" [L, n], random tokens (-1 where there is none), "label" []}.
    """

    def __init__(self, run: Run[TrainOptions], model: GPT, grids: Grids):
        self.run, self.config, self.grids = replace(run, pictures=None), model.config, grids  # not to other processes
        self.samples = POOL_STEPS * run.preset.gpt_batch  # of a pool
        self.views = -(-self.samples // USES)

    def view(self, pool: int, number: int) -> View:
        """What a view shows."""
        run, rng = self.run, random.Random(f"view/{self.run.options.seed}/{pool}/{number}")
        picture = shuffled(len(run.train), pool * self.views + number, run.options.seed)
        width, height = run.art.sizes[run.train[picture]]
        h, w = self.grids.native if rng.random() < SQUARES else _composition(self.grids, width, height)
        scale = min(width / w, height / h) * rng.uniform(CLOSEST, 1)
        across, down = w * scale / width, h * scale / height
        left, top = rng.uniform(0, 1 - across), rng.uniform(0, 1 - down)
        sides = (left + across, left) if run.options.flip and rng.random() < 0.5 else (left, left + across)
        return View(picture, (h, w), (sides[0], top, sides[1], top + down))

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        run, config = self.run, self.config
        number = shuffled(self.samples, k, run.options.seed) % self.views
        picture, (h, w), _ = self.view(k // self.samples, number)
        rows, columns = h // config.cell, w // config.cell
        rng = random.Random(f"window/{run.options.seed}/{k}")
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        order_L = torch.randperm(rows * columns, generator=generator)
        shape, padding = (config.cells, config.cell**2), config.cells - len(order_L)
        noisy_Ln = torch.rand(shape, generator=generator) < run.options.token_noise
        label = config.labels if rng.random() < LABEL_DROPOUT else run.art.label_of[run.train[picture]]
        return {
            "view": torch.tensor(number),
            "order": F.pad(order_L, (0, padding), value=-1),
            "positions": F.pad(cell_positions(rows, columns)[order_L], (0, 0, 0, padding)),
            "noise": torch.where(noisy_Ln, torch.randint(config.vocab_size, shape, generator=generator), -1),
            "label": torch.tensor(label),
        }


@lru_cache(maxsize=4096)
def _composition(grids: Grids, width: int, height: int) -> Grid:
    return grids.composition(width, height)


class FreshTask(GPTTask):
    """A `loop.Task`: the GPT on views that are new all the time. Held-out ones are those that `tokens` has."""

    def __init__(
        self, run: Run[TrainOptions], pictures: DevicePictures, tokens: TokenShards, tokenizer: Tokenizer, model: GPT
    ):
        super().__init__(replace(run, train=[], val=tokens.val), tokens, tokenizer, model, run.options.gpt_lr)
        grids = Grids(tokenizer.downsample, model.config.cell, model.config.cells)
        self.pictures, self.bf16, self.windows = pictures, run.bf16, FreshWindows(run, model, grids)
        self.dataset, self.pool = self.windows, -1
        self.cells_VLn = torch.empty(0)  # of the views of that pool, in raster order

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Samples of FreshWindows as ones of TokenWindows."""
        if step // POOL_STEPS != self.pool:
            self.pool = step // POOL_STEPS
            self.cells_VLn = self.encoded(self.pool)
        asked_BL1 = (batch["order"] >= 0).unsqueeze(-1)
        places_BL1 = batch["order"].clamp(min=0).unsqueeze(-1)
        cells_BLn = self.cells_VLn[batch["view"]]
        cells_BLn = cells_BLn.gather(1, places_BL1.expand_as(cells_BLn))
        return {
            "cells": torch.where(batch["noise"] >= 0, batch["noise"], cells_BLn),
            "targets": torch.where(asked_BL1, cells_BLn, -1),
            "positions": batch["positions"],
            "label": batch["label"],
        }

    @torch.no_grad()
    def encoded(self, pool: int) -> Tensor:
        """The cells of all views of a pool, [V, L, n] in raster order; zeros behind the last cell of small grids."""
        windows, config, device = self.windows, self.config, processes().device
        cells_VLn = torch.zeros(windows.views, config.cells, config.cell**2, dtype=torch.int64, device=device)
        numbers = defaultdict[Grid, list[int]](list)
        views = {number: windows.view(pool, number) for number in shared_out(range(windows.views))}
        for number, view in views.items():
            numbers[view.grid].append(number)
        for h, w in sorted(numbers):
            # Squares have a pixel or a little more of their picture for each of theirs, whole pictures up to three.
            fine, token = 1 if (h, w) == windows.grids.native else 2, self.tokenizer.downsample
            for some_B in torch.split(torch.tensor(numbers[h, w]), VIEWS_AT_ONCE):
                boxes = [(views[number].picture, *views[number].box) for number in some_B.tolist()]
                images_BCHW = self.pictures.cut(torch.tensor(boxes).to(device), fine * h * token, fine * w * token)
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    tokens_Bhw = self.tokenizer.encode(F.avg_pool2d(images_BCHW, fine))
                cells_BLn = to_cells(tokens_Bhw, config.cell)
                cells_VLn[some_B.to(device), : cells_BLn.shape[1]] = cells_BLn
        return total(cells_VLn)
