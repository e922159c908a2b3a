"""The one training loop, for tokenizer, decoder and GPT alike: `run`, on one page.

A step has seven acts: take a batch, find the gradients, clip them and step at the learning rate of the moment, average
the weights, log; and now and then evaluate (measure, paint a sheet, keep the best weights, warn) and save.

What is learned is a `Task`. Its samples are numbered, and sample k is a pure function of (seed, k), as dropout is of
(seed, step). So a training has to remember only its weights and the step, and a run that was killed goes on to the same
weights, bit for bit on the CPU. Several processes share every batch out and add their gradients up: they learn what one
would. No step waits for the device: what is measured is read when it is logged.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate.utils import broadcast, send_to_device
from PIL.Image import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from igpt.files import append_line, write_picture
from tokenizer_vq.base import UserError, complaint, reason

from .options import LearningOptions
from .processes import News, add_up, agreed, check_same_start, companions, micro_batches, processes, together, total
from .state import catch_interrupt, load_state, loaded, save_state, seeded

EMA_DECAY = 0.999
WARMUP = 0.03  # share of all steps
LAST_RATE = 0.02  # over the peak
GRADIENT_NORM = 1.0  # larger gradients are scaled down to it
SAVED = ("step", "progress", "evaluated_at", "best_score", "evals_since_best")  # of a trainer, beside its weights

Model = TypeVar("Model", bound=nn.Module)
Measured = TypeVar("Measured", bound=nn.Module, contravariant=True)


class Task(Protocol[Measured]):
    """What is learned. `modules["model"]` is the result; others (a discriminator) only help it to learn."""

    name: str
    modules: dict[str, nn.Module]
    dataset: Dataset[Any]
    divisible: bool  # whether a batch may come in parts, one after another
    stages: Sequence[nn.Module] = ()  # what is compiled where that is faster, each for one shape of batch

    def prepare(self, batch: Any, step: int) -> Any:
        """A batch that has arrived on the device, as `loss` takes it. `step` is its number."""
        return batch

    def weight(self, batch: Any) -> Tensor:
        """Of how many things the loss of a batch is the mean; on its device."""
        return torch.full((), len(batch), device=batch.device)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """For modules[name], at its peak learning rate."""

    def loss(self, batch: Any, progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses of all modules, and metrics to log. `progress` is the share of the run that is done;
        random draws on the CPU come from `generator`."""

    def measure(self, model: Measured, progress: float = 1.0) -> dict[str, float]:
        """Metrics on held-out data; "score" among them, lower is better; none while weights are not to be kept yet."""

    def warnings(self, progress: float, metrics: dict[str, float]) -> list[str]:
        """What a person should know of the metrics last measured and logged, in plain words."""
        return []

    def sheet(self, model: Measured) -> Image | None:
        """A picture for people to look at, always from the same seed; None where there is none."""
        return None


@dataclass(frozen=True)
class Schedule:
    """How long, how much at once, how often to evaluate; when to save and to give up is in the options."""

    options: LearningOptions
    steps: int
    batch: int
    bf16: bool = False
    seconds: float = math.inf  # where there is a limit to learning and evaluating, the clock decides instead of `steps`
    compiler: Any = None  # torch.compile's backend for the stages of a task; None goes without
    workers: int = 0  # processes that load samples
    evaluations: int = 20
    log_every: int = 25  # steps; evaluations are at least as far apart
    clock: Callable[[], float] = time.monotonic


