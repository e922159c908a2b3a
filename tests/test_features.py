"""Feature nets, and how vectors are made and cached."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from igpt.evaluation.features import BATCH, MOBILENET, Extractor, MetricSpace, inside_averages, nets
from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.vq import VQTokenizer

ROOT = Path(__file__).parent.parent
FEATURES = Path(os.environ.get("IGPT_FEATURES", ROOT.parent / "shared" / "features"))
EXTRACT = Extractor(torch.device("cpu"), quiet=True)


class Corners:
    """The top left pixel, and a count of the pictures seen."""

    seen = 0

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        return images_BCHW[:, :, 0, 0]


@pytest.fixture
def corners() -> Corners:
    return Corners()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def space(corners: Corners, cache: Path) -> MetricSpace:
    return MetricSpace("corners (of a test)", 8, "weights", corners)


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)) for i in range(n)]


def test_vectors_come_in_the_order_of_the_pictures_a_batch_at_a_time(corners: Corners, space: MetricSpace) -> None:
    ahead: list[int] = []

    def stream() -> Iterator[Image.Image]:
        for i, picture in enumerate(pictures(2 * BATCH + 3)):
            ahead.append(i - corners.seen)
            yield picture

    wanted = torch.stack([to_tensor(picture)[:, 0, 0] for picture in pictures(2 * BATCH + 3)])
    assert torch.equal(EXTRACT(space, stream(), 2 * BATCH + 3), wanted)
    assert max(ahead) < BATCH
    assert EXTRACT(space, [], 0).shape == (0, 0)


def test_pictures_with_a_key_are_read_once_for_each_space(corners: Corners, space: MetricSpace) -> None:
    first = EXTRACT(space, pictures(20), 20, "a collection")
    assert torch.equal(EXTRACT(space, iter(()), 20, "a collection"), first) and corners.seen == 20
    for other in (replace(space, weights_hash="others"), replace(space, name="others"), replace(space, side=4)):
        EXTRACT(other, pictures(1), 1, "a collection")
    EXTRACT(space, pictures(1), 1, "another")
    assert corners.seen == 24


def test_without_a_key_or_without_saved_weights_nothing_is_cached(space: MetricSpace, cache: Path) -> None:
    """Two models that were never saved have the same hash, which is none."""
    EXTRACT(space, pictures(2), 2)
    EXTRACT(replace(space, weights_hash=""), pictures(2), 2, "a collection")
    assert not cache.exists()


def test_a_damaged_cache_is_made_anew_and_one_that_cannot_be_written_is_no_obstacle(
    corners: Corners, space: MetricSpace, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    EXTRACT(space, pictures(3), 3, "a collection")
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"rubbish")
    for _ in range(2):
        assert len(EXTRACT(space, pictures(3), 3, "a collection")) == 3 and corners.seen == 6
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert len(EXTRACT(space, pictures(4), 4, "a collection")) == 4


def test_without_nets_the_features_are_those_of_the_own_tokenizer_by_name(each_model: ImageGPT) -> None:
    (net,) = nets(None, each_model)
    assert "own tokenizer" in net.name and "not to be compared" in net.name
    picture, (side, _) = paint(1, COLOURS["red"]), each_model.grids.native_size
    image_BCHW = to_tensor(fit_cover(picture, side, side))[None]
    wanted = F.adaptive_avg_pool2d(image_BCHW, 8).flatten(1)
    if isinstance(each_model.tokenizer, VQTokenizer):
        encoded = each_model.tokenizer.encoder(image_BCHW)
        wanted = torch.cat([encoded.std((2, 3), correction=0), encoded.mean((2, 3))], 1)
    assert torch.allclose(EXTRACT(net, [picture], 1), wanted, atol=1e-5)
    assert f" {wanted.shape[1]}-d" in net.name


def test_a_folder_without_nets_or_with_damaged_ones_is_refused(tiny_model: ImageGPT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither mobilenet_v2\.safetensors nor"):
        nets(str(tmp_path), tiny_model)
    (tmp_path / MOBILENET).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot be read"):
        nets(str(tmp_path), tiny_model)


def test_torchs_padded_averages_become_those_of_the_inside() -> None:
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    assert torch.allclose(inside_averages(F.avg_pool2d(x, 3, stride=1, padding=1)), wanted, atol=1e-6)


def test_torchvision_is_imported_inside_functions_only_and_nothing_pickled_is_read() -> None:
    for path in [*(ROOT / "igpt").rglob("*.py"), *(ROOT / "train").glob("*.py")]:
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            assert not (isinstance(node, ast.Import | ast.ImportFrom) and "torchvision" in ast.unparse(node)), path
        assert "torch.load(" not in source, path


@pytest.mark.skipif(not FEATURES.is_dir(), reason="no feature nets: the variable IGPT_FEATURES names their folder")
def test_the_nets_of_a_folder_find_a_blurred_picture_nearer_than_another_one(each_model: ImageGPT) -> None:
    found = nets(str(FEATURES), each_model)
    assert [net.name for net in found] == ["MobileNetV2 1280-d", "Inception-v3-2015 Mixed_6e 768-d"]
    picture, other = (paint(i, COLOURS[colour], (256, 256)) for i, colour in ((1, "red"), (2, "blue")))
    softer = picture.resize((128, 128)).resize((256, 256))
    for net, width in zip(found, (1280, 768), strict=True):
        vectors = EXTRACT(net, [picture, softer, other], 3)
        assert vectors.shape == (3, width) and bool(vectors.isfinite().all())
        assert float((vectors[0] - vectors[1]).norm()) < float((vectors[0] - vectors[2]).norm())
