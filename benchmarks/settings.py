"""How well each way of drawing, or each label, comes out: distances between drawn and decoded training pictures.

TOKENS is the folder that a training left (`training/tokens` in the model folder): decoded, its pictures are what a
perfect GPT would draw, so the loss of the tokenizer is left out. All settings draw the same labels, as often as the
training has them, with the same seeds; the row "training" compares other training pictures. Names of settings are those
of `SamplingOptions`: `--settings guidance=5 steps=32,top_p=1` tries two. With `--by-label N` every label is drawn N
times in the default way and compared with decoded pictures of its own. No times.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from igpt.config import DEFAULT_MODEL, SamplingOptions
from igpt.evaluation.features import feature_space
from igpt.evaluation.metrics import kid, neighbourhoods
from igpt.image_gpt import ImageGPT
from igpt.sampling import generators, sample
from train.shards import TokenShards

TRIED = ("", "steps=8", "steps=32", "guidance=1.5", "guidance=5", "top_p=0.9", "temperature=0.9")
BATCH = 16


def parsed(setting: str) -> SamplingOptions:
    """The defaults with what `setting` changes: "top_p=1,guidance=2"."""
    kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(SamplingOptions)}
    given = dict(part.split("=", 1) for part in setting.split(",") if part)
    options = replace(SamplingOptions(), **{name: kinds[name](value) for name, value in given.items()})
    options.check()
    return options


def drawn(model: ImageGPT, labels: list[int], options: SamplingOptions) -> Iterator[Image]:
    """One picture a label, of the model's native size; picture i has seed i."""
    for first in range(0, len(labels), BATCH):
        labels_B = torch.tensor(labels[first : first + BATCH])
        *_, last = sample(model.gpt, labels_B, model.grids.native, options, generators(first, len(labels_B)))
        yield from model.decode(last.tokens_Bhw)


def decoded(model: ImageGPT, cache: TokenShards, pictures: Iterable[int]) -> Iterator[Image]:
    """The middle of training pictures, through the decoder; too small ones are left out."""
    side, _ = model.grids.native
    for picture in pictures:
        grid_hw = cache.grid(picture, 0)
        top, left = (grid_hw.shape[0] - side) // 2, (grid_hw.shape[1] - side) // 2
        if min(top, left) >= 0:
            yield from model.decode(grid_hw[None, top : top + side, left : left + side])


class Judge:
    """A net, and what it sees of pictures."""

    def __init__(self, folder: str, model: ImageGPT):
        self.net = feature_space(folder, model)
        self.columns = [f"KID, {self.net.name}", "precision", "recall", "coverage"]

    def look(self, images: Iterable[Image]) -> Tensor:
        """Features [N, D]."""
        kept = list(images)
        return self.net.extract(kept, len(kept), quiet=True)

    def row(self, real: Tensor, found: Tensor) -> list[float]:
        """The numbers of `columns`."""
        near = neighbourhoods(real, found)
        return [kid(real, found), *(near[name] for name in ("precision", "recall", "coverage"))]


def compare_settings(model: ImageGPT, cache: TokenShards, judge: Judge, samples: int, settings: list[str]) -> None:
    """A row a setting."""
    pictures = random.Random(0).sample(range(len(cache)), min(len(cache), 4 * samples))
    stream = decoded(model, cache, pictures[samples:])
    real, others = (judge.look(islice(stream, samples)) for _ in range(2))
    labels = [cache.label(i) for i in pictures[:samples]]
    print(f"{samples} pictures a side\nsetting | {' | '.join(judge.columns)}")
    print_row("training", judge.row(real, others))
    for setting in settings:
        print_row(setting or "defaults", judge.row(real, judge.look(drawn(model, labels, parsed(setting)))))


def compare_labels(model: ImageGPT, cache: TokenShards, judge: Judge, each: int) -> None:
    """A row a label."""
    print(f"{each} drawn pictures a label\nlabel | {' | '.join(judge.columns)} | training pictures")
    for label, name in enumerate(model.labels):
        own = [i for i in range(len(cache)) if cache.label(i) == label]
        random.Random(0).shuffle(own)
        real = judge.look(islice(decoded(model, cache, own), each))
        print_row(name, [*judge.row(real, judge.look(drawn(model, [label] * each, SamplingOptions()))), len(own)])


def print_row(name: str, values: list[float]) -> None:
    print(" | ".join((name, *(f"{value:.4g}" for value in values))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, metavar="TOKENS")
    parser.add_argument("--features", required=True, help="folder with feature nets")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--settings", nargs="*", default=list(TRIED))
    parser.add_argument("--by-label", type=int, metavar="N", help="compare labels instead, N pictures each")
    args = parser.parse_args()
    model, cache = ImageGPT.load(args.model, "cpu"), TokenShards(args.tokens)
    judge = Judge(args.features, model)
    if args.by_label:
        compare_labels(model, cache, judge, args.by_label)
    else:
        compare_settings(model, cache, judge, args.samples, args.settings)


if __name__ == "__main__":
    main()
