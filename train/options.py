"""What a training can be told. Every default of training is written here, once; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tokenizer_vq.base import UserError


def _option(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class Preset:
    """How much to learn and with what: one line of the table below."""

    tokenizer_crops: int  # training crops seen by the tokenizer
    gpt_samples: int  # token grids seen by the GPT
    layers: int
    width: int
    heads: int
    channels: tuple[int, ...] = (128, 192, 256)
    codes: int = 1024
    crop: int = 128  # pixels a side of a tokenizer crop
    cells: int = 256  # token cells of a picture: 256 = 16x16 = 256x256 pixels
    tokenizer_batch: int = 16
    gpt_batch: int = 16


PRESETS = {
    "toy": Preset(256, 512, layers=2, width=64, heads=2, channels=(32, 32, 64), codes=64, crop=64, cells=64),
    "small": Preset(50_000, 60_000, layers=8, width=256, heads=4),
    "medium": Preset(150_000, 300_000, layers=10, width=384, heads=6),
    "large": Preset(300_000, 1_000_000, layers=12, width=512, heads=8, tokenizer_batch=64, gpt_batch=64),
}


@dataclass(frozen=True)
class TrainOptions:
    """Flags of `igpt train`; each field is one."""

    preset: str = _option("small", "how much to learn: each is several times the one before", choices=tuple(PRESETS))
    seed: int = _option(0, "every random draw of the training follows from it")
    manifest: str | None = _option(None, "CSV with columns id and split (train, val): the held-out pictures")
    perceptual: str | None = _option(None, "folder with LPIPS weights; without it a weight-free distance is used")
    tokenizer: str | None = _option(None, "take the tokenizer from this model instead of training one")
    tokenizer_crops: int | None = _option(None, "training crops seen by the tokenizer (default: from the preset)")
    gpt_samples: int | None = _option(None, "token grids seen by the GPT (default: from the preset)")
    tokenizer_lr: float = _option(4e-4, "peak learning rate of the tokenizer")
    gpt_lr: float = _option(1e-3, "peak learning rate of the GPT")
    adversarial: float = _option(0.0, "weight of the patch discriminator; 0 trains without (see EXPERIMENTS.md)")
    flip: bool = _option(True, "mirror pictures at random; leave out for lettering and sheets that read one way")
    random_orders: float = _option(1.0, "share of random drawing orders; the rest is raster order")
    token_noise: float = _option(0.05, "share of the GPT's input tokens replaced by random ones")
    dropout: float = _option(0.1, "dropout inside the GPT")
    views: int = _option(2, "encodings of each picture: 1 at its short side, 2 also as a whole, 4 also mirrored")
    precision: str = _option("auto", "auto is bf16 where the hardware has it", choices=("auto", "fp32", "bf16"))
    workers: int = _option(0, "processes that load pictures; 0 is best on two cores")
    save_minutes: float = _option(5.0, "minutes between two saved training states")
    patience: int = _option(6, "stop after so many of the 20 measurements on held-out pictures without a better one")
    quiet: bool = _option(False, "no progress line")

    def resolved(self) -> Preset:
        """The preset with what was said on top of it. Raises UserError on values that cannot be meant."""
        if self.preset not in PRESETS:
            raise UserError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        for name in ("tokenizer_crops", "gpt_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} is too few; 1 or more is wanted")
        for name in ("tokenizer_lr", "gpt_lr", "patience"):
            if not 0 < getattr(self, name) < 1e6:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} cannot be; more than 0 is wanted")
        if not 0 <= self.seed < 2**31 or self.workers < 0 or self.adversarial < 0 or self.save_minutes < 0:
            raise UserError("--seed goes from 0 to 2**31 - 1; --workers, --adversarial, --save-minutes from 0")
        for name in ("random_orders", "token_noise", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} is not a share between 0 and 1")
        if self.views < 1:
            raise UserError(f"--views {self.views} is too few; 1 or more is wanted")
        given = {k: v for k in ("tokenizer_crops", "gpt_samples") if (v := getattr(self, k)) is not None}
        return replace(PRESETS[self.preset], **given)
