"""Options of every training. Each default is written here, once; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from igpt.config import DEFAULT_MODEL, Options, option
from tokenizer_vq.base import MAX_CODES, UserError


@dataclass(frozen=True)
class Preset:
    """How much to learn and with what: one line of the table below."""

    tokenizer_crops: int  # training crops seen by the tokenizer
    decoder_crops: int  # and by its decoder alone, afterwards
    gpt_samples: int  # token grids seen by the GPT
    layers: int
    width: int
    heads: int
    channels: tuple[int, ...] = (160, 256)  # of the tokenizer, per level, finest first
    downsample: int = 8  # pixels a side of a token
    codes: int = 4096
    crop: int = 128  # pixels a side of a tokenizer crop
    cell: int = 2  # tokens a side that the GPT draws as one
    cells: int = 256  # of a picture: 256 = 16x16 = 256x256 pixels
    tokenizer_batch: int = 16
    gpt_batch: int = 16


PRESETS = {
    "toy": Preset(256, 64, 512, layers=2, width=64, heads=2, channels=(32, 64), codes=64, crop=64, cells=16),
    "small": Preset(50_000, 10_000, 60_000, layers=8, width=256, heads=4),
    "sprites": Preset(50_000, 10_000, 200_000, layers=4, width=128, heads=2, gpt_batch=8),
    "medium": Preset(150_000, 30_000, 300_000, layers=10, width=384, heads=6),
    "large": Preset(300_000, 60_000, 1_000_000, 12, 512, heads=8, crop=192, tokenizer_batch=64, gpt_batch=256),
}

DEFAULT_PRESET, GPU_PRESET = "small", "large"
DOWNSAMPLES = (4, 8, 16)
TOKENS_A_SIDE = 12  # a picture has at least so many, if tokens can be that small
TOKENS_A_CODE = 256  # of the collection: fewer tokens cannot fill a larger codebook
MIN_CODES = 64
MIN_CROP = 32  # pixels: what the discriminator and LPIPS need; smaller pictures are enlarged
SHARES = {"tokenizer": 0.35, "decoder": 0.15, "gpt": 0.5}  # of the minutes of a training
SPRITE_MINUTES = 12.0  # of learning, where nothing else is asked for
SMALL_SPRITE = 40  # pixels a side: larger ones are drawn in cells of 4x4 pixels
CROPS_A_PICTURE, MIN_CROPS = 100, 4000  # of the tokenizer, for collections too small for those of the preset


@dataclass(frozen=True)
class LearningOptions(Options):
    """Options of every training of a GPT."""

    seed: int = option(0, "every random draw of the training follows from it", low=0, high=2**31 - 1)
    token_noise: float = option(0.05, "share of the GPT's input tokens replaced by random ones", low=0, high=1)
    dropout: float = option(0.1, "dropout inside the GPT", low=0, high=0.99)
    precision: str = option("auto", "auto is bf16 where the hardware has it", choices=("auto", "fp32", "bf16"))
    save_minutes: float = option(5.0, "minutes between two saved training states", low=0)
    patience: int = option(6, "stop after so many measurements on held-out pictures without a better one", low=1)
    quiet: bool = option(False, "no progress line")


@dataclass(frozen=True)
class TrainOptions(LearningOptions):
    """Flags of `igpt train`; each field is one."""

    preset: str | None = option(
        None,
        f"how much to learn: each is several times the one before (default: {DEFAULT_PRESET}; with CUDA {GPU_PRESET}; "
        "sprites are learned with their own)",
        choices=tuple(PRESETS),
    )
    manifest: str | None = option(None, "CSV with columns id and split (train, val): the held-out pictures")
    perceptual: str = option(
        DEFAULT_MODEL, "a model whose encoder compares pictures, a folder with LPIPS weights, or none"
    )
    tokenizer: str | None = option(None, "take the tokenizer from this model instead of training one")
    tokens: str = option(
        "auto",
        "vq: learned codes; palette: a colour a pixel; auto: as the pictures are",
        choices=("auto", "vq", "palette"),
    )
    palette: str | None = option(None, "a colour a pixel, of so many colours or of a .gpl or .hex file")
    grid: int | None = option(None, "pixels a side of the sprites into which larger pictures are cut", low=16, high=64)
    minutes: float | None = option(
        None, f"how long to learn in all (default for sprites: {SPRITE_MINUTES:g})", low=0.05, high=100_000
    )
    tokenizer_crops: int | None = option(None, "training crops seen by the tokenizer (default: from the preset)", low=1)
    decoder_crops: int | None = option(None, "then by its decoder alone (default: from the preset)", low=0)
    downsample: int | None = option(
        None, "pixels a side of a token (default: 8; small pictures: 4)", choices=DOWNSAMPLES
    )
    codes: int | None = option(None, "codes of the tokenizer (default: from the pictures)", low=2, high=MAX_CODES)
    gpt_samples: int | None = option(None, "token grids seen by the GPT (default: from the preset)", low=1)
    tokenizer_lr: float = option(4e-4, "peak learning rate of the tokenizer", low=1e-9, high=1)
    gpt_lr: float = option(3e-3, "peak learning rate of the GPT", low=1e-9, high=1)
    adversarial: float = option(0.7, "weight of the discriminator in the decoder's stage; 0 trains without", low=0)
    workers: int | None = option(None, "processes that load samples (default: 0; with CUDA up to 8)", low=0)
    flip: bool = option(True, "mirror pictures at random; leave out for lettering and sheets that read one way")
    views: int = option(
        2, "of each picture: 1 at its short side, 2 also whole, 4 mirrored, 16 closer; on a GPU always new ones", 1, 16
    )

    def suited(self, pictures: int, side: int, downsample: int | None = None) -> Preset:
        """The preset fitted to a collection: so many pictures to learn from, of that short side in pixels (the median).

        A small collection needs fewer crops, and has too few tokens for many codes; small pictures need small tokens,
        unless there is a tokenizer already with tokens of `downsample` pixels. What a flag says stays as it says.
        """
        self.check()
        preset = PRESETS[self.preset or DEFAULT_PRESET]
        fitting = preset.downsample if side >= TOKENS_A_SIDE * preset.downsample else min(DOWNSAMPLES)
        downsample = downsample or self.downsample or fitting
        levels = max(1, int(math.log2(downsample)) - 1)  # of the tokenizer: its patch of 4 pixels, then halvings
        cell = 1 if downsample > preset.downsample else preset.cell  # large tokens are few enough to be drawn singly
        cells = min(preset.cells, max(2, round(side / (cell * downsample))) ** 2)
        codes = min(preset.codes, 2 ** int(math.log2(max(MIN_CODES, pictures * cells * cell**2 / TOKENS_A_CODE))))
        crops = max(MIN_CROPS, CROPS_A_PICTURE * pictures)
        fitted = {
            "downsample": downsample,
            "cell": cell,
            "cells": cells,
            "codes": codes,
            "channels": (*preset.channels, *preset.channels[-1:])[:levels],
            "crop": min(preset.crop, max(MIN_CROP, side // downsample * downsample)),
            "tokenizer_crops": min(preset.tokenizer_crops, crops),
            "decoder_crops": min(preset.decoder_crops, crops // 5),
        }
        names = ("tokenizer_crops", "decoder_crops", "gpt_samples", "codes")
        return replace(preset, **fitted | {name: value for name in names if (value := getattr(self, name)) is not None})

    def suited_to_sprites(self, side: int) -> Preset:
        """The preset for sprites of so many pixels a side at most: cells of 4x4 pixels for large ones."""
        preset = PRESETS[self.preset or "sprites"]
        cell = 2 if side <= SMALL_SPRITE else 4
        samples = self.gpt_samples or preset.gpt_samples
        return replace(preset, downsample=1, cell=cell, cells=math.ceil(side / cell) ** 2, gpt_samples=samples)

    def limits(self, stages: Sequence[str], sprites: bool) -> dict[str, float]:
        """Of each stage the seconds that it may take; none where numbers of samples decide."""
        minutes = self.minutes or (SPRITE_MINUTES if sprites and self.gpt_samples is None else None)
        whole = sum(SHARES[stage] for stage in stages)
        return {stage: 60 * minutes * SHARES[stage] / whole for stage in stages} if minutes else {}


PEAK_RATES = {"lora": 2e-3, "full": 3e-4}  # peak learning rates of the methods


@dataclass(frozen=True)
class TuneOptions(LearningOptions):
    """Flags of `igpt finetune`; each field is one. What is None is chosen from the pictures and the machine."""

    adapter: bool = option(False, "write a small adapter file (4 MB at most) for the base instead of a model folder")
    minutes: float = option(9.0, "how long it may take in all", low=0.05, high=100_000)
    method: str = option(
        "lora", "lora learns small additions to all weights, full all weights", choices=tuple(PEAK_RATES)
    )
    rank: int = option(16, "rank of the additions of lora", low=1)
    samples: int | None = option(None, "crops to learn from (default: as many as --minutes leave time for)", low=1)
    batch: int = option(4, "crops a step", low=1)
    lr: float | None = option(None, "peak learning rate (default: 2e-3 for lora, 3e-4 for full)", low=1e-9, high=1)
    flip: bool | None = option(None, "mirror pictures at random (default: unless left and right differ in all)")

    @property
    def peak_lr(self) -> float:
        """Learning rate of the method, unless there is one."""
        return self.lr or PEAK_RATES[self.method]

    def check(self) -> None:
        """Raises UserError on values that cannot be meant."""
        super().check()
        if self.adapter and self.method != "lora":
            raise UserError(f"--adapter holds what lora learns; --method {self.method} makes a model folder")
