"""Learning: it can overfit, it can be killed and go on bit for bit, and its data are pure functions of a number."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import igpt
from igpt.checkpoint import load
from igpt.config import GPTConfig
from igpt.sizes import Grids
from igpt.token_cache import TokenCache, TokenWindows, window
from tests.painting import art_folder
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder, Crops, shuffled
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.decoder import DecoderStage
from train.gpt import GPTStage, new_gpt
from train.loop import Schedule, average, rate, run
from train.options import Preset, TrainOptions
from train.run import train
from train.state import peek
from train.tokenizer import TokenizerStage

TOY = Preset(64, 16, 64, layers=2, width=64, heads=2, channels=(32, 64), codes=32, crop=32, cells=4)
QUIET = TrainOptions(quiet=True, adversarial=0.0, views=2, perceptual="none")
SHORT = replace(QUIET, preset="toy", tokenizer_crops=32, decoder_crops=16, gpt_samples=64, codes=32, views=1)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"))


def schedule(steps: int, **changes: Any) -> Schedule:
    defaults: dict[str, Any] = {"save_seconds": 0.0, "patience": 99, "seed": 0, "precision": "no", "quiet": True}
    return Schedule(steps, batch=8, **(defaults | changes))


# It learns


def test_overfitting_eight_painted_pictures_drives_the_error_near_zero(art: Path, tmp_path: Path) -> None:
    collection = ArtFolder(art)
    everything = list(range(len(collection)))
    options = TrainOptions(quiet=True, adversarial=0.0, flip=False, tokenizer_lr=4e-3, perceptual="none")
    preset = Preset(0, 0, 0, 2, 64, 2, channels=(32,), downsample=4, codes=64, crop=32, cells=16)
    stage = TokenizerStage(collection, everything, everything, preset, options)
    before = stage.measure(stage.modules["model"].eval())
    model = run(stage, schedule(150, looks=1), tmp_path, {})
    after = stage.measure(model)
    assert before["psnr"] < 12 and after["psnr"] > 22, (before, after)
    assert after["codes_used"] > 0.3


def test_overfitting_eight_grids_drives_the_gpts_loss_near_zero(tmp_path: Path) -> None:
    options = TrainOptions(quiet=True, dropout=0.0, token_noise=0.0, gpt_lr=4e-3)
    stage = gpt_stage(pictures=8, options=options, shapes=((4, 4),))
    model = run(stage, schedule(150, looks=1), tmp_path, {})
    bits = stage.measure(model)
    # Five bits a token to start with. Which of the four pictures of its label it is costs 2 bits in 16 tokens: 0.12.
    assert bits["bits_random"] < 0.5 and bits["bits_raster"] < 0.5, bits


SHAPES = ((4, 4), (2, 7), (5, 3), (4, 6))


def gpt_stage(
    pictures: int = 6,
    options: TrainOptions = QUIET,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    preset: Preset = TOY,
) -> GPTStage:
    """On grids of random tokens."""
    generator = torch.Generator().manual_seed(0)
    chosen = [shapes[i % len(shapes)] for i in range(pictures)]
    grids = [torch.randint(32, (h * w,), generator=generator).to(torch.uint16) for h, w in chosen]
    cache = TokenCache(1, [i % 2 for i in range(pictures)], chosen, grids)

    class Painter:
        vocab_size, downsample, kind = 32, 8, "vq"

        def parameters(self) -> Iterator[torch.Tensor]:
            return iter(())

        def decode(self, tokens_Bhw: torch.Tensor) -> torch.Tensor:
            return tokens_Bhw.float().unsqueeze(1).expand(-1, 3, -1, -1) / 16 - 1

    everything = list(range(pictures))
    model = new_gpt(Painter(), 2, preset, options)  # type: ignore[arg-type]
    return GPTStage(cache, Painter(), ["red", "blue"], everything, everything, model, options, options.gpt_lr)  # type: ignore[arg-type]


# It can be killed


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["tokenizer", "decoder", "gpt"])
def test_a_run_killed_at_a_random_step_goes_on_to_bit_equal_weights(
    kind: str, art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stage() -> Any:
        if kind == "gpt":
            return gpt_stage(options=TrainOptions(quiet=True, dropout=0.2, token_noise=0.1))
        collection, options = ArtFolder(art), TrainOptions(quiet=True, adversarial=0.5, perceptual="none")
        if kind == "tokenizer":
            return TokenizerStage(collection, list(range(6)), [6, 7], TOY, options)
        torch.manual_seed(0)
        tokenizer = VQTokenizer(VQConfig(channels=TOY.channels, codes=TOY.codes))
        return DecoderStage(collection, list(range(6)), [6, 7], TOY, options, tokenizer)

    steps, save_at, kill_at = 8, 3, random.Random(kind).randrange(4, 8)
    whole = run(stage(), schedule(steps), tmp_path / "whole", {})

    import train.loop

    original = train.loop._Training.update
    saves = train.loop._Training.save

    def update(self: Any, batch: Any) -> Any:
        if self.step == kill_at:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(train.loop._Training, "update", update)
    monkeypatch.setattr(train.loop._Training, "save", lambda self: saves(self) if self.step == save_at else None)
    with pytest.raises(Killed):
        run(stage(), schedule(steps), tmp_path / "killed", {})
    monkeypatch.undo()
    resumed = run(stage(), schedule(steps), tmp_path / "killed", {})
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [load_file(tmp_path / which / f"{kind}-state.safetensors") for which in ("whole", "killed")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_ctrl_c_saves_the_training_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train.loop

    original, handler = train.loop._Training.update, signal.getsignal(signal.SIGINT)

    def update(self: Any, batch: Any) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch)

    whole = run(gpt_stage(), schedule(6), tmp_path / "whole", {})
    monkeypatch.setattr(train.loop._Training, "update", update)
    with pytest.raises(KeyboardInterrupt):
        run(gpt_stage(), schedule(6, save_seconds=999, quiet=False), tmp_path / "stopped", {})
    assert "stopped at step 4 of 6" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    resumed = run(gpt_stage(), schedule(6), tmp_path / "stopped", {})
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_damaged_state_is_named_and_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "gpt-state.safetensors").write_bytes(b"not a state")
    with pytest.raises(UserError, match="gpt-state"):
        run(gpt_stage(), schedule(2), tmp_path, {})


def test_training_stops_early_when_held_out_pictures_get_worse_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, scores = gpt_stage(), iter([3.0, 1.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(stage, "measure", lambda model: {"score": next(scores)})
    run(stage, schedule(500, patience=2, save_seconds=999), tmp_path, {})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines if "score" in line] == [3.0, 1.0, 2.0, 2.0]
    assert peek(tmp_path / "gpt-best.safetensors")["step"] == "50"  # the weights of the best score, not the last


# The whole way


def test_igpt_train_makes_a_model_that_draws_and_goes_on_when_called_again(art: Path, tmp_path: Path) -> None:
    options = replace(SHORT, views=2)
    out = train(None, art, tmp_path / "model", options)
    model = igpt.load(out, device="cpu")
    assert model.labels == ["blue", "red"] and model.grids == Grids(downsample=4, cell=2, cells=16)
    assert model.generate(2, size=(50, 40), label="red", seed=1)[1].size == (50, 40)
    assert "igpt" in (out / "README.md").read_text() and (out / "training" / "metrics.jsonl").is_file()
    shown = 32  # pixels a side of each of the held-out pictures on the sheet of originals and reconstructions
    with Image.open(out / "training" / "reconstructions.png") as sheet:
        assert sheet.height == 2 * shown and sheet.width % shown == 0
    before = model.weights_hash
    train(None, art, tmp_path / "model", options)  # nothing is left to do
    assert load(out).weights_hash == before
    with pytest.raises(UserError, match="seed 0, now it is 1"):
        train(None, art, tmp_path / "model", replace(options, seed=1))


@pytest.mark.parametrize("presses", [1, 2])  # the second does not wait for a state to be saved
def test_ctrl_c_leaves_the_model_so_far_and_the_same_command_goes_on(
    presses: int, art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SHORT, gpt_samples=30 * 16)  # it looks at itself after 25 steps
    with monkeypatch.context() as patch:
        patch.setattr(GPTStage, "worries", lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(presses)])
        with pytest.raises(KeyboardInterrupt):
            train(None, art, tmp_path / "model", options)
    assert (tmp_path / "model/training/gpt-state.safetensors").is_file() == (presses == 1)
    half = igpt.load(tmp_path / "model", device="cpu")
    assert half.generate(size=32, label="red", seed=1)[0].size == (32, 32)
    assert half.provenance["gpt"]["samples"] == 25 * 16
    train(None, art, tmp_path / "model", options)
    assert load(tmp_path / "model").provenance["gpt"]["samples"] == 30 * 16


def test_the_gpt_stage_can_take_the_tokenizer_of_another_model(art: Path, tmp_path: Path) -> None:
    first = train("tokenizer", art, tmp_path / "first", SHORT)
    with pytest.raises(UserError, match="no GPT yet"):
        igpt.load(first, device="cpu")
    second = train("gpt", art, tmp_path / "second", replace(SHORT, tokenizer=str(first)))
    told = load(second).provenance["tokenizer"]
    assert told["from"] == "first" and told["command"] == load(first).provenance["command"]
    assert told["command"] in (second / "README.md").read_text()
    codebooks = [load(folder).tokenizer.state_dict()["quantizer.codebook_KE"] for folder in (first, second)]
    assert torch.equal(*codebooks)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"preset": "huge"}, "huge"), ({"gpt_samples": 0}, "samples 0"), ({"dropout": 1.5}, "1.5"),
        ({"views": 0}, "0"), ({"seed": -1}, "seed"), ({"gpt_lr": 0.0}, "gpt-lr"), ({"patience": 0}, "patience"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TrainOptions(**change).resolved()


def test_a_folder_that_holds_something_else_is_not_trained_into(art: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        train(None, art, tmp_path, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# Its data


def test_samples_are_pure_functions_of_their_number(art: Path) -> None:
    collection = ArtFolder(art)
    crops = [Crops(collection, [0, 3, 5], 32, 7, (1.0, 1.5), True) for _ in range(2)]
    assert torch.equal(crops[0][11], crops[1][11]) and not torch.equal(crops[0][11], crops[0][12])
    a, b = gpt_stage().dataset, gpt_stage().dataset
    assert all(torch.equal(a[5][key], b[5][key]) for key in a[5])


def test_every_pass_sees_every_picture_once_in_another_order() -> None:
    passes = [[shuffled(50, epoch * 50 + i, seed=1) for i in range(50)] for epoch in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == list(range(50)) and passes[0] != passes[1]


def test_windows_of_large_grids_are_connected_parts_of_at_most_the_native_cells() -> None:
    rng, config = random.Random(0), GPTConfig(9999, 0, cells=16)
    for h, w in ((8, 8), (8, 19), (18, 8), (15, 14), (4, 40), (41, 4), (2, 3)):
        grid_hw = torch.arange(h * w).view(h, w)
        part_hw = window(grid_hw, config, rng)
        rows, columns = part_hw.shape
        assert rows % 2 == columns % 2 == 0, "whole cells"
        assert min((h // 2) * (w // 2), 16) * 3 // 4 <= rows * columns // 4 <= 16
        top, left = divmod(int(part_hw[0, 0]), w)
        assert torch.equal(part_hw, grid_hw[top : top + part_hw.shape[0], left : left + part_hw.shape[1]])


def test_a_grid_without_a_whole_cell_is_the_users_error() -> None:
    with pytest.raises(UserError, match="1x9 tokens has no cell of 2 a side"):
        window(torch.zeros(1, 9, dtype=torch.long), GPTConfig(32, 0, cells=16), random.Random(0))


def test_a_training_sample_pairs_each_token_with_its_own_cell() -> None:
    """Tokens that say where they lie: after shuffling, the position of each cell must be the one its tokens say."""
    grid = torch.arange(60).to(torch.uint16)
    cache = TokenCache(1, [1], [(6, 10)], [grid])
    windows = TokenWindows(cache, [0], GPTConfig(64, 2, cells=16), 0, random_orders=1.0)
    sample = windows[3]
    targets_Ln = sample["targets"][:15]
    assert sample["targets"][15].tolist() == [-1] * 4 and sorted(targets_Ln.flatten().tolist()) == list(range(60))
    assert torch.equal(sample["cells"][:15], targets_Ln), "no noise was asked for"
    assert targets_Ln[:, 0].tolist() != sorted(targets_Ln[:, 0].tolist())
    rows, columns = (sample["positions"][:15] + torch.tensor([1, 2])).long().unbind(1)  # the middle cell lies at 0, 0
    for token, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert torch.equal((2 * rows + y) * 10 + 2 * columns + x, targets_Ln[:, token])


def test_noise_is_shown_and_never_asked_for() -> None:
    cache = TokenCache(1, [0], [(8, 8)], [torch.zeros(64, dtype=torch.uint16)])
    windows = TokenWindows(cache, [0], GPTConfig(64, 1, cells=16), 0, random_orders=1.0, noise=0.25)
    samples = [windows[k] for k in range(20)]
    share = float(torch.stack([sample["cells"] for sample in samples]).ne(0).float().mean())
    assert 0.18 < share < 0.32 and not any(sample["targets"].any() for sample in samples)


def test_the_schedule_warms_up_and_comes_down() -> None:
    rates = [rate(i / 100) for i in range(101)]
    assert rates[0] < 0.01 and max(rates) == pytest.approx(1, abs=0.01) and rates[100] == pytest.approx(0.02)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_averaged_weights_follow_the_model_at_once_and_slowly_later() -> None:
    model, averaged = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    torch.nn.init.zeros_(averaged.weight)
    average(averaged, model, step=0)
    assert float(averaged.weight.detach()) == pytest.approx(0.9)
    torch.nn.init.zeros_(averaged.weight)
    average(averaged, model, step=10**6)
    assert float(averaged.weight.detach()) == pytest.approx(0.001)
