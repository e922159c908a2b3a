"""`igpt audit`: the training pictures that given pictures come nearest to, and whether that is nearer than usual."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from igpt.image_gpt import ImageGPT
from igpt.sheet import Row, equal_sheet
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover, open_picture

from . import features, originality
from .features import FeatureCache
from .options import AuditOptions
from .originality import Nearest, Space

SEED = 0  # of the choice of pictures under --limit
SHOWN = 3  # nearest training pictures in each space
TILE = 192


class Found(NamedTuple):
    """What one space says of all pictures."""

    space: Space
    near: Nearest
    held_out_M: torch.Tensor  # distances of held-out pictures to their nearest training picture


class Verdict(NamedTuple):
    source: Path
    score: float | None  # 0 as far from the training set as unseen art usually is, 1 a copy; None: nothing is held out
    percentile: float | None  # share of held-out pictures that lie nearer to the training set
    lines: list[str]  # a plain sentence, then the nearest pictures in every space
    sheet: Image.Image


def audit(
    model: ImageGPT, sources: Sequence[Path], art: str | Path, options: AuditOptions, *, quiet: bool = False
) -> list[Verdict]:
    """One verdict for each picture, on its middle square. Raises UserError where a picture or ART cannot be used."""
    side, _ = model.grids.native_size
    squares = [fit_cover(open_picture(source), side, side) for source in sources]
    net = features.nets(options.features, model.tokenizer, side, model.weights_hash)[0]
    collection = ArtFolder(art, manifest=options.manifest)
    told, held_out = collection.split()
    if not told:
        raise UserError(f"no picture of {art} is for training, so nothing can be compared; see the manifest")
    rng = random.Random(f"audit/{SEED}")
    limit = options.limit or len(collection)
    told, held_out = (rng.sample(part, min(limit, len(part))) for part in (told, held_out))
    found = []
    for space in originality.spaces(model.tokenizer, side, model.weights_hash, net):
        training = originality.references(space, collection, told, side, device=model.device, quiet=quiet)
        queries = originality.both_ways(space, squares, len(squares), side, device=model.device, quiet=quiet)
        unseen = originality.both_ways(
            space, (collection.picture(i) for i in held_out), len(held_out), side, device=model.device,
            cache=FeatureCache.of(space.net), quiet=quiet, what="held-out",
        )  # fmt: skip
        near = originality.nearest(space, queries, training, SHOWN)
        held_out_M = torch.zeros(0, dtype=torch.float64)
        if held_out:
            held_out_M = originality.nearest(space, unseen, training, 1).distance_QK[:, 0]
        found.append(Found(space, near, held_out_M))
    return [_verdict(i, source, squares[i], collection, found, side) for i, source in enumerate(sources)]


def _verdict(i: int, source: Path, square: Image.Image, art: ArtFolder, found: list[Found], side: int) -> Verdict:
    score, percentile = copy_score(i, found)
    rows: list[Row] = []
    lines = [f"{source}: {_sentence(i, art, found, score, percentile)}"]
    for space, near, _ in found:
        row = [(square, source.name)]
        words = []
        for rank in range(near.distance_QK.shape[1]):
            picture, distance = int(near.picture_QK[i, rank]), float(near.distance_QK[i, rank])
            crop = originality.crops(art.picture(picture), side)[int(near.crop_QK[i, rank])]
            row.append((crop, f"{space.key} {distance:.3f}"))
            words.append(f"{art.names[picture]} ({distance:.3f})")
        lines.append(f"  nearest in {space.net.name}: {', '.join(words)}")
        rows.append(row)
    return Verdict(source, score, percentile, lines, equal_sheet(rows, TILE))


def copy_score(i: int, found: list[Found]) -> tuple[float | None, float | None]:
    """Score and percentile of picture `i` in the space where it looks most like a copy: 1 - distance / (median distance
    of held-out pictures), not below 0, and the share of held-out pictures that lie nearer. None where none is held out.
    """
    if not len(found[0].held_out_M):
        return None, None
    told = []
    for _, near, held_out_M in found:
        distance, usual = float(near.distance_QK[i, 0]), float(held_out_M.median())
        score = max(0.0, 1 - distance / usual) if usual > originality.SAME else float(distance <= originality.SAME)
        told.append((originality.percentile(distance, held_out_M), -score))
    percentile, score = min(told)
    return -score, percentile


def _sentence(i: int, art: ArtFolder, found: list[Found], score: float | None, percentile: float | None) -> str:
    """What it comes to, in plain words."""
    for space, near, _ in found:
        if space.key == "pixels" and near.distance_QK[i, 0] <= originality.SAME:
            name = art.names[int(near.picture_QK[i, 0])]
            return f"this is {name}, whole, cropped or mirrored; copy score 1.00"
    if score is None or percentile is None:
        return "no picture is held out, so nothing says whether the nearest ones are too near"
    numbers = f"copy score {score:.2f}, {percentile:.0%} of the held-out pictures are nearer"
    suspicious = [one for one in found if bool(originality.copied(one.near.distance_QK[i, :1], one.held_out_M))]
    if suspicious:
        name = art.names[int(suspicious[0].near.picture_QK[i, 0])]
        key = suspicious[0].space.key
        return f"nearer to {name} than unseen art comes to anything in {key}: look closely; {numbers}"
    return f"no copy: as far from the training pictures as unseen art is; {numbers}"
