"""`igpt train`: from a folder of art to a model folder. Started again with the same words, it goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from igpt import checkpoint
from igpt.atomic import whole
from igpt.device import fast_bf16, keep_freed_memory, pick_device
from igpt.model import GPT
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer

from .card import model_card
from .decoder import DecoderStage, FrozenCodes
from .gpt import GPTStage
from .loop import Schedule, Stage, run
from .losses import perceptual
from .options import Preset, TrainOptions
from .state import load_state, peek
from .tokenizer import TokenizerStage
from .tokens import encode

WORK = "training"  # the folder inside the model folder that a training can resume from
RECONSTRUCTIONS = "reconstructions.png"  # in it: held-out pictures above what the finished tokenizer makes of them


def train(stage: str | None, art: str | Path, out: str | Path, options: TrainOptions) -> Path:
    """Train "tokenizer", "gpt", or with None both, on the pictures in `art`, and write a model folder to `out`.

    `train("gpt")` takes the tokenizer from `options.tokenizer` or from the model already in `out`. Raises UserError on
    unusable art or options, and where `out` holds something else.
    """
    options.resolved()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = _work_folder(out, stage)
    collection = ArtFolder(art, manifest=options.manifest)
    told, held_out = collection.split()
    if len(told) < 2 or collection.different < 3:
        raise UserError(f"{art} has {collection.different} different usable pictures; 3 or more are wanted")
    # Whatever is wrong with other models or weights is said before anything is written.
    source = options.tokenizer or (str(out) if stage == "gpt" else None)
    given = checkpoint.load(source).tokenizer if source else None
    if options.start_from:
        checkpoint.load(options.start_from)
    perceptual(options.perceptual)
    _say(f"{len(collection)} pictures: {len(told)} to learn from, {len(held_out)} held out, "
         f"{len(collection.labels)} labels; {len(collection.skipped)} skipped", options)  # fmt: skip
    _report_skipped(collection, options)
    side = int(median(min(size) for size in collection.sizes))
    preset = options.suited(len(told), side, given.downsample if given else None)
    if not (options.perceptual or given):
        _say("no --perceptual weights: reconstructions are judged by edges and SSIM instead of LPIPS", options)
    _remember(work, {"art": collection.fingerprint, "stage": stage, "options": asdict(options)})
    tokenizer, numbers = _tokenizer(source, collection, told, held_out, preset, options, work)
    provenance: dict[str, Any] = {
        "pictures": len(told), "held_out": len(held_out), "art_fingerprint": collection.fingerprint,
        "trained": date.today().isoformat(), "command": _command(), "options": asdict(options),
        "machine": f"{platform.machine()}, {'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}",
        "tokenizer": numbers,
    }  # fmt: skip
    if stage == "tokenizer":
        checkpoint.save(out, tokenizer, None, collection.labels, provenance)
        return out
    device = pick_device()
    identity = f"{collection.fingerprint}/{_fingerprint(tokenizer)}/{options.views}/{options.flip}/{preset.cells}"
    cache = encode(
        collection, tokenizer, work / "tokens.safetensors", cells=preset.cells, views=options.views, flip=options.flip,
        identity=identity, device=device, bf16=_precision(options) == "bf16", save_seconds=60 * options.save_minutes,
        quiet=options.quiet,
    )  # fmt: skip
    gpt_stage = GPTStage(cache, tokenizer, collection.labels, told, held_out, preset, options)
    try:
        gpt, provenance["gpt"] = _learn(gpt_stage, preset.gpt_samples, preset.gpt_batch, options, work, identity)
    except KeyboardInterrupt:
        if (best := _file(work, gpt_stage, "best")).is_file():  # what was learned so far can be drawn with
            load_state(best, {"model": gpt_stage.modules["model"]}, {})
            provenance["gpt"] = _numbers(gpt_stage, preset.gpt_batch, work)
            _finish(out, tokenizer, gpt_stage.modules["model"], collection.labels, provenance, options)
        raise
    _finish(out, tokenizer, gpt, collection.labels, provenance, options)
    return out


# Parts


def _finish(
    out: Path, tokenizer: checkpoint.Tokenizer, gpt: nn.Module, labels: list[str], provenance: dict[str, Any],
    options: TrainOptions,
) -> None:  # fmt: skip
    """Write the model folder."""
    assert isinstance(gpt, GPT)
    checkpoint.save(out, tokenizer, gpt, labels, provenance, model_card(out.name, provenance, labels))
    _say(f"the model is in {out}: draw with `igpt generate --model {out}`", options)

# Parts


def _tokenizer(
    source: str | None, collection: ArtFolder, told: list[int], held_out: list[int], preset: Preset,
    options: TrainOptions, work: Path,
) -> tuple[checkpoint.Tokenizer, dict[str, Any]]:  # fmt: skip
    """The tokenizer to go on with, and what is known of it: taken from the model `source`, or trained here."""
    if source:
        found = checkpoint.load(source)
        made = {"from": Path(source).name, "command": found.provenance.get("command", "unknown")}
        return found.tokenizer, made | found.provenance.get("tokenizer", {})
    _say(f"tokenizer: {preset.codes} codes of {preset.downsample}x{preset.downsample} pixels, {options.quantizer}; "
         f"{preset.tokenizer_crops:,} crops of {preset.crop} pixels a side, then {preset.decoder_crops:,} for the "
         f"decoder alone; reconstructions to look at appear in {work}", options)  # fmt: skip
    first = TokenizerStage(collection, told, held_out, preset, options)
    batch, identity = preset.tokenizer_batch, collection.fingerprint
    tokenizer, numbers = _learn(first, preset.tokenizer_crops, batch, options, work, identity)
    assert isinstance(tokenizer, VQTokenizer)
    if preset.decoder_crops:
        last = DecoderStage(collection, told, held_out, preset, options, tokenizer)
        model, later = _learn(last, preset.decoder_crops, batch, options, work, f"{identity}/{_fingerprint(tokenizer)}")
        assert isinstance(model, FrozenCodes)
        tokenizer = model.tokenizer
        numbers |= {"decoder_samples": later["samples"], "seconds": numbers["seconds"] + later["seconds"]}
    first.sheet(tokenizer).save(work / RECONSTRUCTIONS)
    return tokenizer, numbers | first.measure_all(tokenizer)


def _learn(
    stage: Stage, samples: int, batch: int, options: TrainOptions, work: Path, identity: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Run one stage on what `identity` names; the best averaged model and its numbers on held-out pictures."""
    schedule = Schedule(
        max(1, samples // batch), batch, 60 * options.save_minutes, options.patience, options.seed,
        _precision(options), options.workers, options.quiet,
    )  # fmt: skip
    model = run(stage, schedule, work, {"identity": identity})
    return model, _numbers(stage, batch, work)


def _numbers(stage: Stage, batch: int, work: Path) -> dict[str, Any]:
    """What is known of a stage, also of one that is not through: its best measurement, and what it has seen."""
    best, last = (peek(_file(work, stage, which)) for which in ("best", "state"))
    kept = best.keys() - {"stale", "best_score", "score", "seconds", "identity"}
    numbers: dict[str, Any] = {k: float(best[k]) for k in sorted(kept)}
    return numbers | {"samples": int(last["step"]) * batch, "batch": batch, "seconds": float(last["seconds"])}


def _file(work: Path, stage: Stage, which: str) -> Path:
    """Where the loop keeps the "best" averaged weights of a stage, and its "state"."""
    return work / f"{stage.name}-{which}.safetensors"


def _precision(options: TrainOptions) -> str:
    """What accelerate is told: "bf16" or "no"."""
    if options.precision == "auto":
        return "bf16" if fast_bf16() else "no"
    return "bf16" if options.precision == "bf16" else "no"


# The model folder


def _work_folder(out: Path, stage: str | None) -> Path:
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


def _remember(work: Path, now: dict[str, Any]) -> None:
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


def _report_skipped(collection: ArtFolder, options: TrainOptions) -> None:
    """Say which files were passed over, and why."""
    for skipped in collection.skipped[:10]:
        _say(f"skipped: {skipped.name} {skipped.reason}", options)
    if len(collection.skipped) > 10:
        _say(f"... and {len(collection.skipped) - 10} more", options)


def _fingerprint(tokenizer: checkpoint.Tokenizer) -> str:
    """A hash of all weights: a token cache is good for one tokenizer only."""
    digest = hashlib.sha256()
    for value in tokenizer.state_dict().values():
        digest.update(value.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _command() -> str:
    return "igpt " + " ".join(shlex.quote(word) for word in sys.argv[1:])


def _say(sentence: str, options: TrainOptions) -> None:
    if not options.quiet:
        print(sentence, file=sys.stderr)
