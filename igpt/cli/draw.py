"""Commands that draw pictures, edit them, and say what they carry."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import igpt
from igpt import config
from igpt.files import plan_output, write_file
from igpt.recipe import Recipe, check_picture, check_seeds, is_unchanged, recipe_of
from igpt.siblings import sibling
from igpt.sizes import LARGEST_SIDE, SMALLEST_SIDE, parse_size
from tokenizer_vq.base import UserError

from . import flags
from .flags import Parser, checked, number

if TYPE_CHECKING:
    from igpt.canvas import Task

TIMELAPSES = ("gif", "webp")
SAID_ABOVE = ("default_labels", "sampling")  # of the provenance, in rows of their own


def add_to(commands: Any) -> None:
    """All commands of this file."""
    generate = flags.add_command(commands, "generate", _generate, "draw new pictures")
    sides = f"{SMALLEST_SIDE} to {LARGEST_SIDE} pixels a side, as 256 or 640x384 (default: the model's native size)"
    generate.add_argument("--size", type=checked(parse_size), help=sides)
    generate.add_argument("--tile", action="store_true", help="draw textures that wrap in both directions")
    generate.add_argument("--atlas", action="store_true", help="also write all on one PNG, with JSON for game engines")
    timelapse = f"also write an animation of each drawing: {' or '.join(TIMELAPSES)} (default: {TIMELAPSES[0]})"
    generate.add_argument("--timelapse", nargs="?", const=TIMELAPSES[0], choices=TIMELAPSES, help=timelapse)
    _add_drawing(generate, f"the seed chooses one that it draws well; {config.ANY_LABEL}: one of all")
    _add_edits(commands)
    replay = flags.add_command(commands, "replay", _replay, "draw a picture again from its recipe", "pictures")
    replay.add_argument("--model", metavar="MODEL", help="where the model of the picture is (default: by its name)")
    replay.add_argument("--from-tokens", action="store_true", help="decode the recorded tokens instead of drawing")
    flags.add_shared(replay, *flags.ADAPTED, *flags.OUTPUT)
    flags.add_command(commands, "show", _show, "print the recipe that a picture carries, as JSON", "pictures")
    help = "take a palette from pictures, for --palette"
    palette = flags.add_command(commands, "palette", _palette, help, "pictures", "--force")
    palette.add_argument("--colours", type=number(int), default=16, metavar="N", help="how many at most")
    palette.add_argument("--out", metavar="FILE", required=True, help="a name in .hex or .gpl")
    info = flags.add_command(commands, "info", _info, "list the models in the box, or describe one", *flags.ADAPTED)
    info.add_argument("model", metavar="MODEL", nargs="?", help="name or folder of a model")
    help = "show pictures next to what the tokenizer keeps of them"
    shared = ("pictures", "--model", "--identity", *flags.OUTPUT[1:])
    tokenize = flags.add_command(commands, "tokenize", _tokenize, help, *shared)
    tokenize.add_argument("--out", metavar="PATH", help="a folder, or the name of a single file (default: beside each)")


def _add_edits(commands: Any) -> None:
    def add(name: str, help: str, *parameters: str) -> Parser:
        """An edit: the picture and its own flags are the parameters of the function of that name in igpt.edit."""
        parser = flags.add_command(commands, name, _edit, help)
        parser.add_argument("picture", metavar="PICTURE", help="a picture; one made by igpt brings its tokens along")
        parser.set_defaults(edit=name, parameters=("picture", *parameters), timelapse=None, atlas=False)
        _add_drawing(parser, "that in the picture's recipe, or the one that fits best to the picture")
        return parser

    def share(name: str) -> Callable[[str], Any]:
        return checked(partial(config.check_share, name), number(float))

    complete = add("complete", "keep a part of a picture and draw the rest", "keep")
    keep = f"{', '.join(config.SIDES)}, or a share between 0 and 1 from the top"
    complete.add_argument("--keep", type=checked(config.keep_of), default=config.DEFAULT_KEEP, help=keep)
    inpaint = add("inpaint", "redraw the masked part of a picture", "mask")
    mask = "a picture of the same size, white where to redraw (default: where the picture is transparent)"
    inpaint.add_argument("mask", metavar="MASK", nargs="?", help=mask)
    extend = add("extend", "draw around a picture until it has another size", "size", "anchor")
    extend.add_argument("--size", type=checked(parse_size), required=True, help="in pixels, as 768x256")
    extend.add_argument("--anchor", choices=config.ANCHORS, default=config.ANCHORS[0], help="where the picture stays")
    vary = add("vary", "redraw a random share of a picture", "strength")
    strength = "the share of its cells to redraw: 0 changes nothing, 1 everything"
    vary.add_argument("--strength", type=share("strength"), default=config.DEFAULT_STRENGTH, help=strength)
    blend = add("blend", "draw two pictures into one", "other", "mix")
    blend.add_argument("other", metavar="OTHER", help="the second picture")
    blend.add_argument("--mix", type=share("mix"), default=config.DEFAULT_MIX, help="the share of the second, 0 to 1")


def _add_drawing(parser: Parser, default_label: str) -> None:
    """The flags of everything that draws."""
    parser.add_argument("-n", type=number(int), default=1, metavar="N", help="how many pictures")
    parser.add_argument("--seed", type=number(int), metavar="N", help="picture i has the seed N + i (default: random)")
    nothing = f'{config.NO_LABEL}, or "" where a label is called so: none in particular'
    label = f"what to draw, one of the model's labels (default: {default_label}; {nothing})"
    parser.add_argument("--label", metavar="NAME", help=label)
    parser.add_argument("--sheet", action="store_true", help="also write all pictures on one contact sheet")
    flags.add_sampling(parser)
    parser.add_argument("--scale", type=number(int), metavar="N", help="make each pixel of a sprite N pixels a side")
    ground = f"of sprites: {' or '.join(config.GROUNDS)} (default: {config.GROUNDS[0]})"
    parser.add_argument("--ground", choices=config.GROUNDS, help=ground)
    parser.add_argument("--palette", metavar="FILE", help="draw sprites in the colours of this .gpl or .hex file")
    parser.add_argument("--format", choices=("png", "webp", "jpg"), default="png", help="of the files")
    flags.add_shared(parser, *flags.MODEL, *flags.OUTPUT)


# Drawing


def _generate(args: argparse.Namespace) -> None:
    _draw(args, lambda model: model.new_picture(args.size, args.tile))


def _edit(args: argparse.Namespace) -> None:
    parameters = {name: getattr(args, name) for name in args.parameters}
    for name in {"picture", "mask", "other"} & parameters.keys():
        if parameters[name] is not None:
            check_picture(parameters[name])

    def task_for(model: igpt.ImageGPT) -> Task:
        from igpt import edit  # loads torch

        return getattr(edit, args.edit)(model, **parameters)

    _draw(args, task_for, f"{Path(args.picture).stem}-{args.edit}")


def _draw(args: argparse.Namespace, task_for: Callable[[igpt.ImageGPT], Task], title: str | None = None) -> None:
    """Draws a task and writes what comes of it; what is cheap to check comes before torch loads."""
    process, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if processes > 1 and (args.seed is None or args.sheet or args.atlas):
        raise UserError("several processes draw from one --seed, and without --sheet or --atlas")
    seed = secrets.randbelow(2**31) if args.seed is None else args.seed
    check_seeds(seed, args.n)
    sampling, output = flags.sampling_of(args), plan_output(args.out, args.n, f".{args.format}")
    sprites = {name: value for name in ("scale", "ground", "palette") if (value := getattr(args, name)) is not None}
    model = flags.load_model(args)
    task = task_for(model)
    label, at_once = model.label_for(task, args.label), 1 if args.timelapse else None
    batches = model.batches(task, args.n, at_once=at_once, label=label, seed=seed, **sampling, **sprites)
    if args.seed is None and not args.quiet:
        print(f"seed {seed}", file=sys.stderr)
    if args.palette is not None and not args.quiet:
        from tokenizer_vq.palette import PaletteTokenizer  # loads torch

        if (few := PaletteTokenizer.from_file(args.palette).vocab_size) < model.tokenizer.vocab_size:
            print(f"{args.palette} has {few} colours: several of the model's become one", file=sys.stderr)
    if label not in (args.label, task.label) and not args.quiet:
        print(f"label {label}, the best fit to the picture; --label chooses another", file=sys.stderr)
    run, title = sibling("generate.run"), title or args.label or model.name
    target = run.Target(output, title, args.sheet, args.atlas, args.timelapse, args.force, args.quiet)
    if processes > 1:  # a picture of the same seed is the same: what is there may be replaced
        batches = run.shared_out(batches, target, process, processes)
        target = replace(target, force=True)
    run.draw_files(batches, target)


# Saying what there is


def _recipes(args: argparse.Namespace) -> dict[Path, Recipe]:
    """Of the pictures that the command line names. Says which of them were changed since."""
    recipes = {path: recipe_of(path) for path in flags.pictures_of(args)}
    for path, recipe in recipes.items():
        if not is_unchanged(path, recipe):
            print(f"{path}: its pixels were changed since it was drawn", file=sys.stderr)
    return recipes


def _replay(args: argparse.Namespace) -> None:
    recipes = _recipes(args)
    output, models = plan_output(args.out, len(recipes)), dict[str, igpt.ImageGPT]()
    for path, recipe in recipes.items():
        # A picture of a stranger may name anything, also a path or an address: only a bare name is looked up.
        if args.model is None and Path(recipe.model).name != recipe.model:
            raise UserError(f"the picture names the model {recipe.model!r}; say with --model where it is")
        name = args.model or recipe.model
        model = models[name] = models.get(name) or flags.load_model(args, name)
        how = {"from_tokens": args.from_tokens, "force": args.force, "quiet": args.quiet}
        sibling("generate.run").replay(model, recipe, output.picture(f"{path.stem}-replay"), **how)


def _show(args: argparse.Namespace) -> None:
    found = {str(path): json.loads(recipe.to_json()) for path, recipe in _recipes(args).items()}
    print(json.dumps(found if len(found) > 1 else found.popitem()[1], indent=2))


def _palette(args: argparse.Namespace) -> None:
    path = Path(args.out)
    if path.suffix.lower() not in (".hex", ".gpl"):
        raise UserError(f"got {path} for a palette, wanted a name in .hex or .gpl")
    sources = flags.pictures_of(args)
    from igpt.sprites import palette_of_pictures

    text = palette_of_pictures(sources, args.colours, path.suffix.lower())
    print(write_file(text.encode(), path, force=args.force))


def _tokenize(args: argparse.Namespace) -> None:
    sources = flags.pictures_of(args)
    from igpt import checkpoint
    from igpt.device import pick_device

    out = None if args.out is None else plan_output(args.out, len(sources))
    device = pick_device(args.device)
    tokenizer = checkpoint.load(args.model).tokenizer.to(device)
    how = {"device": device, "force": args.force, "quiet": args.quiet}
    sibling("generate.tokenize").tokenize_files(tokenizer, sources, out, **how)


def _info(args: argparse.Namespace) -> None:
    from igpt.checkpoint import in_the_box

    if args.model is None and args.adapter is None:
        for name in in_the_box():
            about = dict(_description(model := igpt.load(name, "cpu")))
            print(f"{name}: {about['parameters']}, {len(model.labels)} labels, {about['picture']}")
        if not in_the_box():
            print("no model is in the box")
        print("igpt info MODEL says more, also of a model folder of your own", file=sys.stderr)
        return
    rows = _description(flags.load_model(args, args.model or config.DEFAULT_MODEL))
    indent = max(len(key) for key, _ in rows) + 2
    how: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * indent}
    for key, value in rows:
        print(textwrap.fill(f"{key:{indent}}{value}", max(shutil.get_terminal_size().columns, indent + 40), **how))


def _description(model: igpt.ImageGPT) -> list[tuple[str, str]]:
    """What `igpt info` says of a model, row by row."""
    (rows, columns), (width, height), side = model.grids.native, model.grids.native_size, model.downsample
    weights = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("gpt", "tokenizer")}
    well = model.default_labels if model.default_labels != model.labels else []
    about = [
        ("name", model.name),
        ("labels", f"{len(model.labels)}: {', '.join(model.labels)}" if model.labels else "none"),
        ("drawn best", ", ".join(well)),
        ("parameters", " + ".join(f"{n / 1e6:.2f} M {part}" for part, n in weights.items())),
        ("tokenizer", f"{model.tokenizer.kind}, {model.tokenizer.vocab_size} tokens of {side}x{side} pixels"),
        ("picture", f"{rows}x{columns} tokens, {width}x{height} pixels"),
        ("drawing", _in_words(asdict(model.sampling))),
        ("weights", model.weights_hash),
        *((key, _in_words(value)) for key, value in model.provenance.items() if key not in SAID_ABOVE),
    ]
    return [(key, value) for key, value in about if value]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {_in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
