"""Nearest training pictures: copies are found however they were cut or mirrored, and unseen art is no copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from igpt.evaluation.copies import SAME, Baseline, SplitArt, copied, crops, end_squares, metric_spaces, nearest, novelty
from igpt.evaluation.features import Extractor, MetricSpace, nets
from igpt.evaluation.metrics import auc
from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder

EXTRACT = Extractor(torch.device("cpu"), quiet=True)
KINDS = ["tokens", "pixels", "features"]


@pytest.fixture
def wide_art(tmp_path: Path) -> ArtFolder:
    """Ten pictures twice as wide as high."""
    for i in range(10):
        paint(i, COLOURS["red" if i % 2 else "blue"], (128, 64)).save(tmp_path / f"{i}.png")
    return ArtFolder(tmp_path)


@pytest.fixture(params=KINDS)
def space(request: pytest.FixtureRequest, each_model: ImageGPT) -> MetricSpace:
    found = metric_spaces(each_model, nets(None, each_model)[0])
    assert [space.kind for space in found] == KINDS
    return found[KINDS.index(request.param)]


def baseline(space: MetricSpace, art: ArtFolder, train: list[int], val: list[int]) -> Baseline:
    return Baseline(space, SplitArt(art, train, val), 32, EXTRACT)


def distances(found: Baseline, pictures: list[int]) -> Tensor:
    """Of some pictures of the collection to the nearest training picture."""
    return found.compare([found.art.picture(i) for i in pictures], len(pictures)).distance_QK[:, 0]


def test_distances_are_what_they_say() -> None:
    def apart(kind: str, a: Tensor, b: Tensor) -> list[list[float]]:
        space = MetricSpace("a test", 8, "", torch.nn.Identity(), kind)
        found: list[list[float]] = space.distances(space.scaled(a), space.scaled(b)).tolist()
        return found

    a, b = torch.tensor([[0.0, 3.0, 4.0, 1.0]]), torch.tensor([[0.0, 3.0, 4.0, 1.0], [0.0, 4.0, 3.0, 1.0]])
    assert apart("tokens", a, b) == [[0, 0.5]]
    assert apart("tokens", a + 65531, a + 65532) == [[1]], "every token is told from its neighbour"
    assert apart("pixels", -torch.ones(1, 12), torch.ones(1, 12)) == [[pytest.approx(1)]]
    assert apart("features", a, torch.cat([7 * a, -a])) == [[pytest.approx(0, abs=1e-6), pytest.approx(2)]]


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (66, 64)])
def test_there_are_as_many_crops_as_are_counted(size: tuple[int, int]) -> None:
    found = crops(paint(1, COLOURS["red"], size), 32)
    assert len(found) == 1 + len(end_squares(*size)) and all(crop.size == (32, 32) for crop in found)
    assert len({crop.tobytes() for crop in found}) == len(found) == (1 if size == (66, 64) else 3)


def test_a_mirrored_crop_of_a_training_picture_is_found(space: MetricSpace, wide_art: ArtFolder) -> None:
    found = baseline(space, wide_art, [0, 2, 4, 6], [])
    end = wide_art.picture(4).crop((64, 0, 128, 64))
    near = found.compare([ImageOps.mirror(end), wide_art.picture(5)], 2, k=3)
    owners = [[found.crops[crop][0] for crop in row] for row in near.crop_QK.tolist()]
    assert found.crops[int(near.crop_QK[0, 0])] == (4, 2), "the third crop of the fifth picture"
    assert found.crop(int(near.crop_QK[0, 0])).getpixel((16, 16)) == crops(end, 32)[0].getpixel((16, 16))
    assert float(near.distance_QK[0, 0]) <= SAME < float(near.distance_QK[1, 0])
    assert bool((near.distance_QK.diff() >= 0).all()), "the nearest comes first"
    assert all(len(set(row)) == 3 for row in owners), "each picture once, whatever its crops"


def test_a_copied_training_set_is_all_copies_and_nothing_new(space: MetricSpace, wide_art: ArtFolder) -> None:
    found = baseline(space, wide_art, list(range(7)), [7, 8, 9])
    copies, unseen = distances(found, list(range(7))), distances(found, [7, 8, 9])
    assert torch.equal(unseen, found.val_N)
    assert float(copied(copies, unseen).double().mean()) == 1
    assert novelty(copies, unseen) == pytest.approx(0, abs=SAME)
    assert not copied(unseen, unseen)[unseen > unseen.min()].any() and novelty(unseen, unseen) == 1
    assert auc(unseen, copies) == 1, "nearer than anything unseen"


def test_the_nearest_of_thousands_are_those_that_a_look_at_every_pair_finds(space: MetricSpace) -> None:
    """More queries than are compared at once, and three crops a picture."""
    generator, count, asked = torch.Generator().manual_seed(0), 5001, 40
    vectors, queries = (torch.randn(shape, generator=generator) for shape in ((count, 9), (asked, 2, 9)))
    if space.kind == "tokens":
        vectors, queries = vectors.round(), queries.round()
    distance_QK, row_QK = nearest(space, queries, vectors, [row // 3 for row in range(count)], k=3)
    assert distance_QK.shape == row_QK.shape == (asked, 3)
    for q in (0, 15, 16, 39):
        distance_N = space.distances(space.scaled(queries[q]), space.scaled(vectors)).amin(0)
        of_pictures = torch.stack([part.min() for part in distance_N.split(3)])
        assert torch.allclose(distance_QK[q], of_pictures.sort().values[:3])
        assert torch.allclose(distance_QK[q], distance_N[row_QK[q]])
        assert len(set((row_QK[q] // 3).tolist())) == 3


def test_fewer_training_pictures_than_asked_for_are_all_named(space: MetricSpace, wide_art: ArtFolder) -> None:
    found = baseline(space, wide_art, [3, 5], [])
    near = found.compare([Image.new("RGB", (32, 32))], 1, k=3)
    assert sorted(found.crops[crop][0] for crop in near.crop_QK[0].tolist()) == [3, 5]


def test_spoilt_features_and_missing_pictures_are_said(space: MetricSpace) -> None:
    with pytest.raises(UserError, match=r"NaN or infinity \(" + space.name[:6]):
        nearest(space, torch.full((1, 2, 4), torch.nan), torch.ones(3, 4), [0, 1, 2], k=1)
    with pytest.raises(UserError, match="no picture is held out"):
        copied(torch.ones(3), torch.zeros(0))
    with pytest.raises(UserError, match="one held out"):
        novelty(torch.ones(3), torch.zeros(0))
    with pytest.raises(UserError, match="no measure"):
        novelty(torch.ones(3), torch.zeros(5))


def test_the_threshold_is_the_first_percentile() -> None:
    val = torch.arange(1, 102).double()
    assert copied(torch.tensor([1.9, 2.0, 50.0]), val).tolist() == [True, False, False]
