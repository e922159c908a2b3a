"""Palette tokens: exact colours out, the nearest colour in, palettes from pictures and from files."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.painting import noise
from tokenizer_vq.base import UserError
from tokenizer_vq.images import to_picture, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

FIVE = ("#102030", "#ffcc00", "#00ff7f", "#8b0000", "#fefefe")


def painted(colours: tuple[str, ...], size: int = 10) -> Image.Image:
    """A picture in which each colour is rarer than the one before it."""
    picture = Image.new("RGB", (size, size), colours[0])
    for i, colour in enumerate(colours[1:], 1):
        picture.paste(colour, (0, i, size - i, i + 1))
    return picture


# The tokenizer


def test_every_token_comes_back_as_exactly_its_colour() -> None:
    tokenizer = PaletteTokenizer(PaletteConfig(FIVE))
    picture = to_picture(tokenizer.decode(torch.arange(5).view(1, 1, 5))[0])
    assert ["#" + bytes(picture.getpixel((x, 0))).hex() for x in range(5)] == list(FIVE)


def test_a_picture_in_the_colours_of_the_palette_survives_unchanged() -> None:
    tokenizer = PaletteTokenizer(PaletteConfig(FIVE))
    picture = painted(FIVE)
    tokens_Bhw = tokenizer.encode(to_tensor(picture)[None])
    assert tokens_Bhw.shape == (1, 10, 10) and tokens_Bhw.dtype == torch.int64
    assert to_picture(tokenizer.decode(tokens_Bhw)[0]).tobytes() == picture.tobytes()


def test_every_pixel_gets_the_nearest_colour() -> None:
    palette = [tuple(random.Random(i).randbytes(3)) for i in range(50)]
    picture = noise(12, 9, seed=99)
    tokenizer = PaletteTokenizer(PaletteConfig(tuple(bytes(colour).hex() for colour in palette)))
    tokens_hw = tokenizer.encode(to_tensor(picture)[None])[0]

    def distance(one: tuple[int, ...], other: tuple[int, ...]) -> int:
        return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))

    for y in range(9):
        for x in range(12):
            pixel = picture.getpixel((x, y))
            best = min(distance(pixel, colour) for colour in palette)
            assert distance(pixel, palette[tokens_hw[y, x]]) == best


def test_a_cast_to_bfloat16_or_autocast_moves_no_pixel_to_another_colour() -> None:
    neighbours = tuple(f"#80{green:02x}{blue:02x}" for green in range(120, 136) for blue in range(240, 256))
    picture = painted(neighbours[:9])
    expected = PaletteTokenizer(PaletteConfig(neighbours)).encode(to_tensor(picture)[None])
    cast = PaletteTokenizer(PaletteConfig(neighbours)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = cast.encode(to_tensor(picture)[None])
    assert torch.equal(tokens, expected)
    assert to_picture(cast.decode(tokens)[0]).tobytes() == picture.tobytes()


def test_a_large_palette_and_a_large_batch_are_searched_in_pieces_with_the_same_result() -> None:
    greys = tuple(f"#{i % 256:02x}{i // 256:02x}00" for i in range(4096))
    tokenizer = PaletteTokenizer(PaletteConfig(greys))
    images_BCHW = to_tensor(noise(100, 50))[None]  # 5000 pixels, more than one piece holds
    halves = [tokenizer.encode(images_BCHW[:, :, :, start : start + 50]) for start in (0, 50)]
    assert torch.equal(tokenizer.encode(images_BCHW), torch.cat(halves, 2))


def test_it_says_what_the_gpt_needs_to_know_and_keeps_no_weights() -> None:
    tokenizer = PaletteTokenizer(PaletteConfig(FIVE))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.downsample) == ("palette", 5, 1)
    assert tokenizer.state_dict() == {}


def test_the_config_survives_json() -> None:
    config = PaletteConfig(FIVE)
    assert PaletteConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_config_spells_colours_one_way_and_counts_repeated_ones_once() -> None:
    assert PaletteConfig(("FFCC00", "#ffcc00", "#000000")).colours == ("#ffcc00", "#000000")


@pytest.mark.parametrize("colour", ["#fff", "red", "#12345g", "", "#1234567", "123456\n"])
def test_a_colour_that_is_none_is_named(colour: str) -> None:
    with pytest.raises(UserError, match="wanted a colour such as #ffcc00") as caught:
        PaletteConfig(("#000000", colour))
    assert repr(colour) in str(caught.value)


def test_no_colours_are_refused() -> None:
    with pytest.raises(UserError, match="palette of 0 colours"):
        PaletteConfig(())


# Palettes from pictures


def test_the_palette_of_a_picture_of_five_colours_is_those_five_dark_to_light() -> None:
    tokenizer = PaletteTokenizer.fit([painted(FIVE)])
    assert tokenizer.config.colours == ("#102030", "#8b0000", "#00ff7f", "#ffcc00", "#fefefe")


def test_colours_of_all_pictures_are_counted() -> None:
    tokenizer = PaletteTokenizer.fit(Image.new("RGB", (2, 2), colour) for colour in FIVE)
    assert set(tokenizer.config.colours) == set(FIVE)


def test_clouds_of_colour_are_found_at_their_centres() -> None:
    rng = random.Random(0)
    centres = [(60, 60, 60), (200, 60, 60), (60, 200, 200)]
    pixels = [value + rng.randint(-5, 5) for _ in range(300) for centre in centres for value in centre]
    tokenizer = PaletteTokenizer.fit([Image.frombytes("RGB", (30, 30), bytes(pixels))], colours=3)
    for found, centre in zip(tokenizer.palette_K3.tolist(), centres, strict=True):
        assert max(abs(a - b) for a, b in zip(found, centre, strict=True)) <= 1


def test_a_frequent_colour_weighs_more_than_a_rare_one() -> None:
    picture = Image.new("RGB", (10, 10), (100, 100, 100))
    picture.putpixel((0, 0), (200, 200, 200))
    assert PaletteTokenizer.fit([picture], colours=1).config.colours == ("#656565",)  # 101, not 150


def test_more_colours_bring_the_picture_nearer() -> None:
    picture = noise(40, 40)
    image_BCHW = to_tensor(picture)[None]

    def error(colours: int) -> float:
        tokenizer = PaletteTokenizer.fit([picture], colours)
        return float((tokenizer.decode(tokenizer.encode(image_BCHW)) - image_BCHW).square().mean())

    assert error(64) < error(8) / 2 < error(2) / 4


def test_very_many_colours_on_a_plain_ground_still_give_a_full_palette_that_is_near_to_all() -> None:
    # Nearly all pixels are white, and a palette of what is frequent would have little else.
    cloud, ground = noise(100, 100), Image.new("RGB", (400, 400), "white")
    tokenizer = PaletteTokenizer.fit([cloud, ground], colours=128)
    assert tokenizer.vocab_size == 128 and "#ffffff" in tokenizer.config.colours
    image_BCHW = to_tensor(cloud)[None]
    error = (tokenizer.decode(tokenizer.encode(image_BCHW)) - image_BCHW).square().mean().sqrt() * 127.5
    assert error < 16  # 128 equal boxes would give 14.7 levels


def test_no_pictures_and_no_colours_are_refused() -> None:
    with pytest.raises(UserError, match="got no pictures"):
        PaletteTokenizer.fit([])
    with pytest.raises(UserError, match="got 0 colours"):
        PaletteTokenizer.fit([painted(FIVE)], colours=0)


# Palettes from files


def test_a_gimp_palette_is_read_with_its_headers_comments_and_names(tmp_path: Path) -> None:
    file = tmp_path / "sea.GPL"
    headers = ["GIMP Palette", "Name: Sea", "Columns: 4", "#", "# by me", ""]
    colours = ["  0   0 128\tNavy", "255 255 255", "1 2 3 Grün"]
    file.write_bytes("\r\n".join(headers + colours).encode("latin-1"))
    assert PaletteTokenizer.from_file(file).config.colours == ("#000080", "#ffffff", "#010203")


def test_a_hex_palette_is_read(tmp_path: Path) -> None:
    file = tmp_path / "gameboy.hex"
    file.write_text("\ufeff081820\n346856\n\n#88C070\ne0f8d0\n", encoding="utf-8")
    assert PaletteTokenizer.from_file(str(file)).config.colours == ("#081820", "#346856", "#88c070", "#e0f8d0")


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.gpl", b"255 0 0 red", "first line"),
        ("a.gpl", b"", "first line"),
        ("a.gpl", b"GIMP Palette\nName: none\n", "0 colours"),
        ("a.gpl", b"GIMP Palette\n256 0 0 too red", "three numbers from 0 to 255"),
        ("a.gpl", b"GIMP Palette\nred", "three numbers from 0 to 255"),
        ("a.hex", b"", "0 colours"),
        ("a.hex", b"not a colour", "such as #ffcc00"),
        ("a.hex", b"\x89PNG\r\n\x1a\n\x00\xff" * 500, "such as #ffcc00"),
        ("a.txt", b"ff0000", r"wanted a \.gpl or a \.hex"),
    ],
)
def test_a_bad_palette_file_gives_one_sentence(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=complaint) as caught:
        PaletteTokenizer.from_file(tmp_path / name)
    message = str(caught.value)
    assert name in message and "\n" not in message and len(message) < 200 + len(str(tmp_path))


def test_a_missing_palette_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.hex cannot be read: No such file"):
        PaletteTokenizer.from_file(tmp_path / "none.hex")
