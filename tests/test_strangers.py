"""What comes from strangers stays where it is, and what igpt writes is seen by nobody whom the umask shuts out."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
from pathlib import Path
from typing import Any

import pytest

import igpt
from igpt import checkpoint
from igpt.cli import main
from igpt.image_gpt import ImageGPT
from tests.painting import art_folder, paint
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def stranger(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "theirs" / "model")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Links


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_a_model_folder_is_refused_and_what_it_leads_to_not_told(
    name: str, absolute: bool, stranger: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(tiny_folder, tmp_path / "mine") / name
    mine.write_bytes(mine.read_bytes() if mine.exists() else b"my diary")
    (stranger / name).unlink(missing_ok=True)
    (stranger / name).symlink_to(mine if absolute else Path("..", "..", "mine", name))
    with pytest.raises(UserError, match="is a link out of the model folder") as refused:
        igpt.load(stranger, "cpu")
    assert "diary" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "pipe", "loop"])
def test_a_device_a_pipe_or_a_loop_in_place_of_a_file_is_refused_at_once(
    name: str, target: str, stranger: Path, capsys: Capture
) -> None:
    path = stranger / name
    path.unlink()
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(name if target == "loop" else target)
    with pytest.raises(UserError):
        igpt.load(stranger, "cpu")


def test_links_that_stay_inside_are_followed_and_the_folder_itself_may_be_one(stranger: Path, tmp_path: Path) -> None:
    (stranger / "weights").mkdir()
    (stranger / "model.safetensors").rename(stranger / "weights" / "v1")
    (stranger / "model.safetensors").symlink_to("weights/v1")
    (tmp_path / "shortcut").symlink_to(stranger)
    assert igpt.load(tmp_path / "shortcut", "cpu").labels == ["red", "blue"]


def test_a_model_in_the_cache_of_the_hub_is_read_though_it_is_links(tiny_folder: Path, tmp_path: Path) -> None:
    """Its layout: models--user--name/snapshots/REVISION/config.json is a link to ../../blobs/HASH."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(tiny_folder / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert igpt.load(snapshot, "cpu").labels == ["red", "blue"]
    (tmp_path / "mine.json").write_text((tiny_folder / "config.json").read_text())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../mine.json")
    with pytest.raises(UserError, match="is a link out of the model folder"):
        igpt.load(snapshot, "cpu")


# Names


def test_paths_and_escapes_in_a_config_lead_nowhere(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A label becomes the name of a file, and everything in a config is shown by `igpt info`."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    labels = ["/etc/passwd", "../../escaped\x1b]0;gotcha\x07"]
    about = {
        "base": "/srv/secret",
        "command": "igpt \x1b[2J",
        "default_labels": labels[1:],
        "tokenizer": {"from": "/x"},
    }
    change_config(stranger, labels=labels, provenance=about)
    for label in igpt.load(stranger, "cpu").labels:
        assert main(["generate", "--model", str(stranger), "--size", "16", "--seed", "1", "--label", label]) == 0
    assert main(["generate", "--model", str(stranger), "--size", "16", "--seed", "2"]) == 0
    assert main(["info", str(stranger)]) == 0
    assert main(["generate", "--model", str(stranger), "--label", "no such"]) == 2
    assert main(["vary", "etc-passwd-1.png", "--model", str(stranger), "--seed", "1", "--steps", "2"]) == 0
    out, err = capsys.readouterr()
    assert not set(map(chr, range(32))) & set(out + err) - {"\n"}, "no control characters reach the terminal"
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "desk"}


@pytest.mark.parametrize(
    "name",
    [
        "../model",
        "..",
        "/etc/model",
        "~/no/such/model",
        "a/..",
        "../..",
        "a/b/c",
        "./x",
        "a\\b",
        "a/b@c/d",
        "https://example.org/model",
        "file:///etc/passwd",
        "a/\x00b",
        "a//b",
        "-rf/x",
        " / ",
    ],
)
def test_a_name_that_looks_like_a_path_or_an_address_is_no_hub_id(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError) as refused:
        checkpoint.find(name)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


