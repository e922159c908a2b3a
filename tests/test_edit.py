"""Editing: what is kept stays as it is, pixel by pixel; a picture's own tokens are used; replay says what it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generate.run import Job, edit_files, generate_files, replay
from igpt.config import ANCHORS, NO_LABEL, SamplingOptions, keep_of
from igpt.edit import (
    Edit,
    Source,
    blend,
    complete,
    draw_edit,
    extend,
    finish_edit,
    inpaint,
    labelled,
    open_source,
    vary,
)
from igpt.files import plan_output, write_picture
from igpt.image_gpt import ImageGPT
from igpt.model import cell_positions, to_cells
from igpt.recipe import read_recipe
from igpt.sampling import generators, sample
from igpt.tiling import encode
from tests.painting import paint
from tokenizer_vq.base import UserError
from tokenizer_vq.images import as_rgb
from train.gpt import cross_entropy

OPTIONS = SamplingOptions(steps=2, guidance=1)  # pulled hard, a tiny random model says one thing only
Capture = pytest.CaptureFixture[str]


def changed(one: Image.Image, other: Image.Image) -> np.ndarray[Any, Any]:
    """Bool [H, W]: where two pictures differ."""
    assert one.size == other.size
    return (np.asarray(one) != np.asarray(other)).any(-1)


def drawn(model: ImageGPT, folder: Path, size: tuple[int, int] = (32, 32), **more: Any) -> Path:
    """A picture that the model has generated, as a file."""
    options, seed, label = more.pop("options", OPTIONS), more.pop("seed", 7), more.pop("label", "red")
    return generate_files(model, Job(seed, options, plan_output(folder, 1)), size, label, **more)[0]


def files_of(model: ImageGPT, edit: Edit, folder: Path, **more: Any) -> list[Path]:
    fields: dict[str, Any] = {"n": 1, "seed": 3, "options": OPTIONS, **more}
    return edit_files(model, Job(output=plan_output(folder, fields["n"]), **fields), edit, "piece")


# What is kept


@pytest.mark.parametrize("size", [(32, 32), (42, 30), (13, 20), (3, 2)], ids=str)
@pytest.mark.parametrize("keep", ["top", "bottom", "left", "right", 0.25])
def test_complete_keeps_its_part_exactly_and_draws_the_rest(
    keep: str | float, size: tuple[int, int], each_model: ImageGPT
) -> None:
    picture = paint(1, (200, 40, 40), size)
    one, other = each_model.complete(picture, keep, n=2, seed=1, options=OPTIONS)
    side, share = keep_of(keep)
    kept = np.zeros(size[::-1], dtype=bool)
    rows, columns = max(1, round(size[1] * share)), max(1, round(size[0] * share))
    where = {"top": np.s_[:rows], "bottom": np.s_[-rows:], "left": np.s_[:, :columns], "right": np.s_[:, -columns:]}
    kept[where[side]] = True
    assert not changed(picture, one)[kept].any() and not changed(picture, other)[kept].any()
    assert changed(picture, one)[~kept].any()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_pictures_of_any_mode_can_be_edited(mode: str, tiny_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (40, 32)).convert("L").convert("I") if mode == "I;16" else paint(1, (9, 9, 200))
    picture = picture.convert(mode)
    (piece,) = tiny_model.complete(picture, "left", seed=1, options=OPTIONS)
    plain = as_rgb(picture)
    assert piece.mode == "RGB" and not changed(plain, piece)[:, : plain.width // 2].any()


@pytest.mark.parametrize("size", [(32, 32), (64, 48)], ids=["composed", "refined"])
def test_inpaint_changes_nothing_outside_the_mask(size: tuple[int, int], each_model: ImageGPT) -> None:
    picture, mask = paint(2, (200, 40, 40), size), Image.new("1", size, 0)
    mask.paste(1, (9, 10, 20, 25))
    (piece,) = each_model.inpaint(picture, mask, seed=1, options=OPTIONS)
    outside = ~np.asarray(mask)
    assert not changed(picture, piece)[outside].any()
    assert changed(picture, piece)[~outside].mean() > 0.9


@pytest.mark.parametrize("anchor", ANCHORS)
def test_extend_keeps_the_picture_where_the_anchor_says(anchor: str, each_model: ImageGPT) -> None:
    picture = paint(3, (40, 60, 200), (24, 20))
    (piece,) = each_model.extend(picture, (41, 33), anchor, seed=1, options=OPTIONS)
    left = 0 if "left" in anchor else 17 if "right" in anchor else 8
    top = 0 if "top" in anchor else 13 if "bottom" in anchor else 6
    assert piece.size == (41, 33)
    assert piece.crop((left, top, left + 24, top + 20)).tobytes() == picture.tobytes()


def test_vary_changes_nothing_at_0_and_more_the_stronger_it_is(each_model: ImageGPT, tmp_path: Path) -> None:
    path = drawn(each_model, tmp_path, each_model.grids.native_size)
    recipe = read_recipe(path)
    assert recipe is not None
    assert not changed(Image.open(path), each_model.vary(path, 0.0, options=OPTIONS)[0]).any()
    shares = []
    for strength in (0.2, 0.6, 1.0):
        edit = vary(each_model, open_source(each_model, path), strength)
        (varied,) = files_of(each_model, edit, tmp_path / str(strength))
        told = read_recipe(varied)
        assert told is not None and told.command == "vary"
        pairs = zip(told.given, told.tokens, recipe.tokens, strict=True)
        assert all(token == old for given, token, old in pairs if given)
        shares.append(sum(told.given) / len(told.given))
    assert 1 > shares[0] > shares[1] > shares[2] == 0


def test_blend_takes_every_kept_pixel_from_one_of_the_two_and_mix_says_how_many(each_model: ImageGPT) -> None:
    a, b = Image.new("RGB", (40, 32), (255, 0, 0)), Image.new("RGB", (80, 64), (0, 0, 255))
    counts = []
    for mix in (0.2, 0.5, 0.8):
        pixels = np.asarray(each_model.blend(a, b, mix, seed=2, options=OPTIONS)[0])
        of_a, of_b = ((pixels == colour).all(-1).mean() for colour in ((255, 0, 0), (0, 0, 255)))
        assert of_a + of_b > 0.5
        counts.append(of_b)
    assert counts[0] < counts[1] < counts[2]


def test_picture_i_of_an_edit_has_the_seed_plus_i(each_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    together = each_model.vary(picture, 0.7, n=3, seed=4, options=OPTIONS)
    (alone,) = each_model.vary(picture, 0.7, seed=6, options=OPTIONS)
    assert alone.tobytes() == together[2].tobytes() != together[0].tobytes()


# Cells and sprites


def test_a_mask_that_cuts_cells_draws_only_the_tokens_that_it_touches(each_model: ImageGPT, tmp_path: Path) -> None:
    size, token = each_model.grids.native_size, each_model.downsample
    source = open_source(each_model, drawn(each_model, tmp_path, size))
    mask = Image.new("L", size, 0)
    mask.paste(255, (3 * token, token, 6 * token, 4 * token))  # cells are two tokens a side: all of its edges cut some
    edit = labelled(each_model, inpaint(source, Source(as_rgb(mask))), None)
    outcomes = set()
    for seed in range(8):
        *_, (drawing,) = draw_edit(each_model, edit, seed, OPTIONS)
        piece = finish_edit(each_model, edit, seed, drawing.tokens_hw)
        outside_hw = torch.ones_like(drawing.known_hw)
        outside_hw[1:4, 3:6] = False
        assert source.tokens_hw is not None and torch.equal(piece.given_hw, outside_hw)
        assert torch.equal(drawing.tokens_hw[outside_hw], source.tokens_hw[outside_hw])
        outcomes.add(tuple(drawing.tokens_hw[~outside_hw].tolist()))
    assert len(outcomes) > 4, "the rest of a cut cell is drawn"


@pytest.mark.parametrize("size", [(16, 16), (13, 20), (40, 24), (200, 150)], ids=str)
@pytest.mark.parametrize("command", ["complete", "inpaint", "extend", "vary", "blend"])
def test_a_sprite_keeps_to_the_palette_and_what_is_not_drawn_stays(
    command: str, size: tuple[int, int], tiny_pixels: ImageGPT, tmp_path: Path
) -> None:
    path, (width, height) = drawn(tiny_pixels, tmp_path, size), size
    picture, mask = Image.open(path), Image.new("L", size, 0)
    mask.paste(255, (3, 5, width - 4, height // 2 + 2))
    (other,) = tiny_pixels.generate(size=24, seed=9, options=OPTIONS)
    kept, more = np.zeros((height, width), dtype=bool), {"seed": 3, "options": OPTIONS}
    if command == "complete":
        (piece,) = tiny_pixels.complete(path, "left", **more)
        kept[:, : round(width / 2)] = True
    elif command == "inpaint":
        (piece,) = tiny_pixels.inpaint(path, mask, **more)
        kept = np.asarray(mask) == 0
    elif command == "extend":
        (piece,) = tiny_pixels.extend(path, (width + 5, height + 3), "top-left", **more)
        kept[:] = True
    elif command == "vary":
        (piece,) = tiny_pixels.vary(path, 0.5, **more)
    else:
        (piece,) = tiny_pixels.blend(path, other, 0.5, **more)
    assert piece.size == ((width + 5, height + 3) if command == "extend" else size)
    colours = {tuple(bytes.fromhex(colour[1:])) for colour in tiny_pixels.info()["tokenizer"]["colours"]}
    assert {colour for _, colour in piece.getcolors(256) or [(0, None)]} <= colours
    same_part = piece.crop((0, 0, width, height))
    assert not changed(same_part, picture)[kept].any()
    assert command == "extend" or changed(same_part, picture)[~kept].any()


# Labels


def test_without_a_label_an_edit_is_drawn_as_the_one_that_fits_best_to_what_is_given(tiny_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    edit = complete(Source(picture), "left")
    grid = tiny_model.grids.composition(32, 32)
    known_hw = torch.zeros(grid, dtype=torch.bool)
    known_hw[:, : grid[1] // 2] = True
    tokens_hw = encode(tiny_model, picture)
    guessed = labelled(tiny_model, edit, None).label
    assert guessed == tiny_model.guess_label(tokens_hw, known_hw)
    other = tokens_hw.clone()
    other[~known_hw] = 0
    assert tiny_model.guess_label(other, known_hw) == guessed, "what is to be drawn has no say"
    wanted = {"red": "red", NO_LABEL: None}
    assert {label: labelled(tiny_model, edit, label).label for label in wanted} == wanted
    assert labelled(tiny_model, complete(Source(picture, label="blue"), "left"), None).label == "blue"


def test_the_guessed_label_is_the_likeliest_of_all(tiny_model: ImageGPT) -> None:
    guesses = set()
    for seed in range(24):
        options, label_B = SamplingOptions(guidance=1), torch.tensor([seed % 2])
        *_, step = sample(tiny_model.gpt, label_B, (8, 8), options, generators(seed, 1))
        (tokens_hw,) = step.tokens_Bhw
        cells_16 = torch.randperm(16, generator=torch.Generator().manual_seed(0))
        order = to_cells(tokens_hw[None], 2)[:, cells_16], cell_positions(4, 4)[cells_16].unsqueeze(0)
        with torch.inference_mode():
            nats = [cross_entropy(tiny_model.gpt(*order, torch.tensor([i])), order[0]) for i in (0, 1)]
        guess = tiny_model.guess_label(tokens_hw, torch.ones(8, 8, dtype=torch.bool))
        assert guess == tiny_model.labels[int(nats[1] < nats[0])]
        guesses.add(guess)
    assert guesses == {"red", "blue"}


# Tokens that a picture carries


@pytest.mark.parametrize("size", [(32, 32), (25, 18), (72, 40)], ids=str)
def test_a_picture_of_the_same_model_brings_its_exact_tokens_and_its_label(
    size: tuple[int, int], each_model: ImageGPT, tmp_path: Path
) -> None:
    path = drawn(each_model, tmp_path, size)
    source, recipe = open_source(each_model, path), read_recipe(path)
    assert recipe is not None and source.tokens_hw is not None
    assert tuple(source.tokens_hw.flatten().tolist()) == recipe.tokens and source.label == "red"
    (half,) = files_of(each_model, complete(source, "left"), tmp_path / "half")
    told = read_recipe(half)
    assert told is not None and told.grid == recipe.grid and any(told.given) and not all(told.given)
    pairs = zip(told.given, told.tokens, recipe.tokens, strict=True)
    assert all(token == old for given, token, old in pairs if given)


def test_an_extended_picture_has_the_tokens_of_the_picture_inside_it(tiny_model: ImageGPT, tmp_path: Path) -> None:
    source = open_source(tiny_model, drawn(tiny_model, tmp_path))
    assert source.tokens_hw is not None
    (path,) = files_of(tiny_model, extend(source, (48, 48), "center", 4), tmp_path / "more")
    recipe = read_recipe(path)
    assert recipe is not None and recipe.grid == (12, 12)
    assert torch.equal(torch.tensor(recipe.tokens).view(12, 12)[2:10, 2:10], source.tokens_hw)


def test_a_picture_changed_by_another_hand_or_made_by_another_model_is_a_plain_picture_with_a_warning(
    tiny_model: ImageGPT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = drawn(tiny_model, tmp_path)
    recipe = read_recipe(path)
    assert recipe is not None
    touched = Image.open(path).convert("RGB")
    touched.putpixel((3, 3), (1, 2, 3))
    huge = replace(recipe, tokens=(40_000,) * 64)
    for picture, chunk, why in [
        (touched, recipe, "changed since"),
        (Image.open(path), replace(recipe, weights_hash="0" * 64), "other weights"),
        (Image.open(path), huge, "tokens that the model has not"),
    ]:
        caplog.clear()
        other = write_picture(picture, tmp_path / "other.png", chunk, force=True)
        assert open_source(tiny_model, other).tokens_hw is None
        assert [why in record.getMessage() for record in caplog.records] == [True]
        assert tiny_model.vary(other, 0.5, options=OPTIONS)[0].size == (32, 32)


def test_a_hostile_chunk_makes_a_plain_picture_with_a_warning(
    tiny_model: ImageGPT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tests.test_files import with_chunk

    for text in ("[" * 100_000, "{", '{"prompt": "a cat"}', " " * (2 << 20)):
        caplog.clear()
        source = open_source(tiny_model, with_chunk(tmp_path / "a.png", text))
        assert source.tokens_hw is None and source.picture.size == (48, 32) and len(caplog.records) == 1


# Replay


def test_replay_draws_an_edit_again_from_its_seed_and_says_which_pixels_it_does_not_have(
    each_model: ImageGPT, tmp_path: Path, capsys: Capture
) -> None:
    size = each_model.grids.native_size
    photo, mask = Source(paint(1, (200, 40, 40), size)), Source(paint(1, (0, 0, 0), (32, 32)).resize(size))
    for edit in (complete(photo, "top"), inpaint(photo, mask), blend(each_model, photo, mask, 0.5)):
        (path,) = files_of(each_model, edit, tmp_path)
        recipe = read_recipe(path)
        assert recipe is not None and recipe.command == edit.command
        capsys.readouterr()
        again = read_recipe(replay(each_model, recipe, path=tmp_path / "again.png"))
        said = capsys.readouterr().err
        assert f"drawn again from seed 3: all {len(recipe.tokens)} tokens equal" in said
        assert "its pixels are not recorded" in said
        assert again is not None and again.tokens == recipe.tokens and again.given == recipe.given
    (path,) = files_of(each_model, vary(each_model, photo, 0.5), tmp_path)
    recipe = read_recipe(path)
    assert recipe is not None
    capsys.readouterr()
    again_path = replay(each_model, recipe, path=tmp_path / "varied.png")
    assert again_path.read_bytes() == path.read_bytes(), "a variation takes over no pixels"
    assert "recorded" in capsys.readouterr().err


def test_replay_of_a_large_edit_decodes_its_tokens_and_says_why(
    each_model: ImageGPT, tmp_path: Path, capsys: Capture
) -> None:
    (path,) = files_of(each_model, complete(Source(paint(1, (9, 9, 200), (64, 48))), "left"), tmp_path)
    recipe = read_recipe(path)
    assert recipe is not None
    again = replay(each_model, recipe, path=tmp_path / "again.png")
    assert Image.open(again).size == (64, 48)
    assert "needs its source picture" in capsys.readouterr().err


# Mistakes


def test_what_cannot_be_meant_is_refused_with_what_was_received(tiny_model: ImageGPT, tmp_path: Path) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    black, white = Image.new("L", (32, 32), 0), Image.new("L", (32, 32), 255)
    for keep in (0, 1, "0", "1.0", -0.5, 2, "middle", "nan"):
        with pytest.raises(UserError, match=str(keep)):
            tiny_model.complete(picture, keep)
    for mask, why in [(black, "all black"), (white, "all white"), (Image.new("L", (9, 8)), "scale the mask to 32x32")]:
        with pytest.raises(UserError, match=why):
            tiny_model.inpaint(picture, mask)
    for size in ((31, 64), (32, 32), (64, 8)):
        with pytest.raises(UserError, match=f"{size[0]}x{size[1]}"):
            tiny_model.extend(picture, size)
    with pytest.raises(UserError, match="'middle'"):
        tiny_model.extend(picture, 64, "middle")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match="strength"):
            tiny_model.vary(picture, share)
        with pytest.raises(UserError, match="mix"):
            tiny_model.blend(picture, picture, share)
    with pytest.raises(UserError, match="'green'"):
        tiny_model.vary(picture, label="green")
    with pytest.raises(UserError, match="0 pictures"):
        tiny_model.vary(picture, n=0)
    with pytest.raises(UserError, match=r"missing\.png"):
        tiny_model.vary(tmp_path / "missing.png")
