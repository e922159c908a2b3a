"""Shapes and options, without torch: what a GPT looks like and how a picture is drawn. Each default is written here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from tokenizer_vq.base import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DEFAULT_MODEL = "paintings"
NO_LABEL = "none"  # asks for a picture of no label in particular, where leaving the label out lets one be chosen
ANY_LABEL = "any"  # chooses among all labels, where leaving the label out chooses among those that the model draws well


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
    cell: int = 2  # tokens a side that are drawn as one; 1 has no local head
    head_layers: int = 3  # feed-forward layers of the local head
    cells: int = 256  # of a picture in training: its native size
    dropout: float = 0.1
    rope_base: float = 100.0  # grids have tens of cells a side, not thousands of words

    def __post_init__(self) -> None:
        for name, least in (
            ("vocab_size", 1),
            ("labels", 0),
            ("layers", 2),
            ("width", 1),
            ("heads", 1),
            ("cell", 1),
            ("head_layers", 0),
            ("cells", 1),
        ):
            if type(value := getattr(self, name)) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; a whole number of {least} or more is wanted")
        if self.layers % 2 or self.width % (4 * self.heads):
            raise ValueError(
                f"got {self.layers} layers, {self.width} wide, {self.heads} heads; an even number of layers and a "
                "width that is a multiple of 4 * heads are wanted"
            )
        if self.width % self.cell**2:
            raise ValueError(f"a cell of {self.cell}x{self.cell} tokens does not divide a width of {self.width}")
        if not 0 <= self.dropout < 1 or not 1 < self.rope_base < 1e9:
            raise ValueError(f"dropout {self.dropout} and rope_base {self.rope_base} cannot be")


ORDERS = ("random", "raster")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn from the model."""

    steps: int = 16  # a picture's cells are drawn in so many steps, few at first, many at the end
    temperature: float = 1.0  # below 1 the likelier tokens win more often; 0 always takes the likeliest
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 0.95  # only the likeliest tokens that hold this much probability together
    guidance: float = 5.0  # how hard to pull towards the label, reached at the last step; 1 = not at all
    order: str = "random"  # of the cells: "random", or "raster" (rows from the top, one cell a step)

    def check(self) -> None:
        """Raises UserError, with the value received, on options that cannot be meant."""
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; 1 or more is wanted")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature is {self.temperature}; a number from 0 to 100 is wanted")
        if self.top_k < 0:
            raise UserError(f"top-k is {self.top_k}; 0 (all tokens) or more is wanted")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}; a share above 0 and up to 1 is wanted")
        if not 0 <= self.guidance <= 100:
            raise UserError(f"guidance is {self.guidance}; a number from 0 to 100 is wanted")
        if self.order not in ORDERS:
            raise UserError(f"order is {self.order!r}; one of {', '.join(ORDERS)} is wanted")


# What an edit may ask for

DEFAULT_KEEP, DEFAULT_STRENGTH, DEFAULT_MIX = "top", 0.5, 0.5
SIDES = ("top", "bottom", "left", "right")
ANCHORS = ("center", *SIDES, "top-left", "top-right", "bottom-left", "bottom-right")


def keep_of(keep: str | float) -> tuple[str, float]:
    """The side of a picture and the share of it that are kept: a half for a side, a number counts from the top.

    Raises UserError for anything else, and where nothing or everything would be kept.
    """
    if keep in SIDES:
        return str(keep), 0.5
    try:
        share = float(keep)
    except ValueError:
        raise UserError(f"keep is {keep!r}; {', '.join(SIDES)} or a share between 0 and 1 is wanted") from None
    if not 0 < share < 1:
        raise UserError(f"keep is {keep}; a share above 0 and below 1 is wanted, or nothing is kept or nothing drawn")
    return "top", share


def check_share(name: str, share: float) -> None:
    """Raises UserError outside 0 to 1."""
    if not 0 <= share <= 1:
        raise UserError(f"{name} is {share}; a number from 0 to 1 is wanted")


def check_anchor(anchor: str) -> None:
    """Raises UserError for an anchor that is none."""
    if anchor not in ANCHORS:
        raise UserError(f"anchor is {anchor!r}; one of {', '.join(ANCHORS)} is wanted")


# Options of commands


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """A field that becomes a flag of the command line. `low`, `high` and `choices` are what `check_options` allows."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def check_options(options: DataclassInstance) -> None:
    """Raises UserError, with the value received and what is wanted, for an option out of bounds; None is always in."""
    for each in fields(options):
        value = getattr(options, each.name)
        low, high, choices = (each.metadata[key] for key in ("low", "high", "choices"))
        if value is None:
            continue
        if choices is not None and value not in choices:
            wanted = f"one of {', '.join(map(str, choices))} is wanted"
        elif low is not None and not low <= value <= (math.inf if high is None else high):
            wanted = f"{low} or more is wanted" if high is None else f"{low} to {high} is wanted"
        else:
            continue
        raise UserError(f"--{each.name.replace('_', '-')} {value} cannot be; {wanted}")
