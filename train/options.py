"""What a training and a look back at it can be told. Every default is written here, once; imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from igpt.config import DEFAULT_MODEL
from tokenizer_vq.base import MAX_CODES, UserError


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


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
    "medium": Preset(150_000, 30_000, 300_000, layers=10, width=384, heads=6),
    "large": Preset(300_000, 60_000, 1_000_000, layers=12, width=512, heads=8, tokenizer_batch=64, gpt_batch=64),
}


DOWNSAMPLES = (4, 8, 16)
CELLS_A_SIDE = 12  # a picture is said in at least so many tokens a side, if tokens can be that small
TOKENS_A_CODE = 256
MIN_CODES = 64
MIN_CROP = 32  # pixels: what the discriminator and LPIPS need; smaller pictures are enlarged
CROPS_A_PICTURE = 100
MIN_CROPS = 4000


@dataclass(frozen=True)
class LearningOptions:
    """What every training of a GPT can be told."""

    seed: int = _option(0, "every random draw of the training follows from it")
    random_orders: float = _option(1.0, "share of random drawing orders; the rest is raster order")
    token_noise: float = _option(0.05, "share of the GPT's input tokens replaced by random ones")
    dropout: float = _option(0.1, "dropout inside the GPT")
    precision: str = _option("auto", "auto is bf16 where the hardware has it", choices=("auto", "fp32", "bf16"))
    workers: int = _option(0, "processes that load pictures; 0 is best on two cores")
    save_minutes: float = _option(5.0, "minutes between two saved training states")
    patience: int = _option(6, "stop after so many of the 20 measurements on held-out pictures without a better one")
    quiet: bool = _option(False, "no progress line")

    def check_learning(self) -> None:
        """Raises UserError on values that cannot be meant."""
        if not 0 < self.patience < 1e6:
            raise UserError(f"--patience {self.patience} cannot be; more than 0 is wanted")
        if not 0 <= self.seed < 2**31 or self.workers < 0 or self.save_minutes < 0:
            raise UserError("--seed goes from 0 to 2**31 - 1; --workers and --save-minutes from 0")
        for name in ("random_orders", "token_noise", "dropout"):
            check_share(name, getattr(self, name))


def check_share(name: str, share: float) -> None:
    """Raises UserError outside 0 to 1."""
    if not 0 <= share <= 1:
        raise UserError(f"--{name.replace('_', '-')} {share} is not a share between 0 and 1")


@dataclass(frozen=True)
class TrainOptions(LearningOptions):
    """Flags of `igpt train`; each field is one."""

    preset: str = _option("small", "how much to learn: each is several times the one before", choices=tuple(PRESETS))
    manifest: str | None = _option(None, "CSV with columns id and split (train, val): the held-out pictures")
    perceptual: str = _option(DEFAULT_MODEL, "what judges reconstructions: a folder with LPIPS weights, or the encoder "
                                             "of a model; none: edges and SSIM alone")  # fmt: skip
    tokenizer: str | None = _option(None, "take the tokenizer from this model instead of training one")
    tokenizer_crops: int | None = _option(None, "training crops seen by the tokenizer (default: from the preset)")
    decoder_crops: int | None = _option(None, "crops for the decoder alone, in the end (default: from the preset)")
    downsample: int | None = _option(None, "pixels a side of a token: 4, 8 or 16 (default: 8, or 4 for small pictures)")
    codes: int | None = _option(None, "how many codes the tokenizer has (default: from the number of pictures)")
    gpt_samples: int | None = _option(None, "token grids seen by the GPT (default: from the preset)")
    tokenizer_lr: float = _option(4e-4, "peak learning rate of the tokenizer")
    gpt_lr: float = _option(3e-3, "peak learning rate of the GPT")
    adversarial: float = _option(0.7, "how hard the discriminator pulls at the decoder in the end; 0 trains without")
    flip: bool = _option(True, "mirror pictures at random; leave out for lettering and sheets that read one way")
    views: int = _option(2, "encodings of each picture: 1 at its short side, 2 also as a whole, 4 also mirrored")

    def resolved(self) -> Preset:
        """The preset with what was said on top of it. Raises UserError on values that cannot be meant."""
        if self.preset not in PRESETS:
            raise UserError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        for name, least in (("tokenizer_crops", 1), ("decoder_crops", 0), ("gpt_samples", 1), ("codes", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} {value} is too few; {least} or more is wanted")
        if self.codes is not None and self.codes > MAX_CODES:
            raise UserError(f"--codes {self.codes} is too many; {MAX_CODES} at most are wanted")
        if self.downsample not in (None, *DOWNSAMPLES):
            raise UserError(f"--downsample {self.downsample} cannot be; 4, 8 or 16 is wanted")
        for name in ("tokenizer_lr", "gpt_lr"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} cannot be; more than 0 is wanted")
        if self.adversarial < 0:
            raise UserError(f"--adversarial {self.adversarial} cannot be; 0 or more is wanted")
        self.check_learning()
        if self.views < 1:
            raise UserError(f"--views {self.views} is too few; 1 or more is wanted")
        return self._over(PRESETS[self.preset])

    def _over(self, preset: Preset) -> Preset:
        """The preset with the flags that were given."""
        names = ("tokenizer_crops", "decoder_crops", "gpt_samples", "downsample", "codes")
        return replace(preset, **{name: v for name in names if (v := getattr(self, name)) is not None})

    def suited(self, pictures: int, side: int, downsample: int | None = None) -> Preset:
        """The preset fitted to a collection: so many pictures to learn from, of that short side in pixels (the median).

        A small collection needs fewer crops, and has too few tokens for many codes; small pictures need small tokens,
        unless there is a tokenizer already with tokens of `downsample` pixels. What a flag said stays as it was said.
        """
        preset = self.resolved()
        fitting = preset.downsample if side >= CELLS_A_SIDE * preset.downsample else min(DOWNSAMPLES)
        downsample = downsample or self.downsample or fitting
        levels = max(1, int(math.log2(downsample)) - 1)  # of the tokenizer: its patch of 4 pixels, then halvings
        # Large tokens are few enough to be drawn singly.
        cell = 1 if downsample > PRESETS[self.preset].downsample else preset.cell
        cells = min(preset.cells, max(2, round(side / (cell * downsample))) ** 2)
        tokens = pictures * cells * cell**2
        codes = min(preset.codes, 2 ** int(math.log2(max(MIN_CODES, tokens / TOKENS_A_CODE))))
        return self._over(replace(
            preset, downsample=downsample, cell=cell, cells=cells, codes=codes,
            channels=(*preset.channels, *preset.channels[-1:])[:levels],
            crop=min(preset.crop, max(MIN_CROP, side // downsample * downsample)),
            tokenizer_crops=min(preset.tokenizer_crops, max(MIN_CROPS, CROPS_A_PICTURE * pictures)),
            decoder_crops=min(preset.decoder_crops, max(MIN_CROPS, CROPS_A_PICTURE * pictures) // 5),
        ))  # fmt: skip


METHODS = ("lora", "full")


@dataclass(frozen=True)
class TuneOptions(LearningOptions):
    """Flags of `igpt finetune`; each field is one. What is None is chosen from the pictures and the machine."""

    adapter: bool = _option(False, "write a small adapter file (4 MB at most) for the base instead of a model folder")
    minutes: float = _option(9.0, "how long it may take in all on this machine; less where few pictures need less")
    method: str = _option("lora", "lora learns small additions to all weights, full all weights", choices=METHODS)
    rank: int | None = _option(None, "rank of the additions of lora (default: from the number of pictures)")
    views: int | None = _option(None, "crops of each picture to learn from (default: from pictures and machine)")
    samples: int | None = _option(None, "training samples (default: from pictures, machine and --minutes)")
    batch: int | None = _option(None, "samples a step (default: 16, fewer for few pictures)")
    lr: float | None = _option(None, "peak learning rate (default: from the method)")
    flip: bool | None = _option(None, "mirror pictures at random (default: unless left and right differ in all)")
    decoder_crops: int | None = _option(None, "crops from which the decoder learns (default: from the pictures)")
    rehearse: float = _option(0.1, "share of samples that the base draws itself, so that it forgets its labels less")
    remember: str | None = _option(None, "the art the base learned from: also measure how much is forgotten of it")
    manifest: str | None = _option(None, "CSV with the split of the art given with --remember")

    def check(self) -> None:
        """Raises UserError on values that cannot be meant."""
        self.check_learning()
        for name in ("rank", "views", "samples", "batch"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 100_000_000:
                raise UserError(f"--{name} {value} cannot be; 1 or more is wanted")
        if not 0.05 <= self.minutes <= 1e5:
            raise UserError(f"--minutes {self.minutes} cannot be; 0.05 to 100000 are wanted")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise UserError(f"--lr {self.lr} cannot be; more than 0 and at most 1 is wanted")
        if self.decoder_crops is not None and self.decoder_crops < 0:
            raise UserError(f"--decoder-crops {self.decoder_crops} cannot be; 0 or more is wanted")
        if not 0 <= self.rehearse <= 0.9:
            raise UserError(f"--rehearse {self.rehearse} cannot be; a share from 0 to 0.9 is wanted")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method} cannot be; {' or '.join(METHODS)} is wanted")
        if self.adapter and self.method == "full":
            raise UserError("--adapter holds what lora learns; --method full changes all weights, so it makes a model")
        if self.adapter and self.decoder_crops:
            raise UserError("--adapter holds no decoder; --decoder-crops wants a model folder")
        if self.method == "full" and self.rank is not None:
            raise UserError("--rank is of --method lora")
        if self.manifest and not self.remember:
            raise UserError("--manifest tells the split of the art given with --remember, which is missing")


@dataclass(frozen=True)
class AuditOptions:
    """Flags of `igpt audit`; each field is one."""

    features: str | None = _option(None, "folder with feature nets (default: torchvision's, if downloaded before, else "
                                         "the model's own tokenizer)")  # fmt: skip
    manifest: str | None = _option(None, "CSV with columns id and split (train, val): the held-out pictures")
    limit: int | None = _option(None, "look at so many training and so many held-out pictures at most (default: all)")

    def check(self) -> None:
        """Raises UserError, with the value received, on options that cannot be meant."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit} is too few; 1 or more is wanted")


@dataclass(frozen=True)
class EvaluateOptions(AuditOptions):
    """Flags of `igpt evaluate`; each field is one, with those of `igpt audit`."""

    samples: int = _option(200, "how many pictures to draw; a Frechet distance wants thousands, KID works with 200")
    seed: int = _option(0, "every random draw of the evaluation follows from it")
    perceptual: str | None = _option(None, "folder with LPIPS weights; without it a weight-free distance is used")

    def check(self) -> None:
        super().check()
        if not 1 <= self.samples <= 100_000:
            raise UserError(f"--samples {self.samples} cannot be; 1 to 100000 pictures are wanted")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed} is out of reach; 0 to 2**31 - 1 is wanted")
