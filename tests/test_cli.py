"""The command line: what each command prints, and that every mistake ends in one plain sentence and no file."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from igpt.cli import build_parser, main
from igpt.cli.flags import options_of, sampling_of
from igpt.config import EvaluateOptions, GPTConfig, SamplingOptions
from igpt.files import write_picture
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from igpt.recipe import Recipe
from igpt.siblings import sibling
from tests.imports import ROOT
from tests.interrupts import press_ctrl_c_once_there_is
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Path:
    """An empty current folder, with the model `tiny` within reach at ../models/tiny."""
    (tmp_path / "models").mkdir()
    shutil.copytree(tiny_folder, tmp_path / "models" / "tiny")
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder above the desk, models included."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.parent.rglob("*")}


def refusal(capsys: Capture, *argv: str) -> str:
    """The sentence with which a command line is refused; nothing else is printed and no file appears or changes."""
    before = tree(Path.cwd())
    capsys.readouterr()
    status = main(argv)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.startswith("igpt: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and not re.search(r"\w+Error\b", err), "no names from inside the program"
    assert tree(Path.cwd()) == before
    return err.removeprefix("igpt: ")


GENERATE = ["generate", "--model", "../models/tiny", "--size", "16", "--device", "cpu"]

# Mistakes


MISTAKES = """
    --size 0 | --size -1 | --size 100000 | --size 12x | --size 64x7
    --steps 0 | --steps many | --steps 1.5 | --temperature -1 | --temperature nan | --temperature inf
    --top-k -1 | --top-p 2 | --top-p 0 | --guidance -1 | --order spiral
    -n 0 | -n -3 | -n some | --seed -1 | --seed 9223372036854775807 | --seed lucky
    --device toaster | --out file/pictures | --out file | --out cat.gif | -n 2 --out cat.png
    --colour | --timelapse mp4 | --label green | --model nothing
