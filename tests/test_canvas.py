"""Any size: one composition refined in windows, no seams, textures that wrap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch import Generator

from igpt import canvas
from igpt.canvas import Drawing, Given, cores, finish, lay, levels_for, paint, put_in, redraw, wanted_cells
from igpt.config import SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.sampling import generators
from igpt.sizes import LARGEST_GRID, grid_for, ladder
from igpt.tiling import OVERLAP, decode, encode, seam_ratio, spans, window_for, wrapped
from tests.painting import paint as painted
from tokenizer_vq.images import fit_cover, to_tensor

OPTIONS = SamplingOptions(steps=2, guidance=1, autoguidance=1)  # pulled hard, a tiny random model says one thing only


def final(model: ImageGPT, size: tuple[int, int], seed: int = 1, n: int = 1, wraps: bool = False) -> list[Drawing]:
    labels_B = torch.full((n,), model.gpt.null_label)
    *_, drawings = paint(model, levels_for(model, size), labels_B, generators(seed, n), OPTIONS, wraps=wraps)
    return drawings


# Grids and windows


def test_a_picture_climbs_from_its_composition_to_its_own_pixels_about_twice_at_a_time() -> None:
    assert ladder(256, 256, 16, 256) == ladder(40, 40, 16, 256) == ladder(300, 300, 16, 256) == [(16, 16)]
    assert ladder(1024, 1024, 16, 256) == [(16, 16), (32, 32), (64, 64)]
    assert ladder(1024, 64, 16, 256) == [(4, 64)]
    for width, height in [(1536, 512), (4096, 4096), (4096, 8), (700, 1000), (333, 999)]:
        levels = ladder(width, height, 16, 256)
        assert levels[0] == grid_for(width, height, 16, 256)
        assert levels[-1][0] * 16 >= height and levels[-1][1] * 16 >= width, "nothing is enlarged at the end"
        for (h, w), (finer_h, finer_w) in pairwise(levels):
            assert h < finer_h <= 2 * h + 1 and w < finer_w <= 2 * w + 1
            assert abs(finer_h / finer_w - h / w) < 0.15 * h / w, "all in the same proportions"


def test_the_finest_grid_is_never_larger_than_a_recipe_can_hold() -> None:
    for size in [(4096, 4096), (4096, 3000), (9000, 9000)]:
        h, w = ladder(*size, 1, 1024)[-1]
        assert 0.9 * LARGEST_GRID < h * w <= LARGEST_GRID


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(("h", "w"), [(1, 9), (4, 4), (5, 64), (16, 16), (17, 33), (40, 7)])
def test_the_cores_of_the_windows_tile_the_grid_and_see_around_themselves(h: int, w: int, wraps: bool) -> None:
    times = torch.zeros(h * w, dtype=torch.long)
    for cells_Whw, core_Whw in canvas.token_windows(h, w, 16, wraps):
        assert cells_Whw[0].numel() <= 16 and cells_Whw.shape == core_Whw.shape
        times += torch.bincount(cells_Whw[core_Whw], minlength=h * w)
        for i, core in enumerate(core_Whw):
            others = cells_Whw[torch.arange(len(cells_Whw)) != i]
            assert not torch.isin(others, cells_Whw[i][core]).any(), "no window of a round sees another's core"
    assert bool((times == 1).all())
    for first, core in cores(40, 16, wraps):
        inside = wraps or 0 < first < 24
        assert not inside or (core.start - first >= 4 and first + 16 - core.stop >= 4)


def test_windows_cover_everything_and_overlap() -> None:
    for length in range(1, 200):
        found = spans(length, 32)
        assert found[0].start == 0 and found[-1].stop == length
        assert all(one.stop - two.start >= OVERLAP for one, two in pairwise(found))
        assert len({span.stop - span.start for span in found}) == 1 and found[0].stop <= 32
    assert all(rows * columns <= 64 for rows, columns in (window_for(h, w, 8) for h in (1, 5, 99) for w in (1, 5, 99)))


# Drawing


@pytest.mark.parametrize("wraps", [False, True])
def test_known_tokens_are_never_redrawn_and_all_others_are(wraps: bool, tiny_model: ImageGPT) -> None:
    generator = torch.Generator().manual_seed(0)
    known_hw = torch.rand(7, 9, generator=generator) < 0.4
    tokens_hw = torch.full((7, 9), 31)
    *_, last = redraw(tiny_model, Drawing(tokens_hw, known_hw), 2, generator, OPTIONS, wraps)
    assert bool(last.known_hw.all()) and bool((last.tokens_hw[known_hw] == 31).all())
    assert not bool((last.tokens_hw[~known_hw] == 31).all()), "the model would not draw this token everywhere"


def test_of_every_four_cells_of_an_enlarged_picture_one_stays_wherever_they_lie() -> None:
    known_hw = canvas.scattered((8, 13), torch.Generator().manual_seed(0))
    assert bool((known_hw[:, :12].unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)) == 1).all())
    assert 0.05 < float(known_hw[::2, :12:2].float().mean()) < 0.6, "every cell of the four may stay"


def test_windows_drawn_together_are_the_windows_drawn_alone(
    tiny_model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, drawn = Drawing(torch.zeros(16, 16, dtype=torch.long), canvas.scattered((16, 16), Generator())), []
    for together in (1, 8):
        monkeypatch.setattr(canvas, "TOGETHER", together)
        *_, last = redraw(tiny_model, begun, 2, Generator().manual_seed(0), OPTIONS, False)
        drawn.append(last.tokens_hw)
    assert torch.equal(*drawn)


def test_a_cell_sees_known_tokens_beyond_the_core_of_its_window(tiny_model: ImageGPT) -> None:
    """Column 2 belongs to the second core; what is known in column 1, of the first one, must count for it."""
    known_hw = torch.ones(4, 8, dtype=torch.bool)
    known_hw[:, 2] = False
    drawn = []
    for token in (1, 30):
        tokens_hw = torch.zeros(4, 8, dtype=torch.long)
        tokens_hw[:, 1] = token
        begun = Drawing(tokens_hw, known_hw)
        *_, last = redraw(tiny_model, begun, 2, torch.Generator().manual_seed(0), OPTIONS, False)
        drawn.append(last.tokens_hw[:, 2].tolist())
    assert drawn[0] != drawn[1]


def test_a_large_picture_is_its_composition_said_again_in_finer_tokens(
    tiny_model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    (composition,) = final(tiny_model, (32, 32))
    monkeypatch.setattr(canvas, "KEPT", 4)
    (kept,) = final(tiny_model, (64, 64))
    enlarged = decode(tiny_model, composition.tokens_hw).resize((64, 64), Image.Resampling.LANCZOS)
    assert torch.equal(kept.tokens_hw, encode(tiny_model, enlarged))
    monkeypatch.setattr(canvas, "KEPT", 1)
    (refined,) = final(tiny_model, (64, 64))
    same = float((refined.tokens_hw == kept.tokens_hw).float().mean())
    assert 0.2 < same < 0.6, "a share of the tokens stays, the rest is drawn"


def test_the_large_picture_of_a_seed_is_the_same_alone_and_in_any_batch(tiny_model: ImageGPT) -> None:
    together = final(tiny_model, (56, 40), seed=5, n=3)
    (alone,) = final(tiny_model, (56, 40), seed=6)
    assert torch.equal(together[1].tokens_hw, alone.tokens_hw)
    assert not torch.equal(together[0].tokens_hw, alone.tokens_hw)


def test_the_library_draws_large_pictures_and_textures_of_exactly_the_size(tiny_model: ImageGPT) -> None:
    for size, tile in [((57, 41), False), ((57, 41), True), ((20, 9), True)]:
        frames = list(tiny_model.stream(size=size, seed=2, options=OPTIONS, tile=tile))
        assert all(frame[0].size == size for frame in frames) and len(frames) > 2
        (picture,) = tiny_model.generate(size=size, seed=2, options=OPTIONS, tile=tile)
        assert picture.tobytes() == frames[-1][0].tobytes()


def test_more_pictures_than_fit_at_once_are_drawn_in_batches(
    tiny_model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    import igpt.image_gpt

    monkeypatch.setattr(igpt.image_gpt, "BATCH", 2)
    batches = tiny_model.generate(5, size=16, seed=3, options=OPTIONS)
    monkeypatch.undo()
    assert [p.tobytes() for p in batches] == [p.tobytes() for p in tiny_model.generate(5, 16, None, 3, OPTIONS)]


# Seams


def test_the_seam_measure_sees_a_line_and_does_not_see_where_there_is_none() -> None:
    noise_CHW = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert 0.8 < seam_ratio(noise_CHW, [16, 32, 48], [32]) < 1.2
    stepped_CHW = noise_CHW.clone()
    stepped_CHW[:, :, 32:] += 1
    assert seam_ratio(stepped_CHW, [32], []) > 3
    assert seam_ratio(stepped_CHW, [31], []) < 1
    ramp_CHW = torch.linspace(0, 1, 64).expand(3, 64, 64)
    assert seam_ratio(ramp_CHW, [0], []) > 100, "the two ends of a ramp do not meet"


def test_decoding_in_windows_leaves_no_seam_and_looks_as_decoded_at_once(tiny_model: ImageGPT) -> None:
    tokens_hw = torch.randint(32, (24, 40), generator=torch.Generator().manual_seed(0))
    whole, pieces = (decode(tiny_model, tokens_hw, side=side) for side in (40, 16))
    assert pieces.size == whole.size == (320, 192)
    difference = ImageChops.difference(whole, pieces).convert("L")
    assert 0 < float(np.asarray(difference).mean()) < 12, "windows have their own statistics, but nearly the same ones"


def test_encoding_in_windows_gives_nearly_the_tokens_of_the_whole(tiny_model: ImageGPT) -> None:
    picture = painted(3, (200, 40, 40), (320, 192))
    whole_hw, pieces_hw = (encode(tiny_model, picture, side=side) for side in (40, 16))
    assert whole_hw.shape == pieces_hw.shape == (24, 40)
    assert float((whole_hw == pieces_hw).float().mean()) > 0.7


def edge_ratio(picture: Image.Image, every: int) -> float:
    return seam_ratio(to_tensor(picture), [0], [0], every)


def test_a_decoded_texture_goes_on_at_its_other_side(tiny_model: ImageGPT) -> None:
    tokens_hw = torch.randint(32, (6, 8), generator=torch.Generator().manual_seed(1))
    wraps, plain = (decode(tiny_model, tokens_hw, wraps=wraps) for wraps in (True, False))
    assert wraps.size == plain.size == (64, 48)
    assert edge_ratio(wraps, 8) < 1.5
    moved = decode(tiny_model, tokens_hw.roll((3, 4), (0, 1)), wraps=True)
    back = ImageChops.offset(moved, -32, -24)
    assert float(np.asarray(ImageChops.difference(back, wraps)).mean()) < 12, "where a texture begins does not matter"


def test_the_edges_of_a_texture_are_drawn_with_both_sides_in_sight_and_its_middle_is_left_alone(
    tiny_model: ImageGPT,
) -> None:
    (plain,), (texture,) = final(tiny_model, (32, 32)), final(tiny_model, (32, 32), wraps=True)
    assert torch.equal(plain.tokens_hw[1:3, 1:3], texture.tokens_hw[1:3, 1:3])
    assert not torch.equal(plain.tokens_hw, texture.tokens_hw)


def test_a_texture_keeps_wrapping_when_it_is_refined_and_resized(tiny_model: ImageGPT) -> None:
    (drawing,) = final(tiny_model, (64, 64), wraps=True)
    picture = finish(tiny_model, drawing.tokens_hw, (90, 50), wraps=True)
    assert picture.size == (90, 50) and edge_ratio(picture, 1) < 2


def test_a_picture_is_continued_with_its_other_side() -> None:
    picture = painted(1, (200, 40, 40), (10, 7))
    around = wrapped(picture, 12)
    assert around.size == (34, 31)
    for x, y in [(0, 0), (5, 30), (33, 12), (12, 12)]:
        assert around.getpixel((x, y)) == picture.getpixel(((x - 12) % 10, (y - 12) % 7))


# Pixels and cells


def test_laying_a_picture_on_a_canvas_is_undone_by_cutting_it_out() -> None:
    picture = painted(2, (40, 60, 200), (40, 24))
    laid = lay(picture, 40, 32)
    assert laid.size == (40, 32) and fit_cover(laid, 40, 24).tobytes() == picture.tobytes()
    assert laid.crop((0, 0, 40, 1)).tobytes() == picture.crop((0, 0, 40, 1)).tobytes(), "continued at the edge"
    assert lay(picture, 80, 48).size == (80, 48)


def test_a_cell_is_drawn_if_one_of_its_pixels_is_wanted() -> None:
    wanted = Image.new("L", (32, 16), 0)
    wanted.putpixel((8, 15), 255)
    assert wanted_cells(wanted, (2, 4), 8).tolist() == [[False] * 4, [False, True, False, False]]


def test_what_is_not_wanted_keeps_its_pixels_and_what_is_fades_in_from_its_edge() -> None:
    old, new = Image.new("RGB", (60, 60), (10, 20, 30)), Image.new("RGB", (60, 60), (250, 240, 230))
    wanted = Image.new("L", (60, 60), 0)
    wanted.paste(255, (20, 20, 60, 60))
    mixed = put_in(Given(old, wanted), new)
    outside = Image.composite(mixed, Image.new("RGB", (60, 60)), wanted.point(lambda level: 255 - level))
    assert set(outside.getcolors()) == {(1600, (0, 0, 0)), (2000, (10, 20, 30))}
    line = [mixed.getpixel((x, 40))[0] for x in range(19, 60)]  # type: ignore[index]
    assert line == sorted(line) and line[0] == 10 < line[1] < 60 and line[9] == line[-1] == 250


def test_a_scratch_thinner_than_the_fade_is_still_painted_over() -> None:
    old, new = Image.new("RGB", (40, 40), "black"), Image.new("RGB", (40, 40), "white")
    wanted = Image.new("L", (40, 40), 0)
    wanted.paste(255, (10, 20, 30, 22))
    assert put_in(Given(old, wanted), new).getpixel((20, 21)) == (255, 255, 255)
