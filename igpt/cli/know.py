"""Commands that tell what was made: how good, how new, how much one's own."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt.evaluation.options import AuditOptions, EvaluateOptions
from igpt.files import check_writable, plan_output, write_picture
from tokenizer_vq.base import UserError

from .flags import (
    add_adapter,
    add_command,
    add_model,
    add_options,
    add_output,
    add_sampling,
    check_art,
    load_model,
    number,
    options_of,
    sampling_of,
)


def add_to(commands: Any) -> None:
    """All commands of this file."""
    _add_evaluate(commands)
    _add_audit(commands)
    _add_surprise(commands)


def _add_evaluate(commands: Any) -> None:
    parser = add_command(commands, "evaluate", _evaluate, "measure how good, how varied and how original a model is")
    parser.add_argument("model", metavar="MODEL", help="name or folder of a model")
    add_adapter(parser)
    parser.add_argument("art", metavar="ART", help="the art it learned from: a folder or a .tar, as for train")
    add_options(parser, EvaluateOptions)
    add_sampling(parser)
    out = "for report.md with its pictures, and report.json (default: MODEL-report)"
    parser.add_argument("--out", metavar="FOLDER", help=out)
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _add_audit(commands: Any) -> None:
    parser = add_command(commands, "audit", _audit, "find the training pictures that pictures come nearest to")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture; its middle square is looked at")
    parser.add_argument("--against", metavar="ART", required=True, help="the art of the training: a folder or a .tar")
    add_options(parser, AuditOptions)
    add_model(parser)
    add_output(parser)


def _add_surprise(commands: Any) -> None:
    parser = add_command(commands, "surprise", _surprise, "map where a picture is unusual to a model, in bits a token")
    parser.add_argument("pictures", metavar="PICTURE", nargs="+", help="a picture, written anew beside its map")
    parser.add_argument("--label", metavar="NAME", help="what it is, one of the model's labels (default: unknown)")
    orders = "mean over so many random drawing orders (default: 8)"
    parser.add_argument("--orders", type=number(int), default=8, metavar="N", help=orders)
    parser.add_argument("--seed", type=number(int), default=0, metavar="N", help="of those orders (default: 0)")
    add_model(parser)
    add_output(parser)


# Commands


def _evaluate(args: argparse.Namespace) -> None:
    options = options_of(args, EvaluateOptions)
    sampling = sampling_of(args)
    options.check()
    check_art(args.art)
    folder = Path(args.out or f"{Path(args.model).name}-report")
    check_writable(folder)
    model = load_model(args)
    from igpt.evaluation.evaluate import Evaluation

    report = Evaluation(model, args.art, options, replace(model.sampling, **sampling), args.quiet).run()
    print(report.to_markdown(brief=True), flush=True)
    print(report.write(folder))


def _audit(args: argparse.Namespace) -> None:
    options = options_of(args, AuditOptions)
    options.check()
    check_art(args.against)
    sources = _pictures(args.pictures)
    output = plan_output(args.out, len(sources))
    model = load_model(args)
    from igpt.evaluation.audit import audit

    for verdict in audit(model, sources, args.against, options, quiet=args.quiet):
        place = output.picture(f"{verdict.source.stem}-audit")
        path = write_picture(verdict.sheet, place, force=args.force)
        if not args.quiet:
            print("\n".join(verdict.lines))
        print(path, flush=True)


def _surprise(args: argparse.Namespace) -> None:
    if not 1 <= args.orders <= 1000:
        raise UserError(f"--orders {args.orders} cannot be; 1 to 1000 are wanted")
    if not 0 <= args.seed < 2**31:
        raise UserError(f"--seed {args.seed} is out of reach; 0 to 2**31 - 1 is wanted")
    sources = _pictures(args.pictures)
    output = plan_output(args.out, len(sources))
    model = load_model(args)
    label = model.label_number(args.label)
    from igpt.evaluation.surprise import surprise_map
    from tokenizer_vq.images import open_picture

    for source in sources:
        open_picture(source)  # one that cannot be read is said before any map is drawn
    for source in sources:
        found = surprise_map(model, open_picture(source), label, orders=args.orders, seed=args.seed)
        path = write_picture(found.sheet, output.picture(f"{source.stem}-surprise"), force=args.force)
        if not args.quiet:
            print(f"{source}: {found.sentence}", file=sys.stderr)
        print(path, flush=True)


def _pictures(names: list[str]) -> list[Path]:
    sources = [Path(name) for name in names]
    for source in sources:
        if not source.is_file():
            raise UserError(f"there is no picture at {str(source)!r}")
    return sources
