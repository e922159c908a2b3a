"""Views that nobody has seen before, for the GPT: cut from pictures that lie on the device, and encoded there.

Pictures lie there a little larger than the squares that are cut, so that none is enlarged. Views lie in a ring: every
PART_STEPS steps new ones take the place of the oldest part. Each is learned from about USES times before it goes, in
another drawing order every time. Which picture view v shows, and where it is cut, follows from (seed, v): a run that
goes on fills its ring again, and of several processes each encodes some and hears of the others'.
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

PART_STEPS, PARTS, USES = 32, 4, 4
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

    {"view" [], its place in the ring, "order" [L], cells of its grid in the order of drawing (-1 in the padding),
    "positions" [L, 2], "noise" [L, n], random tokens (-1 where there is none), "label" []}.
    """

    def __init__(self, run: Run[TrainOptions], model: GPT, grids: Grids):
        self.run, self.config, self.grids = replace(run, pictures=None), model.config, grids  # not to other processes
        self.samples = PART_STEPS * run.preset.gpt_batch  # while a part is the newest
        self.views = -(-self.samples // USES)  # of a part

    def view(self, number: int) -> View:
        """What a view shows, of all that there ever are."""
        run, rng = self.run, random.Random(f"view/{self.run.options.seed}/{number}")
        picture = shuffled(len(run.train), number, run.options.seed)
        width, height = run.art.sizes[run.train[picture]]
        h, w = self.grids.native if rng.random() < SQUARES else _composition(self.grids, width, height)
        scale = min(width / w, height / h) * rng.uniform(CLOSEST, 1)
        across, down = w * scale / width, h * scale / height
        left, top = rng.uniform(0, 1 - across), rng.uniform(0, 1 - down)
        sides = (left + across, left) if run.options.flip and rng.random() < 0.5 else (left, left + across)
        return View(picture, (h, w), (sides[0], top, sides[1], top + down))

    def there(self, part: int) -> range:
        """The views in the ring while that part is the newest."""
        return range(max(0, part + 1 - PARTS) * self.views, (part + 1) * self.views)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        run, config, rng = self.run, self.config, random.Random(f"window/{self.run.options.seed}/{k}")
        number = rng.choice(self.there(k // self.samples))
        picture, (h, w), _ = self.view(number)
        rows, columns = h // config.cell, w // config.cell
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        order_L = torch.randperm(rows * columns, generator=generator)
        shape, padding = (config.cells, config.cell**2), config.cells - len(order_L)
        noisy_Ln = torch.rand(shape, generator=generator) < run.options.token_noise
        label = config.labels if rng.random() < LABEL_DROPOUT else run.art.label_of[run.train[picture]]
        return {
            "view": torch.tensor(number % (PARTS * self.views)),
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
        self.dataset, self.filled = self.windows, range(0)  # the views that are in the ring
        shape = PARTS * self.windows.views, model.config.cells, model.config.cell**2
        self.ring_VLn = torch.zeros(shape, dtype=torch.int64, device=processes().device)  # in raster order

    def prepare(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Samples of FreshWindows as ones of TokenWindows."""
        there = self.windows.there(step // PART_STEPS)
        for first in range(max(there.start, self.filled.stop), there.stop, self.windows.views):
            place = first % len(self.ring_VLn)  # part by part: in other batches sums may round otherwise
            new = range(first, first + self.windows.views)
            self.ring_VLn[place : place + len(new)] = self.encoded(new)
        self.filled, order_BL1 = there, batch["order"].unsqueeze(-1)
        cells_BLn = self.ring_VLn[batch["view"]]
        cells_BLn = cells_BLn.gather(1, order_BL1.clamp(min=0).expand_as(cells_BLn))
        return {
            "cells": torch.where(batch["noise"] >= 0, batch["noise"], cells_BLn),
            "targets": torch.where(order_BL1 >= 0, cells_BLn, -1),
            "positions": batch["positions"],
            "label": batch["label"],
        }

    @torch.no_grad()
    def encoded(self, new: range) -> Tensor:
        """The cells of some views, [V, L, n] in raster order; zeros behind the last cell of small grids."""
        windows, token, device = self.windows, self.tokenizer.downsample, self.ring_VLn.device
        cells_VLn = torch.zeros(len(new), *self.ring_VLn.shape[1:], dtype=torch.int64, device=device)
        views = {place: windows.view(new[place]) for place in shared_out(range(len(new)))}
        places = defaultdict[Grid, list[int]](list)
        for place, view in views.items():
            places[view.grid].append(place)
        for h, w in sorted(places):
            # Squares have a pixel or a little more of their picture for each of theirs, whole pictures up to three.
            fine = 1 if (h, w) == windows.grids.native else 2
            for some_B in torch.split(torch.tensor(places[h, w]), VIEWS_AT_ONCE):
                boxes = [(views[place].picture, *views[place].box) for place in some_B.tolist()]
                images_BCHW = self.pictures.cut(torch.tensor(boxes).to(device), fine * h * token, fine * w * token)
                with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                    tokens_Bhw = self.tokenizer.encode(F.avg_pool2d(images_BCHW, fine))
                cells_BLn = to_cells(tokens_Bhw, windows.config.cell)
                cells_VLn[some_B.to(device), : cells_BLn.shape[1]] = cells_BLn
        return total(cells_VLn)
