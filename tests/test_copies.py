"""Nearest training pictures: copies are found however they were cut or mirrored, and unseen art is no copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from igpt.evaluation.copies import (
    SAME,
    Baseline,
    Split,
    metric_spaces,
    nearest,
    originality,
    square_boxes,
    square_crops,
)
from igpt.evaluation.features import MetricSpace, feature_space
from igpt.evaluation.metrics import auc
from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder

CPU = torch.device("cpu")
KINDS = ["pixels", "features"]


@pytest.fixture
def wide_art(tmp_path: Path) -> ArtFolder:
    """Ten pictures twice as wide as high."""
    for i in range(10):
        paint(i, COLOURS["red" if i % 2 else "blue"], (128, 64)).save(tmp_path / f"{i}.png")
    return ArtFolder(tmp_path)


@pytest.fixture(params=KINDS)
def space(request: pytest.FixtureRequest, each_model: ImageGPT) -> MetricSpace:
    found = metric_spaces(each_model, feature_space(None, each_model))
    assert [space.kind for space in found] == KINDS
    return found[KINDS.index(request.param)]


def distances(baseline: Baseline, pictures: list[int]) -> Tensor:
    """Of some pictures of the collection to the nearest training picture."""
    art = baseline.split.art
    return baseline.compare(map(art.picture, pictures), len(pictures)).distance_QK[:, 0]


def test_distances_are_what_they_say() -> None:
    def apart(kind: str, a: Tensor, b: Tensor) -> list[list[float]]:
        found: list[list[float]] = MetricSpace("a test", 8, CPU, torch.nn.Identity(), kind).distances(a, b).tolist()
        return found

    a = torch.tensor([[0.0, 3.0, 4.0, 1.0]])
    assert apart("pixels", -torch.ones(1, 12), torch.ones(1, 12)) == [[pytest.approx(1)]]
    assert apart("features", a, torch.cat([7 * a, -a])) == [[pytest.approx(0, abs=1e-6), pytest.approx(2)]]


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (66, 64)])
def test_crops_are_the_middle_and_where_they_differ_both_ends(size: tuple[int, int]) -> None:
    picture = paint(1, COLOURS["red"], size)
    found = square_crops(picture, 32)
    assert found[0].tobytes() == ImageOps.fit(picture, (32, 32), Image.Resampling.LANCZOS).tobytes()
    assert all(crop.size == (32, 32) for crop in found) and len({crop.tobytes() for crop in found}) == len(found)
    ends = [(0, 0, 64, 64), (size[0] - 64, size[1] - 64, *size)]
    assert square_boxes(*size)[1:] == ([] if size == (66, 64) else ends)


def test_a_mirrored_crop_of_a_training_picture_is_found(space: MetricSpace, wide_art: ArtFolder) -> None:
    baseline = Baseline(space, Split(wide_art, [2, 4], []), 32)
    end = wide_art.picture(4).crop((64, 0, 128, 64))
    near = baseline.compare([ImageOps.mirror(end), wide_art.picture(5)], 2)
    assert int(near.picture_QK[0, 0]) == 4
    assert float(near.distance_QK[0, 0]) <= SAME < float(near.distance_QK[1, 0])
    assert bool((near.distance_QK.diff() >= 0).all()), "the nearest comes first"
    assert all(sorted(row) == [2, 4] for row in near.picture_QK.tolist()), "each once, fewer than asked for"


def test_a_copied_training_set_is_all_copies_and_nothing_new(space: MetricSpace, wide_art: ArtFolder) -> None:
    baseline = Baseline(space, Split(wide_art, list(range(7)), [7, 8, 9]), 32)
    copies, unseen = distances(baseline, list(range(7))), distances(baseline, [7, 8, 9])
    assert torch.equal(unseen, baseline.val_N)
    assert originality(copies, unseen) == (1, pytest.approx(0, abs=SAME))
    assert originality(unseen, unseen) == (pytest.approx(1 / 3), 1)
    assert auc(unseen, copies) == 1, "nearer than anything unseen"


def test_the_nearest_of_thousands_are_those_of_a_comparison_of_all_pairs() -> None:
    """More queries than are compared at once, two views of each, and three rows of vectors a picture."""
    space, generator = MetricSpace("a test", 8, CPU, torch.nn.Identity()), torch.Generator().manual_seed(0)
    vectors_ND, views_QVD = torch.randn(3000, 9, generator=generator), torch.randn(40, 2, 9, generator=generator)
    near = nearest(space, views_QVD, vectors_ND, [row // 3 for row in range(3000)], k=3)
    pairs = torch.cdist(
        *(torch.nn.functional.normalize(x.double(), dim=-1) for x in (views_QVD.flatten(0, 1), vectors_ND))
    )
    wanted = pairs.view(40, 2, 1000, 3).amin((1, 3)).topk(3, largest=False)
    assert torch.equal(near.picture_QK, wanted.indices) and torch.allclose(near.distance_QK, wanted.values)


def test_spoilt_features_and_missing_pictures_are_refused(space: MetricSpace) -> None:
    with pytest.raises(UserError, match=r"NaN or infinity \(" + space.name[:6]):
        nearest(space, torch.full((1, 2, 4), torch.nan), torch.ones(3, 4), [0, 1, 2])
    with pytest.raises(UserError, match="no picture is held out"):
        originality(torch.ones(3), torch.zeros(0))
    with pytest.raises(UserError, match="no measure"):
        originality(torch.ones(3), torch.zeros(5))


def test_the_threshold_is_the_first_percentile() -> None:
    assert originality(torch.tensor([1.9, 2.0, 50.0, 60.0]), torch.arange(1, 102).double())[0] == 0.25