def rate(progress: float) -> float:
    """Learning rate over its peak: linear warm-up, then a cosine down to LAST_RATE."""
    if progress < WARMUP:
        return max(progress / WARMUP, 1e-3)
    down = min((progress - WARMUP) / (1 - WARMUP), 1.0)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * down))


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, step: int) -> None:
    """averaged += (1 - decay) (model - averaged); the decay grows as (1 + step) / (10 + step), up to EMA_DECAY."""
    update = get_ema_multi_avg_fn(min(EMA_DECAY, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
    pairs = (pair for pair in zip(averaged.parameters(), model.parameters(), strict=True) if pair[1].requires_grad)
    update(*zip(*pairs, strict=True), step)  # what is frozen is the same
    for mine, theirs in zip(averaged.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def run(task: Task[Model], schedule: Schedule, folder: Path) -> Model:
    """Train, going on from `folder` if a state lies there; the averaged model that scored best.

    Writes `<task>-state.safetensors`, `<task>-best.safetensors`, `metrics.jsonl` and `<task>-<step>.png` there. On
    Ctrl-C or SIGTERM the state is saved, then KeyboardInterrupt goes on. UserError where memory, disk or another fails.
    """
    trainer = Trainer(task, schedule, folder)
    seed = schedule.options.seed
    with catch_interrupt() as interrupt, seeded(seed), trainer.bar, companions(), closing(trainer.batches()) as batches:
        for batch in batches:
            metrics = trainer.gradients(batch)
            metrics |= trainer.clip_and_step(rate(trainer.progress))
            average(trainer.averaged, trainer.modules["model"], trainer.step)
            trainer.advance()

            last = trainer.progress >= 1
            if last or trainer.step % schedule.log_every == 0:
                trainer.log(metrics)
            every = max(schedule.log_every, trainer.steps // schedule.evaluations)
            if last or trainer.step >= trainer.evaluated_at + every:
                trainer.evaluate(last)

            if trainer.evals_since_best >= schedule.options.patience:  # the best weights are on disk
                trainer.progress, last = 1.0, True
            stopped, time_to_save = trainer.vote(interrupt.is_set())
            if last or stopped or time_to_save:
                trainer.save()
            if stopped:
                trainer.say(f"stopped at step {trainer.step} of {trainer.steps}; the same command goes on from there")
                raise KeyboardInterrupt
            if last:
                break
    load_state(trainer.best_path, {"model": trainer.averaged})
    return trainer.averaged


class Trainer:
    """Everything that moves during a training, and how it is measured and saved."""

    def __init__(self, task: Task[Any], schedule: Schedule, folder: Path):
        self.task, self.schedule, self.folder = task, schedule, folder
        self.rank, self.ranks = processes().process_index, processes().num_processes
        self.device, self.main = processes().device, processes().is_main_process
        if schedule.batch < self.ranks:
            raise UserError(f"a batch of {schedule.batch} is too small for {self.ranks} processes: give each a sample")
        self.modules = {name: module.to(self.device).train() for name, module in task.modules.items()}
        if self.ranks > 1:  # the weights of the first: other machines may draw other random numbers
            for module in self.modules.values():
                broadcast([value.detach() for value in (*module.parameters(), *module.buffers())])
        self.averaged: Any = copy.deepcopy(self.modules["model"]).requires_grad_(False).eval()
        self.optimizers = {name: task.optimizer(name) for name in self.modules}
        self.step, self.progress, self.evaluated_at, self.micro_batches = 0, 0.0, 0, 1
        self.best_score, self.evals_since_best, self.latest = math.inf, 0, dict[str, float]()  # the last are metrics
        self.seconds_before = 0.0  # of learning, when the training was last stopped
        self.started, self.saved_at = schedule.clock(), time.monotonic()
        together(lambda: folder.mkdir(parents=True, exist_ok=True))
        self.state_path, self.best_path = (folder / f"{task.name}-{which}.safetensors" for which in ("state", "best"))
        if self.state_path.is_file():
            at = load_state(self.state_path, {**self.modules, "averaged": self.averaged}, self.optimizers)
            for name in SAVED:
                setattr(self, name, type(getattr(self, name))(at[name]))
            self.seconds_before = float(at["seconds"])
        check_same_start({"saved step": self.step})  # else they see folders of their own
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16, enabled=schedule.bf16)
        self.news, self.warm = News(), False  # whether a first step is done, in which what is compiled was
        self.clock = self.now = self.seconds_before  # when progress was last set, and what all think that the time is
        self.compiled = list(task.stages) if schedule.compiler else []
        for stage in self.compiled:
            stage.forward = torch.compile(stage.forward, dynamic=False, backend=schedule.compiler)
        silent = schedule.options.quiet or not self.main
        self.bar = tqdm(desc=task.name, total=self.steps, initial=self.step, mininterval=1, disable=silent)

    def batches(self) -> Generator[Any, None, None]:
        """The batches of the steps that are still to be done, and more: `run` knows when to stop."""
        size, steps = self.schedule.batch, itertools.count(self.step) if self.progress < 1 else ()
        low, high = (size * rank // self.ranks for rank in (self.rank, self.rank + 1))
        samples = (list(range(step * size + low, step * size + high)) for step in steps)
        return loaded(self.task.dataset, samples, self.schedule.workers, self.device.type == "cuda")

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """Leave the gradients of a batch, of which each process has a part, in the weights; the metrics of its loss.

        Where that part does not fit into memory, it goes through in halves from here on, which is no matter of other
        processes; UserError where it cannot be halved. What fails where it is compiled is done as it is: if that goes
        well it was the compiler's fault, which is said.
        """
        with complaint(f"{self.device} has too little memory beside the {self.task.name}", torch.cuda.OutOfMemoryError):
            batch = self.task.prepare(send_to_device(batch, self.device, non_blocking=True), self.step)
        whole, metrics, fault = total(self.task.weight(batch).float()), None, ""
        while metrics is None:
            try:
                metrics = self._own_gradients(batch, whole)
            except Exception as error:
                memory = "out of memory" in str(error)
                if isinstance(error, UserError) or not (memory or self.compiled):
                    raise
                fault = fault if memory else reason(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
            if metrics is None:  # outside the handler, which still holds the tensors of the failed step
                self._halve() if memory else self._go_uncompiled()
        if fault:
            print(f"the {self.task.name} cannot be compiled here, so it learns more slowly: {fault}", file=sys.stderr)
        add_up([p.grad for module in self.modules.values() for p in module.parameters() if p.grad is not None])
        return metrics

    def _own_gradients(self, batch: Any, whole: Tensor) -> dict[str, Tensor]:
        """`whole` is the weight of the batch over all processes."""
        seed = self.schedule.options.seed * 1_000_003 + self.step
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed * 131 + self.rank)  # of dropout
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, Tensor] = {}
        for part in micro_batches(batch, self.micro_batches):
            share = self.task.weight(part) / whole
            with self.autocast():
                loss, found = self.task.loss(part, self.progress, generator)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            share = share * self.ranks  # as a log has means over processes
            metrics = {name: metrics.get(name, 0) + value.detach() * share for name, value in found.items()}
        return metrics

    def _halve(self) -> None:
        size = -(-self.schedule.batch // (self.micro_batches * self.ranks))
        if not (self.task.divisible and size > 1):
            too_little = f"{self.device} has too little memory for {size} samples at once"
            raise UserError(f"{too_little}; a smaller batch, a smaller model or the CPU is wanted")
        self.micro_batches *= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"out of memory: going on with {-(-size // 2)} samples at once", file=sys.stderr)

    def _go_uncompiled(self) -> None:
        for stage in self.compiled:
            del stage.forward  # of the object; that of its class is there again
        self.compiled = []

    def clip_and_step(self, rate: float) -> dict[str, Tensor]:
        """Move the weights at that share of the peak learning rates; the norms of their gradients, as metrics."""
        norms = {}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate
            norms[f"{name}_gradient"] = nn.utils.clip_grad_norm_(self.modules[name].parameters(), GRADIENT_NORM)
            optimizer.step()
        return norms

    def advance(self) -> None:
        """One step further: by the number of steps, or by the clock where the time is limited. Then the first step
        after a start, in which stages are compiled, is no progress, and the rest is spread over the time that is left.
        """
        self.step += 1
        if self.schedule.seconds == math.inf:
            self.progress = self.step / self.schedule.steps
        else:
            now = self.seconds if self.ranks == 1 else self.now
            gone = (now - self.clock) / max(self.schedule.seconds - self.clock, 1e-9)  # of the time that was left
            if self.warm or gone >= 1:
                self.progress += (1 - self.progress) * min(gone, 1.0)
            self.warm = self.warm or now > self.clock  # several processes hear of it a step later
            self.clock, self.bar.total = now, self.steps
        self.bar.update()

    def vote(self, stop: bool) -> tuple[bool, bool]:
        """Whether to stop, as some process wants to, and whether it is time to save. Several processes act on what was
        said a step ago, so that no step waits for the news."""
        save = self.main and time.monotonic() > self.saved_at + 60 * self.schedule.options.save_minutes
        stopped, time_to_save, self.now = self.news(stop, save, self.seconds if self.ranks > 1 else 0.0)
        return stopped > 0, time_to_save > 0

    @property
    def seconds(self) -> float:
        """Of learning and evaluating, also before the training was stopped and started again."""
        return self.seconds_before + self.schedule.clock() - self.started

    @property
    def steps(self) -> int:
        """In all; a guess at the pace so far where the time is limited."""
        return round(self.step / self.progress) if self.progress else self.schedule.steps

    def log(self, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl: means over all processes."""
        found = zip(metrics, agreed(*map(float, metrics.values())), strict=True)
        values = {name: round(value, 5) for name, value in found}
        self.latest |= values
        if self.main:
            line = {"stage": self.task.name, "step": self.step, "time": round(time.time(), 1)} | values
            append_line(self.folder / "metrics.jsonl", json.dumps(line))
            self.bar.set_postfix({name: f"{value:.3f}" for name, value in list(values.items())[:3]}, refresh=False)

    def say(self, sentence: str) -> None:
        """Above the progress line, where it stays."""
        if not self.bar.disable:
            self.bar.write(sentence, file=sys.stderr)

    def evaluate(self, last: bool) -> None:
        """Measure the averaged model, paint a sheet, keep the weights if they are the best so far, and warn."""
        self.evaluated_at = self.step
        with self.autocast():
            metrics = self.task.measure(self.averaged, self.progress)
        metrics = dict(zip(metrics, agreed(*metrics.values()), strict=True))  # to the last bit
        better = metrics.get("score", math.inf) < self.best_score or (last and self.best_score == math.inf)
        if "score" in metrics:
            self.evals_since_best = 0 if better else self.evals_since_best + 1
            self.best_score = min(self.best_score, metrics["score"])

        def keep() -> None:
            if (sheet := self.task.sheet(self.averaged)) is not None:
                write_picture(sheet, self.folder / f"{self.task.name}-{self.step:07d}.png", force=True)
            if better:
                found = {"metrics": json.dumps({name: round(value, 5) for name, value in metrics.items()})}
                save_state(self.best_path, {"model": self.averaged}, {}, self._metadata() | found)

        together(keep, only_main=True)
        self.log(metrics)
        for sentence in self.task.warnings(self.progress, self.latest):
            self.say(f"warning: {sentence}")

    def save(self) -> None:
        """Write down all that is needed to go on from here."""
        modules = {**self.modules, "averaged": self.averaged}
        together(lambda: save_state(self.state_path, modules, self.optimizers, self._metadata()), only_main=True)
        self.saved_at = time.monotonic()

    def _metadata(self) -> dict[str, str]:
        return {name: str(getattr(self, name)) for name in (*SAVED, "seconds")}
