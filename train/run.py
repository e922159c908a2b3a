"""`igpt train`: from a folder of art to a model folder. Started again with the same words, it goes on."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from igpt import checkpoint
from igpt.cpu import keep_freed_memory
from igpt.device import pick_device
from igpt.evaluation.perceptual import LPIPS, EncoderDistance, perceptual
from igpt.model import GPT
from igpt.sizes import Grids
from igpt.token_cache import TokenCache
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.vq import VQTokenizer

from .card import model_card
from .decoder import DecoderStage, FrozenCodes
from .folder import (
    command_line,
    numbers_of,
    precision_of,
    remember,
    say,
    state_file,
    weights_fingerprint,
    work_folder,
)
from .gpt import GPTStage, new_gpt
from .loop import Schedule, Stage, run
from .options import Preset, TrainOptions
from .state import load_state
from .tokenizer import TokenizerStage
from .tokens import encode, view_of

RECONSTRUCTIONS = "reconstructions.png"  # in it: held-out pictures above what the finished tokenizer makes of them


def train(stage: str | None, art: str | Path, out: str | Path, options: TrainOptions) -> Path:
    """Train "tokenizer", "gpt", or with None both, on the pictures in `art`, and write a model folder to `out`.

    `train("gpt")` takes the tokenizer from `options.tokenizer` or from the model already in `out`. `train("decoder")`
    goes on with the decoder of the model `options.tokenizer`, whose codes and GPT stay. Raises UserError on unusable
    art or options, and where `out` holds something else.
    """
    options.resolved()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out, stage)
    collection = ArtFolder(art, manifest=options.manifest)
    told, held_out = collection.split()
    if len(told) < 2 or collection.different < 3:
        raise UserError(f"{art} has {collection.different} different usable pictures; 3 or more are wanted")
    # Whatever is wrong with other models or weights is said before anything is written.
    source = options.tokenizer or (str(out) if stage == "gpt" else None)
    found = checkpoint.load(source) if source else None
    given = found.tokenizer if found else None
    if stage == "decoder" and not isinstance(given, VQTokenizer):
        raise UserError("train decoder wants a model with a VQ tokenizer: --tokenizer MODEL")
    judge = perceptual(options.perceptual)
    say(f"{len(collection)} pictures: {len(told)} to learn from, {len(held_out)} held out, "
        f"{len(collection.labels)} labels; {len(collection.skipped)} skipped", options)  # fmt: skip
    _report_skipped(collection, options)
    side = int(median(min(size) for size in collection.sizes))
    preset = options.suited(len(told), side, given.downsample if given else None)
    if not isinstance(judge, LPIPS) and (stage == "decoder" or not given):
        what = f"the encoder of {options.perceptual}" if isinstance(judge, EncoderDistance) else "edges and SSIM alone"
        say(f"no LPIPS weights: reconstructions are judged by {what}", options)
    remember(work, {"art": collection.fingerprint, "stage": stage, "options": asdict(options)})
    if stage == "decoder":
        assert found is not None
        return _repainted(found, out, collection, told, held_out, preset, options, work)
    tokenizer, numbers = _tokenizer(source, collection, told, held_out, preset, options, work)
    provenance: dict[str, Any] = {
        "pictures": len(told), "held_out": len(held_out), "art_fingerprint": collection.fingerprint,
        "trained": date.today().isoformat(), "command": command_line(), "options": asdict(options),
        "machine": f"{platform.machine()}, {'cuda' if torch.cuda.is_available() else 'cpu'}, torch {torch.__version__}",
        "tokenizer": numbers,
    }  # fmt: skip
    if found and "decoder" in found.provenance:
        provenance["decoder"] = found.provenance["decoder"]
    if stage == "tokenizer":
        checkpoint.save(out, tokenizer, None, collection.labels, provenance)
        return out
    _gpt(out, tokenizer, collection, told, held_out, preset, options, work, provenance)
    return out


def _gpt(
    out: Path, tokenizer: checkpoint.Tokenizer, collection: ArtFolder, told: list[int], held_out: list[int],
    preset: Preset, options: TrainOptions, work: Path, provenance: dict[str, Any],
) -> None:  # fmt: skip
    """The GPT on the tokens of all pictures, and the finished model; Ctrl-C leaves the model so far."""
    cache, identity = encoded(collection, tokenizer, preset, options, work)
    gpt = new_gpt(tokenizer, len(collection.labels), preset, options)
    gpt_stage = GPTStage(cache, tokenizer, collection.labels, told, held_out, gpt, options, options.gpt_lr)
    try:
        learned, provenance["gpt"] = _learn(gpt_stage, preset.gpt_samples, preset.gpt_batch, options, work, identity)
    except KeyboardInterrupt:
        if (best := state_file(work, gpt_stage, "best")).is_file():  # what was learned so far can be drawn with
            load_state(best, {"model": gpt_stage.modules["model"]}, {})
            provenance["gpt"] = numbers_of(gpt_stage, preset.gpt_batch, work)
            _finish(out, tokenizer, gpt_stage.modules["model"], collection.labels, provenance, options)
        raise
    _finish(out, tokenizer, learned, collection.labels, provenance, options)


def _repainted(
    model: checkpoint.Checkpoint, out: Path, collection: ArtFolder, told: list[int], held_out: list[int],
    preset: Preset, options: TrainOptions, work: Path,
) -> Path:  # fmt: skip
    """The model with a decoder that learned more, in `out`."""
    assert isinstance(model.tokenizer, VQTokenizer)
    say(f"decoder: {preset.decoder_crops:,} crops of {preset.crop} pixels a side; reconstructions appear in {work}",
        options)  # fmt: skip
    tokenizer, numbers = _decoder(model.tokenizer, collection, told, held_out, preset, options, work)
    before = model.provenance.get("tokenizer", {})
    for name in ("decoder_samples", "seconds"):
        numbers[name] += before.get(name, 0)
    provenance = model.provenance | {
        "decoder": {"trained": date.today().isoformat(), "command": command_line()}, "tokenizer": before | numbers,
    }  # fmt: skip
    card = model_card(out.name, provenance, model.labels) if model.gpt is not None else None
    checkpoint.save(out, tokenizer, model.gpt, model.labels, provenance, card)
    return out


def _finish(
    out: Path, tokenizer: checkpoint.Tokenizer, gpt: nn.Module, labels: list[str], provenance: dict[str, Any],
    options: TrainOptions,
) -> None:  # fmt: skip
    """Write the model folder."""
    assert isinstance(gpt, GPT)
    checkpoint.save(out, tokenizer, gpt, labels, provenance, model_card(out.name, provenance, labels))
    say(f"the model is in {out}: draw with `igpt generate --model {out}`", options)


def encoded(
    collection: ArtFolder, tokenizer: checkpoint.Tokenizer, preset: Preset, options: TrainOptions, work: Path
) -> tuple[TokenCache, str]:
    """All pictures in tokens, and what names them: these pictures, this tokenizer, these views."""
    grids = Grids(tokenizer.downsample, preset.cell, preset.cells)
    identity = f"{collection.fingerprint}/{weights_fingerprint(tokenizer)}/{options.views}/{options.flip}/{grids}"

    def view(picture: Image, _: int, number: int) -> Tensor:
        return view_of(picture, number, grids, options.flip)

    cache = encode(
        collection, tokenizer, work / "tokens.safetensors", view_of=view, views=options.views, identity=identity,
        device=pick_device(), bf16=precision_of(options) == "bf16", save_seconds=60 * options.save_minutes,
        quiet=options.quiet,
    )  # fmt: skip
    return cache, identity


def _tokenizer(
    source: str | None, collection: ArtFolder, told: list[int], held_out: list[int], preset: Preset,
    options: TrainOptions, work: Path,
) -> tuple[checkpoint.Tokenizer, dict[str, Any]]:  # fmt: skip
    """The tokenizer to go on with, and what is known of it: taken from the model `source`, or trained here."""
    if source:
        found = checkpoint.load(source)
        made = {"from": Path(source).name, "command": found.provenance.get("command", "unknown")}
        return found.tokenizer, made | found.provenance.get("tokenizer", {})
    say(f"tokenizer: {preset.codes} codes of {preset.downsample}x{preset.downsample} pixels; "
         f"{preset.tokenizer_crops:,} crops of {preset.crop} pixels a side, then {preset.decoder_crops:,} for the "
         f"decoder alone; reconstructions to look at appear in {work}", options)  # fmt: skip
    first = TokenizerStage(collection, told, held_out, preset, options)
    batch, identity = preset.tokenizer_batch, collection.fingerprint
    tokenizer, numbers = _learn(first, preset.tokenizer_crops, batch, options, work, identity)
    assert isinstance(tokenizer, VQTokenizer)
    if preset.decoder_crops:
        tokenizer, later = _decoder(tokenizer, collection, told, held_out, preset, options, work)
        return tokenizer, numbers | later | {"seconds": numbers["seconds"] + later["seconds"]}
    first.sheet(tokenizer).save(work / RECONSTRUCTIONS)
    return tokenizer, numbers | first.measure_all(tokenizer)


def _decoder(
    tokenizer: VQTokenizer, collection: ArtFolder, told: list[int], held_out: list[int], preset: Preset,
    options: TrainOptions, work: Path,
) -> tuple[VQTokenizer, dict[str, Any]]:  # fmt: skip
    """The tokenizer with a decoder that went on learning on frozen codes, and its numbers."""
    stage = DecoderStage(collection, told, held_out, preset, options, tokenizer)
    identity = f"{collection.fingerprint}/{weights_fingerprint(tokenizer)}"
    model, numbers = _learn(stage, preset.decoder_crops, preset.tokenizer_batch, options, work, identity)
    assert isinstance(model, FrozenCodes)
    stage.sheet(model).save(work / RECONSTRUCTIONS)
    told_of = {"decoder_samples": numbers["samples"], "seconds": numbers["seconds"]}
    return model.tokenizer, told_of | stage.measure_all(model)


def _learn(
    stage: Stage, samples: int, batch: int, options: TrainOptions, work: Path, identity: str
) -> tuple[nn.Module, dict[str, Any]]:
    """Run one stage on what `identity` names; the best averaged model and its numbers on held-out pictures."""
    schedule = Schedule(
        max(1, samples // batch), batch, 60 * options.save_minutes, options.patience, options.seed,
        precision_of(options), options.workers, options.quiet,
    )  # fmt: skip
    model = run(stage, schedule, work, {"identity": identity})
    return model, numbers_of(stage, batch, work)


def _report_skipped(collection: ArtFolder, options: TrainOptions) -> None:
    """Say which files were passed over, and why."""
    for skipped in collection.skipped[:10]:
        say(f"skipped: {skipped.name} {skipped.reason}", options)
    if len(collection.skipped) > 10:
        say(f"... and {len(collection.skipped) - 10} more", options)
