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
from safetensors.torch import load_file, save_file

import igpt
from igpt import checkpoint
from igpt.config import GPTConfig, SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from tokenizer_vq.base import UserError
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer

DATA = Path(__file__).parent / "data"
PALETTE = PaletteTokenizer(PaletteConfig(("#000000", "#ffffff", "#d03030", "#30a030", "#3040d0", "#f0d040")))


def test_a_saved_model_draws_what_it_drew_before(tiny_model: ImageGPT, tmp_path: Path) -> None:
    tiny_model.save(tmp_path / "copy")
    copy = ImageGPT.load(tmp_path / "copy", "cpu")
    options = SamplingOptions(steps=4)
    drawn = [model.generate(2, label="red", seed=1, options=options) for model in (copy, tiny_model)]
    assert [picture.tobytes() for picture in drawn[0]] == [picture.tobytes() for picture in drawn[1]]
    assert copy.weights_hash == tiny_model.weights_hash and copy.labels == tiny_model.labels
    assert copy.gpt.config == tiny_model.gpt.config


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
        {"gpt": {"vocab_size": 32, "labels": 2, "layers": 2, "width": 32, "heads": 2, "cell": 3}},
        {"gpt": {"vocab_size": 32, "labels": 2, "layers": 2, "width": 32, "heads": 2, "cell": 0}},
        {"gpt": {"vocab_size": 32, "labels": 2, "layers": 2, "width": 32, "heads": 2, "native_cells": 16}},
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


def test_a_cell_that_does_not_divide_the_width_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    change_config(folder, gpt=json.loads((folder / "config.json").read_text())["gpt"] | {"cell": 3})
    with pytest.raises(UserError, match="a cell of 3x3 tokens does not divide a width of 32"):
        checkpoint.load(folder)


def test_a_model_of_the_format_before_is_refused_in_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    change_config(folder, format=2)
    with pytest.raises(UserError, match="is of format 2, this igpt reads format 3: train the model anew") as raised:
        ImageGPT.load(folder, "cpu")
    assert "\n" not in str(raised.value)


# int8 rows


def test_matrices_of_the_gpt_are_kept_as_int8_rows_the_codebook_in_full_and_the_rest_in_bfloat16(
    tiny_folder: Path,
) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    found = checkpoint.load(tiny_folder)
    matrices = {f"gpt.{name}.weight" for name, part in found.gpt.named_modules() if hasattr(part, "weight")}
    matrices = {name for name in matrices if tensors[name].dim() == 2}
    assert {"gpt.head.weight", "gpt.tokens.weight", "gpt.labels.weight", "gpt.before.weight"} < matrices
    for name, value in tensors.items():
        if name in matrices:
            scale = tensors[f"{name}.scale"]
            assert value.dtype == torch.int8 and int(value.min()) >= -127
            assert scale.dtype == torch.float32 and scale.shape == value.shape[:1] and bool((scale > 0).all())
        elif name.endswith(".scale"):
            assert name.removesuffix(".scale") in matrices
        else:
            assert value.dtype == (torch.float32 if "quantizer" in name else torch.bfloat16), name
    assert tensors["tokenizer.quantizer.codebook_KE"].dtype == torch.float32


def test_int8_rows_are_near_to_what_was_saved_each_by_its_own_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(6, 2, layers=2, width=32, heads=2, head_layers=1, cells=16))
    with torch.no_grad():
        gpt.tokens.weight.normal_().mul_(torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 0.0])[:, None])
    wanted = {name: value.clone() for name, value in gpt.state_dict().items()}
    checkpoint.save(tmp_path, PALETTE, gpt, ["red", "blue"], {})
    found = checkpoint.load(tmp_path).gpt
    assert found is not None
    for name, value in found.state_dict().items():
        assert value.dtype == torch.float32
        if value.dim() == 2 and name.endswith(".weight"):
            largest = wanted[name].abs().amax(1, keepdim=True)
            assert bool(((value - wanted[name]).abs() <= largest / 253).all()), name  # half a step of 127
        else:
            assert torch.allclose(value, wanted[name], rtol=2**-8, atol=0), name


def test_what_is_loaded_and_saved_again_has_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    hashes = {checkpoint.load(tiny_folder).weights_hash}
    folder = tiny_folder
    for number in range(2):
        ImageGPT.load(folder, "cpu").save(tmp_path / str(number))
        folder = tmp_path / str(number)
        hashes.add(checkpoint.load(folder).weights_hash)
        assert (folder / "model.safetensors").read_bytes() == (tiny_folder / "model.safetensors").read_bytes()
    assert len(hashes) == 1
    pixels = igpt.load("pixels", "cpu")
    pixels.save(tmp_path / "pixels")
    assert checkpoint.load(tmp_path / "pixels").weights_hash == pixels.weights_hash


