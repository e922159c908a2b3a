"""Where the files of a collection lie: below a folder, or inside a .tar. `ArtFolder` stands on these."""

from __future__ import annotations

import os
import tarfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from .base import UserError
from .images import UnreadablePicture


@dataclass(frozen=True)
class Entry:
    """Where a picture lies: a whole file, or `size` bytes at `offset` of an archive."""

    name: str
    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        if not os.path.isfile(self.path):  # a broken link; or a pipe, which would wait for ever
            raise UnreadablePicture(self.name, "is not there, or no ordinary file")
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:
            raise UnreadablePicture(self.name, f"cannot be opened: {error.strerror}") from error


def tidy(name: str) -> str:
    """One spelling for a name: macOS hands out accents decomposed, and Linux allows bytes that are no text."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "replace").decode("utf-8"))


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part.lower() in ("thumbs.db", "desktop.ini", "__macosx")


def files_in_folder(root: Path) -> list[Entry]:
    """All visible files below a folder, by name. Links are followed, but no folder is walked twice."""
    entries, walked, pending = [], set(), [str(root)]
    while pending:  # linked folders wait until the real ones are done, so that a real name wins over a linked one
        for folder, subfolders, files in os.walk(pending.pop(0)):
            real = os.path.realpath(folder)
            if real in walked:
                subfolders.clear()
                continue
            walked.add(real)
            subfolders[:] = sorted(part for part in subfolders if not _is_hidden(part))
            paths = [os.path.join(folder, part) for part in subfolders]
            pending += [path for path in paths if os.path.islink(path)]
            for path in (os.path.join(folder, file) for file in files if not _is_hidden(file)):
                entries.append(Entry(tidy(Path(path).relative_to(root).as_posix()), path))
    return sorted(entries, key=lambda entry: (entry.name, entry.path))


def files_in_tar(archive: Path) -> list[Entry]:
    """All visible plain files of an archive, by name; of several with the same name the last, as tar itself has it."""
    entries = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if member.isreg() and not member.issparse() and not any(map(_is_hidden, parts)):
                    name = tidy("/".join(parts))
                    entries[name] = Entry(name, str(archive), member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        wanted = "a folder of pictures or a whole, uncompressed .tar is wanted"
        raise UserError(f"{archive} is neither a folder nor a readable .tar ({error}): {wanted}") from error
    return [entries[name] for name in sorted(entries)]
