"""Where pictures lie: in a folder, in a .tar, or in a .zip or compressed .tar, which is unpacked once into one file.

Notable choices:
- members are read by their byte offsets, without an open handle: an ArtFolder can be sent to other processes;
- names of members become labels and nothing else: nothing is ever written under them;
- what is not taken is listed with its reason, never passed over in silence.
"""

from __future__ import annotations

import lzma
import os
import re
import tarfile
import tempfile
import unicodedata
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from .base import CONTROLS, complaint
from .images import PICTURE_SUFFIXES, UnreadablePicture

DAMAGED = zipfile.BadZipFile, zlib.error, lzma.LZMAError, UnicodeDecodeError  # the last: names in a .zip
UNREADABLE = tarfile.TarError, *DAMAGED, OSError, EOFError, RuntimeError
LARGEST_MEMBER = 2**29  # bytes of a packed picture; a few kilobytes may promise any number
LARGEST_UNPACKED = 2**36  # bytes of all pictures of an archive


class Skipped(NamedTuple):
    """A picture that is not used; `reason` completes a sentence that begins with `name`."""

    name: str
    reason: str


class Entry(NamedTuple):
    """Where a picture lies: a whole file, or `size` bytes at `offset` of an archive; of a sheet of sprites a box."""

    name: str
    path: str
    offset: int = 0
    size: int = -1
    box: tuple[int, int, int, int] | None = None  # left, top, right and bottom in pixels

    def read(self) -> bytes:
        """The bytes of the file. Raises UnreadablePicture where it is not there any more."""
        if not os.path.isfile(self.path):  # a broken link; or a pipe, where reading would block
            raise UnreadablePicture(self.name, "is not there, or no ordinary file")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise UnreadablePicture(self.name, f"cannot be opened: {error.strerror}") from error


def normalized(name: str) -> str:
    """One spelling of a name, fit for a terminal: macOS gives accents decomposed, Linux allows bytes of any kind. Those
    that are no UTF-8 are read as Latin-1, which old names are in most often."""
    name = re.sub("[\udc80-\udcff]", lambda byte: chr(ord(byte[0]) - 0xDC00), name)  # Python's stand-ins for them
    return unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8")).translate(CONTROLS)


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def files_in_folder(root: Path) -> list[Entry]:
    """All visible files below a folder, by name. Links are followed, but no folder is walked twice."""
    entries, walked, pending = [], set(), [str(root)]
    while pending:  # linked folders come last, so that a folder is named by its real path where it has one
        for folder, subfolders, files in os.walk(pending.pop(0)):
            if (real := os.path.realpath(folder)) in walked:
                subfolders.clear()
                continue
            walked.add(real)
            subfolders[:] = sorted(part for part in subfolders if not _is_hidden(part))
            pending += [path for part in subfolders if os.path.islink(path := os.path.join(folder, part))]
            for path in (os.path.join(folder, file) for file in files if not _is_hidden(file)):
                entries.append(Entry(normalized(Path(path).relative_to(root).as_posix()), path))
    return sorted(entries)


def files_in_archive(archive: Path, owner: object) -> tuple[list[Entry], list[Skipped]]:
    """All visible plain files of an archive, by name, and what is not taken of it. Of several with one name the last
    counts, as for tar itself. What has to be unpacked is, into a file that goes when `owner` does.

    Raises UserError for what is no whole archive, and where the disk has no room for what is in it.
    """
    entries: dict[str, Entry] = {}
    skipped: list[Skipped] = []
    wanted = "a folder of pictures or a whole .tar, .tar.gz or .zip is wanted"
    with complaint(f"{archive} is neither a folder nor a readable archive, {wanted}", *UNREADABLE):
        for member in _unpacked(archive, owner) if _is_packed(archive) else _in_tar(archive):
            name = normalized("/".join(part for part in member.name.split("/") if part not in ("", ".")))
            parts = PurePosixPath(name).parts
            if any(map(_is_hidden, parts)) and ".." not in parts:
                continue
            if ".." in parts or member.name.startswith("/") or not isinstance(member, Entry):
                reason = member.reason if isinstance(member, Skipped) else "lies outside of the archive by its name"
                skipped.append(Skipped(name, reason))
                continue
            if name in entries:
                skipped.append(Skipped(name, "is in the archive more than once: the last one is taken"))
            entries[name] = member._replace(name=name)
    return sorted(entries.values()), skipped


def _is_packed(archive: Path) -> bool:
    """Whether it is a .zip, or a .tar that is compressed."""
    if zipfile.is_zipfile(archive):
        return True
    with archive.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0"))


def _in_tar(archive: Path) -> Iterator[Entry]:
    with tarfile.open(archive, "r:") as tar:
        for member in tar:
            if member.isreg() and not member.issparse():
                yield Entry(member.name, str(archive), member.offset_data, member.size)


def _unpacked(archive: Path, owner: object) -> Iterator[Entry | Skipped]:
    """The pictures of a .zip or compressed .tar, one after another in one file."""
    with tempfile.NamedTemporaryFile(prefix="igpt-", suffix=".unpacked", delete=False) as file:
        weakref.finalize(owner, Path(file.name).unlink, missing_ok=True)
        for name, size, read in _in_zip(archive) if zipfile.is_zipfile(archive) else _in_compressed_tar(archive):
            if PurePosixPath(name).suffix.lower() not in PICTURE_SUFFIXES:
                continue
            if size > LARGEST_MEMBER:
                yield Skipped(name, f"has {size} bytes, more than {LARGEST_MEMBER} that a picture may have")
                continue
            data, offset = read(), file.tell()
            if data is None:
                yield Skipped(name, "is encrypted")
            elif offset + len(data) > LARGEST_UNPACKED:
                raise OSError(f"it holds more than {LARGEST_UNPACKED} bytes of pictures")
            else:
                file.write(data)
                yield Entry(name, file.name, offset, len(data))


Member = tuple[str, int, Callable[[], bytes | None]]  # its name, its size in bytes, and what reads it if it is readable


def _in_zip(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as packed:
        for info in packed.infolist():
            if not info.is_dir():
                encrypted = info.flag_bits & 1
                yield info.filename, info.file_size, (lambda: None) if encrypted else partial(packed.read, info)


def _in_compressed_tar(archive: Path) -> Iterator[Member]:
    with tarfile.open(archive, "r|*") as tar:
        for member in tar:
            if member.isreg() and not member.issparse() and (content := tar.extractfile(member)) is not None:
                yield member.name, member.size, content.read
