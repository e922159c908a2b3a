"""Commands that draw pictures and tell about them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import igpt
from igpt.config import ANY_LABEL, DEFAULT_MODEL, NO_LABEL, SamplingOptions
from igpt.recipe import recipe_of
from igpt.siblings import sibling
from igpt.sizes import LARGEST_SIDE, SMALLEST_SIDE, parse_size
from tokenizer_vq.base import UserError

from .parts import (
    add_adapter,
    add_command,
    add_model,
    add_options,
    add_output,
    add_seeds,
    load_model,
    options_of,
    seed_of,
)

TIMELAPSES = ("gif", "webp")


def add_to(commands: Any) -> None:
    """All commands of this file."""
    _add_generate(commands)
    _add_replay(commands)
    show = add_command(commands, "show", _show, "print the recipe that a picture carries, as JSON")
    show.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    info = add_command(commands, "info", _info, "list the models in the box, or describe one model")
    info.add_argument("model", metavar="MODEL", nargs="?", help="name or folder of a model")
    add_adapter(info)
    _add_tokenize(commands)


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, "generate", _generate, "draw new pictures")
    sides = f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side, as 256 or 640x384 (default: the model's native size)"
    parser.add_argument("--size", help=sides)
    add_seeds(parser)
    label = (
        "what to draw, one of the model's labels (default: the seed chooses one that it draws well; "
        f"{ANY_LABEL}: one of all, {NO_LABEL}: none in particular)"
    )
    parser.add_argument("--label", metavar="NAME", help=label)
    add_model(parser)
    parser.add_argument("--tile", action="store_true", help="draw textures that wrap in both directions")
    timelapse = f"also write an animation of each drawing: {' or '.join(TIMELAPSES)} (default: {TIMELAPSES[0]})"
    parser.add_argument("--timelapse", nargs="?", const=TIMELAPSES[0], choices=TIMELAPSES, help=timelapse)
    parser.add_argument("--sheet", action="store_true", help="also write all pictures on one contact sheet")
    add_options(parser, SamplingOptions)
    add_output(parser)


def _add_replay(commands: Any) -> None:
    parser = add_command(commands, "replay", _replay, "draw a picture again from the recipe that it carries")
    parser.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    parser.add_argument("--model", metavar="MODEL", help="where the model of the picture is (default: by its name)")
    add_adapter(parser)
    parser.add_argument("--from-tokens", action="store_true", help="decode the recorded tokens, draw nothing anew")
    add_output(parser)


def _add_tokenize(commands: Any) -> None:
    parser = add_command(commands, "tokenize", _tokenize, "show what is left of pictures when they are said in tokens")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, written anew beside its original")
    add_model(parser)
    add_output(parser, "each beside its original")


# Commands


def _generate(args: argparse.Namespace) -> None:
    size = None if args.size is None else parse_size(args.size)
    options = options_of(args, SamplingOptions)
    options.check()
    seed = seed_of(args)
    output = sibling("generate.files").plan_output(args.out, args.n)
    model = load_model(args)
    model.label_number(args.label)  # complains here, before anything is said or drawn
    if args.seed is None and not args.quiet:
        print(f"seed {seed}", file=sys.stderr)
    sibling("generate.run").generate_files(
        model, n=args.n, size=model.size(size), label=args.label, seed=seed, options=options,
        output=output, tile=args.tile, timelapse=args.timelapse, sheet=args.sheet, force=args.force, quiet=args.quiet,
    )  # fmt: skip


def _replay(args: argparse.Namespace) -> None:
    files = sibling("generate.files")
    recipe = recipe_of(args.picture)
    output = files.plan_output(args.out, 1)
    # A picture of a stranger may name anything, also a path or an address: only a bare name is looked up.
    if args.model is None and Path(recipe.model).name != recipe.model:
        raise UserError(f"the picture names the model {recipe.model!r}; say with --model where it is")
    path = output.picture(f"{Path(args.picture).stem}-replay")
    sibling("generate.run").replay(
        load_model(args, args.model or recipe.model), recipe,
        path=path, from_tokens=args.from_tokens, force=args.force, quiet=args.quiet,
    )  # fmt: skip


def _show(args: argparse.Namespace) -> None:
    print(recipe_of(args.picture).to_json(indent=2))


def _info(args: argparse.Namespace) -> None:
    if args.model is not None or args.adapter is not None:
        _print_table(_description(load_model(args, args.model or DEFAULT_MODEL)))
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


def _description(model: igpt.ImageGPT) -> list[tuple[str, str]]:
    """What `igpt info` says of a model, row by row."""
    (rows, columns), (width, height) = model.grids.native, model.grids.native_size
    side, told = model.downsample, model.info()
    parameters = " + ".join(f"{count / 1e6:.2f} M {part}" for part, count in told["parameters"].items())
    return [
        ("name", model.name),
        ("labels", f"{len(model.labels)}: {', '.join(model.labels)}" if model.labels else "none"),
        ("parameters", parameters),
        ("tokenizer", f"{model.tokenizer.kind}, {model.tokenizer.vocab_size} tokens of {side}x{side} pixels"),
        ("picture", f"{rows}x{columns} tokens, {width}x{height} pixels"),
        ("weights", model.weights_hash),
        *((key, value if isinstance(value, str) else json.dumps(value)) for key, value in model.provenance.items()),
    ]


def _print_table(rows: list[tuple[str, str]]) -> None:
    indent = max(len(key) for key, _ in rows) + 2
    width = max(shutil.get_terminal_size().columns, indent + 40)
    for key, value in rows:
        wrapped = textwrap.wrap(value, width - indent, break_long_words=False, break_on_hyphens=False)
        print(f"{key:{indent}}" + f"\n{'':{indent}}".join(wrapped))
