"""`igpt evaluate`, `audit` and `surprise` from the command line, on the tiny model and painted art."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from igpt.cli import main
from igpt.config import EvaluateOptions, SamplingOptions
from igpt.evaluation.evaluate import Evaluation
from igpt.evaluation.report import Report
from igpt.image_gpt import ImageGPT
from tests.painting import COLOURS, art_folder, paint
from tests.test_cli import refusal

Capture = pytest.CaptureFixture[str]
EVALUATE = ["evaluate", "tiny", "art", "--device", "cpu", "--samples", "6", "--steps", "2"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """The current folder holds the model `tiny` and 20 pictures in `art`, under the labels of the model."""
    shutil.copytree(tiny_folder, tmp_path / "tiny")
    art_folder(tmp_path / "art", each=10)
    (tmp_path / "desk").mkdir()
    for name in ("tiny", "art"):
        (tmp_path / name).rename(tmp_path / "desk" / name)
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def manifest(desk: Path, held_out: int) -> str:
    """A manifest that holds out the first pictures of each label; its name."""
    rows = [f"{label}/{i},{'val' if i < held_out else 'train'}" for label in COLOURS for i in range(10)]
    (desk / "split.csv").write_text("\n".join(["path,split", *rows]))
    return "split.csv"


def measures(folder: str = "tiny-report") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
    return found


def test_evaluate_prints_tables_and_writes_json_and_markdown_with_pictures(desk: Path, capsys: Capture) -> None:
    assert main([*EVALUATE, "--manifest", manifest(desk, 4)]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"{Path('tiny-report', 'report.md')}\n") and err == ""
    found = measures()
    sections = {title.split(",")[0]: rows for title, rows in found["measures"].items()}
    assert sections.keys() == {"reconstruction", "likelihood", "fidelity and diversity", "originality"}
    likelihood, fidelity = sections["likelihood"], sections["fidelity and diversity"]
    assert likelihood["bits per token"].keys() == {"training", "held-out"} and "membership AUC" in likelihood
    bits = likelihood["bits per token"]["training"]
    assert likelihood["bits per pixel"]["training"] == pytest.approx(bits / 16)
    wanted = {"KID", "precision", "recall", "density", "coverage", "Vendi score"}
    assert wanted <= fidelity.keys() and fidelity["KID"].keys() == {"drawn", "reconstructed", "real"}
    kinds = [f"{name}, {kind}" for name in ("copied", "novelty") for kind in ("pixels", "features")]
    assert {*kinds} == sections["originality"].keys()
    assert "own tokenizer" in " ".join(found["measures"]) and "own tokenizer" in out, "never a plain FID"
    assert found["skipped"] == [] and (found["training"], found["held_out"]) == (12, 8)
    assert SamplingOptions(**found["sampling"]) == SamplingOptions(steps=2)
    page = Path("tiny-report/report.md").read_text(encoding="utf-8")
    linked = re.findall(r"^!\[[^]]+\]\(([a-z-]+\.png)\)$", page, re.MULTILINE)
    assert len(linked) == 4 and linked[0] == "drawn.png"
    assert {path.name for path in Path("tiny-report").iterdir()} == {"report.md", "report.json", *linked}
    assert all(Image.open(Path("tiny-report", name)).width > 6 * 160 for name in linked)
    for rows in sections.values():
        for measure in rows:
            assert f"| {measure} " in page and f"| {measure} " in out


def test_a_model_of_pixels_is_measured_in_the_same_ways(desk: Path, capsys: Capture, tiny_pixels: ImageGPT) -> None:
    tiny_pixels.save("pixels")
    split = ["--manifest", manifest(desk, 4), "--device", "cpu"]
    assert main(["evaluate", "pixels", "art", *split, "--samples", "6", "--steps", "2"]) == 0
    found = measures("pixels-report")
    likelihood = found["measures"]["likelihood"]
    assert found["skipped"] == [] and likelihood["bits per token"] == likelihood["bits per pixel"]
    assert main(["audit", "art/red/7.png", "--against", "art", "--model", "pixels", *split]) == 0
    assert "this is red/7.png" in capsys.readouterr().out
    assert main(["surprise", "art/red/7.png", "--model", "pixels", "--device", "cpu", "--orders", "1"]) == 0


def test_a_second_report_gets_a_new_number_and_says_the_same(desk: Path, tiny_model: ImageGPT) -> None:
    command, split = [*EVALUATE, "--out", "report"], manifest(desk, 4)
    assert main([*command, "--manifest", split]) == main([*command, "--manifest", split]) == 0
    assert measures("report") == measures("report-2")
    options = EvaluateOptions(samples=6, manifest=split, seed=1)
    other = Evaluation(tiny_model, "art", options, SamplingOptions(steps=2), quiet=True).run()
    assert json.loads(other.to_json())["measures"] != measures("report")["measures"]


def test_what_lacks_pictures_is_skipped_with_a_reason_and_the_rest_is_done(desk: Path, capsys: Capture) -> None:
    for label in COLOURS:
        for path in sorted((desk / "art" / label).iterdir())[2:]:
            path.unlink()
    assert main([*EVALUATE, "--manifest", manifest(desk, 0)]) == 0, "four pictures, none held out"
    out = capsys.readouterr().out
    assert "2 pictures are too few; 6 or more are wanted" in out and "no picture is held out" in out
    assert "bits per token" in out and "Vendi score" in out and "psnr" in out


def test_labels_that_the_model_does_not_know_are_noted(desk: Path, capsys: Capture) -> None:
    (desk / "art" / "red").rename(desk / "art" / "green")
    assert main(EVALUATE) == 0
    out = capsys.readouterr().out
    assert "does not know 1 of the 2 labels of ART (as 'green')" in out


def test_nan_features_are_noted_and_the_rest_is_done(desk: Path, capsys: Capture, tiny_model: ImageGPT) -> None:
    model = copy.deepcopy(tiny_model)
    torch.nn.init.constant_(model.tokenizer.get_parameter("encoder.head.bias"), torch.nan)
    model.save("spoilt")
    assert main(["evaluate", "spoilt", *EVALUATE[2:], "--manifest", manifest(desk, 4)]) == 0
    out = capsys.readouterr().out
    assert "fidelity of drawn pictures: the features of 6 of 6 pictures hold NaN" in out
    assert "| copied, pixels " in out and "| copied, features " not in out and "nan" not in out


def test_art_without_a_training_part_and_folders_without_nets_are_refused(desk: Path, capsys: Capture) -> None:
    assert "for training" in refusal(capsys, *EVALUATE, "--manifest", manifest(desk, 10))
    assert "for training" in refusal(capsys, "audit", "art/red/0.png", "--against", "art", "--manifest", "split.csv")
    assert "mobilenet" in refusal(capsys, *EVALUATE, "--features", "art")
    assert "squeezenet" in refusal(capsys, *EVALUATE, "--perceptual", "art")
    assert "'missing'" in refusal(capsys, "evaluate", "tiny", "missing")
    assert "0" in refusal(capsys, *EVALUATE, "--limit", "0")


def test_samples_take_the_labels_of_the_collection_in_their_proportion(desk: Path, tiny_model: ImageGPT) -> None:
    for path in sorted((desk / "art" / "blue").iterdir())[:5]:
        path.unlink()
    evaluation = Evaluation(tiny_model, "art", EvaluateOptions(samples=15), SamplingOptions(steps=2))
    labels = [evaluation.art.names[i].partition("/")[0] for i in evaluation.prompts]
    assert sorted(labels) == ["blue"] * 5 + ["red"] * 10


def test_audit_names_a_training_picture_and_writes_a_sheet(desk: Path, capsys: Capture) -> None:
    paint(999, (90, 200, 90)).save("mine.png")
    Image.open("art/red/7.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("mirrored.png")
    command = ["audit", "mirrored.png", "mine.png", "--against", "art", "--model", "tiny", "--device", "cpu"]
    assert main([*command, "--manifest", manifest(desk, 4)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("mirrored.png: this is red/7.png") and "copy score 1.00" in lines[0]
    assert all("red/7.png (0.00" in line for line in lines[1:3])
    assert lines[3] == "mirrored-audit.png" and Image.open(lines[3]).width > 4 * 192
    assert lines[4].startswith("mine.png: ") and "this is" not in lines[4] and "% of the 8 held-out" in lines[4]
    assert main([*command, "--manifest", manifest(desk, 0), "--quiet"]) == 0
    assert capsys.readouterr().out == "mirrored-audit-2.png\nmine-audit.png\n".replace("mine-audit", "mine-audit-2")


def test_surprise_writes_a_map_and_says_how_much(desk: Path, capsys: Capture) -> None:
    command = ["surprise", "art/red/0.png", "--model", "tiny", "--device", "cpu", "--orders", "2"]
    assert main([*command, "--label", "red"]) == 0
    out, err = capsys.readouterr()
    assert out == "0-surprise.png\n" and "bits per token on average" in err
    assert main([*command, "--quiet", "--out", "maps"]) == 0
    assert capsys.readouterr() == (f"{Path('maps', '0-surprise.png')}\n", "")
    assert "'green'" in refusal(capsys, *command, "--label", "green")
    (desk / "text.png").write_text("no picture")
    assert "text.png" in refusal(capsys, "surprise", "art/red/0.png", "text.png", "--model", "tiny")


def test_numbers_that_are_not_finite_become_null_and_words_are_escaped() -> None:
    report = Report("a <b> & c", {})
    report.section("reconstruction", "about").add("held-out", {"psnr": float("inf")})
    assert json.loads(report.to_json())["measures"] == {"reconstruction": {"psnr": {"held-out": None}}}
    assert "# a &lt;b&gt; &amp; c\n" in report.to_markdown() and "inf" in report.to_text()
