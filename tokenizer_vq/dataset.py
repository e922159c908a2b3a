"""The pictures to learn from: `ArtFolder`, a folder or .tar with labels and a train/val split, and random crops of it.

Notable choices:
- every picture is decoded once at the start, so a broken file is reported then and cannot stop a training later;
- the split is by the SHA-256 of each file: exact copies share a side, and new pictures do not move the old ones;
- members of a .tar are read by their byte offsets, without an open handle: an ArtFolder can be sent to other processes;
- sample k of a training is a pure function of (seed, k), so that a training can resume.
"""

from __future__ import annotations

import csv
import hashlib
import os
import random
import tarfile
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .base import UserError
from .images import PICTURE_SUFFIXES, UnreadablePicture, open_picture, random_crop, to_tensor

MIN_SIDE = 16  # pixels; smaller pictures are skipped
LISTED, ROUNDS = 65536, 6  # items whose order is kept as a list; rounds of the network that shuffles more


class Skipped(NamedTuple):
    """A picture that is not used; `reason` completes a sentence that begins with `name`."""

    name: str
    reason: str


# Files


class _Entry(NamedTuple):
    """Where a picture lies: a whole file, or `size` bytes at `offset` of an archive."""

    name: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        if not os.path.isfile(self.path):  # a broken link; or a pipe, where reading would block
            raise UnreadablePicture(self.name, "is not there, or no ordinary file")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise UnreadablePicture(self.name, f"cannot be opened: {error.strerror}") from error


def _check(entry: _Entry) -> Skipped | tuple[_Entry, str, tuple[int, int]]:
    """Decodes one picture; with the entry come the SHA-256 of the file and the size of the picture."""
    try:
        content = entry.read()
        width, height = open_picture(content, entry.name).size
    except UnreadablePicture as error:
        return Skipped(entry.name, error.reason)
    if min(width, height) < MIN_SIDE:
        return Skipped(entry.name, f"is too small: {width}x{height} pixels, wanted at least {MIN_SIDE} a side")
    return entry, hashlib.sha256(content).hexdigest(), (width, height)