ROWS, SCALES = "gpt.shared_kv.weight", "gpt.shared_kv.weight.scale"


SPOILT = {
    "a scale is missing": lambda rows, scale: (rows, None),
    "a scale without rows": lambda rows, scale: (None, scale),
    "a scale beside what is no int8": lambda rows, scale: (rows.float(), scale),
    "scales of another length": lambda rows, scale: (rows, scale[:-1]),
    "scales of another shape": lambda rows, scale: (rows, scale[:, None]),
    "whole numbers for scales": lambda rows, scale: (rows, torch.ones_like(scale, dtype=torch.int32)),
    "int8 rows that are no matrix": lambda rows, scale: (rows[:, 0].contiguous(), scale),
    "NaN": lambda rows, scale: (rows, scale * torch.nan),
    "infinite": lambda rows, scale: (rows, scale / 0),
    "zero": lambda rows, scale: (rows, scale * 0),
    "negative": lambda rows, scale: (rows, -scale),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_scales_are_refused_in_one_sentence_that_names_them(how: str, tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    changed = dict(zip((ROWS, SCALES), SPOILT[how](tensors[ROWS], tensors[SCALES]), strict=True))
    kept = {name: value for name, value in (tensors | changed).items() if value is not None}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(UserError, match=ROWS.replace(".", r"\.")) as raised:
        checkpoint.load(folder)
    assert "\n" not in str(raised.value)


# Whole or not at all


def test_weights_with_a_stranger_among_them_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
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


def test_names_of_files_that_are_no_text_do_not_keep_a_model_from_being_saved(
    tiny_model: ImageGPT, tmp_path: Path
) -> None:
    parts = tiny_model.tokenizer, tiny_model.gpt, tiny_model.labels
    checkpoint.save(tmp_path, *parts, {"command": "igpt train caf\udce9 絵"}, "# caf\udce9\n")
    assert checkpoint.load(tmp_path).provenance == {"command": "igpt train caf? 絵"}
    assert (tmp_path / "README.md").read_bytes() == b"# caf?\n"


def test_a_palette_model_draws_exactly_the_colours_of_its_palette(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = PaletteTokenizer(PaletteConfig(("#102030", "#ffcc00", "#00ff7f")))
    ImageGPT(tokenizer, GPT(GPTConfig(3, 0, layers=2, width=32, heads=2, cells=64))).save(tmp_path / "pixels")
    picture = ImageGPT.load(tmp_path / "pixels", "cpu").generate(1, size=8, seed=0)[0]
    colours = {colour for _, colour in picture.convert("RGB").getcolors() or []}
    assert colours <= {(16, 32, 48), (255, 204, 0), (0, 255, 127)} and len(colours) > 1


# The box


def test_both_models_in_the_box_load_by_their_names() -> None:
    boxed = checkpoint.in_the_box()
    assert list(boxed) == ["paintings", "pixels"]
    for name, kind, native, labels in (("paintings", "vq", (256, 256), 67), ("pixels", "palette", (32, 32), 21)):
        model = igpt.load(name, "cpu")
        assert model.name == name and model.tokenizer.kind == kind
        assert model.grids.native_size == native and len(model.labels) == labels
    assert igpt.load(device="cpu").name == "paintings"


def test_the_box_is_small() -> None:
    names = "config.json", "model.safetensors"
    files = [folder / name for folder in checkpoint.in_the_box().values() for name in names]
    assert sum(file.stat().st_size for file in files) <= 85e6


@pytest.mark.parametrize("name", ["paintings", "pixels"])
def test_the_weights_in_the_box_are_int8_rows_times_their_scales(name: str) -> None:
    tensors, found = load_file(checkpoint.in_the_box()[name] / "model.safetensors"), checkpoint.load(name)
    rows = 0
    for key, value in found.gpt.state_dict().items():
        stored = tensors[f"gpt.{key}"]
        if stored.dtype == torch.int8:
            rows += len(stored)
            assert torch.equal(value, stored * tensors[f"gpt.{key}.scale"][:, None]), key
        else:
            assert torch.equal(value, stored.float()), key
    assert rows > 10_000


def test_the_tokenizer_in_the_box_paints_what_it_painted_when_it_was_trained() -> None:
    told = load_file(DATA / "paintings.safetensors")
    with torch.inference_mode():
        painted_B3HW = checkpoint.load("paintings").tokenizer.decode(told["grid_BHW"].long())
    assert float((painted_B3HW - told["decoded_B3HW"].float()).abs().max()) < 2e-3


@pytest.mark.parametrize("name", ["paintings", "pixels"])
def test_every_model_in_the_box_knows_where_it_comes_from(name: str) -> None:
    assert checkpoint.load(name).provenance["pictures"] > 0
    assert (checkpoint.in_the_box()[name] / "README.md").is_file()
