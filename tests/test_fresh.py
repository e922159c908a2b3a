"""Views that are encoded on the device while the GPT learns from them: on the CPU, by the same code."""

from __future__ import annotations

import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.data import default_collate

from igpt.checkpoint import load
from igpt.model import to_cells
from tests.interrupts import press_ctrl_c
from tests.painting import art_folder
from tests.test_training import QUIET, SHORT, TOY, before_step, pictures_on_device, run_of, schedule, vq
from tokenizer_vq.base import UserError
from tokenizer_vq.images import to_tensor
from train.crops import sizes_on
from train.fresh import PART_STEPS, PARTS, USES, FreshTask
from train.gpt import new_gpt
from train.loop import run
from train.options import TrainOptions
from train.run import train
from train.tokens import encode

BATCH = 8
NOISY = replace(QUIET, dropout=0.2, token_noise=0.1)
PLAIN = replace(QUIET, dropout=0.0, token_noise=0.0)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"), size=(96, 48))


def fresh_task(art: Path, work: Path, options: TrainOptions) -> FreshTask:
    """With a tokenizer of random weights."""
    preset = replace(TOY, gpt_batch=BATCH)
    about = replace(run_of(art, options, preset), work=work)
    pictures, tokenizer = pictures_on_device(about.art, about.train, 38), vq()
    tokens = encode(replace(about, train=[]), tokenizer)
    return FreshTask(about, pictures, tokens, tokenizer, new_gpt(tokenizer, 2, preset, options))


def test_views_come_and_go_and_each_is_learned_from_about_as_often(art: Path, tmp_path: Path) -> None:
    windows = fresh_task(art, tmp_path, PLAIN).windows
    assert windows.samples == PART_STEPS * BATCH and windows.views == windows.samples // USES
    ring, used = PARTS * windows.views, Counter[int]()
    for part in range(PARTS, 3 * PARTS):
        there = windows.there(part)
        assert len(there) == ring and windows.there(part + 1).start - there.start == windows.views
        for k in range(part * windows.samples, (part + 1) * windows.samples):
            place = int(windows[k]["view"])
            used[next(number for number in there if number % ring == place)] += 1
    whole = [used[number] for number in range(PARTS * windows.views, 2 * PARTS * windows.views)]  # that came and went
    assert USES * 0.9 < sum(whole) / len(whole) < USES * 1.1 and max(whole) <= 4 * USES
    assert windows.there(0) == range(windows.views) and torch.equal(windows[77]["order"], windows[77]["order"])


def test_views_are_squares_and_whole_pictures_mirrored_and_not_of_all_pictures_alike(art: Path, tmp_path: Path) -> None:
    windows = fresh_task(art, tmp_path, PLAIN).windows
    views = [windows.view(number) for number in range(600)]
    assert len(set(views)) == len(views) and windows.view(5) == windows.view(5)
    assert set(Counter(view.picture for view in views).values()) == {100}, "all equally often"
    shapes = Counter(view.grid for view in views)
    assert shapes.keys() == {(4, 4), (2, 4)} and 0.5 < shapes[4, 4] / len(views) < 0.7
    boxes = torch.tensor([view.box for view in views])
    assert float(boxes.min()) >= 0 and float(boxes.max()) <= 1
    assert 0.4 < float((boxes[:, 0] > boxes[:, 2]).float().mean()) < 0.6


def test_a_view_has_the_pixels_of_its_box_and_becomes_the_tokens_of_these(art: Path, tmp_path: Path) -> None:
    task, same = fresh_task(art, tmp_path, replace(PLAIN, precision="fp32")), []
    cells_VLn, run = task.encoded(range(40, 60)), task.windows.run
    for number in range(20):
        view = task.windows.view(40 + number)
        (h, w), (left, top, right, bottom) = view.grid, view.box
        fine = 1 if h == w else 2
        cut_1CHW = task.pictures.cut(torch.tensor([[view.picture, *view.box]]), 8 * h * fine, 8 * w * fine)
        cut_1CHW = F.avg_pool2d(cut_1CHW, fine)
        picture = run.art.picture(run.train[view.picture])
        (across, down), (left, right) = picture.size, sorted((left, right))
        box = (across * left, down * top, across * right, down * bottom)
        wanted = picture.resize((8 * w, 8 * h), Image.Resampling.BOX, box)
        wanted = ImageOps.mirror(wanted) if view.box[0] > view.box[2] else wanted
        assert float((cut_1CHW[0] - to_tensor(wanted)).abs().mean()) < 0.03
        with torch.inference_mode():
            tokens_1hw = task.tokenizer.encode(cut_1CHW)
        cells_Ln = to_cells(tokens_1hw, 2)[0]
        same.append((cells_VLn[number, : len(cells_Ln)] == cells_Ln).float().mean())
    assert float(torch.stack(same).mean()) > 0.95, "in another batch, sums may round otherwise"


