"""Models on disk: whole or refused, hashed, and never a pickle."""

from __future__ import annotations

import builtins
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from igpt import checkpoint
from igpt.config import SamplingOptions
from igpt.image_gpt import ImageGPT
from tokenizer_vq.base import UserError
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer


def test_a_saved_model_draws_what_it_drew_before(tiny_model: ImageGPT, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "copy")
    copy = ImageGPT.load(tmp_path / "copy", "cpu")
    options = SamplingOptions(steps=4)
    drawn = [model.draw_tokens(2, (4, 4), "red", 1, options) for model in (copy, tiny_model)]
    assert torch.equal(*drawn)
    assert copy.weights_hash == tiny_model.weights_hash and copy.labels == tiny_model.labels
    assert copy.info()["gpt"] == tiny_model.info()["gpt"]


def test_no_pickle_is_ever_opened(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pickle was opened")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    pictures = ImageGPT.load(tiny_folder, "cpu").generate(1, size=16, seed=0, steps=2)
    assert pictures[0].size == (16, 16)


def test_a_pickle_beside_the_weights_is_not_even_read(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps("boo"))
    opened: list[str] = []
    original = builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: (opened.append(str(file)), original(file, *a, **k))[1])
    ImageGPT.load(folder, "cpu")
    assert not [name for name in opened if name.endswith((".bin", ".pt", ".pkl"))]


def test_a_model_that_is_only_a_pickle_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        checkpoint.load(tmp_path)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 99},
        {"tokenizer": {"kind": "jpeg"}},
        {"tokenizer": {"kind": "vq", "channels": [32], "codes": 8, "brushes": 4}},
        {"labels": 5},
        {"gpt": {"vocab_size": 32, "labels": 2, "heads": 0}},
        {"gpt": {"vocab_size": -1, "labels": 2}},
        {"tokenizer": {"kind": "vq", "channels": [], "codes": 8}},
        {"labels": ["only one"]},
        {"gpt": {"vocab_size": 32, "labels": 2, "layers": 3}},
        {"gpt": {"vocab_size": 32, "labels": 2, "layers": 2, "width": 64, "heads": 2}},
    ],
)
def test_a_config_that_does_not_fit_is_one_plain_sentence(
    changes: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    change_config(folder, **changes)
    with pytest.raises(UserError) as raised:
        ImageGPT.load(folder, "cpu")
    assert "\n" not in str(raised.value)


def test_weights_with_a_stranger_among_them_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"extra.weight": torch.zeros(1)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"extra\.weight"):
        checkpoint.load(folder)


def test_a_failed_save_leaves_the_model_that_was_there(
    tiny_model: ImageGPT, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        tiny_model.save(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in tiny_folder.iterdir())
    assert checkpoint.load(folder).weights_hash == tiny_model.weights_hash


def test_the_weights_of_the_codebook_are_kept_in_full(tiny_folder: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(tiny_folder / "model.safetensors")
    assert tensors["tokenizer.quantizer.codebook_KE"].dtype == torch.float32
    assert tensors["gpt.tokens.weight"].dtype == torch.bfloat16


def test_a_palette_model_draws_exactly_the_colours_of_its_palette(tmp_path: Path) -> None:
    from igpt.config import GPTConfig
    from igpt.model import GPT

    torch.manual_seed(0)
    tokenizer = PaletteTokenizer(PaletteConfig(("#102030", "#ffcc00", "#00ff7f")))
    ImageGPT(tokenizer, GPT(GPTConfig(3, 0, layers=2, width=32, heads=2, cells=64))).save(tmp_path / "pixels")
    picture = ImageGPT.load(tmp_path / "pixels", "cpu").generate(1, size=8, seed=0)[0]
    colours = {colour for _, colour in picture.getcolors() or []}
    assert colours <= {(16, 32, 48), (255, 204, 0), (0, 255, 127)} and len(colours) > 1


def test_every_model_in_the_box_loads_and_knows_where_it_comes_from() -> None:
    for name, folder in checkpoint.in_the_box().items():
        found = checkpoint.load(name)
        assert found.gpt is not None and found.provenance["pictures"] > 0
        assert (folder / "README.md").is_file()
        assert (folder / "model.safetensors").stat().st_size < 48e6