""".replace("\n", "|").split("|")[1:-1]


@pytest.mark.parametrize("line", [*map(str.strip, MISTAKES), "--seed " + "9" * 400], ids=lambda line: line[:30])
def test_a_mistake_in_generate_is_answered_with_what_was_received(line: str, desk: Path, capsys: Capture) -> None:
    (desk / "file").write_text("a regular file, which no folder can lie under, not even for root")
    assert line.split()[-1].partition("/")[0] in refusal(capsys, *GENERATE, *line.split())


def test_a_label_that_does_not_exist_is_answered_with_those_that_do(desk: Path, capsys: Capture) -> None:
    assert {"red", "blue"} <= set(refusal(capsys, *GENERATE, "--label", "rad").replace(",", " ").split())


def test_a_model_that_does_not_exist_is_answered_with_those_that_do(desk: Path, capsys: Capture) -> None:
    for command in (["generate"], ["info"]):
        sentence = refusal(capsys, *command, *(["--model"] if command == ["generate"] else []), "nothing")
        assert "'nothing'" in sentence and "paintings" in sentence and "pixels" in sentence


SPOILT_WEIGHTS = {  # a file of weights, spoilt
    "truncated": lambda weights: weights[:-1000],
    "cut off in the header": lambda weights: weights[:100],
    "empty": lambda weights: b"",
    "pickled": lambda weights: b"\x80\x04cposix\nsystem\n(Vtouch pickled\ntR.",
    "missing": lambda weights: None,
}
SPOILT_CONFIGS: dict[str, dict[str, dict[str, Any]]] = {  # what is changed in config.json
    "of a wider GPT": {"gpt": {"width": 64}},
    "of a deeper GPT": {"gpt": {"layers": 4}},
    "with a word of its own": {"gpt": {"colour": 1}},
    "with text for a number": {"gpt": {"layers": "two"}},
    "with other codes": {"tokenizer": {"codes": 64}},
}


@pytest.mark.parametrize("how", SPOILT_WEIGHTS)
def test_a_model_with_spoilt_weights_is_refused(how: str, desk: Path, capsys: Capture) -> None:
    file = desk.parent / "models" / "tiny" / "model.safetensors"
    spoilt = SPOILT_WEIGHTS[how](file.read_bytes())
    file.unlink() if spoilt is None else file.write_bytes(spoilt)
    assert "tiny" in refusal(capsys, *GENERATE)


@pytest.mark.parametrize("how", [*SPOILT_CONFIGS, "missing", "{", "[]", "with more labels"])
def test_a_model_with_a_spoilt_config_is_refused(how: str, desk: Path, capsys: Capture) -> None:
    file = desk.parent / "models" / "tiny" / "config.json"
    record = json.loads(file.read_text())
    if how == "missing":
        file.unlink()
    elif how in "{[]":
        file.write_text(how)
    else:
        for part, changes in SPOILT_CONFIGS.get(how, {}).items():
            record[part] |= changes
        record["labels"] += ["green"] * (how == "with more labels")
        file.write_text(json.dumps(record))
    assert ("labels" if how == "with more labels" else "tiny") in refusal(capsys, *GENERATE)


@pytest.mark.parametrize("command", ["show", "replay"])
def test_a_picture_without_a_recipe_is_refused(command: str, desk: Path, capsys: Capture) -> None:
    Image.new("RGB", (8, 8)).save("foreign.png")
    (desk / "text.png").write_text("no picture")
    assert "foreign.png carries no recipe" in refusal(capsys, command, "foreign.png")
    assert "text.png is no picture" in refusal(capsys, command, "text.png")
    assert "missing.png" in refusal(capsys, command, "missing.png")


@pytest.mark.parametrize("command", ["show", "replay"])
def test_a_recipe_of_an_earlier_version_is_refused_by_its_number(command: str, desk: Path, capsys: Capture) -> None:
    main([*GENERATE, "--seed", "1", "--label", "red"])
    with Image.open("red-1.png") as picture:
        record, chunks = json.loads(picture.text["igpt"]), PngInfo()
        chunks.add_text("igpt", json.dumps(record | {"version": 2}))
        picture.save("old.png", pnginfo=chunks)
    said = refusal(capsys, command, "old.png")
    assert "old.png" in said and "a recipe of version 2, this igpt reads version 3" in said


def test_art_that_cannot_be_learned_from_is_refused(desk: Path, capsys: Capture) -> None:
    (desk / "empty").mkdir()
    (desk / "texts").mkdir()
    for i in range(3):
        (desk / "texts" / f"{i}.txt").write_text("no picture")
    (desk / "file").write_text("no archive either")
    assert "'missing'" in refusal(capsys, "train", "missing", "--out", "model")
    for art in ("empty", "texts", "file"):
        assert art in refusal(capsys, "train", art, "--out", "model", "--preset", "toy", "--quiet")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--out ../file/model", "file"),
        ("--out ../file", "file"),
        ("", "--out"),
        ("--out model --preset gigantic", "'gigantic'"),
        ("--out model --gpt-samples 0", "0"),
        ("--out model --dropout 2", "2"),
        ("--out model --gpt-lr fast", "'fast'"),
    ],
)
def test_a_mistake_in_train_is_answered_with_what_was_received(
    line: str, said: str, desk: Path, capsys: Capture
) -> None:
    (desk.parent / "file").touch()
    Image.new("RGB", (64, 64)).save(desk / "picture.png")
    assert said in refusal(capsys, "train", ".", *line.split())


EDIT = ["--model", "../models/tiny", "--device", "cpu", "--steps", "2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("complete picture.png --keep 0", "0"),
        ("complete picture.png --keep 1", "1"),
        ("complete picture.png --keep middle", "'middle'"),
        ("complete missing.png", "missing.png"),
        ("complete text.png", "text.png"),
        ("complete bomb.png", "bomb.png"),
        ("complete picture.png --steps 0", "0"),
        ("complete picture.png -n 0", "0"),
        ("complete picture.png --label green", "'green'"),
        ("complete picture.png --out picture.png/x", "picture.png"),
        ("complete", "PICTURE"),
        ("inpaint picture.png", "nowhere transparent, so a mask is wanted"),
        ("inpaint picture.png small.png", "scale the mask to 32x24"),
        ("inpaint picture.png black.png", "all black"),
        ("inpaint picture.png white.png", "all white"),
        ("inpaint picture.png text.png", "text.png"),
        ("extend picture.png", "--size"),
        ("extend picture.png --size 12x", "'12x'"),
        ("extend picture.png --size 16", "16x16"),
        ("extend picture.png --size 64 --anchor middle", "'middle'"),
        ("vary picture.png --strength 1.5", "1.5"),
        ("vary picture.png --strength -1", "-1"),
        ("vary picture.png --strength much", "'much'"),
        ("blend picture.png", "OTHER"),
        ("blend picture.png missing.png", "missing.png"),
        ("blend picture.png white.png --mix 2", "2"),
    ],
)
def test_a_mistake_in_an_edit_is_answered_with_what_was_received(
    line: str, said: str, desk: Path, capsys: Capture
) -> None:
    Image.radial_gradient("L").resize((32, 24)).save("picture.png")
    Image.new("L", (9, 9), 255).save("small.png")
    Image.new("L", (32, 24), 0).save("black.png")
    Image.new("L", (32, 24), 255).save("white.png")
    (desk / "text.png").write_text("no picture")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (desk / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk)
    words = line.split()
    assert said in refusal(capsys, words[0], *EDIT, *words[1:])


def test_a_label_is_refused_by_a_model_that_has_none(desk: Path, capsys: Capture) -> None:
    palette = PaletteTokenizer(PaletteConfig(("#000000", "#ffffff")))
    ImageGPT(palette, GPT(GPTConfig(2, 0, layers=2, width=32, heads=2, cells=16))).save("../models/plain")
    Image.new("RGB", (8, 8)).save("picture.png")
    for words in (["generate"], ["vary", "picture.png"]):
        assert "without labels" in refusal(capsys, *words, "--model", "../models/plain", "--label", "red")


def test_unknown_commands_are_answered_with_those_that_exist(desk: Path, capsys: Capture) -> None:
    assert "generate" in refusal(capsys, "draw")
    assert "PICTURE" in refusal(capsys, "show").upper()


# What works


def test_generate_prints_the_paths_and_writes_the_pictures(desk: Path, capsys: Capture) -> None:
    assert main([*GENERATE, "--label", "blue", "--seed", "5", "-n", "2", "--sheet"]) == 0
    assert capsys.readouterr() == ("blue-5.png\nblue-6.png\nblue-5-sheet.png\n", "")
    assert sorted(path.name for path in desk.iterdir()) == ["blue-5-sheet.png", "blue-5.png", "blue-6.png"]
    assert Image.open("blue-5.png").size == (16, 16)


def test_without_a_size_a_picture_has_the_native_one_of_the_model(desk: Path, capsys: Capture) -> None:
    assert main(["generate", "--model", "../models/tiny", "--device", "cpu", "--seed", "5", "--label", "red"]) == 0
    assert Image.open("red-5.png").size == (32, 32)


def test_without_a_label_those_are_drawn_that_the_model_draws_well_and_with_any_all(
    desk: Path, capsys: Capture
) -> None:
    config = desk.parent / "models" / "tiny" / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(record | {"provenance": {"default_labels": ["blue"]}}))
    for more, labels in (([], {"blue"}), (["--label", "any"], {"red", "blue"})):
        assert main([*GENERATE, "-n", "12", "--seed", "0", "--out", "new", *more]) == 0
        assert {Path(line).name.partition("-")[0] for line in capsys.readouterr().out.splitlines()} == labels


@pytest.mark.parametrize("command", ["complete", "inpaint", "extend", "vary", "blend"])
def test_an_edit_prints_the_paths_and_writes_pictures_with_recipes(command: str, desk: Path, capsys: Capture) -> None:
    Image.radial_gradient("L").resize((32, 24)).save("cat.png")
    Image.linear_gradient("L").resize((32, 24)).save("other.png")
    more = {"inpaint": ["other.png"], "blend": ["other.png"], "extend": ["--size", "40x32"]}.get(command, [])
    assert main([command, "cat.png", *more, *EDIT, "--seed", "5", "-n", "2", "--sheet", "--label", "blue"]) == 0
    names = [f"cat-{command}-5.png", f"cat-{command}-6.png", f"cat-{command}-5-sheet.png"]
    assert capsys.readouterr() == ("".join(f"{name}\n" for name in names), "")
    assert {path.name for path in desk.iterdir()} == {*names, "cat.png", "other.png"}
    assert main(["show", names[1]]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["command"], shown["seed"], shown["label"], shown["options"]["steps"]) == (command, 6, "blue", 2)


def test_generate_draws_textures_and_animations(desk: Path, capsys: Capture) -> None:
    assert main([*GENERATE, "--seed", "5", "--tile", "--timelapse", "webp"]) == 0
    assert capsys.readouterr() == ("blue-5.png\nblue-5-timelapse.webp\n", "")
    assert Image.open("blue-5-timelapse.webp").size == (16, 16)
    assert main(["show", "blue-5.png"]) == 0
    assert json.loads(capsys.readouterr().out)["tile"] is True


def test_a_seed_that_was_not_given_is_told_and_draws_the_same_picture_again(desk: Path, capsys: Capture) -> None:
    assert main([*GENERATE, "--out", "one.png"]) == 0
    word, seed = capsys.readouterr().err.split()
    assert word == "seed"
    assert main([*GENERATE, "--out", "two.png", "--seed", seed]) == 0
    assert (desk / "one.png").read_bytes() == (desk / "two.png").read_bytes()


def test_a_second_run_does_not_overwrite_unless_forced(desk: Path, capsys: Capture) -> None:
    for more, expected in [([], "red-1.png"), ([], "red-1-2.png"), (["--force"], "red-1.png")]:
        assert main([*GENERATE, "--seed", "1", *more]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    assert main([*GENERATE, "--seed", "1", "--out", "new/album"]) == 0
    assert capsys.readouterr().out == f"{Path('new/album/red-1.png')}\n"


def test_every_sampling_option_reaches_the_picture(desk: Path, capsys: Capture) -> None:
    words = "--steps 3 --temperature 0.5 --top-k 9 --top-p 0.9 --guidance 1.5 --order raster".split()
    assert main([*GENERATE, "--seed", "1", "--label", "none", *words]) == 0
    capsys.readouterr()
    assert main(["show", "tiny-1.png"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert SamplingOptions(**shown["options"]) == SamplingOptions(3, 0.5, 9, 0.9, 1.5, "raster")
    assert (shown["model"], shown["seed"], shown["label"], shown["size"]) == ("tiny", 1, None, [16, 16])


def test_progress_is_shown_to_people_only_and_only_if_wanted(
    desk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*GENERATE, "--seed", "1"]) == 0
    assert capsys.readouterr().err == "", "a pipe is nobody to watch"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*GENERATE, "--seed", "1"]) == 0
    assert "/64 [" in capsys.readouterr().err
    assert main([*GENERATE, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("more", [[], ["--from-tokens"]], ids=["drawn again", "decoded"])
def test_replay_draws_the_same_pixels_and_says_so(more: list[str], desk: Path, capsys: Capture) -> None:
    assert main([*GENERATE, "--label", "red", "--seed", "3", "--size", "25x18"]) == 0
    capsys.readouterr()
    assert main(["replay", "red-3.png", "--model", "../models/tiny", "--device", "cpu", *more]) == 0
    out, err = capsys.readouterr()
    assert out == "red-3-replay.png\n" and "64" in err and "recorded" in err
    assert (desk / "red-3-replay.png").read_bytes() == (desk / "red-3.png").read_bytes()
    assert "'tiny'" in refusal(capsys, "replay", "red-3.png"), "the model is not in the box"


def test_show_and_replay_say_that_pixels_were_changed_since(desk: Path, capsys: Capture) -> None:
    assert main([*GENERATE, "--label", "red", "--seed", "3"]) == 0
    with Image.open("red-3.png") as picture:
        text = PngInfo()
        text.add_text("igpt", picture.text["igpt"])  # type: ignore[attr-defined]
        picture.transpose(Image.Transpose.ROTATE_180).save("turned.png", pnginfo=text)
    for words in (["show"], ["replay", "--model", "../models/tiny", "--device", "cpu"]):
        for name, changed in (("red-3.png", False), ("turned.png", True)):
            assert main([*words, name]) == 0
            assert ("turned.png: its pixels were changed" in capsys.readouterr().err) is changed


def test_replay_looks_up_no_path_or_address_that_a_picture_names(desk: Path, capsys: Capture) -> None:
    for name in ("somebody/model", "../models/tiny", "/etc/model", ".."):
        recipe = Recipe(name, "", None, 1, (16, 16), SamplingOptions(), (1, 1), (0,))
        write_picture(Image.new("RGB", (16, 16)), Path("stranger.png"), recipe, force=True)
        assert f"{name!r}" in refusal(capsys, "replay", "stranger.png")


def test_info_describes_a_model(desk: Path, capsys: Capture) -> None:
    assert main(["info", "../models/tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert (rows["name"], rows["labels"]) == ("tiny", "2: red, blue")
    assert "32 tokens of 4x4 pixels" in rows["tokenizer"]
    assert "8x8 tokens, 32x32 pixels" in rows["picture"]
    assert len(rows["weights"]) == 64


def test_info_lists_the_models_in_the_box(desk: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    import igpt.checkpoint

    assert main(["info"]) == 0
    paintings, pixels = capsys.readouterr().out.splitlines()
    assert paintings.startswith("paintings: ") and "67 labels, 32x32 tokens, 256x256 pixels" in paintings
    assert pixels.startswith("pixels: ") and "21 labels, 32x32 tokens, 32x32 pixels" in pixels
    monkeypatch.setattr(igpt.checkpoint, "in_the_box", dict)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "no model is in the box\n"


def test_train_hands_every_option_over(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []
    fake = SimpleNamespace(train=lambda *arguments: received.extend(arguments))
    monkeypatch.setitem(sys.modules, "train.run", fake)
    words = ["train", ".", "--out", "model"]
    assert main([*words, "--preset", "toy", "--seed", "3", "--no-flip", "--gpt-lr", "1e-4", "--gpt-samples", "9"]) == 0
    options = sibling("train.options").TrainOptions(preset="toy", seed=3, flip=False, gpt_lr=1e-4, gpt_samples=9)
    assert received == [".", "model", options]


def test_every_default_comes_from_the_dataclasses() -> None:
    parser, options = build_parser(), sibling("train.options").TrainOptions
    assert options_of(parser.parse_args(["evaluate", "tiny", "art"]), EvaluateOptions) == EvaluateOptions()
    for words in (["evaluate", "tiny", "art"], ["generate"], ["complete", "a.png"]):
        assert sampling_of(parser.parse_args(words)) == {}, "the model says how it draws"
    said = ["--steps", "3", "--guidance", "2", "--order", "raster"]
    assert sampling_of(parser.parse_args(["generate", *said])) == {"steps": 3, "guidance": 2.0, "order": "raster"}
    assert options_of(parser.parse_args(["train", "art", "--out", "model"]), options) == options()
    tuning = sibling("train.options").TuneOptions
    assert options_of(parser.parse_args(["finetune", "art", "--out", "model"]), tuning) == tuning()


COMMANDS = """generate train finetune replay show info tokenize complete inpaint extend vary blend evaluate audit
surprise palette studio lock unlock""".split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_flag_with_its_default(command: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    help = capsys.readouterr().out
    assert stopped.value.code == 0
    if command == "generate":
        for default in (SamplingOptions().steps, SamplingOptions().guidance):
            assert f"(default: {default}, unless the model has its own)" in help
    assert command != "evaluate" or "follows from it (default: 0)" in help
    if command == "train":
        assert "--tokenizer-crops" in help and "(default: small;" in help


def test_the_bare_command_prints_its_help(capsys: Capture) -> None:
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


def test_an_interruption_ends_quietly_and_leaves_whole_pictures(desk: Path, capsys: Capture) -> None:
    press_ctrl_c_once_there_is(desk / "red-1.png")
    assert main([*GENERATE, "--seed", "1", "--label", "red", "-n", "10000"]) == 130
    out, err = capsys.readouterr()
    drawn = [path.name for path in desk.iterdir() if path.name.startswith("red-")]
    assert err == "igpt: stopped\n" and {*out.split()} <= {*drawn} and 0 < len(drawn) < 10_000
    assert all(Image.open(desk / name).convert("RGB").size == (16, 16) for name in drawn)


# Processes of their own


def python(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, text=True, **more)


def test_help_and_cheap_mistakes_are_answered_without_loading_torch(desk: Path) -> None:
    main([*GENERATE, "--seed", "1"])
    Path("file").touch()
    code = """
