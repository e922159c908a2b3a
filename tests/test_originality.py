"""Nearest training pictures: copies are found however they were cut or mirrored, and unseen art is no copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image, ImageOps

from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from train import originality
from train.features import nets
from train.fidelity import auc
from train.originality import (
    SAME,
    Space,
    both_ways,
    copied,
    copy_threshold,
    crop_count,
    crops,
    nearest,
    novelty,
    percentile,
    references,
    spaces,
)

CPU = torch.device("cpu")
KEYS = ["tokens", "pixels", "features"]


@pytest.fixture
def wide_art(tmp_path: Path) -> ArtFolder:
    """Ten pictures twice as wide as high."""
    for i in range(10):
        paint(i, COLOURS["red" if i % 2 else "blue"], (128, 64)).save(tmp_path / f"{i}.png")
    return ArtFolder(tmp_path)


def space_of(model: ImageGPT, key: str) -> Space:
    found = spaces(model.tokenizer, 32, "tiny", nets(None, model.tokenizer, 32, "tiny")[0])
    return found[KEYS.index(key)]


def test_distances_are_what_they_say(tiny_model: ImageGPT) -> None:
    a, b = torch.tensor([[0.0, 3.0, 4.0, 1.0]]), torch.tensor([[0.0, 3.0, 4.0, 1.0], [0.0, 4.0, 3.0, 1.0]])
    assert space_of(tiny_model, "tokens").distances(a, b).tolist() == [[0, 0.5]]
    black, white = -torch.ones(1, 12), torch.ones(1, 12)
    assert float(space_of(tiny_model, "pixels").distances(black, white)) == pytest.approx(1)
    assert float(space_of(tiny_model, "features").distances(a, 7 * a)) == pytest.approx(0, abs=1e-6)
    assert float(space_of(tiny_model, "features").distances(a, -a)) == pytest.approx(2)


@pytest.mark.parametrize("size", [(128, 64), (64, 128), (66, 64)])
def test_there_are_as_many_crops_as_are_counted(size: tuple[int, int]) -> None:
    found = crops(paint(1, COLOURS["red"], size), 32)
    assert len(found) == crop_count(size) and all(crop.size == (32, 32) for crop in found)
    assert len({crop.tobytes() for crop in found}) == len(found)


@pytest.mark.parametrize("key", KEYS)
def test_a_mirrored_crop_of_a_training_picture_is_found(key: str, wide_art: ArtFolder, tiny_model: ImageGPT) -> None:
    space = space_of(tiny_model, key)
    training = references(space, wide_art, [0, 2, 4, 6], 32, device=CPU, quiet=True)
    copy = ImageOps.mirror(wide_art.picture(4).crop((64, 0, 128, 64)))
    queries = both_ways(space, [copy, wide_art.picture(5)], 2, 32, device=CPU)
    near = nearest(space, queries, training, k=3)
    assert int(near.picture_QK[0, 0]) == 4 and int(near.crop_QK[0, 0]) == 2
    assert float(near.distance_QK[0, 0]) <= SAME < float(near.distance_QK[1, 0])
    assert bool((near.distance_QK.diff() >= 0).all()), "the nearest comes first"
    assert all(len(set(row)) == 3 for row in near.picture_QK.tolist()), "each picture once, whatever its crops"


@pytest.mark.parametrize("key", KEYS)
def test_a_copied_training_set_is_all_copies_and_nothing_new(
    key: str, wide_art: ArtFolder, tiny_model: ImageGPT
) -> None:
    space, told, held_out = space_of(tiny_model, key), list(range(7)), [7, 8, 9]
    training = references(space, wide_art, told, 32, device=CPU, quiet=True)

    def distances(indices: list[int]) -> torch.Tensor:
        pictures = [wide_art.picture(i) for i in indices]
        return nearest(space, both_ways(space, pictures, len(pictures), 32, device=CPU), training, 1).distance_QK[:, 0]

    copies, unseen = distances(told), distances(held_out)
    assert float(copied(copies, unseen).double().mean()) == 1
    assert novelty(copies, unseen) == pytest.approx(0, abs=SAME)
    assert not copied(unseen, unseen)[unseen > unseen.min()].any() and novelty(unseen, unseen) == 1
    assert auc(unseen, copies) == 1, "nearer than anything unseen"


@pytest.mark.parametrize("key", KEYS)
def test_the_nearest_of_thousands_are_those_that_a_look_at_every_pair_finds(key: str, tiny_model: ImageGPT) -> None:
    """More queries and more crops than are compared at once."""
    space, generator = space_of(tiny_model, key), torch.Generator().manual_seed(0)
    count, asked = 5000, 40
    vectors, queries = (torch.randn(shape, generator=generator) for shape in ((count, 9), (asked, 2, 9)))
    if key == "tokens":
        vectors, queries = vectors.round(), queries.round()
    crop_N = torch.arange(count) % 3
    found = nearest(space, queries, originality.References(vectors, 7 * (torch.arange(count) // 3), crop_N), k=3)
    assert found.distance_QK.shape == (asked, 3)
    for q in (0, 15, 16, 39):
        distance_N = torch.stack([space.distances(way[None], vectors)[0] for way in queries[q]]).amin(0)
        of_pictures = torch.stack([part.min() for part in distance_N.split(3)])
        assert torch.allclose(found.distance_QK[q], of_pictures.sort().values[:3])
        for picture, crop, distance in zip(*(x[q].tolist() for x in found[1:]), found.distance_QK[q], strict=True):
            assert torch.isclose(distance_N[picture // 7 * 3 + crop], distance)


def test_fewer_training_pictures_than_asked_for_are_all_named(wide_art: ArtFolder, tiny_model: ImageGPT) -> None:
    space = space_of(tiny_model, "pixels")
    training = references(space, wide_art, [3, 5], 32, device=CPU, quiet=True)
    near = nearest(space, both_ways(space, [Image.new("RGB", (32, 32))], 1, 32, device=CPU), training, k=3)
    assert sorted(near.picture_QK[0].tolist()) == [3, 5]


def test_spoilt_features_and_missing_pictures_are_said(wide_art: ArtFolder, tiny_model: ImageGPT) -> None:
    space = space_of(tiny_model, "features")
    training = references(space, wide_art, [0], 32, device=CPU, quiet=True)
    with pytest.raises(UserError, match="NaN"):
        nearest(space, torch.full((1, 2, training.vectors_ND.shape[1]), torch.nan), training)
    with pytest.raises(UserError, match="no picture is held out"):
        copied(torch.ones(3), torch.zeros(0))
    with pytest.raises(UserError, match="one held out"):
        novelty(torch.ones(3), torch.zeros(0))
    with pytest.raises(UserError, match="no measure"):
        novelty(torch.ones(3), torch.zeros(5))
    with pytest.raises(UserError, match="no training picture"):
        nearest(space, torch.ones(1, 2, 3), originality.References(torch.ones(0, 3), torch.ones(0), torch.ones(0)))


def test_the_threshold_is_the_first_percentile_and_a_percentile_counts_what_is_nearer() -> None:
    held_out = torch.arange(1, 102).double()
    assert copy_threshold(held_out) == 2
    assert copied(torch.tensor([1.9, 2.0, 50.0]), held_out).tolist() == [True, False, False]
    assert percentile(51, held_out) == pytest.approx(50 / 101) and percentile(0, held_out) == 0
