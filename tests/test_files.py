"""Files: names, sizes, recipes, contact sheets, and that nothing is ever overwritten or half written."""

from __future__ import annotations

import base64
import json
import os
import struct
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from PIL.PngImagePlugin import PngInfo

import igpt
from generate.run import replay
from igpt.config import ANY_LABEL, AS_DRAWN, NO_LABEL, GPTConfig, SamplingOptions
from igpt.files import append_line, plan_output, stem_for, write_picture
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from igpt.recipe import Recipe, UntrustedRecipe, digest, is_unchanged, read_recipe, recipe_of
from igpt.sheet import MARGIN, square_sheet
from igpt.sizes import LARGEST_SIDE, SMALLEST_SIDE, Grids, parse_size
from tests.painting import drawn
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover

OPTIONS = SamplingOptions(steps=4)
RECIPE = Recipe(
    model="tiny",
    weights_hash="ab" * 32,
    label="red",
    seed=7,
    size=(48, 32),
    options=OPTIONS,
    grid=(2, 3),
    tokens=(0, 1, 2, 255, 256, 65535),
)


def painted(width: int = 48, height: int = 32) -> Image.Image:
    return Image.radial_gradient("L").resize((width, height)).convert("RGB")


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and ImageChops.difference(one, other).getbbox() is None


def with_chunk(path: Path, text: str, **how: bool) -> Path:
    """A PNG with `text` as its igpt chunk."""
    chunks = PngInfo()
    if how.get("international"):
        chunks.add_itxt("igpt", text, zip=how.get("zip", False))
    else:
        chunks.add_text("igpt", text, zip=how.get("zip", False))
    painted().save(path, pnginfo=chunks)
    return path


# Recipes


def test_a_recipe_survives_the_way_through_a_png(tmp_path: Path) -> None:
    path = write_picture(painted(), tmp_path / "a.png", RECIPE)
    assert read_recipe(path) == RECIPE
    with Image.open(path) as picture:
        assert same(picture.convert("RGB"), painted())


@pytest.mark.parametrize("version", [1, 2, 4])
def test_a_recipe_of_another_version_is_refused_in_a_sentence_that_names_both(version: int, tmp_path: Path) -> None:
    path = with_chunk(tmp_path / "a.png", altered(version=version, options={"steps": 4, "autoguidance": 1.5}))
    with pytest.raises(UserError, match=f"a recipe of version {version}, this igpt reads version 3"):
        recipe_of(path)


def test_the_tokens_that_an_edit_took_over_survive_too() -> None:
    recipe = replace(RECIPE, command="inpaint", given=(True, False, False, True, True, False), pixels="cd" * 32)
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_recipe_is_a_text_that_other_tools_can_read(tmp_path: Path) -> None:
    with Image.open(write_picture(painted(), tmp_path / "a.png", RECIPE)) as picture:
        record = json.loads(picture.text["igpt"])
    assert (record["seed"], record["label"], record["options"]["steps"], record["grid"]) == (7, "red", 4, [2, 3])
    assert base64.b64decode(record["tokens"]) == b"\0\0\1\0\2\0\xff\0\0\1\xff\xff"


def test_a_recipe_is_found_where_another_program_has_moved_it_behind_the_pixels(tmp_path: Path) -> None:
    png = write_picture(painted(), tmp_path / "a.png", RECIPE).read_bytes()
    at = png.index(b"tEXtigpt") - 4
    length = struct.unpack(">I", png[at : at + 4])[0] + 12
    end = len(png) - 12
    (tmp_path / "b.png").write_bytes(png[:at] + png[at + length : end] + png[at : at + length] + png[end:])
    assert read_recipe(tmp_path / "b.png") == RECIPE


def test_pictures_of_other_programs_have_no_recipe(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "a.gif"):
        painted().save(tmp_path / name)
        assert read_recipe(tmp_path / name) is None