import json, sys
from igpt.cli import main
for argv in json.loads(sys.argv[1]):
    try:
        main(argv)
    except SystemExit:
        pass
    assert not {"torch", "numpy", "torchvision", "accelerate"} & set(sys.modules), argv
"""
    lines = """
--help | --version | generate --help | train --help | info --help | draw | generate --colour | generate --size 0
generate --steps 0 | generate -n 0 | generate --top-p 2 | generate --seed -1 | generate --out file/x
generate --order spiral | show missing.png | show red-1.png | complete missing.png | complete red-1.png --keep 1
inpaint red-1.png file | extend red-1.png --size 0 | extend red-1.png --size 64 --anchor up
vary red-1.png --strength 2 | blend red-1.png red-1.png --mix 2
finetune missing --out model | finetune . --out model --minutes 0 | finetune . --out file/x | finetune --help
train missing --out model | train . --out file/x | train . --out model --views 0
evaluate tiny missing | evaluate tiny . --samples 0 | evaluate tiny . --top-p 2 | evaluate tiny
evaluate tiny . --out file/x | audit missing.png --against . | audit file | surprise missing.png
surprise file --orders 0 | evaluate --help | audit --help
""".replace("\n", "|").split("|")
    done = python("-c", code, json.dumps([line.split() for line in lines]), capture_output=True)
    assert done.returncode == 0, done.stderr
    assert '"tokens"' in done.stdout


def test_a_mistake_exits_with_2_and_one_sentence_from_the_shell_too(desk: Path) -> None:
    done = python("-m", "igpt", "generate", "--size", "12x", capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("igpt: ")


def test_a_reader_that_stops_reading_is_no_error(desk: Path) -> None:
    main([*GENERATE, "--seed", "1"])
    reading, writing = os.pipe()
    os.close(reading)
    done = python("-m", "igpt", "show", "red-1.png", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.stderr == ""


def test_a_palette_of_fewer_colours_than_the_model_has_is_said_to_be_one(
    tiny_pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_pixels.save("sprites")
    Path("two.hex").write_text("102030\nf0e0d0\n")
    assert main("generate --model sprites --size 16 --seed 1 --palette two.hex".split()) == 0
    assert "two.hex has 2 colours" in capsys.readouterr().err
