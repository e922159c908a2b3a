"""What makes a GPU fast, on the CPU by the same code: pictures cut on the device, compiled stages, steps that wait for
nothing. On a GPU itself none of this has run."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from igpt.evaluation.perceptual import GradientSSIM
from tests.painting import art_folder
from tests.test_fresh import fresh_task
from tests.test_training import QUIET, gpt_task, pictures_on_device, run_of, schedule, vq
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder, Crops
from train.crops import Boxes, sizes_on
from train.decoder import DecoderTask
from train.loop import Task, Trainer, average, rate, run
from train.tokenizer import TokenizerTask

CPU, SIMPLE = torch.device("cpu"), GradientSSIM()
KINDS = ("tokenizer", "decoder", "gpt", "fresh")
WAITING_OPS = frozenset("_local_scalar_dense nonzero bincount masked_select _unique2 unique_dim equal histc".split())
WAITING_METHODS = frozenset("tolist numpy cpu item __bool__ __float__ __int__ __index__".split())


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return art_folder(tmp_path_factory.mktemp("art"))


def task_of(kind: str, art: Path, dropout: float = 0.2, on_device: bool = True) -> Task[Any]:
    """With everything that is random in it; pictures are cut on the device."""
    options = replace(QUIET, adversarial=0.5, dropout=dropout, token_noise=0.1)
    if kind == "gpt":
        return gpt_task(options=options)
    if kind == "fresh":
        return fresh_task(art, art.parent / "work", options)
    about = run_of(art, options)
    if on_device:
        about = replace(about, pictures=pictures_on_device(about.art, about.train, 32))
    return TokenizerTask(about, SIMPLE) if kind == "tokenizer" else DecoderTask(about, SIMPLE, vq())


# Pictures on the device


def test_crops_cut_on_the_device_are_those_of_the_loader(art: Path) -> None:
    """To within what another interpolation makes; mirrored ones and those that touch an edge among them."""
    folder, indices = ArtFolder(art), [0, 3, 5, 6]
    about = (folder, indices, 24, 7, (1.0, 1.3), True)
    boxes, crops = Boxes(*about), Crops(*about)
    pictures = pictures_on_device(folder, indices, 32)
    assert pictures.pixels_P3.nbytes == 4 * 3 * 32 * 32
    assert sizes_on(CPU, folder, indices, 32, 4 * 3 * 32 * 32 - 1) is None, "what does not fit is left to the loader"
    assert sizes_on(CPU, folder, indices, 32) is None, "as on a CPU"
    cut_BCHW = pictures.cut(torch.stack([boxes[k] for k in range(40)]), 24, 24)
    wanted_BCHW = torch.stack([crops[k] for k in range(40)])
    assert cut_BCHW.shape == wanted_BCHW.shape and cut_BCHW.is_contiguous(memory_format=torch.channels_last)
    errors_B = (cut_BCHW - wanted_BCHW).abs().mean((1, 2, 3))
    assert float(errors_B.max()) < 0.06
    mirrored_B = (cut_BCHW.flip(-1) - wanted_BCHW).abs().mean((1, 2, 3))
    assert float((mirrored_B / errors_B).median()) > 2, "the measure would see a crop that is mirrored by mistake"
    assert torch.equal(boxes[11], Boxes(*about)[11]) and pictures.pixels_P3.dtype == torch.uint8


def test_a_crop_as_large_as_the_picture_has_its_very_pixels(tmp_path: Path) -> None:
    folder = ArtFolder(art_folder(tmp_path, each=1))
    width, height = folder.sizes[0]
    pictures = pictures_on_device(folder, [0], 1000)
    whole = pictures.cut(torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]]), width, width)
    crops = Crops(folder, [0], width, 0, (1.0, 1.0), False)
    assert width == height and torch.allclose(whole[0], crops[0], atol=1e-4)


@pytest.mark.slow
def test_a_tokenizer_learns_from_pictures_on_the_device_as_from_the_loader(art: Path, tmp_path: Path) -> None:
    errors = []
    for on_device in (True, False):
        task = task_of("tokenizer", art, on_device=on_device)
        errors.append(task.measure(run(task, schedule(40, evaluations=1), tmp_path / str(on_device)))["psnr"])
    assert errors[0] == pytest.approx(errors[1], abs=1.5)


# Compiled stages


def differs(kind: str, art: Path, folder: Path, backend: str) -> float:
    """How far compiled steps end from eager ones, over how far those have moved. Without dropout, of which a compiled
    GPT draws other numbers."""

    def weights(steps: int, compiler: str | None) -> Tensor:
        about = schedule(steps, batch=4, compiler=compiler)
        return torch.cat(
            [p.flatten() for p in run(task_of(kind, art, 0.0), about, folder / f"{steps}{compiler}").parameters()]
        )

    eager = weights(4, None)
    return float((weights(4, backend) - eager).norm() / (eager - weights(1, None)).norm())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_give_the_weights_of_eager_ones(
    kind: str, art: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By Inductor, which on a CPU wants a C++ compiler; without one the graphs that it would see, run as they are. Muon
    in float32: bfloat16 makes a rounding a thousandth."""
    monkeypatch.setattr("train.muon.fast_bf16", lambda device: False)
    assert differs(kind, art, tmp_path, "inductor" if shutil.which("g++") else "aot_eager") < 0.05
    assert "cannot be compiled" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "stages"), [("tokenizer", 2), ("decoder", 4), ("gpt", 1)])
