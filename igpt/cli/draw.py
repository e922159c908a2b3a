"""Commands that draw pictures, draw on from them, and tell about them."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import igpt
from igpt.config import (
    ANCHORS,
    ANY_LABEL,
    DEFAULT_KEEP,
    DEFAULT_MIX,
    DEFAULT_MODEL,
    DEFAULT_STRENGTH,
    NO_LABEL,
    SIDES,
    check_anchor,
    check_share,
    keep_of,
)
from igpt.files import Output, plan_output
from igpt.recipe import check_picture, recipe_of
from igpt.siblings import sibling
from igpt.sizes import LARGEST_SIDE, SMALLEST_SIDE, parse_size
from tokenizer_vq.base import UserError

from .flags import (
    Parser,
    add_adapter,
    add_command,
    add_model,
    add_output,
    add_sampling,
    add_seeds,
    load_model,
    number,
    sampling_of,
    seed_of,
)

if TYPE_CHECKING:
    from igpt.edit import Edit

TIMELAPSES = ("gif", "webp")
SAID_ABOVE = ("default_labels", "sampling")  # of the provenance, in rows of their own


def add_to(commands: Any) -> None:
    """All commands of this file."""
    _add_generate(commands)
    _add_edits(commands)
    _add_replay(commands)
    show = add_command(commands, "show", _show, "print the recipe that a picture carries, as JSON")
    show.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    info = add_command(commands, "info", _info, "list the models in the box, or describe one model")
    info.add_argument("model", metavar="MODEL", nargs="?", help="name or folder of a model")
    add_adapter(info)
    tokenize = add_command(commands, "tokenize", _tokenize, "show what is left of pictures when they are put in tokens")
    tokenize.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, written anew beside its original")
    add_model(tokenize, adapter=False)
    add_output(tokenize, "each beside its original")


# Drawing


def _add_generate(commands: Any) -> None:
    parser = add_command(commands, "generate", _generate, "draw new pictures")
    sides = f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side, as 256 or 640x384 (default: the model's native size)"
    parser.add_argument("--size", help=sides)
    label = (
        "what to draw, one of the model's labels (default: the seed chooses one that it draws well; "
        f"{ANY_LABEL}: one of all, {NO_LABEL}: none in particular)"
    )
    parser.add_argument("--tile", action="store_true", help="draw textures that wrap in both directions")
    timelapse = f"also write an animation of each drawing: {' or '.join(TIMELAPSES)} (default: {TIMELAPSES[0]})"
    parser.add_argument("--timelapse", nargs="?", const=TIMELAPSES[0], choices=TIMELAPSES, help=timelapse)
    _add_drawing(parser, label)


def _add_drawing(parser: Parser, label: str) -> None:
    """The flags of everything that draws."""
    add_seeds(parser)
    parser.add_argument("--label", metavar="NAME", help=label)
    add_model(parser)
    parser.add_argument("--sheet", action="store_true", help="also write all pictures on one contact sheet")
    add_sampling(parser)
    add_output(parser)


def _generate(args: argparse.Namespace) -> None:
    size = None if args.size is None else parse_size(args.size)
    model, job = _prepared(args)
    _say_seed(args, job.seed)
    sibling("generate.run").generate_files(
        model, job, model.size(size), args.label, tile=args.tile, timelapse=args.timelapse
    )


def _prepared(args: argparse.Namespace) -> tuple[igpt.ImageGPT, Any]:
    """The model and the `Job` of a command that draws; what is cheap to check comes before torch loads."""
    sampling, seed, output = sampling_of(args), seed_of(args), plan_output(args.out, args.n)
    model = load_model(args)
    model.label_number(args.label)  # complains here, before anything is said or drawn
    options = replace(model.sampling, **sampling)
    job = sibling("generate.run").Job(seed, options, output, args.n, args.sheet, args.force, args.quiet)
    return model, job


def _say_seed(args: argparse.Namespace, seed: int) -> None:
    """Where it was drawn by lot."""
    if args.seed is None and not args.quiet:
        print(f"seed {seed}", file=sys.stderr)


# Drawing on from a picture


def _add_edits(commands: Any) -> None:
    label = (
        "what to draw, one of the model's labels (default: that in the picture's recipe, or the one that fits best to "
        f"the picture; {NO_LABEL}: none in particular)"
    )

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str) -> Parser:
        parser = add_command(commands, name, run, help)
        parser.add_argument("picture", metavar="PICTURE", help="a picture; one made by igpt brings its tokens along")
        _add_drawing(parser, label)
        return parser

    complete = add("complete", _complete, "keep a part of a picture and draw the rest")
    sides = f"{', '.join(SIDES)}, or a share between 0 and 1 from the top (default: {DEFAULT_KEEP})"
    complete.add_argument("--keep", default=DEFAULT_KEEP, metavar="PART", help=sides)

    inpaint = add("inpaint", _inpaint, "draw a part of a picture anew")
    inpaint.add_argument("mask", metavar="MASK", help="a picture of the same size, white where to draw")

    extend = add("extend", _extend, "draw around a picture until it has another size")
    extend.add_argument("--size", required=True, help="in pixels, as 768x256")
    anchors = f"where the picture stays: {', '.join(ANCHORS)} (default: {ANCHORS[0]})"
    extend.add_argument("--anchor", default=ANCHORS[0], metavar="PLACE", help=anchors)

    vary = add("vary", _vary, "draw some cells of a picture anew, wherever they lie")
    strength = f"the share that is drawn anew: 0 changes nothing, 1 everything (default: {DEFAULT_STRENGTH})"
    vary.add_argument("--strength", type=number(float), default=DEFAULT_STRENGTH, metavar="X", help=strength)

    blend = add("blend", _blend, "draw two pictures into one")
    blend.add_argument("other", metavar="OTHER", help="the second picture")
    mix = f"the share of the second picture, 0 to 1 (default: {DEFAULT_MIX})"
    blend.add_argument("--mix", type=number(float), default=DEFAULT_MIX, metavar="X", help=mix)


def _complete(args: argparse.Namespace) -> None:
    keep_of(args.keep)
    _draw_edit(args, "complete", [args.picture], lambda edit, _, source: edit.complete(source, args.keep))


def _inpaint(args: argparse.Namespace) -> None:
    pictures = [args.picture, args.mask]
    _draw_edit(args, "inpaint", pictures, lambda edit, _, source, mask: edit.inpaint(source, mask))


def _extend(args: argparse.Namespace) -> None:
    size = parse_size(args.size)
    check_anchor(args.anchor)
    _draw_edit(
        args, "extend", [args.picture], lambda edit, model, one: edit.extend(one, size, args.anchor, model.downsample)
    )


def _vary(args: argparse.Namespace) -> None:
    check_share("strength", args.strength)
    _draw_edit(args, "vary", [args.picture], lambda edit, model, source: edit.vary(model, source, args.strength))


def _blend(args: argparse.Namespace) -> None:
    check_share("mix", args.mix)
    pictures = [args.picture, args.other]
    _draw_edit(args, "blend", pictures, lambda edit, model, a, b: edit.blend(model, a, b, args.mix))


def _draw_edit(args: argparse.Namespace, name: str, paths: list[str], make: Callable[..., Edit]) -> None:
    """Everything that the five have in common. `make` is given the module igpt.edit, the model and its sources."""
    for path in paths:
        check_picture(path)
    model, job = _prepared(args)
    from igpt import edit as module  # loads torch

    edit = make(module, model, *(module.open_source(model, path) for path in paths))
    guessed = args.label is None and edit.label is None
    edit = module.labelled(model, edit, args.label)
    _say_seed(args, job.seed)
    if guessed and edit.label is not None and not args.quiet:
        print(f"label {edit.label}, which fits best to what is given; --label draws another", file=sys.stderr)
    sibling("generate.run").edit_files(model, job, edit, f"{Path(args.picture).stem}-{name}")


# Telling


def _add_replay(commands: Any) -> None:
    parser = add_command(commands, "replay", _replay, "draw a picture again from the recipe that it carries")
    parser.add_argument("picture", metavar="PICTURE", help="a PNG made by igpt")
    parser.add_argument("--model", metavar="MODEL", help="where the model of the picture is (default: by its name)")
    add_adapter(parser)
    parser.add_argument("--from-tokens", action="store_true", help="decode the recorded tokens, draw nothing anew")
    add_output(parser)


def _replay(args: argparse.Namespace) -> None:
    recipe = recipe_of(args.picture)
    output = plan_output(args.out, 1)
    # A picture of a stranger may name anything, also a path or an address: only a bare name is looked up.
    if args.model is None and Path(recipe.model).name != recipe.model:
        raise UserError(f"the picture names the model {recipe.model!r}; say with --model where it is")
    sibling("generate.run").replay(
        load_model(args, args.model or recipe.model),
        recipe,
        output.picture(f"{Path(args.picture).stem}-replay"),
        from_tokens=args.from_tokens,
        force=args.force,
        quiet=args.quiet,
    )


def _show(args: argparse.Namespace) -> None:
    print(recipe_of(args.picture).to_json(indent=2))


def _tokenize(args: argparse.Namespace) -> None:
    from igpt import checkpoint
    from igpt.device import pick_device

    sources = [Path(picture) for picture in args.pictures]
    out: Output | None = None if args.out is None else plan_output(args.out, len(sources))
    device = pick_device(args.device)
    tokenizer = checkpoint.load(args.model).tokenizer.to(device)
    sibling("generate.tokenize").tokenize_files(
        tokenizer, sources, out, device=device, force=args.force, quiet=args.quiet
    )


def _info(args: argparse.Namespace) -> None:
    if args.model is not None or args.adapter is not None:
        _print_table(_description(load_model(args, args.model or DEFAULT_MODEL)))
        return
    from igpt.checkpoint import in_the_box

    for name in in_the_box():
        model = igpt.load(name, "cpu")
        about = dict(_description(model))
        print(f"{name}: {about['parameters']}, {len(model.labels)} labels, {about['picture']}")
    if not in_the_box():
        print("no model is in the box")
    print("igpt info MODEL tells more, also of a model folder of your own", file=sys.stderr)


def _description(model: igpt.ImageGPT) -> list[tuple[str, str]]:
    """What `igpt info` says of a model, row by row."""
    (rows, columns), (width, height) = model.grids.native, model.grids.native_size
    side, about = model.downsample, model.info()
    parameters = " + ".join(f"{count / 1e6:.2f} M {part}" for part, count in about["parameters"].items())
    return [
        ("name", model.name),
        ("labels", f"{len(model.labels)}: {', '.join(model.labels)}" if model.labels else "none"),
        *([("drawn best", ", ".join(well))] if (well := model.default_labels) != model.labels else []),
        ("parameters", parameters),
        ("tokenizer", f"{model.tokenizer.kind}, {model.tokenizer.vocab_size} tokens of {side}x{side} pixels"),
        ("picture", f"{rows}x{columns} tokens, {width}x{height} pixels"),
        ("drawing", _in_words(asdict(model.sampling))),
        ("weights", model.weights_hash),
        *((key, _in_words(value)) for key, value in model.provenance.items() if key not in SAID_ABOVE),
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_table(rows: list[tuple[str, str]]) -> None:
    indent = max(len(key) for key, _ in rows) + 2
    width = max(shutil.get_terminal_size().columns, indent + 40)
    for key, value in rows:
        wrapped = textwrap.wrap(value, width - indent, break_long_words=False, break_on_hyphens=False)
        print(f"{key:{indent}}" + f"\n{'':{indent}}".join(wrapped))
