"""Between the stages: pictures in several views become tokens, so that the training of a GPT never sees a pixel.

To train, all views are encoded first. To fine-tune, each is encoded when it is first learned from, so that none is for
which there is no time; and where a token is a pixel a view is the sprite itself: resampled, it would have other pixels.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Sequence
from random import Random

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from igpt.bundle import Bundle
from igpt.checkpoint import Tokenizer
from igpt.device import pick_device
from igpt.sizes import Grid, Grids
from igpt.token_cache import TokenCache, window
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

from .folder import Run, weights_fingerprint
from .options import TrainOptions, TuneOptions
from .sprites import sprite_view
from .state import catch_interrupt

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
    2 and 3 the same mirrored, then the same again from a little closer."""
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
    return to_tensor(fit_cover(picture, w * grids.downsample, h * grids.downsample))


def free_view(picture: Image.Image, view: int, grids: Grids, flip: bool, rng: Random) -> Tensor:
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


@torch.inference_mode()
def encode(run: Run[TrainOptions], tokenizer: Tokenizer) -> tuple[TokenCache, str]:
    """The tokens of all pictures, made or completed in the folder of the run, and what names them: these pictures, this
    tokenizer, these views. Ctrl-C saves first."""
    art, options, path, device = run.art, run.options, run.work / "tokens.safetensors", pick_device()
    grids = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells)
    palette = tokenizer.config if isinstance(tokenizer, PaletteTokenizer) else None
    views = options.views if palette is None else 1 + options.flip
    identity = f"{art.fingerprint}/{weights_fingerprint(tokenizer)}/{palette}/{views}/{options.flip}/{grids}"
    cache, notes = TokenCache.load(path) if path.is_file() else (None, {})
    if cache is None or notes.get("identity") != identity:
        cache = TokenCache(views, [], [], [])
    tokenizer, saved_at = tokenizer.to(device).eval(), time.monotonic()
    bar = tqdm(desc="encoding", total=len(art), initial=len(cache), disable=options.quiet, mininterval=1)
    with catch_interrupt() as interrupt, bar, torch.autocast(device.type, torch.bfloat16, enabled=run.bf16):
        for i in range(len(cache), len(art)):
            picture = art.picture(i, "RGB" if palette is None else "RGBA")
            for view in range(views):
                if palette is None:
                    image_CHW = view_of(picture, view, grids, options.flip)
                else:
                    image_CHW = sprite_view(picture, palette, grids.cell, mirrored=view == 1)
                tokens_hw = tokenizer.encode(image_CHW.unsqueeze(0).to(device))[0].cpu()
                cache.shapes.append((tokens_hw.shape[0], tokens_hw.shape[1]))
                cache.grids.append(tokens_hw.flatten().to(torch.uint16))
            cache.labels.append(art.label_of[i])
            bar.update()
            if i + 1 == len(art) or interrupt.is_set() or time.monotonic() > saved_at + 60 * options.save_minutes:
                cache.save(path, {"identity": identity})
                saved_at = time.monotonic()
            if interrupt.is_set():
                raise KeyboardInterrupt
    return cache, identity


class Views(TokenCache):
    """The views of the pictures of a run in the tokens of a model, each encoded when it is first asked for."""

    def __init__(self, run: Run[TuneOptions], labels: list[int], model: Bundle, flip: bool):
        config = model.tokenizer.config
        self.palette = config if isinstance(config, PaletteConfig) else None
        super().__init__(FREE_VIEWS if self.palette is None else 1 + flip, labels, [], [])
        self.run, self.model, self.flip = run, model, flip
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

    @torch.no_grad()
    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""
        view = view if view % 2 else view % (4 if self.flip else 2)  # see `free_view`: other even ones are the same
        if (picture, view) not in self.encoded:
            opened, model = self._picture(picture), self.model
            if self.palette is not None:
                image_CHW = sprite_view(opened, self.palette, model.grids.cell, mirrored=view == 1)
            else:
                rng = Random(f"view/{self.run.options.seed}/{picture}/{view}")
                image_CHW = free_view(opened, view, model.grids, self.flip, rng)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=self.run.bf16):
                tokens_hw = model.tokenizer.encode(image_CHW[None].to(model.device))[0]
            self.encoded[picture, view] = tokens_hw.to("cpu", torch.uint16)
        return self.encoded[picture, view].long()

    def usual_grid(self) -> Grid:
        """On which to draw so that pictures are shaped as most of the folder are, and seen whole."""
        (h, w), _ = Counter(tuple(self.grid(i, 0).shape) for i in self.run.train[:8]).most_common(1)[0]
        return self.model.grids.composition(w * self.model.downsample, h * self.model.downsample)

    def windows(self, pictures: Sequence[int], count: int) -> list[Window]:
        """`count` windows of plain views, spread over the pictures: the same every time."""
        places = [(picture, view) for view in range(self.plain) for picture in pictures]
        chosen = [places[i * len(places) // count] for i in range(count)]
        config = self.model.gpt.config
        return [(window(self.grid(*place), config, Random(0)), self.labels[place[0]]) for place in chosen]
