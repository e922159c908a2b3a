"""Learning: it can overfit, it can be stopped and go on bit for bit, and its data are pure functions of a number."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import Dataset

import igpt
from igpt.checkpoint import load
from igpt.config import GPTConfig
from igpt.evaluation.perceptual import GradientSSIM
from igpt.sizes import Grids
from tests.interrupts import ctrl_c_once_there_is, press_ctrl_c
from tests.painting import art_folder
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder, Crops, shuffled
from tokenizer_vq.images import UnreadablePicture
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.crops import DevicePictures, sizes_on
from train.decoder import DecoderTask
from train.finetune import finetune
from train.folder import Run
from train.gpt import GPTTask, new_gpt
from train.loop import Schedule, Task, average, rate, run
from train.options import Preset, TrainOptions, TuneOptions
from train.run import train
from train.state import peek
from train.tokenizer import TokenizerTask
from train.tokens import TokenWindows, view_of, window

ROOT = Path(__file__).parent.parent
SIMPLE = GradientSSIM()
TOY = Preset(64, 16, 64, layers=2, width=64, heads=2, channels=(32, 64), codes=32, crop=32, cells=4)
QUIET = TrainOptions(quiet=True, tokens="vq", adversarial=0.0, views=2, perceptual="none")
SHORT = replace(QUIET, preset="toy", tokenizer_crops=32, decoder_crops=16, gpt_samples=64, codes=32, views=1)


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"))


def schedule(steps: int, options: TrainOptions | None = None, batch: int = 8, **changes: Any) -> Schedule:
    return Schedule(options or replace(QUIET, patience=99), steps, batch, **changes)


def run_of(art: Path, options: TrainOptions = QUIET, preset: Preset = TOY) -> Run[TrainOptions]:
    return Run(ArtFolder(art), list(range(6)), [6, 7], options, art, preset)


def pictures_on_device(art: ArtFolder, indices: Sequence[int], short: int) -> DevicePictures:
    """On the CPU, which takes part of a GPU."""
    sizes = sizes_on(torch.device("cpu"), art, indices, short, room=1e9)
    assert sizes
    return DevicePictures(art, indices, sizes, torch.device("cpu"))


def vq(codes: int = 32) -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQConfig(channels=TOY.channels, codes=codes))


class GivenTokens:
    """One view of each picture, in tokens that are given."""

    views = 1

    def __init__(self, grids: list[torch.Tensor], labels: list[int]):
        self.grids, self.labels = grids, labels

    def grid(self, picture: int, view: int) -> torch.Tensor:
        return self.grids[picture]

    def label(self, picture: int) -> int:
        return self.labels[picture]


def gpt_task(
    pictures: int = 6,
    options: TrainOptions = QUIET,
    shapes: tuple[tuple[int, int], ...] = ((4, 4), (2, 7), (5, 3), (4, 6)),
) -> GPTTask:
    """On grids of random tokens."""
    generator = torch.Generator().manual_seed(0)
    chosen = [shapes[i % len(shapes)] for i in range(pictures)]
    grids = [torch.randint(32, (h, w), generator=generator) for h, w in chosen]
    cache: Any = GivenTokens(grids, [i % 2 for i in range(pictures)])

    class Painter:
        vocab_size, downsample, kind = 32, 8, "vq"

        def parameters(self) -> Iterator[torch.Tensor]:
            return iter(())

        def decode(self, tokens_Bhw: torch.Tensor) -> torch.Tensor:
            return tokens_Bhw.float().unsqueeze(1).expand(-1, 3, -1, -1) / 16 - 1

    painter: Any = Painter()
    art: Any = None
    both = Run(art, list(range(pictures)), list(range(pictures)), options, Path())
    return GPTTask(both, cache, painter, new_gpt(painter, 2, TOY, options), options.gpt_lr)


def before_step(task: Task, steps: int, step: int, act: Callable[[], object]) -> Task:
    """The task, which does something else too when the loss of a step is wanted."""
    loss = task.loss

    def watched(batch: Any, progress: float, generator: torch.Generator) -> Any:
        if round(progress * steps) == step:
            act()
        return loss(batch, progress, generator)

    task.loss = watched  # type: ignore[method-assign]
    return task


def metrics_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# It learns


@pytest.mark.slow
def test_overfitting_eight_painted_pictures_drives_the_error_near_zero(art: Path, tmp_path: Path) -> None:
    options = replace(QUIET, flip=False, tokenizer_lr=4e-3)
    preset = replace(TOY, downsample=4, cells=16)
    torch.manual_seed(0)
    small = VQTokenizer(VQConfig(channels=(32,), codes=64, encoder_blocks=1, decoder_blocks=1))
    about = replace(run_of(art, options, preset), train=list(range(8)), val=list(range(8)))
    task = TokenizerTask(about, SIMPLE, small)
    before = task.measure(small.eval())
    after = task.measure(run(task, schedule(150, evaluations=1), tmp_path))
    assert before["psnr"] < 12 and after["psnr"] > 20, (before, after)
    assert after["codes_used"] > 0.3


@pytest.mark.slow
def test_overfitting_eight_grids_drives_the_gpts_loss_near_zero(tmp_path: Path) -> None:
    options = replace(QUIET, dropout=0.0, token_noise=0.0, gpt_lr=4e-3)
    task = gpt_task(pictures=8, options=options, shapes=((4, 4),))
    bits = task.measure(run(task, schedule(120, evaluations=1), tmp_path))
    # Five bits a token to start with. Which of the four pictures of its label it is costs 2 bits in 16 tokens: 0.12.
    assert bits["bits"] < 0.5, bits


def test_a_limit_of_time_ends_a_run_and_brings_the_rate_down(tmp_path: Path) -> None:
    task, rates, ticks = gpt_task(), list[float](), itertools.count()
    optimizer = task.optimizer("model")
    task.optimizer = lambda name: optimizer  # type: ignore[method-assign]
    step = optimizer.step
    optimizer.step = lambda: (step(), rates.append(optimizer.param_groups[0]["lr"]))[0]  # type: ignore
    limited = schedule(10**6, seconds=60.0, clock=lambda: float(next(ticks)))
    run(task, limited, tmp_path)
    assert 40 < len(rates) <= 60, "a second for a look at the clock, one at least for a step"
    assert rates[0] < 0.1 * max(rates) and rates[-1] < 0.2 * max(rates)
    run(task, limited, tmp_path)  # nothing is left to do
    assert len(rates) == int(peek(tmp_path / "gpt-state.safetensors")["step"])


# It can be stopped


class Killed(Exception):
    pass


def kill() -> None:
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "decoder", "gpt"])
def test_a_run_stopped_and_killed_goes_on_to_bit_equal_weights(
    kind: str, art: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task() -> Task:
        options = replace(QUIET, adversarial=0.5, dropout=0.2, token_noise=0.1)
        if kind == "gpt":
            return gpt_task(options=options)
        return (
            TokenizerTask(run_of(art, options), SIMPLE)
            if kind == "tokenizer"
            else DecoderTask(run_of(art, options), SIMPLE, vq())
        )

    whole, stopped, handler = tmp_path / "whole", tmp_path / "stopped", signal.getsignal(signal.SIGINT)
    expected = run(task(), schedule(8, batch=4), whole)
    with pytest.raises(KeyboardInterrupt):
        run(before_step(task(), 8, 2, press_ctrl_c), schedule(8, replace(QUIET, quiet=False), batch=4), stopped)
    assert "stopped at step 3 of 8" in capsys.readouterr().err and signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(Killed):
        run(before_step(task(), 8, random.Random(kind).randrange(4, 8), kill), schedule(8, batch=4), stopped)
    resumed = run(task(), schedule(8, batch=4), stopped)
    for (name, a), b in zip(expected.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    states = [load_file(folder / f"{kind}-state.safetensors") for folder in (whole, stopped)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_second_ctrl_c_does_not_wait_for_a_state_to_be_saved(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(before_step(gpt_task(), 8, 3, lambda: (press_ctrl_c(), press_ctrl_c())), schedule(8, log_every=1), tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["gpt-best.safetensors"]


def test_a_signal_to_the_processes_that_load_samples_too_stops_in_order(tmp_path: Path) -> None:
    """As a scheduler sends it. Those that load samples died of it, and the training before it had saved."""

    def signal_all() -> None:
        for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
            assert process.pid
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        run(before_step(gpt_task(), 8, 2, signal_all), schedule(8, workers=1), tmp_path)
    assert peek(tmp_path / "gpt-state.safetensors")["step"] == "3" and not multiprocessing.active_children()


class Unusable(Dataset[Any]):
    def __init__(self, error: Exception):
        self.error = error

    def __getitem__(self, k: int) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [UserError("s: is broken"), UnreadablePicture("s:", "is broken"), KeyError("s: is")])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_a_sample_is_one_sentence_whoever_loads_it(
    error: Exception, workers: int, tmp_path: Path
) -> None:
    task = gpt_task()
    task.dataset = Unusable(error)
    with pytest.raises(UserError if isinstance(error, UserError) else KeyError) as found:
        run(task, schedule(8, workers=workers), tmp_path)
    assert isinstance(error, KeyError) or str(found.value) == "s: is broken"
    assert not multiprocessing.active_children(), "Python would wait for them when it ends"


def test_states_are_saved_as_time_goes_by(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(before_step(gpt_task(), 8, 5, kill), schedule(8, replace(QUIET, save_minutes=0.0)), tmp_path)
    assert peek(tmp_path / "gpt-state.safetensors")["step"] == "5"


def test_a_training_leaves_the_callers_random_numbers_alone(art: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    run(gpt_task(options=replace(QUIET, dropout=0.2)), schedule(2), tmp_path)
    TokenizerTask(run_of(art), SIMPLE)
    assert torch.equal(before, torch.get_rng_state())


def test_a_damaged_state_is_named_and_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "gpt-state.safetensors").write_bytes(b"not a state")
    with pytest.raises(UserError, match="gpt-state"):
        run(gpt_task(), schedule(2), tmp_path)


def test_training_stops_early_when_held_out_pictures_get_worse_and_keeps_the_best(tmp_path: Path) -> None:
    task, scores = gpt_task(), iter([3.0, 1.0, 2.0, 2.0, 2.0])
    task.measure = lambda model, progress: {"score": next(scores)}  # type: ignore[method-assign, misc, assignment]
    run(task, schedule(20, replace(QUIET, patience=2), log_every=1), tmp_path)
    assert [line["score"] for line in metrics_in(tmp_path) if "score" in line] == [3.0, 1.0, 2.0, 2.0]
    assert peek(tmp_path / "gpt-best.safetensors")["step"] == "2"  # the weights of the best score, not the last
    run(task, schedule(20, replace(QUIET, patience=2), log_every=1), tmp_path)  # nothing is left to do
    assert peek(tmp_path / "gpt-state.safetensors")["step"] == "4"


@pytest.mark.parametrize("error", ["CUDA out of memory. Tried to allocate 2 GiB", "MPS backend out of memory"])
def test_a_batch_too_large_for_the_memory_goes_through_in_parts(
    error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes, loss = [], GPTTask.loss

    def small(task: GPTTask, most: int) -> GPTTask:
        def limited(batch: Any, *more: Any) -> Any:
            sizes.append(len(batch["label"]))
            if sizes[-1] > most:
                raise RuntimeError(error)
            return loss(task, batch, *more)

        task.loss = limited  # type: ignore[method-assign]
        return task

    about: dict[str, Any] = {"options": replace(QUIET, dropout=0.0), "shapes": ((4, 4),)}
    run(gpt_task(**about), schedule(2, log_every=1), tmp_path / "whole")
    run(small(gpt_task(**about), 2), schedule(2, log_every=1), tmp_path / "parts")
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) == {2} and "going on with 2" in capsys.readouterr().err
    whole, parts = (metrics_in(tmp_path / name)[0] for name in ("whole", "parts"))
    assert all(whole[name] == pytest.approx(parts[name], rel=1e-3) for name in ("nats", "model_gradient"))
    with pytest.raises(UserError, match="too little memory for 1 samples at once"):
        run(small(gpt_task(), 0), schedule(2), tmp_path / "none")


PROCESS = """
import sys, time
from pathlib import Path
import torch
from tests.test_training import gpt_task, metrics_in, schedule
from train.loop import run
torch.set_num_threads(1)
folder = Path(sys.argv[1])
task, sheet = gpt_task(), gpt_task().sheet
task.sheet = lambda model: (open(folder / "painting", "w").close(), time.sleep(2), sheet(model))[-1]
try:
    run(task, schedule(100_000, log_every=5, evaluations=20_000), folder)
