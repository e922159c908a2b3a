"""Is a picture a copy? Its nearest training pictures in pixels and in features, in numbers and words (`igpt audit`).

Training pictures are compared in square crops (the middle and both ends), the others also mirrored, so that shifted and
mirrored copies are found. The baseline is how near held-out pictures come, which nobody has learned from.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from PIL import Image, ImageOps
from torch import Tensor, nn

from igpt.bundle import Bundle
from igpt.config import AuditOptions
from igpt.sheet import sheet
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover, open_picture

from .features import MetricSpace, feature_space

NEARLY_SQUARE = 1.1  # up to this aspect the crops of a picture would be the same picture
SAME = 1e-3  # distances up to here are those of a copy: mirrored and resampled, a few pixels are rounded otherwise
PERCENTILE = 0.01  # of the distances of held-out pictures: what is nearer counts as copied
THUMBNAIL = 16  # pixels a side of the pictures that are compared pixel by pixel
QUERIES = 16  # pictures that are compared with all training pictures at once
NEIGHBOURS = 3  # nearest training pictures that are found
AUDIT_TILE = (192, 192)  # pixels of a picture on its sheet, at most


def metric_spaces(model: Bundle, features: MetricSpace) -> list[MetricSpace]:
    """The pixels of small pictures, and their features."""
    return [MetricSpace(f"pixels {THUMBNAIL}x{THUMBNAIL}", THUMBNAIL, model.device, nn.Flatten(), "pixels"), features]


# Pictures


class Split(NamedTuple):
    """A collection, and which of its pictures are compared."""

    art: ArtFolder
    train: list[int]
    val: list[int]

    @classmethod
    def load(cls, path: str | Path, options: AuditOptions, rng: random.Random) -> Split:
        """The collection at `path`. Raises UserError where it cannot be used or has no training picture."""
        art = ArtFolder(path, manifest=options.manifest)
        train, val = art.split()
        if not train:
            raise UserError(f"no picture of {path} is for training, so nothing can be compared; see the manifest")
        limit = options.limit or len(art)
        return cls(art, *(sorted(rng.sample(part, min(limit, len(part)))) for part in (train, val)))


def square_boxes(width: int, height: int) -> list[tuple[float, float, float, float]]:
    """Boxes of the middle square and of those at both ends, or of the middle one alone where they nearly coincide."""
    short, x, y = min(width, height), max(0, width - height), max(0, height - width)
    offsets = [0.5, 0, 1] if max(width, height) > NEARLY_SQUARE * short else [0.5]
    return [(a * x, a * y, a * x + short, a * y + short) for a in offsets]


def square_crops(picture: Image.Image, side: int) -> list[Image.Image]:
    """The `square_boxes` of a picture, resampled to `side` pixels."""
    return [picture.resize((side, side), Image.Resampling.LANCZOS, box) for box in square_boxes(*picture.size)]


# Nearest training pictures


class Neighbours(NamedTuple):
    """The K training pictures nearest to each of Q pictures, the nearest first."""

    distance_QK: Tensor  # float64
    picture_QK: Tensor  # indices of the collection


class Baseline:
    """The training pictures in one space, and how near held-out pictures come to them. All become squares of `side`
    pixels first. Raises UserError where features are NaN or infinite."""

    def __init__(self, space: MetricSpace, split: Split, side: int, quiet: bool = False):
        self.space, self.split, self.side, self.quiet = space, split, side, quiet
        art, train, val = split
        self.owners = [i for i in train for _ in square_boxes(*art.sizes[i])]
        crops = (crop for i in train for crop in square_crops(art.picture(i), side))
        self.train_ND = space.extract(crops, len(self.owners), quiet)
        self.val_N = self.compare(map(art.picture, val), len(val)).distance_QK[:, 0]

    def compare(self, pictures: Iterable[Image.Image], count: int) -> Neighbours:
        """The training pictures nearest to the middle squares of `count` pictures or to their mirror images."""
        squares = (fit_cover(picture, self.side, self.side) for picture in pictures)
        views = (view for square in squares for view in (square, ImageOps.mirror(square)))
        vectors_MD = self.space.extract(views, 2 * count, self.quiet) if count else self.train_ND[:0]
        return nearest(self.space, rearrange(vectors_MD, "(q v) d -> q v d", v=2), self.train_ND, self.owners)


def nearest(
    space: MetricSpace, views_QVD: Tensor, train_ND: Tensor, owners: Sequence[int], k: int = NEIGHBOURS
) -> Neighbours:
    """The k nearest owners of rows of `train_ND`, or all if they are fewer, by the nearest views of each query. Raises
    UserError where features are NaN or infinite."""
    if not bool(train_ND.isfinite().all() and views_QVD.isfinite().all()):
        raise UserError(f"some features hold NaN or infinity ({space.name})")
    found, owner_N, k = [], torch.tensor(owners), min(k, len(set(owners)))
    for part_QVD in torch.split(views_QVD, QUERIES):
        distance_MN = space.distances(part_QVD.flatten(0, 1), train_ND)
        distance_QN = reduce(distance_MN, "(q v) n -> q n", "min", v=views_QVD.shape[1])
        distance_QP = distance_QN.new_full((len(part_QVD), max(owners) + 1), torch.inf)
        distance_QP.scatter_reduce_(1, owner_N.expand_as(distance_QN), distance_QN, "amin")
        found.append(distance_QP.topk(k, largest=False))
    return Neighbours(torch.cat([part.values for part in found]), torch.cat([part.indices for part in found]))


def originality(distance_N: Tensor, val_M: Tensor) -> tuple[float, float]:
    """Of pictures at these distances to the training set, and held-out ones at those. Copied: the share that lie nearer
    than one in a hundred held-out ones, or are the same. Novelty: their median distance over that of held-out ones, 0
    for copies, 1 for what is as new as unseen art. Raises UserError where no picture is held out, or most of them are
    copies themselves."""
    if not len(val_M):
        raise UserError("no picture is held out, so nothing says how near is too near, or how far is new")
    if (usual := float(val_M.median())) <= SAME:
        raise UserError("most held-out pictures are in the training set too, so originality has no measure")
    copied_N = (distance_N < val_M.double().quantile(PERCENTILE)) | (distance_N <= SAME)
    return float(copied_N.double().mean()), float(distance_N.median()) / usual


# Audit


class Audit(NamedTuple):
    """What was found about one picture."""

    lines: list[str]  # a conclusion, then the nearest training pictures in every space
    sheet: Image.Image


def audit(
    model: Bundle, sources: Sequence[Path], art: str | Path, options: AuditOptions, *, quiet: bool = False
) -> list[Audit]:
    """Compares the middle squares of pictures with ART. Raises UserError where a picture or ART cannot be used."""
    pictures, found = [open_picture(source) for source in sources], []
    split = Split.load(art, options, random.Random("audit/0"))
    for space in metric_spaces(model, feature_space(options.features, model)):
        baseline = Baseline(space, split, model.grids.native_size[0], quiet)
        found.append((baseline, baseline.compare(pictures, len(pictures))))
    audits = []
    for i, source in enumerate(sources):
        lines, rows = [f"{source}: {_conclusion(i, found)}"], []
        for baseline, near in found:
            pairs = list(zip(near.picture_QK[i].tolist(), near.distance_QK[i].tolist(), strict=True))
            names = [f"{split.art.names[j]} ({distance:.3f})" for j, distance in pairs]
            lines.append(f"  nearest in {baseline.space.name}: {', '.join(names)}")
            tiles = [(split.art.picture(j), f"{baseline.space.kind} {distance:.3f}") for j, distance in pairs]
            rows.append([(pictures[i], source.name), *tiles])
        fitted = [[(ImageOps.contain(picture, AUDIT_TILE), caption) for picture, caption in row] for row in rows]
        audits.append(Audit(lines, sheet(fitted)))
    return audits


def _conclusion(i: int, found: Sequence[tuple[Baseline, Neighbours]]) -> str:
    """On picture i, from the space in which it looks most like a copy: where it counts as copied, or else where the
    fewest held-out pictures lie nearer. Its copy score is 1 - novelty, not below 0."""
    ranked = []
    for baseline, near in found:
        distance_1, val_N, kind = near.distance_QK[i, :1], baseline.val_N, baseline.space.kind
        name = baseline.split.art.names[int(near.picture_QK[i, 0])]
        if kind == "pixels" and float(distance_1) <= SAME:
            return f"this is {name}, whole, cropped or mirrored; copy score 1.00"
        try:
            copied, novelty = originality(distance_1, val_N)
        except UserError as error:
            return str(error)
        nearer = float((val_N < distance_1 - SAME).double().mean())
        ranked.append((not copied, nearer, novelty, name, kind))
    distinct, nearer, novelty, name, kind = min(ranked)
    conclusion = "no copy: as far from the training pictures as unseen art is"
    if not distinct:
        conclusion = f"nearer to {name} than unseen art comes to anything in {kind}: look closely"
    score = f"copy score {max(0.0, 1 - novelty):.2f}"
    return f"{conclusion}; {score}, {nearer:.0%} of the {len(val_N)} held-out pictures are nearer"
