"""A person's folder, sorted out for fine-tuning: what is taken, what is skipped and why, what validation gets.

Notable choices:
- exact copies are taken once; near-duplicates (the same picture smaller, brighter, mirrored) are all taken, but are
  always on the same side of the split;
- two pictures are near-duplicates when both their small grey gradients (a difference hash) and their small colours
  agree: emoji of one shape and pages of one notebook agree in one of the two, not in both;
- the split goes by content, label by label: the same folder is split in the same way wherever it lies.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from igpt import checkpoint
from igpt.files import atomic_write
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder, Skipped
from tokenizer_vq.images import to_tensor

HASH = 16  # cells a side of the hash
FLAT = 0.03  # neighbouring cells (of a picture in [-1, 1]) that differ by less have no gradient
SAME_GRADIENTS = 0.13  # share of the gradients that may disagree between near-duplicates
SAME_COLOURS = 0.075  # root mean square difference of their colours, pictures in [0, 1]
FEWEST = 3  # different pictures
VALIDATION = 0.1  # share
MOST_VALIDATION = 64  # pictures: more only cost time
BLOCK = 256  # pictures compared with all others at once
ROWS, LONGEST = 20, 40  # labels in the table, and letters of each


@dataclass(frozen=True)
class Collection:
    """The pictures to fine-tune on, as indices into `art`, and how every file was used."""

    art: ArtFolder
    train: list[int]
    validation: list[int]
    skipped: list[Skipped]
    mirror_asymmetry: float  # how alike left and right differ in all pictures: 0 not at all, 1 always
    near_duplicates: int
    small_NCHW: Tensor  # the pictures to learn from, as near-duplicates are told

    @property
    def flip_is_wise(self) -> bool:
        """Whether mirrored pictures could be of this folder: not where all lean, or are lit or read, one way."""
        return self.mirror_asymmetry < 0.05 + 2 / max(1, len(self.train))

    def table(self) -> str:
        """What was taken, skipped and split off, label by label, as text."""
        labels = [self.art.labels[number] for number in self.art.label_of]
        told, kept = (Counter(labels[i] for i in part) for part in (self.train, self.validation))
        skipped = Counter(_label(skip.name, self.art) for skip in self.skipped)
        names = sorted({*self.art.labels, *skipped})
        shown = names[:ROWS] if len(names) > 1 else []
        rows = [
            (f"{name[:LONGEST]}..." if len(name) > LONGEST + 3 else name, told[name], kept[name], skipped[name])
            for name in shown
        ]
        rows.append(("in all", told.total(), kept.total(), len(self.skipped)))
        width = max(16, *(len(name) + 2 for name, *_ in rows))
        lines = [f"{'':{width}}{'taken':>8}{'to learn from':>16}{'for validation':>16}{'skipped':>10}"]
        lines += [f"{name:{width}}{n + held:>8}{n:>16}{held:>16}{left:>10}" for name, n, held, left in rows]
        if shown and len(names) > len(shown):
            lines.insert(-1, f"and {len(names) - len(shown)} more labels")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """One line a file: its name, its use, and why it is skipped if it is. It also is a manifest of the split."""
        rows = [(self.art.names[i], "train", "learned from", "") for i in self.train]
        rows += [(self.art.names[i], "val", "for validation", "") for i in self.validation]
        rows += [(skip.name, "test", "skipped", skip.reason) for skip in self.skipped]
        with atomic_write(path) as beside, open(beside, "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "split", "use", "reason"), *sorted(rows)])


def gather(art: str | Path) -> Collection:
    """Look through a folder or .tar. Raises UserError where too few different pictures can be used."""
    _refuse_a_model(Path(art).expanduser())
    folder = ArtFolder(art)
    taken: list[int] = []
    first_of: dict[str, int] = {}
    skipped = list(folder.skipped)
    for i in range(len(folder)):
        first = first_of.setdefault(folder.digest(i), i)
        if first == i:
            taken.append(i)
        else:
            skipped.append(Skipped(folder.names[i], f"is a copy of {folder.names[first]}"))
    pictures = _small(folder, taken)
    groups = near_duplicates(pictures)
    if len(set(groups)) < FEWEST:
        count = len(set(groups))
        same = f" (all {len(folder)} show the same)" if count == 1 and len(folder) > 1 else ""
        raise UserError(
            f"{art} has {count} usable different picture{'s' * (count > 1)}{same}; {FEWEST} or more are wanted"
        )
    train, validation = _split(folder, taken, groups)
    lean_CHW = pictures - pictures.flip(3)
    asymmetry = float(lean_CHW.mean(0).pow(2).sum() / lean_CHW.pow(2).sum((1, 2, 3)).mean().clamp(min=1e-9))
    duplicates, small_NCHW = len(taken) - len(set(groups)), pictures[[taken.index(i) for i in train]]
    return Collection(folder, train, validation, skipped, asymmetry, duplicates, small_NCHW)


def _refuse_a_model(art: Path) -> None:
    """A model folder holds pictures too, but nobody wants them learned."""
    if (art / checkpoint.CONFIG).is_file() and (art / checkpoint.WEIGHTS).is_file():
        raise UserError(f"{art} is a model, not a folder of pictures; give it with --model to start from it")


# Near-duplicates


def _small(art: ArtFolder, indices: Sequence[int]) -> Tensor:
    """The pictures as [N, 3, HASH, HASH], whatever their shape."""
    return torch.stack([shrunk(art.picture(i)) for i in indices])


def shrunk(picture: Image) -> Tensor:
    """A picture as near-duplicates are told: [3, HASH, HASH]."""
    return to_tensor(picture.resize((HASH, HASH), Resampling.BOX, reducing_gap=2.0))


def near_duplicates(pictures_NCHW: Tensor) -> list[int]:
    """For each small picture the number of its group: that of the first picture to which a chain of likeness leads."""
    parent = list(range(len(pictures_NCHW)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    signs_ND, colours_ND = _gradients(pictures_NCHW), pictures_NCHW.flatten(1)
    for mirrored in (False, True):
        others = pictures_NCHW.flip(3) if mirrored else pictures_NCHW
        for start in range(0, len(others), BLOCK):
            block = others[start : start + BLOCK]
            differing = _disagreement(_gradients(block), signs_ND)
            away = torch.cdist(block.flatten(1), colours_ND) / (2 * colours_ND.shape[1] ** 0.5)
            alike = (differing <= SAME_GRADIENTS) & (away <= SAME_COLOURS)
            for i, j in alike.nonzero().tolist():
                a, b = sorted((root(start + i), root(j)))
                parent[b] = a
    return [root(i) for i in range(len(parent))]


def _gradients(pictures_NCHW: Tensor) -> Tensor:
    """Signs of the grey steps to the right and downwards, [N, D]; 0 where it is flat, so that noise says nothing."""
    grey_NHW = pictures_NCHW.mean(1)
    steps_ND = torch.cat([grey_NHW.diff(dim=2).flatten(1), grey_NHW.diff(dim=1).flatten(1)], dim=1)
    return torch.where(steps_ND.abs() < FLAT, 0.0, steps_ND.sign())


def _disagreement(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    """Share of the gradients of either picture that the other has not, [N, M]; flat pictures agree with flat ones."""
    both = a_ND.abs() @ b_MD.abs().T
    agreed = (a_ND @ b_MD.T + both) / 2
    either = a_ND.abs().sum(1, keepdim=True) + b_MD.abs().sum(1) - both
    # A gradient just below FLAT in one picture and just above in the other is half a disagreement.
    return ((both - agreed) + (either - both) / 2) / either.clamp(min=1)


# The split


def _split(art: ArtFolder, taken: list[int], groups: list[int]) -> tuple[list[int], list[int]]:
    """Whole groups go to validation in the order of their digests, label by label; a half of a label stays at least."""
    members: dict[int, list[int]] = {}
    for i, group in zip(taken, groups, strict=True):
        members.setdefault(group, []).append(i)
    order = sorted(members.values(), key=lambda group: min(art.digest(i) for i in group))
    sizes = Counter(art.label_of[group[0]] for group in order)
    wanted = min(MOST_VALIDATION, max(1, round(VALIDATION * len(taken)), 2 if len(taken) >= 10 else 1))
    left = {label: wanted * size / len(order) for label, size in sizes.items()}
    chosen: list[int] = []
    # A second pass takes from any label: where all are small, none of them has a whole picture to give.
    for fair in (True, False):
        for alike in order:
            label, room = art.label_of[alike[0]], wanted - len(chosen)
            small = len(alike) <= max(1, len(taken) // 10) and len(alike) <= room
            if small and alike[0] not in chosen and (not fair or left[label] >= 0.5) and sizes[label] > 1:
                chosen += alike
                left[label] -= len(alike)
                sizes[label] -= 1
    if not chosen:  # nothing but large groups, or a label a picture: the smallest group
        chosen = min(order, key=len)
    return [i for i in taken if i not in set(chosen)], sorted(chosen)


def _label(name: str, art: ArtFolder) -> str:
    """The label that a skipped file would have had."""
    if folder := name.rpartition("/")[0]:
        return folder
    return next((art.labels[k] for k, taken in zip(art.label_of, art.names, strict=True) if "/" not in taken), "(top)")
