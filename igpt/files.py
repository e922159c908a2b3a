"""Files that appear whole or not at all and never overwrite unasked; names for pictures. Imports no torch."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import count
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tokenizer_vq.base import UserError

from .recipe import CHUNK, Recipe, reason

ABANDONED = 3600  # seconds since anybody wrote to the beginning of a file
LONGEST_STEM = 50  # characters of a label in a file name: file systems allow 255 bytes, a character may have four
OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}

# Writing


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path near `path` to write to: moved over `path` in one go if the block ends well, removed if it does not."""
    room = _part(path)  # a folder: safetensors writes beside what it is told to write, and renames
    room.mkdir()
    try:
        yield room / path.name
        with open(room / path.name, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(room / path.name, path)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def write_picture(picture: Image.Image, path: Path, recipe: Recipe | None = None, *, force: bool = False) -> Path:
    """Writes a PNG whole or not at all and returns its path, which has a new number (-2, -3) where `path` was taken.

    With `force` a file at `path` is replaced. Raises UserError when the disk refuses.
    """
    chunks = PngInfo()
    if recipe is not None:
        chunks.add_text(CHUNK, recipe.to_json())
    png = BytesIO()
    picture.save(png, "PNG", pnginfo=chunks)
    return write_file(png.getvalue(), path, force=force)


def write_file(data: bytes, path: Path, *, force: bool = False) -> Path:
    """As `write_picture`, for the bytes of any file."""
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            return _publish(part, path, force)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {reason(error)}") from error


def _part(path: Path) -> Path:
    """A hidden name beside `path`, to write to first. Those that killed processes have left there are cleared away."""
    for left in path.parent.glob(".igpt-*.part"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
    return path.with_name(f".igpt-{secrets.token_hex(8)}.part")


def _publish(part: Path, path: Path, force: bool) -> Path:
    """Gives the finished file its name. A hard link, unlike a rename, fails when the name was taken meanwhile."""
    if force:
        os.replace(part, path)
        return path
    for number in count(1):
        place = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        if os.path.lexists(place):
            continue
        try:
            os.link(part, place)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            os.replace(part, place)
        return place
    raise AssertionError("the numbers never end")


# Names


@dataclass(frozen=True)
class Output:
    """Where pictures go: a folder and, where the user has given one, the exact name of the one file."""

    folder: Path
    name: str | None = None

    def picture(self, stem: str) -> Path:
        """The file for a picture called `stem`, if the user has not named it."""
        return self.folder / (self.name or f"{stem}.png")

    def beside(self, stem: str, ending: str) -> Path:
        """The file for something beside the picture, as its contact sheet (ending "-sheet.png")."""
        return self.folder / f"{Path(self.name).stem if self.name else stem}{ending}"


def plan_output(out: str | Path | None, count: int) -> Output:
    """Where `count` pictures go for the user's --out: a folder (None: the current one), or a .png for a single picture.

    Creates nothing. Raises UserError when the place cannot be written, or does not suit the number of pictures.
    """
    path = Path(out if out is not None else ".")
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix in OTHER_FORMATS:
        raise UserError(f"{path} would be no PNG, which has room for the recipe; a folder or a name in .png is wanted")
    if suffix == ".png" and count > 1:
        raise UserError(f"{path} is the name of one file, but {count} pictures are wanted: name a folder")
    output = Output(path.parent, path.name) if suffix == ".png" else Output(path)
    check_writable(output.folder)
    return output


def check_writable(folder: str | Path) -> None:
    """Raises UserError when `folder` neither can be written nor can be made. Makes nothing."""
    folder = Path(folder)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"nothing can be written to {folder}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"nothing can be written to {folder}: writing in {there} is not permitted")


def stem_for(name: str, seed: int) -> str:
    """A file name without suffix for the picture of a label or model and a seed, safe on every file system."""
    safe = re.sub(r"[^\w.-]+", "-", name).strip("-.")[:LONGEST_STEM] or "picture"
    return f"{safe}-{seed}"
