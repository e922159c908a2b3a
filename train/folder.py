"""The folder of a training: what a run is about, what it was begun with, what its states say."""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from igpt import checkpoint
from igpt.device import fast_bf16
from igpt.evaluation.perceptual import Distance, perceptual
from igpt.files import atomic_write, check_writable
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder

from . import loop
from .loop import Schedule, Task
from .options import LearningOptions, Preset, TrainOptions
from .shards import ArtShards
from .state import peek

WORK = "training"  # the folder inside the model folder that a training can resume from
FREE = {"quiet", "workers", "save_minutes", "precision"}  # options that may change between runs


@dataclass(frozen=True)
class Run:
    """What one `igpt train` is about, for all its stages."""

    art: ArtFolder | ArtShards
    train: Sequence[int]  # numbers of the pictures to learn from
    val: list[int]  # and of those that are held out
    preset: Preset
    options: TrainOptions
    work: Path

    @cached_property
    def perceptual(self) -> Distance:
        """What judges reconstructions."""
        return perceptual(self.options.perceptual)

    def learn(self, task: Task, samples: int, batch: int, identity: str) -> tuple[nn.Module, dict[str, Any]]:
        """Learn a task on what `identity` names; the best averaged model and its numbers on held-out pictures."""
        schedule = replace(schedule_for(samples, batch, self.options), workers=self.options.workers)
        model = loop.run(task, schedule, self.work, {"identity": identity})
        return model, numbers_of(task, batch, self.work)


def work_folder(out: Path, stage: str | None) -> Path:
    """Where the training keeps its state. Raises UserError if `out` cannot become a model folder; makes nothing yet."""
    check_writable(out)
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        if not (out / checkpoint.CONFIG).is_file():
            raise UserError(f"{out} holds something else than a model; a new or empty folder is wanted")
        if stage != "gpt" or checkpoint.load(out).gpt is not None:
            raise UserError(f"{out} already holds a finished model; a new or empty folder is wanted")
    return out / WORK


def remember(work: Path, now: dict[str, Any]) -> None:
    """Write down what is trained on and how. Raises UserError if the folder remembers something else."""
    path = work / "options.json"
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
            art, options = before["art"], before["options"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged; delete it to go on, or use another --out") from error
        if art != now["art"]:
            raise UserError(f"{work.parent} is being trained on other pictures (or some changed); use another --out")
        changed = [name for name, value in now["options"].items() if name not in FREE and options.get(name) != value]
        if before.get("stage") == now["stage"] and changed:
            name = changed[0]
            raise UserError(
                f"{work.parent} was begun with {name.replace('_', '-')} {options.get(name)}, now it is "
                f"{now['options'][name]}; use the same options to go on, or another --out"
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(json.dumps(now, indent=2), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the training cannot be written to {work}: {error.strerror}") from error


def weights_fingerprint(module: nn.Module) -> str:
    """A hash of all weights: a token cache is good for one tokenizer only."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def state_file(work: Path, task: Task, which: str) -> Path:
    """Where the loop keeps the "best" averaged weights of a task, and its "state"."""
    return work / f"{task.name}-{which}.safetensors"


def numbers_of(task: Task, batch: int, work: Path) -> dict[str, Any]:
    """What is known of a task, also of one that is not through: its best measurement, and what it has seen."""
    best, state = (peek(state_file(work, task, which)) for which in ("best", "state"))
    last = max(state, best, key=lambda at: int(at.get("step", 0)))  # the state may be older than the best, or missing
    metrics = {name: value for name, value in json.loads(best["metrics"]).items() if name != "score"}
    return metrics | {"samples": int(last["step"]) * batch, "batch": batch, "seconds": float(last["seconds"])}


def schedule_for(samples: int, batch: int, options: LearningOptions) -> Schedule:
    return Schedule(
        -(-samples // batch),
        batch,
        60 * options.save_minutes,
        options.patience,
        options.seed,
        use_bf16(options),
        quiet=options.quiet,
    )


def use_bf16(options: LearningOptions) -> bool:
    return fast_bf16() if options.precision == "auto" else options.precision == "bf16"


def command_line() -> str:
    return "igpt " + " ".join(shlex.quote(word) for word in sys.argv[1:])


def say(sentence: str, options: LearningOptions) -> None:
    if not options.quiet:
        print(sentence, file=sys.stderr)