def test_a_recipe_may_lack_what_came_later_and_a_label() -> None:
    record = json.loads(RECIPE.to_json())
    for name in ("label", "saved", "sprite"):
        del record[name]
    assert Recipe.from_json(json.dumps(record)) == replace(RECIPE, label=None, sprite=AS_DRAWN)


def altered(**changes: Any) -> str:
    return json.dumps({**json.loads(RECIPE.to_json()), **changes})


HOSTILE = {
    "empty": "",
    "broken": RECIPE.to_json()[:-20],
    "no json": "\0\1\2",
    "foreign": '{"prompt": "a cat"}',
    "a list": "[1, 2]",
    "a number": "7",
    "a huge number": "9" * 10_000,
    "nested": "[" * 100_000,
    "nested objects": '{"version":' * 100_000,
    "oversized": RECIPE.to_json() + " " * (1 << 20),
    "a later version": altered(version=4),
    "a version that is true": altered(version=True),
    "no model": altered(model=None),
    "a model that is a list": altered(model=["a"]),
    "a label that is a number": altered(label=3),
    "a seed that is text": altered(seed="7"),
    "a negative seed": altered(seed=-1),
    "a seed beyond 64 bits": altered(seed=2**64),
    "a size of zero": altered(size=[0, 32]),
    "a size of a million": altered(size=[10**6, 10**6]),
    "a size of one number": altered(size=[32]),
    "a size of fractions": altered(size=[32.5, 32.0]),
    "a grid that is not the tokens'": altered(grid=[3, 3]),
    "a negative grid": altered(grid=[-2, -3]),
    "an enormous grid": altered(grid=[10**9, 10**9]),
    "a command that is a number": altered(command=1),
    "a tile that is a number": altered(tile=1),
    "given tokens of another grid": altered(given="AAAA"),
    "given tokens that are no base64": altered(given="%"),
    "pixels that are a list": altered(pixels=[]),
    "tokens that are a list": altered(tokens=[1, 2]),
    "tokens that are no base64": altered(tokens="%%%"),
    "options that are a list": altered(options=[]),
    "an option that is unknown": altered(options={"colour": 1}),
    "an option that is no more": altered(options={"autoguidance": 1.0}),
    "an order that is no more": altered(options={"order": "spread"}),
    "an option that is text": altered(options={"steps": "32"}),
    "an option that is true": altered(options={"steps": True}),
    "an option that is no number": altered(options={"temperature": float("nan")}),
    "an option that is infinite": altered(options={"temperature": 1.0}).replace("1.0", "1e999"),
    "an option that is out of range": altered(options={"steps": 0}),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_chunk_that_is_no_recipe_is_not_trusted(text: str, tmp_path: Path) -> None:
    with pytest.raises(UntrustedRecipe, match=r"a\.png"):
        read_recipe(with_chunk(tmp_path / "a.png", text))


@pytest.mark.parametrize("international", [False, True])
def test_a_chunk_that_unpacks_to_a_gigabyte_is_not_trusted(international: bool, tmp_path: Path) -> None:
    bomb = with_chunk(tmp_path / "a.png", "[" * (50 << 20), zip=True, international=international)
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UntrustedRecipe, match=r"a\.png"):
        read_recipe(bomb)


def test_an_option_that_a_recipe_does_not_name_has_its_default(tmp_path: Path) -> None:
    assert recipe_of(with_chunk(tmp_path / "a.png", altered(options={"steps": 4}))).options == SamplingOptions(steps=4)


