"""Sprites: indexed colours, the ground, other palettes, atlases."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from skimage.color import rgb2lab

import igpt
from generate.atlas import LARGEST_ATLAS, Sprite, atlas, atlas_shape
from igpt.config import SpriteOptions
from igpt.fitting import cover
from igpt.image_gpt import ImageGPT
from igpt.sprites import finish_sprite, match_palette, to_lab
from tests.painting import paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.images import to_picture
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from train.options import TrainOptions
from train.run import train
from train.sprites import advice, palette_for, sprite, sprite_view, with_colours_of

Capture = pytest.CaptureFixture[str]
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


def test_a_sprite_is_not_enlarged_beyond_what_memory_holds(tiny_pixels: ImageGPT) -> None:
    with pytest.raises(UserError, match="--scale 64 makes 68719476736 pixels"):
        tiny_pixels.generate(size=4096, scale=64)


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
    assert record["meta"]["image"] == "rings.png" and list(record["frames"]) == [each.name for each in sprites]
    covered = np.zeros((sheet.height, sheet.width), dtype=int)
    for each in sprites:
        frame = record["frames"][each.name]
        x, y, w, h = (frame["frame"][key] for key in "xywh")
        covered[y : y + h, x : x + w] += 1
        assert sheet.crop((x, y, x + w, y + h)).convert("RGBA") == each.picture.convert("RGBA")
        assert (frame["seed"], frame["label"]) == (each.seed, "ring")
    assert covered.max() == 1 and not np.asarray(sheet.convert("RGBA"))[..., 3][covered == 0].any()


def test_an_atlas_larger_than_a_texture_is_refused() -> None:
    assert atlas_shape(16, 1024, 1024) == (4, 4)
    with pytest.raises(UserError, match=str(LARGEST_ATLAS)):
        atlas_shape(300, 1024, 1024)


# Learning


def sprite_folder(folder: Path, clear: bool = True, size: tuple[int, int] = (16, 16)) -> Path:
    """Twelve discs of two colours, half of them with a hole."""
    for i in range(12):
        page = Image.new("RGBA", size, (0, 0, 0, 0) if clear else (10, 10, 40, 255))
        pen, x, y = ImageDraw.Draw(page), 2 + i % 3, 2 + i // 3
        pen.ellipse((x, y, x + 9, y + 9), fill=(200, 20 * (i % 4), 30, 255), outline=(0, 0, 0, 255))
        if i % 2:
            pen.rectangle((x + 4, y + 4, x + 5, y + 5), fill=page.getpixel((0, 0)))
        (folder / "disc").mkdir(parents=True, exist_ok=True)
        page.save(folder / "disc" / f"{i}.png")
    return folder


SHORT = {"preset": "toy", "gpt_samples": 64, "quiet": True, "precision": "fp32"}


def test_a_folder_of_sprites_becomes_a_palette_model_in_its_very_colours(tmp_path: Path, capsys: Capture) -> None:
    art = sprite_folder(tmp_path / "art", size=(17, 19))
    options = TrainOptions(**{**SHORT, "quiet": False})
    train(art, tmp_path / "mine", options)
    assert "a token is a pixel" in capsys.readouterr().err
    model = igpt.load(tmp_path / "mine")
    palette = model.tokenizer.config
    colours = {"#000000", "#c8001e", "#c8141e", "#c8281e", "#c83c1e"}
    assert set(palette.colours) == colours | {palette.ground} and palette.ground_inside
    (drawn,) = model.generate(size="17x19", seed=1)
    assert drawn.size == (17, 19) and drawn.mode == "P" and "transparency" in drawn.info
    assert {f"#{bytes(pixel[:3]).hex()}" for _, pixel in drawn.convert("RGBA").getcolors() if pixel[3]} <= colours


def test_a_plain_ground_without_transparency_is_transparent_where_it_reaches_the_edge(tmp_path: Path) -> None:
    found = palette_for(ArtFolder(sprite_folder(tmp_path, clear=False)), TrainOptions())
    assert found is not None and found.config.ground == "#0a0a28" and not found.config.ground_inside


def test_what_a_token_is_can_be_said_and_goes_by_the_pictures_otherwise(tmp_path: Path) -> None:
    sprites = ArtFolder(sprite_folder(tmp_path / "sprites"))
    assert palette_for(sprites, TrainOptions()) and palette_for(sprites, TrainOptions(tokens="vq")) is None
    (tmp_path / "photos").mkdir()
    for i in range(3):
        paint(i, (200, 40, 40), (96, 80)).save(tmp_path / "photos" / f"{i}.png")
        Image.effect_noise((32, 32), 90).save(tmp_path / "photos" / f"noise{i}.png")
    photos = ArtFolder(tmp_path / "photos")
    assert palette_for(photos, TrainOptions()) is None
    few = palette_for(photos, TrainOptions(palette="8"))
    assert few is not None and len(few.config.colours) <= 8 and few.lost > 50 and str(few.lost) in few.reason
    with pytest.raises(UserError, match="one of them"):
        palette_for(sprites, TrainOptions(tokens="vq", palette="8"))
    with pytest.raises(UserError, match="5000"):
        palette_for(sprites, TrainOptions(palette="5000"))
    (tmp_path / "two.hex").write_text("000000\nffffff\n")
    of_file = palette_for(sprites, TrainOptions(palette=str(tmp_path / "two.hex")))
    assert (
        of_file is not None
        and of_file.config.colours[:2] == ("#000000", "#ffffff")
        and len(of_file.config.colours) == 3
    )


def test_large_pictures_of_few_colours_are_said_to_be_cut_or_learned_smaller(tmp_path: Path) -> None:
    for size in ((96, 80), (32, 32)):
        folder = tmp_path / str(size[0])
        folder.mkdir()
        for i in range(3):
            ImageOps.posterize(paint(i, (200, 40, 40), size), 1).save(folder / f"{i}.png")
    assert "--grid" in advice(ArtFolder(tmp_path / "96")) and not advice(ArtFolder(tmp_path / "32"))


def test_a_sheet_is_cut_into_the_sprites_that_are_on_it(tmp_path: Path) -> None:
    page = Image.new("RGBA", (64, 32))
    for i in (0, 1, 5):
        page.paste((40 * i, 90, 90, 255), (16 * (i % 4) + 3, 16 * (i // 4) + 2, 16 * (i % 4) + 9, 16 * (i // 4) + 12))
    (tmp_path / "sheets").mkdir()
    page.save(tmp_path / "sheets" / "page.png")
    Image.new("RGBA", (60, 32), "red").save(tmp_path / "sheets" / "odd.png")
    art = ArtFolder(tmp_path / "sheets", grid=16)
    assert art.names == ["page-0000.png", "page-0001.png", "page-0005.png"] and art.sizes == [(16, 16)] * 3
    assert art.picture(2, "RGBA") == page.crop((16, 16, 32, 32)) and art.different == 3
    assert "do not divide" in art.skipped[0].reason


def test_an_enlarged_sprite_is_learned_as_what_it_was() -> None:
    small = picture(RING).resize((20, 25), Image.Resampling.NEAREST).convert("RGBA")
    assert sprite(small.resize((200, 250), Image.Resampling.NEAREST)) == small
    assert sprite(small) == small and max(sprite(Image.linear_gradient("L").convert("RGBA")).size) == 128


def test_the_view_of_a_sprite_lies_where_a_drawn_one_is_cut_out(tiny_pixels: ImageGPT) -> None:
    odd = picture(RING).crop((0, 0, 3, 5)).convert("RGBA")
    view_CHW = sprite_view(odd, EDGE, 2, mirrored=False)
    drawn = cover(tiny_pixels, to_picture(view_CHW), odd.size)
    assert view_CHW.shape == (3, 6, 4) and drawn == odd.convert("RGB")
    mirrored = to_picture(sprite_view(odd, EDGE, 2, mirrored=True))
    assert cover(tiny_pixels, mirrored, odd.size) == ImageOps.mirror(odd.convert("RGB"))


def test_fine_tuning_adds_the_colours_of_a_folder_and_begins_as_before(tiny_pixels: ImageGPT, tmp_path: Path) -> None:
    wider = with_colours_of(ArtFolder(sprite_folder(tmp_path)), tiny_pixels)
    known = len(tiny_pixels.tokenizer.config.colours)
    assert set(wider.tokenizer.config.colours[known:]) == {"#c8001e", "#c8141e", "#c8281e", "#c83c1e"}
    red = tiny_pixels.tokenizer.config.colours.index("#d03030")
    assert torch.equal(wider.gpt.tokens.weight[known:], wider.gpt.tokens.weight[red].expand(4, -1))
    assert torch.equal(wider.gpt.head.weight[:known], tiny_pixels.gpt.head.weight)
    assert with_colours_of(ArtFolder(tmp_path), wider) is wider
