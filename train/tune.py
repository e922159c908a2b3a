"""The parts of a fine-tuning: views of a few pictures, the stage that learns them, what is drawn to look at.

Notable choices:
- views are cut and encoded when they are first learned from, so that nothing is encoded that there is no time to learn;
- AdamW: orthogonal steps (Muon) cost as much as five grids, and so few steps gain nothing from them;
- where a token is a pixel a view is the sprite itself on the ground colour: resampled, it would have other pixels.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from accelerate.utils import send_to_device
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import default_collate

from igpt.bundle import Bundle
from igpt.evaluation.perceptual import NO_WEIGHTS
from igpt.files import atomic_write
from igpt.likelihood import bits_per_token
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sheet import equal_sheet, sheet
from igpt.sizes import LARGEST_SPRITE, SMALLEST_SIDE, Grid
from igpt.token_cache import TokenCache, window
from tokenizer_vq.images import to_tensor
from tokenizer_vq.vq import VQTokenizer

from .collection import Collection, near_duplicates, shrunk
from .decoder import DecoderTask
from .folder import Run, schedule_for, use_bf16
from .gpt import TABLES, WEIGHT_DECAY, GPTTask
from .loop import run
from .options import PRESETS, TrainOptions, TuneOptions
from .tokens import free_view

VIEWS = 8  # of a picture, see `free_view`
KEPT_SIDE = 512  # pixels of the short side of a picture that is kept at hand for more views
TILE = 160  # pixels of a picture on the sheet, about
DRAWN_AT_ONCE = 8
CROP, DECODER_LR = 128, 2e-4  # pixels a side
WORTH_IT = 0.1  # SSIM that unseen pictures must gain by the decoder that learned: less is only softness

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
    """The views of a collection's pictures in the tokens of a model, each encoded when it is first asked for."""

    def __init__(self, collection: Collection, labels: list[int], model: Bundle, flip: bool, options: TuneOptions):
        super().__init__(VIEWS if model.downsample > 1 else 1 + flip, labels, [], [])
        self.art, self.model, self.flip = collection.art, model, flip
        self.seed, self.bf16 = options.seed, use_bf16(options)
        self.plain = 2 if model.downsample > 1 else 1  # how many views, the first ones, show a picture as it is
        self.known: dict[tuple[int, int], Tensor] = {}
        self._picture = functools.lru_cache(maxsize=256)(self._opened)

    def _opened(self, picture: int) -> Image.Image:
        opened = self.art.picture(picture)
        if self.model.downsample == 1:
            return true_pixels(opened)
        scale = KEPT_SIDE / min(opened.size)
        width, height = (round(side * scale) for side in opened.size)
        return opened.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0) if scale < 1 else opened

    @torch.no_grad()
    def grid(self, picture: int, view: int) -> Tensor:
        """Tokens [h, w] of one view of a picture, int64."""
        view = view if view % 2 else view % (4 if self.flip else 2)  # see `free_view`: other even ones are the same
        if (picture, view) not in self.known:
            opened, model = self._picture(picture), self.model
            if model.downsample > 1:
                rng = Random(f"view/{self.seed}/{picture}/{view}")
                image_CHW = free_view(opened, view, model.grids, self.flip, rng)
            else:
                image_CHW = sprite_view(opened, model.grids.cell, mirrored=view == 1)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=self.bf16):
                tokens_hw = model.tokenizer.encode(image_CHW[None].to(model.device))[0]
            self.known[picture, view] = tokens_hw.to("cpu", torch.uint16)
        return self.known[picture, view].long()


# While it learns