# Numbers


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("gpt", "layers", 2**31),
        ("gpt", "head_layers", 10**9),
        ("gpt", "width", 2**24),
        ("gpt", "cells", 2**31),
        ("tokenizer", "encoder_blocks", 65537),
        ("tokenizer", "decoder_blocks", 2**63),
        ("tokenizer", "head", [2**20, 16]),
        ("tokenizer", "code_width", 2**24),
    ],
)
def test_a_config_of_a_giant_is_refused_before_anything_is_built(
    part: str, name: str, value: Any, stranger: Path
) -> None:
    """Building one for ten gigabytes or a few minutes, only to see that the weights are of another, is too late."""
    config = json.loads((stranger / "config.json").read_text())
    change_config(stranger, **{part: config[part] | {name: value}})
    with pytest.raises(UserError, match=f"{name} is .*more than these weights have room for"):
        igpt.load(stranger, "cpu")


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": [{"a": 1}, "blue"]},
        {"labels": ["red", "red"]},
        {"labels": ["red", None]},
        {"provenance": {"default_labels": 3}},
        {"provenance": {"default_labels": [["red"]]}},
        {"provenance": {"sampling": {"steps": float("nan")}}},
        {"provenance": {"sampling": {"top_k": 0.5}}},
        {"provenance": {"sampling": {"top_k": True}}},
        {"provenance": {"sampling": [1]}},
        {"provenance": {"sampling": {"colour": 1}}},
        {"provenance": [1]},
    ],
)
def test_labels_that_are_no_names_and_ways_of_drawing_of_another_type_are_one_sentence(
    changes: dict[str, Any], stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    change_config(stranger, **changes)
    for words in (["generate", "--model", str(stranger), "--size", "16"], ["info", str(stranger)]):
        assert main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith("igpt: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


# The umask


@pytest.mark.parametrize("mask", [0o077, pytest.param(0o027, marks=pytest.mark.slow)])
def test_what_is_written_has_the_permissions_of_the_umask(
    mask: int, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    art = art_folder(tmp_path / "art", each=3)
    paint(1, (0, 90, 90)).save(tmp_path / "one.png")
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    model, quick = ["--model", str(tiny_folder)], ["--size", "16", "--seed", "1", "--steps", "2"]
    before = os.umask(mask)
    try:
        for words in (
            ["generate", *quick, "-n", "2", "--sheet", "--timelapse", "--out", "deep/pictures", *model],
            ["complete", str(tmp_path / "one.png"), "--seed", "1", "--steps", "2", *model],
            ["tokenize", str(tmp_path / "one.png"), "--out", "tokens", *model],
            ["finetune", str(art), "--out", "deep/tuned", "--samples", "8", "--quiet", *model],
            ["finetune", str(art), "--out", "adapter", "--samples", "8", "--quiet", "--adapter", *model],
            ["train", str(art), "--out", "new", "--tokenizer", model[1], "--gpt-samples", "16", "--quiet"],
            ["evaluate", str(tiny_folder), str(art), "--out", "report", "--samples", "2", "--quiet"],
        ):
            assert main(words) == 0, words
        ImageGPT.load(tiny_folder, "cpu").save(desk / "saved")
    finally:
        os.umask(before)
    made = list(desk.rglob("*"))
    assert len(made) > 20
    wanted = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in made}
    other = {str(path): oct(mode) for path in made if (mode := stat.S_IMODE(path.stat().st_mode)) != wanted[path]}
    assert not other


# Archives


def test_art_of_a_stranger_with_a_link_to_a_secret_is_listed_and_not_shown(tmp_path: Path) -> None:
    art = art_folder(tmp_path / "art", each=2)
    (tmp_path / "secret.txt").write_text("my diary")
    (art / "red" / "9.png").symlink_to(tmp_path / "secret.txt")
    skipped = ArtFolder(art).skipped
    assert [name for name, _ in skipped] == ["red/9.png"] and "diary" not in str(skipped)


def test_names_of_pictures_carry_no_escapes_to_the_terminal(tmp_path: Path) -> None:
    art = art_folder(tmp_path / "art", each=2)
    (art / "red").rename(art / "red\x1b[2J")
    (art / "blue" / "9\x07\x9b.png").touch()
    found = ArtFolder(art)
    told = "".join([*found.labels, *found.names, *(skipped.name for skipped in found.skipped)])
    assert told.count("\ufffd") == 5 and not {"\x1b", "\x07", "\x9b"} & set(told)
