"""`ArtFolder`: the pictures of a folder or of a .tar, checked once, with their labels and a steady train/val split.

Notable choices:
- every picture is decoded when the ArtFolder is made: a broken file is a line in a list now, not a crash at 3 am;
- the split goes by the content of a file, so exact duplicates share a side and new pictures do not move old ones;
- a .tar is read by offsets remembered at the start: no open handle, so an ArtFolder travels to worker processes.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from .art_files import Entry, files_in_folder, files_in_tar, tidy
from .base import UserError
from .images import PICTURE_SUFFIXES, UnreadablePicture, open_picture


@dataclass(frozen=True)
class Skipped:
    """A picture that is not used; `reason` completes a sentence that begins with `name`."""

    name: str
    reason: str


class ArtFolder:
    """The usable pictures below `path`, in the order of their names.

    `path` is a folder or an uncompressed .tar. The sub-folder of a picture is its label ("a/b" when nested); pictures
    at the top have the name of the folder, or of the archive, as their label. Hidden files are as good as absent.

    `manifest` is a CSV that decides the split: the column `path`, `name` or `id` names a picture (with or without
    folders and extension), the column `split` says train, val or test; test and unnamed pictures are in neither part.
    `progress` is called with (pictures checked, pictures in all).

    Raises UserError when the path is missing or of the wrong kind, when nothing is usable, and for a bad manifest.
    """

    labels: list[str]
    """The labels in use, sorted."""
    names: list[str]
    """For each picture its path below `path`, with forward slashes."""
    label_of: list[int]
    """For each picture the index of its label in `labels`."""
    sizes: list[tuple[int, int]]
    """For each picture its width and height in pixels."""
    skipped: list[Skipped]
    """Files with the name of a picture that cannot be used, and why."""
    ignored: int
    """How many files were passed over because their names do not promise a picture."""

    def __init__(
        self,
        path: str | Path,
        *,
        min_side: int = 16,
        manifest: str | Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        root = Path(path).expanduser().absolute()  # a later change of the working directory must not matter
        if not root.exists():
            raise UserError(f"{path} does not exist: a folder of pictures or a .tar of them is wanted")
        split_of = None if manifest is None else _read_manifest(Path(manifest).expanduser())
        files = files_in_folder(root) if root.is_dir() else files_in_tar(root)
        candidates = [entry for entry in files if PurePosixPath(entry.name).suffix.lower() in PICTURE_SUFFIXES]
        self.ignored = len(files) - len(candidates)
        self.skipped, self.sizes, self._entries, self._digests = [], [], [], []
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for done, (entry, result) in enumerate(pool.map(lambda entry: _check(entry, min_side), candidates), 1):
                if isinstance(result, Skipped):
                    self.skipped.append(result)
                else:
                    self._entries.append(entry)
                    self._digests.append(result[0])
                    self.sizes.append(result[1])
                if progress is not None:
                    progress(done, len(candidates))
        if not self._entries:
            first = f"; the first: {self.skipped[0].name} {self.skipped[0].reason}" if self.skipped else ""
            raise UserError(f"no usable picture in {path}, {len(files)} files looked at{first}")
        self.names = [entry.name for entry in self._entries]
        own_name = Path(os.path.abspath(root)).name if root.is_dir() else root.stem
        labels = [name.rpartition("/")[0] or tidy(own_name) or "pictures" for name in self.names]
        self.labels = sorted(set(labels))
        self.label_of = [self.labels.index(label) for label in labels]
        self._sides = None if split_of is None else [_side(name, split_of) for name in self.names]
        if self._sides is not None and not any(self._sides):
            raise UserError(f"{manifest} names none of the {len(self)} pictures in {path}")

    def __len__(self) -> int:
        return len(self._entries)

    def picture(self, index: int) -> Image.Image:
        """One picture, decoded now, as RGB. Raises UnreadablePicture if the file has changed for the worse."""
        entry = self._entries[index]
        return open_picture(entry.read(), entry.name)

    def digest(self, index: int) -> str:
        """The SHA-256 of the file of one picture."""
        return self._digests[index]

    @property
    def different(self) -> int:
        """How many pictures there are without exact copies."""
        return len(set(self._digests))

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over names, labels and contents: the same for the same art, wherever it lies."""
        lines = zip(self.names, self.label_of, self._digests, strict=True)
        return hashlib.sha256(repr([(n, self.labels[label], d) for n, label, d in lines]).encode()).hexdigest()

    def split(self, validation: float = 0.05) -> tuple[list[int], list[int]]:
        """The indices of the pictures to train on and of those to validate on, both ascending.

        Without a manifest about the share `validation` goes to the second part, and at least one picture if two differ.
        """
        if not 0 <= validation < 1:
            raise UserError(f"got a validation share of {validation}, wanted 0 or more and less than 1")
        sides = self._sides if self._sides is not None else self._sides_by_content(validation)
        train, val = ([i for i, side in enumerate(sides) if side == wanted] for wanted in ("train", "val"))
        return train, val

    def _sides_by_content(self, validation: float) -> list[str]:
        """The lowest digests go to validation, but never none and never all."""
        distinct = sorted(set(self._digests))
        share = sum(int(digest[:16], 16) < validation * 2**64 for digest in distinct)
        count = min(max(share, 1 if validation else 0), len(distinct) - 1)
        chosen = set(distinct[:count])
        return ["val" if digest in chosen else "train" for digest in self._digests]


def _check(entry: Entry, min_side: int) -> tuple[Entry, tuple[str, tuple[int, int]] | Skipped]:
    """Decode one picture; the SHA-256 of its file and its size, or why it is skipped."""
    try:
        content = entry.read()
        width, height = open_picture(content, entry.name).size
    except UnreadablePicture as error:
        return entry, Skipped(entry.name, error.reason)
    if min(width, height) < min_side:
        return entry, Skipped(entry.name, f"is too small: {width}x{height} pixels, wanted at least {min_side} a side")
    return entry, (hashlib.sha256(content).hexdigest(), (width, height))


# The manifest


def _read_manifest(path: Path) -> dict[str, str]:
    """What a manifest says: picture name to "train", "val" or "test"."""
    split_of: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a byte order mark in front
            rows = csv.DictReader(file)
            for row in rows:
                name, split = row.get("path") or row.get("name") or row.get("id"), row.get("split")
                if not name or split not in ("train", "val", "test"):
                    wanted = "a path, name or id and a split of train, val or test are wanted"
                    raise UserError(f"line {rows.line_num} of {path} says {name!r} and {split!r}: {wanted}")
                name = tidy(name.replace("\\", "/").removeprefix("./"))
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
