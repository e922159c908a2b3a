"""Shapes and options, without torch: what a GPT looks like, how pictures are drawn and measured. Each default is
written here."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from tokenizer_vq.base import UserError

DEFAULT_MODEL = "paintings"
NO_LABEL = "none"  # asks for a picture of no label in particular, where leaving the label out lets one be chosen
ANY_LABEL = "any"  # chooses among all labels, where leaving the label out chooses among those that the model draws well


# Options


def option(
    default: Any, help: str, low: float | None = None, high: float = math.inf, choices: tuple[Any, ...] | None = None
) -> Any:
    """A field that may become a flag of the command line. `low`, `high`, `choices` are what `check` allows."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Options:
    """What all options have in common."""

    def check(self) -> None:
        """Raises UserError, with the value received and what is wanted, for an option out of bounds; None is never."""
        for each in fields(self):
            if not each.metadata or (value := getattr(self, each.name)) is None:
                continue
            low, high, choices = (each.metadata[key] for key in ("low", "high", "choices"))
            wanted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            if choices:
                wanted = f"one of {', '.join(map(str, choices))}"
            if value not in choices if choices else low is not None and not low <= value <= high:
                raise UserError(f"--{each.name.replace('_', '-')} {value} cannot be; {wanted} is wanted")


Chosen = TypeVar("Chosen", bound=Options)


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the any-order GPT. Half of `layers` are content blocks, half are query blocks.

    Raises ValueError on shapes that no GPT can have.
    """

    vocab_size: int
    labels: int  # not counting the null label; 0 = unconditional
    layers: int = 12
    width: int = 512
    heads: int = 8
    cell: int = 2  # tokens a side that are drawn as one
    head_layers: int = 3  # feed-forward layers of the local head
    cells: int = 256  # of a picture in training: its native size
    dropout: float = 0.1
    rope_base: float = 100.0  # grids have tens of cells a side, not thousands of words

    def __post_init__(self) -> None:
        for name in ("vocab_size", "labels", "layers", "width", "heads", "cell", "head_layers", "cells"):
            value, least = getattr(self, name), int(name not in ("labels", "head_layers"))
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; a whole number of {least} or more is wanted")
        if self.layers % 2 or self.width % (4 * self.heads):
            wanted = "an even number of layers and a width that is a multiple of 4 * heads are wanted"
            raise ValueError(f"got {self.layers} layers, {self.width} wide, {self.heads} heads; {wanted}")
        if self.width % self.cell**2:
            raise ValueError(f"a cell of {self.cell}x{self.cell} tokens does not divide a width of {self.width}")
        if not 0 <= self.dropout < 1 or not 1 < self.rope_base < 1e9:
            raise ValueError(f"dropout {self.dropout} and rope_base {self.rope_base} cannot be")


ORDERS = ("random", "raster")


@dataclass(frozen=True)
class SamplingOptions(Options):
    """How tokens are drawn from the model."""

    steps: int = option(16, "a picture's cells are drawn in so many steps, few at first, many at the end", 1)
    temperature: float = option(1.0, "below 1 the likelier tokens win more often; 0 takes the likeliest", 0, 100)
    top_k: int = option(0, "only the k likeliest tokens; 0 = all", 0)
    top_p: float = option(0.95, "only the likeliest tokens that hold this much probability together", 0.001, 1)
    guidance: float = option(
        5.0, "how hard to pull towards the label, reached at the last step; 1 = not at all", 0, 100
    )
    order: str = option("random", "of the cells: random, or raster (rows from the top, one a step)", choices=ORDERS)


GROUNDS = ("transparent", "keep")


@dataclass(frozen=True)
class SpriteOptions(Options):
    """How pictures are finished of which a token is a pixel."""

    scale: int = option(1, "pixels a side of each pixel of a sprite", low=1, high=64)
    ground: str = option(GROUNDS[0], "of a sprite", choices=GROUNDS)
    colours: tuple[str, ...] = ()  # "#rrggbb" that each of the model's colours becomes; none: its own


AS_DRAWN = SpriteOptions()


# Measuring


@dataclass(frozen=True)
class AuditOptions(Options):
    """Flags of `igpt audit`; each field is one."""

    features: str | None = option(None, "folder with the feature net (default: the model's own tokenizer)")
    manifest: str | None = option(None, "CSV with columns id and split (train, val): the held-out pictures")
    limit: int | None = option(None, "training and held-out pictures compared, at most (default: all)", low=1)


@dataclass(frozen=True)
class EvaluateOptions(AuditOptions):
    """Flags of `igpt evaluate`; each field is one, with those of `igpt audit`."""

    samples: int = option(200, "how many pictures to draw", low=1, high=100_000)
    seed: int = option(0, "every random draw of the evaluation follows from it", low=0, high=2**31 - 1)
    perceptual: str | None = option(None, "folder with LPIPS weights; without it a weight-free distance is used")


@dataclass(frozen=True)
class SurpriseOptions(Options):
    """Flags of `igpt surprise`; each field is one."""

    orders: int = option(8, "mean over so many random drawing orders", low=1, high=1000)
    seed: int = option(0, "of those orders", low=0, high=2**31 - 1)


# What an edit may ask for

DEFAULT_KEEP, DEFAULT_STRENGTH, DEFAULT_MIX = "top", 0.5, 0.5
SIDES = ("top", "bottom", "left", "right")
ANCHORS = ("center", *SIDES, "top-left", "top-right", "bottom-left", "bottom-right")


def keep_of(keep: str | float) -> tuple[str, float]:
    """The side of a picture and the share of it to keep: a half for a side, a number counts from the top.
    Raises UserError for anything else, and where nothing or everything would be drawn."""
    if keep in SIDES:
        return str(keep), 0.5
    with suppress(ValueError):
        if 0 < (share := float(keep)) < 1:
            return "top", share
    raise UserError(f"keep is {keep!r}; {', '.join(SIDES)} or a share above 0 and below 1 is wanted")


def check_share(name: str, share: float) -> None:
    """Raises UserError outside 0 to 1."""
    if not 0 <= share <= 1:
        raise UserError(f"{name} is {share}; a number from 0 to 1 is wanted")
