"""Commands that learn from art."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from igpt.config import DEFAULT_MODEL
from igpt.files import check_writable
from igpt.siblings import sibling

from .flags import add_command, add_identity, add_options, add_threads, check_art, options_of

STAGES = ("tokenizer", "decoder", "gpt")


def add_to(commands: Any) -> None:
    """All commands of this file."""
    _add_train(commands)
    _add_finetune(commands)


def _add_train(commands: Any) -> None:
    parser = add_command(commands, "train", _train, "learn a model from a folder of art: the tokenizer, then the GPT")
    parser.usage = "igpt train [tokenizer | decoder | gpt] ART --out MODEL [options]"
    parser.epilog = (
        "The word tokenizer, decoder or gpt right after train does that stage only; decoder goes on with that of "
        "--tokenizer, whose codes and GPT stay. Started again, it goes on."
    )
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    art = "a folder whose sub-folders are labels, an archive like it, or several: 'shard-{0000..0009}.tar'"
    parser.add_argument("art", metavar="ART", help=art)
    parser.add_argument("--out", metavar="MODEL", required=True, help="the folder of the new model")
    add_threads(parser)
    add_identity(parser)
    add_options(parser, sibling("train.options").TrainOptions)


def _train(args: argparse.Namespace) -> None:
    check_art(args.art)
    options = options_of(args, sibling("train.options").TrainOptions)
    options.check()
    check_writable(args.out)
    print(sibling("train.run").train(args.stage, args.art, Path(args.out), options))


def _add_finetune(commands: Any) -> None:
    parser = add_command(commands, "finetune", _finetune, "teach a model the pictures of a folder of your own")
    parser.epilog = "Started again with the same words, it goes on. Ctrl-C leaves a model of the best so far."
    parser.add_argument(
        "art", metavar="ART", help="a folder of pictures, sub-folders are labels, or an archive like it"
    )
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the folder of the new model")
    base = f"name or folder of the model to start from (default: {DEFAULT_MODEL})"
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help=base)
    add_threads(parser)
    add_identity(parser)
    add_options(parser, sibling("train.options").TuneOptions)


def _finetune(args: argparse.Namespace) -> None:
    check_art(args.art)
    options = options_of(args, sibling("train.options").TuneOptions)
    options.check()
    check_writable(args.out)
    print(sibling("train.finetune").finetune(args.art, args.out, args.model, options))
