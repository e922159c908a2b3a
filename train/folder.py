"""One training: its pictures, its options, and the folder from which it can go on."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from filelock import FileLock, Timeout
from torch import nn

from igpt import checkpoint
from igpt.device import fast_bf16, pick_device
from igpt.files import atomic_write, check_writable
from tokenizer_vq.archives import Skipped
from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.dataset import ArtFolder

from . import loop
from .crops import DevicePictures
from .loop import Model, Schedule, Task
from .options import PRESETS, LearningOptions, Preset, TrainOptions
from .processes import processes, together
from .state import peek

WORK = "training"  # the folder inside the model folder that a training can resume from
FREE_OPTIONS = {"quiet", "workers", "save_minutes", "precision"}  # they may change between runs
GPU_WORKERS = 8  # processes that load samples for a GPU, at most
LISTED_FILES = 10  # skipped files that are named on the screen

Options = TypeVar("Options", bound=LearningOptions)


@dataclass(frozen=True)
class Run(Generic[Options]):
    """What one `igpt train` or `igpt finetune` is about, for all its stages."""

    art: ArtFolder
    train: Sequence[int]  # numbers of the pictures to learn from
    val: Sequence[int]  # and of those that are held out
    options: Options
    work: Path
    preset: Preset = PRESETS["small"]
    limits: dict[str, float] = field(default_factory=dict)  # seconds of learning, by the name of the task
    pictures: DevicePictures | None = None  # those to learn from, where they lie on the device

    def say(self, sentence: str) -> None:
        """On the screen, unless it is to be quiet."""
        if not self.options.quiet and processes().is_main_process:
            print(sentence, file=sys.stderr)

    def describe(self, skipped: Sequence[Skipped]) -> None:
        """Say how many pictures there are, and which files were passed over and why."""
        train, val, labels = len(self.train), len(self.val), len(self.art.labels)
        counts = f"{train} to learn from, {val} held out, {labels} label{'s' * (labels != 1)}; {len(skipped)} skipped"
        self.say(f"{train + val} pictures: {counts}")
        for each in skipped[:LISTED_FILES]:
            self.say(f"skipped: {each.name} {each.reason}")
        if len(skipped) > LISTED_FILES:
            self.say(f"... and {len(skipped) - LISTED_FILES} more")

    def say_if_locked(self, model: str | None) -> None:
        """That what is learned from a locked model lies open."""
        if model and checkpoint.find(model).is_file():
            out = str(self.work.parent)
            again = f"igpt lock {shlex.quote(out)} --out {shlex.quote(out + '.age')}"
            self.say(f"{model} is locked, but the new model is written open: `{again}` locks it")

    def check_same_run(self, command: str, **more: Any) -> None:
        """Write down what is trained on and how. Raises UserError if the folder is of another run."""
        path, out = self.work / "options.json", self.work.parent
        options, old = {"command": command} | asdict(self.options) | more, dict[str, Any]()
        if before := read_json(path):
            if before.get("art") != self.art.fingerprint:
                raise UserError(f"{out} is being trained on other pictures (or some changed); use another --out")
            old = dict(before.get("options", {}))
            for name in options:
                if name not in FREE_OPTIONS and old.get(name, options[name]) != options[name]:
                    change = f"{name.replace('_', '-')} {old.get(name)}, now it is {options[name]}"
                    raise UserError(f"{out} was started with {change}; the same are wanted, or another --out")
        write_json(path, {"art": self.art.fingerprint, "options": old | options})

    @property
    def bf16(self) -> bool:
        """Whether it computes in bfloat16."""
        return fast_bf16() if self.options.precision == "auto" else self.options.precision == "bf16"

    def learn(self: Run[TrainOptions], task: Task[Model], samples: int, batch: int) -> tuple[Model, dict[str, Any]]:
        """Learn a task; the best averaged model and its numbers on held-out pictures."""
        steps, seconds = -(-samples // batch), self.limits.get(task.name, math.inf)
        workers, cuda = self.options.workers, pick_device().type == "cuda"
        if workers is None:
            workers = min(GPU_WORKERS, (os.cpu_count() or 1) // torch.cuda.device_count()) if cuda else 0
        compiler = "inductor" if cuda else None
        schedule = Schedule(self.options, steps, batch, self.bf16, seconds, compiler, workers)
        return loop.run(task, schedule, self.work), self.numbers(task.name, batch)

    def state_file(self, task: str, which: str) -> Path:
        """Where the loop keeps the "best" averaged weights of a task, and its "state"."""
        return self.work / f"{task}-{which}.safetensors"

    def numbers(self, task: str, batch: int) -> dict[str, Any]:
        """What is known of a task, also of one that is not through: its best measurement, and what it has seen."""
        best, state = (peek(self.state_file(task, which)) for which in ("best", "state"))
        last = max(state, best, key=lambda at: int(at.get("step", 0)))  # the state may be older, or missing
        metrics = {name: value for name, value in json.loads(best["metrics"]).items() if name != "score"}
        return metrics | {"samples": int(last["step"]) * batch, "batch": batch, "seconds": float(last["seconds"])}

    def provenance(self) -> dict[str, Any]:
        """What a finished model says of how it was made."""
        return {
            "pictures": len(self.train),
            "held_out": len(self.val),
            "art_fingerprint": self.art.fingerprint,
            "trained": date.today().isoformat(),
            "command": command_line(),
            "options": asdict(self.options),
            "machine": f"{platform.machine()}, {pick_device().type}, torch {torch.__version__}",
        }


def work_folder(out: Path) -> Path:
    """Where the training keeps its state. Raises UserError if `out` cannot become a model folder; makes nothing yet."""
    check_writable(out)
    if str(out) != str(out).encode("utf-8", "replace").decode("utf-8"):  # safetensors would open nothing there
        raise UserError(f"the name {str(out)!r} is no UTF-8; another --out is wanted")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        there = "a finished model already" if (out / checkpoint.CONFIG).is_file() else "something else than a model"
        raise UserError(f"{out} holds {there}; a new or empty folder is wanted")
    return out / WORK


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """A block in which no other process trains in the folder; the lock of one that died is free.

    Raises UserError, which names the process, where another holds it. Of several processes of one training the first
    one holds it for all.
    """
    work.mkdir(parents=True, exist_ok=True)
    lock, holder = FileLock(work / "lock"), work / "process"

    def claim() -> None:
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            number = holder.read_text() if holder.is_file() else "unknown"
            sentence = f"{work.parent} is being trained by process {number}; wait for it, or use another --out"
            raise UserError(sentence) from error
        holder.write_text(str(os.getpid()))

    together(claim, only_main=True)
    try:
        yield
    finally:
        if lock.is_locked:
            holder.unlink(missing_ok=True)
            lock.release()


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; nothing where there is no file. Raises UserError where it is damaged."""
    sentence = f"{path} is damaged, delete it to go on, or use another --out"
    with complaint(sentence, OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """A whole file or none. Raises UserError when the disk refuses."""
    with atomic_write(path) as part:
        part.write_text(json.dumps(values, indent=2), encoding="utf-8")


def weights_fingerprint(module: nn.Module) -> str:
    """A hash of all weights: a token cache is good for one tokenizer only."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def command_line() -> str:
    """What was typed, ready to be pasted."""
    program = Path(sys.argv[0])
    return shlex.join(["igpt", *sys.argv[1:]] if program.stem in ("igpt", "__main__") else ["python", *sys.argv])
