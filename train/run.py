"""`igpt train`: from a folder of art to a model folder. Started again with the same words, it goes on."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from datetime import date
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
from .crops import pictures_on
from .decoder import DecoderTask
from .folder import Run, claimed, command_line, weights_fingerprint, work_folder
from .gpt import GPTTask, new_gpt
from .options import GPU_PRESET, SHARES, Preset, TrainOptions
from .processes import check_same_start, processes, together
from .shards import ArtShards, open_art
from .sprites import LARGEST_LEARNED, advice, palette_for
from .state import load_state
from .tokenizer import TokenizerTask
from .tokens import encode

TASKS_OF_STAGE = {"tokenizer": ("tokenizer", "decoder"), "decoder": ("decoder",), "gpt": ("gpt",), None: tuple(SHARES)}
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
    collection = together(lambda: open_art(art, options.manifest, options.grid))
    check_same_start({"stage": stage, "art": collection.fingerprint, **asdict(options)})
    train_ids, val_ids = collection.split()
    if len(train_ids) < 2 or collection.different < 3:
        parts = f"{len(train_ids)} to learn from; 3 or more and 2 to learn from are wanted"
        raise UserError(f"{art} has {collection.different} different usable pictures, {parts}")
    # Whatever is wrong with other models or weights is said before anything is written.
    source = options.tokenizer or (str(out) if stage == "gpt" else None)
    found = checkpoint.load(source) if source else None
    sprites = None if source or isinstance(collection, ArtShards) else palette_for(collection, options)
    preset = _preset(options, collection, len(train_ids), found, sprites is not None)
    start: VQTokenizer | None = None  # whose decoder goes on learning
    if stage == "decoder":
        if not (found and isinstance(found.tokenizer, VQTokenizer) and preset.decoder_crops):
            raise UserError("train decoder wants a model with a VQ tokenizer, --tokenizer MODEL, and --decoder-crops")
        start = found.tokenizer
    distance = perceptual(options.perceptual) if start or not (found or sprites) else GradientSSIM()
    tasks = TASKS_OF_STAGE["gpt" if stage is None and (found or sprites) else stage]
    limits = options.limits(tasks, sprites is not None)
    run = Run(collection, train_ids, val_ids, options, work, preset, limits)
    run.describe(collection.skipped)
    run.say_if_locked(source)
    if processes().device.type == "cuda":
        run.say(f"with CUDA: preset {GPU_PRESET} where none is named, compiled in the first steps, which take a minute")
    if not (source or sprites) and (sentence := advice(collection)):
        run.say(sentence)
    with claimed(work):
        together(lambda: run.check_same_run(stage), only_main=True)

        provenance = run.provenance()
        if found and not start:
            tokenizer = found.tokenizer
            about = {"from": Path(str(source)).name, "command": found.provenance.get("command", "unknown")}
            provenance["tokenizer"] = about | found.provenance.get("tokenizer", {})
            provenance |= {key: value for key, value in found.provenance.items() if key == "decoder"}
        elif sprites:
            run.say(sprites.reason)
            tokenizer = PaletteTokenizer(sprites.config)
            provenance["tokenizer"] = {"colours": sprites.colours, "colours_lost": sprites.lost}
        else:
            tokenizer, provenance["tokenizer"] = _train_tokenizer(run, distance, start)
        if found and start:
            provenance = _with_decoder(found.provenance, provenance["tokenizer"])
            _save(out, tokenizer, found.gpt, found.labels, provenance)
        elif stage == "tokenizer":
            _save(out, tokenizer, None, collection.labels, provenance)
        else:
            _train_gpt(run, tokenizer, provenance, out)
        return out


def _preset(
    options: TrainOptions, art: ArtFolder, pictures: int, found: checkpoint.Checkpoint | None, sprites: bool
) -> Preset:
    """What is learned and how much, by the pictures and a tokenizer that there is."""
    if sprites or (found and isinstance(found.tokenizer, PaletteTokenizer)):
        return options.suited_to_sprites(min(LARGEST_LEARNED, max(map(max, art.sizes))))
    side = int(median(min(size) for size in art.sizes))
    if options.preset is None and processes().device.type == "cuda":
        options = replace(options, preset=GPU_PRESET)
    return options.suited(pictures, side, found.tokenizer.downsample if found else None)


def _with_decoder(provenance: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a model whose decoder has learned more, by these numbers."""
    before = provenance.get("tokenizer", {})
    sums = {name: before.get(name, 0) + numbers[name] for name in ("decoder_samples", "seconds")}
    about = {"trained": date.today().isoformat(), "command": command_line()}
    return provenance | {"decoder": about, "tokenizer": before | numbers | sums}


