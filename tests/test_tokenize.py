"""`igpt tokenize`: what is left of a picture in tokens, side by side and in numbers."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from igpt.cli import main
from igpt.sheet import CAPTION, MARGIN
from tests.painting import paint

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def painted(tmp_path: Path) -> Path:
    path = tmp_path / "art" / "disc.png"
    path.parent.mkdir()
    paint(3, (40, 60, 200), (75, 50)).save(path)
    return path


def test_the_reconstruction_is_written_next_to_the_original_and_measured(
    painted: Path, tiny_folder: Path, capsys: Capture
) -> None:
    assert main(["tokenize", str(painted), "--model", str(tiny_folder)]) == 0
    said = capsys.readouterr().out
    with Image.open(painted.with_name("disc-tokens.png")) as both:
        assert both.size == (2 * (75 + MARGIN) + MARGIN, MARGIN + 50 + CAPTION + MARGIN)
        places = ((x, MARGIN, x + 75, MARGIN + 50) for x in (MARGIN, MARGIN + 75 + MARGIN))
        left, right = (np.asarray(both.crop(place).convert("RGB")) for place in places)
    with Image.open(painted) as original:
        assert np.array_equal(left, np.asarray(original))
    psnr, ssim = (float(re.search(rf"{name} (-?[\d.e-]+)", said)[1]) for name in ("PSNR", "SSIM"))  # type: ignore[index]
    assert psnr == pytest.approx(peak_signal_noise_ratio(left, right), abs=0.01)
    assert ssim == pytest.approx(structural_similarity(left, right, channel_axis=-1), abs=1e-3)
    assert "247 tokens (19x13)" in said  # of 4x4 pixels, the last row and column partly outside
    assert f"{247 * math.log2(32) / (75 * 50):.4f} bits per pixel" in said


def test_several_pictures_go_into_one_folder_and_nothing_is_overwritten(
    painted: Path, tiny_folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    other = painted.with_name("other.jpg")
    paint(4, (200, 40, 40), (64, 64)).save(other)
    words = ["tokenize", str(painted), str(other), "--model", str(tiny_folder), "--quiet", "--out", str(tmp_path / "o")]
    assert main(words) == main(words) == 0
    names = ["disc-tokens.png", "other-tokens.png", "disc-tokens-2.png", "other-tokens-2.png"]
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == names
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == sorted(names)


def test_one_bad_picture_stops_all_before_anything_is_written(
    painted: Path, tiny_folder: Path, capsys: Capture
) -> None:
    bad = painted.with_name("bad.png")
    for content, sentence in ((b"no picture", "bad.png is no picture"), ((5, 40), "5x40"), ((2000, 8), "2000x8")):
        bad.write_bytes(content) if isinstance(content, bytes) else Image.new("RGB", content).save(bad)
        assert main(["tokenize", str(painted), str(bad), "--model", str(tiny_folder)]) == 2
        assert sentence in capsys.readouterr().err
    assert sorted(path.name for path in painted.parent.iterdir()) == ["bad.png", "disc.png"]


def test_a_large_picture_is_made_smaller_first(tiny_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (2600, 100), "teal").save(tmp_path / "wide.png")
    assert main(["tokenize", str(tmp_path / "wide.png"), "--model", str(tiny_folder)]) == 0
    with Image.open(tmp_path / "wide-tokens.png") as both:
        assert both.size == (2 * (1024 + MARGIN) + MARGIN, MARGIN + 39 + CAPTION + MARGIN)
