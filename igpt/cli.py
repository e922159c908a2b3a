"""The `igpt` command: the parser, then one short function per command. Torch loads after all cheap checks."""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_args, get_type_hints

import igpt
from igpt.config import DEFAULT_MODEL, SamplingOptions
from igpt.siblings import sibling
from igpt.sizes import DEFAULT_SIZE, LARGEST_SIDE, SMALLEST_SIDE, grid_for, parse_size
from tokenizer_vq.base import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Options = TypeVar("Options", bound=DataclassInstance)

STAGES = ("tokenizer", "gpt")
SAMPLING_HELP = {
    "steps": "draw the cells of a picture in so many steps; fewer is faster",
    "temperature": "below 1 the likelier tokens win more often, 0 always takes the likeliest",
    "top_k": "choose among the N likeliest tokens only, 0 among all",
    "top_p": "choose among the likeliest tokens that hold this share of the probability",
    "guidance": "how hard to pull towards the label, 1 is not at all",
    "order": "of the cells: random, or raster (rows from the top, one cell a step)",
}

# Parser


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
        help = (field.metadata.get("help") or SAMPLING_HELP[field.name]).replace("%", "%%")
        kind = next(kind for kind in (*get_args(hints[field.name]), hints[field.name]) if kind is not NoneType)
        if kind is bool:
            action = argparse.BooleanOptionalAction if field.default else "store_true"
            parser.add_argument(flag, action=action, default=field.default, help=help)
            continue
        if field.default is not None:
            help += f" (default: {field.default})"
        convert = number(kind) if kind in (int, float) else kind
        choices = field.metadata.get("choices")
        metavar = None if choices else {int: "N", float: "X"}.get(kind, "NAME")
        parser.add_argument(flag, type=convert, default=field.default, choices=choices, metavar=metavar, help=help)


def options_of(args: argparse.Namespace, options: type[Options]) -> Options:
    """The inverse of `add_options`: the dataclass as the command line has it."""
    return options(**{field.name: getattr(args, field.name) for field in fields(options)})


