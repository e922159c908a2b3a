"""Commands that measure: how good, how varied, how original."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt.evaluation.options import AuditOptions, EvaluateOptions, SurpriseOptions
from igpt.files import check_writable, plan_output, write_picture
from tokenizer_vq.base import UserError

from . import flags


def add_to(commands: Any) -> None:
    """All commands of this file."""
    parser = flags.add_command(commands, "evaluate", _evaluate, "measure how good, varied and original a model is")
    parser.add_argument("model", metavar="MODEL", help="name or folder of a model")
    flags.add_adapter(parser)
    parser.add_argument("art", metavar="ART", help="the art it learned from: a folder or a .tar, as for train")
    flags.add_options(parser, EvaluateOptions)
    flags.add_sampling(parser)
    out = "for report.md with its pictures, and report.json (default: MODEL-report)"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")

    parser = flags.add_command(commands, "audit", _audit, "find the training pictures that pictures come nearest to")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture; its middle square is compared")
    parser.add_argument("--against", metavar="ART", required=True, help="the art of the training: a folder or a .tar")
    flags.add_options(parser, AuditOptions)
    flags.add_model(parser)
    flags.add_output(parser)

    parser = flags.add_command(commands, "surprise", _surprise, "map where a model finds a picture unusual, in bits")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, written anew next to its map")
    parser.add_argument("--label", metavar="NAME", help="what it is, one of the model's labels (default: unknown)")
    flags.add_options(parser, SurpriseOptions)
    flags.add_model(parser)
    flags.add_output(parser)


def _evaluate(args: argparse.Namespace) -> None:
    options, sampling = flags.options_of(args, EvaluateOptions), flags.sampling_of(args)
    options.check()
    flags.check_art(args.art)
    folder = Path(args.out or f"{Path(args.model).name}-report")
    check_writable(folder)
    model = flags.load_model(args)
    from igpt.evaluation.evaluate import Evaluation

    report = Evaluation(model, args.art, options, replace(model.sampling, **sampling), args.quiet).run()
    print(report.to_text(), flush=True)
    print(report.write(folder))


def _audit(args: argparse.Namespace) -> None:
    options = flags.options_of(args, AuditOptions)
    options.check()
    flags.check_art(args.against)
    sources = _pictures(args.pictures)
    output = plan_output(args.out, len(sources))
    model = flags.load_model(args)
    from igpt.evaluation.copies import audit

    for source, found in zip(sources, audit(model, sources, args.against, options, quiet=args.quiet), strict=True):
        path = write_picture(found.sheet, output.picture(f"{source.stem}-audit"), force=args.force)
        if not args.quiet:
            print("\n".join(found.lines))
        print(path, flush=True)


def _surprise(args: argparse.Namespace) -> None:
    options = flags.options_of(args, SurpriseOptions)
    options.check()
    sources = _pictures(args.pictures)
    output = plan_output(args.out, len(sources))
    model = flags.load_model(args)
    label = model.label_number(args.label)
    from igpt.evaluation.surprise import surprise_map
    from tokenizer_vq.images import open_picture

    for source in sources:
        open_picture(source)  # one that cannot be read is reported before any map is drawn
    for source in sources:
        found = surprise_map(model, open_picture(source), label, options)
        path = write_picture(found.sheet, output.picture(f"{source.stem}-surprise"), force=args.force)
        if not args.quiet:
            print(f"{source}: {found.sentence}", file=sys.stderr)
        print(path, flush=True)


def _pictures(names: list[str]) -> list[Path]:
    for name in names:
        if not Path(name).is_file():
            raise UserError(f"there is no picture at {name!r}")
    return [Path(name) for name in names]
