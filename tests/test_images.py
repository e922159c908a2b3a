"""Whatever a picture file holds, one plain RGB picture or one plain sentence comes out; tensors are exact inverses."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tests.painting import noise
from tokenizer_vq.base import MAX_PIXELS, UserError, flatten
from tokenizer_vq.images import UnreadablePicture, as_rgba, fit_cover, open_picture, random_crop, to_picture, to_tensor

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def packed(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_the_way_its_exif_orientation_asks(orientation: int) -> None:
    upright = noise(6, 4)
    # What a camera stores is the inverse of what a viewer has to do; 5 and 7 are their own inverses, 6 and 8 swap.
    turn = Image.Transpose
    stored = {
        1: None,
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = packed(upright if stored is None else upright.transpose(stored), exif=exif)
    assert open_picture(photo).tobytes() == upright.tobytes()


def test_damaged_exif_does_not_damage_the_picture() -> None:
    picture = noise(8, 8)
    assert open_picture(packed(picture, exif=b"Exif\x00\x00no tiff header")).tobytes() == picture.tobytes()


def row_of(colours: list[Any], mode: str) -> Image.Image:
    picture = Image.new(mode, (len(colours), 1))
    for x, colour in enumerate(colours):
        picture.putpixel((x, 0), colour)
    return picture


def opened_row(content: bytes) -> list[Any]:
    opened = open_picture(content)
    return [opened.getpixel((x, 0)) for x in range(opened.width)]


def grey(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


def test_transparency_is_laid_on_white() -> None:
    picture = row_of([(*RED, alpha) for alpha in (0, 128, 255)], "RGBA")
    assert opened_row(packed(picture)) == [WHITE, (255, 127, 127), RED]
    assert opened_row(packed(row_of([(50, 255), (50, 0)], "LA"))) == grey(50, 255)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_the_transparent_colour_of_a_palette_becomes_white(format: str) -> None:
    picture = row_of([0, 1], "P")
    picture.putpalette([*BLUE, *GREEN])
    assert opened_row(packed(picture, format, transparency=1)) == [BLUE, WHITE]


def test_the_transparent_colour_of_an_rgb_png_becomes_white() -> None:
    assert opened_row(packed(row_of([BLUE, GREEN], "RGB"), transparency=GREEN)) == [BLUE, WHITE]


def test_a_cmyk_jpeg_becomes_rgb_in_its_own_colours() -> None:
    red, green, blue = open_picture(packed(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")).getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize(("mode", "format"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF")])
def test_a_grey_picture_of_16_bit_is_scaled_and_not_clipped(mode: str, format: str) -> None:
    deep = row_of([0, 257 * 100, 257 * 200, 65535], mode)
    assert opened_row(packed(deep, format)) == grey(0, 100, 200, 255)


@pytest.mark.parametrize("white", [1.0, 255.0])
def test_a_grey_tiff_of_floats_keeps_its_range(white: float) -> None:
    assert opened_row(packed(row_of([0.0, 0.4 * white, white], "F"), "TIFF")) == grey(0, 102, 255)


def test_a_picture_of_one_bit_becomes_black_and_white() -> None:
    assert opened_row(packed(row_of([0, 1], "1"))) == grey(0, 255)


@pytest.mark.parametrize("format", ["GIF", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    opened = open_picture(packed(frames[0], format, save_all=True, append_images=frames[1:]))
    assert opened.getcolors() == [(64, RED)]


def test_metadata_of_the_source_does_not_travel_on() -> None:
    opened = open_picture(packed(noise(4, 4), icc_profile=b"a profile", dpi=(300, 300)))
    assert opened.info == {} and b"iCCP" not in packed(opened)


def test_bytes_and_path_of_a_file_give_the_same_picture(tmp_path: Path) -> None:
    file = tmp_path / "Blüte – 花.png"
    file.write_bytes(packed(noise(5, 7)))
    assert open_picture(file).tobytes() == open_picture(file.read_bytes()).tobytes() == noise(5, 7).tobytes()


# Refusing


def said_of(content: bytes) -> str:
    with pytest.raises(UnreadablePicture) as caught:
        open_picture(content, "x.jpg")
    assert isinstance(caught.value, UserError)
    assert str(caught.value) == f"x.jpg {caught.value.reason}"
    return caught.value.reason


def test_a_truncated_jpeg_is_called_broken() -> None:
    whole = packed(noise(64, 64), "JPEG")
    assert said_of(whole[: len(whole) // 2]).startswith("is broken: ")


def test_a_text_named_jpg_is_called_no_picture() -> None:
    assert said_of(b"Dear diary, today I painted.").startswith("is no picture that can be read")


def test_an_empty_file_is_called_empty() -> None:
    assert said_of(b"") == "is empty"


def test_a_heic_photo_gets_its_own_sentence(tmp_path: Path) -> None:
    photo = tmp_path / "IMG_0001.heic"
    photo.write_bytes(b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic")
    assert "HEIC" in said_of(photo.read_bytes())
    with pytest.raises(UnreadablePicture, match=r"IMG_0001\.heic is a HEIC photo"):
        open_picture(photo)


def test_postscript_is_refused_before_ghostscript_could_start_on_it() -> None:
    assert said_of(packed(noise(8, 8), "EPS")) == "is a EPS file: save it as PNG or JPEG"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [30_000, 10_001])
def test_a_header_that_declares_a_bomb_is_refused_before_decoding(side: int) -> None:
    assert side**2 > MAX_PIXELS
    assert said_of(png_that_declares(side, side)) == "is larger than 100 million pixels"


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnreadablePicture, match=r"half\.png is not there"):
        open_picture(tmp_path / "half.png")
    with pytest.raises(UnreadablePicture, match="no ordinary file"):
        open_picture(tmp_path)


def test_the_error_survives_the_way_back_from_a_worker_process() -> None:
    error = pickle.loads(pickle.dumps(UnreadablePicture("x.jpg", "is broken")))
    assert (str(error), error.reason) == ("x.jpg is broken", "is broken")


# Tensors


def test_all_256_values_survive_the_way_to_a_tensor_and_back() -> None:
    ramp = Image.frombytes("RGB", (256, 1), bytes(v for i in range(256) for v in (i, 255 - i, i ^ 85)))
    image_CHW = to_tensor(ramp)
    assert image_CHW.dtype == torch.float32 and image_CHW.shape == (3, 1, 256)
    assert (image_CHW.min(), image_CHW.max()) == (-1, 1)
    assert to_picture(image_CHW).tobytes() == ramp.tobytes()


def test_rows_columns_and_channels_land_where_they_belong() -> None:
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((3, 1), (0, 255, 0))
    assert (to_tensor(picture) == 1).nonzero().tolist() == [[1, 1, 3]]
    assert to_picture(to_tensor(picture)).getpixel((3, 1)) == (0, 255, 0)


def test_values_beyond_the_range_are_clamped_and_between_levels_rounded() -> None:
    level = 1 / 127.5
    image_CHW = torch.tensor([-3.0, 3.0, -1 + 0.4 * level, -1 + 0.6 * level]).expand(3, 1, 4)
    assert [to_picture(image_CHW).getpixel((x, 0))[0] for x in range(4)] == [0, 255, 0, 1]


# Sizes


@pytest.mark.parametrize("source", [(40, 20), (20, 40), (7, 7), (300, 1)])
@pytest.mark.parametrize("wanted", [(16, 16), (31, 9), (64, 100)])
def test_fit_cover_gives_exactly_the_size_asked_for(source: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert fit_cover(noise(*source), *wanted).size == wanted


def test_fit_cover_keeps_the_middle_and_its_proportions() -> None:
    picture = Image.new("RGB", (30, 10), RED)
    picture.paste(BLUE, (10, 0, 20, 10))
    assert fit_cover(picture, 10, 10).getcolors() == [(100, BLUE)]


def test_fit_cover_leaves_a_picture_of_the_right_size_alone() -> None:
    assert fit_cover(noise(12, 9), 12, 9).tobytes() == noise(12, 9).tobytes()


@pytest.mark.parametrize("source", [(40, 20), (20, 40), (9, 9), (200, 3), (641, 479)])
@pytest.mark.parametrize("scale", [1.0, 1.37, 2.5])
def test_a_random_crop_has_exactly_its_size_wherever_it_falls(source: tuple[int, int], scale: float) -> None:
    rng = random.Random(0)
    assert {random_crop(noise(*source), 16, scale, rng, flip=True).size for _ in range(20)} == {(16, 16)}


def test_a_crop_of_a_picture_of_the_right_height_keeps_its_very_pixels() -> None:
    picture = noise(40, 16)
    windows = {picture.crop((x, 0, x + 16, 16)).tobytes() for x in range(25)}
    rng = random.Random(1)
    crops = {random_crop(picture, 16, 1, rng, flip=False).tobytes() for _ in range(200)}
    assert crops <= windows and len(crops) > 20


def test_a_crop_of_scale_two_shows_half_of_each_side() -> None:
    ramp = Image.linear_gradient("L").convert("RGB")  # 256 rows, dark to light
    crop = random_crop(ramp, 32, 2, random.Random(3), flip=False)
    top, bottom = crop.getpixel((0, 0))[0], crop.getpixel((0, 31))[0]
    assert abs((bottom - top) - 124) <= 4  # 31 of 32 rows, over half of 256 levels


def test_crops_repeat_with_the_seed_and_every_other_is_mirrored() -> None:
    picture = noise(16, 16)

    def crops(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [random_crop(picture, 16, 1, rng, flip=True).tobytes() for _ in range(100)]

    assert crops(5) == crops(5)
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    assert set(crops(5)) == {picture.tobytes(), mirrored}
    assert 30 < crops(5).count(mirrored) < 70


# Colours and transparency


def swapped_profile() -> bytes:
    """The sRGB profile with its red and blue primaries exchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_picture_with_a_colour_profile_is_converted_to_srgb(mode: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 20)).convert(mode).save(file, "PNG", icc_profile=swapped_profile())
    red, _, blue = open_picture(file.getvalue()).getpixel((1, 1))
    assert blue > 150 and red < 80 and "icc_profile" not in open_picture(file.getvalue()).info


