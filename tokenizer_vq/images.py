"""Pictures and tensors: the one place that knows the value range, 8-bit RGB outside and [-1, 1] inside.

Notable choices:
- whatever comes in leaves as upright, opaque, 8-bit RGB, without metadata;
- `to_tensor` and `to_picture` are exact inverses for every 8-bit value;
- crops cut and resize in one step, and a picture that already has the right size keeps its very pixels.
"""

from __future__ import annotations

import io
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.Image import Resampling
from torch import Tensor

from .base import MAX_PIXELS, UserError, flatten

PICTURE_SUFFIXES = frozenset(  # in lower case
    ".png .jpg .jpeg .jpe .jfif .webp .gif .bmp .tif .tiff .avif .heic .heif .ppm .pgm .pbm .pnm .tga .jp2".split()
)
# Pillow opens far more, among them EPS, for which it would start Ghostscript on a stranger's file.
_FORMATS = frozenset("PNG JPEG MPO WEBP GIF BMP DIB TIFF AVIF HEIF PPM TGA JPEG2000".split())
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class UnreadablePicture(UserError):
    """A file that cannot be used as a picture; `reason` completes a sentence that begins with `name`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both as args, so that the error survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


# Reading


def open_picture(source: Path | bytes, name: str | None = None, mode: str = "RGB") -> Image.Image:
    """The picture in a file, or in the bytes of one, upright, 8 bit, first frame: in mode RGB with transparency laid on
    white, or in mode RGBA.

    Raises UnreadablePicture, by `name`, for what is missing, broken, no picture, or larger than MAX_PIXELS.
    """
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    head = b""
    try:
        if isinstance(source, Path) and not (source.is_file() and os.access(source, os.R_OK)):
            raise UnreadablePicture(name, "is not there, or no ordinary file that may be read")
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            head = file.read(12)
            picture = Image.open(file)
            if picture.format not in _FORMATS:
                raise UnreadablePicture(name, f"is a {picture.format} file: save it as PNG or JPEG")
            if picture.width * picture.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            picture.load()  # before EXIF is read, which hides what is broken
            return flatten(_upright(picture)) if mode == "RGB" else as_rgba(picture)
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:
        raise UnreadablePicture(name, _why_unknown(head)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePicture(name, f"is larger than {MAX_PIXELS // 1_000_000} million pixels") from error
    except Exception as error:  # on broken files Pillow's decoders raise anything from SyntaxError to struct.error
        raise UnreadablePicture(name, f"is broken: {str(error) or type(error).__name__}") from error


def _why_unknown(head: bytes) -> str:
    """What to say of a file that begins like this and that Pillow does not recognise."""
    if head[4:8] == b"ftyp" and head[8:] in _HEIC_BRANDS:
        return "is a HEIC photo, which cannot be read here: save it as JPEG or PNG"
    return "is no picture that can be read: PNG, JPEG, WebP, GIF, BMP or TIFF is wanted" if head else "is empty"


def as_rgba(picture: Image.Image) -> Image.Image:
    """A picture of any mode to upright sRGB of 8 bit without metadata, and its transparency."""
    return _upright(picture).convert("RGBA")


def _upright(picture: Image.Image) -> Image.Image:
    """In mode RGB, or RGBA where something may be transparent; in sRGB, and with nothing in `info`: a colour profile or
    EXIF of the source must not end up in what is drawn from it."""
    with suppress(Exception):  # damaged EXIF raises almost anything, and the pixels may be good
        picture = ImageOps.exif_transpose(picture)
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _eight_bit(picture)
    clear = "transparency" in picture.info or picture.mode in ("LA", "PA", "La", "RGBA", "RGBa")
    if profile and picture.mode in ("RGB", "RGBA", "RGBX", "CMYK", "P", "PA"):  # grey ones differ in their tones alone
        picture = _in_srgb(picture, profile, "RGBA" if clear else "RGB")
    picture = picture.convert("RGBA" if clear else "RGB")
    picture.info.clear()
    return picture


def _in_srgb(picture: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """A picture in the colours of its ICC profile, in sRGB; as it is where the profile is broken or of another mode."""
    if picture.mode != "CMYK":
        picture = picture.convert(mode)
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.createProfile("sRGB")
        out = ImageCms.profileToProfile(picture, source, srgb, outputMode="RGB" if picture.mode == "CMYK" else mode)
        return picture if out is None else out
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return picture


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Greys of 16 or 32 bit, or floats, to 8 bit by the range that their values are in: up to 1, 255, 65535, or up to
    the largest. Pillow's own conversion would clip them to white."""
    values_HW = np.nan_to_num(np.asarray(picture, dtype=np.float64), posinf=0, neginf=0)
    largest = float(values_HW.max())
    ranges = {"F": (1.0, 255.0, 65535.0), "I": (255.0, 65535.0)}.get(picture.mode, (65535.0,))
    white = next((white for white in ranges if largest <= white), largest)
    grey = Image.fromarray((values_HW.clip(0) * (255 / white) + 0.5).astype(np.uint8))
    grey.info = {key: value for key, value in picture.info.items() if key != "transparency"}  # a grey of the old range
    return grey


# Pictures and tensors


def from_uint8(values: Tensor) -> Tensor:
    """8-bit values, in any shape, to float32 in [-1, 1]. The inverse of `to_uint8`."""
    return values.float() / 127.5 - 1


def to_uint8(values: Tensor) -> Tensor:
    """Values in [-1, 1], in any shape, to 8 bit; values beyond are clamped. The inverse of `from_uint8`."""
    return ((values.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_tensor(picture: Image.Image) -> Tensor:
    """A picture to [3, H, W], float32 in [-1, 1]. The inverse of `to_picture`."""
    return from_uint8(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous())


def to_picture(image_CHW: Tensor) -> Image.Image:
    """[3, H, W] in [-1, 1] to a picture; values beyond are clamped. The inverse of `to_tensor`."""
    return Image.fromarray(to_uint8(image_CHW.detach()).permute(1, 2, 0).cpu().numpy())


# Sizes


def fit_cover(picture: Image.Image, width: int, height: int, resample: Resampling = Resampling.LANCZOS) -> Image.Image:
    """The largest centred part with the aspect ratio of width x height, resampled to exactly that size."""
    return ImageOps.fit(picture, (width, height), resample)


def random_crop(picture: Image.Image, size: int, scale: float, rng: random.Random, flip: bool) -> Image.Image:
    """A random square of `size` pixels a side, from the picture resampled to a short side of `size * scale`.

    `scale` is at least 1. With `flip`, half of the crops on average are mirrored.
    """
    crop = picture.resize((size, size), Resampling.LANCZOS, random_box(*picture.size, size, scale, rng))
    return ImageOps.mirror(crop) if flip and rng.random() < 0.5 else crop


def random_box(
    width: int, height: int, size: int, scale: float, rng: random.Random
) -> tuple[float, float, float, float]:
    """Where `random_crop` cuts a picture of these sides: left, top, right and bottom, in pixels."""
    zoom = size * scale / min(width, height)
    wide, high = max(size, round(width * zoom)), max(size, round(height * zoom))
    left, top = rng.randint(0, wide - size), rng.randint(0, high - size)
    return left * width / wide, top * height / high, (left + size) * width / wide, (top + size) * height / high
