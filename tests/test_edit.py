"""Editing: what is kept stays as it is, pixel by pixel; a picture's own tokens are used; replay says what it can."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from generate.run import replay
from igpt.canvas import Task
from igpt.config import NO_LABEL, SamplingOptions, keep_of
from igpt.edit import blend, complete, extend, inpaint, open_source, vary
from igpt.files import write_picture
from igpt.image_gpt import SPRITES, DrawArguments, ImageGPT
from igpt.model import cell_positions, to_cells
from igpt.recipe import recipe_of
from igpt.sampling import generators, sample
from igpt.tiling import encode
from tests.painting import drawn, paint
from tokenizer_vq.base import UserError, flatten
from tokenizer_vq.images import as_rgba
from train.gpt import cross_entropy

OPTIONS = SamplingOptions(steps=2, guidance=1)  # pulled hard, a tiny random model says one thing only
Capture = pytest.CaptureFixture[str]


def changed(one: Image.Image, other: Image.Image) -> np.ndarray[Any, Any]:
    """Bool [H, W]: where two pictures differ."""
    assert one.size == other.size
    return (np.asarray(one) != np.asarray(other)).any(-1)


def picture_by(model: ImageGPT, folder: Path, size: tuple[int, int] = (32, 32)) -> Path:
    """A picture that the model has generated, as a file."""
    return drawn(model, folder, size=size, options=OPTIONS)[0]


def edited(model: ImageGPT, folder: Path, task: Task) -> Path:
    return drawn(model, folder, task, seed=3, options=OPTIONS)[0]


# What is kept


@pytest.mark.parametrize(
    ("keep", "size"),
    [("top", (42, 30)), ("bottom", (32, 32)), ("left", (13, 20)), ("right", (3, 2)), (0.25, (20, 13))],
    ids=str,
)
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
    plain = flatten(as_rgba(picture))
    assert piece.mode == "RGB" and not changed(plain, piece)[:, : plain.width // 2].any()


@pytest.mark.parametrize("size", [(32, 32), (64, 48)], ids=["composed", "refined"])
def test_inpaint_changes_nothing_outside_the_mask(size: tuple[int, int], each_model: ImageGPT) -> None:
    picture, mask = paint(2, (200, 40, 40), size), Image.new("1", size, 0)
    mask.paste(1, (9, 10, 20, 25))
    (piece,) = each_model.inpaint(picture, mask, seed=1, options=OPTIONS)
    outside = ~np.asarray(mask)
    assert not changed(picture, piece)[outside].any()
    assert changed(picture, piece)[~outside].mean() > 0.9


@pytest.mark.parametrize("anchor", ["center", "top", "left", "bottom-right"])
def test_extend_keeps_the_picture_where_the_anchor_says(anchor: str, each_model: ImageGPT) -> None:
    picture = paint(3, (40, 60, 200), (24, 20))
    (piece,) = each_model.extend(picture, (41, 33), anchor, seed=1, options=OPTIONS)
    left = 0 if "left" in anchor else 17 if "right" in anchor else 8
    top = 0 if "top" in anchor else 13 if "bottom" in anchor else 6
    assert piece.size == (41, 33)
    assert piece.crop((left, top, left + 24, top + 20)).tobytes() == picture.tobytes()


def test_vary_changes_nothing_at_0_and_more_the_stronger_it_is(each_model: ImageGPT, tmp_path: Path) -> None:
    path = picture_by(each_model, tmp_path, each_model.grids.native_size)
    recipe, shares = recipe_of(path), []
    assert not changed(Image.open(path), each_model.vary(path, 0.0, options=OPTIONS)[0]).any()
    for strength in (0.2, 0.6, 1.0):
        varied = recipe_of(edited(each_model, tmp_path, vary(each_model, path, strength)))
        pairs = zip(varied.given, varied.tokens, recipe.tokens, strict=True)
        assert varied.command == "vary" and all(token == old for given, token, old in pairs if given)
        shares.append(sum(varied.given) / len(varied.given))
    assert 1 > shares[0] > shares[1] > shares[2] == 0


def test_blend_takes_every_kept_pixel_from_one_of_the_two_and_mix_says_how_many(each_model: ImageGPT) -> None:
    a, b = Image.new("RGB", (24, 16), (255, 0, 0)), Image.new("RGB", (48, 32), (0, 0, 255))
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


def test_an_edit_can_be_watched_step_by_step_and_ends_with_the_picture_and_its_recipe(each_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (48, 40))
    (batch,) = each_model.batches(complete(each_model, picture, "left"), seed=4, options=OPTIONS)
    *steps, last = batch.steps()
    shares = [batch.share_drawn(grids) for grids in (*steps, last)]
    assert len(steps) > 1 and shares == sorted(shares) and shares[-1] == 1
    assert all(batch.preview(grid).size == (48, 40) for (grid,) in steps)
    ((drawn_picture, recipe),) = batch.results(last)
    assert drawn_picture.tobytes() == each_model.complete(picture, "left", seed=4, options=OPTIONS)[0].tobytes()
    assert (recipe.command, recipe.seed, recipe.size) == ("complete", 4, (48, 40))


def test_everything_that_draws_takes_every_sampling_option_by_name(tiny_model: ImageGPT) -> None:
    names = {"label", "seed", "options", *SPRITES} | set(SamplingOptions.__dataclass_fields__)
    assert set(DrawArguments.__annotations__) == names
    picture = paint(1, (200, 40, 40), (32, 32))
    assert len(tiny_model.vary(picture, n=2, seed=1, label="red", steps=2, guidance=1.0, order="raster")) == 2
    with pytest.raises(UserError, match="no option 'colour'"):
        tiny_model.vary(picture, colour=1)  # type: ignore[call-arg]


# Cells and sprites


def test_a_mask_that_cuts_cells_draws_only_the_tokens_that_it_touches(each_model: ImageGPT, tmp_path: Path) -> None:
    size, token = each_model.grids.native_size, each_model.downsample
    path, mask = picture_by(each_model, tmp_path, size), Image.new("L", size, 0)
    mask.paste(255, (3 * token, token, 6 * token, 4 * token))  # cells are two tokens a side: all of its edges cut some
    outside_hw = torch.ones(recipe_of(path).grid, dtype=torch.bool)
    outside_hw[1:4, 3:6] = False
    old_hw, outcomes = torch.tensor(recipe_of(path).tokens).view(recipe_of(path).grid), set()
    for batch in each_model.batches(inpaint(each_model, path, mask), 8, options=OPTIONS):
        ((_, recipe),) = batch.draw()
        tokens_hw, given_hw = (torch.tensor(values).view(recipe.grid) for values in (recipe.tokens, recipe.given))
        assert torch.equal(given_hw, outside_hw) and torch.equal(tokens_hw[outside_hw], old_hw[outside_hw])
        outcomes.add(tuple(tokens_hw[~outside_hw].tolist()))
    assert len(outcomes) > 4, "the rest of a cut cell is drawn"


@pytest.mark.parametrize("size", [(13, 20), (24, 40), (200, 150)], ids=str)
@pytest.mark.parametrize("command", ["complete", "inpaint", "extend", "vary", "blend"])
def test_a_sprite_keeps_to_the_palette_and_what_is_not_drawn_stays(
    command: str, size: tuple[int, int], tiny_pixels: ImageGPT, tmp_path: Path
) -> None:
    path, (width, height) = picture_by(tiny_pixels, tmp_path, size), size
    picture, mask = Image.open(path).convert("RGB"), Image.new("L", size, 0)
    mask.paste(255, (3, 5, width - 4, height // 2 + 2))
    (other,) = tiny_pixels.generate(size=24, seed=9, options=OPTIONS)
    parameters: dict[str, tuple[Any, ...]] = {
        "complete": ("left",),
        "inpaint": (mask,),
        "extend": ((width + 5, height + 3), "top-left"),
        "vary": (0.5,),
        "blend": (other, 0.5),
    }
    (piece,) = getattr(tiny_pixels, command)(path, *parameters[command], seed=3, options=OPTIONS)
    assert piece.mode == "P"
    piece = piece.convert("RGB")
    kept = np.full((height, width), command == "extend")
    if command == "complete":
        kept[:, : round(width / 2)] = True
    elif command == "inpaint":
        kept = np.asarray(mask) == 0
    assert piece.size == ((width + 5, height + 3) if command == "extend" else size)
    colours = {tuple(bytes.fromhex(colour[1:])) for colour in tiny_pixels.tokenizer.config.colours}
    assert {colour for _, colour in piece.getcolors(256) or [(0, None)]} <= colours
    same_part = piece.crop((0, 0, width, height))
    assert not changed(same_part, picture)[kept].any()
    assert command == "extend" or changed(same_part, picture)[~kept].any()


# Labels


def test_without_a_label_an_edit_is_drawn_as_the_one_that_fits_best_to_what_is_given(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    task, tokens_hw = complete(tiny_model, picture, "left"), encode(tiny_model, picture)
    known_hw = torch.zeros_like(tokens_hw, dtype=torch.bool)
    known_hw[:, :4] = True
    guessed = tiny_model.label_for(task, None)
    assert guessed == tiny_model.guess_label(tokens_hw, known_hw)
    assert tiny_model.guess_label(torch.where(known_hw, tokens_hw, 0), known_hw) == guessed, "the rest has no say"
    assert [tiny_model.label_for(task, label) for label in ("red", NO_LABEL)] == ["red", NO_LABEL]
    (blue,) = drawn(tiny_model, tmp_path, label="blue", options=OPTIONS)
    assert recipe_of(edited(tiny_model, tmp_path, complete(tiny_model, blue, "left"))).label == "blue"
    (none,) = drawn(tiny_model, tmp_path, task, label=NO_LABEL, options=OPTIONS)
    assert recipe_of(none).label is None


def test_the_guessed_label_is_the_likeliest_of_all(tiny_model: ImageGPT) -> None:
    guesses = set()
    for seed in range(24):
        label_B = torch.tensor([seed % 2])
        *_, step = sample(tiny_model.gpt, label_B, (8, 8), OPTIONS, generators(seed, 1))
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


@pytest.mark.parametrize("size", [(25, 18), (40, 48)], ids=str)
def test_a_picture_of_the_same_model_brings_its_exact_tokens_and_its_label(
    size: tuple[int, int], each_model: ImageGPT, tmp_path: Path
) -> None:
    path = picture_by(each_model, tmp_path, size)
    source, recipe = open_source(each_model, path), recipe_of(path)
    assert source.tokens_hw is not None and source.label == "red"
    assert tuple(source.tokens_hw.flatten().tolist()) == recipe.tokens
    half = recipe_of(edited(each_model, tmp_path, complete(each_model, path, "left")))
    assert half.grid == recipe.grid and any(half.given) and not all(half.given)
    pairs = zip(half.given, half.tokens, recipe.tokens, strict=True)
    assert all(token == old for given, token, old in pairs if given)


def test_an_extended_picture_has_the_tokens_of_the_picture_inside_it(tiny_model: ImageGPT, tmp_path: Path) -> None:
    path = picture_by(tiny_model, tmp_path)
    recipe = recipe_of(edited(tiny_model, tmp_path, extend(tiny_model, path, 48, "center")))
    inside_hw = torch.tensor(recipe.tokens).view(12, 12)[2:10, 2:10]
    assert tuple(inside_hw.flatten().tolist()) == recipe_of(path).tokens


def test_a_picture_changed_by_another_hand_or_made_by_another_model_is_a_plain_picture_with_a_warning(
    tiny_model: ImageGPT, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = picture_by(tiny_model, tmp_path)
    recipe = recipe_of(path)
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
    photo, mask = paint(1, (200, 40, 40), size), paint(1, (0, 0, 0), (32, 32)).resize(size)
    for task in (
        complete(each_model, photo, "top"),
        inpaint(each_model, photo, mask),
        blend(each_model, photo, mask, 0.5),
        vary(each_model, photo, 0.5),
    ):
        path = edited(each_model, tmp_path, task)
        recipe, again = recipe_of(path), tmp_path / f"{task.command}.png"
        replay(each_model, recipe, again)
        assert recipe_of(again) == replace(recipe, pixels=recipe_of(again).pixels) and recipe.command == task.command
        message = capsys.readouterr().err
        assert f"drawn again from seed 3: all {len(recipe.tokens)} tokens equal" in message
        assert ("its pixels are not recorded" in message) == (task.command != "vary"), "which takes over no pixels"
        assert (again.read_bytes() == path.read_bytes()) == (task.command == "vary")


def test_replay_of_a_large_edit_decodes_its_tokens_and_says_why(
    each_model: ImageGPT, tmp_path: Path, capsys: Capture
) -> None:
    task = complete(each_model, paint(1, (9, 9, 200), (64, 48)), "left")
    again = replay(each_model, recipe_of(edited(each_model, tmp_path, task)), tmp_path / "again.png")
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


# Transparency, arrays


def layer(colour: tuple[int, int, int], size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A transparent layer, painted on its right half."""
    mask = Image.new("RGBA", size, (*colour, 0))
    mask.paste((*colour, 255), (16, 0, 32, 32))
    return mask


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (200, 30, 20)])
def test_what_is_painted_on_a_transparent_mask_is_drawn_whatever_its_colour(
    colour: tuple[int, int, int], tiny_model: ImageGPT
) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    (edited,) = tiny_model.inpaint(picture, layer(colour), seed=1)
    assert not changed(edited, picture)[:, :16].any() and changed(edited, picture)[:, 16:].any()


