"""Is it a copy? The nearest training pictures in three spaces, and what that distance is for pictures never seen.

Notable choices:
- every training picture is looked at in its square crops (both ends and the middle of its long side), every picture in
  question also mirrored, so a shifted or mirrored copy is still found;
- held-out pictures are the measure: how near does art of this kind come to the training set without having seen it?
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from igpt.bundle import Bundle
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover

from .features import Extractor, MetricSpace
from .options import AuditOptions

NEARLY_SQUARE = 1.1  # up to this aspect the crops of a picture would be the same picture
SAME = 1e-3  # distances up to here are those of a copy: mirrored and resampled, a few pixels are rounded otherwise
PERCENTILE = 0.01  # of the held-out pictures' distances: what is nearer counts as copied
THUMBNAIL = 16  # pixels a side of the pictures that are compared pixel by pixel
QUERIES = 16  # pictures that are compared with all training pictures at once


def metric_spaces(model: Bundle, net: MetricSpace) -> list[MetricSpace]:
    """The tokens of pictures of native size, their pixels, and their features by a net."""
    (side, _), encode = model.grids.native_size, model.tokenizer.encode
    return [
        # Tokens are whole numbers below 65536, which survive as floats.
        MetricSpace("tokens", side, model.weights_hash, lambda x_BCHW: encode(x_BCHW).flatten(1).float(), "tokens"),
        MetricSpace(f"pixels {THUMBNAIL}x{THUMBNAIL}", THUMBNAIL, "none", lambda x_BCHW: x_BCHW.flatten(1), "pixels"),
        net,
    ]


# Pictures


class SplitArt(NamedTuple):
    """A collection, and which of its pictures are looked at."""

    art: ArtFolder
    train: list[int]
    val: list[int]  # pictures that the model did not learn from

    @classmethod
    def of(cls, path: str | Path, options: AuditOptions, rng: random.Random) -> SplitArt:
        """The collection at `path`. Raises UserError where it cannot be used or no picture is for training."""
        art = ArtFolder(path, manifest=options.manifest)
        train, val = art.split()
        if not train:
            raise UserError(f"no picture of {path} is for training, so nothing can be compared; see the manifest")
        limit = options.limit or len(art)
        return cls(art, *(sorted(rng.sample(part, min(limit, len(part)))) for part in (train, val)))

    def key(self, indices: Sequence[int], how: str) -> str:
        """Under which vectors of some of its pictures are kept."""
        return f"{self.art.fingerprint}/{how}/{list(indices)}"


def crops(picture: Image.Image, side: int) -> list[Image.Image]:
    """The middle square of a picture, and where it is longer than wide the squares at its two ends, each `side`."""
    ends = (picture.resize((side, side), Image.Resampling.LANCZOS, box) for box in end_squares(*picture.size))
    return [fit_cover(picture, side, side), *ends]


def end_squares(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Boxes of the squares at the two ends; none where they would be the same picture."""
    short = min(width, height)
    if max(width, height) <= NEARLY_SQUARE * short:
        return []
    return [(0, 0, short, short), (width - short, height - short, width, height)]


# The comparison


class Compared(NamedTuple):
    """Pictures and their nearest training pictures, the nearest first."""

    vectors_QD: Tensor  # of the pictures as they are, unmirrored
    distance_QK: Tensor  # float64
    crop_QK: Tensor  # which crop of each training picture is nearest: an index of `Baseline.crops`


