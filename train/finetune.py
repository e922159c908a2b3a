"""`igpt finetune`: from a trained model and a folder of a person's own to a model, or an adapter, in its manner.

Everything is chosen from the pictures and the machine (plan.py), said before it starts, and written down: the same
command goes on where it was stopped, and stopped at any moment it leaves a model of the best so far.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import shlex
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from igpt import checkpoint
from igpt.bundle import Bundle
from igpt.cpu import keep_freed_memory
from igpt.files import atomic_write
from igpt.image_gpt import ImageGPT
from igpt.likelihood import label_nats
from igpt.lora import apply_lora, largest_rank, merge_lora, save_adapter, with_labels
from igpt.model import GPT
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer

from .card import summary, tuned_card
from .collection import Collection, gather
from .folder import command_line, numbers_of, remember, say, schedule_for, state_file, use_bf16, work_folder
from .loop import run
from .options import TuneOptions
from .plan import Plan, Speeds, choose, seconds_for
from .state import load_state
from .tune import TuneTask, Views, bits_of, copies, draw_pictures, plain_windows, tune_decoder, write_sheet

LISTING, SHEET, RESULT = "pictures.csv", "before-after.jpg", "result.json"
SEED = 1000  # of what is drawn to look at


def finetuned(art: str | Path, out: str | Path, model: str, options: dict[str, Any]) -> ImageGPT:
    """As `finetune`, with options by name; the tuned model."""
    try:
        chosen = TuneOptions(**options)
    except TypeError as error:
        raise UserError(f"finetune has no such option: {error}") from error
    with torch.random.fork_rng():  # a library leaves its caller's random numbers alone
        folder = finetune(art, out, model, chosen)
        return ImageGPT.load(model, adapter=folder / checkpoint.ADAPTER) if chosen.adapter else ImageGPT.load(folder)


def finetune(art: str | Path, out: str | Path, model: str, options: TuneOptions) -> Path:
    """Fine-tune `model` on the pictures in `art` and write a model folder, or an adapter, to `out`.

    Raises UserError on a base, pictures or options that cannot be used, and where `out` holds something else. On
    Ctrl-C what was best so far is written before KeyboardInterrupt goes on.
    """
    began = time.monotonic()
    options.check()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out, None)
    base = ImageGPT.load(model)
    if not options.adapter and checkpoint.find(model).is_file():
        say(f"{base.name} is locked, but the new model is written open: `igpt lock {out}` locks it", options)
    if options.decoder_crops and not isinstance(base.tokenizer, VQTokenizer):
        raise UserError(f"the model {model!r} has a palette and no decoder that could learn: leave out --decoder-crops")
    tuning = _Tuning(gather(art), out, base, options, began)
    if tuning.begin():
        try:
            tuning.prepare()
            tuning.learn()
        except KeyboardInterrupt:
            if not state_file(work, tuning.task, "best").is_file():
                say("stopped before its first look at validation, so it has learned little or nothing yet", options)
            say(tuning.write(), options)
            raise
        except OSError as error:
            raise UserError(f"the training cannot be written to {work}: {error.strerror}") from error
        tuning.finish()
    return out


class _Tuning:
    """One fine-tuning, step by step."""

    def __init__(self, collection: Collection, out: Path, base: ImageGPT, options: TuneOptions, began: float):
        self.collection, self.out, self.base, self.options, self.began = collection, out, base, options, began
        self.work, self.tokenizer = work_folder(out, None), base.tokenizer
        # Sub-folders with the name of a known label add to that label.
        self.new = [label for label in collection.art.labels if label not in base.labels]
        self.labels = base.labels + self.new
        self.gpt = with_labels(base.gpt, len(self.new))
        for part in self.gpt.modules():
            if isinstance(part, nn.Dropout):
                part.p = options.dropout
        if options.method == "lora":
            rank = min(options.rank, largest_rank(self.gpt)) if options.adapter else options.rank
            apply_lora(self.gpt, rank, options.seed)
        numbers = [self.labels.index(collection.art.labels[k]) for k in collection.art.label_of]
        self.flip = collection.flip_is_wise if options.flip is None else options.flip
        self.views = Views(collection, numbers, base, self.flip, options)
        self.task = TuneTask(self.views, collection.train, self.gpt, options)
        self.facts: dict[str, Any] = {}

    def begin(self) -> bool:
        """Say what was found, and write down what is done; False if all of it was done before."""
        options = asdict(self.options) | {"model": f"{self.base.name} {self.base.weights_hash[:12]}"}
        remember(self.work, {"art": self.collection.art.fingerprint, "stage": "finetune", "options": options})
        if (self.work / RESULT).is_file():
            say(f"{self.out} is finished already; another --out begins anew", self.options)
            return False
        say(self.collection.table(), self.options)
        if near := self.collection.near_duplicates:
            say(f"{near} nearly the same as others: those stay on one side of the split", self.options)
        try:
            self.collection.write(self.out / LISTING)
        except OSError as error:
            raise UserError(f"{self.out / LISTING} cannot be written: {error.strerror}") from error
        say(f"what was done with each file, and why, is in {self.out / LISTING}", self.options)
        return True

    # Before

    def prepare(self) -> None:
        """Choose a plan, say it before anything takes long, and measure the base; both are kept in a file."""
        path, validation, options = self.work / "plan.json", self.collection.validation, self.options
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self.plan, self.facts = Plan(**found["plan"]), dict(found["facts"])
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path} is damaged; delete it to go on, or use another --out") from error
            self.task.windows = plain_windows(self.views, validation, self.plan.windows)
            return
        first = itertools.count(0, options.batch)
        with self._autocast():
            step = seconds_for(lambda: self.task.try_step(next(first)))
        speeds = Speeds(step / options.batch, seconds_for(lambda: self._drawn(self.base, [0])))
        plan = choose(options, speeds, self._seconds(), self.views.plain * len(validation), self.base.gpt)
        for sentence in plan.sentences(options, self.collection, speeds, self.flip):
            say(sentence, options)
        self.task.windows = plain_windows(self.views, validation, plan.windows)
        with self._autocast():
            self.facts = self._base_facts(plan.asked)
        self.plan = plan.after(self._seconds(), options.minutes)
        with atomic_write(path) as beside:
            beside.write_text(json.dumps({"plan": asdict(self.plan), "facts": self.facts}, indent=2), encoding="utf-8")

    def _base_facts(self, asked: int) -> dict[str, Any]:
        """What the base is at its best: with the label under which some pictures of new labels surprise it least, where
        those of known labels keep theirs."""
        base, known, labels = self.base, len(self.base.labels), self.views.labels
        new = [i for i in self.collection.train if labels[i] >= known] or self.collection.train
        grids = [self.views.grid(i, 0) for i in new[:: math.ceil(len(new) / asked)]]
        nats = [label_nats(base.gpt, grid_hw, torch.ones_like(grid_hw, dtype=torch.bool)) for grid_hw in grids]
        nearest = int(torch.stack(nats).mean(0).argmin())
        windows = [(grid_hw, label if label < known else nearest) for grid_hw, label in self.task.windows]
        name = [*base.labels, "no label"][nearest]
        return {"nearest": name, "nearest_number": nearest, "base_bits": bits_of(base.gpt, windows)}

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.base.device.type, torch.bfloat16, enabled=use_bf16(self.options))

    # While it learns

    def learn(self) -> None:
        """Train; `gpt` has the best weights then."""
        options, plan = self.options, self.plan
        schedule = replace(
            schedule_for(plan.samples, options.batch, options),
            evaluations=plan.looks,
            seconds=math.inf if options.samples else plan.learning,
        )
        identity = f"{self.collection.art.fingerprint}/{self.base.weights_hash}"
        learned = run(self.task, schedule, self.work, {"identity": identity})
        assert isinstance(learned, GPT)
        self.gpt = learned
        if options.decoder_crops:
            assert isinstance(self.tokenizer, VQTokenizer)
            self.tokenizer, self.facts["decoder"] = tune_decoder(
                self.tokenizer, self.collection, options, self.flip, self.work
            )

    # After

    def finish(self) -> None:
        """Write the model, draw with it, look for copies, and say what came of it."""
        self.write()  # before anything else can go wrong
        facts, labels, plan, train = self.facts, self.views.labels, self.plan, self.collection.train
        facts["bits"] = numbers_of(self.task, self.options.batch, self.work)["bits"]
        columns = min(plan.columns, len(train))
        shown = [train[i * len(train) // columns] for i in range(columns)]
        asked = [labels[i] for i in (shown + train * plan.drawn)[: plan.drawn]]
        known = [label if label < len(self.base.labels) else facts["nearest_number"] for label in asked[:columns]]
        before = self._drawn(self.base, known)
        sampling = {"sampling": self.base.provenance.get("sampling", {})}
        after = self._drawn(Bundle(self.tokenizer, merge_lora(self.gpt), self.labels, provenance=sampling), asked)
        rows = {
            "the folder": [self.collection.art.picture(i) for i in shown],
            "before": before,
            "after": after[:columns],
        }
        write_sheet(self.out / SHEET, rows, sprites=self.base.downsample == 1)
        facts["copied"], facts["drawn"] = copies(self.collection, after), len(after)
        facts["minutes"], facts["peak_memory_gb"] = round(self._seconds() / 60, 1), peak_memory()
        say(self.write(), self.options)
        with atomic_write(self.work / RESULT) as beside:
            beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        for which in ("state", "best"):  # half a gigabyte that nobody needs any more
            state_file(self.work, self.task, which).unlink(missing_ok=True)
        for sentence in [*summary(facts), f"before and after are side by side in {self.out / SHEET}"]:
            say(sentence, self.options)

    def _drawn(self, model: Bundle, labels: list[int]) -> list[Image.Image]:
        """Shaped as most pictures of the folder are, so that whole pictures are seen."""
        train = self.collection.train
        shapes = Counter(tuple(self.views.grid(i, 0).shape) for i in train[:: math.ceil(len(train) / 8)])
        (h, w), _ = shapes.most_common(1)[0]
        grid = model.grids.composition(w * model.downsample, h * model.downsample)
        return draw_pictures(model, labels, grid, SEED)

    def write(self) -> str:
        """The model folder or the adapter, with everything that is known so far; a sentence that says so."""
        art, base, options = self.collection.art, self.base, self.options
        provenance: dict[str, Any] = {
            "base": base.name,
            "base_hash": base.weights_hash,
            "pictures": len(self.collection.train),
            "held_out": len(self.collection.validation),
            "art_fingerprint": art.fingerprint,
            "default_labels": art.labels,
            "sampling": base.provenance.get("sampling", {}),
            "trained": date.today().isoformat(),
            "command": command_line(),
            "options": asdict(options),
            "machine": f"{platform.machine()}, {base.device.type}, torch {torch.__version__}",
            "tokenizer": base.provenance.get("tokenizer", {}),
            "finetune": dict(self.facts),
        }
        if (best := state_file(self.work, self.task, "best")).is_file():
            load_state(best, {"model": self.gpt}, {})
            provenance["gpt"] = numbers_of(self.task, options.batch, self.work)
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


def peak_memory() -> float | None:
    """Of this process so far, in GB; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