def test_without_a_mask_the_transparent_part_of_a_picture_is_drawn(tiny_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    holed = picture.convert("RGBA")
    holed.paste((0, 0, 0, 0), (16, 0, 32, 32))
    (drawn,) = tiny_model.inpaint(holed, seed=1)
    assert drawn.convert("RGBA").getchannel("A").getextrema() == (255, 255)
    assert not changed(drawn.convert("RGB"), picture)[:, :16].any()
    with pytest.raises(UserError, match="nowhere transparent"):
        tiny_model.inpaint(picture)


def test_what_an_edit_keeps_stays_as_transparent_as_it_was(tiny_model: ImageGPT) -> None:
    holed = paint(1, (200, 40, 40), (32, 32)).convert("RGBA")
    holed.paste((10, 20, 30, 77), (0, 0, 8, 32))
    (completed,) = tiny_model.complete(holed, "left", seed=1)
    (extended,) = tiny_model.extend(holed, (48, 32), "left", seed=1)
    for edited in (completed, extended):
        values = np.asarray(edited)
        assert edited.mode == "RGBA" and np.array_equal(values[:, :16], np.asarray(holed)[:, :16])
        assert (values[:, 16:, 3] == 255).all()


def test_an_array_is_a_picture_and_anything_else_is_refused(tiny_model: ImageGPT) -> None:
    picture = paint(1, (200, 40, 40), (32, 32))
    mask_HW = np.zeros((32, 32), dtype=np.uint8)
    mask_HW[:, 16:] = 255
    (drawn,) = tiny_model.inpaint(np.asarray(picture), mask_HW, seed=np.int64(3))
    (same,) = tiny_model.inpaint(picture, Image.fromarray(mask_HW), seed=3)
    assert drawn == same
    for wrong in (np.zeros((4, 4)), np.zeros(4, dtype=np.uint8), 3, None):
        with pytest.raises(UserError, match="wanted"):
            tiny_model.complete(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no label 3; there are red, blue"):
        tiny_model.generate(size=16, label=3)  # type: ignore[arg-type]


def test_a_sprite_that_was_enlarged_or_recoloured_is_edited_by_its_own_tokens(
    tiny_pixels: ImageGPT, tmp_path: Path
) -> None:
    (tmp_path / "mine.hex").write_text("102030\n405060\na0a0a0\n")
    task = tiny_pixels.new_picture(16)
    (batch,) = tiny_pixels.batches(task, label="red", seed=4, scale=3, palette=tmp_path / "mine.hex")
    (result,) = batch.draw()
    path = write_picture(result.picture, tmp_path / "large.png", result.recipe)
    source = open_source(tiny_pixels, path)
    assert result.picture.size == (48, 48) and source.picture.size == (16, 16)
    (plain,) = tiny_pixels.generate(size=16, label="red", seed=4)
    assert source.tokens_hw is not None and not changed(source.picture, plain.convert("RGB")).any()