class Baseline:
    """The training pictures in one space, and how near pictures come to them that nobody has learned from."""

    def __init__(self, space: MetricSpace, split: SplitArt, side: int, extract: Extractor):
        """All is compared in squares of `side` pixels. Raises UserError where features are NaN or infinite."""
        self.space, self.art, self.side, self.extract = space, split.art, side, extract
        self.crops = [(i, crop) for i in split.train for crop in range(1 + len(end_squares(*self.art.sizes[i])))]
        squares = (square for i in split.train for square in crops(self.art.picture(i), side))
        key = split.key(split.train, f"crops of {side}")
        self.train_ND = extract(space, squares, len(self.crops), "training", key)
        pictures, key = (self.art.picture(i) for i in split.val), split.key(split.val, f"mirrored squares of {side}")
        self.val = self.compare(pictures, len(split.val), what="held-out", key=key)
        self.val_N = self.val.distance_QK[:, 0]

    def compare(
        self, pictures: Iterable[Image.Image], count: int, k: int = 1, what: str = "pictures", key: str = ""
    ) -> Compared:
        """The middle squares of `count` pictures with all training pictures; the nearer of two mirror images counts.

        They become squares of the native side first, as the crops of training pictures do: resampled otherwise, copies
        would not be quite the same.
        """
        squares = (fit_cover(picture, self.side, self.side) for picture in pictures)
        views = (view for square in squares for view in (square, ImageOps.mirror(square)))
        vectors_MD = self.extract(self.space, views, 2 * count, what, key)
        vectors_Q2D = vectors_MD.view(count, 2, vectors_MD.shape[1])
        owners = [picture for picture, _ in self.crops]
        return Compared(vectors_Q2D[:, 0], *nearest(self.space, vectors_Q2D, self.train_ND, owners, k))

    def crop(self, index: int) -> Image.Image:
        """One of `crops` as a picture."""
        picture, crop = self.crops[index]
        return crops(self.art.picture(picture), self.side)[crop]


def nearest(
    space: MetricSpace, queries_Q2D: Tensor, train_ND: Tensor, owners: Sequence[int], k: int
) -> tuple[Tensor, Tensor]:
    """Distances [Q, k], ascending, and rows [Q, k] of `train_ND`, each of another owner; fewer if there are fewer.
    Raises UserError where features are NaN or infinite."""
    if not bool(train_ND.isfinite().all() and queries_Q2D.isfinite().all()):
        raise UserError(f"some features hold NaN or infinity ({space.name})")
    k = min(k, len(set(owners)))
    distances, rows = [torch.zeros(0, k, dtype=torch.float64)], [torch.zeros(0, k, dtype=torch.long)]
    queries_MD, train_ND = space.scaled(queries_Q2D.flatten(0, 1)), space.scaled(train_ND)
    for start in range(0, len(queries_MD), 2 * QUERIES):
        distance_MN = space.distances(queries_MD[start : start + 2 * QUERIES], train_ND)
        distance_QN = distance_MN.view(-1, 2, len(train_ND)).amin(1)
        chosen = []
        for near in distance_QN.topk(min(3 * k, len(train_ND)), largest=False).indices.tolist():
            first: dict[int, int] = {}  # the nearest row of each owner, who has three at most
            for row in near:
                first.setdefault(owners[row], row)
            chosen.append(list(first.values())[:k])
        rows.append(torch.tensor(chosen))
        distances.append(distance_QN.gather(1, rows[-1]))
    return torch.cat(distances), torch.cat(rows)


# What it comes to


def copied(distance_N: Tensor, val_M: Tensor) -> Tensor:
    """Which pictures, bool [N], lie nearer to the training set than one in a hundred held-out ones, or are the same.
    Raises UserError where none is held out."""
    if not len(val_M):
        raise UserError("no picture is held out, so nothing says how near is too near")
    return (distance_N < float(val_M.double().quantile(PERCENTILE))) | (distance_N <= SAME)


def novelty(distance_N: Tensor, val_M: Tensor) -> float:
    """Median distance to the nearest training picture, in units of that of held-out pictures: 0 for copies, 1 for what
    is as new as unseen art. Raises UserError where no picture is held out, or all of them are copies themselves."""
    if not len(val_M) or not len(distance_N):
        raise UserError("novelty wants one picture or more, and one held out")
    usual = float(val_M.median())
    if usual <= SAME:
        raise UserError("most held-out pictures are in the training set too, so novelty has no measure")
    return float(distance_N.median()) / usual