except KeyboardInterrupt:
    print("left", float(sum(p.detach().double().abs().sum() for p in task.modules["model"].parameters())))
"""


@pytest.mark.slow
def test_two_processes_stop_together_with_the_same_weights(tmp_path: Path) -> None:
    """Only the first paints sheets. A Ctrl-C meanwhile once made it leave while the other waited for its gradients."""
    about = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    environment = {**os.environ, **about, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        while not (tmp_path / "painting").exists() and all(process.poll() is None for process in pair):
            time.sleep(0.05)
        for process in pair:
            process.send_signal(signal.SIGINT)
        said = [process.communicate(timeout=100)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert said[0] == said[1] and said[0].startswith("left"), said


# The whole way


def test_sixteen_views_of_a_picture_are_all_different() -> None:
    """Those of the whole once came again and again."""
    picture = Image.effect_noise((150, 200), 60).convert("RGB")
    views = [view_of(picture, view, Grids(8, 2, 64), flip=True) for view in range(16)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(views, 2) if a.shape == b.shape)


@pytest.mark.slow
def test_igpt_train_makes_a_model_that_draws_and_goes_on_when_called_again(art: Path, tmp_path: Path) -> None:
    options = replace(SHORT, views=2)
    out = train(art, tmp_path / "model", options)
    model = igpt.load(out, device="cpu")
    assert model.labels == ["blue", "red"] and model.grids == Grids(downsample=4, cell=2, cells=16)
    assert model.generate(2, size=(50, 40), label="red", seed=1)[1].size == (50, 40)
    assert "igpt" in (out / "README.md").read_text() and (out / "training" / "metrics.jsonl").is_file()
    shown = 32  # pixels a side of each of the held-out pictures on the sheet of originals and reconstructions
    with Image.open(out / "training" / "reconstructions.png") as sheet:
        assert sheet.height == 2 * shown and sheet.width % shown == 0
    before = model.weights_hash
    train(art, tmp_path / "model", options)  # nothing is left to do
    assert load(out).weights_hash == before
    with pytest.raises(UserError, match="seed 0, now it is 1"):
        train(art, tmp_path / "model", replace(options, seed=1))
    with pytest.raises(UserError, match="command train, now it is finetune"):
        finetune(art, out, str(out), TuneOptions(samples=4, quiet=True))


@pytest.mark.slow
def test_ctrl_c_leaves_the_model_so_far_and_the_same_command_goes_on(art: Path, tmp_path: Path) -> None:
    options = replace(SHORT, gpt_samples=60 * 16)  # it is measured after 25 steps
    with ctrl_c_once_there_is(tmp_path / "model/training/gpt-best.safetensors"):
        train(art, tmp_path / "model", options)
    assert (tmp_path / "model/training/gpt-state.safetensors").is_file()
    half = igpt.load(tmp_path / "model", device="cpu")
    assert half.generate(size=32, label="red", seed=1)[0].size == (32, 32)
    assert 25 * 16 <= half.provenance["gpt"]["samples"] < 60 * 16
    train(art, tmp_path / "model", options)
    assert load(tmp_path / "model").provenance["gpt"]["samples"] == 60 * 16


@pytest.mark.slow
def test_a_gpt_can_be_learned_on_the_tokenizer_of_another_model(art: Path, tmp_path: Path) -> None:
    first = train(art, tmp_path / "first", SHORT)
    second = train(art, tmp_path / "second", replace(SHORT, tokenizer=str(first)))
    about = load(second).provenance["tokenizer"]
    assert about["from"] == "first" and about["command"] == load(first).provenance["command"]
    assert about["command"] in (second / "README.md").read_text()
    codebooks = [load(folder).tokenizer.state_dict()["quantizer.codebook_KE"] for folder in (first, second)]
    assert torch.equal(*codebooks)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"preset": "huge"}, "huge"),
        ({"gpt_samples": 0}, "samples 0"),
        ({"dropout": 1.5}, "1.5"),
        ({"views": 0}, "0"),
        ({"seed": -1}, "seed"),
        ({"gpt_lr": 0.0}, "gpt-lr"),
        ({"patience": 0}, "patience"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TrainOptions(**change).check()


def test_a_folder_that_holds_something_else_is_not_trained_into(art: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="something else"):
        train(art, tmp_path, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


# Its data


def test_samples_are_pure_functions_of_their_number(art: Path) -> None:
    collection = ArtFolder(art)
    crops = [Crops(collection, [0, 3, 5], 32, 7, (1.0, 1.5), True) for _ in range(2)]
    assert torch.equal(crops[0][11], crops[1][11]) and not torch.equal(crops[0][11], crops[0][12])
    a, b = gpt_task().dataset, gpt_task().dataset
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
    cache: Any = GivenTokens([torch.arange(60).view(6, 10)], [1])
    windows = TokenWindows(cache, [0], GPTConfig(64, 2, cells=16), 0)
    sample = windows[3]
    targets_Ln = sample["targets"][:15]
    assert sample["targets"][15].tolist() == [-1] * 4 and sorted(targets_Ln.flatten().tolist()) == list(range(60))
    assert torch.equal(sample["cells"][:15], targets_Ln), "no noise was asked for"
    assert targets_Ln[:, 0].tolist() != sorted(targets_Ln[:, 0].tolist())
    rows, columns = (sample["positions"][:15] + torch.tensor([1, 2])).long().unbind(1)  # the middle cell lies at 0, 0
    for token, (y, x) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        assert torch.equal((2 * rows + y) * 10 + 2 * columns + x, targets_Ln[:, token])


def test_noise_is_shown_and_never_asked_for() -> None:
    cache: Any = GivenTokens([torch.zeros(8, 8, dtype=torch.long)], [0])
    windows = TokenWindows(cache, [0], GPTConfig(64, 1, cells=16), 0, noise=0.25)
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
