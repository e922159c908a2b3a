"""The pictures to learn from: `ArtFolder`, a folder or archive with labels and a split, and random crops of it.

Notable choices:
- every picture is decoded once at the start, so a broken file is reported then and cannot stop a training later;
- the split is by the SHA-256 of each file: exact copies share a side, and new pictures do not move the old ones;
- sample k of a training is a pure function of (seed, k), so that a training can resume.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .archives import Entry, Skipped, files_in_archive, files_in_folder, normalized
from .base import UserError, complaint
from .images import PICTURE_SUFFIXES, UnreadablePicture, open_picture, random_crop, to_tensor

MIN_SIDE = 16  # pixels; smaller pictures are skipped
LISTED, ROUNDS = 65536, 6  # items whose order is kept as a list; rounds of the network that shuffles more
VALIDATION_SHARE = 0.05  # of the pictures, where no manifest says which
SPLITS = ("train", "val", "test")


def _read_manifest(path: Path) -> dict[str, str]:
    """The rows of a manifest: picture name to one of SPLITS."""
    split_of: dict[str, str] = {}
    sentence = f"the manifest {path} cannot be read, a CSV file in UTF-8 is wanted"
    encoding = "utf-8-sig"  # spreadsheets put a byte order mark in front
    with complaint(sentence, OSError, UnicodeError, csv.Error), path.open(encoding=encoding, newline="") as file:
        rows = csv.DictReader(file)
        for row in rows:
            name, split = row.get("path") or row.get("name") or row.get("id"), row.get("split")
            if not name or split not in SPLITS:
                wanted = f"a path, name or id and a split of {', '.join(SPLITS)} are wanted"
                raise UserError(f"line {rows.line_num} of {path} says {name!r} and {split!r}: {wanted}")
            name = normalized(name.replace("\\", "/").removeprefix("./"))
            if split_of.setdefault(name, split) != split:
                raise UserError(f"{path} puts {name} into {split_of[name]} and into {split}: one of them is wanted")
    return split_of


# The collection


class _Usable(NamedTuple):
    """A picture that can be used."""

    entry: Entry
    digest: str  # SHA-256 of the file, or of the pixels of a sprite of a sheet
    size: tuple[int, int]  # width and height in pixels


def _check(entry: Entry, grid: int | None) -> list[Skipped | _Usable]:
    """Decodes one picture, and cuts it into squares of `grid` pixels a side where it is larger; empty ones are none."""
    try:
        content = entry.read()
        picture = open_picture(content, entry.name, "RGBA")
    except UnreadablePicture as error:
        return [Skipped(entry.name, error.reason)]
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        return [Skipped(entry.name, f"is too small: {width}x{height} pixels, wanted at least {MIN_SIDE} a side")]
    if grid is None or max(width, height) <= grid:
        return [_Usable(entry, hashlib.sha256(content).hexdigest(), picture.size)]
    if width % grid or height % grid:
        return [Skipped(entry.name, f"has {width}x{height} pixels, which do not divide into sprites of {grid} a side")]
    sprites, stem = [], entry.name.removesuffix(PurePosixPath(entry.name).suffix)
    for number in range(width // grid * (height // grid)):
        left, top = number % (width // grid) * grid, number // (width // grid) * grid
        box = (left, top, left + grid, top + grid)
        tile = picture.crop(box)
        if tile.getcolors(1) is None:  # of more than one colour
            digest = hashlib.sha256(tile.tobytes()).hexdigest()
            sprites.append(_Usable(entry._replace(name=f"{stem}-{number:04}.png", box=box), digest, tile.size))
    return list(sprites)


class ArtFolder:
    """The usable pictures of a folder, .tar, .tar.gz or .zip, in the order of their names.

    The sub-folder of a picture is its label ("a/b" when nested); pictures at the top have the name of the folder, or of
    the archive, as their label. `manifest` is a CSV that decides the split: its column `path`, `name` or `id` names a
    picture (with or without folders and extension), its column `split` says train, val or test; test and unnamed
    pictures are in neither part. With `grid` larger pictures are sheets of sprites of so many pixels a side. Raises
    UserError when nothing is usable, and for a bad manifest.
    """

    labels: list[str]  # in use, sorted
    names: list[str]  # of each picture the path below `path`, with forward slashes
    label_of: list[int]  # of each picture the index of its label in `labels`
    sizes: list[tuple[int, int]]  # of each picture the width and height in pixels
    skipped: list[Skipped]  # files with the extension of a picture that cannot be used

    def __init__(self, path: str | Path, *, manifest: str | Path | None = None, grid: int | None = None) -> None:
        root = Path(os.path.abspath(Path(path).expanduser()))  # the working directory may change later
        split_of = {} if manifest is None else _read_manifest(Path(manifest).expanduser())
        files, passed = (files_in_folder(root), []) if root.is_dir() else files_in_archive(root, self)
        candidates = [entry for entry in files if PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checked = [result for results in pool.map(_check, candidates, repeat(grid)) for result in results]
        self.skipped = passed + [result for result in checked if isinstance(result, Skipped)]
        usable = [result for result in checked if not isinstance(result, Skipped)]
        if not usable:
            first = f"; the first: {self.skipped[0].name} {self.skipped[0].reason}" if self.skipped else ""
            raise UserError(f"no usable picture in {path}, {len(files)} files looked at{first}")
        self._entries = [each.entry for each in usable]
        self.names = [entry.name for entry in self._entries]
        self._digests = [each.digest for each in usable]
        self.sizes = [each.size for each in usable]
        top = normalized(root.name if root.is_dir() else root.stem.removesuffix(".tar")) or "pictures"
        labels = [name.rpartition("/")[0] or top for name in self.names]
        self.labels = sorted(set(labels))
        self.label_of = [self.labels.index(label) for label in labels]
        self._splits = [_split_of(name, split_of) for name in self.names]
        if manifest is not None and not any(self._splits):
            raise UserError(f"{manifest} names none of the {len(self)} pictures in {path}")

    def __len__(self) -> int:
        return len(self._entries)

    def picture(self, index: int, mode: str = "RGB") -> Image.Image:
        """One picture, decoded now, as RGB or RGBA. Raises UnreadablePicture if the file is gone or unreadable now."""
        entry = self._entries[index]
        if entry.box is None:
            return open_picture(entry.read(), entry.name, mode)
        return _sheet(entry._replace(name=entry.path, box=None), mode).crop(entry.box)

    def sample(self, k: int, indices: Sequence[int], seed: int) -> Image.Image:
        """The picture of training sample k, one of these. Raises UnreadablePicture."""
        return self.picture(indices[shuffled(len(indices), k, seed)])

    def digest(self, index: int) -> str:
        """The SHA-256 of the file of one picture."""
        return self._digests[index]

    @property
    def different(self) -> int:
        """The number of pictures when exact copies count once."""
        return len(set(self._digests))

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over names, labels and contents: the same for the same art, wherever it lies."""
        labels = [self.labels[label] for label in self.label_of]
        return hashlib.sha256(repr(list(zip(self.names, labels, self._digests, strict=True))).encode()).hexdigest()

    def split(self) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the pictures to train on and of those to validate on, both ascending.

        Without a manifest about VALIDATION_SHARE of them are for validation, and at least one if two differ.
        """
        splits = self._splits
        if not any(splits):
            distinct = sorted(set(self._digests))
            below = sum(int(digest[:16], 16) < VALIDATION_SHARE * 2**64 for digest in distinct)
            chosen = set(distinct[: min(max(below, 1), len(distinct) - 1)])  # neither none nor all
            splits = ["val" if digest in chosen else "train" for digest in self._digests]
        train, val = ([i for i, split in enumerate(splits) if split == wanted] for wanted in SPLITS[:2])
        return train, val


@lru_cache(maxsize=2)
def _sheet(entry: Entry, mode: str) -> Image.Image:
    """A picture of which many parts are asked for."""
    return open_picture(entry.read(), entry.name, mode)


def _split_of(name: str, split_of: dict[str, str]) -> str:
    """The split of a picture, which a manifest may name with or without folders and extension; "" if it does not."""
    pure = PurePosixPath(name)
    spellings = (name, str(pure.with_suffix("")), pure.name, pure.stem)
    return next((split_of[spelling] for spelling in spellings if spelling in split_of), "")


# Crops


@lru_cache(maxsize=4)
def _permutation(n: int, epoch: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def shuffled(n: int, k: int, seed: int) -> int:
    """Which of n items is sample k, when the items are shuffled anew for every pass over them. Takes no memory for
    more than LISTED items."""
    epoch, place = divmod(k, n)
    return _permutation(n, epoch, seed)[place] if n <= LISTED else _permuted(n, place, seed * 1_000_003 + epoch)


def _permuted(n: int, place: int, key: int) -> int:
    """A permutation of range(n) that is no list: a Feistel network over a power of four, walked until it is below n
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains", section 4)."""
    half = (n.bit_length() + 1) // 2
    below = (1 << half) - 1
    while True:
        for turn in range(ROUNDS):
            left, right = place >> half, place & below
            mixed = (right + key * ROUNDS + turn + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 32) * 0xD6E8FEB86659FD93 & 0xFFFFFFFFFFFFFFFF
            place = right << half | left ^ (mixed >> 32 & below)
        if place < n:
            return place


class Crops(Dataset[Tensor]):
    """Endless random crops [3, size, size] in [-1, 1].

    Their scale is uniform in the range `scales`: 1 shows the whole short side of a picture, 2 shows half of it.
    """

    def __init__(
        self, art: ArtFolder, indices: Sequence[int], size: int, seed: int, scales: tuple[float, float], flip: bool
    ):
        self.art, self.indices, self.size, self.seed, self.scales, self.flip = art, indices, size, seed, scales, flip

    def __getitem__(self, k: int) -> Tensor:
        rng = random.Random(f"crop/{self.seed}/{k}")
        picture = self.art.sample(k, self.indices, self.seed)
        return to_tensor(random_crop(picture, self.size, rng.uniform(*self.scales), rng, flip=self.flip))
