"""The error for what a user can correct, transparent pictures on a ground, and the legend of shape letters.

Suffixes of tensor names in the whole project are their shapes:

    B batch    C channels    H, W picture height and width in pixels    h, w token grid rows and columns
    L sequence length    D model width    N attention heads    E width of one head or of one code    K vocabulary

This module imports no torch, so that the command line can answer before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL.Image import Image, alpha_composite, new

MAX_CODES = 65536  # of a tokenizer: tokens are stored in 16 bits
MAX_PIXELS = 100_000_000  # of a picture; a file of a few bytes may declare any size
CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), "\ufffd")  # for str.translate: a terminal would obey them


class UserError(ValueError):
    """Something the user can correct. The message is one sentence: what was received, what is wanted."""


@contextmanager
def complaint(sentence: str, *kinds: type[Exception]) -> Iterator[None]:
    """A block in which errors of these kinds become a UserError: the sentence and, after a colon, what is wrong."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{sentence}: {reason(error).partition(chr(10))[0]}") from error


def reason(error: BaseException) -> str:
    """What is wrong, in the words of the system where it has any."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def flatten(picture: Image, ground: str = "white", threshold: int | None = None) -> Image:
    """A picture as RGB, with a colour under what is transparent. With a threshold nothing is half transparent: pixels
    of that alpha or more keep their colour."""
    if picture.mode == "RGB":
        return picture
    picture = picture.convert("RGBA")
    if threshold is None:
        return alpha_composite(new("RGBA", picture.size, ground), picture).convert("RGB")
    page = new("RGB", picture.size, ground)
    page.paste(picture, mask=picture.getchannel("A").point(lambda alpha: 255 * (alpha >= threshold)))
    return page
