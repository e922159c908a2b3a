"""`igpt finetune`: better on its own pictures, in the time it was given, stoppable at any moment, hard to break."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import igpt
from igpt.checkpoint import ADAPTER, load
from igpt.cli import main
from igpt.config import GPTConfig
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from igpt.sizes import Grids
from tests.interrupts import ctrl_c_once_there_is
from tests.painting import art_folder, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from train.card import summary
from train.finetune import BEFORE_AFTER, FACTS, LISTING, finetune
from train.folder import WORK
from train.options import TuneOptions
from train.state import peek
from train.tokens import free_view

QUICK = TuneOptions(quiet=True, samples=400, lr=1e-2, seed=1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def green(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of a colour that the base does not know."""
    folder = tmp_path_factory.mktemp("art") / "green"
    folder.mkdir()
    for i in range(12):
        paint(i, (40, 180, 60)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def tuned(green: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(green, tmp_path_factory.mktemp("tuned") / "greens", str(tiny_folder), QUICK)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a palette of four colours, one of them the white ground, and no label."""
    palette = PaletteTokenizer(PaletteConfig(("#000000", "#28b43c", "#f0e6d2", "#ffffff")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt = GPT(GPTConfig(4, 0, layers=2, width=32, heads=2, head_layers=1, cells=64))
    folder = tmp_path_factory.mktemp("models") / "sprites"
    ImageGPT(palette, gpt, provenance={"sampling": {"steps": 4}}).save(folder)
    return folder


def facts_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / WORK / FACTS).read_text()))


# What it makes


def test_a_flat_folder_becomes_a_model_with_one_more_label_that_is_better_on_unseen_pictures(
    tuned: Path, tiny_folder: Path
) -> None:
    model, base = igpt.load(tuned, "cpu"), load(tiny_folder)
    assert model.labels == ["red", "blue", "green"]
    facts = facts_of(tuned)
    assert facts["bits"] < 0.6 * facts["base_bits"], facts
    for label in (*model.labels, None):
        assert model.generate(size=24, label=label, seed=1)[0].size == (24, 24)
    assert model.labels_for(None, 0, 20) == ["green"] * 20, "what it was tuned on is what it draws"
    assert model.provenance["base_hash"] == base.weights_hash and model.provenance["finetune"]["bits"] == facts["bits"]
    old, new = base.tokenizer.state_dict(), load(tuned).tokenizer.state_dict()
    assert all(torch.equal(old[key], new[key]) for key in old), "recipes and tokens of the base stay good"


def test_it_leaves_a_sheet_a_listing_and_a_card_but_no_training_states(tuned: Path) -> None:
    with Image.open(tuned / BEFORE_AFTER) as sheet:
        assert sheet.width > 8 * 160 and sheet.height > 3 * 160
    assert (tuned / LISTING).read_text().count("learned from") == 10
    card = (tuned / "README.md").read_text()
    assert "fine-tuned" in card and "New labels: green." in card and "the base, with the label nearest" in card
    assert not list((tuned / WORK).glob("*.safetensors"))


def first_sheet(out: Path) -> Image.Image:
    with Image.open(min((out / WORK).glob("finetune-*.png"))) as sheet:
        return sheet.copy()


def test_while_it_learns_it_paints_sheets_of_four_pictures(tuned: Path) -> None:
    sheet = first_sheet(tuned)
    assert sheet.width > 4 * 160 and 160 < sheet.height < 2 * 160 and len(sheet.getcolors(1 << 24) or ()) > 100


def test_sub_folders_become_labels_and_known_names_add_to_the_known_ones(tiny_folder: Path, tmp_path: Path) -> None:
    art = art_folder(tmp_path / "art", each=5)
    (art / "blue").rename(art / "violet")
    out = finetune(art, tmp_path / "out", str(tiny_folder), replace(QUICK, samples=16))
    assert igpt.load(out, "cpu").labels == ["red", "blue", "violet"]


def test_an_adapter_is_small_and_its_base_draws_with_it(green: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = finetune(green, tmp_path / "out", str(tiny_folder), replace(QUICK, adapter=True, samples=100))
    assert (out / ADAPTER).stat().st_size <= 4_000_000 and not (out / "model.safetensors").exists()
    model = igpt.load(tiny_folder, "cpu", adapter=out / ADAPTER)
    assert model.labels == ["red", "blue", "green"] and model.name == "out"
    assert facts_of(out)["bits"] < facts_of(out)["base_bits"]
    words = ["generate", "--model", str(tiny_folder), "--adapter", str(out / ADAPTER)]
    assert main([*words, "--size", "16", "--seed", "1", "--out", str(tmp_path), "--quiet"]) == 0
    assert (tmp_path / "green-1.png").is_file()


def test_the_library_hands_back_the_tuned_model_and_leaves_random_numbers_alone(
    green: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    before = torch.get_rng_state()
    assert igpt.finetune(green, tmp_path / "out", tiny_folder, samples=16, quiet=True).labels[-1] == "green"
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match=r"no such option.*colour"):
        igpt.finetune(green, tmp_path / "new", tiny_folder, colour=1)


def test_sprites_are_learned_pixel_by_pixel_and_shown_enlarged(sprites: Path, tmp_path: Path) -> None:
    art = tmp_path / "discs"
    art.mkdir()
    for i in range(8):
        ImageOps.posterize(paint(i, (40, 180, 60)), 1).resize((17, 17), Image.Resampling.NEAREST).save(art / f"{i}.png")
    out = finetune(art, tmp_path / "out", str(sprites), replace(QUICK, samples=100))
    assert facts_of(out)["bits"] < 0.9 * facts_of(out)["base_bits"]
    model = igpt.load(out, "cpu")
    assert model.labels == ["discs"] and model.sampling.steps == 4
    with Image.open(out / BEFORE_AFTER) as sheet:
        assert sheet.height > 3 * 9 * 17
    tile = first_sheet(out).crop((8, 8, 168, 168))
    small = tile.resize((16, 16), Image.Resampling.NEAREST)
    assert small.resize(tile.size, Image.Resampling.NEAREST).tobytes() == tile.tobytes(), "by whole pixels"
    assert len(small.getcolors() or ()) > 1


# Views


def test_every_other_view_is_the_whole_picture_and_the_others_are_squares_that_follow_from_their_number() -> None:
    picture, grids = Image.linear_gradient("L").rotate(90).convert("RGB").resize((200, 64)), Grids(8, 2, 64)
    views = [free_view(picture, view, grids, True, Random(f"{view}")) for view in range(8)]
    h, w = grids.composition(200, 64)
    assert [tuple(view.shape) for view in views] == 4 * [(3, 8 * h, 8 * w), (3, 128, 128)] and w > h
    assert torch.equal(views[0], views[4]) and torch.equal(views[2], views[6])
    assert torch.allclose(views[0], views[2].flip(2), atol=0.05) and not torch.equal(views[0], views[2])
    again = free_view(picture, 5, grids, True, Random("5"))
    assert torch.equal(views[5], again) and not torch.equal(views[5], views[3])
    assert torch.equal(free_view(picture, 2, grids, False, Random(0)), views[0]), "not mirrored unless asked for"


def test_pixel_art_for_a_model_of_paintings_is_enlarged_to_crisp_squares() -> None:
    checks = Image.new("L", (16, 16))
    checks.putdata([255 * ((x + y) % 2) for y in range(16) for x in range(16)])
    view = free_view(checks.convert("RGB"), 1, Grids(8, 2, 256), False, Random(0))
    assert (view.abs() > 0.9).float().mean() > 0.9, "smoothed, most of it would be grey"


# The time it takes


def test_it_takes_the_minutes_it_is_given_and_says_before_what_it_will_do(
    green: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    out = finetune(green, tmp_path / "out", str(tiny_folder), TuneOptions(minutes=0.15, patience=1000))
    assert 0.4 * 9 < time.monotonic() - start < 2 * 9  # other programs may be running
    assert load(out).provenance["gpt"]["samples"] > 40
    said = capsys.readouterr().err
    places = [
        said.index(words) for words in ("12 pictures: 10 to learn from", "crops a second", "0.15 minutes", "finetune:")
    ]
    assert places == sorted(places)


def test_too_few_minutes_are_named_and_still_make_a_model(
    green: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finetune(green, tmp_path / "out", str(tiny_folder), TuneOptions(minutes=0.05))
    assert "--minutes 0.05 is too little on this machine" in capsys.readouterr().err
    assert igpt.load(out, "cpu").generate(size=16, seed=1)


# Being stopped


def make_older(state: Path, seconds: float) -> None:
    """As if the training had learned so much longer before it was stopped."""
    notes = peek(state)
    save_file(load_file(state), state, notes | {"seconds": str(float(notes["seconds"]) + seconds)})


def test_ctrl_c_while_it_learns_leaves_the_best_so_far_and_the_same_command_ends_where_it_would_have(
    green: Path, tuned: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "greens"
    with ctrl_c_once_there_is(out / WORK / "finetune-best.safetensors"):
        finetune(green, out, str(tiny_folder), QUICK)
    half = igpt.load(out, "cpu")
    assert half.labels == ["red", "blue", "green"] and half.generate(size=16, label="green", seed=1)
    assert half.provenance["gpt"]["samples"] < 400
    make_older(out / WORK / "finetune-state.safetensors", 3600)
    finetune(green, out, str(tiny_folder), QUICK)
    assert facts_of(out)["minutes"] >= 60, "those before it was stopped, too"
    assert load(out).weights_hash == load(tuned).weights_hash
    assert first_sheet(out).tobytes() == first_sheet(tuned).tobytes(), "always of the same seeds"
    before = (out / "model.safetensors").stat().st_mtime_ns
    finetune(green, out, str(tiny_folder), QUICK)
    assert (out / "model.safetensors").stat().st_mtime_ns == before, "nothing is left to do"


@pytest.mark.parametrize("file", [LISTING, f"{WORK}/{FACTS}"])
@pytest.mark.parametrize("adapter", [False, True])
def test_ctrl_c_before_it_learns_leaves_a_model_that_draws(
    file: str, adapter: bool, green: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with ctrl_c_once_there_is(out / file):
        finetune(green, out, str(tiny_folder), replace(QUICK, adapter=adapter))
    model = igpt.load(tiny_folder, "cpu", adapter=out / ADAPTER) if adapter else igpt.load(out, "cpu")
    assert model.labels == ["red", "blue", "green"] and model.generate(size=16, label="green", seed=1)


def test_ctrl_c_while_it_draws_in_the_end_leaves_what_it_learned_and_the_same_command_ends_it(
    green: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", replace(QUICK, samples=24)
    with ctrl_c_once_there_is(out / "model.safetensors"):
        finetune(green, out, str(tiny_folder), options)
    assert igpt.load(out, "cpu").provenance["gpt"]["samples"] == 24 and "minutes" not in facts_of(out)
    finetune(green, out, str(tiny_folder), options)
    assert (out / BEFORE_AFTER).is_file() and facts_of(out)["crops"] == 24


@contextmanager
def disk_for_files_of(size: int) -> Iterator[None]:
    """A block in which no file can become larger, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_saved_before(
    green: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with ctrl_c_once_there_is(out / WORK / "finetune-best.safetensors"):
        finetune(green, out, str(tiny_folder), replace(QUICK, samples=200))
    files = [out / "model.safetensors", out / "config.json", out / WORK / "finetune-state.safetensors"]
    before = [path.read_bytes() for path in files]
    words = ["finetune", str(green), "--out", str(out), "--model", str(tiny_folder), "--quiet", "--samples", "200"]
    words += ["--lr", "1e-2", "--seed", "1"]
    with disk_for_files_of(30_000):  # bytes: enough for all but the states
        assert main(words) == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error and error.count("\n") == 1
    assert [path.read_bytes() for path in files] == before and not list(out.rglob("*.part"))
    assert main(words) == 0 and igpt.load(out, "cpu").provenance["gpt"]["samples"] == 200


# What is said in the end


def test_a_model_that_repeats_its_pictures_is_warned_of() -> None:
    assert not any("warning" in sentence for sentence in summary({"copied": 1, "drawn": 24}))
    assert "warning: it repeats its training pictures" in summary({"copied": 5, "drawn": 24})[1]


@pytest.mark.slow
@pytest.mark.parametrize(("label", "adapter"), [("it's my label", True), ("-dash", False)])
def test_the_command_printed_in_the_end_can_be_pasted(
    label: str,
    adapter: bool,
    green: Path,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(green, f"art/{label}")
    shutil.copytree(tiny_folder, "a base")
    options = TuneOptions(samples=8, adapter=adapter)
    finetune("art", "a model", "a base", options)
    command = re.findall("draw with `(.*)`", capsys.readouterr().err)[-1]
    words = shlex.split(command)
    assert words[0] == "igpt" and main([*words[1:], "--size", "16", "--seed", "1", "--out", "drawn.png"]) == 0
    assert json.loads(Image.open("drawn.png").text["igpt"])["label"] == label  # type: ignore[attr-defined]


# Mistakes


def test_mistakes_are_answered_in_one_sentence_and_leave_nothing_behind(
    green: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(green, "art")
    shutil.copytree(tiny_folder, "tiny")
    Path("empty").mkdir()
    Path("one").mkdir()
    shutil.copy("art/0.png", "one")
    Path("same").mkdir()
    Path("unreadable").mkdir()
    for i in range(4):
        shutil.copy("art/0.png", f"same/{i}.png")
        Path(f"unreadable/{i}.png").write_text("no picture")
    Path("thesis").mkdir()
    Path("thesis/thesis.txt").write_text("precious")
    cases = [
        ("missing", "'missing'"),
        ("empty", "no usable picture in empty"),
        ("one", "1 usable different picture"),
        ("same", "all 4 show the same"),
        ("unreadable", "0.png is no picture"),
        ("tiny", "is a model"),
        ("art --out thesis", "something else"),
        ("art --out tiny", "holds a finished model already"),
        ("art --out art/0.png", "art/0.png"),
        ("art --model nothing", "'nothing'"),
        ("art --minutes 0", "--minutes 0"),
        ("art --rank 0", "--rank 0"),
        ("art --samples 0", "--samples 0"),
        ("art --lr 2", "--lr 2"),
        ("art --method best", "'best'"),
        ("art --patience 0", "--patience"),
        ("art --adapter --method full", "--adapter"),
    ]
    for line, said in cases:
        before = sorted(str(path) for path in Path().rglob("*"))
        words = line.split()
        more = ["--model", "tiny"] if "--model" not in words else []
        assert main(["finetune", *words, *([] if "--out" in words else ["--out", "new"]), *more]) == 2, line
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("igpt: ") and err.count("\n") == 1 and said in err, (line, err)
        assert sorted(str(path) for path in Path().rglob("*")) == before, line


def test_a_folder_of_other_pictures_or_options_is_not_gone_on_with(
    green: Path, tuned: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="started with samples 400, now it is 80"):
        finetune(green, tuned, str(tiny_folder), replace(QUICK, samples=80))
    fewer = tmp_path / "green"
    shutil.copytree(green, fewer)
    (fewer / "0.png").unlink()
    with pytest.raises(UserError, match="other pictures"):
        finetune(fewer, tuned, str(tiny_folder), QUICK)


def test_damaged_facts_are_named(green: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / FACTS).write_text("{")
    with pytest.raises(UserError, match=r"facts.json is damaged, delete it"):
        finetune(green, tmp_path / "out", str(tiny_folder), QUICK)