def _save(
    out: Path, tokenizer: checkpoint.Tokenizer, gpt: GPT | None, labels: list[str], provenance: dict[str, Any]
) -> None:
    card = model_card(out.name, provenance, labels) if gpt else None
    together(lambda: checkpoint.save(out, tokenizer, gpt, labels, provenance, card), only_main=True)


def _train_tokenizer(
    run: Run[TrainOptions], distance: Distance, start: VQTokenizer | None
) -> tuple[VQTokenizer, dict[str, Any]]:
    """A new tokenizer, or `start` with a decoder that learned more, and what is known of it. Metrics are those on all
    held-out pictures; some of them are left on a sheet."""
    if not isinstance(distance, LPIPS):
        encoder = f"the encoder of {run.options.perceptual}" if isinstance(distance, EncoderDistance) else ""
        run.say(f"no LPIPS weights: reconstructions are compared by {encoder or 'edges and SSIM alone'}")
    preset, fingerprint = run.preset, run.art.fingerprint
    side, _ = Grids(preset.downsample, preset.cell, preset.cells).native_size
    run = replace(run, pictures=pictures_on(processes().device, run.art, run.train, side))
    codes = f"{preset.codes} codes of {preset.downsample}x{preset.downsample} pixels"
    before = "" if start else f"tokenizer: {codes} from {preset.tokenizer_crops:,} crops; "
    run.say(f"{before}decoder: {preset.decoder_crops:,} crops of {preset.crop} pixels a side; sheets are in {run.work}")
    numbers: dict[str, Any] = {"seconds": 0}
    if start:
        tokenizer = start
    else:
        task = TokenizerTask(run, distance)
        tokenizer, numbers = run.learn(task, preset.tokenizer_crops, preset.tokenizer_batch, fingerprint)
    if preset.decoder_crops:
        identity = f"{fingerprint}/{weights_fingerprint(tokenizer)}"
        task = DecoderTask(run, distance, tokenizer)
        tokenizer, later = run.learn(task, preset.decoder_crops, preset.tokenizer_batch, identity)
        numbers |= {"decoder_samples": later["samples"], "seconds": numbers["seconds"] + later["seconds"]}
    if processes().is_main_process:
        write_picture(task.sheet(tokenizer), run.work / RECONSTRUCTIONS, force=True)
    return tokenizer, numbers | task.reconstruction(tokenizer, task.held_out)


def _train_gpt(run: Run[TrainOptions], tokenizer: checkpoint.Tokenizer, provenance: dict[str, Any], out: Path) -> None:
    """The GPT on the tokens of all pictures, and the finished model in `out`; Ctrl-C leaves the model so far."""
    tokens = encode(run, tokenizer)
    labels, batch = tokens.names, run.preset.gpt_batch
    gpt = new_gpt(tokenizer, len(labels), run.preset, run.options)
    task = GPTTask(replace(run, train=tokens.train, val=tokens.val), tokens, tokenizer, gpt, run.options.gpt_lr)

    def save(gpt: GPT) -> None:
        _save(out, tokenizer, gpt, labels, provenance | {"gpt": run.numbers(task.name, batch)})
        run.say(f"the model is in {out}: draw with `igpt generate --model {shlex.quote(str(out))}`")

    try:
        save(run.learn(task, run.preset.gpt_samples, batch, tokens.identity)[0])
    except KeyboardInterrupt:
        if (best := run.state_file(task.name, "best")).is_file():  # what was learned so far can be drawn with
            load_state(best, {"model": gpt})
            save(gpt)
        raise
