"""What each way of drawing gives: KID of drawn pictures against real ones, one setting changed at a time.

No times. All settings draw the same labels with the same seeds, so that the rows of a table differ by the setting and
not by luck; the last digit of KID is still noise with a hundred pictures. Names of settings are those of
`SamplingOptions`: `--settings guidance=2 top_p=1,guidance=2` tries two; without it one of each kind is tried.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from PIL.Image import Image

from igpt.config import DEFAULT_MODEL, SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.sampling import draw, generators
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.images import fit_cover
from train import features, fidelity
from train.features import FeatureCache, extract

TRIED = (
    "guidance=1", "guidance=2", "guidance=4", "guidance=9", "top_p=0.9", "top_p=1", "temperature=0.9",
    "temperature=1.1", "steps=8", "steps=32", "steps=64", "steps=256", "order=spread", "order=raster",
)  # fmt: skip
REFERENCE = 400  # real pictures compared with, at most


def parsed(setting: str) -> SamplingOptions:
    """The defaults with what `setting` changes: "top_p=1,guidance=2"."""
    kinds = {field.name: type(field.default) for field in fields(SamplingOptions)}
    given = dict(part.split("=", 1) for part in setting.split(",") if part)
    options = replace(SamplingOptions(), **{name: kinds[name](value) for name, value in given.items()})  # type: ignore[arg-type]
    options.check()
    return options


def drawn(model: ImageGPT, labels: list[int], options: SamplingOptions, batch: int) -> Iterator[Image]:
    """One picture a label, of the model's native size; picture i has seed i."""
    side = int(model.native_cells**0.5)
    for first in range(0, len(labels), batch):
        labels_B = torch.tensor(labels[first : first + batch])
        *_, last = draw(model.gpt, labels_B, (side, side), options, generators(first, len(labels_B)))
        yield from model.decode(last.tokens_Bhw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--features", required=True, help="folder with feature nets")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="of drawing on a CPU")
    parser.add_argument("--settings", nargs="*", default=["", *TRIED])
    args = parser.parse_args()
    bf16 = {"auto": None, "fp32": False, "bf16": True}[args.precision]
    model, art = ImageGPT.load(args.model, bf16=bf16), ArtFolder(args.art, manifest=args.manifest)
    side = int(model.native_cells**0.5) * model.downsample
    nets = features.nets(args.features, model.tokenizer, side, model.weights_hash)[:2]
    pictures = random.Random(0).sample(range(len(art)), min(len(art), args.samples + REFERENCE))
    labels = [model.labels.index(art.labels[art.label_of[i]]) for i in pictures[: args.samples]]
    groups_N = torch.tensor(labels)

    def vectors(
        images: Iterator[Image], count: int, net: features.FeatureNet, cache: FeatureCache | None
    ) -> torch.Tensor:
        return extract(net, images, count, device=model.device, cache=cache, quiet=True, what="")

    real = []
    for net in nets:
        squares = (fit_cover(art.picture(i), side, side) for i in pictures[args.samples :])
        real.append(vectors(squares, len(pictures) - args.samples, net, FeatureCache.of(net)))
    columns = [f"KID, {net.name}" for net in nets] + ["variety within a label", "precision", "coverage"]
    print(f"{args.samples} pictures\nsetting | {' | '.join(columns)}")
    for setting in args.settings:
        images = list(drawn(model, labels, parsed(setting), batch=8))
        found = [vectors(iter(images), len(images), net, None) for net in nets]
        kids = [fidelity.kid(*pair).mean for pair in zip(real, found, strict=True)]
        near = fidelity.neighbourhoods(real[0], found[0])  # like variety, in the first features
        row = (*kids, fidelity.spread_within(found[0], groups_N), near.precision, near.coverage)
        print(" | ".join((setting or "defaults", *(f"{value:.4g}" for value in row))), flush=True)


if __name__ == "__main__":
    main()
