"""The one training loop, for tokenizer and GPT alike: set the rate, step, average, log, now and then look and save.

A `Stage` says what is learned. Its samples are numbered, and sample k is a pure function of (seed, k), so where a
training stands is one number, the step, and a killed run goes on to the same weights, bit for bit on the CPU.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tokenizer_vq.base import UserError

from .interrupt import Interrupt
from .state import load_state, save_state

EMA_DECAY = 0.999
WARMUP = 0.03  # share of all steps
FLOOR = 0.02  # last learning rate over the peak
CLIP = 1.0
LOOKS = 20  # how often a run measures itself on held-out data and paints a sheet, unless it is told otherwise
LOG_EVERY = 25  # steps
FIRST_FIT = 5  # steps after which the pace is known well enough to say how many fit into a time


class Stage(Protocol):
    """What is learned. `modules["model"]` is the result; others (a discriminator) help and are thrown away."""

    name: str
    modules: dict[str, nn.Module]
    dataset: Dataset[Any]
    divisible: bool  # whether the gradient of a batch is the mean of those of its parts, so that it may come in parts

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """For modules[name], at its peak learning rate."""

    def turns(self, progress: float) -> list[str]:
        """Which modules take a step, in order. `progress` is the share of the run that is done, 0..1."""

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: Any, progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, and what to log. `ready` are the modules as prepared for this machine."""

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Numbers on held-out data; "score" among them, lower is better; none while weights are not to be kept yet."""

    def worries(self, progress: float, numbers: dict[str, float]) -> list[str]:
        """What a person should know of the numbers last measured and logged, in plain words."""

    def sheet(self, model: nn.Module) -> Image | None:
        """A picture for people to look at, always from the same seed; None where there is none to see yet."""


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how often to look."""

    steps: int  # with `seconds` a first guess: the pace decides
    batch: int
    save_seconds: float
    patience: int
    seed: int
    precision: str  # "no" or "bf16", as accelerate says it
    workers: int = 0
    quiet: bool = False
    looks: int = LOOKS
    seconds: float = math.inf  # that it may take, looks included


def rate(progress: float) -> float:
    """Learning rate over its peak: linear warm-up, then a cosine down to the floor."""
    if progress < WARMUP:
        return max(progress / WARMUP, 1e-3)
    down = (progress - WARMUP) / (1 - WARMUP)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(down, 1.0)))


