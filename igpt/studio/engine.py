"""What the page drives: the models by name, drawing, editing, measuring, learning, and the folder of pictures.

All that the studio knows of the inside of igpt is in this file. Nothing in here knows of a browser.
"""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from PIL import Image
from safetensors import safe_open
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

import igpt
from igpt import checkpoint, edit
from igpt.canvas import Batch
from igpt.config import DEFAULT_MODEL, NO_LABEL, AuditOptions, SurpriseOptions
from igpt.evaluation.copies import audit
from igpt.evaluation.surprise import surprise_map
from igpt.files import Output, stem_for
from igpt.fitting import PartialGrid
from igpt.image_gpt import ImageGPT
from igpt.recipe import digest, recipe_of
from igpt.sheet import CAPTION, MARGIN
from igpt.siblings import sibling
from igpt.sizes import LARGEST_SIDE
from tokenizer_vq.base import UserError
from tokenizer_vq.images import open_picture

from .jobs import Job, Jobs, Pictures, Stopped

LOADED_MODELS = 2  # that are kept in memory
PREVIEW_SIDE = 768  # pixels, at most
PREVIEW_SHARE = 1 / 2  # of the time that previews may take, at most
PROGRESS = re.compile(r"(\w+):\s+(\d+)%.*<([\d:]+)")  # of a training: what it does, share done and time left


@dataclass(frozen=True)
class Wish:
    """What is to be drawn. `how` are DrawArguments of igpt, `sprite` those that count where a token is a pixel; `size`
    is as after --size, empty for the model's own."""

    model: str
    n: int
    how: dict[str, Any]
    sprite: dict[str, Any]
    size: str = ""
    tile: bool = False
    atlas: bool = False


