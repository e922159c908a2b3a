"""Any size: one composition refined in windows, no seams, textures that wrap."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from torch import Generator

from benchmarks.seams import seam_ratio
from igpt.canvas import Batch, keep_mask
from igpt.config import SamplingOptions
from igpt.fitting import Canvas, Inpainting, PartialGrid, composite, cover, finish, letterbox, mask_tokens
from igpt.image_gpt import ImageGPT
from igpt.model import to_cells
from igpt.sizes import LARGEST_GRID, LARGEST_SPRITE, Grids, parse_size
from igpt.tiling import OVERLAP, cell_windows, cores, decode, encode, spans, window_for, wrapped
from tests.painting import paint as painted
from tokenizer_vq.images import fit_cover, to_tensor

OPTIONS = SamplingOptions(steps=2, guidance=1)  # pulled hard, a tiny random model says one thing only


def batch(model: ImageGPT, size: tuple[int, int] = (32, 32), seed: int = 1, n: int = 1, wraps: bool = False) -> Batch:
    return Batch(model, model.new_picture(size, wraps), [None] * n, seed, OPTIONS)


def final(model: ImageGPT, size: tuple[int, int], seed: int = 1, n: int = 1, wraps: bool = False) -> list[PartialGrid]:
    *_, grids = batch(model, size, seed, n, wraps).steps()
    return grids


def refined(model: ImageGPT, tokens_hw: torch.Tensor, known_hw: torch.Tensor, wraps: bool = False) -> PartialGrid:
    start, generator = PartialGrid(tokens_hw, known_hw), Generator().manual_seed(0)
    *_, last = batch(model, wraps=wraps).refine(start, model.gpt.null_label, generator)
    return last


# Grids and windows


def test_a_picture_climbs_from_its_composition_to_its_own_pixels_about_twice_at_a_time() -> None:
    grids = Grids(downsample=8, cell=2, cells=256)
    assert [grids.pyramid(side, side) for side in (256, 40, 300)] == [[(32, 32)]] * 3
    assert grids.pyramid(1024, 1024) == [(32, 32), (64, 64), (128, 128)]
    assert grids.pyramid(1024, 64) == [(8, 128)]
    for width, height in [(1536, 512), (4096, 4096), (4096, 8), (700, 1000), (333, 999)]:
        levels = grids.pyramid(width, height)
        assert levels[0] == grids.composition(width, height)
        assert levels[-1][0] * 8 >= height and levels[-1][1] * 8 >= width, "nothing is enlarged at the end"
        assert all(side % 2 == 0 for grid in levels for side in grid), "whole cells"
        for (h, w), (finer_h, finer_w) in pairwise(levels):
            assert h < finer_h <= 2 * h + 2 and w < finer_w <= 2 * w + 2
            assert abs(finer_h / finer_w - h / w) < 0.15 * h / w, "all in the same proportions"


def test_the_finest_grid_is_never_larger_than_a_recipe_can_hold() -> None:
    for size in [(4096, 4096), (4096, 3000), (9000, 9000)]:
        h, w = Grids(downsample=4, cell=2, cells=256).pyramid(*size)[-1]
        assert 0.9 * LARGEST_GRID < h * w <= LARGEST_GRID


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize(("h", "w"), [(1, 9), (4, 4), (5, 64), (16, 16), (17, 33), (40, 7)])
def test_the_cores_of_the_windows_tile_the_grid_and_see_around_themselves(h: int, w: int, wraps: bool) -> None:
    times = torch.zeros(h * w, dtype=torch.long)
    for cells_Whw, core_Whw in cell_windows(h, w, 16, wraps):
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
        found = spans(length, 32, OVERLAP)
        assert found[0].start == 0 and found[-1].stop == length
        assert all(one.stop - two.start >= OVERLAP for one, two in pairwise(found))
        assert len({len(span) for span in found}) == 1 and found[0].stop <= 32
    assert all(rows * columns <= 64 for rows, columns in (window_for(h, w, 8) for h in (1, 5, 99) for w in (1, 5, 99)))


# Drawing


@pytest.mark.parametrize("wraps", [False, True])
def test_known_tokens_are_never_redrawn_and_all_others_are(wraps: bool, tiny_model: ImageGPT) -> None:
    known_hw = torch.rand(14, 18, generator=Generator().manual_seed(0)) < 0.4  # by tokens, so that most cells are cut
    last = refined(tiny_model, torch.full((14, 18), 31), known_hw, wraps)
    assert bool(last.known_hw.all()) and bool((last.tokens_hw[known_hw] == 31).all())
    assert not bool((last.tokens_hw[~known_hw] == 31).all()), "the model would not draw this token everywhere"


def test_of_every_four_cells_of_an_enlarged_picture_one_stays_wherever_they_lie() -> None:
    known_hw = keep_mask((16, 26), 2, Generator().manual_seed(0))
    cells_hwn = to_cells(known_hw[None], 2).view(8, 13, 4)
    assert torch.equal(cells_hwn.any(-1), cells_hwn.all(-1)), "whole cells"
    stays_hw = cells_hwn.all(-1)
    assert bool((stays_hw[:, :12].unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)) == 1).all())
    assert 0.05 < float(stays_hw[::2, :12:2].float().mean()) < 0.6, "every cell of the four may stay"


def test_a_window_is_drawn_alone_as_it_is_together_with_the_others_of_its_round(tiny_model: ImageGPT) -> None:
    cells_Whw, core_Whw = next(iter(cell_windows(8, 12, 16, wraps=False)))
    assert len(cells_Whw) == 6

    def drawn(*windows: int) -> torch.Tensor:
        """Everything is known but the cores of some windows."""
        unknown_L = torch.zeros(8 * 12, dtype=torch.bool)
        for window in windows:
            unknown_L[cells_Whw[window][core_Whw[window]]] = True
        known_hw = ~unknown_L.view(8, 12).repeat_interleave(2, 0).repeat_interleave(2, 1)
        return to_cells(refined(tiny_model, torch.arange(16 * 24).view(16, 24) % 32, known_hw).tokens_hw[None], 2)[0]

    together = drawn(*range(6))
    for window in range(6):
        core = cells_Whw[window][core_Whw[window]]
        assert torch.equal(drawn(window)[core], together[core])


def test_a_cell_sees_known_tokens_beyond_the_core_of_its_window(tiny_model: ImageGPT) -> None:
    """Column 2 of cells belongs to the second core; what is known in column 1, of the first one, must count for it."""
    known_hw = torch.ones(8, 16, dtype=torch.bool)
    known_hw[:, 4:6] = False
    drawn = []
    for token in (1, 30):
        tokens_hw = torch.zeros(8, 16, dtype=torch.long)
        tokens_hw[:, 2:4] = token
        drawn.append(refined(tiny_model, tokens_hw, known_hw).tokens_hw[:, 4:6].tolist())
    assert drawn[0] != drawn[1]


def test_a_large_picture_is_its_composition_said_again_in_finer_tokens(tiny_model: ImageGPT) -> None:
    frames = list(batch(tiny_model, (64, 64)).steps())
    coarse, fine = ([frame for (frame,) in frames if frame.tokens_hw.shape == (side, side)] for side in (8, 16))
    assert torch.equal(coarse[-1].tokens_hw, final(tiny_model, (32, 32))[0].tokens_hw)
    enlarged = decode(tiny_model, coarse[-1].tokens_hw[None])[0].resize((64, 64), Image.Resampling.LANCZOS)
    enlarged_hw = encode(tiny_model, enlarged)
    assert all(torch.equal(frame.tokens_hw[~frame.known_hw], enlarged_hw[~frame.known_hw]) for frame in fine)
    same_hw = fine[-1].tokens_hw == enlarged_hw
    whole_hw = to_cells(same_hw[None], 2).all(-1).view(8, 8)
    assert bool((whole_hw.unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)) >= 1).all()), "of every four cells one stays"
    assert float(same_hw.float().mean()) < 0.6, "the rest is drawn"


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


def test_more_pictures_than_fit_at_once_are_drawn_in_batches_and_come_out_the_same(tiny_model: ImageGPT) -> None:
    together = tiny_model.generate(35, size=16, seed=3, options=OPTIONS)
    assert len(together) == 35
    for i in (0, 15, 16, 31, 32, 34):
        (alone,) = tiny_model.generate(size=16, seed=3 + i, options=OPTIONS)
        assert alone.tobytes() == together[i].tobytes()


# Seams


def test_a_batch_that_is_filled_up_as_on_a_gpu_gives_the_pictures_it_gives_alone(
    tiny_model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = batch(tiny_model, (64, 48), seed=7, n=3).draw()
    monkeypatch.setattr(tiny_model, "rows", 4)  # so many are decoded together too
    filled = batch(tiny_model, (64, 48), seed=7, n=3).draw()
    assert [result.recipe.tokens for result in filled] == [result.recipe.tokens for result in plain]
    for (ours, _), (theirs, _) in zip(filled, plain, strict=True):
        assert int(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max()) <= 1
    assert len({result.recipe.tokens for result in filled}) == 3


def test_the_seam_measure_sees_a_line_and_does_not_see_where_there_is_none() -> None:
    noise_CHW = torch.rand(3, 64, 64, generator=Generator().manual_seed(0))
    assert 0.8 < seam_ratio(noise_CHW, [16, 32, 48], [32]) < 1.2
    stepped_CHW = noise_CHW.clone()
    stepped_CHW[:, :, 32:] += 1
    assert seam_ratio(stepped_CHW, [32], []) > 3
    assert seam_ratio(stepped_CHW, [31], []) < 1
    ramp_CHW = torch.linspace(0, 1, 64).expand(3, 64, 64)
    assert seam_ratio(ramp_CHW, [0], []) > 100, "the two ends of a ramp do not meet"


def test_decoding_in_windows_leaves_no_seam_and_looks_as_decoded_at_once(tiny_model: ImageGPT) -> None:
    tokens_hw = torch.randint(32, (36, 60), generator=Generator().manual_seed(0))
    (whole,), (pieces,) = (decode(tiny_model, tokens_hw[None], side=side) for side in (60, 24))
    assert pieces.size == whole.size == (240, 144)
    difference = ImageChops.difference(whole, pieces).convert("L")
    assert 0 < float(np.asarray(difference).mean()) < 12, "windows have their own statistics, but nearly the same ones"


def test_encoding_in_windows_gives_nearly_the_tokens_of_the_whole(tiny_model: ImageGPT) -> None:
    picture = painted(3, (200, 40, 40), (240, 144))
    whole_hw, pieces_hw = (encode(tiny_model, picture, side=side) for side in (60, 24))
    assert whole_hw.shape == pieces_hw.shape == (36, 60)
    assert float((whole_hw == pieces_hw).float().mean()) > 0.7


def edge_ratio(picture: Image.Image, every: int) -> float:
    return seam_ratio(to_tensor(picture), [0], [0], every)


def test_a_decoded_texture_goes_on_at_its_other_side(tiny_model: ImageGPT) -> None:
    tokens_hw = torch.randint(32, (12, 16), generator=Generator().manual_seed(1))
    (wraps,), (plain,) = (decode(tiny_model, tokens_hw[None], wraps=wraps) for wraps in (True, False))
    assert wraps.size == plain.size == (64, 48)
    assert edge_ratio(wraps, 4) < 1.5
    (moved,) = decode(tiny_model, tokens_hw.roll((6, 8), (0, 1))[None], wraps=True)
    back = ImageChops.offset(moved, -32, -24)
    assert float(np.asarray(ImageChops.difference(back, wraps)).mean()) < 12, "where a texture begins does not matter"


def test_the_edges_of_a_texture_are_drawn_with_both_sides_in_sight_and_its_middle_is_left_alone(
    tiny_model: ImageGPT,
) -> None:
    (plain,), (texture,) = final(tiny_model, (32, 32)), final(tiny_model, (32, 32), wraps=True)
    assert torch.equal(plain.tokens_hw[2:6, 2:6], texture.tokens_hw[2:6, 2:6])
    assert not torch.equal(plain.tokens_hw, texture.tokens_hw)


def test_a_texture_keeps_wrapping_when_it_is_refined_and_resized(tiny_model: ImageGPT) -> None:
    (drawing,) = final(tiny_model, (64, 64), wraps=True)
    (picture,) = finish(tiny_model, drawing.tokens_hw[None], Canvas((90, 50), [], wraps=True))
    assert picture.size == (90, 50) and edge_ratio(picture, 1) < 2


def test_a_picture_is_continued_with_its_other_side() -> None:
    picture = painted(1, (200, 40, 40), (10, 7))
    around = wrapped(picture, 12)
    assert around.size == (34, 31)
    for x, y in [(0, 0), (5, 30), (33, 12), (12, 12)]:
        assert around.getpixel((x, y)) == picture.getpixel(((x - 12) % 10, (y - 12) % 7))


# Pixels and tokens


def test_laying_a_picture_on_a_canvas_is_undone_by_cutting_it_out(tiny_model: ImageGPT) -> None:
    picture = painted(2, (40, 60, 200), (40, 24))
    laid = letterbox(tiny_model, picture, (8, 10))
    assert laid.size == (40, 32) and fit_cover(laid, 40, 24).tobytes() == picture.tobytes()
    assert laid.crop((0, 0, 40, 1)).tobytes() == picture.crop((0, 0, 40, 1)).tobytes(), "continued at the edge"
    assert letterbox(tiny_model, picture, (12, 20)).size == (80, 48)


def test_a_token_is_drawn_if_one_of_its_pixels_is_wanted(tiny_model: ImageGPT) -> None:
    wanted = Image.new("L", (32, 16), 0)
    wanted.putpixel((8, 15), 255)
    assert mask_tokens(tiny_model, wanted, (4, 8)).nonzero().tolist() == [[3, 2]]


def test_what_is_not_wanted_keeps_its_pixels_and_what_is_fades_in_from_its_edge(tiny_model: ImageGPT) -> None:
    old, new = Image.new("RGB", (60, 60), (10, 20, 30)), Image.new("RGB", (60, 60), (250, 240, 230))
    wanted = Image.new("L", (60, 60), 0)
    wanted.paste(255, (20, 20, 60, 60))
    mixed = composite(tiny_model, Inpainting(old, wanted), new)
    outside = Image.composite(mixed, Image.new("RGB", (60, 60)), wanted.point(lambda level: 255 - level))
    assert set(outside.getcolors()) == {(1600, (0, 0, 0)), (2000, (10, 20, 30))}
    line = [mixed.getpixel((x, 40))[0] for x in range(19, 60)]  # type: ignore[index]
    assert line == sorted(line) and line[0] == 10 < line[1] < 60 and line[9] == line[-1] == 250


def test_a_scratch_thinner_than_the_fade_is_still_painted_over(tiny_model: ImageGPT) -> None:
    old, new = Image.new("RGB", (40, 40), "black"), Image.new("RGB", (40, 40), "white")
    wanted = Image.new("L", (40, 40), 0)
    wanted.paste(255, (10, 20, 30, 22))
    assert composite(tiny_model, Inpainting(old, wanted), new).getpixel((20, 21)) == (255, 255, 255)


# Where a token is a pixel


def colours_of(picture: Image.Image) -> set[object]:
    """Not those of a picture that has thousands: it fails the tests with none."""
    return {colour for _, colour in picture.convert("RGB").getcolors(256) or [(0, None)]}


def palette_of(model: ImageGPT) -> set[object]:
    return {tuple(bytes.fromhex(colour[1:])) for colour in model.tokenizer.config.colours}


def steps_of(picture: Image.Image, axis: int) -> list[int]:
    """The places along an axis of the pixels (0 down, 1 across) where a line of pixels differs from the one before."""
    pixels = np.moveaxis(np.asarray(picture.convert("RGB")).astype(int), axis, 0)
    return [int(place) + 1 for place in (pixels[1:] != pixels[:-1]).reshape(len(pixels) - 1, -1).any(1).nonzero()[0]]


SIZES = "8x8 9x13 16x16 17x31 8x100 40x40 64x50 128x90 129x9 130x130 300x200 8x4096 4096x1000".split()


@pytest.mark.parametrize("size", [parse_size(size) for size in SIZES], ids=str)
def test_a_sprite_of_any_size_has_the_colours_of_the_palette_and_a_large_one_whole_pixels(
    size: tuple[int, int], tiny_pixels: ImageGPT
) -> None:
    (picture,) = tiny_pixels.generate(size=size, label="red", seed=4, options=OPTIONS)
    assert picture.size == size
    assert colours_of(picture) <= palette_of(tiny_pixels) and len(colours_of(picture)) > 2
    if max(size) > LARGEST_SPRITE:
        times = tiny_pixels.grids.enlarged(*size)
        places = [steps_of(picture, axis) for axis in (0, 1)]
        assert all(len({place % times for place in along}) <= 1 for along in places) and any(places)


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (24, 40), (130, 140)], ids=str)
def test_a_texture_of_pixels_has_the_colours_of_the_palette_and_the_size(
    size: tuple[int, int], tiny_pixels: ImageGPT
) -> None:
    frames = list(tiny_pixels.stream(size=size, seed=2, options=OPTIONS, tile=True))
    assert len(frames) > 2 and all(picture.size == size for (picture,) in frames)
    assert colours_of(frames[-1][0]) <= palette_of(tiny_pixels)


@pytest.mark.parametrize("size", [parse_size(size) for size in SIZES], ids=str)
def test_a_sprite_that_is_laid_on_a_grid_and_cut_out_again_is_the_very_sprite(
    size: tuple[int, int], tiny_pixels: ImageGPT
) -> None:
    for grid in tiny_pixels.grids.pyramid(*size):
        tokens_hw = torch.randint(6, grid, generator=Generator().manual_seed(3))
        picture = cover(tiny_pixels, *decode(tiny_pixels, tokens_hw[None]), size)
        assert cover(tiny_pixels, letterbox(tiny_pixels, picture, grid), size).tobytes() == picture.tobytes()
        assert picture.size == size and mask_tokens(tiny_pixels, Image.new("L", size, 255), grid).all()


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (130, 130), (4096, 1000)], ids=str)
def test_one_pixel_of_a_mask_is_enough_for_a_token_of_a_sprite(size: tuple[int, int], tiny_pixels: ImageGPT) -> None:
    wanted, grid = Image.new("L", size, 0), tiny_pixels.grids.pyramid(*size)[-1]
    wanted.putpixel((size[0] // 2 + 1, size[1] // 2 + 1), 255)
    unknown_hw = mask_tokens(tiny_pixels, wanted, grid)
    assert int(unknown_hw.sum()) == 1
    painted_hw = torch.where(unknown_hw, 1, 0)
    picture = cover(tiny_pixels, *decode(tiny_pixels, painted_hw[None]), size)
    assert picture.getpixel((size[0] // 2 + 1, size[1] // 2 + 1)) == (255, 255, 255), "and it is the one over it"


def test_what_is_drawn_into_a_sprite_does_not_fade(tiny_pixels: ImageGPT) -> None:
    old, new = Image.new("RGB", (40, 40), "black"), Image.new("RGB", (40, 40), "white")
    wanted = Image.new("L", (40, 40), 0)
    wanted.paste(255, (7, 9, 30, 22))
    assert composite(tiny_pixels, Inpainting(old, wanted), new).tobytes() == wanted.convert("RGB").tobytes()