def test_each_token_is_paired_with_its_own_cell(art: Path, tmp_path: Path) -> None:
    """Tokens that say where they lie; small grids are padded with what is not asked for."""
    task = fresh_task(art, tmp_path, PLAIN)
    task.filled, places_L = task.windows.there(0), torch.arange(4)
    numbers_V = torch.arange(len(task.ring_VLn)).view(-1, 1, 1)
    task.ring_VLn = (100 * numbers_V + places_L.view(1, 4, 1)).expand(-1, -1, 4)
    samples = [task.dataset[k] for k in range(24)]
    batch = task.prepare(default_collate(samples), 0)
    for i, sample in enumerate(samples):
        rows, columns = (side // 2 for side in task.windows.view(int(sample["view"])).grid)
        count = rows * columns
        places = (batch["positions"][i, :count] + torch.tensor([(rows - 1) / 2, (columns - 1) / 2])).long()
        wanted = 100 * sample["view"] + places[:, 0] * columns + places[:, 1]
        assert torch.equal(batch["targets"][i, :count], wanted.unsqueeze(1).expand(-1, 4))
        assert bool((batch["targets"][i, count:] == -1).all()) and batch["targets"].shape == (24, 4, 4)
        assert torch.equal(batch["cells"][i, :count], batch["targets"][i, :count]), "no noise was asked for"
    assert {int((targets >= 0).sum()) for targets in batch["targets"]} == {8, 16}
    assert set(batch["label"].tolist()) == {0, 1, 2}, "red, blue, and none"


def test_noise_is_shown_and_never_asked_for(art: Path, tmp_path: Path) -> None:
    task = fresh_task(art, tmp_path, replace(QUIET, token_noise=0.25))
    batch = task.prepare(default_collate([task.dataset[k] for k in range(100)]), 0)
    plain = fresh_task(art, tmp_path, PLAIN)
    without = plain.prepare(default_collate([plain.dataset[k] for k in range(100)]), 0)
    assert torch.equal(batch["targets"], without["targets"])
    asked = batch["targets"] >= 0
    assert 0.2 < float((batch["cells"] != batch["targets"])[asked].float().mean()) < 0.3


@pytest.mark.slow
def test_a_run_stopped_in_a_later_part_goes_on_to_bit_equal_weights(art: Path, tmp_path: Path) -> None:
    steps, weights = 2 * PART_STEPS + 4, []
    for stopped_at in (None, 2 * PART_STEPS + 1):
        folder = tmp_path / str(stopped_at)

        def task(folder: Path = folder) -> Any:
            return fresh_task(art, folder, NOISY)

        about = schedule(steps, batch=BATCH, evaluations=1)
        if stopped_at:
            with pytest.raises(KeyboardInterrupt):
                run(before_step(task(), steps, stopped_at, press_ctrl_c), about, folder)
        run(task(), about, folder)
        weights.append(load_file(folder / "gpt-state.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_training_with_pictures_on_the_device_makes_a_model(
    art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`igpt train` as with CUDA: the GPT learns from views that no token shard has. Where there is no room for pictures
    any more it does not go on with others; where room is found later it goes on as it began."""
    train(art, tmp_path / "without", SHORT)
    with monkeypatch.context() as patch:
        patch.setattr("train.run.sizes_on", lambda *about: sizes_on(*about, room=1e9))
        found = load(train(art, tmp_path / "model", SHORT))
        train(art, tmp_path / "without", SHORT)
    with pytest.raises(UserError, match="started with fresh-views True, now it is False"):
        train(art, tmp_path / "model", SHORT)
    (index,) = (tmp_path / "model" / "training" / "tokens").glob("index.json")
    assert '"counts": [[0, 1]]' in index.read_text(), "only what is held out is encoded beforehand"
    assert found.provenance["gpt"]["samples"] == 64 and found.provenance["gpt"]["bits"] > 0