class Engine(Jobs):
    """The models that are on the list, and what can be done with them; each of these becomes a job."""

    def __init__(self, models: Sequence[str], out: Path, device: str | None = None) -> None:
        super().__init__()
        self.out, self.device = out.expanduser().absolute(), device
        self.places: dict[str, tuple[str, str | None]] = {}  # of each name the model, or the base and the adapter
        self._models: dict[str, ImageGPT] = {}
        self._loading = threading.Lock()
        for model in [*models, *checkpoint.in_the_box(), *map(str, sorted((self.out / "models").glob("*")))]:
            self.register(model)

    # Models

    def register(self, model: str) -> str:
        """Put a name, a folder or an adapter on the list; the name that it has there, which recipes give it, too."""
        place = Path(model).expanduser().absolute()
        place = place.parent if place.name == checkpoint.ADAPTER else place
        adapter, name = place / checkpoint.ADAPTER if place.is_dir() else place, place.name
        # By its whole path: a folder that is deleted later is not to be looked for on the net.
        found: tuple[str, str | None] = str(place) if place.exists() else model, None
        if adapter.is_file() and adapter.suffix == ".safetensors":
            name, found = name.removesuffix(adapter.suffix), (_base_of(adapter), str(adapter))
        self.places[name] = found
        self._models.pop(name, None)  # it may have learned more
        return name

    def model(self, name: str) -> ImageGPT:
        """The model of that name, loaded once. Raises UserError where it cannot be."""
        with self._loading:
            if name not in self._models:
                place, adapter = self.places[name]
                place = self.places.get(place, (place, None))[0] if adapter else place
                self._models[name] = igpt.load(place, self.device, adapter=adapter)
                while len(self._models) > LOADED_MODELS:
                    del self._models[next(iter(self._models))]
            return self._models[name]

    def card(self, name: str) -> str:
        """The card of a model as Markdown, without pictures and links to files. Raises UserError where it has none."""
        path = checkpoint.find(self.places[name][0]) / checkpoint.CARD
        if self.places[name][1] or not path.is_file():
            raise UserError(f"the model {name!r} has no card")
        text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", path.read_text(encoding="utf-8"))
        return re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", text)

    def examples(self, name: str, label: str | None) -> Image.Image | None:
        """A strip of pictures of a label, from the sheet of a model in the box."""
        path, labels = checkpoint.find(self.places[name][0]) / "labels.jpg", self.model(name).labels
        if self.places[name][1] or label not in labels or not path.is_file():
            return None
        with Image.open(path) as sheet:
            row = (sheet.height - MARGIN) // len(labels)
            top = MARGIN + row * labels.index(label)
            return sheet.crop((0, top, sheet.width, top + row - MARGIN - CAPTION))

    # Drawing

    def draw(self, wish: Wish, command: str = "", *parameters: Any) -> None:
        """Draw new pictures, or with the name and the parameters of a function of igpt.edit edited ones."""

        def work(job: Job) -> None:
            model, run = self.model(wish.model), sibling("generate.run")
            before: list[tuple[Any, str]] = [(Path(path), "before") for path in parameters[:1]]
            how, atlas = wish.how | (wish.sprite if model.downsample == 1 else {}), wish.atlas and model.downsample == 1
            if command:
                task = getattr(edit, command)(model, *_fitted(model, command, parameters))
                title = f"{Path(parameters[0]).stem}-{command}"
            else:
                task, title = model.new_picture(wish.size or None, wish.tile), wish.model
            draw = partial(_watched, job, before.copy())
            target = run.Target(Output(self.out), title, atlas=atlas, quiet=True, draw=draw)
            paths = run.draw_files(model.batches(task, wish.n, **how), target)
            if atlas:  # its PNG and JSON in one file, to be downloaded
                with ZipFile(paths[-2].with_suffix(".zip"), "w") as both:
                    for path in paths[-2:]:
                        both.write(path, path.name)
            done = [(path, path.stem) for path in paths if path.suffix == ".png"]
            job.show(f"{wish.n} drawn, in the folder {self.out.name}", before + done)

        what = f"{command} of {Path(parameters[0]).name}" if command else f"{wish.n} new"
        self.submit(f"{what} by {wish.model}", work)

    def redraw(self, path: str, *, tile: bool = False, scale: int = 1) -> None:
        """A picture's label, seed and options once more: as a texture, or `scale` times as large."""
        recipe, name = recipe_of(path), self._name_in(path)
        width, height = (min(side * scale, LARGEST_SIDE) for side in recipe.size)
        how = {"label": recipe.label or NO_LABEL, "seed": recipe.seed, "options": recipe.options}
        sprite = {"scale": recipe.sprite.scale, "ground": recipe.sprite.ground}
        self.draw(Wish(name, 1, how, sprite, f"{width}x{height}", tile))

    def replay(self, path: str) -> None:
        """Draw a picture again from its recipe, and say whether every pixel comes out the same."""
        recipe, name, place = recipe_of(path), self._name_in(path), self.out / f"{Path(path).stem}-replay.png"

        def work(job: Job) -> None:
            job.show("drawing it again", [(Path(path), "recorded")])
            with _stoppable(job):
                drawn = sibling("generate.run").replay(self.model(name), recipe, place, quiet=True)
            same = recipe_of(drawn).pixels == digest(open_picture(Path(path), mode="RGBA"))
            job.show(said := "the same pixels" if same else "other pixels", [(Path(path), "recorded"), (drawn, said)])

        self.submit(f"replay of {Path(path).name}", work)

    def _name_in(self, path: str) -> str:
        """The model that made a picture. Raises UserError where it is not on the list."""
        if (name := recipe_of(path).model) not in self.places:
            raise UserError(f"the picture was made by {name!r:.60}, which is not on the list of models")
        return name

    # Measuring

    def surprise(self, name: str, label: str | None, path: str) -> None:
        """A picture next to the bits that each of its tokens costs the model."""

        def work(job: Job) -> None:
            model, picture = self.model(name), open_picture(Path(path), Path(path).name)
            with _stoppable(job):
                found = surprise_map(model, picture, model.label_number(label), SurpriseOptions())
            job.show(found.sentence, [(found.sheet, "")])

        self.submit(f"surprise of {Path(path).name}", work)

    def audit(self, name: str, path: str, art: str) -> None:
        """The pictures of a folder that a picture comes nearest to."""

        def work(job: Job) -> None:
            with _stoppable(job):
                (found,) = audit(self.model(name), [Path(path)], art, AuditOptions(), quiet=True)
            job.lines = found.lines[1:]
            job.show(found.lines[0].removeprefix(f"{path}: "), [(found.sheet, "")])

        self.submit(f"audit of {Path(path).name}", work)

    # Learning

    def learn(self, base: str, art: str, name: str, *options: str) -> None:
        """Fine-tune a model on a folder, by `igpt finetune` in a process of its own. Raises UserError on an adapter."""
        if self.places[base][1]:
            raise UserError(f"{base} is an adapter, which cannot learn more; choose a model")
        out = self.out / "models" / stem_for(name, 0).removesuffix("-0")
        command = [sys.executable, "-m", "igpt", "finetune", art, "--out", str(out), "--model", self.places[base][0]]

        def work(job: Job) -> None:
            job.show("looking through the pictures")
            # A session of its own: Ctrl-C in the terminal reaches it by way of `stop`, once.
            process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, start_new_session=True)
            job.on_stop = lambda: process.send_signal(signal.SIGINT)
            if job.stopped:  # before there was a process
                job.on_stop()
            assert process.stderr is not None
            for line in process.stderr:  # a progress line that overwrites itself comes as many
                if found := PROGRESS.search(line):
                    job.state = f"{found[1].replace('finetune', 'learned')} {found[2]} %, {found[3]} left"
                    job.table, job.pictures = job.table or _rows(out / "pictures.csv", art), _newest_sheet(out)
                elif line.strip() and "it/s" not in line and "s/it" not in line:
                    job.lines = [*job.lines, line.rstrip()]
            code = process.wait()
            written = any((out / name).is_file() for name in (checkpoint.ADAPTER, *checkpoint.FILES))
            if job.stopped and not written:
                raise Stopped
            if code not in (0, 130):
                raise UserError(job.lines[-1].removeprefix("igpt: ") if job.lines else "the training broke off")
            job.pictures = [(path, "before and after") for path in out.glob("before-after.jpg")] or job.pictures
            job.state = f"**{self.register(str(out))}** is in the list of models"

        self.submit(f"learning {name}", work)


