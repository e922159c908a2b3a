"""The recipe inside each PNG: a text chunk `igpt` of JSON with all that made the picture, down to its grid of tokens.

So a picture can be drawn again. Pictures come from strangers: every field is checked on the way in. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
import operator
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from PIL import ExifTags, Image

from tokenizer_vq.base import MAX_PIXELS, UserError, complaint, flatten

from .config import AS_DRAWN, Chosen, SamplingOptions, SpriteOptions
from .sizes import LARGEST_GRID

CHUNK = "igpt"
EXIF_PREFIX = b"ASCII\0\0\0igpt "  # of a comment, in files that are no PNG
RECIPE_VERSION = 3
LARGEST_RECIPE = 1 << 20  # characters of JSON; a 32x32 grid needs about four thousand
COLOUR = re.compile("#[0-9a-f]{6}")
LARGEST_SEED = 2**63 - 1  # what a torch generator takes

JSON_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("model", "weights_hash", "command", "tokens", "given", "pixels", "saved"), (str,)),
    **{"label": (str, NoneType), "seed": (int,), "tile": (bool,), "size": (list,), "grid": (list,), "options": (dict,)},
}


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
    sprite: SpriteOptions = AS_DRAWN  # how it is finished where a token is a pixel
    pixels: str = ""  # SHA-256 of the picture's pixels, by which later changes are noticed
    saved: str = ""  # SHA-256 of its pixels in a file that loses some

    def to_json(self) -> str:
        """ASCII JSON, the inverse of `from_json`. The tokens become base64 of little-endian 16-bit numbers, the given
        ones base64 of bits, the first one lowest."""
        tokens = struct.pack(f"<{len(self.tokens)}H", *self.tokens)
        bits = "".join("01"[bit] for bit in reversed(self.given))
        given = int(bits or "0", 2).to_bytes(-(-len(self.given) // 8), "little")
        packed = {"tokens": base64.b64encode(tokens).decode(), "given": base64.b64encode(given).decode()}
        return json.dumps({"version": RECIPE_VERSION, **asdict(self), **packed})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The inverse of `to_json`. Raises ValueError or RecursionError when the text is no such recipe."""
        if len(text) > LARGEST_RECIPE:
            raise ValueError(f"it has {len(text)} characters, more than {LARGEST_RECIPE}")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("it is no JSON object")
        if (version := record.get("version")) != RECIPE_VERSION:
            raise ValueError(f"it is a recipe of version {version!r:.9}, this igpt reads version {RECIPE_VERSION}")
        record = dict[str, Any](label=None, saved="", sprite={}) | record
        _check_types(record, JSON_TYPES)
        if [type(number) for number in (*record["size"], *record["grid"])] != [int] * 4 or len(record["size"]) != 2:
            raise ValueError("its size or grid is not two whole numbers")
        (width, height), (rows, columns) = record["size"], record["grid"]
        tokens, given = (base64.b64decode(record[key], validate=True) for key in ("tokens", "given"))
        count = rows * columns
        if not 0 <= record["seed"] <= LARGEST_SEED:
            raise ValueError(f"its seed is {record['seed']}")
        if min(rows, columns) < 1 or len(tokens) != 2 * count or count > LARGEST_GRID:
            raise ValueError("its grid and tokens do not agree")
        if len(given) not in (0, -(-count // 8)):
            raise ValueError("its given tokens are not those of its grid")
        if min(width, height) < 1 or width * height > MAX_PIXELS:
            raise ValueError(f"its size is {width}x{height}")
        return cls(
            size=(width, height),
            options=sampling_options(record["options"]),
            grid=(rows, columns),
            tokens=struct.unpack(f"<{count}H", tokens),
            sprite=_options(SpriteOptions, record["sprite"]),  # {} in recipes of before there were any
            given=tuple(bool(given[i // 8] >> i % 8 & 1) for i in range(count)) if given else (),
            **{key: record[key] for key in ("model", "weights_hash", "label", "seed", "command", "tile")},
            **{key: record[key] for key in ("pixels", "saved")},
        )


def sampling_options(record: Any) -> SamplingOptions:
    """Options from JSON of a stranger. Raises ValueError for any of another kind or out of bounds."""
    return _options(SamplingOptions, record)


def _options(kind: type[Chosen], record: Any) -> Chosen:
    if not isinstance(record, dict):
        raise ValueError("its options are none")
    kinds = {key: {float: (int, float), tuple: (list,)}.get(type(v), (type(v),)) for key, v in asdict(kind()).items()}
    if unknown := record.keys() - kinds.keys():
        raise ValueError(f"it has unknown options {sorted(unknown)}")
    _check_types(record, {key: kinds[key] for key in record})
    options = kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in record.items()})
    if not all(isinstance(each, str) and COLOUR.fullmatch(each) for each in getattr(options, "colours", ())):
        raise ValueError("its colours are none")
    options.check()
    return options


def _check_types(record: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> None:
    for key, allowed in kinds.items():
        if type(value := record.get(key)) not in allowed:  # exactly: True is an int to isinstance
            raise ValueError(f"{key} is of type {type(value).__name__}")


def check_seeds(seed: int, n: int) -> tuple[int, int]:
    """Both as Python's own whole numbers. Raises UserError unless they are, n is 1 or more and a recipe can hold the
    seed of each of n pictures."""
    try:
        seed, n = operator.index(seed), operator.index(n)
    except TypeError as error:
        raise UserError(f"got {n!r} pictures from the seed {seed!r}; whole numbers are wanted") from error
    if n < 1:
        raise UserError(f"{n} pictures were asked for; 1 or more is wanted")
    if not 0 <= seed <= LARGEST_SEED - n:
        raise UserError(f"the seed {seed} is out of reach; a whole number from 0 to 2**63 - 1 - n is wanted")
    return seed, n


# Pictures


class UntrustedRecipe(UserError):
    """A picture carries what is no recipe."""


def recipe_of(path: str | Path) -> Recipe:
    """As `read_recipe`, where nothing can be done without one. Raises UserError where there is none."""
    if (recipe := read_recipe(path)) is None:
        raise UserError(f"{path} carries no recipe of igpt")
    return recipe


def read_recipe(path: str | Path) -> Recipe | None:
    """The recipe inside the picture at `path`, if there is any. Raises UserError when there is no such picture, and
    UntrustedRecipe when what it carries is none."""
    with _opened(path) as picture:
        text = getattr(picture, "text", {}).get(CHUNK)
        comment = (
            None if text is not None else picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        )
    if isinstance(comment, bytes) and comment.startswith(EXIF_PREFIX):
        text = comment.removeprefix(EXIF_PREFIX).decode("ascii", "replace")
    try:
        return None if text is None else Recipe.from_json(text)
    except (ValueError, RecursionError) as error:
        raise UntrustedRecipe(f"the igpt chunk of {path} cannot be used: {error}") from error


def to_exif(recipe: Recipe) -> Image.Exif:
    """A recipe as the comment of a picture that is no PNG; the inverse is in `read_recipe`."""
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = EXIF_PREFIX + recipe.to_json().encode("ascii")
    return exif


def is_unchanged(path: str | Path, recipe: Recipe) -> bool:
    """Whether the picture at `path` still has the pixels that its recipe speaks of. Raises UserError for no picture."""
    with _opened(path) as picture:
        return not recipe.pixels or digest(picture) in (recipe.pixels, recipe.saved)


def check_picture(path: str | Path) -> None:
    """Raises UserError, from a look at its head, for a file that is no picture."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture at `path`, of which only the head is read. Raises UserError where there is none."""
    unreadable = OSError, SyntaxError, Image.DecompressionBombError
    with complaint(f"{path} is no picture that can be read", *unreadable), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as picture:
                yield picture
        except ValueError as error:  # Pillow's own limit on text chunks
            raise UntrustedRecipe(f"the text chunks of {path} are too large to be looked at") from error


def digest(picture: Image.Image) -> str:
    """SHA-256 of the size and the RGB pixels of a picture, on white where it is transparent."""
    rgb = flatten(picture)
    return hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
