"""`igpt finetune`: from a trained model and a folder of a person's own to a model, or an adapter, in its manner.

Everything is chosen from the pictures and the machine (plan.py), said before it starts, and written down: the same
command goes on where it was stopped, and stopped at any moment it leaves a model of the best so far.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from igpt import checkpoint
from igpt.cpu import keep_freed_memory
from igpt.device import pick_device
from igpt.files import atomic_write
from igpt.image_gpt import ImageGPT
from igpt.lora import largest_rank, merged, save_adapter, with_labels
from igpt.model import GPT
from igpt.sizes import grid_for
from tokenizer_vq.base import UserError
from tokenizer_vq.vq import VQTokenizer

from .baseline import ALL, look
from .card import tuned_card
from .collection import Collection, gather
from .folder import command_line, numbers_of, precision_of, remember, say, state_file, work_folder
from .forgetting import Remembered
from .loop import Schedule, run
from .newness import copies
from .options import TuneOptions
from .plan import Plan, choose, measure_speeds
from .repaint import repainted
from .state import load_state
from .tokens import encode, free_view
from .tune import (
    TuneStage,
    bits_of,
    draw_pictures,
    prepared,
    rehearsal,
    write_sheet,
)
from .verdict import peak_memory, sentences

LISTING, SHEET, RESULT = "pictures.csv", "before-after.jpg", "result.json"
COLUMNS, COPIES = 8, 24  # pictures a row of the sheet, and drawn to look for copies
SEED = 1000  # of what is drawn to look at


def finetuned(art: str | Path, out: str | Path, model: str, options: dict[str, Any]) -> ImageGPT:
    """As `finetune`, with options by name; the tuned model."""
    try:
        chosen = TuneOptions(**options)
    except TypeError as error:
        raise UserError(f"finetune has no such option: {error}") from error
    folder = finetune(art, out, model, chosen)
    return ImageGPT.load(model, adapter=folder / checkpoint.ADAPTER) if chosen.adapter else ImageGPT.load(folder)


def finetune(art: str | Path, out: str | Path, model: str, options: TuneOptions) -> Path:
    """Fine-tune `model` on the pictures in `art` and write a model folder, or an adapter, to `out`.

    Raises UserError on a base, pictures or options that cannot be used, and where `out` holds something else. On
    Ctrl-C what was best so far is written before KeyboardInterrupt goes on.
    """
    options.check()
    keep_freed_memory()
    out = Path(out).expanduser()
    work = work_folder(out, None)
    base = _base(model)
    tuning = _Tuning(gather(art), out, work, Path(model).name, base, options)
    if tuning.begin():
        try:
            tuning.prepare()
            tuning.learn()
            tuning.repaint()
        except KeyboardInterrupt:
            tuning.leave()
            raise
        except OSError as error:
            raise UserError(f"the training cannot be written to {work}: {error.strerror}") from error
        tuning.finish()
    return out


def _base(model: str) -> checkpoint.Checkpoint:
    """The model to start from. Raises UserError for one that cannot be fine-tuned."""
    found = checkpoint.load(model)
    if found.gpt is None:
        raise UserError(f"the model {model!r} has a tokenizer but no GPT yet: train one with `igpt train gpt`")
    if not isinstance(found.tokenizer, VQTokenizer):
        raise UserError(f"the model {model!r} has a pixel tokenizer; fine-tuning wants a base with a VQ tokenizer")
    return found


class _Tuning:
    """One fine-tuning, step by step."""

    def __init__(
        self, collection: Collection, out: Path, work: Path, name: str, base: checkpoint.Checkpoint,
        options: TuneOptions,
    ):  # fmt: skip
        assert base.gpt is not None
        self.collection, self.out, self.work, self.options = collection, out, work, options
        self.base, self.base_name, self.base_gpt = base, name, base.gpt
        self.device, self.bf16 = pick_device(), precision_of(options) == "bf16"
        # Sub-folders with the name of a known label add to that label.
        self.new = [label for label in collection.art.labels if label not in base.labels]
        self.labels = base.labels + self.new
        self.tokenizer = base.tokenizer
        self.gpt: GPT | None = None
        self.stage: TuneStage | None = None
        self.began = time.monotonic()
        self.facts: dict[str, Any] = {}

    def begin(self) -> bool:
        """Say what was found, and write down what is done; False if all of it was done before."""
        options = asdict(self.options) | {"model": f"{self.base_name} {self.base.weights_hash[:12]}"}
        remember(self.work, {"art": self.collection.art.fingerprint, "stage": "finetune", "options": options})
        if (self.work / RESULT).is_file():
            say(f"{self.out} is finished already; another --out begins anew", self.options)
            return False
        self._say(self.collection.table())
        near = self.collection.near_duplicates
        if near:
            self._say(f"{near} nearly the same as others: those stay on one side of the split")
        try:
            self.collection.write(self.out / LISTING)
        except OSError as error:
            raise UserError(f"{self.out / LISTING} cannot be written: {error.strerror}") from error
        self._say(f"what was done with each file, and why, is in {self.out / LISTING}")
        return True

    # Before

    def prepare(self) -> None:
        """Plan, encode, find where the new labels start, measure the base."""
        art, collection = self.collection.art, self.collection
        self.plan = self._plan()
        self.cache = encode(
            art, self.base.tokenizer, self.work / "tokens.safetensors", view_of=self._view(self.plan.flip),
            views=self.plan.views, identity=self._identity(), device=self.device, bf16=self.bf16,
            save_seconds=60 * self.options.save_minutes, quiet=self.options.quiet,
        )  # fmt: skip
        self.base_gpt.to(self.device)
        self.remembered = Remembered.of(self.options, self.base, self.device, self.bf16)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            starts = self._known("base.json", self._measure_base)
            rehearsed = None
            if self.options.rehearse and self.base.labels:
                rehearsed = rehearsal(self.base_gpt, self.plan.views, self.options.seed)
        self.facts |= starts["facts"]
        self.starts: list[int] = starts["starts"]
        self.cache.labels = [self.labels.index(art.labels[art.label_of[i]]) for i in range(len(art))]
        begin = [self.starts[art.labels.index(label)] for label in self.new]
        self.gpt = prepared(self.base_gpt, begin, self.plan.method, self.plan.rank, self.options)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            self.stage = TuneStage(
                self.cache, self.base.tokenizer, self.labels, collection.train, collection.validation,
                self.gpt.to(self.device), self.options, self.plan, rehearsed,
            )  # fmt: skip

    def _plan(self) -> Plan:
        path, art = self.work / "plan.json", self.collection.art
        if path.is_file():
            self._say("going on as planned before")
            return Plan.load(path)
        gpt = prepared(self.base_gpt, [], self.options.method, 16, self.options)
        first = [art.picture(i) for i in self.collection.train[:3]]
        speeds = measure_speeds(
            gpt, self.base.tokenizer.to(self.device), first, self._view(True), device=self.device, bf16=self.bf16
        )
        labels, most = len(self.base.labels), largest_rank(self.base_gpt)
        plan = choose(self.options, self.collection, speeds, labels=labels, largest_rank=most)
        for sentence in plan.sentences(self.collection, speeds):
            self._say(sentence)
        plan.save(path)
        return plan

    def _view(self, flip: bool) -> Any:
        """How a numbered view of a picture is cut, always in the same way."""
        cells, side, seed = self.base_gpt.config.cells, self.base.tokenizer.downsample, self.options.seed

        def view(picture: Image, number: int, which: int) -> Tensor:
            return free_view(picture, which, cells, side, flip, Random(f"view/{seed}/{number}/{which}"))

        return view

    def _measure_base(self) -> dict[str, Any]:
        """See `baseline.look`; and what the base knows of its own art, where that is given."""
        found = look(self.base_gpt, self.base.labels, self.cache, self.collection, self.options.seed)
        if self.remembered:
            found["facts"]["forgetting_before"] = self.remembered.bits(self.base_gpt, self.options.seed)
            found["facts"]["forgetting_psnr_before"] = self.remembered.psnr(self.base.tokenizer)
        return found

    def _known(self, name: str, find_out: Any) -> dict[str, Any]:
        """What `find_out()` gives, or gave when it was run before."""
        path = self.work / name
        if path.is_file():
            return dict(json.loads(path.read_text(encoding="utf-8")))
        found: dict[str, Any] = find_out()
        with atomic_write(path) as beside:
            beside.write_text(json.dumps(found, indent=2), encoding="utf-8")
        return found

    # While it learns

    def learn(self) -> None:
        """Train; `gpt` has the best weights then."""
        assert self.stage is not None
        options, plan = self.options, self.plan
        schedule = Schedule(
            plan.samples // plan.batch, plan.batch, 60 * options.save_minutes, options.patience, options.seed,
            precision_of(options), options.workers, options.quiet,
        )  # fmt: skip
        learned = run(self.stage, schedule, self.work, {"identity": self._identity()})
        assert isinstance(learned, GPT)
        self.gpt = learned

    def repaint(self) -> None:
        """Let the decoder learn the folder's colours and lines, and keep it if unseen pictures come out better."""
        if self.plan.decoder_crops:
            assert isinstance(self.tokenizer, VQTokenizer)
            identity = self._identity()
            self.tokenizer, numbers = repainted(
                self.tokenizer, self.collection, self.plan, self.options, self.work, identity
            )
            self.facts |= numbers

    def leave(self) -> None:
        """After Ctrl-C: write what was best so far, or where nothing was learned yet the base that knows the labels."""
        if self.gpt is None:
            rows = self.base_gpt.labels.weight.detach()[[-1] * len(self.new)]
            self.gpt = prepared(with_labels(self.base_gpt, rows), [], "lora", 1, self.options)
        best = self.stage and state_file(self.work, self.stage, "best")
        if best and best.is_file():
            load_state(best, {"model": self.gpt}, {})
        else:
            self._say("nothing has been learned yet: this is the base, which only knows the new labels by name")
        self._say(self._write())

    # After

    def finish(self) -> None:
        """Write the model, measure it, draw the sheet, look for copies, and say what came of it."""
        assert self.gpt is not None and self.stage is not None
        self._write()  # before anything else can go wrong
        gpt, seed, facts = merged(self.gpt).eval(), self.options.seed, self.facts
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            facts["bits"] = bits_of(gpt, self.stage.validation, seed, ALL)
            facts["bits_training"] = bits_of(gpt, self.stage.training, seed, ALL)
            if self.remembered:
                facts["forgetting_after"] = self.remembered.bits(gpt, seed)
                facts["forgetting_psnr_after"] = self.remembered.psnr(self.tokenizer)
        self._draw_sheet(gpt)
        model = ImageGPT(self.tokenizer, gpt, self.labels, weights_hash=f"{self.out.absolute()}-{time.time()}")
        side = grid_for(1024, 1024, model.downsample, model.native_cells)
        labels = [self.stage.drawn[i % len(self.stage.drawn)] for i in range(COPIES)]
        drawn = draw_pictures(gpt, self.tokenizer, labels, side, SEED)
        told, kept = self.collection.train[:300], self.collection.validation
        facts["copied"] = copies(model, drawn, self.collection.art, told, kept, self.base.weights_hash)
        facts["drawn"] = COPIES
        facts["minutes"] = round((time.monotonic() - self.began) / 60, 1)
        facts["peak_memory_gb"] = peak_memory()
        self._say(self._write())
        with atomic_write(self.work / RESULT) as beside:
            beside.write_text(json.dumps(facts, indent=2), encoding="utf-8")
        for sentence in sentences(facts, len(self.collection.validation), self.out / SHEET):
            self._say(sentence)

    def _draw_sheet(self, gpt: GPT) -> None:
        """Shaped as the pictures of the folder are, so that whole pictures are seen."""
        art, train = self.collection.art, self.collection.train
        aspect = min(2.0, max(0.5, median(art.sizes[i][0] / art.sizes[i][1] for i in train)))
        tokenizer, cells = self.tokenizer, gpt.config.cells
        grid = grid_for(round(1000 * aspect), 1000, tokenizer.downsample, cells)
        shown = [train[i * len(train) // COLUMNS] for i in range(COLUMNS)]
        names = [art.label_of[i] for i in shown]
        old = [self.starts[n] for n in names]
        before = draw_pictures(self.base_gpt.to(self.device), self.base.tokenizer, old, grid, SEED)
        after = draw_pictures(gpt, tokenizer, [self.labels.index(art.labels[n]) for n in names], grid, SEED)
        write_sheet(self.out / SHEET, [art.picture(i) for i in shown], before, after)

    def _write(self) -> str:
        """The model folder or the adapter, with everything that is known so far; a sentence that says so."""
        assert self.gpt is not None
        about = self.base.provenance
        provenance: dict[str, Any] = {
            "base": self.base_name, "base_hash": self.base.weights_hash, "pictures": len(self.collection.train),
            "held_out": len(self.collection.validation), "art_fingerprint": self.collection.art.fingerprint,
            "finetuned_labels": self.collection.art.labels,
            "trained": date.today().isoformat(), "command": command_line(), "options": asdict(self.options),
            "machine": f"{platform.machine()}, {self.device.type}, torch {torch.__version__}",
            "tokenizer": about.get("tokenizer", {}), "finetune": dict(self.facts),
        }  # fmt: skip
        if self.stage is not None and state_file(self.work, self.stage, "best").is_file():
            provenance["plan"] = asdict(self.plan)
            provenance["gpt"] = numbers_of(self.stage, self.plan.batch, self.work)
        card = tuned_card(self.out.name, provenance, self.labels, self.new)
        if self.options.adapter:
            path = self.out / checkpoint.ADAPTER
            save_adapter(path, self.gpt, self.labels, self.base_name, self.base.weights_hash, provenance)
            draw = f"--model {self.base_name} --adapter {path}"
        else:
            checkpoint.save(self.out, self.tokenizer, merged(self.gpt), self.labels, provenance, card)
            draw = f"--model {self.out}"
        label = f" --label {self.new[0]}" if self.new else ""
        return f"written to {self.out}: draw with `igpt generate {draw}{label}`"

    def _identity(self) -> str:
        """What the token cache and the states are of."""
        art, base, plan = self.collection.art.fingerprint, self.base.weights_hash, self.plan
        return f"{art}/{base}/{plan.views}/{plan.flip}/{self.options.seed}"

    def _say(self, sentence: str) -> None:
        say(sentence, self.options)
