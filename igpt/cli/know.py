"""Commands that measure: how good, how varied, how original."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from igpt.config import AuditOptions, EvaluateOptions, SurpriseOptions
from igpt.files import check_writable, plan_output, write_picture

from . import flags


def add_to(commands: Any) -> None:
    """All commands of this file."""
    evaluate = flags.add_command(commands, "evaluate", _evaluate, "measure how good, varied and original a model is")
    evaluate.add_argument("model", metavar="MODEL", help="name or folder of a model")
    evaluate.add_argument("art", metavar="ART", help="the art it learned from: a folder or a .tar, as for train")
    flags.add_options(evaluate, EvaluateOptions)
    flags.add_sampling(evaluate)
    out = "for report.md with its pictures, and report.json (default: MODEL-report)"
    evaluate.add_argument("--out", metavar="FOLDER", help=out)
    flags.add_shared(evaluate, *flags.ADAPTED, "--device", "--quiet")
    audit = flags.add_command(commands, "audit", _audit, "find the training pictures nearest to pictures", "pictures")
    audit.add_argument("--against", metavar="ART", required=True, help="the art of the training: a folder or a .tar")
    flags.add_options(audit, AuditOptions)
    flags.add_shared(audit, *flags.MODEL, *flags.OUTPUT)
    help = "map where a model finds a picture unusual, in bits"
    surprise = flags.add_command(commands, "surprise", _surprise, help, "pictures", *flags.MODEL, *flags.OUTPUT)
    surprise.add_argument("--label", metavar="NAME", help="what it is, one of the model's labels (default: unknown)")
    flags.add_options(surprise, SurpriseOptions)


def _evaluate(args: argparse.Namespace) -> None:
    options, sampling = flags.options_of(args, EvaluateOptions), flags.sampling_of(args)
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
    flags.check_art(args.against)
    sources = flags.pictures_of(args)
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
    sources = flags.pictures_of(args)
    output = plan_output(args.out, len(sources))
    model = flags.load_model(args)
    label = model.label_number(args.label)
    from igpt.evaluation.surprise import surprise_map
    from tokenizer_vq.images import open_picture

    for source in sources:
        found = surprise_map(model, open_picture(source), label, options)
        path = write_picture(found.sheet, output.picture(f"{source.stem}-surprise"), force=args.force)
        if not args.quiet:
            print(f"{source}: {found.sentence}", file=sys.stderr)
        print(path, flush=True)
