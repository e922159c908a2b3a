"""Is it a copy? The nearest training pictures in three spaces, and what that distance is for pictures never seen.

Notable choices:
- every training picture is looked at in its square crops (both ends and the middle of its long side), every picture in
  question also mirrored, so a shifted or mirrored copy is still found;
- held-out pictures are the measure: how near does art of this kind come to the training set without having seen it?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from igpt.checkpoint import Tokenizer
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import fit_cover

from .features import FeatureCache, FeatureNet, extract

NEARLY_SQUARE = 1.1  # up to this aspect the crops of a picture would be the same picture
SAME = 1e-3  # distances up to here are those of a copy: mirrored and resampled, a few pixels are rounded otherwise
PERCENTILE = 0.01  # of the held-out pictures' distances: what is nearer counts as copied
PIXELS = 16  # a side, of the pictures that are compared pixel by pixel
QUERIES, TRAINING = 16, 2048  # rows and columns of the distances in memory at once

# Spaces


class Pixels(FeatureNet):
    """The picture itself, very small."""

    name, side, identity = f"pixels {PIXELS}x{PIXELS}", PIXELS, ""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1)


class Tokens(FeatureNet):
    """The picture as the model reads it, [B, h * w]; whole numbers below 65536 survive as floats."""

    name = "tokens"

    def __init__(self, tokenizer: Tokenizer, side: int, identity: str):
        super().__init__()
        self.tokenizer, self.side, self.identity = tokenizer, side, identity

    def forward(self, images_BCHW: Tensor) -> Tensor:
        tokens_BL: Tensor = self.tokenizer.encode(images_BCHW).flatten(1)
        return tokens_BL.float()


class Space(NamedTuple):
    """A way to tell pictures apart: `net` makes vectors, `distances` compares them."""

    key: str  # tokens, pixels or features
    net: FeatureNet

    def distances(self, a_QD: Tensor, b_ND: Tensor) -> Tensor:
        """[Q, N]. Tokens: share of cells that differ. Pixels: root mean square difference, pictures in [0, 1].
        Features: the Euclidean distance of vectors brought to unit length, 0 to 2."""
        if self.key == "tokens":
            return torch.ne(a_QD[:, None], b_ND).sum(-1).double() / a_QD.shape[1]
        a_QD, b_ND = a_QD.double(), b_ND.double()
        if self.key == "pixels":
            a_QD, b_ND = (x / (2 * math.sqrt(x.shape[1])) for x in (a_QD, b_ND))
        else:
            a_QD, b_ND = F.normalize(a_QD, dim=1), F.normalize(b_ND, dim=1)
        return torch.cdist(a_QD, b_ND, compute_mode="donot_use_mm_for_euclid_dist")


def spaces(tokenizer: Tokenizer, side: int, identity: str, net: FeatureNet) -> list[Space]:
    """The three spaces: tokens, pixels, features of `net`."""
    return [Space("tokens", Tokens(tokenizer, side, identity)), Space("pixels", Pixels()), Space("features", net)]


# Pictures


def crops(picture: Image.Image, side: int) -> list[Image.Image]:
    """The middle square of a picture, and where it is longer than wide the squares at its two ends, each `side`."""
    width, height = picture.size
    short = min(width, height)
    found = [fit_cover(picture, side, side)]
    if max(width, height) > NEARLY_SQUARE * short:
        for box in ((0, 0, short, short), (width - short, height - short, width, height)):
            found.append(picture.resize((side, side), Image.Resampling.LANCZOS, box))
    return found


def crop_count(size: tuple[int, int]) -> int:
    """How many `crops` a picture of that width and height has."""
    return 3 if max(size) > NEARLY_SQUARE * min(size) else 1


class References(NamedTuple):
    """The training pictures in one space: a vector a crop, and whose crop it is."""

    vectors_ND: Tensor
    picture_N: Tensor  # indices into the ArtFolder
    crop_N: Tensor  # which of its crops


def references(
    space: Space, art: ArtFolder, indices: Sequence[int], side: int, *, device: torch.device, quiet: bool
) -> References:
    """All crops of the pictures `indices`."""
    owners = [(i, crop) for i in indices for crop in range(crop_count(art.sizes[i]))]
    stream = (square for i in indices for square in crops(art.picture(i), side))
    vectors_ND = extract(
        space.net, stream, len(owners), device=device, cache=FeatureCache.of(space.net), quiet=quiet, what="training"
    )
    picture_N, crop_N = torch.tensor(owners).view(-1, 2).unbind(1)
    return References(vectors_ND, picture_N, crop_N)


def both_ways(
    space: Space, pictures: Iterable[Image.Image], count: int, side: int, *, device: torch.device,
    cache: FeatureCache | None = None, quiet: bool = False, what: str = "pictures",
) -> Tensor:  # fmt: skip
    """Vectors of the middle squares of pictures, as they are and mirrored, [count, 2, D].

    They become squares of the native `side` first, as the crops of training pictures do: resampled otherwise, copies
    would not be quite the same.
    """
    squares = (fit_cover(picture, side, side) for picture in pictures)
    stream = (view for square in squares for view in (square, ImageOps.mirror(square)))
    vectors = extract(space.net, stream, 2 * count, device=device, cache=cache, quiet=quiet, what=what)
    return vectors.view(count, 2, vectors.shape[1])


# Distances


class Nearest(NamedTuple):
    distance_QK: Tensor  # float64, ascending
    picture_QK: Tensor  # indices into the ArtFolder, each once
    crop_QK: Tensor  # the crop of it that is nearest


def nearest(space: Space, queries_Q2D: Tensor, among: References, k: int = 3) -> Nearest:
    """The k training pictures nearest to each query, the nearer of its two mirror images counting; fewer if there are
    fewer. Raises UserError if there is none, or where features are NaN or infinite."""
    if not len(among.vectors_ND):
        raise UserError("there is no training picture to compare with")
    starts = range(0, len(among.vectors_ND), TRAINING)
    # Block by block here too: isfinite makes a copy of what it is given.
    finite = [among.vectors_ND[start : start + TRAINING].isfinite().all() for start in starts]
    if not all(finite) or not bool(queries_Q2D.isfinite().all()):
        raise UserError(f"some features hold NaN or infinity ({space.net.name})")
    owners, number_N = among.picture_N.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    k = min(k, len(owners))
    rows = []
    for first in range(0, len(queries_Q2D), QUERIES):
        block_Q2D = queries_Q2D[first : first + QUERIES]
        q = len(block_Q2D)
        parts = [
            space.distances(block_Q2D.flatten(0, 1), among.vectors_ND[start : start + TRAINING])
            for start in starts
        ]
        crops_QN = torch.cat(parts, dim=1).view(q, 2, -1).amin(1)
        best_QP = torch.full((q, len(owners)), torch.inf, dtype=torch.float64)
        best_QP.scatter_reduce_(1, number_N.expand(q, -1), crops_QN, "amin")
        distance_QK, place_QK = best_QP.topk(k, dim=1, largest=False)
        # The crop that gave the smallest distance of that picture.
        of_picture = number_N == place_QK.unsqueeze(-1)
        crop_QK = among.crop_N[crops_QN.unsqueeze(1).masked_fill(~of_picture, torch.inf).argmin(-1)]
        rows.append(Nearest(distance_QK, owners[place_QK], crop_QK))
    return Nearest(*(torch.cat(column) for column in zip(*rows, strict=True)))


def copy_threshold(held_out_M: Tensor) -> float:
    """The first percentile of the held-out pictures' distances to the training set. Raises UserError if none is."""
    if not len(held_out_M):
        raise UserError("no picture is held out, so nothing says how near is too near")
    return float(held_out_M.double().quantile(PERCENTILE))


def copied(distance_N: Tensor, held_out_M: Tensor) -> Tensor:
    """Which pictures, bool [N], lie nearer to the training set than one in a hundred held-out ones, or are the same."""
    return (distance_N < copy_threshold(held_out_M)) | (distance_N <= SAME)


def novelty(distance_N: Tensor, held_out_M: Tensor) -> float:
    """Median distance to the nearest training picture, in units of that of held-out pictures: 0 for copies, 1 for what
    is as new as unseen art. Raises UserError where no picture is held out, or all of them are copies themselves."""
    if not len(held_out_M) or not len(distance_N):
        raise UserError("novelty wants one picture or more, and one held out")
    usual = float(held_out_M.median())
    if usual <= SAME:
        raise UserError("most held-out pictures are in the training set too, so novelty has no measure")
    return float(distance_N.median()) / usual


def percentile(distance: float, held_out_M: Tensor) -> float:
    """The share of held-out pictures that lie nearer to the training set than `distance`, 0 to 1."""
    return float((held_out_M < distance - SAME).double().mean())