@pytest.mark.parametrize("content", [b"", b"some text", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n" + b"\0" * 100])
def test_reading_the_recipe_of_what_is_no_picture_is_the_users_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for wrong in (path, tmp_path / "missing.png", tmp_path):
        with pytest.raises(UserError, match="no picture that can be read"):
            read_recipe(wrong)


def test_a_picture_cut_off_or_damaged_anywhere_has_its_recipe_or_is_the_users_error(tmp_path: Path) -> None:
    png, path = write_picture(painted(8, 8), tmp_path / "a.png", RECIPE).read_bytes(), tmp_path / "broken.png"
    cut = [png[:length] for length in range(8, len(png), 7)]
    damaged = [png[:at] + bytes([png[at] ^ 0x55]) + png[at + 1 :] for at in range(8, len(png), 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the size of what it thinks it sees
        for content in cut + damaged:
            path.write_bytes(content)
            with suppress(UserError):
                recipe = read_recipe(path)
                assert recipe is None or recipe == RECIPE or content in damaged


# Names and writing


def test_an_existing_file_is_never_overwritten_but_gets_a_new_number(tmp_path: Path) -> None:
    paths = [write_picture(painted(8 + i, 8), tmp_path / "red-7.png") for i in range(3)]
    assert [path.name for path in paths] == ["red-7.png", "red-7-2.png", "red-7-3.png"]
    assert [Image.open(path).width for path in paths] == [8, 9, 10]


def test_force_replaces_the_file(tmp_path: Path) -> None:
    write_picture(painted(8, 8), tmp_path / "a.png")
    assert write_picture(painted(9, 8), tmp_path / "a.png", force=True) == tmp_path / "a.png"
    assert [(path.name, Image.open(path).width) for path in tmp_path.iterdir()] == [("a.png", 9)]


def test_a_link_that_points_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "a.png").symlink_to(tmp_path / "elsewhere.png")
    assert write_picture(painted(), tmp_path / "a.png").name == "a-2.png"
    assert not (tmp_path / "elsewhere.png").exists()


def test_a_name_taken_by_another_process_while_we_write_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "a.png", os.link

    def late(source: Path, target: Path) -> None:
        if target == path:
            path.write_bytes(b"somebody else's")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    assert write_picture(painted(), path).name == "a-2.png"
    assert path.read_bytes() == b"somebody else's"


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    names = [write_picture(painted(), tmp_path / "a.png").name for _ in range(2)]
    assert names == ["a.png", "a-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_when_writing_fails_nothing_is_left_behind(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:20])
        raise error

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write_picture(painted(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_is_cleared_away_an_hour_later(tmp_path: Path) -> None:
    old, new = (tmp_path / f".igpt-{number}.part" for number in range(2))
    for path in (old, new):
        path.mkdir()
        (path / "model.safetensors").touch()
    os.utime(old, (0, 0))
    write_picture(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("before", [b"", b"one\n", b"one\ntw"])
def test_a_line_goes_to_the_end_of_a_file_and_below_one_that_was_cut_off(before: bytes, tmp_path: Path) -> None:
    (path := tmp_path / "metrics.jsonl").write_bytes(before)
    append_line(path, "new")
    assert path.read_bytes() == before + b"\n" * before.endswith(b"tw") + b"new\n"


def test_a_written_picture_has_the_rights_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = write_picture(painted(), tmp_path / "a.png")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_any_label_makes_a_safe_file_name() -> None:
    assert stem_for("ukiyo_e", 7) == "ukiyo_e-7"
    assert stem_for("浮世絵", 7) == "浮世絵-7"
    assert stem_for("../../etc/pass wd", 7) == "etc-pass-wd-7"
    assert stem_for("///", 7) == "picture-7"
    assert len(stem_for("浮" * 1000, 2**63 - 1).encode()) < 200


def test_out_is_a_folder_or_the_exact_name_of_one_picture(tmp_path: Path) -> None:
    assert plan_output(None, 3).picture("red-7") == Path("red-7.png")
    assert plan_output(tmp_path / "new/deep", 3).picture("red-7") == tmp_path / "new/deep/red-7.png"
    exact = plan_output(tmp_path / "Cat.PNG", 1)
    assert exact.picture("red-7") == tmp_path / "Cat.PNG"
    assert exact.companion("red-7", "-sheet.png") == tmp_path / "Cat-sheet.png"
    (tmp_path / "album.png").mkdir()
    assert plan_output(tmp_path / "album.png", 3).picture("red-7") == tmp_path / "album.png/red-7.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["album.png"], "planning makes nothing"


def test_an_out_that_cannot_be_meant_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, count, why in [("a.png", 2, "one file"), ("a.gif", 1, "png"), ("file", 1, "file"), ("file/in", 1, "file")]:
        with pytest.raises(UserError, match=why):
            plan_output(tmp_path / out, count)


# Sheets


def test_a_sheet_shows_every_picture_in_rows() -> None:
    colours = ["red", "lime", "blue", "black", "yellow"]
    sheet = square_sheet([(Image.new("RGB", (20, 10), colour), "") for colour in colours])
    assert sheet.size == (3 * 20 + 4 * MARGIN, 2 * 10 + 3 * MARGIN)
    middles = [(MARGIN + 10 + i % 3 * (20 + MARGIN), MARGIN + 5 + i // 3 * (10 + MARGIN)) for i in range(5)]
    shown = [sheet.getpixel(middle) for middle in middles]
    assert shown == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 0)]
    assert sheet.getpixel((sheet.width - MARGIN - 10, sheet.height - MARGIN - 5)) == (255, 255, 255), "the sixth cell"


def test_a_caption_stays_in_its_cell() -> None:
    white = Image.new("RGB", (24, 24), "white")
    captioned = square_sheet([(white, "a caption far too long"), (white, "")])
    plain = Image.new("RGB", captioned.size, "white")
    written = ImageChops.difference(plain, captioned).getbbox()
    assert written is not None
    left, top, right, _ = written
    assert MARGIN <= left and right <= MARGIN + 24 and top >= MARGIN + 24


def test_a_sheet_of_many_pictures_stays_a_picture_one_can_open() -> None:
    assert max(square_sheet([(Image.new("RGB", (1024, 512)), "")] * 25).size) < 4300


# Sizes


def test_a_size_is_one_number_or_two() -> None:
    for size in ("256", 256, "256x256", " 256 ", (256, 256)):
        assert parse_size(size) == (256, 256)
    for size in ("640x384", "640X384", "640×384", (640, 384)):
        assert parse_size(size) == (640, 384)


@pytest.mark.parametrize(
    "size", ["0", "-1", "7", "4097", "100000", "12x", "x12", "12x-5", "256x7", "", "big", "1e2", "٢٥٦", "1" * 5000]
)
def test_any_other_size_is_refused_with_what_was_received(size: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_size(size)
    assert size[:300] in str(caught.value)


def test_the_grid_has_the_aspect_asked_for_and_nearly_as_many_cells_as_the_model_can_draw() -> None:
    grids = Grids(downsample=8, cell=2, cells=256)
    assert [grids.composition(side, side) for side in (256, 8, 1024)] == [(32, 32)] * 3
    assert (grids.composition(640, 384), grids.composition(384, 640)) == ((24, 40), (40, 24))
    for width, height in [(8, 1024), (1024, 8), (300, 299), (800, 600), (1000, 700), (257, 511)]:
        rows, columns = grids.composition(width, height)
        assert (columns, rows) == grids.composition(height, width) and rows % 2 == columns % 2 == 0
        rows, columns = rows // 2, columns // 2
        assert min(rows, columns) >= 4 and rows * columns <= 256
        seen = min(rows, columns * height / width) * min(columns, rows * width / height)
        if max(width, height) <= 4 * min(width, height):
            assert seen > 220, "cells that are left after cropping to the aspect"
    assert Grids(downsample=16, cell=1, cells=9).composition(100, 10) == (1, 9), "a model for very few cells"


def test_the_native_size_is_the_square_that_the_model_composes() -> None:
    grids = Grids(downsample=8, cell=2, cells=256)
    assert (grids.native, grids.native_size) == ((32, 32), (256, 256))
    assert grids.composition(*grids.native_size) == grids.native


def test_where_a_token_is_a_pixel_small_pictures_are_drawn_pixel_by_pixel() -> None:
    grids = Grids(downsample=1, cell=2, cells=256)
    assert (grids.composition(24, 32), grids.composition(9, 31)) == ((32, 24), (32, 10))
    assert grids.pyramid(64, 64) == [(32, 32), (64, 64)]
    assert grids.pyramid(130, 130) == [(26, 26)], "a pixel of 5x5"


@pytest.mark.parametrize("size", [(8, 8), (17, 31), (45, 60), (80, 8)])
def test_a_picture_has_exactly_the_size_asked_for(size: tuple[int, int], each_model: ImageGPT) -> None:
    (picture,) = each_model.generate(size=size, seed=3, steps=2)
    assert picture.size == size


def test_every_size_from_8_to_300_can_be_drawn_and_fitted(tiny_model: ImageGPT, tiny_pixels: ImageGPT) -> None:
    for side in (*range(SMALLEST_SIDE, 301), LARGEST_SIDE):
        for width, height in ((side, side), (side, 2 * side // 3 + 3), (10, side)):
            assert parse_size(f"{width}x{height}") == (width, height)
            for model in (tiny_model, tiny_pixels):
                rows, columns = (side // model.gpt.config.cell for side in model.grids.composition(width, height))
                assert 1 <= rows * columns <= model.gpt.config.cells


# Drawing


def draw(model: ImageGPT, folder: Path, **more: Any) -> list[Path]:
    return drawn(model, folder, **{"options": OPTIONS, **more})


def test_pictures_are_named_by_label_and_seed_and_printed(
    tiny_model: ImageGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = draw(tiny_model, tmp_path, n=3, sheet=True)
    names = ["red-7.png", "red-8.png", "red-9.png", "red-7-sheet.png"]
    assert [path.name for path in paths] == names
    assert capsys.readouterr() == ("".join(f"{path}\n" for path in paths), "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    (unlabelled,) = draw(tiny_model, tmp_path, label=NO_LABEL)
    assert unlabelled.name == f"{tiny_model.name}-7.png"


def labels_of(paths: list[Path]) -> set[str | None]:
    return {recipe_of(path).label for path in paths}


def test_without_a_label_each_seed_chooses_one_in_any_batch_and_the_recipe_says_which(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    paths = draw(tiny_model, tmp_path, n=18, label=None)
    assert labels_of(paths) == {"red", "blue"}
    for path in paths[::4]:
        recipe = recipe_of(path)
        assert path.name == f"{recipe.label}-{recipe.seed}.png"
        for label in (recipe.label, None):
            (alone,) = tiny_model.generate(label=label, seed=recipe.seed, options=OPTIONS)
            assert same(Image.open(path), alone), "the library chooses as the command does"


def test_a_seed_chooses_among_the_labels_that_are_drawn_well_and_any_chooses_among_all(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    def model(defaults: list[str]) -> ImageGPT:
        parts = tiny_model.tokenizer, tiny_model.gpt, tiny_model.labels
        return ImageGPT(*parts, name="tuned", provenance={"default_labels": defaults})

    tuned = model(["blue", "gone"])
    for label, labels in ((None, {"blue"}), (ANY_LABEL, {"red", "blue"}), ("red", {"red"})):
        assert labels_of(draw(tuned, tmp_path, n=12, label=label)) == labels
    for defaults in ([], ["gone"]):
        assert set(model(defaults).labels_for(None, 0, 20)) == {"red", "blue"}


def test_a_label_that_is_called_any_is_a_label_and_a_model_without_labels_draws_without(tiny_model: ImageGPT) -> None:
    named = ImageGPT(tiny_model.tokenizer, tiny_model.gpt, ["red", ANY_LABEL])
    assert named.labels_for(ANY_LABEL, 0, 3) == [ANY_LABEL] * 3
    gpt = GPT(GPTConfig(32, 0, layers=2, width=32, heads=2, head_layers=1, cells=16))
    plain = ImageGPT(tiny_model.tokenizer, gpt)
    for label in (None, ANY_LABEL, NO_LABEL):
        assert plain.labels_for(label, 0, 2) == [None, None]


def test_the_picture_of_a_seed_is_the_same_alone_and_in_any_batch(each_model: ImageGPT, tmp_path: Path) -> None:
    together = draw(each_model, tmp_path / "together", n=18)
    assert len({Image.open(path).tobytes() for path in together}) > 9, "different seeds draw different pictures"
    for i in (0, 5, 15, 16, 17):
        (alone,) = draw(each_model, tmp_path / "alone", seed=7 + i)
        assert alone.read_bytes() == together[i].read_bytes()


def test_what_the_command_draws_is_what_the_library_draws(each_model: ImageGPT, tmp_path: Path) -> None:
    (path,) = draw(each_model, tmp_path, size=(40, 24))
    (picture,) = each_model.generate(size=(40, 24), label="red", seed=7, steps=OPTIONS.steps)
    assert same(Image.open(path), picture)


@pytest.mark.parametrize(
    "asked",
    [
        {"label": NO_LABEL},
        {"size": (45, 31), "seed": 2**60},
        {"options": SamplingOptions(3, 0.7, 9, 0.9, 1.5, "raster")},
    ],
    ids=["without label", "odd size", "raster order"],
)
def test_the_recipe_of_a_picture_draws_the_same_pixels_again(
    asked: dict[str, Any], each_model: ImageGPT, tmp_path: Path
) -> None:
    (path,) = draw(each_model, tmp_path, **asked)
    recipe = recipe_of(path)
    for from_tokens in (False, True):
        again = replay(each_model, recipe, tmp_path / "again.png", from_tokens=from_tokens)
        assert same(Image.open(again), Image.open(path))
        assert read_recipe(again) == recipe


@pytest.mark.parametrize("asked", [{"size": (48, 40)}, {"tile": True, "size": (32, 24)}], ids=["large", "tile"])
def test_a_large_picture_and_a_texture_are_drawn_again_from_their_seed(
    asked: dict[str, Any], each_model: ImageGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texture of pixels once ended in an error: two windows of a round had a cell of each other's core in sight."""
    (path,) = draw(each_model, tmp_path, **asked)
    recipe = recipe_of(path)
    assert recipe.pixels == digest(Image.open(path)) and recipe.tile == ("tile" in asked)
    again = replay(each_model, recipe, tmp_path / "again.png")
    assert again.read_bytes() == path.read_bytes()
    assert "drawn again from seed 7" in capsys.readouterr().err


def test_a_recipe_with_a_grid_that_this_igpt_would_not_choose_is_only_decoded(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    (path,) = draw(tiny_model, tmp_path, size=(32, 32))
    recipe = recipe_of(path)
    other = replace(recipe, size=(96, 96), pixels="")
    with pytest.raises(UserError, match="8x8 tokens is not that on which a picture of 96x96 pixels is drawn"):
        replay(tiny_model, other, tmp_path / "again.png")
    again = replay(tiny_model, other, tmp_path / "again.png", from_tokens=True)
    assert same(Image.open(again), fit_cover(Image.open(path), 96, 96))


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_a_timelapse_lies_beside_its_picture_and_ends_with_it(kind: str, each_model: ImageGPT, tmp_path: Path) -> None:
    picture, film = draw(each_model, tmp_path, size=(48, 48), timelapse=kind)
    assert film.name == f"red-7-timelapse.{kind}"
    with Image.open(film) as frames:
        assert frames.n_frames > 3 and frames.size == (48, 48)
        frames.seek(frames.n_frames - 1)
        last = np.asarray(frames.convert("RGB")).astype(float)
    lost = np.abs(last - np.asarray(Image.open(picture).convert("RGB")))
    assert lost.mean() < 12 and (each_model.downsample > 1 or lost.max() == 0), "but for what the format loses"


def test_an_interruption_leaves_finished_files_whole_and_no_half_file(
    tiny_model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = Path.write_bytes, []

    def interrupted(path: Path, data: bytes) -> int:
        calls.append(path)
        if len(calls) == 2:
            write(path, data[:20])
            raise KeyboardInterrupt
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(tiny_model, tmp_path, n=3)
    assert [path.name for path in tmp_path.iterdir()] == ["red-7.png"]
    assert read_recipe(tmp_path / "red-7.png") is not None


def test_replay_refuses_another_model_and_tokens_that_come_out_differently(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    recipe, out = recipe_of(*draw(tiny_model, tmp_path)), tmp_path / "again.png"
    for changed, from_tokens, why in [
        (replace(recipe, weights_hash="0" * 64), False, "weights"),
        (replace(recipe, tokens=(0,) * len(recipe.tokens)), False, "came out differently"),
        (replace(recipe, tokens=(65535,) * len(recipe.tokens)), True, "65535"),
    ]:
        with pytest.raises(UserError, match=why):
            replay(tiny_model, changed, out, from_tokens=from_tokens)
    assert not out.exists()


def test_previews_show_what_is_drawn_and_end_with_the_picture(each_model: ImageGPT) -> None:
    """Previews were once made by writing into inference tensors, and every one of them died."""
    size = (40, 32) if each_model.downsample > 1 else (16, 13)
    frames = list(each_model.stream(n=2, size=size, seed=3, steps=4))
    assert len(frames) == 5 and all(picture.size == size for frame in frames for picture in frame)
    assert len(frames[0][0].getcolors() or []) == 1  # nothing is drawn yet: mid-grey
    assert frames[-1][1].tobytes() == each_model.generate(2, size=size, seed=3, steps=4)[1].tobytes()


# Recipes in other formats


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_every_format_carries_the_recipe_and_is_replayed_to_the_same_tokens(
    suffix: str, each_model: ImageGPT, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (picture,) = each_model.generate(size=32, label="red", seed=5, options=OPTIONS)
    path = igpt.save(picture, tmp_path / f"mine.{suffix}")
    recipe = recipe_of(path)
    assert recipe.seed == 5 and is_unchanged(path, recipe)
    again = replay(each_model, recipe, tmp_path / "again.png")
    assert "pixels differ" not in capsys.readouterr().err
    assert np.array_equal(np.asarray(Image.open(again).convert("RGBA")), np.asarray(picture.convert("RGBA")))
    Image.open(path).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "other.png")
    assert not is_unchanged(tmp_path / "other.png", recipe)


def test_a_picture_saved_twice_gets_a_number_and_a_strange_suffix_a_sentence(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    (picture,) = tiny_model.generate(size=16, seed=5)
    paths = [igpt.save(picture, tmp_path / "a.png") for _ in range(2)]
    assert [path.name for path in paths] == ["a.png", "a-2.png"] and igpt.save(picture, paths[0], force=True) == paths[
        0
    ]
    with pytest.raises(UserError, match=r"\.png, \.webp"):
        igpt.save(picture, tmp_path / "a.bmp")


def test_a_jpeg_has_no_room_for_the_recipe_of_a_very_large_picture(tmp_path: Path, tiny_model: ImageGPT) -> None:
    (picture,) = tiny_model.generate(size=16, seed=5)
    recipe = Recipe.from_json(picture.info["igpt"])
    large = replace(recipe, grid=(256, 256), tokens=(1,) * 65536)
    with pytest.raises(UserError, match="no room"):
        write_picture(picture, tmp_path / "a.jpg", large)
    assert not list(tmp_path.iterdir())