def build_parser() -> Parser:
    """The whole command line. Loads no torch."""
    parser = Parser(prog="igpt", description="Learns from a folder of art and makes new pictures in its manner.")
    parser.add_argument("--version", action="version", version=f"igpt {igpt.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    _add_generate(commands)
    _add_replay(commands)
    show = _add_command(commands, "show", _show, "print the recipe that a picture carries, as JSON")
    show.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    info = _add_command(commands, "info", _info, "list the models in the box, or describe one model")
    info.add_argument("model", metavar="MODEL", nargs="?", help="name or folder of a model")
    _add_tokenize(commands)
    _add_train(commands)
    return parser


def _add_command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> Parser:
    parser: Parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    parser.set_defaults(run=run)
    return parser


def _add_output(parser: Parser, default: str = "this folder") -> None:
    parser.add_argument("--out", metavar="PATH", help=f"a folder, or the name of a single .png (default: {default})")
    parser.add_argument("--force", action="store_true", help="replace files of the same name instead of numbering")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the paths of the pictures")


def _add_generate(commands: Any) -> None:
    parser = _add_command(commands, "generate", _generate, "draw new pictures")
    sides = f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side, as 256 or 640x384 (default: {DEFAULT_SIZE})"
    parser.add_argument("--size", default=str(DEFAULT_SIZE), help=sides)
    parser.add_argument("-n", type=number(int), default=1, metavar="N", help="how many pictures (default: 1)")
    parser.add_argument("--seed", type=number(int), metavar="N", help="picture i has the seed N + i (default: random)")
    parser.add_argument("--label", metavar="NAME", help="what to draw, one of the model's labels (default: anything)")
    model = f"name or folder of a model (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model)
    parser.add_argument("--sheet", action="store_true", help="also write all pictures on one contact sheet")
    add_options(parser, SamplingOptions)
    _add_output(parser)


def _add_replay(commands: Any) -> None:
    parser = _add_command(commands, "replay", _replay, "draw a picture again from the recipe that it carries")
    parser.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    parser.add_argument("--model", metavar="MODEL", help="where the model of the picture is (default: by its name)")
    parser.add_argument("--from-tokens", action="store_true", help="decode the recorded tokens, draw nothing anew")
    _add_output(parser)


def _add_tokenize(commands: Any) -> None:
    parser = _add_command(commands, "tokenize", _tokenize, "show what is left of pictures when they are said in tokens")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, written anew beside its original")
    model = f"name or folder of a model (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=model)
    _add_output(parser, "each beside its original")


def _add_train(commands: Any) -> None:
    parser = _add_command(commands, "train", _train, "learn a model from a folder of art: the tokenizer, then the GPT")
    parser.usage = "igpt train [tokenizer | gpt] ART --out MODEL [options]"
    parser.epilog = "The word tokenizer or gpt right after train does that stage only. Started again, it goes on."
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("art", metavar="ART", help="a folder whose sub-folders are labels, or a .tar like it")
    parser.add_argument("--out", metavar="MODEL", required=True, help="the folder of the new model")
    add_options(parser, sibling("train.options").TrainOptions)


# Commands


def _generate(args: argparse.Namespace) -> None:
    size = parse_size(args.size)
    options = options_of(args, SamplingOptions)
    options.check()
    if args.n < 1:
        raise UserError(f"-n {args.n} is too few pictures; 1 or more is wanted")
    files = sibling("generate.files")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    if not 0 <= seed <= files.LARGEST_SEED - args.n:
        raise UserError(f"the seed {seed} is out of reach; a whole number from 0 to 2**63 - 1 - n is wanted")
    output = files.plan_output(args.out, args.n)
    model = igpt.load(args.model, args.device)
    model.label_number(args.label)  # complains here, before anything is said or drawn
    if args.seed is None and not args.quiet:
        print(f"seed {seed}", file=sys.stderr)
    sibling("generate.run").generate_files(
        model, n=args.n, size=size, label=args.label, seed=seed, options=options,
        output=output, sheet=args.sheet, force=args.force, quiet=args.quiet,
    )  # fmt: skip


def _replay(args: argparse.Namespace) -> None:
    files = sibling("generate.files")
    recipe = _recipe(args.picture)
    output = files.plan_output(args.out, 1)
    # A picture of a stranger may name anything, also a path or an address: only a bare name is looked up.
    if args.model is None and Path(recipe.model).name != recipe.model:
        raise UserError(f"the picture names the model {recipe.model!r}; say with --model where it is")
    path = output.picture(f"{Path(args.picture).stem}-replay")
    sibling("generate.run").replay(
        igpt.load(args.model or recipe.model, args.device), recipe,
        path=path, from_tokens=args.from_tokens, force=args.force, quiet=args.quiet,
    )  # fmt: skip


def _show(args: argparse.Namespace) -> None:
    print(_recipe(args.picture).to_json(indent=2))


def _info(args: argparse.Namespace) -> None:
    if args.model is not None:
        _print_table(_description(igpt.load(args.model, "cpu")))
        return
    from igpt.checkpoint import in_the_box

    for name in in_the_box():
        model = igpt.load(name, "cpu")
        told = dict(_description(model))
        print(f"{name}: {told['parameters']}, {len(model.labels)} labels, {told['picture']}")
    if not in_the_box():
        print("no model is in the box")
    print("igpt info MODEL tells more, also of a model folder of your own", file=sys.stderr)


def _tokenize(args: argparse.Namespace) -> None:
    from igpt import checkpoint
    from igpt.device import pick_device

    files, evaluate = sibling("generate.files"), sibling("train.evaluate")
    sources = [Path(picture) for picture in args.pictures]
    out = None if args.out is None else files.plan_output(args.out, len(sources))
    device = pick_device(args.device)
    tokenizer = checkpoint.load(args.model).tokenizer.to(device)
    measures = {"PSNR": evaluate.psnr, "SSIM": evaluate.ssim}
    sibling("generate.tokenize").tokenize_files(
        tokenizer, sources, measures, out, device=device, force=args.force, quiet=args.quiet
    )


def _train(args: argparse.Namespace) -> None:
    if not Path(args.art).exists():
        raise UserError(f"there is no art at {args.art!r}; a folder of pictures or a .tar is wanted")
    options = options_of(args, sibling("train.options").TrainOptions)
    options.resolved()
    sibling("generate.files").check_writable(args.out)
    sibling("train.run").train(args.stage, Path(args.art), Path(args.out), options)


def _recipe(picture: str) -> Any:
    recipe = sibling("generate.files").read_recipe(picture)
    if recipe is None:
        raise UserError(f"{picture} carries no recipe of igpt")
    return recipe


def _description(model: igpt.ImageGPT) -> list[tuple[str, str]]:
    """What `igpt info` says of a model, row by row."""
    rows, columns = grid_for(LARGEST_SIDE, LARGEST_SIDE, model.downsample, model.native_cells)
    side, told = model.downsample, model.info()
    parameters = " + ".join(f"{count / 1e6:.2f} M {part}" for part, count in told["parameters"].items())
    return [
        ("name", model.name),
        ("labels", f"{len(model.labels)}: {', '.join(model.labels)}" if model.labels else "none"),
        ("parameters", parameters),
        ("tokenizer", f"{model.tokenizer.kind}, {model.tokenizer.vocab_size} tokens of {side}x{side} pixels"),
        ("picture", f"{rows}x{columns} tokens, {columns * side}x{rows * side} pixels"),
        ("weights", model.weights_hash),
        *((key, value if isinstance(value, str) else json.dumps(value)) for key, value in model.provenance.items()),
    ]


def _print_table(rows: list[tuple[str, str]]) -> None:
    indent = max(len(key) for key, _ in rows) + 2
    width = max(shutil.get_terminal_size().columns, indent + 40)
    for key, value in rows:
        wrapped = textwrap.wrap(value, width - indent, break_long_words=False, break_on_hyphens=False)
        print(f"{key:{indent}}" + f"\n{'':{indent}}".join(wrapped))


# Entry


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit status: 0, 2 for what the user can put right, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["train"] and words[1:2] and words[1] in STAGES:
        words[1] = f"--stage={words[1]}"  # a positional that may be missing is more than argparse can tell apart
    try:
        parser = build_parser()
        args = parser.parse_args(words)
        if "run" not in args:
            parser.print_help()
            return 0
        args.run(args)
        sys.stdout.flush()
    except UserError as error:
        print(f"igpt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("igpt: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, as in `igpt show x.png | head -3`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