def test_a_broken_colour_profile_leaves_the_pixels_alone() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (200, 30, 20)).save(file, "PNG", icc_profile=b"no profile at all")
    assert open_picture(file.getvalue()).getpixel((1, 1)) == (200, 30, 20)


@pytest.mark.parametrize(
    "mode, white", [("F", 1.0), ("F", 255.0), ("F", 65535.0), ("F", 1e6), ("I", 255), ("I", 65535)]
)
def test_greys_of_many_bits_are_scaled_by_the_range_they_hold(mode: str, white: float) -> None:
    values = np.array([[0, white / 2, white]], dtype=np.float32 if mode == "F" else np.int32)
    greys = np.asarray(flatten(as_rgba(Image.fromarray(values))))[0, :, 0]
    assert greys[0] == 0 and greys[1] in (127, 128) and greys[2] == 255


def test_a_float_picture_with_holes_is_read_without_them() -> None:
    values = np.array([[np.nan, np.inf, 0.5, 1.0]], dtype=np.float32)
    assert [flatten(as_rgba(Image.fromarray(values))).getpixel((x, 0))[0] for x in range(4)] == [0, 0, 128, 255]


def test_transparency_is_had_where_it_is_asked_for_and_laid_on_white_elsewhere() -> None:
    file = io.BytesIO()
    picture = Image.new("RGBA", (2, 1), (10, 20, 30, 0))
    picture.putpixel((1, 0), (10, 20, 30, 255))
    picture.save(file, "PNG")
    assert open_picture(file.getvalue(), mode="RGBA").getpixel((0, 0))[3] == 0
    assert open_picture(file.getvalue()).getpixel((0, 0)) == (255, 255, 255)
    assert flatten(picture, "#ff00ff", threshold=128).getpixel((0, 0)) == (255, 0, 255)
