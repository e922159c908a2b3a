"""The folder of a training: where it lies, what it remembers of how it was begun, what its states say."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from torch import nn

from igpt import checkpoint
from igpt.atomic import whole
from igpt.device import fast_bf16
from tokenizer_vq.base import UserError

from .loop import Stage
from .options import LearningOptions
from .state import peek

WORK = "training"  # the folder inside the model folder that a training can resume from


def work_folder(out: Path, stage: str | None) -> Path:
    """Where the training keeps its state. Raises UserError if `out` cannot become a model folder; makes nothing yet."""
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"the model cannot be written to {out}: {parent} is no folder that can be written to")
    if out.is_dir() and any(out.iterdir()) and not (out / WORK).is_dir():
        if not (out / checkpoint.CONFIG).is_file():
            raise UserError(f"{out} holds something else than a model; a new or empty folder is wanted")
        if stage != "gpt" or checkpoint.load(out).gpt is not None:
            raise UserError(f"{out} already holds a finished model; a new or empty folder is wanted")
    return out / WORK


def remember(work: Path, now: dict[str, Any]) -> None:
    """Write down what is trained on and how. Raises UserError if the folder remembers something else."""
    path = work / "options.json"
    free = {"quiet", "workers", "save_minutes", "precision"}  # may change between runs
    if path.is_file():
        try:
            before = dict(json.loads(path.read_text(encoding="utf-8")))
            before["art"], before["options"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged; delete it to go on, or use another --out") from error
        if before["art"] != now["art"]:
            raise UserError(f"{work.parent} is being trained on other pictures (or some changed); use another --out")
        changed = [k for k, v in now["options"].items() if k not in free and before["options"].get(k) != v]
        if before.get("stage") == now["stage"] and changed:
            name = changed[0]
            raise UserError(
                f"{work.parent} was begun with {name.replace('_', '-')} {before['options'].get(name)}, now it is "
                f"{now['options'][name]}; use the same options to go on, or another --out"
            )
    try:
        work.mkdir(parents=True, exist_ok=True)
        with whole(path) as beside:
            beside.write_text(json.dumps(now, indent=2), encoding="utf-8")
    except OSError as error:
        raise UserError(f"the training cannot be written to {work}: {error.strerror}") from error


def weights_fingerprint(module: nn.Module) -> str:
    """A hash of all weights: a token cache is good for one tokenizer only."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def numbers_of(stage: Stage, batch: int, work: Path) -> dict[str, Any]:
    """What is known of a stage, also of one that is not through: its best measurement, and what it has seen."""
    best, state = (peek(state_file(work, stage, which)) for which in ("best", "state"))
    last = max(state, best, key=lambda told: int(told.get("step", 0)))  # the state may be older than the best, or none
    kept = best.keys() - {"steps", "looked", "stale", "best_score", "score", "seconds", "identity"}
    numbers: dict[str, Any] = {k: float(best[k]) for k in sorted(kept)}
    return numbers | {"samples": int(last["step"]) * batch, "batch": batch, "seconds": float(last["seconds"])}


def state_file(work: Path, stage: Stage, which: str) -> Path:
    """Where the loop keeps the "best" averaged weights of a stage, and its "state"."""
    return work / f"{stage.name}-{which}.safetensors"


def precision_of(options: LearningOptions) -> str:
    """What accelerate is told: "bf16" or "no"."""
    if options.precision == "auto":
        return "bf16" if fast_bf16() else "no"
    return "bf16" if options.precision == "bf16" else "no"


def command_line() -> str:
    return "igpt " + " ".join(shlex.quote(word) for word in sys.argv[1:])


def say(sentence: str, options: LearningOptions) -> None:
    if not options.quiet:
        print(sentence, file=sys.stderr)
