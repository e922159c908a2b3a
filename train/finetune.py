"""`igpt finetune`: from a trained model and a folder of a person's own to a model, or an adapter, in its manner.

How much is learned, measured and drawn follows from the time of one step and of one drawing on this machine; it is said
before it starts, and written down: the same command goes on where it was stopped, and stopped at any moment it leaves
a model of the best so far.
"""

from __future__ import annotations

import math
import shlex
import time
from itertools import zip_longest
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
from igpt.files import write_picture
from igpt.image_gpt import ImageGPT
from igpt.likelihood import label_nats
from igpt.lora import apply_lora, largest_rank, merge_lora, save_adapter, with_labels
from igpt.model import GPT
from igpt.sheet import sheet
from tokenizer_vq.base import UserError, complaint

from . import loop
from .card import summary, tuned_card
from .collection import Collection, load_collection
from .folder import Run, claimed, read_json, work_folder, write_json
from .gpt import SHEETS_TIME, TuneTask, bits_of
from .loop import Schedule
from .options import TuneOptions
from .processes import processes
from .sprites import with_colours_of
from .state import load_state, peek
from .tokens import Views

LISTING, BEFORE_AFTER, FACTS = "pictures.csv", "before-after.jpg", "facts.json"
VALIDATION_TIME, DRAWING_TIME = 0.1, 0.08  # shares of the time
VALIDATION_COST = 1 / 3  # of a grid, over that of learning from it
MIN_STEPS = 10
MEASUREMENTS, STEPS_BETWEEN = 10, 5  # on validation pictures: about how many, and how far apart at least
WRITING_SECONDS = 5.0  # the model and its states
ASKED_PICTURES = 4  # by which the nearest label of the base is found
DRAWN_PICTURES, BASE_PICTURES, DRAWN_AT_ONCE, DRAWING_SEED = 24, 8, 4, 1000  # in the end, as far as the time allows
SHEET_DRAWN, SHEET_STEPS = 4, 8  # while it learns
TILE_SIDE = 160  # pixels of a picture on the sheet, about


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
    if processes().num_processes > 1:
        raise UserError("igpt finetune learns in one process; start it without torchrun or accelerate launch")
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out)
    base = ImageGPT.load(model)
    collection = load_collection(art)
    run = Run(collection.art, collection.train, collection.val, options, work)
    tuning = _Tuning(collection, run, base, model, start)
    if not options.adapter:
        run.say_if_locked(model)
    with claimed(work):
        run.check_same_run("finetune", model=f"{base.name} {base.weights_hash[:12]}")
        if "minutes" in tuning.facts:
            run.say(f"{out} is finished already; another --out starts anew")
            return out
        try:
            tuning.prepare()
            tuning.learn()
            tuning.finish()
        except KeyboardInterrupt:
            if not tuning.best.is_file():
                run.say("stopped before its first look at validation, so it has learned little or nothing yet")
            run.say(tuning.write())
            raise
        return out


