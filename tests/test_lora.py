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
from igpt.lora import LoRALinear, apply_lora, largest_rank, merge_lora, save_adapter, with_adapter, with_labels
from igpt.model import GPT, cell_positions
from tokenizer_vq.base import UserError

LABELS = ["red", "blue", "green"]


def logits(gpt: GPT, label: int) -> torch.Tensor:
    cells_BLn = (torch.arange(16).view(1, 4, 4) * 7) % gpt.config.vocab_size
    with torch.no_grad():
        return gpt.eval()(cells_BLn, cell_positions(2, 2).expand(1, -1, -1), torch.tensor([label]))


@pytest.fixture
def base(tiny_folder: Path) -> Checkpoint:
    return load(tiny_folder)


def changed(base: Checkpoint) -> GPT:
    """The base with a third label, low-rank layers and vectors that were moved."""
    gpt = apply_lora(with_labels(base.gpt, 1), 4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        gpt.slots.add_(0.1)
        for layer in gpt.modules():
            if isinstance(layer, LoRALinear):
                layer.up.normal_(std=0.1, generator=generator)
    return gpt


def test_new_labels_begin_as_the_mean_of_the_others_and_leave_these_as_they_were(base: Checkpoint) -> None:
    wider, table = with_labels(base.gpt, 2), base.gpt.labels.weight
    assert wider.config.labels == 4 and len(wider.labels.weight) == 5
    for old, new in ((0, 0), (1, 1), (2, 4)):
        assert torch.equal(logits(base.gpt, old), logits(wider, new))
    assert torch.allclose(wider.labels.weight[2:4], table[:2].mean(0))
    assert base.gpt.config.labels == 2 and len(table) == 3, "the base itself stays as it is"


def test_a_first_label_begins_as_no_label() -> None:
    gpt = GPT(GPTConfig(vocab_size=8, labels=0, layers=2, width=32, heads=2, cells=4))
    wider = with_labels(gpt, 1)
    assert torch.equal(wider.labels.weight, gpt.labels.weight.expand(2, -1))


def test_low_rank_layers_change_nothing_until_they_learn_and_then_merge_exactly(base: Checkpoint) -> None:
    gpt = apply_lora(with_labels(base.gpt, 0), 4)
    assert torch.equal(logits(gpt, 0), logits(base.gpt, 0))
    frozen = {name for name, parameter in gpt.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in gpt.named_parameters() if name.endswith(".base.weight")} | {"tokens.weight"}
    moved = changed(base)
    plain = merge_lora(moved)
    assert plain.state_dict().keys() == base.gpt.state_dict().keys()
    assert torch.allclose(logits(plain, 2), logits(moved, 2), atol=1e-4)
    assert not torch.allclose(logits(plain, 0), logits(base.gpt, 0), atol=1e-2)


def test_adding_layers_leaves_the_callers_random_numbers_alone(base: Checkpoint) -> None:
    before = torch.get_rng_state()
    apply_lora(with_labels(base.gpt, 1), 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_brings_the_change_and_the_labels_to_its_base(
    base: Checkpoint, tiny_folder: Path, tmp_path: Path
) -> None:
    gpt = changed(base)
    save_adapter(tmp_path / "green.safetensors", gpt, LABELS, ("tiny", base.weights_hash), {"a": 1})
    model = igpt.load(tiny_folder, "cpu", adapter=tmp_path / "green.safetensors")
    assert (model.labels, model.name, model.provenance) == (LABELS, "green", {"a": 1})
    assert torch.allclose(logits(model.gpt, 2), logits(gpt, 2), rtol=0.005, atol=0.02)
    assert len(model.weights_hash) == 64 and model.weights_hash != base.weights_hash
    assert model.generate(size=16, label="green", seed=1)[0].size == (16, 16)
    with safe_open(tmp_path / "green.safetensors", "pt") as file:
        assert base.weights_hash in file.metadata()["igpt-adapter"]


def test_an_adapter_refuses_another_base_and_damage(base: Checkpoint, tiny_folder: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "a.safetensors", changed(base), LABELS, ("tiny", base.weights_hash), {})
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
    wide = apply_lora(GPT(GPTConfig(vocab_size=32, labels=2, layers=2, width=64, heads=2, cells=16)), 2)
    save_adapter(tmp_path / "a.safetensors", wide, ["red", "blue"], ("tiny", base.weights_hash), {})
    with pytest.raises(UserError, match="does not fit"):
        with_adapter(base, tmp_path / "a.safetensors")


def test_the_largest_rank_for_the_shape_in_the_box_makes_a_file_of_at_most_4_mb(tmp_path: Path) -> None:
    config, base = GPTConfig(vocab_size=4096, labels=68), ("paintings", "0" * 64)
    rank = largest_rank(GPT(config))
    assert rank >= 15
    path = tmp_path / "a.safetensors"
    save_adapter(path, apply_lora(GPT(config), rank), ["a label of usual length"] * 68, base, {"about": "x" * 4000})
    assert 3_500_000 < path.stat().st_size <= 4_000_000
    with pytest.raises(UserError, match="more than 4; a smaller --rank"):
        save_adapter(path, apply_lora(GPT(config), 2 * rank), [], base, {})
    assert path.stat().st_size > 3_500_000, "the one from before is still there"


@pytest.mark.parametrize("command", ["generate", "info", "vary"])
def test_commands_take_an_adapter(
    command: str, base: Checkpoint, tiny_folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from igpt.cli import main

    monkeypatch.chdir(tmp_path)
    save_adapter(tmp_path / "g.safetensors", changed(base), LABELS, ("tiny", base.weights_hash), {})
    Image.radial_gradient("L").resize((32, 32)).save("cat.png")
    words = {
        "generate": ["--model", str(tiny_folder), "--label", "green", "--size", "16", "--seed", "1"],
        "info": [str(tiny_folder)],
        "vary": ["cat.png", "--model", str(tiny_folder), "--label", "green", "--seed", "1", "--steps", "2"],
    }[command]
    assert main([command, *words, "--adapter", "g.safetensors"]) == 0
    assert "green" in capsys.readouterr().out or command == "vary"