def _stoppable(job: Job) -> RemovableHandle:
    """A block that Stop ends before the next layer that any network computes."""
    return register_module_forward_pre_hook(lambda *_: job.check())


def _rows(listing: Path, art: str) -> list[list[str]]:
    """What `igpt finetune` did with each file and why: first what it skipped, and what else the folder holds."""
    with suppress(OSError), open(listing, encoding="utf-8", newline="") as file:
        rows = [[row["path"], row["use"], row["reason"]] for row in csv.DictReader(file)]
        others = {path.name for path in Path(art).glob("*.*")} - {path for path, _, _ in rows}
        rows += [[name, "skipped", "is no picture"] for name in sorted(others)]
        return sorted(rows, key=lambda row: not row[2])
    return []


def _newest_sheet(out: Path) -> Pictures:
    """What a model draws while it learns, as of the last time it was measured."""
    sheets = sorted(out.glob("training/*.png"), key=lambda sheet: sheet.stat().st_mtime)
    return [(sheet, f"drawn at step {sheet.stem.rpartition('-')[2].lstrip('0') or 0}") for sheet in sheets[-1:]]


def _base_of(adapter: Path) -> str:
    """The name of the model that an adapter was made for; of a damaged one any: loading says what is wrong with it."""
    with suppress(Exception), safe_open(adapter, framework="numpy") as file:
        return str(json.loads(file.metadata()["igpt-adapter"])["base"])
    return DEFAULT_MODEL


def _fitted(model: ImageGPT, command: str, parameters: tuple[Any, ...]) -> tuple[Any, ...]:
    """The parameters of an edit, with a mask that was painted on a copy of the picture in the picture's own size."""
    if command != "inpaint":
        return parameters
    path, mask = parameters
    return path, mask.resize(edit.open_source(model, path).picture.size, Image.Resampling.NEAREST)


def _watched(job: Job, done: list[tuple[Any, str]], batch: Batch) -> list[PartialGrid]:
    """The finished grids of a drawing, of which previews are shown meanwhile, after those of what is done."""
    grids, captioned, next_time = [], list[tuple[Any, str]](), 0.0
    for grids in batch.steps():
        share, now = batch.share_drawn(grids), time.monotonic()
        if share == 0 or (share < 1 and now < next_time):
            job.show(f"{share:.0%}")
            continue
        pictures = [batch.preview(grid) for grid in grids]
        for picture in pictures:
            picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.NEAREST)
        captioned = list(zip(pictures, map(str, batch.seeds), strict=True))
        job.show(f"{share:.0%}", done + captioned)
        next_time = time.monotonic() + (time.monotonic() - now) * (1 / PREVIEW_SHARE - 1)
    done += captioned
    return grids
