"""Sprites: indexed colours, the ground, other palettes, atlases."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from generate.atlas import LARGEST_ATLAS, Sprite, atlas, atlas_shape
from igpt.config import SpriteOptions
from igpt.sprites import finish_sprite
from tokenizer_vq.base import UserError
from tokenizer_vq.colours import match_palette, to_lab
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

RED, WHITE, GREEN = "#d03030", "#ffffff", "#30a030"
#  A ring: ground outside it and inside it.
RING = ["00000", "01110", "01010", "01110", "00000"]
EDGE = PaletteConfig((WHITE, RED, GREEN), ground=WHITE, ground_inside=False)
EVERYWHERE = PaletteConfig((WHITE, RED, GREEN), ground=WHITE)


def picture(rows: list[str], palette: PaletteConfig = EDGE) -> Image.Image:
    colours = np.array([list(bytes.fromhex(colour[1:])) for colour in palette.colours], dtype=np.uint8)
    return Image.fromarray(colours[[[int(token) for token in row] for row in rows]])


def saved(sprite: Image.Image) -> Image.Image:
    """As a file gives it back."""
    file = io.BytesIO()
    sprite.save(file, "PNG")
    return Image.open(file)


def test_a_sprite_is_saved_in_indexed_colour_with_the_palette_of_the_model_in_its_order() -> None:
    sprite = saved(finish_sprite(picture(RING), EDGE, SpriteOptions(ground="keep")))
    assert sprite.mode == "P" and sprite.getpalette() == [255, 255, 255, 0xD0, 0x30, 0x30, 0x30, 0xA0, 0x30]
    assert np.array_equal(np.asarray(sprite.convert("RGB")), np.asarray(picture(RING)))


@pytest.mark.parametrize("palette, hole", [(EDGE, 255), (EVERYWHERE, 0)])
def test_the_ground_is_transparent_where_it_reaches_the_edge_or_everywhere(palette: PaletteConfig, hole: int) -> None:
    alpha_HW = np.asarray(saved(finish_sprite(picture(RING), palette, SpriteOptions())).convert("RGBA"))[..., 3]
    wanted = np.where(np.array([list(row) for row in RING]) == "1", 255, 0)
    wanted[2, 2] = hole
    assert np.array_equal(alpha_HW, wanted)


def test_the_ground_behind_a_diagonal_line_is_not_reached_from_the_edge() -> None:
    rows = ["00100", "01010", "10001", "01010", "00100"]
    alpha_HW = np.asarray(finish_sprite(picture(rows), EDGE, SpriteOptions()).convert("RGBA"))[..., 3]
    assert alpha_HW[2, 1:4].all() and not alpha_HW[0, 0]


def test_a_sprite_is_enlarged_by_whole_pixels_and_stays_indexed_and_transparent() -> None:
    small, large = (saved(finish_sprite(picture(RING), EDGE, SpriteOptions(scale=k))).convert("RGBA") for k in (1, 8))
    assert large.size == (40, 40) and np.array_equal(np.asarray(large)[::8, ::8], np.asarray(small))
    assert np.array_equal(np.asarray(large), np.asarray(small).repeat(8, 0).repeat(8, 1))


def test_a_texture_keeps_its_ground_and_a_picture_of_other_colours_all_of_its_pixels() -> None:
    assert "transparency" not in finish_sprite(picture(RING), EDGE, SpriteOptions(), wraps=True).info
    photo = Image.linear_gradient("L").convert("RGB")
    assert np.array_equal(np.asarray(finish_sprite(photo, EDGE, SpriteOptions())), np.asarray(photo))


def test_more_colours_than_an_indexed_picture_holds_become_rgba() -> None:
    many = PaletteConfig(tuple(f"#{k:06x}" for k in range(300)), ground="#000000")
    colours = np.arange(256, dtype=np.uint8).reshape(16, 16)
    sprite = finish_sprite(Image.fromarray(np.dstack([0 * colours, 0 * colours, colours])), many, SpriteOptions())
    assert sprite.mode == "RGBA" and sprite.getpixel((0, 0)) == (0, 0, 0, 0) and sprite.getpixel((5, 1))[3] == 255


def test_another_palette_recolours_what_is_drawn_and_nothing_else_is_seen() -> None:
    options = SpriteOptions(colours=("#102030", "#405060", "#102030"))
    visible = np.asarray(finish_sprite(picture(RING), EDGE, options).convert("RGBA"))
    assert set(map(tuple, visible[visible[..., 3] > 0].tolist())) == {(0x40, 0x50, 0x60, 255), (0x10, 0x20, 0x30, 255)}


@pytest.mark.parametrize("options", [SpriteOptions(scale=0), SpriteOptions(scale=65), SpriteOptions(ground="none")])
def test_what_cannot_be_meant_is_refused(options: SpriteOptions) -> None:
    with pytest.raises(UserError):
        options.check()


# Palettes


def test_lab_is_that_of_scikit_image() -> None:
    colours = torch.randint(0, 256, (500, 3), generator=torch.Generator().manual_seed(1))
    assert np.abs(to_lab(colours).numpy() - rgb2lab(colours.numpy() / 255)).max() < 0.01


def test_a_large_palette_takes_no_colour_twice_and_a_small_one_the_nearest() -> None:
    reds = torch.tensor([[200, 0, 0], [210, 0, 0], [0, 0, 250]])
    large = torch.tensor([[205, 0, 0], [90, 0, 0], [0, 0, 255], [0, 255, 0]])
    assert sorted(match_palette(reds, large)) == [0, 1, 2] and match_palette(reds, large)[2] == 2
    assert match_palette(reds, large[[0, 2]]) == [0, 0, 1]


def test_a_palette_stays_as_it_is_when_drawn_in_itself() -> None:
    colours = torch.randint(0, 256, (64, 3), generator=torch.Generator().manual_seed(2)).unique(dim=0)
    assert match_palette(colours, colours) == list(range(len(colours)))


def test_a_palette_of_one_colour_is_refused() -> None:
    with pytest.raises(UserError, match="1 colour"):
        match_palette(torch.zeros(3, 3), torch.zeros(1, 3))


@pytest.mark.parametrize("suffix", [".gpl", ".hex"])
def test_a_palette_written_to_a_file_is_read_again_as_it_was(tmp_path: Path, suffix: str) -> None:
    tokenizer = PaletteTokenizer(EDGE)
    (tmp_path / f"mine{suffix}").write_text(tokenizer.to_text(suffix))
    assert PaletteTokenizer.from_file(tmp_path / f"mine{suffix}").config.colours == EDGE.colours


# Atlases


def test_an_atlas_read_back_by_its_json_gives_every_sprite() -> None:
    rng = np.random.default_rng(0)
    sprites = []
    for seed in range(7):
        rows = ["".join(map(str, row)) for row in rng.integers(0, 3, (5, 4))]
        sprites.append(Sprite(f"ring-{seed}.png", finish_sprite(picture(rows), EDGE, SpriteOptions()), "ring", seed))
    sheet, text = atlas(sprites, "rings.png")
    record, sheet = json.loads(text), saved(sheet)
    assert sheet.mode == "P" and record["meta"]["size"] == {"w": sheet.width, "h": sheet.height}
    assert record["meta"]["image"] == "rings.png" and list(record["frames"]) == [sprite.name for sprite in sprites]
    covered = np.zeros((sheet.height, sheet.width), dtype=int)
    for sprite in sprites:
        frame = record["frames"][sprite.name]
        x, y, w, h = (frame["frame"][key] for key in "xywh")
        covered[y : y + h, x : x + w] += 1
        assert sheet.crop((x, y, x + w, y + h)).convert("RGBA") == sprite.picture.convert("RGBA")
        assert (frame["seed"], frame["label"]) == (sprite.seed, "ring")
    assert covered.max() == 1 and not np.asarray(sheet.convert("RGBA"))[..., 3][covered == 0].any()


def test_an_atlas_larger_than_a_texture_is_refused() -> None:
    assert atlas_shape(16, 1024, 1024) == (4, 4)
    with pytest.raises(UserError, match=str(LARGEST_ATLAS)):
        atlas_shape(300, 1024, 1024)
