"""`igpt finetune`: from a trained model and a folder of a person's own to a model, or an adapter, in its manner.

How much is learned, measured and drawn follows from the time of one step and of one drawing on this machine; it is said
before it starts, and written down: the same command goes on where it was stopped, and stopped at any moment it leaves
a model of the best so far.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import default_collate

from igpt import checkpoint
from igpt.config import NO_LABEL
from igpt.cpu import keep_freed_memory
from igpt.evaluation.perceptual import NO_WEIGHTS, perceptual
from igpt.files import write_picture
from igpt.image_gpt import ImageGPT
from igpt.likelihood import label_nats
from igpt.lora import apply_lora, largest_rank, merge_lora, save_adapter, with_labels
from igpt.sheet import sheet
from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.vq import VQTokenizer

from .card import summary, tuned_card
from .collection import Collection, load_collection
from .decoder import DecoderTask
from .folder import Run, claimed, read_json, work_folder, write_json
from .gpt import TuneTask, bits_of
from .loop import Schedule
from .options import LearningOptions, TrainOptions, TuneOptions
from .sprites import with_colours_of
from .state import load_state
from .tokens import Views

LISTING, BEFORE_AFTER, FACTS = "pictures.csv", "before-after.jpg", "facts.json"
VALIDATION_TIME, DRAWING_TIME = 0.1, 0.08  # shares of the time
VALIDATION_COST = 1 / 3  # of a grid, over that of learning from it
MIN_STEPS = 10
WRITING_SECONDS = 5.0  # the model and its states
ASKED_PICTURES = 4  # by which the nearest label of the base is found
DRAWN_PICTURES, BASE_PICTURES, DRAWN_AT_ONCE, DRAWING_SEED = 24, 8, 4, 1000  # in the end, as far as the time allows
TILE_SIDE = 160  # pixels of a picture on the sheet, about
DECODER_LR = 2e-4
DECODER_GAIN = 0.1  # SSIM that unseen pictures must gain by the decoder that learned: less is only softness


def finetuned(art: str | Path, out: str | Path, model: str, options: dict[str, Any]) -> ImageGPT:
    """As `finetune`, with options by name; the tuned model."""
    with complaint("finetune has no such option", TypeError):
        chosen = TuneOptions(**options)
    with torch.random.fork_rng():  # a library leaves its caller's random numbers alone
        folder = finetune(art, out, model, chosen)
        return ImageGPT.load(model, adapter=folder / checkpoint.ADAPTER) if chosen.adapter else ImageGPT.load(folder)


def finetune(art: str | Path, out: str | Path, model: str, options: TuneOptions) -> Path:
    """Fine-tune `model` on the pictures in `art` and write a model folder, or an adapter, to `out`.

    Raises UserError on a base, pictures or options that cannot be used, and where `out` holds something else. On
    Ctrl-C what was best so far is written before KeyboardInterrupt goes on.
    """
    start = time.monotonic()
    options.check()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out, None)
    base = ImageGPT.load(model)
    if options.decoder_crops and not isinstance(base.tokenizer, VQTokenizer):
        raise UserError(f"the model {model!r} has a palette and no decoder that could learn: leave out --decoder-crops")
    collection = load_collection(art)
    tuning = _Tuning(collection, Run(collection.art, collection.train, collection.val, options, work), base, start)
    if not options.adapter:
        tuning.run.say_if_locked(model)
    with claimed(work):
        tuning.run.check_same_run("finetune", model=f"{base.name} {base.weights_hash[:12]}")
        if "minutes" in tuning.facts:
            tuning.run.say(f"{out} is finished already; another --out starts anew")
            return out
        try:
            tuning.prepare()
            tuning.learn()
        except KeyboardInterrupt:
            if not tuning.best.is_file():
                tuning.run.say("stopped before its first look at validation, so it has learned little or nothing yet")
            tuning.run.say(tuning.write())
            raise
        tuning.finish()
        return out


class _Tuning:
    """One fine-tuning, step by step."""

    def __init__(self, collection: Collection, run: Run[TuneOptions], base: ImageGPT, start: float):
        self.collection, self.run, self.start, options = collection, run, start, run.options
        known = base.tokenizer.vocab_size
        self.base = base = base if options.adapter else with_colours_of(run.art, base)  # an adapter has no new tokens
        self.out, self.tokenizer = run.work.parent, base.tokenizer
        # Sub-folders with the name of a known label add to that label.
        self.new = [label for label in run.art.labels if label not in base.labels]
        self.labels = base.labels + self.new
        self.gpt = with_labels(base.gpt, len(self.new))
        for part in self.gpt.modules():
            if isinstance(part, nn.Dropout):
                part.p = options.dropout
        if options.method == "lora":
            rank = min(options.rank, largest_rank(self.gpt)) if options.adapter else options.rank
            apply_lora(self.gpt, rank, options.seed)
        if base.tokenizer.vocab_size > known:  # what is new is to be learned
            self.gpt.tokens.requires_grad_(True)
            self.gpt.frozen -= {"tokens.weight"}
        numbers = [self.labels.index(run.art.labels[k]) for k in run.art.label_of]
        self.flip = collection.flip if options.flip is None else options.flip
        self.views = Views(run, numbers, base, self.flip)
        self.task = TuneTask(self.views, self.gpt)
        self.best = run.state_file(self.task.name, "best")
        self.facts = read_json(run.work / FACTS)  # the plan, and what was measured

    def prepare(self) -> None:
        """Say what was found and what will be done, before anything takes long, and measure the base."""
        run, val = self.run, self.collection.val
        run.describe(self.collection.skipped)
        self.collection.write(self.out / LISTING)
        run.say(f"what was done with each file, and why, is in {self.out / LISTING}")
        if not self.facts:
            with self._autocast():
                step, windows = self._plan()
                self.task.windows = self.views.windows(val, windows)
                nearest, bits = self._base_bits()
            seconds = max(MIN_STEPS * step, self._seconds_left())
            self.facts = {"windows": windows, "seconds": seconds, "nearest": nearest, "base_bits": bits}
            write_json(run.work / FACTS, self.facts)
        self.task.windows = self.views.windows(val, self.facts["windows"])

    def _seconds_left(self) -> float:
        """For learning."""
        total, spent = 60 * self.run.options.minutes, time.monotonic() - self.start
        return total * (1 - DRAWING_TIME) - WRITING_SECONDS - spent

    def _plan(self) -> tuple[float, int]:
        """The seconds of a step, and at how many validation windows there is time to look; what follows is said."""
        options, pictures = self.run.options, len(self.run.train)
        step, seconds = self._step_seconds(), self._seconds_left()
        look = VALIDATION_COST * step / options.batch  # at one window
        windows = int(VALIDATION_TIME * 60 * options.minutes / Schedule.evaluations / look)
        samples = options.samples or int(max(seconds * (1 - VALIDATION_TIME) / step, MIN_STEPS) * options.batch)
        self.run.say(
            f"this machine learns from {options.batch / step:.3g} crops a second: about {samples:,} in all, "
            f"{samples / pictures:.0f} of each picture, {'' if self.flip else 'not '}mirrored at random"
        )
        if options.samples:
            minutes = samples / options.batch * step / 60
            self.run.say(f"--samples decides, not --minutes: about {minutes:.1f} minutes of learning")
        elif seconds > MIN_STEPS * step:
            self.run.say(f"{options.minutes:g} minutes in all, less if it stops getting better before")
        else:
            self.run.say(f"--minutes {options.minutes:g} is too little on this machine: {MIN_STEPS} steps take longer")
        return step, max(1, min(windows, len(self.run.val) * self.views.plain))

    def _step_seconds(self) -> float:
        """What a step costs once it is warm; nothing of it stays."""
        model, batch = self.task.modules["model"].train(), self.run.options.batch
        for first in (0, batch):
            start = time.perf_counter()
            samples = default_collate([self.task.dataset[first + k] for k in range(batch)])
            samples = send_to_device(samples, self.base.device)
            loss, _ = self.task.loss(self.task.modules, samples, 0.0, torch.Generator())
            loss.backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    def _base_bits(self) -> tuple[str, float]:
        """The base at its best: the label under which some pictures of new labels surprise it least, and its bits a
        token of the validation windows under that label, or their own where it is known."""
        base, known, labels = self.base, len(self.base.labels), self.views.labels
        new = [i for i in self.run.train if labels[i] >= known] or self.run.train
        grids = [self.views.grid(i, 0) for i in new[:: math.ceil(len(new) / ASKED_PICTURES)]]
        nats = [label_nats(base.gpt, grid_hw, torch.ones_like(grid_hw, dtype=torch.bool)) for grid_hw in grids]
        nearest = int(torch.stack(nats).mean(0).argmin())
        windows = [(grid_hw, label if label < known else nearest) for grid_hw, label in self.task.windows]
        return [*base.labels, NO_LABEL][nearest], bits_of(base.gpt, windows)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.base.device.type, torch.bfloat16, enabled=self.run.bf16)

    def learn(self) -> None:
        """Train; `gpt` has the best weights then."""
        run, options = self.run, self.run.options
        identity = f"{run.art.fingerprint}/{self.base.weights_hash}"
        seconds = math.inf if options.samples else self.facts["seconds"]
        samples = options.samples or options.batch  # where the time decides, nobody knows how many
        self.gpt, _ = run.learn(self.task, samples, options.batch, identity, seconds)
        if options.decoder_crops and isinstance(self.tokenizer, VQTokenizer):
            self.tokenizer, self.facts["decoder"] = self._tune_decoder(self.tokenizer)

    def _tune_decoder(self, tokenizer: VQTokenizer) -> tuple[VQTokenizer, str]:
        """A copy whose decoder learned the training pictures, and a sentence about it. Codes stay, so that tokens and
        recipes stay good. Without a discriminator, which so few pictures would make blind, a decoder also grows softer:
        the old one comes back where unseen pictures do not gain much."""
        run, options = self.run, self.run.options
        shared = {field.name: getattr(options, field.name) for field in fields(LearningOptions)}
        how = TrainOptions(**shared, adversarial=0.0, tokenizer_lr=DECODER_LR, flip=self.flip)
        decoder_run = Run(run.art, run.train, run.val, how, run.work)
        task = DecoderTask(decoder_run, perceptual(NO_WEIGHTS), tokenizer)
        before = task.measure(tokenizer)["ssim"]
        learned, numbers = decoder_run.learn(task, options.decoder_crops, options.batch, run.art.fingerprint)
        better = numbers["ssim"] >= before + DECODER_GAIN
        sentence = (
            f"through the codes and back, pictures kept for validation had an SSIM of {before:.2f} and have "
            f"{numbers['ssim']:.2f} with the decoder that learned, which is "
            f"{'kept' if better else 'too little: it is not kept'}"
        )
        return (learned if better else tokenizer), sentence

    # After

    def write(self) -> str:
        """The model folder or the adapter, with everything that is known so far; a sentence that says so."""
        run, base, options = self.run, self.base, self.run.options
        provenance: dict[str, Any] = run.provenance() | {
            "base": base.name,
            "base_hash": base.weights_hash,
            "default_labels": run.art.labels,
            "sampling": base.provenance.get("sampling", {}),
            "tokenizer": base.provenance.get("tokenizer", {}),
            "finetune": self.facts,
        }
        if self.best.is_file():
            load_state(self.best, {"model": self.gpt})
            provenance["gpt"] = run.numbers(self.task.name, options.batch)
        if options.adapter:
            path = self.out / checkpoint.ADAPTER
            save_adapter(path, self.gpt, self.labels, (base.name, base.weights_hash), provenance)
            model = f"--model {shlex.quote(base.name)} --adapter {shlex.quote(str(path))}"
        else:
            card = tuned_card(self.out.name, provenance, self.labels, self.new)
            checkpoint.save(self.out, self.tokenizer, merge_lora(self.gpt), self.labels, provenance, card)
            model = f"--model {shlex.quote(str(self.out))}"
        label = f" {shlex.quote(f'--label={self.new[0]}')}" if self.new else ""
        return f"written to {self.out}: draw with `igpt generate {model}{label}`"

    def finish(self) -> None:
        """Write the model, draw with it, look for copies, and say what came of it."""
        self.write()  # before anything else can go wrong
        run, facts = self.run, self.facts
        facts["bits"] = run.numbers(self.task.name, run.options.batch)["bits"]
        before, after = self._draw()
        examples = run.train[:: math.ceil(len(run.train) / BASE_PICTURES)]
        rows = {"the folder": map(run.art.picture, examples), "before": before, "after": after[: len(before)]}
        tiles = [[(self._tile(p), "" if i else name) for i, p in enumerate(row)] for name, row in rows.items()]
        write_picture(sheet(tiles), self.out / BEFORE_AFTER, force=True)
        facts |= {"copied": self.collection.copies(after), "drawn": len(after), "peak_memory_gb": peak_memory()}
        facts["minutes"] = round((time.monotonic() - self.start) / 60, 1)
        run.say(self.write())
        write_json(run.work / FACTS, facts)
        for which in ("state", "best"):  # half a gigabyte that nobody needs any more
            run.state_file(self.task.name, which).unlink(missing_ok=True)
        for sentence in [*summary(facts), f"before and after are side by side in {self.out / BEFORE_AFTER}"]:
            run.say(sentence)

    def _draw(self) -> tuple[list[Image.Image], list[Image.Image]]:
        """Pictures by the base, under the nearest label, and by the tuned model, as many as there is time for."""
        about = {"sampling": self.base.provenance.get("sampling", {}), "default_labels": self.run.art.labels}
        tuned = ImageGPT(self.tokenizer, merge_lora(self.gpt), self.labels, provenance=about)
        h, w = self.views.usual_grid()
        size = (w * tuned.downsample, h * tuned.downsample)
        before: list[Image.Image] = []
        after: list[Image.Image] = []
        end = time.monotonic() + DRAWING_TIME * 60 * self.run.options.minutes
        while not after or (len(after) < DRAWN_PICTURES and time.monotonic() < end):
            seed = DRAWING_SEED + len(after)
            after += tuned.generate(DRAWN_AT_ONCE, size, seed=seed)
            if len(before) < BASE_PICTURES:
                before += self.base.generate(DRAWN_AT_ONCE, size, label=self.facts["nearest"], seed=seed)
        return before, after

    def _tile(self, picture: Image.Image) -> Image.Image:
        """For the sheet: sprites are enlarged by whole numbers."""
        if self.views.palette:
            return ImageOps.scale(picture, max(1, TILE_SIDE // max(picture.size)), Image.Resampling.NEAREST)
        return ImageOps.contain(picture, (TILE_SIDE, TILE_SIDE), Image.Resampling.LANCZOS)


def peak_memory() -> float | None:
    """Of this process so far, in GB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
