"""Commands that draw on from a picture: complete, inpaint, extend, vary, blend."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt.config import (
    ANCHORS,
    DEFAULT_KEEP,
    DEFAULT_MIX,
    DEFAULT_STRENGTH,
    NO_LABEL,
    SIDES,
    check_anchor,
    check_share,
    keep_of,
)  # fmt: skip
from igpt.recipe import check_picture
from igpt.siblings import sibling
from igpt.sizes import parse_size

from .parts import (
    Parser,
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


def add_to(commands: Any) -> None:
    """All commands of this file."""
    complete = _add(commands, "complete", _complete, "keep a part of a picture and draw the rest")
    sides = f"{', '.join(SIDES)}, or a share between 0 and 1 from the top (default: {DEFAULT_KEEP})"
    complete.add_argument("--keep", default=DEFAULT_KEEP, metavar="PART", help=sides)

    inpaint = _add(commands, "inpaint", _inpaint, "draw a part of a picture anew")
    inpaint.add_argument("mask", metavar="MASK", help="a picture of the same size, white where to draw")

    extend = _add(commands, "extend", _extend, "draw around a picture until it has another size")
    extend.add_argument("--size", required=True, help="in pixels, as 768x256")
    anchors = f"where the picture stays: {', '.join(ANCHORS)} (default: {ANCHORS[0]})"
    extend.add_argument("--anchor", default=ANCHORS[0], metavar="PLACE", help=anchors)

    vary = _add(commands, "vary", _vary, "draw some of a picture's tokens anew, wherever they lie")
    strength = f"the share that is drawn anew: 0 changes nothing, 1 everything (default: {DEFAULT_STRENGTH})"
    vary.add_argument("--strength", type=number(float), default=DEFAULT_STRENGTH, metavar="X", help=strength)

    blend = _add(commands, "blend", _blend, "draw two pictures into one")
    blend.add_argument("other", metavar="OTHER", help="the second picture")
    mix = f"the share of the second picture, 0 to 1 (default: {DEFAULT_MIX})"
    blend.add_argument("--mix", type=number(float), default=DEFAULT_MIX, metavar="X", help=mix)

    for parser in (complete, inpaint, extend, vary, blend):
        add_seeds(parser)
        label = (
            "what to draw, one of the model's labels (default: that in the picture's recipe, or the one that fits best "
            f"to the picture; {NO_LABEL}: none in particular)"
        )
        parser.add_argument("--label", metavar="NAME", help=label)
        add_model(parser)
        parser.add_argument("--sheet", action="store_true", help="also write all pictures on one contact sheet")
        add_sampling(parser)
        add_output(parser)


def _add(commands: Any, name: str, run: Any, help: str) -> Parser:
    parser = add_command(commands, name, run, help)
    parser.set_defaults(edit=name)
    parser.add_argument("picture", metavar="PICTURE", help="a picture; one made by igpt brings its tokens along")
    return parser


# Commands


def _complete(args: argparse.Namespace) -> None:
    keep_of(args.keep)
    _draw(args, [args.picture], lambda edit, model, source: edit.complete(source, args.keep))


def _inpaint(args: argparse.Namespace) -> None:
    _draw(args, [args.picture, args.mask], lambda edit, model, source, mask: edit.inpaint(source, mask))


def _extend(args: argparse.Namespace) -> None:
    size = parse_size(args.size)
    check_anchor(args.anchor)
    _draw(args, [args.picture], lambda edit, model, one: edit.extend(one, size, args.anchor, model.downsample))


def _vary(args: argparse.Namespace) -> None:
    check_share("strength", args.strength)
    _draw(args, [args.picture], lambda edit, model, source: edit.vary(model, source, args.strength))


def _blend(args: argparse.Namespace) -> None:
    check_share("mix", args.mix)
    _draw(args, [args.picture, args.other], lambda edit, model, a, b: edit.blend(model, a, b, args.mix))


def _draw(args: argparse.Namespace, paths: list[str], make: Any) -> None:
    """Everything that the five have in common; cheap checks come before torch loads."""
    sampling = sampling_of(args)
    seed = seed_of(args)
    output = sibling("generate.files").plan_output(args.out, args.n)
    for path in paths:
        check_picture(path)
    model = load_model(args)
    model.label_number(args.label)
    from igpt import edit as module  # loads torch

    edit = make(module, model, *(module.open_source(model, path) for path in paths))
    guessed = args.label is None and edit.label is None
    edit = module.labelled(model, edit, args.label)
    if args.seed is None and not args.quiet:
        print(f"seed {seed}", file=sys.stderr)
    if guessed and edit.label is not None and not args.quiet:
        print(f"label {edit.label}, which fits best to what is given; --label draws another", file=sys.stderr)
    options = replace(model.sampling, **sampling)
    sibling("generate.run").edit_files(
        model, edit, f"{Path(args.picture).stem}-{args.edit}", n=args.n, seed=seed, options=options, output=output,
        sheet=args.sheet, force=args.force, quiet=args.quiet,
    )  # fmt: skip
