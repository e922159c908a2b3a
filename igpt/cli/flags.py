"""Flags that several commands share, flags from dataclasses, and errors in one sentence."""

from __future__ import annotations

import argparse
import math
import secrets
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import igpt
from igpt.config import DEFAULT_MODEL, ORDERS, SamplingOptions
from igpt.recipe import LARGEST_SEED
from tokenizer_vq.base import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from igpt.image_gpt import ImageGPT

    Options = TypeVar("Options", bound=DataclassInstance)

SAMPLING_HELP = {
    "steps": "draw the cells of a picture in so many steps; fewer is faster",
    "temperature": "below 1 the likelier tokens win more often, 0 always takes the likeliest",
    "top_k": "choose among the N likeliest tokens only, 0 among all",
    "top_p": "choose among the likeliest tokens that hold this share of the probability",
    "guidance": "how hard to pull towards the label, 1 is not at all",
    "order": "of the cells: random, or raster (rows from the top, one cell a step)",
}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, as every other error of this program."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} ({self.prog} --help lists what there is)")


def number(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A converter for argparse that explains itself."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
            if math.isfinite(value):
                return value
        except (ValueError, OverflowError):
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number within reach")

    return convert


def add_options(parser: argparse.ArgumentParser, options: type[DataclassInstance]) -> None:
    """A flag for every field of a dataclass, each with the default of the field."""
    hints = get_type_hints(options)
    for field in fields(options):
        flag = f"--{field.name.replace('_', '-')}"
        help = (field.metadata["help"]).replace("%", "%%")
        kind = next(kind for kind in (*get_args(hints[field.name]), hints[field.name]) if kind is not NoneType)
        if kind is bool:
            action = argparse.BooleanOptionalAction if field.default is not False else "store_true"
            parser.add_argument(flag, action=action, default=field.default, help=help)
            continue
        if field.default is not None:
            help += f" (default: {field.default})"
        convert = number(kind) if kind in (int, float) else kind
        choices = field.metadata.get("choices")
        metavar = None if choices else {int: "N", float: "X"}.get(kind, "NAME")
        parser.add_argument(flag, type=convert, default=field.default, choices=choices, metavar=metavar, help=help)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of SamplingOptions. Without it the model's own setting counts, so there is no default."""
    defaults = SamplingOptions()
    for name, text in SAMPLING_HELP.items():
        value = getattr(defaults, name)
        kind = type(value)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind if kind is str else number(kind),
            choices=ORDERS if name == "order" else None,
            metavar=None if kind is str else {int: "N", float: "X"}[kind],
            help=f"{text} (default: {value}, unless the model has its own)",
        )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_sampling` say. Raises UserError on options that cannot be meant."""
    given = {name: value for name in SAMPLING_HELP if (value := getattr(args, name)) is not None}
    SamplingOptions(**given).check()
    return given


def options_of(args: argparse.Namespace, options: type[Options]) -> Options:
    """The inverse of `add_options`: the dataclass as the command line has it."""
    return options(**{field.name: getattr(args, field.name) for field in fields(options)})


def check_art(art: str) -> None:
    """Raises UserError where there is nothing at the path: said before a model is loaded or a folder made. Of a pattern
    or an address `train.shards` says it."""
    if not (Path(art).expanduser().exists() or any(sign in art for sign in ("*", "{", "://"))):
        raise UserError(f"there is no art at {art!r}; a folder of pictures or a .tar is wanted")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run)
    return parser


def add_output(parser: Parser, default: str = "this folder") -> None:
    parser.add_argument("--out", metavar="PATH", help=f"a folder, or the name of a single .png (default: {default})")
    parser.add_argument("--force", action="store_true", help="replace files of the same name instead of numbering")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the paths of the pictures")


def add_model(parser: Parser, *, adapter: bool = True) -> None:
    """The flag that names a model."""
    model = f"name or folder of a model (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model)
    if adapter:
        add_adapter(parser)


def add_adapter(parser: Parser) -> None:
    """The flag for a file that changes that model."""
    adapter = "what `igpt finetune --adapter` learned, for the very model it was made for"
    parser.add_argument("--adapter", metavar="FILE", help=adapter)


def load_model(args: argparse.Namespace, name: str | None = None) -> ImageGPT:
    """The model that the flags name, or `name`, on the device that they name."""
    return igpt.load(name or args.model, getattr(args, "device", "cpu"), adapter=args.adapter)


def add_seeds(parser: Parser) -> None:
    """How many pictures, and from which seeds."""
    parser.add_argument("-n", type=number(int), default=1, metavar="N", help="how many pictures (default: 1)")
    parser.add_argument("--seed", type=number(int), metavar="N", help="picture i has the seed N + i (default: random)")


def seed_of(args: argparse.Namespace) -> int:
    """The seed of the first picture, drawn by lot where none is asked for. Raises UserError, also for a wrong -n."""
    if args.n < 1:
        raise UserError(f"-n {args.n} is too few pictures; 1 or more is wanted")
    seed = secrets.randbelow(2**31) if args.seed is None else int(args.seed)
    if not 0 <= seed <= LARGEST_SEED - args.n:
        raise UserError(f"the seed {seed} is out of reach; a whole number from 0 to 2**63 - 1 - n is wanted")
    return seed
