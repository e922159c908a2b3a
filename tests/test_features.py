"""Feature nets and the cache of what they saw."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_tensor
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from train import features
from train.features import BATCH, SAVED_EVERY, FeatureCache, FeatureNet, extract, nets

ROOT = Path(__file__).parent.parent
FEATURES = Path(os.environ.get("IGPT_FEATURES", ROOT.parent / "shared" / "features"))
CPU = torch.device("cpu")


class Corners(FeatureNet):
    """The top left pixel, and a count of the pictures seen."""

    name, side, identity = "corners (of a test)", 8, ""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.seen += len(images_BCHW)
        return images_BCHW[:, :, 0, 0]


def pictures(n: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (i, 2 * i, 255 - i)) for i in range(n)]


def test_features_come_in_the_order_of_the_pictures_over_several_batches() -> None:
    n = 2 * BATCH + 3
    told = extract(Corners(), pictures(n), n, device=CPU)
    assert torch.equal(told, torch.stack([to_tensor(picture)[:, 0, 0] for picture in pictures(n)]))


def test_pictures_are_drawn_from_the_stream_a_batch_at_a_time() -> None:
    ahead: list[int] = []
    net = Corners()

    def stream() -> Iterator[Image.Image]:
        for i, picture in enumerate(pictures(100)):
            ahead.append(i - net.seen)
            yield picture

    extract(net, stream(), 100, device=CPU)
    assert max(ahead) < BATCH


def test_what_was_seen_before_is_not_extracted_again_even_by_another_run(tmp_path: Path) -> None:
    net = Corners()
    cache = FeatureCache.of(net, tmp_path)
    first = extract(net, pictures(20), 20, device=CPU, cache=cache)
    assert net.seen == 20
    again = FeatureCache.of(net, tmp_path)
    assert torch.equal(extract(net, pictures(25), 25, device=CPU, cache=again)[:20], first)
    assert net.seen == 25, "only the five new ones"
    assert torch.equal(extract(net, pictures(20)[::-1], 20, device=CPU, cache=again), first.flip(0))
    assert net.seen == 25 and len(list(again.folder.iterdir())) == 2, "a file for each run that had something new"


def test_a_cache_is_saved_in_the_middle_and_an_interrupted_extraction_keeps_what_it_has(tmp_path: Path) -> None:
    def stream() -> Iterator[Image.Image]:
        yield from pictures(BATCH)
        raise KeyboardInterrupt

    net = Corners()
    with pytest.raises(KeyboardInterrupt):
        extract(net, stream(), 40, device=CPU, cache=FeatureCache.of(net, tmp_path))
    assert len(FeatureCache.of(net, tmp_path).known) == BATCH
    cache = FeatureCache.of(net, tmp_path / "other")
    for i in range(SAVED_EVERY + 5):
        cache.put(i.to_bytes(16, "big"), torch.ones(3))
    assert len(FeatureCache.of(net, tmp_path / "other").known) == SAVED_EVERY


def test_a_damaged_cache_or_one_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = Corners()
    folder = FeatureCache.of(net, tmp_path).folder
    folder.mkdir()
    (folder / "damaged.safetensors").write_bytes(b"rubbish")
    assert len(extract(net, pictures(3), 3, device=CPU, cache=FeatureCache.of(net, tmp_path))) == 3
    assert len(FeatureCache.of(net, tmp_path).known) == 3, "made anew"
    (tmp_path / "file").touch()
    assert len(extract(net, pictures(4), 4, device=CPU, cache=FeatureCache.of(net, tmp_path / "file"))) == 4
    assert "not kept" in capsys.readouterr().err


def test_nets_with_other_weights_do_not_share_a_cache(tmp_path: Path) -> None:
    one, two = Corners(), Corners()
    two.identity = "other weights"
    assert FeatureCache.of(one, tmp_path).folder != FeatureCache.of(two, tmp_path).folder


def test_without_weights_the_own_tokenizer_answers_and_says_so(tiny_model: ImageGPT) -> None:
    (net,) = nets(None, tiny_model.tokenizer, 32, "x")
    assert "own tokenizer" in net.name and "not to be compared" in net.name
    picture = paint(1, COLOURS["red"])
    told = extract(net, [picture], 1, device=CPU)
    encoded = tiny_model.tokenizer.encoder(to_tensor(fit_cover(picture, 32, 32))[None])  # type: ignore[union-attr,operator]
    wanted = torch.cat([encoded.mean((2, 3))[0], encoded.std((2, 3), correction=0)[0]])
    assert torch.allclose(told[0], wanted, atol=1e-5)
    palette = PaletteTokenizer(PaletteConfig(("#000000", "#ffffff")))
    assert extract(nets(None, palette, 16, "y")[0], [picture], 1, device=CPU).shape == (1, 192)


def test_weights_that_torchvision_downloaded_before_are_used_and_named(
    tiny_model: ImageGPT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import mobilenet_v2

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "mobilenet_v2-00000000.pth"
    torch.save(mobilenet_v2().state_dict(), file)
    (net,) = nets(None, tiny_model.tokenizer, 32, "x")
    assert net.name == "MobileNetV2 1280-d (torchvision's weights)"
    assert extract(net, [paint(1, COLOURS["red"])], 1, device=CPU).shape == (1, 1280)
    file.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="is not torchvision's"):
        nets(None, tiny_model.tokenizer, 32, "x")


def test_a_folder_without_nets_or_with_damaged_ones_is_refused(tiny_model: ImageGPT, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither mobilenet_v2\.safetensors nor"):
        nets(str(tmp_path), tiny_model.tokenizer, 32, "x")
    (tmp_path / features.MOBILENET).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="cannot be read"):
        nets(str(tmp_path), tiny_model.tokenizer, 32, "x")


def test_torchs_padded_averages_become_those_of_the_inside() -> None:
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    assert torch.allclose(features._InsideOnly()(F.avg_pool2d(x, 3, stride=1, padding=1)), wanted, atol=1e-6)


def test_torchvision_is_imported_inside_functions_only() -> None:
    for path in (ROOT / "train").glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            assert not ("torchvision" in ast.unparse(node) and isinstance(node, ast.Import | ast.ImportFrom)), path


@pytest.mark.skipif(not FEATURES.is_dir(), reason="no feature nets: the variable IGPT_FEATURES names their folder")
def test_the_nets_of_a_folder_find_a_blurred_picture_nearer_than_another_one(tiny_model: ImageGPT) -> None:
    found = nets(str(FEATURES), tiny_model.tokenizer, 32, "x")
    assert [net.name for net in found] == ["MobileNetV2 1280-d", "Inception-v3-2015 Mixed_6e 768-d"]
    picture = paint(1, COLOURS["red"], (256, 256))
    softer = picture.resize((128, 128)).resize((256, 256))
    for net, width in zip(found, (1280, 768), strict=True):
        told = extract(net, [picture, softer, paint(2, COLOURS["blue"], (256, 256))], 3, device=CPU)
        assert told.shape == (3, width) and bool(told.isfinite().all())
        assert float((told[0] - told[1]).norm()) < float((told[0] - told[2]).norm())
