"""The pictures of a model's card, uncurated: a few labels large, every label with eight seeds, reconstructions.

Writes sheet.png, labels.jpg and reconstructions.png into the folder of the model, or into --out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL.Image import Image

from igpt import checkpoint
from igpt.config import DEFAULT_MODEL, NO_LABEL
from igpt.image_gpt import ImageGPT
from igpt.sheet import equal_sheet
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.images import fit_cover, to_tensor

FEW = (
    "ukiyo_e", "claude_monet", "chinese_landscape", "titian", "botanical_illustration", "gustave_dore",
    "watercolour_britain", "j_m_w_turner",
)  # fmt: skip
SEEDS = 8
LARGE, SMALL = 160, 112  # pixels of a picture on a sheet


def drawn(model: ImageGPT, labels: list[str], seeds: int) -> list[list[tuple[Image, str]]]:
    """A row of pictures a label, seeds from 0, each under the name of its label."""
    size = int(model.native_cells**0.5) * model.downsample
    return [[(picture, label) for picture in model.generate(n=seeds, size=size, label=label)] for label in labels]


def reconstructed(model: ImageGPT, art: ArtFolder) -> list[list[tuple[Image, str]]]:
    """Eight held-out pictures from all over the collection, and below them what the tokenizer leaves of them."""
    size, held_out = int(model.native_cells**0.5) * model.downsample, art.split()[1]
    chosen = [fit_cover(art.picture(i), size, size) for i in held_out[:: len(held_out) // SEEDS][:SEEDS]]
    with torch.inference_mode():
        painted = [model.decode(model.tokenizer.encode(to_tensor(picture)[None]))[0] for picture in chosen]
    return [[(picture, "") for picture in row] for row in (chosen, painted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, out = ImageGPT.load(args.model), args.out or checkpoint.find(args.model)
    rows = drawn(model, [label for label in FEW if label in model.labels], SEEDS // 2)
    columns = [list(column) for column in zip(*rows, strict=True)]
    equal_sheet(columns, LARGE).save(out / "sheet.png", optimize=True)
    art = ArtFolder(args.art, manifest=args.manifest)
    equal_sheet(reconstructed(model, art), 256).save(out / "reconstructions.png")
    equal_sheet(drawn(model, [*model.labels, NO_LABEL], SEEDS), SMALL).save(out / "labels.jpg", quality=85)


if __name__ == "__main__":
    main()
