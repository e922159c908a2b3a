"""Between the stages: pictures in several views become tokens, and these endless windows to learn from.

To train, all views are encoded first, unless they are fresh ones. To fine-tune, each is encoded when it is first
learned from, so that none is for which there is no time. Where a token is a pixel a view is the sprite itself.
"""

from __future__ import annotations

import functools
import math
import random
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from igpt.bundle import Bundle
from igpt.checkpoint import Tokenizer
from igpt.config import GPTConfig
from igpt.model import cell_positions, to_cells
from igpt.sizes import Grid, Grids
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import shuffled
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

from .folder import Run, weights_fingerprint
from .options import TrainOptions, TuneOptions
from .processes import agreed, companions, processes, shared_out, together
from .shards import ArtShards, Labelled, TokenShards, shard_file, write_index, write_shard
from .sprites import sprite_view
from .state import catch_interrupt, peek

PICTURES_A_SHARD = 128  # of a folder
ENCODED_AT_ONCE = 32  # views, which a tokenizer takes in one batch: on a CPU it needs 17 MB for each
LONGEST_VIEW = 2.0  # a view shows at most this many times its short side
FIXED_ZOOM = 1.12  # views beyond the first four come closer, up to this
CLOSEST_VIEW = 1.35  # a free view shows at least the short side of a picture over this
PIXEL_ART_SIDE = 64  # pixels: pictures of a shorter side are pixel art, and are enlarged to crisp squares first
FREE_VIEWS = 8  # of a picture, see `free_view`
CACHED_SIDE, CACHED_PICTURES = 512, 256  # pixels of the short side of pictures that are at hand for more views

Window = tuple[Tensor, int]  # tokens [h, w] and a label

# Views


