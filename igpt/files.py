"""Files that appear whole or not at all and never overwrite unasked; names for pictures. Imports no torch."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError

from tokenizer_vq.base import UserError, complaint, flatten

from .recipe import CHUNK, Recipe, digest, to_exif

REFUSALS = OSError, SafetensorError, UnicodeEncodeError  # of the disk, and of a locale that cannot say the name
ABANDONED = 3600  # seconds since anybody wrote to the beginning of a file
LONGEST_STEM = 50  # characters of a label in a file name: file systems allow 255 bytes, a character may have four
FORMATS = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
OTHER_FORMATS = {".gif", ".bmp", ".tif", ".tiff", ".avif"}
QUALITY = 92  # of WebP and JPEG, up to 100

# Writing


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to: moved over `path` in one go if the block ends well, removed if it does not. Makes the folder.

    Raises UserError when the disk refuses; what was there before is whole.
    """
    with _part(path) as part:
        yield part
        part.chmod(part.parent.stat().st_mode & 0o666)  # as the umask has it: safetensors lets nobody else read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A place to write to, in a hidden folder next to `path`, as safetensors writes beside what it is told to write.
    Raises UserError when the disk refuses."""
    room = path.with_name(f".igpt-{secrets.token_hex(8)}.part")
    with complaint(f"{path} cannot be written", *REFUSALS):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear(path.parent)
        room.mkdir()
        try:
            yield room / path.name
        finally:
            shutil.rmtree(room, ignore_errors=True)


@cache
def _clear(folder: Path) -> None:
    """Clears away what killed processes have left in a folder. Once, as looking through many pictures takes long."""
    for left in folder.glob(".igpt-*.part"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                shutil.rmtree(left)


def append_line(path: Path, line: str) -> None:
    """A line at the end of a text file; where the last one was cut off, a new one begins first. Raises UserError when
    the disk refuses."""
    with complaint(f"{path} cannot be written", *REFUSALS), open(path, "ab+") as file:
        if end := file.seek(0, os.SEEK_END):
            file.seek(end - 1)
            line = line if file.read() == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def write_picture(picture: Image.Image, path: Path, recipe: Recipe | None = None, *, force: bool = False) -> Path:
    """Writes a picture with its recipe, as `write_file` does."""
    return write_file(encode_picture(picture, path, recipe), path, force=force)


def encode_picture(picture: Image.Image, path: Path, recipe: Recipe | None) -> bytes:
    """What is in the file of a picture with its recipe: a PNG, or by the suffix of `path` a WebP or JPEG, whose recipe
    also knows the pixels that it has. Raises UserError where a JPEG has no room for the recipe."""
    kind = FORMATS[path.suffix.lower()]
    if kind == "JPEG":
        picture = flatten(picture)
    how: dict[str, Any] = {} if kind == "PNG" else {"quality": QUALITY, "lossless": picture.mode == "P"}
    if recipe is not None and kind == "PNG":
        how["pnginfo"] = PngInfo()
        how["pnginfo"].add_text(CHUNK, recipe.to_json())
    elif recipe is not None:
        recipe = replace(recipe, saved=digest(Image.open(BytesIO(_encoded(picture, kind, how)))))
        how["exif"] = to_exif(recipe)
    try:
        return _encoded(picture, kind, how)
    except ValueError as error:  # a part of a JPEG has 64 kB
        raise UserError(f"{path} has no room for the recipe of so large a picture: PNG or WebP is wanted") from error


def _encoded(picture: Image.Image, kind: str, how: dict[str, Any]) -> bytes:
    file = BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def save(picture: Image.Image, path: str | Path, *, force: bool = False) -> Path:
    """As `igpt.save`."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"got the name {path} for a picture; one in {', '.join(FORMATS)} is wanted")
    text = picture.info.get(CHUNK)
    with complaint(f"the picture for {path} carries no recipe that can be used", ValueError, TypeError, RecursionError):
        recipe = None if text is None else Recipe.from_json(text)
    return write_picture(picture, path, recipe, force=force)


def write_file(data: bytes, path: Path, *, force: bool = False) -> Path:
    """Writes a file whole or not at all and returns its path, which has a new number (-2, -3) where `path` was taken.

    With `force` a file at `path` is replaced. Raises UserError when the disk refuses.
    """
    with _part(path) as part:
        part.write_bytes(data)
        return _publish(part, path, force)


def _publish(tmp: Path, path: Path, force: bool) -> Path:
    """Gives the finished file its name. A hard link, unlike a rename, fails when the name was taken meanwhile."""
    place, number = path, 1
    while not force:
        try:
            os.link(tmp, place)
            return place
        except OSError:  # the name is taken, or the file system has no hard links
            if not os.path.lexists(place):
                break
        number += 1
        place = path.with_name(f"{path.stem}-{number}{path.suffix}")
    os.replace(tmp, place)
    return place


# Names


@dataclass(frozen=True)
class Output:
    """Where pictures go: a folder and, where the user has given one, the exact name of the one file."""

    folder: Path
    name: str | None = None
    suffix: str = ".png"

    def picture(self, stem: str) -> Path:
        """The file for a picture called `stem`, if the user has not named it."""
        return self.folder / (self.name or f"{stem}{self.suffix}")

    def companion(self, stem: str, ending: str) -> Path:
        """The file for something that goes with the picture, as its contact sheet (ending "-sheet.png")."""
        return self.folder / f"{Path(self.name).stem if self.name else stem}{ending}"


def plan_output(out: str | Path | None, count: int, suffix: str = ".png") -> Output:
    """Where `count` pictures go for the user's --out: a folder (None: the current one), or a file for a single picture.

    Creates nothing. Raises UserError when the place cannot be written, or does not suit the number of pictures.
    """
    path = Path(out if out is not None else ".").expanduser()
    named = "" if path.is_dir() else path.suffix.lower()
    if str(out) == "-" or named in OTHER_FORMATS:
        wanted = f"a folder or a name in {', '.join(FORMATS)} is wanted"
        raise UserError(f"{path} has no room for the recipe of a picture; {wanted}")
    if named in FORMATS and count > 1:
        raise UserError(f"{path} is the name of one file, but {count} pictures are wanted: name a folder")
    output = Output(path.parent, path.name) if named in FORMATS else Output(path, suffix=suffix)
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
