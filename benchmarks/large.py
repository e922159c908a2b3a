"""Is a large picture better than an enlargement? KID of its crops against those of its enlarged composition. No times.

Every picture is drawn at `--size` and, from the same seed, at native size and enlarged by Lanczos; both are cut into
squares of the native size and compared with decoded training pictures (TOKENS as in `benchmarks.settings`).
"""

from __future__ import annotations

import argparse
import random
from itertools import islice
from pathlib import Path

from PIL.Image import Image, Resampling

from benchmarks.settings import Judge, decoded, print_row
from igpt.config import DEFAULT_MODEL
from igpt.image_gpt import ImageGPT
from igpt.sheet import sheet
from train.shards import TokenShards


def squares(picture: Image, side: int) -> list[Image]:
    """All squares of a grid over the picture."""
    places = [(x, y) for y in range(0, picture.height, side) for x in range(0, picture.width, side)]
    return [picture.crop((x, y, x + side, y + side)) for x, y in places]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path, metavar="TOKENS")
    parser.add_argument("--features", required=True, help="folder with feature nets")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("-n", type=int, default=24, help="how many pictures (default: %(default)s)")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="also write enlarged and drawn pictures side by side here")
    args = parser.parse_args()
    model, cache = ImageGPT.load(args.model, "cpu"), TokenShards(args.tokens)
    judge, (side, _) = Judge(args.features, model), model.grids.native_size
    large: list[Image] = []
    enlarged: list[Image] = []
    for seed in range(args.n):
        (fine,), (small,) = (model.generate(size=size, seed=seed) for size in (args.size, side))
        coarse = small.resize(fine.size, Resampling.LANCZOS)
        large += squares(fine, side)
        enlarged += squares(coarse, side)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            sheet([[(coarse, "enlarged"), (fine, "drawn")]]).save(args.out / f"{seed}.png")
    pictures = random.Random(0).sample(range(len(cache)), len(cache))
    real = judge.look(islice(decoded(model, cache, pictures), 512))
    print(f"{len(large)} squares of {side} px\npictures | {' | '.join(judge.columns)}")
    print_row("drawn", judge.row(real, judge.look(large)))
    print_row("enlarged", judge.row(real, judge.look(enlarged)))


if __name__ == "__main__":
    main()
