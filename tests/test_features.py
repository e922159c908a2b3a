"""The feature net, and how vectors are made."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from igpt.evaluation.features import BATCH, MOBILENET, MetricSpace, feature_space
from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.vq import VQTokenizer

ROOT = Path(__file__).parent.parent
FEATURES = Path(os.environ.get("IGPT_FEATURES", ROOT.parent / "shared" / "features"))


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)) for i in range(n)]


def test_vectors_come_in_the_order_of_the_pictures_a_batch_at_a_time() -> None:
    ahead, seen = [], 0

    def corners(images_BCHW: Tensor) -> Tensor:
        nonlocal seen
        seen += len(images_BCHW)
        return images_BCHW[:, :, 0, 0]

    def stream() -> Iterator[Image.Image]:
        for i, picture in enumerate(pictures(2 * BATCH + 3)):
            ahead.append(i - seen)
            yield picture

    space = MetricSpace("corners (of a test)", 8, torch.device("cpu"), corners)
    wanted = torch.stack([to_tensor(picture)[:, 0, 0] for picture in pictures(2 * BATCH + 3)])
    assert torch.equal(space.extract(stream(), 2 * BATCH + 3, quiet=True), wanted)
    assert max(ahead) < BATCH
    assert space.extract([], 0).shape == (0, 0)


def test_without_nets_the_features_are_those_of_the_own_tokenizer_by_name(each_model: ImageGPT) -> None:
    net = feature_space(None, each_model)
    assert "own tokenizer" in net.name and "not to be compared" in net.name
    picture, (side, _) = paint(1, COLOURS["red"]), each_model.grids.native_size
    image_BCHW = to_tensor(fit_cover(picture, side, side))[None]
    wanted = F.adaptive_avg_pool2d(image_BCHW, 8).flatten(1)
    if isinstance(each_model.tokenizer, VQTokenizer):
        encoded = each_model.tokenizer.encoder(image_BCHW)
        wanted = torch.cat([encoded.std((2, 3), correction=0), encoded.mean((2, 3))], 1)
    assert torch.allclose(net.extract([picture], 1), wanted, atol=1e-5)
    assert f" {wanted.shape[1]}-d" in net.name


def test_a_folder_without_the_net_or_with_a_damaged_one_is_refused(tiny_model: ImageGPT, tmp_path: Path) -> None:
    for content, problem in ((None, "cannot be read"), (b"rubbish", "cannot be read"), (save({}), "do not fit")):
        if content is not None:
            (tmp_path / MOBILENET).write_bytes(content)
        with pytest.raises(UserError, match=rf"mobilenet_v2\.safetensors {problem}"):
            feature_space(str(tmp_path), tiny_model)


def test_torchvision_is_imported_inside_functions_only_and_nothing_pickled_is_read() -> None:
    for path in [*(ROOT / "igpt").rglob("*.py"), *(ROOT / "train").glob("*.py")]:
        source = path.read_text("utf-8")
        for node in ast.parse(source).body:
            assert not (isinstance(node, ast.Import | ast.ImportFrom) and "torchvision" in ast.unparse(node)), path
        assert "torch.load(" not in source, path


@pytest.mark.skipif(not FEATURES.is_dir(), reason="no feature net: the variable IGPT_FEATURES names its folder")
def test_the_net_of_a_folder_finds_a_blurred_picture_nearer_than_another_one(tiny_model: ImageGPT) -> None:
    net = feature_space(str(FEATURES), tiny_model)
    picture, other = (paint(i, COLOURS[colour], (256, 256)) for i, colour in ((1, "red"), (2, "blue")))
    vectors = net.extract([picture, picture.resize((128, 128)).resize((256, 256)), other], 3)
    assert net.name == "MobileNetV2 1280-d" and vectors.shape == (3, 1280)
    assert float((vectors[0] - vectors[1]).norm()) < float((vectors[0] - vectors[2]).norm())