def test_each_stage_is_one_graph_and_compiled_once(kind: str, stages: int, art: Path, tmp_path: Path) -> None:
    """Encoder, decoder, GPT with its loss; the discriminator with and without gradients of what it looks at. The GPT
    was 27 pieces once, and each of its layers compiled anew."""
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    run(task_of(kind, art), schedule(5, batch=4, compiler=counting), tmp_path)
    assert len(graphs) == stages


def test_what_cannot_be_compiled_is_said_once_and_learned_all_the_same(
    art: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here")

    expected = run(gpt_task(), schedule(3), tmp_path / "eager").state_dict()
    found = run(gpt_task(), schedule(3, compiler=broken), tmp_path / "broken").state_dict()
    sentence = "the gpt cannot be compiled here, so it learns more slowly: no compiler here\n"
    assert capsys.readouterr().err.count(sentence) == 1
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", [UserError, RuntimeError])
def test_an_error_of_a_task_is_not_mistaken_for_one_of_the_compiler(
    kind: type[Exception], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = gpt_task()

    def failing(*_: Any) -> Any:
        raise kind("this shard is broken")

    task.loss = failing  # type: ignore[method-assign]
    with pytest.raises(kind, match="this shard is broken"):
        run(task, schedule(2, compiler="eager"), tmp_path)
    assert "cannot be compiled" not in capsys.readouterr().err


def test_the_time_of_the_first_step_is_no_progress_but_counts(tmp_path: Path) -> None:
    """It is the compiler's: warming up would be over before it began. The rest is spread over what is left."""
    ticks, task, progress = itertools.chain([0.0, 40.0], itertools.count(41.0)), gpt_task(), list[float]()
    loss = task.loss
    task.loss = lambda *about: (progress.append(about[1]), loss(*about))[1]  # type: ignore
    run(task, schedule(10**6, seconds=60.0, clock=lambda: float(next(ticks))), tmp_path)
    assert progress[:2] == [0.0, 0.0] and progress[2] == pytest.approx(1 / 20) and len(progress) <= 21


# No waiting inside a step


class Watch(TorchDispatchMode):
    """Notes operations that would have the CPU wait for a GPU, where they are of tensors that would lie there: weights,
    batches and all that is computed from them. What the CPU draws by a seed lies on the CPU everywhere."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.kept = list(tensors)  # none is freed, so that no other comes to lie in its place
        self.places = {each.untyped_storage()._cdata for each in self.kept}
        self.found: list[str] = []

    def on_device(self, values: Any) -> bool:
        leaves = (each for each in tree_leaves(values) if isinstance(each, Tensor))
        return any(each.untyped_storage()._cdata in self.places for each in leaves)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name().removeprefix("aten::").partition(".")[0]
        if self.on_device([args, kwargs]):
            by_mask = name.startswith("index") and any(
                isinstance(each, Tensor) and each.dtype == torch.bool for each in tree_leaves(args[1:2])
            )
            if name in WAITING_OPS or by_mask:
                self.found.append(name)
            for each in tree_leaves(out):
                if isinstance(each, Tensor):
                    self.kept.append(each)
                    self.places.add(each.untyped_storage()._cdata)
        return out


class WatchMethods(TorchFunctionMode):
    """The same for what Python asks of a tensor."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS and self.watch.on_device(args[0]):
            self.watch.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


def waits(trainer: Trainer, steps: int) -> list[str]:
    """What the last of some steps would wait for."""
    for number, batch in zip(range(steps), trainer.batches(), strict=False):  # noqa: B007
        state = (trainer.averaged, *trainer.modules.values())
        tensors = [value for module in state for value in (*module.parameters(), *module.buffers())]
        watch = Watch([*tensors, *tree_leaves(batch)])
        with watch, WatchMethods(watch):
            trainer.gradients(batch)
            trainer.clip_and_step(rate(trainer.progress))
            average(trainer.averaged, trainer.modules["model"], trainer.step)
            trainer.advance()
            trainer.vote(False)
    return watch.found


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_the_device(kind: str, art: Path, tmp_path: Path) -> None:
    """After the first ones: a codebook asks once whether it has been started."""
    assert waits(Trainer(task_of(kind, art), schedule(6, batch=4), tmp_path), 4) == []


def test_a_step_that_waits_would_be_seen(art: Path, tmp_path: Path) -> None:
    task = gpt_task()
    loss = task.loss

    def asking(batch: Any, progress: float, generator: torch.Generator) -> Any:
        found, metrics = loss(batch, progress, generator)
        batch["label"][batch["label"] > 0].sum().tolist()
        return found * (1.0 if float(found) > 0 else 2.0), metrics

    task.loss = asking  # type: ignore[method-assign]
    found = waits(Trainer(task, schedule(4), tmp_path), 2)
    assert {"index", "tolist", "__float__"} <= set(found)
