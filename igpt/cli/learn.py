"""Commands that learn from art."""

from __future__ import annotations

import argparse
from typing import Any

from igpt.config import DEFAULT_MODEL
from igpt.files import check_writable
from igpt.siblings import sibling

from .flags import Parser, add_command, add_options, add_shared, check_art, options_of


def add_to(commands: Any) -> None:
    """All commands of this file."""
    options = sibling("train.options")
    train = _add(commands, "train", options.TrainOptions, "learn a model from art: the tokenizer, then the GPT")
    train.epilog = "Started again with the same words, it goes on."
    tune = _add(commands, "finetune", options.TuneOptions, "teach a model the pictures of a folder of your own")
    tune.epilog = "Started again with the same words, it goes on. Ctrl-C leaves a model of the best so far."
    tune.add_argument("--model", default=DEFAULT_MODEL, metavar="MODEL", help="name or folder of the model to bend")


def _add(commands: Any, name: str, options: type[Any], help: str) -> Parser:
    parser = add_command(commands, name, _learn, help)
    parser.set_defaults(options=options)
    art = "a folder of pictures whose sub-folders are labels, or an archive like it"
    several = "; or several: 'shard-{0000..0009}.tar'" if name == "train" else ""
    parser.add_argument("art", metavar="ART", help=art + several)
    parser.add_argument("--out", metavar="MODEL", required=True, help="the folder of the new model")
    add_shared(parser, "--threads", "--identity")
    add_options(parser, options)
    return parser


def _learn(args: argparse.Namespace) -> None:
    check_art(args.art)
    options = options_of(args, args.options)
    check_writable(args.out)
    if "model" in args:
        print(sibling("train.finetune").finetune(args.art, args.out, args.model, options))
    else:
        print(sibling("train.run").train(args.art, args.out, options))
