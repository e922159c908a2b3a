"""The pictures of a model's card, uncurated: a few labels large, every label with eight seeds, reconstructions.

Writes sheet.jpg and labels.jpg into the folder of the model, or into --out; with ART also reconstructions.jpg, of
pictures that are held out there.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL.Image import Image, Resampling

from igpt import checkpoint
from igpt.config import DEFAULT_MODEL
from igpt.image_gpt import ImageGPT
from igpt.sheet import Row, sheet
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover, to_tensor

SEEDS = 8
LARGE, SMALL = 192, 112  # pixels of a picture on a sheet


def equal_sheet(rows: Sequence[Row], side: int) -> Image:
    """A sheet of the middles of pictures in squares of one size in pixels."""
    return sheet([[(fit_cover(picture, side, side), caption) for picture, caption in row] for row in rows])


def spread(labels: list[str], count: int) -> list[str]:
    """`count` labels from all over the list."""
    return [labels[i * len(labels) // count] for i in range(min(count, len(labels)))]


def drawn(model: ImageGPT, labels: list[str], seeds: int, side: int) -> list[list[tuple[Image, str]]]:
    """A row of pictures a label, seeds from 0, each under the name of its label; sprites enlarged by whole pixels."""
    rows = []
    for label in labels:
        pictures = model.generate(n=seeds, label=label)
        if model.downsample == 1:
            times = side // pictures[0].width
            pictures = [p.resize((p.width * times, p.height * times), Resampling.NEAREST) for p in pictures]
        rows.append([(picture, label) for picture in pictures])
    return rows


def reconstructed(model: ImageGPT, art: ArtFolder) -> list[list[tuple[Image, str]]]:
    """Eight held-out pictures from all over the collection, and below them what the tokenizer leaves of them."""
    (size, _), held_out = model.grids.native_size, art.split()[1]
    chosen = [fit_cover(art.picture(i), size, size) for i in held_out[:: len(held_out) // SEEDS][:SEEDS]]
    with torch.inference_mode():
        decoded = [model.decode(model.tokenizer.encode(to_tensor(picture)[None]))[0] for picture in chosen]
    return [[(picture, "") for picture in row] for row in (chosen, decoded)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path, nargs="?")
    parser.add_argument("--manifest")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, out = ImageGPT.load(args.model), args.out or checkpoint.find(args.model)
    few = spread(model.default_labels, SEEDS)
    columns = [list(column) for column in zip(*drawn(model, few, SEEDS // 2, LARGE), strict=True)]
    page = sheet(columns) if model.downsample == 1 else equal_sheet(columns, LARGE)
    page.save(out / "sheet.jpg", quality=88)
    if args.art:
        art = ArtFolder(args.art, manifest=args.manifest)
        equal_sheet(reconstructed(model, art), 256).save(out / "reconstructions.jpg", quality=90)
    rows = drawn(model, model.labels, SEEDS, SMALL)
    page = sheet(rows) if model.downsample == 1 else equal_sheet(rows, SMALL)
    page.save(out / "labels.jpg", quality=85)


if __name__ == "__main__":
    main()
