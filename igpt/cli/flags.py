"""Flags that several commands share, flags from dataclasses, and errors in one sentence."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from glob import glob
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import igpt
from igpt.config import DEFAULT_MODEL, Chosen, Options, SamplingOptions
from igpt.locked import IDENTITY
from igpt.recipe import check_picture
from tokenizer_vq.base import UserError

if TYPE_CHECKING:
    from igpt.image_gpt import ImageGPT


class Parser(argparse.ArgumentParser):
    """Answers mistakes in one sentence, as every other error of this program, and shows the default of each flag."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing and exiting."""
        raise UserError(f"{message} ({self.prog} --help lists what there is)")

    def add_argument(self, *names: Any, **how: Any) -> argparse.Action:
        """As argparse does, with the default at the end of the help unless the help names one."""
        if (given := how.get("default")) is not False and given not in (None, argparse.SUPPRESS):
            how["help"] += "" if "(default:" in how["help"] else " (default: %(default)s)"
        return super().add_argument(*names, **how)


def number(kind: type[int] | type[float], low: float = -math.inf) -> Callable[[str], float]:
    """A converter for argparse, to numbers of `low` or more, that explains itself."""

    def convert(text: str) -> float:
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and value >= low:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number within reach")

    return convert


def checked(check: Callable[[Any], object], kind: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """A converter for argparse to values for which the library's own check raises no UserError."""

    def convert(text: str) -> Any:
        value = kind(text)
        try:
            check(value)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return convert


def add_options(parser: argparse.ArgumentParser, options: type[Options], ending: str = "") -> None:
    """A flag for every field of a dataclass, each with the default of the field. With an `ending`, which the help then
    has after the default, a flag that is left out is None."""
    hints = get_type_hints(options)
    for field in fields(options):
        name, help = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        kind = next(kind for kind in (*get_args(hints[field.name]), hints[field.name]) if kind is not NoneType)
        if ending:
            help = f"{help} (default: {field.default}, {ending})"
        how: dict[str, Any] = {"default": None if ending else field.default, "help": help}
        if kind is bool:
            action = argparse.BooleanOptionalAction if field.default is not False else "store_true"
            parser.add_argument(name, action=action, **how)
            continue
        if choices := field.metadata["choices"]:
            how["choices"] = choices
        else:
            how["metavar"] = {int: "N", float: "X"}.get(kind, "NAME")
        parser.add_argument(name, type=number(kind) if kind in (int, float) else kind, **how)


def options_of(args: argparse.Namespace, options: type[Chosen]) -> Chosen:
    """The inverse of `add_options`: the dataclass as the command line has it. Raises UserError on what cannot be."""
    chosen = options(**{field.name: getattr(args, field.name) for field in fields(options)})
    chosen.check()
    return chosen


def pictures_of(args: argparse.Namespace) -> list[Path]:
    """The files that the command line names, which may be patterns, as not every shell resolves them. Raises UserError
    for one that is no picture."""
    paths: list[Path] = []
    for name in args.pictures:
        found = [] if os.path.lexists(name) else sorted(glob(os.path.expanduser(name)))
        paths += map(Path, found or [name])
    for path in paths:
        check_picture(path)
    return paths


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of SamplingOptions. Without it the model's own setting counts."""
    add_options(parser, SamplingOptions, "unless the model has its own")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_sampling` say. Raises UserError on options that cannot be."""
    changes = {each.name: value for each in fields(SamplingOptions) if (value := getattr(args, each.name)) is not None}
    SamplingOptions(**changes).check()
    return changes


def check_art(art: str) -> None:
    """Raises UserError where there is nothing at the path: said before a model is loaded or a folder made. Of a pattern
    or an address `train.shards` says it."""
    if not (Path(art).expanduser().exists() or any(sign in art for sign in ("*", "{", "://"))):
        raise UserError(f"there is no art at {art!r}; a folder of pictures or a .tar is wanted")


def add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str, *shared: str) -> Parser:
    """The parser of a new command, which `run` does, with these of the SHARED flags."""
    parser: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run)
    add_shared(parser, *shared)
    return parser


SHARED: dict[str, dict[str, Any]] = {
    "pictures": {"metavar": "PICTURE", "nargs": "+", "help": "a picture in a file"},
    "--model": {"metavar": "MODEL", "default": DEFAULT_MODEL, "help": "name or folder of a model"},
    "--adapter": {"metavar": "FILE", "help": "what `igpt finetune --adapter` learned, for the model it was made for"},
    # Read by `main`, as the environment is the way for the library too.
    "--identity": {"metavar": "FILE", "help": f"secret keys of age, for a locked model (default: file in {IDENTITY})"},
    "--out": {"metavar": "PATH", "help": "a folder, or the name of a single file (default: this folder)"},
    "--force": {"action": "store_true", "help": "replace files of the same name"},
    "--device": {"help": "cpu, cuda or mps (default: the best there is)"},
    "--quiet": {"action": "store_true", "help": "print nothing but paths and results"},
    "--threads": {"type": number(int, 1), "metavar": "N", "help": "of the processor (default: one a core)"},
}
ADAPTED = ("--adapter", "--identity")  # models that are more than a name
MODEL, OUTPUT = ("--model", *ADAPTED), ("--out", "--force", "--device", "--quiet", "--threads")


def add_shared(parser: Parser, *names: str) -> None:
    """Flags that several commands have."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def load_model(args: argparse.Namespace, name: str | None = None) -> ImageGPT:
    """The model that the flags name, or `name`, on the device that they name."""
    return igpt.load(name or args.model, getattr(args, "device", "cpu"), adapter=args.adapter)
