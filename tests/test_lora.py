"""Low-rank layers and adapters: they start as nothing, merge exactly, are small, and know their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import igpt
from igpt.checkpoint import ADAPTER, Checkpoint, load
from igpt.config import GPTConfig
from igpt.image_gpt import ImageGPT
from igpt.lora import LowRank, add_low_rank, largest_rank, merged, save_adapter, with_adapter, with_labels
from igpt.model import GPT, cell_positions
from tokenizer_vq.base import UserError


def logits(gpt: GPT, label: int) -> torch.Tensor:
    tokens_BL = torch.arange(16).view(1, 16) % gpt.config.vocab_size
    with torch.no_grad():
        return gpt.eval()(tokens_BL, cell_positions(4, 4, True).expand(1, -1, -1), torch.tensor([label]))


@pytest.fixture
def base(tiny_folder: Path) -> Checkpoint:
    return load(tiny_folder)


def changed(base: Checkpoint) -> GPT:
    """The base with a third label and low-rank layers that were moved."""
    assert base.gpt is not None
    torch.manual_seed(1)
    gpt = with_labels(base.gpt, torch.randn(1, 32) * 0.1)
    add_low_rank(gpt, 4)
    for layer in gpt.modules():
        if isinstance(layer, LowRank):
            torch.nn.init.normal_(layer.up, std=0.1)
    return gpt


def test_new_labels_leave_the_old_ones_and_no_label_as_they_were(base: Checkpoint) -> None:
    assert base.gpt is not None
    wider = with_labels(base.gpt, base.gpt.labels.weight[[1, 1]])
    assert wider.config.labels == 4
    for old, new in ((0, 0), (1, 1), (2, 4), (1, 2), (1, 3)):
        assert torch.equal(logits(base.gpt, old), logits(wider, new))


def test_low_rank_layers_change_nothing_until_they_learn_and_then_merge_exactly(base: Checkpoint) -> None:
    assert base.gpt is not None
    gpt = with_labels(base.gpt, base.gpt.labels.weight[:0])
    add_low_rank(gpt, 4)
    assert torch.equal(logits(gpt, 0), logits(base.gpt, 0))
    learning = {name.rsplit(".", 1)[1] for name, p in gpt.named_parameters() if p.requires_grad}
    assert learning == {"down", "up", "weight"} and gpt.labels.weight.requires_grad
    assert not any(p.requires_grad for name, p in gpt.named_parameters() if ".base." in name)
    moved = changed(base)
    plain = merged(moved)
    assert plain.state_dict().keys() == base.gpt.state_dict().keys()
    assert torch.allclose(logits(plain, 2), logits(moved, 2), atol=1e-4)
    assert not torch.allclose(logits(plain, 0), logits(base.gpt, 0), atol=1e-2)


def test_an_adapter_brings_the_change_and_the_labels_to_its_base(
    base: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    gpt = changed(base)
    save_adapter(tmp_path / "green.safetensors", gpt, ["red", "blue", "green"], "tiny", base.weights_hash, {"a": 1})
    model = igpt.load(tiny_folder, "cpu", adapter=tmp_path / "green.safetensors")
    assert (model.labels, model.name, model.provenance) == (["red", "blue", "green"], "green", {"a": 1})
    assert torch.allclose(logits(model.gpt, 2), logits(gpt, 2), rtol=0.005, atol=0.02)
    assert len(model.weights_hash) == 64 and model.weights_hash != base.weights_hash
    assert model.generate(size=16, label="green", seed=1)[0].size == (16, 16)
    with safe_open(tmp_path / "green.safetensors", "pt") as file:
        assert base.weights_hash in file.metadata()["igpt-adapter"]


def test_an_adapter_refuses_another_base_and_damage(
    base: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a.safetensors", changed(base), ["red", "blue", "green"], "tiny", base.weights_hash, {})
    other = ImageGPT.load(tiny_folder, "cpu")
    with torch.no_grad():
        other.gpt.query.add_(1)
    other.save(tmp_path / "other")

    def refused(adapter: Path, model: Path, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            igpt.load(model, "cpu", adapter=adapter)

    owner = f"belongs to the model 'tiny' with.*{base.weights_hash[:12]}"
    refused(tmp_path / "a.safetensors", tmp_path / "other", owner)
    refused(tmp_path / "missing.safetensors", tiny_folder, "there is no adapter")
    refused(tiny_folder / "model.safetensors", tiny_folder, "is no adapter")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-100])
    refused(tmp_path / "cut.safetensors", tiny_folder, "is no adapter")
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.safetensors").rename(tmp_path / "folder" / ADAPTER)
    with pytest.raises(UserError, match=r"holds an adapter: --model BASE --adapter .*folder"):
        igpt.load(tmp_path / "folder", "cpu")
    assert igpt.load(tiny_folder, "cpu", adapter=tmp_path / "folder" / ADAPTER).name == "folder"


def test_an_adapter_with_another_shape_than_its_base_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    wide = GPT(GPTConfig(vocab_size=32, labels=2, layers=2, width=64, heads=2, cells=16))
    add_low_rank(wide, 2)
    save_adapter(tmp_path / "a.safetensors", wide, ["red", "blue"], "tiny", base.weights_hash, {})
    with pytest.raises(UserError, match="does not fit"):
        with_adapter(base, tmp_path / "a.safetensors")


def test_the_largest_rank_for_the_model_in_the_box_makes_a_file_of_at_most_4_mb(tmp_path: Path) -> None:
    gpt = GPT(GPTConfig(vocab_size=4096, labels=40, layers=8, width=256, heads=4))
    rank = largest_rank(gpt)
    assert rank >= 32
    add_low_rank(gpt, rank)
    path = tmp_path / "a.safetensors"
    save_adapter(path, gpt, ["x"] * 40, "paintings", "0" * 64, {})
    assert path.stat().st_size <= 4_000_000
    add_low_rank_again = GPT(gpt.config)
    add_low_rank(add_low_rank_again, 2 * rank)
    with pytest.raises(UserError, match="more than 4"):
        save_adapter(path, add_low_rank_again, [], "paintings", "0" * 64, {})
    assert path.stat().st_size > 1_000_000, "the one from before is still there"


@pytest.mark.parametrize("command", ["generate", "info", "vary"])
def test_commands_take_an_adapter(
    command: str, base: Checkpoint, tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from igpt.cli import main

    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "g.safetensors", changed(base), ["red", "blue", "green"], "tiny", base.weights_hash, {})
    Image.radial_gradient("L").resize((32, 32)).save("cat.png")
    words = {
        "generate": ["--model", str(tiny_folder), "--label", "green", "--size", "16", "--seed", "1"],
        "info": [str(tiny_folder)],
        "vary": ["cat.png", "--model", str(tiny_folder), "--label", "green", "--seed", "1", "--steps", "2"],
    }[command]
    assert main([command, *words, "--adapter", "g.safetensors"]) == 0
    assert "green" in capsys.readouterr().out or command == "vary"
