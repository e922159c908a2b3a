"""What the sprites of a palette model are worth, beside real tiles: legible labels, copies, bits a pixel, seconds.

TILES is a .npz with the tiles in the model's colours: t [N, H, W], y [N] label numbers, val [N] the held-out ones.
`--sheet FILE` also shows the drawn sprites that come nearest to a training tile, each beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import igpt
from igpt.image_gpt import ImageGPT
from igpt.likelihood import bits_per_token
from igpt.sheet import sheet
from igpt.sprites import enlarged
from tokenizer_vq.palette import PaletteTokenizer

SHIFT = 2  # pixels to every side by which a copy may be moved
SAME = 0.95  # share of the pixels that a copy shares with a training tile
PAIRS = 12  # nearest pairs shown
Tiles = NDArray[np.uint8]


def features(tiles_NHW: Tiles, colours_K3: NDArray[np.float64], ground: int) -> NDArray[np.float64]:
    """Mean colours of 8x8 places, where the ground is, and how often each colour occurs."""
    pixels = colours_K3[tiles_NHW] / 255
    clear = (tiles_NHW == ground)[..., None].astype(float)
    side = tiles_NHW.shape[1] // 8
    places = np.concatenate([pixels, clear], -1).reshape(len(tiles_NHW), 8, side, 8, side, 4).mean((2, 4))
    counts = np.stack([(tiles_NHW == k).mean((1, 2)) for k in range(len(colours_K3))], 1)
    return np.concatenate([places.reshape(len(places), -1), np.sqrt(counts)], 1)


def nearest(
    drawn_NHW: Tiles, tiles_NHW: Tiles, ground: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[int]]:
    """For each sprite the largest share of its pixels that a tile shares, over shifts and mirror images: of all pixels,
    and of those that are not ground in both; and that tile."""
    size = tiles_NHW.shape[1]
    padded = np.pad(tiles_NHW, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)), constant_values=ground)
    steps = range(2 * SHIFT + 1)
    moved = [padded[:, y : y + size, x : x + size].reshape(len(padded), -1) for y in steps for x in steps]
    clear = [others == ground for others in moved]
    shares, inner, which = [], [], []
    for sprite in drawn_NHW:
        best = (-1.0, 0.0, 0)
        for one in (sprite.ravel(), sprite[:, ::-1].ravel()):
            for others, empty in zip(moved, clear, strict=True):
                same = np.count_nonzero(others == one, axis=1)
                both = np.count_nonzero(empty[:, one == ground], axis=1)
                score = (same - both) / np.maximum(size * size - both, 1)
                tile = int(score.argmax())
                best = max(best, (float(score[tile]), float(same[tile]) / size**2, tile))
        inner.append(best[0])
        shares.append(best[1])
        which.append(best[2])
    return np.array(shares), np.array(inner), which


def palette_of(model: ImageGPT) -> NDArray[np.uint8]:
    """Its colours, [K, 3]."""
    assert isinstance(model.tokenizer, PaletteTokenizer), "this is for a model of which a token is a pixel"
    return model.tokenizer.palette_K3.numpy()


def tokens_of(model: ImageGPT, pictures: list[Image.Image]) -> Tiles:
    """Pictures in the model's colours, [N, H, W]."""
    colours = {tuple(value): k for k, value in enumerate(palette_of(model).tolist())}
    rows = [[colours[tuple(pixel)] for pixel in np.asarray(p.convert("RGB")).reshape(-1, 3).tolist()] for p in pictures]
    return np.array(rows, dtype=np.uint8).reshape(len(pictures), pictures[0].height, pictures[0].width)


def report(name: str, tiles: Tiles, labels: list[int], classifier: Any, vectors: NDArray[np.float64]) -> None:
    """How often the label is named right, and among the first three."""
    scores = classifier.predict_proba(vectors)
    order = scores.argsort(1)[:, ::-1]
    first = np.mean([labels[i] == classifier.classes_[order[i, 0]] for i in range(len(labels))])
    third = np.mean([labels[i] in classifier.classes_[order[i, :3]] for i in range(len(labels))])
    print(f"| label named right, {name} ({len(tiles)}) | {first:.3f}, among three {third:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiles", type=Path)
    parser.add_argument("--model", default="pixels")
    parser.add_argument("--each", type=int, default=16, help="sprites of each label (default: %(default)s)")
    parser.add_argument("--sheet", type=Path)
    parser.add_argument("--seconds", action="store_true", help="only time 1, 16 and 256 sprites")
    args = parser.parse_args()
    model = igpt.load(args.model)
    if args.seconds:
        model.generate(n=1, seed=0)
        for n in (1, 16, 256):
            began = time.perf_counter()
            model.generate(n=n, seed=1)
            print(f"| seconds for {n} sprites | {time.perf_counter() - began:.2f} |", flush=True)
        return
    data = np.load(args.tiles)
    tiles, labels, val = data["t"], data["y"].astype(int), data["val"].astype(bool)
    colours = palette_of(model).astype(float)
    ground = len(colours) - 1
    with torch.inference_mode():
        held = torch.from_numpy(tiles[val]).long()
        bits = torch.cat(
            [
                bits_per_token(model.gpt, held[i : i + 16], torch.tensor(labels[val][i : i + 16])).flatten()
                for i in range(0, len(held), 16)
            ]
        )
    print(f"| bits a pixel, {len(held)} held-out tiles | {float(bits.mean()):.3f} |", flush=True)
    asked = [k for k in range(len(model.labels)) for _ in range(args.each)]
    drawn = tokens_of(
        model, [p for k, label in enumerate(model.labels) for p in model.generate(args.each, label=label, seed=0)]
    )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    classifier.fit(features(tiles[~val], colours, ground), labels[~val])
    report("held-out tiles", held.numpy(), labels[val].tolist(), classifier, features(tiles[val], colours, ground))
    report("drawn", drawn, asked, classifier, features(drawn, colours, ground))
    well = [model.labels.index(label) for label in model.default_labels]
    chosen = [i for i, k in enumerate(asked) if k in well]
    report(
        "drawn, of the labels drawn by default",
        drawn[chosen],
        [asked[i] for i in chosen],
        classifier,
        features(drawn[chosen], colours, ground),
    )
    for name, group in (("drawn", drawn), ("held-out tiles", tiles[val])):
        shares, inner, which = nearest(group, tiles[~val], ground)
        print(f"| {name} with {SAME:.0%} of the pixels of a training tile | {(shares >= SAME).mean():.3%} |")
        print(f"| ... of the pixels that are not ground in both | {(inner >= SAME).mean():.3%} |", flush=True)
        if name == "drawn" and args.sheet:
            show = np.argsort(-inner)[:PAIRS]
            values = palette_of(model)
            named = [(values[drawn[i]], f"drawn: {model.labels[asked[i]]}") for i in show]
            beside = [(values[tiles[~val][which[i]]], f"tile, {inner[i]:.0%} the same") for i in show]
            rows = [[(enlarged(Image.fromarray(tile), 4), text) for tile, text in row] for row in (named, beside)]
            half = PAIRS // 2
            sheet([rows[0][:half], rows[1][:half], rows[0][half:], rows[1][half:]]).save(args.sheet)


if __name__ == "__main__":
    main()