class _Tuning:
    """One fine-tuning, step by step."""

    def __init__(self, collection: Collection, run: Run[TuneOptions], base: ImageGPT, model: str, start: float):
        self.collection, self.run, self.model, options = collection, run, model, run.options
        self.start = start - float(peek(run.state_file(TuneTask.name, "state")).get("seconds", 0))  # learned before
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
        self.task = TuneTask(self.views, self.gpt, self._sheet)
        self.best = run.state_file(self.task.name, "best")
        self.facts = read_json(run.work / FACTS)  # the plan, and what was measured

    def prepare(self) -> None:
        """Say what was found and what will be done, before anything takes long, and measure the base."""
        run, val = self.run, self.collection.val
        run.describe(self.collection.skipped)
        self.collection.write(self.out / LISTING)
        run.say(f"what was done with each file, and why, is in {self.out / LISTING}")
        if run.options.adapter and self.views.palette:
            run.say("an adapter adds no colours: those that the model lacks become its nearest")
        if not self.facts:
            with torch.autocast(self.base.device.type, torch.bfloat16, enabled=run.bf16):
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
        windows = int(VALIDATION_TIME * 60 * options.minutes / MEASUREMENTS / look)
        learning = (1 - VALIDATION_TIME - SHEETS_TIME) * seconds
        samples = options.samples or int(max(learning / step, MIN_STEPS) * options.batch)
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
            loss, _ = self.task.loss(samples, 0.0, torch.Generator())
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

    def learn(self) -> None:
        """Train; `gpt` has the best weights then."""
        run, options = self.run, self.run.options
        seconds = math.inf if options.samples else self.facts["seconds"]
        steps = math.ceil((options.samples or 1) / options.batch)  # where the time decides, nobody knows how many
        schedule = Schedule(options, steps, options.batch, run.bf16, seconds, None, 0, MEASUREMENTS, STEPS_BETWEEN)
        self.gpt = loop.run(self.task, schedule, run.work)

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
            words = [f"--model={self.model}", f"--adapter={path}"]
        else:
            card = tuned_card(self.out.name, provenance, self.labels, self.new)
            checkpoint.save(self.out, self.tokenizer, merge_lora(self.gpt), self.labels, provenance, card)
            words = [f"--model={self.out}"]
        words += [f"--label={label}" for label in self.new[:1]]
        return f"written to {self.out}: draw with `{shlex.join(['igpt', 'generate', *words])}`"

    def finish(self) -> None:
        """Write the model, draw with it, look for copies, and say what came of it."""
        self.write()  # before anything else can go wrong
        run, facts = self.run, self.facts
        numbers = run.numbers(self.task.name, run.options.batch)
        facts |= {"bits": numbers["bits"], "crops": numbers["samples"]}
        before, after = self._draw()
        examples = run.train[:: math.ceil(len(run.train) / BASE_PICTURES)]
        rows = {"the folder": map(run.art.picture, examples), "before": before, "after": after[: len(before)]}
        tiles = [[(self._tile(p), "" if i else name) for i, p in enumerate(row)] for name, row in rows.items()]
        write_picture(sheet(tiles), self.out / BEFORE_AFTER, force=True)
        facts |= {"copied": self.collection.copies(after), "drawn": len(after)}
        facts["minutes"] = round((time.monotonic() - self.start) / 60, 1)
        run.say(self.write())
        write_json(run.work / FACTS, facts)
        for which in ("state", "best"):  # half a gigabyte that nobody needs any more
            run.state_file(self.task.name, which).unlink(missing_ok=True)
        for sentence in [*summary(facts), f"before and after are side by side in {self.out / BEFORE_AFTER}"]:
            run.say(sentence)

    def _draw(self) -> tuple[list[Image.Image], list[Image.Image]]:
        """Pictures by the base, under the nearest label, and by the tuned model, as many as there is time for."""
        tuned, size = self._tuned(self.gpt)
        before, after = list[Image.Image](), list[Image.Image]()
        end = time.monotonic() + DRAWING_TIME * 60 * self.run.options.minutes
        while not after or (len(after) < DRAWN_PICTURES and time.monotonic() < end):
            seed = DRAWING_SEED + len(after)
            after += tuned.generate(DRAWN_AT_ONCE, size, seed=seed)
            if len(before) < BASE_PICTURES:
                before += self.base.generate(DRAWN_AT_ONCE, size, label=self.facts["nearest"], seed=seed)
        return before, after

    def _sheet(self, gpt: GPT) -> Image.Image:
        """Of the first seeds with which it draws in the end, in fewer steps; with labels where there are several."""
        tuned, size = self._tuned(gpt)
        pictures = tuned.generate(SHEET_DRAWN, size, seed=DRAWING_SEED, steps=SHEET_STEPS)
        labels = tuned.labels_for(None, DRAWING_SEED, SHEET_DRAWN) if len(self.run.art.labels) > 1 else []
        return sheet([[(self._tile(each), label or "") for each, label in zip_longest(pictures, labels)]])

    def _tuned(self, gpt: GPT) -> tuple[ImageGPT, tuple[int, int]]:
        """What draws with a GPT on its way, and the size of pictures that are shaped as most of the folder are."""
        about = {"sampling": self.base.provenance.get("sampling", {}), "default_labels": self.run.art.labels}
        h, w = self.views.usual_grid()
        tuned = ImageGPT(self.tokenizer, merge_lora(gpt), self.labels, provenance=about)
        return tuned, (w * tuned.downsample, h * tuned.downsample)

    def _tile(self, picture: Image.Image) -> Image.Image:
        """For the sheet: sprites are enlarged by whole numbers."""
        if self.views.palette:
            return ImageOps.scale(picture, max(1, TILE_SIDE // max(picture.size)), Image.Resampling.NEAREST)
        return ImageOps.contain(picture, (TILE_SIDE, TILE_SIDE), Image.Resampling.LANCZOS)
