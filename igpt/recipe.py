"""The recipe inside each PNG: a text chunk `igpt` of JSON with all that made the picture, down to its grid of tokens.

So a picture can be drawn again. Pictures come from strangers: every field is checked on the way in. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import struct
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tokenizer_vq.base import MAX_PIXELS, UserError

from .config import SamplingOptions
from .sizes import LARGEST_GRID

CHUNK = "igpt"
RECIPE_VERSION = 3
LARGEST_RECIPE = 1 << 20  # characters of JSON; a 32x32 grid needs about four thousand
LARGEST_SEED = 2**63 - 1  # what a torch generator takes

log = logging.getLogger("igpt")


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
        if not 0 <= seed <= LARGEST_SEED:
            raise ValueError(f"its seed is {seed}")
        if min(rows, columns) < 1 or len(packed) != 2 * tokens or tokens > LARGEST_GRID:
            raise ValueError("its grid and tokens do not agree")
        if min(width, height) < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"its size is {width}x{height}")
        return cls(
            model=_typed(record, "model", str),
            weights_hash=_typed(record, "weights_hash", str),
            label=_typed(record, "label", str, type(None)),
            seed=seed,
            size=(width, height),
            options=sampling_options(_typed(record, "options", dict)),
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


def sampling_options(record: dict[str, Any]) -> SamplingOptions:
    """Options from JSON of a stranger. Raises ValueError for any of another kind or out of bounds."""
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
        return _inside(path)
    except _Untrusted as error:
        log.warning("the igpt chunk of %s is ignored: %s", path, error)
        return None


def recipe_of(path: str | Path) -> Recipe:
    """As `read_recipe`, where nothing can be done without a recipe: raises UserError when there is none to trust."""
    try:
        recipe = _inside(path)
    except _Untrusted as error:
        raise UserError(f"the igpt chunk of {path} cannot be used: {error}") from error
    if recipe is None:
        raise UserError(f"{path} carries no recipe of igpt")
    return recipe


class _Untrusted(Exception):
    """Why what a picture carries is no recipe."""


def _inside(path: str | Path) -> Recipe | None:
    """The recipe inside a picture, if there is any. Raises UserError for no picture, _Untrusted for no recipe."""
    try:
        with Image.open(path) as picture:
            text = getattr(picture, "text", {}).get(CHUNK)
    except ValueError as error:  # Pillow's own limit on text chunks
        raise _Untrusted("the text chunks are too large to be looked at") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {reason(error)}") from error
    try:
        return None if text is None else Recipe.from_json(text)
    except (ValueError, RecursionError) as error:
        raise _Untrusted(error) from error


def check_picture(path: str | Path) -> None:
    """Raises UserError, from a look at its head, for a file that is no picture or too large a one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                width, height = picture.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture that can be read: {reason(error)}") from error
    if width * height > MAX_PIXELS:
        raise UserError(f"{path} has {width}x{height} pixels; at most {MAX_PIXELS // 10**6} million are wanted")


def digest(picture: Image.Image) -> str:
    """SHA-256 of the size and the RGB pixels of a picture."""
    return hashlib.sha256(repr(picture.size).encode() + picture.convert("RGB").tobytes()).hexdigest()


def reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
