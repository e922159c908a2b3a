"""`igpt train`: from a folder of art to a model folder. Started again with the same words, it goes on."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from igpt import checkpoint
from igpt.cpu import keep_freed_memory
from igpt.device import pick_device
from igpt.evaluation.perceptual import LPIPS, EncoderDistance
from igpt.model import GPT
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer

from .card import model_card
from .decoder import DecoderTask
from .folder import Run, command_line, numbers_of, remember, say, state_file, weights_fingerprint, work_folder
from .gpt import GPTTask, new_gpt
from .options import TrainOptions
from .shards import open_art
from .state import load_state
from .tokenizer import TokenizerTask
from .tokens import encode

RECONSTRUCTIONS = "reconstructions.png"  # in it: held-out pictures above what the finished tokenizer makes of them


def train(stage: str | None, art: str | Path, out: str | Path, options: TrainOptions) -> Path:
    """Train "tokenizer", "gpt", or with None both, on the pictures in `art`, and write a model folder to `out`.

    `train("gpt")` takes the tokenizer from `options.tokenizer` or from the model already in `out`. `train("decoder")`
    goes on with the decoder of the model `options.tokenizer`, whose codes and GPT stay. Raises UserError on unusable
    art or options, and where `out` holds something else.
    """
    options.check()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out, stage)
    collection = open_art(art, options.manifest)
    ids, val_ids = collection.split()
    if len(ids) < 2 or collection.different < 3:
        raise UserError(f"{art} has {collection.different} different usable pictures; 3 or more are wanted")
    # Whatever is wrong with other models or weights is said before anything is written.
    source = options.tokenizer or (str(out) if stage == "gpt" else None)
    found = checkpoint.load(source) if source else None
    if stage == "decoder" and not (found and isinstance(found.tokenizer, VQTokenizer)):
        raise UserError("train decoder wants a model with a VQ tokenizer: --tokenizer MODEL")
    side = int(median(min(size) for size in collection.sizes))
    preset = options.suited(len(ids), side, found.tokenizer.downsample if found else None)
    run = Run(collection, ids, val_ids, preset, options, work)
    _say_what_was_found(run, judged=stage == "decoder" or not found)
    remember(work, {"art": collection.fingerprint, "stage": stage, "options": asdict(options)})
    if stage == "decoder":
        assert found is not None
        _train_decoder_of(found, run, out)
        return out
    if found:
        tokenizer = found.tokenizer
        about = {"from": Path(str(source)).name, "command": found.provenance.get("command", "unknown")}
        about |= found.provenance.get("tokenizer", {})
    else:
        tokenizer, about = _train_tokenizer(run)
    provenance: dict[str, Any] = {
        "pictures": len(ids),
        "held_out": len(val_ids),
        "art_fingerprint": collection.fingerprint,
        "trained": date.today().isoformat(),
        "command": command_line(),
        "options": asdict(options),
        "machine": f"{platform.machine()}, {pick_device().type}, torch {torch.__version__}",
        "tokenizer": about,
    }
    if found and "decoder" in found.provenance:
        provenance["decoder"] = found.provenance["decoder"]
    if stage == "tokenizer":
        checkpoint.save(out, tokenizer, None, list(collection.labels), provenance)
    else:
        _train_gpt(run, tokenizer, provenance, out)
    return out


def _say_what_was_found(run: Run, judged: bool) -> None:
    """The pictures, which files were passed over and why, and what judges reconstructions where there will be any."""
    art, options = run.art, run.options
    say(
        f"{len(run.train) + len(run.val)} pictures: {len(run.train)} to learn from, {len(run.val)} held out, "
        f"{len(art.labels)} labels; "
        f"{len(art.skipped)} skipped",
        options,
    )
    for skipped in art.skipped[:10]:
        say(f"skipped: {skipped.name} {skipped.reason}", options)
    if len(art.skipped) > 10:
        say(f"... and {len(art.skipped) - 10} more", options)
    if judged and not isinstance(run.perceptual, LPIPS):
        encoder = isinstance(run.perceptual, EncoderDistance)
        what = f"the encoder of {options.perceptual}" if encoder else "edges and SSIM alone"
        say(f"no LPIPS weights: reconstructions are judged by {what}", options)


def _train_tokenizer(run: Run) -> tuple[VQTokenizer, dict[str, Any]]:
    """A new tokenizer, and what is known of it."""
    preset, side = run.preset, run.preset.downsample
    say(
        f"tokenizer: {preset.codes} codes of {side}x{side} pixels; {preset.tokenizer_crops:,} crops of {preset.crop} "
        f"pixels a side, then {preset.decoder_crops:,} for the decoder alone; reconstructions to look at appear in "
        f"{run.work}",
        run.options,
    )
    task = TokenizerTask(run)
    model, numbers = run.learn(task, preset.tokenizer_crops, preset.tokenizer_batch, run.art.fingerprint)
    if not preset.decoder_crops:
        return task.tokenizer(model), numbers | _measured(task, model)
    tokenizer, later = _train_decoder(run, task.tokenizer(model))
    return tokenizer, numbers | later | {"seconds": numbers["seconds"] + later["seconds"]}


def _train_decoder(run: Run, tokenizer: VQTokenizer) -> tuple[VQTokenizer, dict[str, Any]]:
    """The tokenizer with a decoder that went on learning on frozen codes, and what is known of it."""
    task = DecoderTask(run, tokenizer)
    identity = f"{run.art.fingerprint}/{weights_fingerprint(tokenizer)}"
    model, numbers = run.learn(task, run.preset.decoder_crops, run.preset.tokenizer_batch, identity)
    seen = {"decoder_samples": numbers["samples"], "seconds": numbers["seconds"]}
    return task.tokenizer(model), seen | _measured(task, model)


def _measured(task: TokenizerTask, model: nn.Module) -> dict[str, float]:
    """Metrics on all held-out pictures; some of them are left on a sheet."""
    task.sheet(model).save(task.run.work / RECONSTRUCTIONS)
    return task.reconstruction(model, task.held_out)


def _train_decoder_of(model: checkpoint.Checkpoint, run: Run, out: Path) -> None:
    """Write a model to `out` that differs in its decoder only, which learned more."""
    assert isinstance(model.tokenizer, VQTokenizer)
    say(
        f"decoder: {run.preset.decoder_crops:,} crops of {run.preset.crop} pixels a side; reconstructions appear in "
        f"{run.work}",
        run.options,
    )
    tokenizer, numbers = _train_decoder(run, model.tokenizer)
    before = model.provenance.get("tokenizer", {})
    for name in ("decoder_samples", "seconds"):
        numbers[name] += before.get(name, 0)
    provenance = model.provenance | {
        "decoder": {"trained": date.today().isoformat(), "command": command_line()},
        "tokenizer": before | numbers,
    }
    card = model_card(out.name, provenance, model.labels) if model.gpt is not None else None
    checkpoint.save(out, tokenizer, model.gpt, model.labels, provenance, card)


def _train_gpt(run: Run, tokenizer: checkpoint.Tokenizer, provenance: dict[str, Any], out: Path) -> None:
    """The GPT on the tokens of all pictures, and the finished model in `out`; Ctrl-C leaves the model so far."""
    tokens = encode(run, tokenizer)
    gpt, batch = new_gpt(tokenizer, len(tokens.names), run.preset, run.options), run.preset.gpt_batch
    task = GPTTask(tokens, (tokens.train, tokens.val), tokenizer, gpt, run.options, run.options.gpt_lr)

    def save(gpt: nn.Module, numbers: dict[str, Any]) -> None:
        assert isinstance(gpt, GPT)
        about, labels = provenance | {"gpt": numbers}, tokens.names
        checkpoint.save(out, tokenizer, gpt, labels, about, model_card(out.name, about, labels))
        say(f"the model is in {out}: draw with `igpt generate --model {out}`", run.options)

    try:
        save(*run.learn(task, run.preset.gpt_samples, batch, tokens.identity))
    except KeyboardInterrupt:
        if (best := state_file(run.work, task, "best")).is_file():  # what was learned so far can be drawn with
            load_state(best, {"model": gpt}, {})
            save(gpt, numbers_of(task, batch, run.work))
        raise