def _normalized(name: str) -> str:
    """One spelling of a name: macOS gives accents decomposed, and Linux allows bytes that are not UTF-8."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8"))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def _files_in_folder(root: Path) -> list[_Entry]:
    """All visible files below a folder, by name. Links are followed, but no folder is walked twice."""
    entries, walked, pending = [], set(), [str(root)]
    while pending:  # linked folders come last, so that a folder is named by its real path where it has one
        for folder, subfolders, files in os.walk(pending.pop(0)):
            real = os.path.realpath(folder)
            if real in walked:
                subfolders.clear()
                continue
            walked.add(real)
            subfolders[:] = sorted(part for part in subfolders if not _is_hidden(part))
            pending += [path for part in subfolders if os.path.islink(path := os.path.join(folder, part))]
            for path in (os.path.join(folder, file) for file in files if not _is_hidden(file)):
                entries.append(_Entry(_normalized(Path(path).relative_to(root).as_posix()), path))
    return sorted(entries)


def _files_in_tar(archive: Path) -> list[_Entry]:
    """All visible plain files of an archive, by name. Of several with one name the last counts, as for tar itself."""
    entries = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.isreg() and not member.issparse() and not any(map(_is_hidden, parts)):
                    name = _normalized("/".join(parts))
                    entries[name] = _Entry(name, str(archive), member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        wanted = "a folder of pictures or a whole, uncompressed .tar is wanted"
        raise UserError(f"{archive} is neither a folder nor a readable .tar ({error}): {wanted}") from error
    return sorted(entries.values())


# The manifest


def _read_manifest(path: Path) -> dict[str, str]:
    """The rows of a manifest: picture name to "train", "val" or "test"."""
    split_of: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark in front
            rows = csv.DictReader(file)
            for row in rows:
                name, split = row.get("path") or row.get("name") or row.get("id"), row.get("split")
                if not name or split not in ("train", "val", "test"):
                    wanted = "a path, name or id and a split of train, val or test are wanted"
                    raise UserError(f"line {rows.line_num} of {path} says {name!r} and {split!r}: {wanted}")
                name = _normalized(name.replace("\\", "/").removeprefix("./"))
                if split_of.setdefault(name, split) != split:
                    raise UserError(f"{path} puts {name} into {split_of[name]} and into {split}: one of them is wanted")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"the manifest {path} cannot be read: {error}") from error
    return split_of


def _side(name: str, split_of: dict[str, str]) -> str:
    """The split of a picture, which a manifest may name with or without folders and extension; "" if it does not."""
    pure = PurePosixPath(name)
    spellings = (name, str(pure.with_suffix("")), pure.name, pure.stem)
    return next((split_of[spelling] for spelling in spellings if spelling in split_of), "")


# The collection


class ArtFolder:
    """The usable pictures below `path`, in the order of their names.

    `path` is a folder or an uncompressed .tar. The sub-folder of a picture is its label ("a/b" when nested); pictures
    at the top have the name of the folder, or of the archive, as their label. Hidden files are left out.

    `manifest` is a CSV that decides the split: the column `path`, `name` or `id` names a picture (with or without
    folders and extension), the column `split` says train, val or test; test and unnamed pictures are in neither part.

    Raises UserError when the path is missing or of the wrong kind, when nothing is usable, and for a bad manifest.
    """

    labels: list[str]  # in use, sorted
    names: list[str]  # of each picture the path below `path`, with forward slashes
    label_of: list[int]  # of each picture the index of its label in `labels`
    sizes: list[tuple[int, int]]  # of each picture the width and height in pixels
    skipped: list[Skipped]  # files with the extension of a picture that cannot be used

    def __init__(self, path: str | Path, *, manifest: str | Path | None = None) -> None:
        root = Path(path).expanduser().absolute()  # a later change of the working directory must not matter
        if not root.exists():
            raise UserError(f"{path} does not exist: a folder of pictures or a .tar of them is wanted")
        split_of = None if manifest is None else _read_manifest(Path(manifest).expanduser())
        files = _files_in_folder(root) if root.is_dir() else _files_in_tar(root)
        candidates = [entry for entry in files if PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            checked = list(pool.map(_check, candidates))
        self.skipped = [result for result in checked if isinstance(result, Skipped)]
        usable = [result for result in checked if not isinstance(result, Skipped)]
        if not usable:
            first = f"; the first: {self.skipped[0].name} {self.skipped[0].reason}" if self.skipped else ""
            raise UserError(f"no usable picture in {path}, {len(files)} files looked at{first}")
        self._entries = [entry for entry, _, _ in usable]
        self._digests = [digest for _, digest, _ in usable]
        self.sizes = [size for _, _, size in usable]
        self.names = [entry.name for entry in self._entries]
        top = _normalized(Path(os.path.abspath(root)).name if root.is_dir() else root.stem) or "pictures"
        labels = [name.rpartition("/")[0] or top for name in self.names]
        self.labels = sorted(set(labels))
        self.label_of = [self.labels.index(label) for label in labels]
        self._sides = None if split_of is None else [_side(name, split_of) for name in self.names]
        if self._sides is not None and not any(self._sides):
            raise UserError(f"{manifest} names none of the {len(self)} pictures in {path}")

    def __len__(self) -> int:
        return len(self._entries)

    def picture(self, index: int) -> Image.Image:
        """One picture, decoded now, as RGB. Raises UnreadablePicture if the file is gone or no longer readable."""
        entry = self._entries[index]
        return open_picture(entry.read(), entry.name)

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
        rows = list(zip(self.names, labels, self._digests, strict=True))
        return hashlib.sha256(repr(rows).encode()).hexdigest()

    def split(self, validation: float = 0.05) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the pictures to train on and of those to validate on, both ascending.

        Without a manifest about the share `validation` is for validation, and at least one picture if two differ.
        """
        if not 0 <= validation < 1:
            raise UserError(f"got a validation share of {validation}, wanted 0 or more and less than 1")
        sides = self._sides
        if sides is None:
            distinct = sorted(set(self._digests))
            below = sum(int(digest[:16], 16) < validation * 2**64 for digest in distinct)
            count = min(max(below, 1 if validation else 0), len(distinct) - 1)  # neither none nor all
            chosen = set(distinct[:count])
            sides = ["val" if digest in chosen else "train" for digest in self._digests]
        train, val = ([i for i, side in enumerate(sides) if side == wanted] for wanted in ("train", "val"))
        return train, val


# Crops


@lru_cache(maxsize=4)
def _permutation(n: int, epoch: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def shuffled(n: int, k: int, seed: int) -> int:
    """Which of n items is sample k, when the items are shuffled anew for every pass over them. Takes no memory for
    more than LISTED items."""
    epoch, place = divmod(k, n)
    return _permutation(n, epoch, seed)[place] if n <= LISTED else _scattered(n, place, seed * 1_000_003 + epoch)


def _scattered(n: int, place: int, key: int) -> int:
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
        picture = self.art.picture(self.indices[shuffled(len(self.indices), k, self.seed)])
        return to_tensor(random_crop(picture, self.size, rng.uniform(*self.scales), rng, flip=self.flip))