def plain_windows(views: Views, pictures: Sequence[int], count: int) -> list[tuple[Tensor, int]]:
    """`count` windows of plain views, spread over the pictures, each with its label: the same every time."""
    places = [(picture, view) for view in range(views.plain) for picture in pictures]
    chosen = [places[i * len(places) // count] for i in range(count)]
    config = views.model.gpt.config
    return [(window(views.grid(*place), config, Random(0)), views.labels[place[0]]) for place in chosen]


def bits_of(gpt: GPT, windows: Sequence[tuple[Tensor, int]]) -> float:
    """Mean bits a token of grids of any shapes under their labels, in random orders that are the same every time."""
    bits = []
    for shape in dict.fromkeys(grid_hw.shape for grid_hw, _ in windows):
        grids, labels = zip(*((grid_hw, label) for grid_hw, label in windows if grid_hw.shape == shape), strict=True)
        bits.append(bits_per_token(gpt, torch.stack(grids), torch.tensor(labels)).flatten())
    return float(torch.cat(bits).mean())


class TuneTask(GPTTask):
    """A `loop.Task`: the GPT on the views of a few pictures. Its score is bits a token of validation windows."""

    name = "finetune"

    def __init__(self, views: Views, train: list[int], model: GPT, options: TuneOptions):
        super().__init__(views, (train, []), views.model.tokenizer, model, options, options.peak_lr)
        self.options: TuneOptions = options
        self.windows: list[tuple[Tensor, int]] = []  # of validation pictures, as many as there will be time for

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        learning = {key: p for key, p in self.modules[name].named_parameters() if p.requires_grad}
        decayed = {key for key, p in learning.items() if p.dim() == 2 and key not in TABLES}
        groups = [
            {"params": [p for key, p in learning.items() if (key in decayed) == (decay > 0)], "weight_decay": decay}
            for decay in (WEIGHT_DECAY, 0.0)
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def measure(self, model: nn.Module, progress: float = 1.0) -> dict[str, float]:
        assert isinstance(model, GPT)
        bits = bits_of(model, self.windows)
        return {"bits": bits, "score": bits}

    def sheet(self, model: nn.Module) -> None:
        """None before the end: drawing takes the time in which more could be learned."""

    def try_step(self, first: int) -> None:
        """What a step costs, for a clock: a batch there and back, of which nothing stays."""
        model, samples = self.modules["model"].train(), [self.dataset[first + k] for k in range(self.options.batch)]
        batch = send_to_device(default_collate(samples), next(model.parameters()).device)
        loss, _ = self.loss(self.modules, batch, 0.0, torch.Generator())
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)


# What is looked at


def draw_pictures(model: Bundle, labels: Sequence[int], grid: Grid, seed: int) -> list[Image.Image]:
    """One picture for each label, as the model draws where nothing else is said; picture i is drawn from seed + i."""
    pictures: list[Image.Image] = []
    for first in range(0, len(labels), DRAWN_AT_ONCE):
        labels_B = torch.tensor(labels[first : first + DRAWN_AT_ONCE])
        *_, last = sample(model.gpt, labels_B, grid, model.sampling, generators(seed + first, len(labels_B)))
        pictures += model.decode(last.tokens_Bhw)
    return pictures


def write_sheet(path: Path, rows: dict[str, list[Image.Image]], sprites: bool) -> None:
    """Rows of pictures, each with its name below the first one. Sprites are enlarged by whole numbers."""
    named = [[(p, name if i == 0 else " ") for i, p in enumerate(row)] for name, row in rows.items()]
    if sprites:
        page = sheet([[(_enlarged(p), name) for p, name in row] for row in named])
    else:
        last = named[-1][0][0]
        page = equal_sheet(named, TILE, round(TILE * last.height / last.width))
    with atomic_write(path) as beside:
        page.save(beside, "JPEG", quality=90)


def _enlarged(sprite: Image.Image) -> Image.Image:
    times = max(1, TILE // max(sprite.size))
    return sprite.resize((sprite.width * times, sprite.height * times), Image.Resampling.NEAREST)


def copies(collection: Collection, drawn: Sequence[Image.Image]) -> int:
    """How many drawn pictures are near-duplicates of training pictures, as those of a folder are found."""
    told_NCHW = collection.small_NCHW
    groups = near_duplicates(torch.cat([told_NCHW, torch.stack([shrunk(picture) for picture in drawn])]))
    return sum(group < len(told_NCHW) for group in groups[len(told_NCHW) :])


# The decoder


def tune_decoder(
    tokenizer: VQTokenizer, collection: Collection, options: TuneOptions, flip: bool, work: Path
) -> tuple[VQTokenizer, str]:
    """A copy whose decoder learned the training pictures, and a sentence about it. Codes stay, so that tokens and
    recipes stay good. Without a discriminator, which so few pictures would make blind, a decoder also grows softer:
    the old one comes back where unseen pictures do not gain much."""
    how = TrainOptions(
        seed=options.seed,
        adversarial=0.0,
        tokenizer_lr=DECODER_LR,
        flip=flip,
        precision=options.precision,
        quiet=options.quiet,
        perceptual=NO_WEIGHTS,
    )
    preset = replace(PRESETS["small"], crop=CROP)
    about = Run(collection.art, collection.train, collection.validation, preset, how, work)
    task = DecoderTask(about, copy.deepcopy(tokenizer))
    before = task.measure(task.modules["model"].eval())
    schedule = schedule_for(options.decoder_crops, options.batch, options)
    learned = run(task, schedule, work, {"identity": collection.art.fingerprint})
    after = task.measure(learned)
    kept = after["ssim"] >= before["ssim"] + WORTH_IT
    told = (
        f"through the codes and back, pictures kept for validation had an SSIM of {before['ssim']:.2f} and have "
        f"{after['ssim']:.2f} with the decoder that learned, which is {'' if kept else 'too little: it is not '}kept"
    )
    return (task.tokenizer(learned) if kept else tokenizer), told
