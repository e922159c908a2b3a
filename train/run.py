"""`igpt train`: from a folder of art to a model folder. Started again with the same words, it goes on."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

from igpt import checkpoint
from igpt.cpu import keep_freed_memory
from igpt.evaluation.perceptual import LPIPS, Distance, EncoderDistance, GradientSSIM, perceptual
from igpt.files import write_picture
from igpt.model import GPT
from igpt.sizes import Grids
from tokenizer_vq.base import UserError
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.palette import PaletteTokenizer
from tokenizer_vq.vq import VQTokenizer

from .card import model_card
from .crops import DevicePictures, sizes_on
from .decoder import DecoderTask
from .folder import Run, claimed, read_json, work_folder
from .fresh import CLOSEST, FreshTask
from .gpt import LEARNED_GRIDS, GPTTask, new_gpt
from .options import GPU_PRESET, SHARES, Preset, TrainOptions
from .processes import agreed, check_same_start, processes, together
from .shards import ArtShards, open_art
from .sprites import LARGEST_LEARNED, advice, palette_for
from .state import load_state
from .tokenizer import TokenizerTask
from .tokens import encode

RECONSTRUCTIONS = "reconstructions.png"  # in it: held-out pictures above what the finished tokenizer makes of them


def train(art: str | Path, out: str | Path, options: TrainOptions) -> Path:
    """Learn a tokenizer and a GPT from the pictures in `art`, and write a model folder to `out`.

    With `options.tokenizer` the tokenizer is that of a model; for pixel art it is a palette. Raises UserError on
    unusable art or options, and where `out` holds something else.
    """
    options.check()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out)
    collection = together(lambda: open_art(art, options.manifest, options.grid))
    check_same_start({"art": collection.fingerprint, **asdict(options)})
    train_ids, val_ids = collection.split()
    if len(train_ids) < 2 or collection.different < 3:
        parts = f"{len(train_ids)} to learn from; 3 or more and 2 to learn from are wanted"
        raise UserError(f"{art} has {collection.different} different usable pictures, {parts}")
    # Whatever is wrong with other models or weights is said before anything is written.
    found = checkpoint.load(options.tokenizer) if options.tokenizer else None
    check_same_start({"tokenizer": found.weights_hash if found else None})
    sprites = None if found or isinstance(collection, ArtShards) else palette_for(collection, options)
    ready = found.tokenizer if found else PaletteTokenizer(sprites.config) if sprites else None
    preset = _preset(options, collection, len(train_ids), ready)
    distance = GradientSSIM() if ready else perceptual(options.perceptual)
    limits = options.limits(["gpt"] if ready else list(SHARES), sprites is not None)
    run = Run(collection, train_ids, val_ids, options, work, preset, limits)
    run.describe(collection.skipped)
    run.say_if_locked(options.tokenizer)
    if processes().device.type == "cuda":
        run.say(f"with CUDA: preset {GPU_PRESET} where none is named, compiled in the first steps, which take a minute")
    if not ready and (sentence := advice(collection)):
        run.say(sentence)
    with claimed(work):
        same = {"tokenizer_weights": found.weights_hash[:12]} if found else {}
        together(lambda: run.check_same_run("train", **same), only_main=True)
        provenance = run.provenance()
        if found:
            about = {"from": Path(str(options.tokenizer)).name, "command": found.provenance.get("command", "unknown")}
            provenance["tokenizer"] = about | found.provenance.get("tokenizer", {})
        elif sprites:
            run.say(sprites.reason)
            provenance["tokenizer"] = {"colours": sprites.colours, "colours_lost": sprites.lost}
        else:
            ready, provenance["tokenizer"] = _train_tokenizer(run, distance)
        assert ready is not None
        _train_gpt(run, ready, provenance, out)
        return out


def _preset(options: TrainOptions, art: ArtFolder, pictures: int, tokenizer: checkpoint.Tokenizer | None) -> Preset:
    """What is learned and how much, by the pictures and a tokenizer that there is."""
    if isinstance(tokenizer, PaletteTokenizer):
        return options.suited_to_sprites(min(LARGEST_LEARNED, max(map(max, art.sizes))))
    side = int(median(min(size) for size in art.sizes))
    if options.preset is None and processes().device.type == "cuda":
        options = replace(options, preset=GPU_PRESET)
    return options.suited(pictures, side, tokenizer.downsample if tokenizer else None)


def _train_tokenizer(run: Run[TrainOptions], distance: Distance) -> tuple[VQTokenizer, dict[str, Any]]:
    """A new tokenizer, and what is known of it. Metrics are those on all held-out pictures; some of them are left on a
    sheet."""
    if not isinstance(distance, LPIPS):
        encoder = f"the encoder of {run.options.perceptual}" if isinstance(distance, EncoderDistance) else ""
        run.say(f"no LPIPS weights: reconstructions are compared by {encoder or 'edges and SSIM alone'}")
    preset, device = run.preset, processes().device
    side, _ = Grids(preset.downsample, preset.cell, preset.cells).native_size
    if sizes := sizes_on(device, run.art, run.train, side):
        run = replace(run, pictures=DevicePictures(run.art, run.train, sizes, device))
    codes = f"{preset.codes} codes of {preset.downsample}x{preset.downsample} pixels"
    much = {"tokenizer": f"{preset.tokenizer_crops:,} crops", "decoder": f"{preset.decoder_crops:,} crops"}
    much |= {name: f"{seconds / 60:.3g} minutes" for name, seconds in run.limits.items()}
    run.say(f"tokenizer: {codes}, {much['tokenizer']}, then {much['decoder']} of its decoder; sheets are in {run.work}")
    task = TokenizerTask(run, distance)
    tokenizer, numbers = run.learn(task, preset.tokenizer_crops, preset.tokenizer_batch)
    if preset.decoder_crops:
        task = DecoderTask(run, distance, tokenizer)
        tokenizer, later = run.learn(task, preset.decoder_crops, preset.tokenizer_batch)
        numbers |= {"decoder_samples": later["samples"], "seconds": numbers["seconds"] + later["seconds"]}
    if processes().is_main_process:
        write_picture(task.sheet(tokenizer), run.work / RECONSTRUCTIONS, force=True)
    return tokenizer, numbers | task.reconstruction(tokenizer, task.held_out)


def _train_gpt(run: Run[TrainOptions], tokenizer: checkpoint.Tokenizer, provenance: dict[str, Any], out: Path) -> None:
    """The GPT, on fresh views where the devices of all processes have room for the pictures, or else on the tokens of
    all; and the finished model in `out`. Ctrl-C leaves the model so far."""
    device, sizes = processes().device, None
    if isinstance(tokenizer, VQTokenizer):
        side, _ = Grids(tokenizer.downsample, run.preset.cell, run.preset.cells).native_size
        sizes = sizes_on(device, run.art, run.train, round(side / CLOSEST))
    before = read_json(run.work / "options.json").get("options", {})
    fresh = agreed(float(sizes is not None and before.get("fresh_views", True))) == [1.0]  # or it could not go on
    together(lambda: run.check_same_run("train", fresh_views=fresh), only_main=True)
    held_out = replace(run, train=[], val=run.val or run.train[:LEARNED_GRIDS])
    tokens = encode(held_out if fresh else run, tokenizer)
    labels, batch = tokens.names, run.preset.gpt_batch
    gpt = new_gpt(tokenizer, len(labels), run.preset, run.options)
    if fresh and sizes:
        pictures = DevicePictures(run.art, run.train, sizes, device)
        task: GPTTask = FreshTask(run, pictures, tokens, tokenizer, gpt)
    else:
        task = GPTTask(replace(run, train=tokens.train, val=tokens.val), tokens, tokenizer, gpt, run.options.gpt_lr)

    def save(gpt: GPT) -> None:
        about = provenance | {"gpt": run.numbers(task.name, batch)}
        card = model_card(out.name, about, labels)
        together(lambda: checkpoint.save(out, tokenizer, gpt, labels, about, card), only_main=True)
        run.say(f"the model is in {out}: draw with `igpt generate --model {shlex.quote(str(out))}`")

    try:
        save(run.learn(task, run.preset.gpt_samples, batch)[0])
    except KeyboardInterrupt:
        if (best := run.state_file(task.name, "best")).is_file():  # what was learned so far can be drawn with
            load_state(best, {"model": gpt})
            save(gpt)
        raise
