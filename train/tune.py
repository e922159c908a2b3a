"""What a fine-tuning learns: views of a few pictures in the tokens of a model, and the task of learning them.

Notable choices:
- views are cut and encoded when they are first learned from, so that nothing is encoded that there is no time to learn;
- AdamW: orthogonal steps (Muon) cost as much as five grids, and so few steps gain nothing from them;
- where a token is a pixel a view is the sprite itself on the ground colour: resampled, it would have other pixels.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from random import Random

import torch
from PIL import Image, ImageOps
from torch import Tensor

from igpt.bundle import Bundle
from igpt.likelihood import bits_per_token
from igpt.model import GPT
from igpt.sizes import LARGEST_SPRITE, SMALLEST_SIDE, Grid
from igpt.token_cache import TokenCache, window
from tokenizer_vq.images import to_tensor

from .folder import Run
from .gpt import TABLES, WEIGHT_DECAY, GPTTask
from .options import TuneOptions
from .tokens import free_view

VIEWS = 8  # of a picture, see `free_view`
CACHED_SIDE, CACHED_PICTURES = 512, 256  # pixels of the short side of pictures that are at hand for more views

Window = tuple[Tensor, int]  # tokens [h, w] and a label

# Views


def true_pixels(picture: Image.Image) -> Image.Image:
    """The sprite that was enlarged by a whole number to make this picture, which is larger than any sprite; or itself.
    Pixel art is mostly shared like that."""
    width, height = picture.size
    largest = min(picture.size) // SMALLEST_SIDE if max(picture.size) > LARGEST_SPRITE else 1
    for times in range(largest, 1, -1):
        if width % times == height % times == 0:
            small = picture.resize((width // times, height // times), Image.Resampling.NEAREST)
            if small.resize(picture.size, Image.Resampling.NEAREST).tobytes() == picture.tobytes():
                return small
    return picture


def sprite_view(picture: Image.Image, cell: int, mirrored: bool) -> Tensor:
    """The picture pixel by pixel in the middle of whole cells of white, [3, H, W]."""
    width, height = (-(-side // cell) * cell for side in picture.size)
    page = Image.new("RGB", (width, height), "white")
    left, top = (width - picture.width) // 2, (height - picture.height) // 2
    page.paste(ImageOps.mirror(picture) if mirrored else picture, (left, top))
    return to_tensor(page)


class Views(TokenCache):
    """The views of the pictures of a run in the tokens of a model, each encoded when it is first asked for."""

    def __init__(self, run: Run[TuneOptions], labels: list[int], model: Bundle, flip: bool):
        self.sprites = model.downsample == 1
        super().__init__(1 + flip if self.sprites else VIEWS, labels, [], [])
        self.run, self.model, self.flip = run, model, flip
        self.plain = 1 if self.sprites else 2  # how many views, the first ones, show a picture as it is
        self.encoded: dict[tuple[int, int], Tensor] = {}
        self._picture = functools.lru_cache(maxsize=CACHED_PICTURES)(self._opened)

    def _opened(self, picture: int) -> Image.Image:
        opened = self.run.art.picture(picture)
        if self.sprites:
            return true_pixels(opened)
        scale = CACHED_SIDE / min(opened.size)
        width, height = (round(side * scale) for side in opened.size)
        return opened.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else opened

    @torch.no_grad()
    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""
        view = view if view % 2 else view % (4 if self.flip else 2)  # see `free_view`: other even ones are the same
        if (picture, view) not in self.encoded:
            opened, model = self._picture(picture), self.model
            if self.sprites:
                image_CHW = sprite_view(opened, model.grids.cell, mirrored=view == 1)
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


# Learning


def bits_of(gpt: GPT, windows: Sequence[Window]) -> float:
    """Mean bits a token of grids of any shapes under their labels, in random orders that are the same every time."""
    bits = []
    for shape in dict.fromkeys(grid_hw.shape for grid_hw, _ in windows):
        grids, labels = zip(*((grid_hw, label) for grid_hw, label in windows if grid_hw.shape == shape), strict=True)
        bits.append(bits_per_token(gpt, torch.stack(grids), torch.tensor(labels)).flatten())
    return float(torch.cat(bits).mean())


class TuneTask(GPTTask):
    """A `loop.Task`: the GPT on the views of a few pictures. Its score is bits a token of validation windows."""

    name = "finetune"

    def __init__(self, views: Views, model: GPT):
        run = views.run
        super().__init__(views, (run.train, []), views.model.tokenizer, model, run.options, run.options.peak_lr)
        self.windows: list[Window] = []  # of validation pictures, as many as there will be time for

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW, with weight decay for matrices that are no tables."""
        learning = {key: p for key, p in self.modules[name].named_parameters() if p.requires_grad}
        decayed = [p for key, p in learning.items() if p.dim() == 2 and key not in TABLES]
        others = [p for key, p in learning.items() if p.dim() != 2 or key in TABLES]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def measure(self, model: GPT, progress: float = 1.0) -> dict[str, float]:
        """Bits a token of the validation windows."""
        bits = bits_of(model, self.windows)
        return {"bits": bits, "score": bits}

    def sheet(self, model: GPT) -> None:
        """None before the end: drawing takes the time in which more could be learned."""