def view_of(picture: Image.Image, view: int, grids: Grids, flip: bool) -> Tensor:
    """View number `view` of a picture, [3, H, W]: 0 at the native short side, 1 as a whole on its composition's grid,
    2 and 3 the same mirrored, then twelve times from a little closer."""
    zoom = 1 + (FIXED_ZOOM - 1) * ((view // 4) % 4) / 3
    if flip and (view // 2) % 2:
        picture = ImageOps.mirror(picture)
    width, height = picture.size
    if view % 2:
        h, w = grids.composition(width, height)
    else:
        side = grids.native[0] * zoom
        aspect = min(max(width / height, 1 / LONGEST_VIEW), LONGEST_VIEW)
        h, w = (round(side), round(side * aspect)) if aspect >= 1 else (round(side / aspect), round(side))
    border, size = (1 - 1 / zoom) / 2 if view % 2 else 0, (w * grids.downsample, h * grids.downsample)
    return to_tensor(ImageOps.fit(picture, size, Image.Resampling.LANCZOS, border))


def free_view(picture: Image.Image, view: int, grids: Grids, flip: bool, rng: random.Random) -> Tensor:
    """View number `view` of many, [3, H, W]: even ones the whole picture on its composition's grid, frame and all, as
    it will be drawn (with `flip` every other mirrored); 1 its middle square, other odd ones squares from closer."""
    width, height = picture.size
    if (short := min(width, height)) < PIXEL_ART_SIDE:
        factor = -(-4 * PIXEL_ART_SIDE // short)
        width, height = width * factor, height * factor
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    h, w = grids.native if view % 2 else grids.composition(width, height)
    if view % 2 == 0 or view == 1:
        whole = ImageOps.mirror(picture) if flip and view % 4 == 2 else picture
        return to_tensor(fit_cover(whole, w * grids.downsample, h * grids.downsample))
    scale = min(width / w, height / h) / (1 + (CLOSEST_VIEW - 1) * rng.random() ** 1.5)
    left, top = rng.uniform(0, width - w * scale), rng.uniform(0, height - h * scale)
    box = (left, top, min(width, left + w * scale), min(height, top + h * scale))
    crop = picture.resize((w * grids.downsample, h * grids.downsample), Image.Resampling.LANCZOS, box)
    return to_tensor(ImageOps.mirror(crop) if flip and rng.random() < 0.5 else crop)


# Tokens


def encode(run: Run[TrainOptions], tokenizer: Tokenizer) -> TokenShards:
    """The tokens of all pictures to learn from and held out, made or completed in the folder of the run, every process
    its part of the shards. A shard that is on disk stays; Ctrl-C leaves the one that is not finished."""
    art, options, folder, here = run.art, run.options, run.work / "tokens", processes()
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)
    palette = tokenizer.config if isinstance(tokenizer, PaletteTokenizer) else None
    views = options.views if palette is None else 1 + options.flip
    parts = art.fingerprint, weights_fingerprint(tokenizer), palette, views, options.flip, grids, len(run.train)
    identity, pictures = "/".join(map(str, parts)), len(run.train) + len(run.val)
    shards = len(art.shards) if isinstance(art, ArtShards) else -(-pictures // PICTURES_A_SHARD)
    tokenizer = tokenizer.to(here.device).eval()
    silent = options.quiet or not here.is_main_process
    bar = tqdm(shared_out(range(shards)), desc="encoding", unit="shard", disable=silent)

    def encode_mine() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in bar:
            path = shard_file(folder, shard)
            if peek(path).get("identity") != identity and not interrupt.is_set():
                parts = _encoded(run, tokenizer, shard, views, interrupt)
                if not interrupt.is_set():
                    write_shard(path, parts, identity)

    with catch_interrupt() as interrupt, companions():
        together(encode_mine)
        if agreed(interrupt.is_set())[0] > 0:
            raise KeyboardInterrupt
        together(lambda: write_index(folder, shards, views, art.labels), only_main=True)
    return TokenShards(folder)


def _encoded(
    run: Run[TrainOptions], tokenizer: Tokenizer, shard: int, views: int, interrupt: threading.Event
) -> tuple[list[tuple[list[Tensor], str]], ...]:
    """The tokens of a shard, of what is learned from and what is held out; not all where interrupted. Pictures are
    opened by threads, a few at a time, so that memory holds no more of them."""
    palette = tokenizer.config if isinstance(tokenizer, PaletteTokenizer) else None
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)

    def views_of_one(opened: Callable[[], Labelled | None]) -> tuple[Labelled, list[Tensor]] | None:
        if (found := opened()) is None:
            return None
        if palette is None:
            return found, [view_of(found.picture, view, grids, run.options.flip) for view in range(views)]
        return found, [sprite_view(found.picture, palette, grids.cell, mirrored=view == 1) for view in range(views)]

    parts: tuple[list[tuple[list[Tensor], str]], ...] = ([], [])
    pictures = iter(_pictures(run, shard, "RGB" if palette is None else "RGBA"))
    with ThreadPoolExecutor() as pool:
        while not interrupt.is_set() and (some := list(islice(pictures, max(1, ENCODED_AT_ONCE // views)))):
            found = [each for each in pool.map(views_of_one, some) if each]
            tokens = iter(tokens_of(tokenizer, [image_CHW for _, images in found for image_CHW in images], run.bf16))
            for (_, label, held_out), _ in found:
                parts[held_out].append((list(islice(tokens, views)), label))
    return parts


@torch.inference_mode()
def tokens_of(tokenizer: Tokenizer, images: Sequence[Tensor], bf16: bool) -> list[Tensor]:
    """Tokens [h, w] uint16 of pictures [3, H, W], those of one size together; on the device of this process."""
    device, tokens = processes().device, list(images)
    for shape in dict.fromkeys(image_CHW.shape for image_CHW in images):
        alike = [i for i, image_CHW in enumerate(images) if image_CHW.shape == shape]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens_Bhw = tokenizer.encode(torch.stack([images[i] for i in alike]).to(device))
        for i, tokens_hw in zip(alike, tokens_Bhw.to("cpu", torch.uint16), strict=True):
            tokens[i] = tokens_hw
    return tokens


def _pictures(run: Run[TrainOptions], shard: int, mode: str) -> Sequence[Callable[[], Labelled | None]]:
    """The pictures of one token shard, to be opened."""
    art, val = run.art, set(run.val)
    if isinstance(art, ArtShards):
        return art.unit(shard)

    def opened(i: int) -> Labelled:
        return Labelled(art.picture(i, mode), art.labels[art.label_of[i]], i in val)

    numbers = sorted((*run.train, *run.val))[shard * PICTURES_A_SHARD : (shard + 1) * PICTURES_A_SHARD]
    return [partial(opened, i) for i in numbers]


class Views:
    """The views of the pictures of a run in the tokens of a model, each encoded when it is first asked for."""

    def __init__(self, run: Run[TuneOptions], labels: list[int], model: Bundle, flip: bool):
        config = model.tokenizer.config
        self.palette = config if isinstance(config, PaletteConfig) else None
        self.views = FREE_VIEWS if self.palette is None else 1 + flip
        self.run, self.labels, self.model, self.flip = run, labels, model, flip
        self.plain = 2 if self.palette is None else 1  # how many views, the first ones, show a picture as it is
        self.encoded: dict[tuple[int, int], Tensor] = {}
        self._picture = functools.lru_cache(maxsize=CACHED_PICTURES)(self._opened)

    def _opened(self, picture: int) -> Image.Image:
        if self.palette is not None:
            return self.run.art.picture(picture, "RGBA")
        opened = self.run.art.picture(picture)
        scale = CACHED_SIDE / min(opened.size)
        width, height = (round(side * scale) for side in opened.size)
        return opened.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else opened

    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""
        view = view if view % 2 else view % (4 if self.flip else 2)  # see `free_view`: other even ones are the same
        if (picture, view) not in self.encoded:
            opened, model = self._picture(picture), self.model
            if self.palette is not None:
                image_CHW = sprite_view(opened, self.palette, model.grids.cell, mirrored=view == 1)
            else:
                rng = random.Random(f"view/{self.run.options.seed}/{picture}/{view}")
                image_CHW = free_view(opened, view, model.grids, self.flip, rng)
            (self.encoded[picture, view],) = tokens_of(model.tokenizer, [image_CHW], self.run.bf16)
        return self.encoded[picture, view].long()

    def label(self, picture: int) -> int:
        """The number of the label of a picture."""
        return self.labels[picture]

    def usual_grid(self) -> Grid:
        """On which to draw so that pictures are shaped as most of the folder are, and seen whole."""
        (h, w), _ = Counter(tuple(self.grid(i, 0).shape) for i in self.run.train[:8]).most_common(1)[0]
        return self.model.grids.composition(w * self.model.downsample, h * self.model.downsample)

    def windows(self, pictures: Sequence[int], count: int) -> list[Window]:
        """`count` windows of plain views, spread over the pictures: the same every time."""
        places = [(picture, view) for view in range(self.plain) for picture in pictures]
        chosen = [places[i * len(places) // count] for i in range(count)]
        config = self.model.gpt.config
        return [(window(self.grid(*place), config, random.Random(0)), self.labels[place[0]]) for place in chosen]


# Windows


@dataclass(eq=False)
class TokenWindows(Dataset[dict[str, Tensor]]):
    """Endless training sequences: sample number k is a pure function of (seed, k).

    A sample is a window of at most `config.cells` cells of a random view of a picture, padded to `config.cells`:
    {"cells" [L, n] (with noise), "targets" [L, n] (-1 in the padding), "positions" [L, 2], "label" []}.
    """

    cache: TokenShards | Views
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
