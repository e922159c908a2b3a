"""How visible are the borders of the windows in which large pictures are refined? Prints a ratio, no times.

Gradient energy across the lines where one window's core ends and the next begins, over that elsewhere, averaged over
pictures of many labels; 1 is invisible. The second number compares with borders of cells only, as every border of a
window is one, and the tokenizer may show its tokens. The third is the second for the lines two cells beside these,
where no seam can be: pictures have more in their middle than at their edges, and more on every other border, where
cells of the composition met. It is not 1 either; a seam is what the second has above it. For textures the lines are
the edges, where two copies meet.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

import igpt
from igpt.sizes import parse_size
from igpt.tiling import cores, window_for
from tokenizer_vq.images import to_tensor


def seam_ratio(image_CHW: Tensor, columns: Sequence[int], rows: Sequence[int], every: int = 1) -> float:
    """How visible lines between windows are: gradient energy across them over that elsewhere; 1 is invisible.

    A line at x lies between the pixels x - 1 and x; 0 is the seam between the two ends of a texture. "Elsewhere" are
    all other places that are a multiple of `every`: give the side of a token to compare with borders of tokens only.
    """
    on: list[Tensor] = []
    off: list[Tensor] = []
    for axis, lines in ((2, columns), (1, rows)):
        energy = (image_CHW - image_CHW.roll(1, axis)).square().mean((0, 3 - axis))
        places = torch.arange(0, len(energy), every)
        chosen = torch.zeros(len(energy), dtype=torch.bool)
        chosen[list(lines)] = True
        on.append(energy[chosen])
        off.append(energy[places[(~chosen[places]) & (places > 0)]])
    return float(torch.cat(on).mean() / torch.cat(off).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=20, help="how many pictures (default: %(default)s)")
    parser.add_argument("--size", default="512", help="in pixels, multiples of the token's (default: %(default)s)")
    parser.add_argument("--tile", action="store_true", help="textures, and the seam between two copies of one")
    parser.add_argument("--model", default=igpt.config.DEFAULT_MODEL, help="a model (default: %(default)s)")
    args = parser.parse_args()

    model, size = igpt.load(args.model), parse_size(args.size)
    token, (h, w) = model.downsample, model.grids.pyramid(*size)[-1]
    if (w * token, h * token) != size:
        raise SystemExit(f"{args.size} is not drawn pixel by pixel; {w * token}x{h * token} would be")
    cell, side = model.gpt.config.cell, model.gpt.config.cell * token
    cells = h // cell, w // cell
    shape = window_for(*cells, math.isqrt(model.gpt.config.cells))
    inner = [[core for _, core in cores(*pair, False)] for pair in zip(cells, shape, strict=True)]
    rows, columns = ([core.start * side for core in axis[1:]] for axis in inner)
    beside = [[core.start * side + d * side for core in axis[1:] for d in (-2, 2)] for axis in inner]
    if args.tile:
        rows, columns, beside = [0], [0], [[], []]
    found = []
    for seed in range(args.n):
        label = model.labels[seed % len(model.labels)] if model.labels else None
        (picture,) = model.generate(size=size, label=label, seed=seed, tile=args.tile)
        image_CHW = to_tensor(picture)
        found.append([seam_ratio(image_CHW, columns, rows, every) for every in (1, side)])
        if any(beside):
            found[-1].append(seam_ratio(image_CHW, beside[1], beside[0], side))
        print(f"{label or 'no label'}, seed {seed}: " + ", ".join(f"{ratio:.3f}" for ratio in found[-1]), flush=True)
    means = [sum(column) / len(column) for column in zip(*found, strict=True)]
    print(f"mean of {args.n}: " + ", ".join(f"{ratio:.3f}" for ratio in means))


if __name__ == "__main__":
    main()
