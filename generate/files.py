"""Pictures on disk: their names, the recipe inside each PNG, and writing that never overwrites and is never half done.

The recipe is a text chunk `igpt` of JSON in the PNG: all that made the picture, down to its grid of tokens, so that it
can be drawn again. Pictures come from strangers, so every field is checked on the way in. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import re
import secrets
import struct
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from igpt.config import SamplingOptions
from igpt.sizes import LARGEST_GRID
from tokenizer_vq.base import UserError

CHUNK = "igpt"
RECIPE_VERSION = 3
LARGEST_RECIPE = 1 << 20  # characters of JSON; a 32x32 grid needs about four thousand
LARGEST_PICTURE = 100_000_000  # pixels; an edited picture may be larger than one that can be generated
LARGEST_SEED = 2**63 - 1  # what a torch generator takes
LONGEST_STEM = 50  # characters of a label in a file name: file systems allow 255 bytes, a character may have four
OTHER_FORMATS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}

log = logging.getLogger("igpt")

# Recipe


@dataclass(frozen=True)
class Recipe:
    """What made a picture. Model and weights_hash say by whom, tokens (row by row, below 65536) say what."""

    model: str
    weights_hash: str
    label: str | None
    seed: int
    size: tuple[int, int]  # width and height in pixels
    options: SamplingOptions
    grid: tuple[int, int]  # rows and columns of tokens
    tokens: tuple[int, ...]
    command: str = "generate"
    tile: bool = False  # whether it wraps around
    given: tuple[bool, ...] = ()  # the tokens that an edit took over, row by row; empty: none
    pixels: str = ""  # SHA-256 of the picture's pixels, by which later changes are noticed

    def to_json(self, indent: int | None = None) -> str:
        """ASCII JSON, the inverse of `from_json`. The tokens become base64 of little-endian 16-bit numbers, the given
        ones base64 of bits, the first one lowest."""
        tokens = struct.pack(f"<{len(self.tokens)}H", *self.tokens)
        bits = "".join("01"[bit] for bit in reversed(self.given))
        given = int(bits or "0", 2).to_bytes(-(-len(self.given) // 8), "little")
        packed = {"tokens": base64.b64encode(tokens).decode(), "given": base64.b64encode(given).decode()}
        return json.dumps({"version": RECIPE_VERSION, **asdict(self), **packed}, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of `to_json`. Raises ValueError or RecursionError when the text is no such recipe."""
        if len(text) > LARGEST_RECIPE:
            raise ValueError(f"it has {len(text)} characters, more than {LARGEST_RECIPE}")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        if (version := _typed(record, "version", int)) != RECIPE_VERSION:
            raise ValueError(f"it is a recipe of version {version}, this igpt reads version {RECIPE_VERSION}")
        seed, (rows, columns) = _typed(record, "seed", int), _pair(record, "grid")
        packed = base64.b64decode(_typed(record, "tokens", str), validate=True)
        tokens, (width, height) = rows * columns, _pair(record, "size")
        if not 0 <= seed <= LARGEST_SEED or min(rows, columns) < 1 or len(packed) != 2 * tokens or tokens > LARGEST_GRID:
            raise ValueError("its seed, grid and tokens do not agree")
        if min(width, height) < 1 or width * height > LARGEST_PICTURE:
            raise ValueError(f"its size is {width}x{height}")
        return cls(
            model=_typed(record, "model", str),
            weights_hash=_typed(record, "weights_hash", str),
            label=_typed(record, "label", str, type(None)),
            seed=seed,
            size=(width, height),
            options=_options(_typed(record, "options", dict)),
            grid=(rows, columns),
            tokens=struct.unpack(f"<{tokens}H", packed),
            command=_typed(record, "command", str),
            tile=_typed(record, "tile", bool),
            given=_bits(_typed(record, "given", str), tokens),
            pixels=_typed(record, "pixels", str),
        )


def _typed(record: dict[str, Any], key: str, *kinds: type) -> Any:
    value = record.get(key)
    if type(value) not in kinds:  # exactly: True is an int to isinstance
        raise ValueError(f"{key} is of type {type(value).__name__}")
    return value


def _pair(record: dict[str, Any], key: str) -> tuple[int, int]:
    values = _typed(record, key, list)
    if [type(value) for value in values] != [int, int]:
        raise ValueError(f"{key} is not two whole numbers")
    return values[0], values[1]


def _bits(text: str, count: int) -> tuple[bool, ...]:
    """The inverse of what `to_json` does to `given`."""
    packed = base64.b64decode(text, validate=True)
    if len(packed) not in (0, -(-count // 8)):
        raise ValueError("its given tokens are not those of its grid")
    return tuple(bool(packed[i // 8] >> i % 8 & 1) for i in range(count)) if packed else ()


def _options(record: dict[str, Any]) -> SamplingOptions:
    defaults = asdict(SamplingOptions())
    if unknown := record.keys() - defaults.keys():
        raise ValueError(f"it has unknown options {sorted(unknown)}")
    for key, value in record.items():
        wanted = type(defaults[key])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"the option {key} is of type {type(value).__name__}")
        if wanted is float and not math.isfinite(value):
            raise ValueError(f"the option {key} is {value}")
    options = SamplingOptions(**record)
    options.check()
    return options


def read_recipe(path: str | Path) -> Recipe | None:
    """The recipe inside the picture at `path`; None, with a warning, when what is there cannot be trusted.

    Raises UserError when there is no such picture.
    """
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {}).get(CHUNK)
    except ValueError:  # Pillow's own limit on text chunks
        log.warning("the text chunks of %s are too large to be looked at", path)
        return None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {_reason(error)}") from error
    if text is None:
        return None
    try:
        return Recipe.from_json(text)
    except (ValueError, RecursionError) as error:
        log.warning("the igpt chunk of %s is ignored: %s", path, error)
        return None


def check_picture(path: str | Path) -> None:
    """Raises UserError, from a look at its head, for a file that is no picture or too large a one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {_reason(error)}") from error
    if width * height > LARGEST_PICTURE:
        raise UserError(f"{path} has {width}x{height} pixels; at most {LARGEST_PICTURE // 10**6} million are wanted")


def digest(picture: Image.Image) -> str:
    """SHA-256 of the size and the RGB pixels of a picture."""
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


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

    def sheet(self, stem: str) -> Path:
        """The file for the contact sheet beside it."""
        return self.beside(stem, "-sheet.png")


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


# Writing


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
    part = path.with_name(f".igpt-{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            return _publish(part, path, force)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {_reason(error)}") from error


def _publish(part: Path, path: Path, force: bool) -> Path:
    """Gives the finished file its name. A hard link, unlike a rename, fails when the name was taken meanwhile."""
    if force:
        os.replace(part, path)
        return path
    for place in _numbered(path):
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


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