def average(averaged: nn.Module, model: nn.Module, step: int) -> None:
    """Move the averaged weights towards the model's; the memory grows from nothing to 1 / (1 - EMA_DECAY) steps."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        ours: list[Tensor] = list(averaged.parameters())
        theirs: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(averaged.buffers(), model.buffers(), strict=True):
            mine.copy_(other)


class _Numbers:
    """Batches of sample numbers for one process, from `step` on without end."""

    def __init__(self, step: int, batch: int, rank: int, world: int):
        self.step, self.batch, self.rank, self.world = step, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.step):
            first = (step * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))


def _parts(batch: Any, count: int) -> Iterator[tuple[Any, float]]:
    """A batch (a dict of tensors, where it is to be cut) in `count` pieces at most, each with its share of it."""
    if count == 1:
        yield batch, 1.0
        return
    chunks = {name: value.tensor_split(min(count, len(value))) for name, value in batch.items()}
    whole = len(next(iter(batch.values())))
    for pieces in zip(*chunks.values(), strict=True):
        yield dict(zip(chunks, pieces, strict=True)), len(pieces[0]) / whole


class _Log:
    """Metrics as JSON lines, a progress line with the time that is left."""

    def __init__(self, path: Path, stage: str, step: int, steps: int, quiet: bool):
        self.path, self.stage = path, stage
        self.latest: dict[str, float] = {}
        self.bar = tqdm(total=steps, initial=step, desc=stage, disable=quiet, mininterval=1, smoothing=0.05)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        line = {"stage": self.stage, "step": step, "time": round(time.time(), 1)}
        line |= {k: round(v, 5) for k, v in numbers.items()}
        self.latest |= numbers
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, sentence: str) -> None:
        """Above the progress line, where it stays."""
        if not self.bar.disable:
            self.bar.write(sentence, file=sys.stderr)

    def step(self, step: int, numbers: dict[str, Tensor], written: bool) -> None:
        """Move the bar; now and then read the numbers, which on a GPU means waiting for it, and write them down."""
        if written:
            read = {k: float(v.detach()) for k, v in numbers.items()}
            self.write(step, read)
            self.bar.set_postfix({k: f"{v:.3f}" for k, v in list(read.items())[:3]}, refresh=False)
        self.bar.update()


def run(stage: Stage, schedule: Schedule, folder: Path, notes: dict[str, str]) -> nn.Module:
    """Train, resuming from `folder` if a state lies there, and return the averaged model that scored best.

    Writes `<stage>-state.safetensors`, `<stage>-best.safetensors`, `metrics.jsonl` and `<stage>-<step>.png` there.
    """
    training = _Training(stage, schedule, folder, notes)
    training.resume()
    log = _Log(folder / "metrics.jsonl", stage.name, training.step, training.steps, schedule.quiet or not training.main)
    saved_at = time.monotonic()
    with Interrupt() as interrupt:
        for batch in training.batches():
            logs = training.update(batch)
            training.step += 1
            if training.step == FIRST_FIT:
                training.fit()
            last = training.step >= training.steps or training.seconds_taken > schedule.seconds
            log.step(training.step, logs, written=training.main and (last or training.step % LOG_EVERY == 0))
            if last or training.look_is_due:
                measured = training.look(last)
                training.fit()
                if training.main:
                    log.write(training.step, measured)
                    for sentence in stage.worries(training.progress, log.latest):
                        log.say(f"warning: {sentence}")
            # Where the best weights are on disk, what follows would only overfit.
            last = last or training.stale >= schedule.patience
            if last:
                training.steps = training.step
            log.bar.total = training.steps
            if last or interrupt.asked or time.monotonic() - saved_at > schedule.save_seconds:
                training.save()
                saved_at = time.monotonic()
            if interrupt.asked:
                log.say(f"stopped at step {training.step} of {training.steps}; the same command goes on from there")
                raise KeyboardInterrupt
            if last:
                break
    log.bar.close()
    return training.best()


class _Training:
    """Everything that moves during a training, and how it moves."""

    def __init__(self, stage: Stage, schedule: Schedule, folder: Path, notes: dict[str, str]):
        self.stage, self.schedule, self.folder, self.notes = stage, schedule, folder, notes
        AcceleratorState._reset_state()  # or a second run in this process could not change its precision
        self.accelerator = Accelerator(mixed_precision=schedule.precision, cpu=not torch.cuda.is_available())
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.raw = {name: module.to(self.device) for name, module in stage.modules.items()}
        self.averaged = copy.deepcopy(self.raw["model"]).requires_grad_(False).eval()
        self.optimizers = {name: stage.optimizer(name) for name in self.raw}
        self.peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        self.ready: dict[str, nn.Module] = {}
        self.step, self.best_score, self.stale, self.parts = 0, math.inf, 0, 1
        self.steps, self.looked = schedule.steps, 0  # of this run, and when it last looked
        self.seconds, self.began = 0.0, time.monotonic()

    def resume(self) -> None:
        """Go on from the state in the folder, if there is one, and prepare for the machine."""
        path = self.folder / f"{self.stage.name}-state.safetensors"
        if path.is_file():
            told = load_state(path, {**self.raw, "averaged": self.averaged}, self.optimizers)
            if told.get("identity", "") != self.notes.get("identity", ""):
                raise UserError(f"the training state {path} is of other pictures or tokens; use another --out")
            self.step, self.best_score, self.stale = int(told["step"]), float(told["best_score"]), int(told["stale"])
            self.seconds = float(told["seconds"])
            self.steps, self.looked = int(told["steps"]), int(told["looked"])
        self.ready = {name: self.accelerator.prepare(module.train()) for name, module in self.raw.items()}
        self.optimizers = {name: self.accelerator.prepare(optimizer) for name, optimizer in self.optimizers.items()}

    def batches(self) -> Iterable[Any]:
        """The batches of the steps that are still to be done, and more: `run` knows when to stop."""
        accelerator, schedule = self.accelerator, self.schedule
        if self.step >= self.steps:
            return []
        numbers = _Numbers(self.step, schedule.batch, accelerator.process_index, accelerator.num_processes)
        pin = self.device.type == "cuda"
        loader: DataLoader[Any] = DataLoader(
            self.stage.dataset, batch_sampler=numbers, num_workers=schedule.workers, pin_memory=pin
        )
        return loader

    def update(self, batch: Any) -> dict[str, Tensor]:
        """One step of every module whose turn it is."""
        progress, seed = self.progress, self.schedule.seed * 1_000_003 + self.step
        batch = send_to_device(batch, self.device, non_blocking=True)
        # Dropout draws from torch's own generator: seeding it by the step makes a resumed run the same run.
        torch.manual_seed(seed * 131 + self.accelerator.process_index)
        generator = torch.Generator().manual_seed(seed)
        logs: dict[str, Tensor] = {}
        for turn in self.stage.turns(progress):
            optimizer = self.optimizers[turn]
            for group in optimizer.param_groups:
                group["lr"] = self.peaks[turn] * rate(progress)
            told = self.gradients(turn, optimizer, batch, progress, generator)
            norm = self.accelerator.clip_grad_norm_(self.raw[turn].parameters(), CLIP)
            optimizer.step()
            logs |= told | {f"{turn}_gradient": torch.as_tensor(norm)}
        average(self.averaged, self.raw["model"], self.step)
        return logs

    def gradients(
        self, turn: str, optimizer: torch.optim.Optimizer, batch: Any, progress: float, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Leave the gradients of a batch in its weights. Where it does not fit into memory, it goes through in halves
        from here on: the same steps, only slower. Raises UserError where a single sample does not fit."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            try:
                told: dict[str, Tensor] = {}
                for part, share in _parts(batch, self.parts):
                    with self.accelerator.autocast():
                        loss, said = self.stage.loss(turn, self.ready, part, progress, generator)
                    self.accelerator.backward(loss * share)
                    told = {k: told.get(k, 0) + v.detach() * share for k, v in said.items()}
                return told
            except RuntimeError as error:  # CUDA has a class of its own for it, Apple's MPS only a message
                if not (isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)):
                    raise
                if not self.stage.divisible or self.parts >= self.schedule.batch:
                    raise UserError(
                        f"{self.device} has too little memory for {self.schedule.batch // self.parts} samples at once; "
                        "a smaller batch, a smaller model or the CPU is wanted"
                    ) from None
                self.parts *= 2
            if self.device.type == "cuda":  # outside the handler, which still holds the tensors of the failed step
                torch.cuda.empty_cache()
            print(f"out of memory: going on with {self.schedule.batch // self.parts} samples at once", file=sys.stderr)

    @property
    def progress(self) -> float:
        """The share of the run that is done."""
        return self.step / self.steps

    @property
    def seconds_taken(self) -> float:
        """Of learning, looks included, also before the training was stopped and begun again."""
        return self.seconds + time.monotonic() - self.began

    @property
    def look_is_due(self) -> bool:
        return self.step >= self.looked + max(LOG_EVERY, self.steps // self.schedule.looks)

    def fit(self) -> None:
        """Where there is a time limit: as many steps as fit into it at the pace so far."""
        if self.schedule.seconds < math.inf:
            self.steps = max(self.step + 1, int(self.step * self.schedule.seconds / self.seconds_taken))

    def look(self, last: bool) -> dict[str, float]:
        """Measure the averaged model, paint a sheet, keep the weights if they are the best so far."""
        self.looked = self.step
        with self.accelerator.autocast():
            measured = self.stage.measure(self.averaged)
        better = measured.get("score", math.inf) < self.best_score or (last and self.best_score == math.inf)
        if "score" in measured:
            self.stale = 0 if better else self.stale + 1
            self.best_score = min(self.best_score, measured["score"])
        if self.main:
            if (sheet := self.stage.sheet(self.averaged)) is not None:
                sheet.save(self.folder / f"{self.stage.name}-{self.step:07d}.png")
            if better:
                told = self.told() | {k: f"{v:.5f}" for k, v in measured.items()}
                save_state(self._best_path, {"model": self.averaged}, {}, told)
        return measured

    def save(self) -> None:
        if self.main:
            path = self.folder / f"{self.stage.name}-state.safetensors"
            save_state(path, {**self.raw, "averaged": self.averaged}, self.optimizers, self.told())

    def told(self) -> dict[str, str]:
        """Where the training stands, as notes for the files."""
        return self.notes | {
            "step": str(self.step), "steps": str(self.steps), "looked": str(self.looked),
            "stale": str(self.stale), "best_score": repr(self.best_score), "seconds": f"{self.seconds_taken:.0f}",
        }  # fmt: skip

    def best(self) -> nn.Module:
        self.accelerator.wait_for_everyone()
        load_state(self._best_path, {"model": self.averaged}, {})
        return self.averaged

    @property
    def _best_path(self) -> Path:
        return self.folder / f"{self.stage.name}-best.safetensors"
