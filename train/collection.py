"""A person's folder, sorted out for fine-tuning: what is taken, what is skipped and why, what validation gets.

Notable choices:
- exact copies are taken once; near-duplicates (the same picture smaller, brighter, mirrored) are all taken, but are
  always on the same side of the split;
- two pictures are near-duplicates when of their thumbnails both the signs of the grey gradients (a difference hash)
  and the colours agree: emoji of one shape and pages of one notebook agree in one of the two, not in both;
- the split goes by content, label by label: the same folder is split in the same way wherever it lies.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image, Resampling
from torch import Tensor

from igpt import checkpoint
from igpt.files import atomic_write
from tokenizer_vq.archives import Skipped
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import to_tensor

THUMBNAIL_SIDE = 16  # pixels of what is compared
FLAT_STEP = 0.03  # neighbouring pixels (of a picture in [-1, 1]) that differ by less have no gradient
SAME_GRADIENTS = 0.74  # cosine similarity of the signs of gradients from which on they agree
SAME_COLOURS = 0.075  # root mean square difference of their colours, pictures in [0, 1]
MIN_PICTURES = 3  # different ones
VAL_SHARE, MAX_VAL = 0.1, 64  # more pictures only cost time
COMPARED_AT_ONCE = 256


@dataclass(frozen=True)
class Collection:
    """The pictures to fine-tune on, as indices into `art`, and how every file was used."""

    art: ArtFolder
    train: list[int]
    val: list[int]
    skipped: list[Skipped]
    flip: bool  # whether mirrored pictures could be of this folder: not where all lean, or are lit or read, one way
    train_NCHW: Tensor  # thumbnails of the pictures to learn from

    def write(self, path: Path) -> None:
        """One line a file: its name, its use, and why it is skipped if it is. It also is a manifest of the split."""
        rows = [(self.art.names[i], "train", "learned from", "") for i in self.train]
        rows += [(self.art.names[i], "val", "for validation", "") for i in self.val]
        rows += [(skip.name, "test", "skipped", skip.reason) for skip in self.skipped]
        with atomic_write(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "split", "use", "reason"), *sorted(rows)])

    def copies(self, drawn: Sequence[Image]) -> int:
        """How many drawn pictures are near-duplicates of training pictures."""
        return int(are_near_duplicates(thumbnails(drawn), self.train_NCHW).any(1).sum())


def load_collection(path: str | Path) -> Collection:
    """Look through a folder or .tar. Raises UserError where too few different pictures can be used."""
    root = Path(path).expanduser()
    if (root / checkpoint.CONFIG).is_file() and (root / checkpoint.WEIGHTS).is_file():  # nobody wants its card learned
        raise UserError(f"{path} is a model, not a folder of pictures; give it with --model to start from it")
    art = ArtFolder(path)
    first_of: dict[str, int] = {}
    for i in range(len(art)):
        first_of.setdefault(art.digest(i), i)
    firsts, taken = [first_of[art.digest(i)] for i in range(len(art))], list(first_of.values())
    copied = [Skipped(art.names[i], f"is a copy of {art.names[k]}") for i, k in enumerate(firsts) if i != k]
    small_NCHW = thumbnails(map(art.picture, taken))
    groups = _groups(small_NCHW)
    if (count := len(set(groups))) < MIN_PICTURES:
        same = f" (all {len(art)} show the same)" if count == 1 and len(art) > 1 else ""
        few = f"{count} usable different picture{'s' * (count > 1)}{same}"
        raise UserError(f"{path} has {few}; {MIN_PICTURES} or more are wanted")
    val = _validation(art, taken, groups)
    train = [i for i in taken if i not in val]
    lean_NCHW = small_NCHW - small_NCHW.flip(3)  # what all pictures have of it, over what each has
    asymmetry = float(lean_NCHW.mean(0).pow(2).sum() / lean_NCHW.pow(2).sum((1, 2, 3)).mean().clamp(min=1e-9))
    flip, train_NCHW = asymmetry < 0.05 + 2 / len(train), small_NCHW[[taken.index(i) for i in train]]
    return Collection(art, train, val, [*art.skipped, *copied], flip, train_NCHW)


# Near-duplicates


def thumbnails(pictures: Iterable[Image]) -> Tensor:
    """Pictures of any shape as [N, 3, THUMBNAIL_SIDE, THUMBNAIL_SIDE]."""
    size = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return torch.stack([to_tensor(picture.resize(size, Resampling.BOX, reducing_gap=2.0)) for picture in pictures])


def are_near_duplicates(a_NCHW: Tensor, b_MCHW: Tensor) -> Tensor:
    """Which thumbnails show the same picture, maybe mirrored: bool [N, M]."""
    return _are_alike(a_NCHW, b_MCHW) | _are_alike(a_NCHW.flip(3), b_MCHW)


def _are_alike(a_NCHW: Tensor, b_MCHW: Tensor) -> Tensor:
    colours_NM = torch.cdist(a_NCHW.flatten(1), b_MCHW.flatten(1)) / (2 * a_NCHW[0].numel() ** 0.5)
    return (_gradients(a_NCHW) @ _gradients(b_MCHW).T >= SAME_GRADIENTS) & (colours_NM <= SAME_COLOURS)


def _gradients(pictures_NCHW: Tensor) -> Tensor:
    """Signs of the grey steps to the right and downwards as unit vectors [N, D], 0 where noise would decide; one more
    entry so that two flat pictures agree."""
    grey_NHW = pictures_NCHW.mean(1)
    steps_ND = torch.cat([grey_NHW.diff(dim=2).flatten(1), grey_NHW.diff(dim=1).flatten(1)], dim=1)
    return F.normalize(F.pad(torch.where(steps_ND.abs() < FLAT_STEP, 0.0, steps_ND.sign()), (0, 1), value=1e-3))


def _groups(small_NCHW: Tensor) -> list[int]:
    """For each thumbnail the first one to which a chain of near-duplicates leads."""
    groups = list(range(len(small_NCHW)))
    alike = torch.cat([are_near_duplicates(part, small_NCHW) for part in torch.split(small_NCHW, COMPARED_AT_ONCE)])
    for i, j in alike.nonzero().tolist():
        low, high = sorted((groups[i], groups[j]))
        if low < high:
            groups = [low if group == high else group for group in groups]
    return groups


# The split


def _validation(art: ArtFolder, taken: list[int], groups: list[int]) -> list[int]:
    """Whole groups, in the order of their digests and of each label its share; at least half of a label is left."""
    members: dict[int, list[int]] = {}
    for i, first in zip(taken, groups, strict=True):
        members.setdefault(first, []).append(i)
    sizes, seen = Counter(art.label_of[group[0]] for group in members.values()), Counter[int]()
    ordered: list[tuple[float, list[int]]] = []
    for group in sorted(members.values(), key=lambda group: min(map(art.digest, group))):
        label = art.label_of[group[0]]
        ordered.append(((seen[label] + 0.5) / sizes[label], group))  # labels of any size take turns at their own pace
        seen[label] += 1
    wanted = min(MAX_VAL, max(1, round(VAL_SHARE * len(taken)), 2 if len(taken) >= 10 else 1))
    val: list[int] = []
    for place, group in sorted(ordered, key=lambda pair: pair[0]):
        if place < 0.5 and len(group) <= min(max(1, len(taken) // 10), wanted - len(val)):
            val += group
    smallest = sorted(ordered, key=lambda pair: len(pair[1]))[0][1]  # where all are large, or each has a label
    return sorted(val or smallest)
