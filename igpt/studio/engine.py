"""What the page drives: the models by name, drawing, editing, learning, measuring, and the folder of pictures.

All that the studio knows of the inside of igpt is in this file. Nothing in here knows of a browser.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import safe_open

import igpt
from igpt import checkpoint, edit
from igpt.canvas import PartialGrid, generate_grids, preview, share_drawn
from igpt.config import DEFAULT_MODEL, NO_LABEL
from igpt.evaluation.options import AuditOptions
from igpt.files import stem_for, write_picture
from igpt.fitting import Canvas, canvas_for, finish
from igpt.image_gpt import ImageGPT
from igpt.recipe import Recipe, digest, recipe_of
from igpt.sampling import generators
from igpt.sheet import CAPTION, MARGIN
from igpt.siblings import sibling
from igpt.sizes import LARGEST_SIDE, parse_size
from tokenizer_vq.base import UserError
from tokenizer_vq.images import open_picture

from .jobs import Job, Jobs, Shown

LOADED = 2  # models that are kept in memory
LARGEST_PREVIEW = 768  # pixels a side of an unfinished picture
PREVIEWS = 1 / 3  # share of the time that they may take, at most
SURPRISE_ORDERS = 8
PROGRESS = re.compile(r"\w+:\s+(\d+)%.*<([\d:]+)")  # of a training: share done and time left


@dataclass(frozen=True)
class Asked:
    """What is to be drawn; `size` is text as after --size, empty for the model's own."""

    model: str
    label: str | None
    n: int
    seed: int
    sampling: dict[str, Any] = field(default_factory=dict)
    size: str = ""
    tile: bool = False

    @property
    def seeds(self) -> range:
        """One for each picture."""
        return range(self.seed, self.seed + self.n)


class Engine(Jobs):
    """The models that are on the list, and what can be done with them; each of these becomes a job."""

    def __init__(self, models: Sequence[str], out: Path, device: str | None = None):
        super().__init__()
        self.out, self.device = out.expanduser().absolute(), device
        self.places: dict[str, tuple[str, str | None]] = {}  # of each name the model, and the adapter if there is one
        self._loaded: dict[str, ImageGPT] = {}
        self._loading = threading.Lock()
        for model in [*models, *checkpoint.in_the_box(), *map(str, sorted((self.out / "models").glob("*")))]:
            self.register(model)

    # Models

    def register(self, model: str) -> str:
        """Put a name, a folder or an adapter on the list; the name that it has there."""
        place = Path(model).expanduser().absolute()
        adapter = place / checkpoint.ADAPTER if place.is_dir() else place
        if adapter.is_file():
            name, base = place.stem, _base_of(adapter)
            self.places[name] = self.places.get(base, (base, None))[0], str(adapter)
        else:
            # By its whole path: a folder that is deleted later is not to be looked for on the net.
            name = place.name if place.is_dir() else str(model)
            self.places[name] = str(place if place.is_dir() else model), None
        return name

    def model(self, name: str) -> ImageGPT:
        """The model of that name, loaded once. Raises UserError where it cannot be."""
        with self._loading:
            if name not in self._loaded:
                place, adapter = self.places[name]
                self._loaded[name] = igpt.load(place, self.device, adapter=adapter)
                while len(self._loaded) > LOADED:
                    del self._loaded[next(iter(self._loaded))]
            return self._loaded[name]

    def card(self, name: str) -> str:
        """The card of a model as Markdown, without its pictures."""
        path = checkpoint.find(self.places[name][0]) / checkpoint.CARD
        if self.places[name][1] or not path.is_file():
            raise UserError(f"the model {name!r} has no card")
        return re.sub(r"!\[[^]]*\]\([^)]*\)", "", path.read_text(encoding="utf-8"))

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

    def draw(self, asked: Asked) -> None:
        """New pictures, written to the folder with their recipes."""

        def work(job: Job) -> None:
            model, options = self._ready(job, asked)
            labels = model.labels_for(asked.label, asked.seed, asked.n)
            canvas = canvas_for(model, model.size(asked.size or None), asked.tile)
            seeds, numbers = generators(asked.seed, asked.n), model.label_numbers(labels)
            captions = [f"{seed} {label or model.name}" for label, seed in zip(labels, asked.seeds, strict=True)]
            frames, drawn = generate_grids(model, canvas, numbers, seeds, options), []
            for i, grid in enumerate(_watched(job, model, canvas, frames, captions)):
                how = {"label": labels[i], "seed": asked.seeds[i], "options": options, "tile": asked.tile}
                picture = finish(model, grid.tokens_hw, canvas)
                drawn.append((self._write(model, picture, grid.tokens_hw, labels[i] or model.name, how), captions[i]))
            job.show(f"{asked.n} drawn, in {self.out}", drawn)

        self.submit(f"{asked.n} new by {asked.model}", work)

    def edit(self, asked: Asked, command: str, source: str, *how: Any) -> None:
        """Draw on from a picture: `how` is what the edit of that name in igpt.edit wants beside its sources."""

        def work(job: Job) -> None:
            model, options = self._ready(job, asked)
            wanted = edit.labelled(model, _edit_of(model, command, source, how), asked.label)
            canvas = canvas_for(model, wanted.size)
            shown: list[tuple[Path, str]] = [(Path(source), "before")]
            for seed in asked.seeds:
                frames, caption = edit.draw_edit(model, wanted, seed, options), f"{seed} {wanted.label or model.name}"
                (grid,) = _watched(job, model, canvas, frames, [caption], shown)
                result = edit.finish_edit(model, wanted, seed, grid.tokens_hw)
                given = tuple(result.given_hw.flatten().tolist())
                recipe = dict(label=wanted.label, seed=seed, options=options, command=command, given=given)
                stem = f"{Path(source).stem}-{command}"
                shown.append((self._write(model, result.picture, result.tokens_hw, stem, recipe), caption))
            job.show(f"{asked.n} drawn, in {self.out}", shown)

        self.submit(f"{command} of {Path(source).name} by {asked.model}", work)

    def again(self, path: str, *, tile: bool = False, scale: int = 1) -> None:
        """A picture's label, seed and options once more: as a texture, or `scale` times as large."""
        recipe = recipe_of(path)
        width, height = (min(side * scale, LARGEST_SIDE) for side in recipe.size)
        name, label, options = self._name_for(recipe), recipe.label or NO_LABEL, asdict(recipe.options)
        self.draw(Asked(name, label, 1, recipe.seed, options, f"{width}x{height}", tile))

    def replay(self, path: str) -> None:
        """Draw a picture again from its recipe, and say whether every pixel comes out the same."""
        recipe, place = recipe_of(path), self.out / f"{Path(path).stem}-replay.png"

        def work(job: Job) -> None:
            job.show("drawing it again", [(Path(path), "recorded")])
            drawn = sibling("generate.run").replay(self.model(self._name_for(recipe)), recipe, place, quiet=True)
            same = digest(open_picture(drawn)) == digest(open_picture(Path(path)))
            said = "the same pixels" if same else "the same tokens, but other pixels"
            job.show(said, [(Path(path), "recorded"), (drawn, said)])

        self.submit(f"replay of {Path(path).name}", work)

    def _ready(self, job: Job, asked: Asked) -> tuple[ImageGPT, igpt.SamplingOptions]:
        job.show("")
        model = self.model(asked.model)
        options = replace(model.sampling, **asked.sampling)
        options.check()
        return model, options

    def _write(self, model: ImageGPT, picture: Image.Image, tokens_hw: Any, stem: str, how: dict[str, Any]) -> Path:
        how |= {"size": picture.size, "pixels": digest(picture), "grid": (tokens_hw.shape[0], tokens_hw.shape[1])}
        recipe = Recipe(model.name, model.weights_hash, tokens=tuple(tokens_hw.flatten().tolist()), **how)
        return write_picture(picture, self.out / f"{stem_for(stem, recipe.seed)}.png", recipe)

    def _name_for(self, recipe: Recipe) -> str:
        """Raises UserError where the model that a recipe names is not on the list."""
        if recipe.model not in self.places:
            raise UserError(f"the picture was made by {recipe.model!r:.60}, which is not on the list of models")
        return recipe.model

    # Measuring

    def surprise(self, name: str, label: str | None, path: str) -> None:
        """A picture beside the bits that each of its tokens costs the model."""

        def work(job: Job) -> None:
            from igpt.evaluation.surprise import surprise_map

            job.show("asking the model")
            model, picture = self.model(name), open_picture(Path(path), Path(path).name)
            found = surprise_map(model, picture, model.label_number(label), orders=SURPRISE_ORDERS, seed=0)
            job.show(found.sentence, [(found.sheet, "")])

        self.submit(f"surprise of {Path(path).name}", work)

    def audit(self, name: str, path: str, art: str) -> None:
        """The pictures of a folder that a picture comes nearest to."""

        def work(job: Job) -> None:
            from igpt.evaluation.audit import audit

            job.show("comparing it with the folder")
            (verdict,) = audit(self.model(name), [Path(path)], art, AuditOptions(), quiet=True)
            job.lines = verdict.lines[1:]
            job.show(verdict.lines[0].removeprefix(f"{path}: "), [(verdict.sheet, "")])

        self.submit(f"audit of {Path(path).name}", work)

    # Learning

    def learn(self, base: str, art: str, name: str, *flags: str) -> None:
        """Fine-tune a model on a folder, by `igpt finetune` in a process of its own."""
        out = self.out / "models" / stem_for(name, 0).removesuffix("-0")
        words = ["finetune", art, "--out", str(out), "--model", self.places[base][0], *flags]

        def work(job: Job) -> None:
            job.show("looking through the pictures")
            # A session of its own: Ctrl-C in the terminal reaches it by way of `stop`, once.
            command = [sys.executable, "-m", "igpt", *words]
            process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
            job.on_stop = lambda: process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            for line in process.stderr:  # a progress line that overwrites itself comes as many
                if found := PROGRESS.search(line):
                    job.state = f"learned {found[1]} %, {found[2]} left"
                elif line.strip():
                    job.lines.append(line.rstrip())
                job.version += 1
            if process.wait() not in (0, 130):
                raise UserError(job.lines[-1].removeprefix("igpt: ") if job.lines else "the training broke off")
            job.pictures = [(path, "before and after") for path in out.glob("before-after.jpg")]
            job.state = f"**{self.register(str(out))}** is in the list of models"

        self.submit(f"learning {name}", work)


def _base_of(adapter: Path) -> str:
    """The name of the model that an adapter was made for; of a damaged one any: loading says what is wrong with it."""
    with suppress(Exception), safe_open(adapter, framework="numpy") as file:
        return str(json.loads(file.metadata()["igpt-adapter"])["base"])
    return DEFAULT_MODEL


def _edit_of(model: ImageGPT, command: str, path: str, how: tuple[Any, ...]) -> edit.Edit:
    """An edit by its name. Raises UserError for a picture or a wish that cannot be."""
    source = edit.open_source(model, path)
    if command == "inpaint":  # what was painted on a smaller copy, in the picture's own size
        mask = how[0].resize(source.picture.size, Image.Resampling.NEAREST)
        return edit.inpaint(source, edit.open_source(model, mask))
    if command == "extend":
        return edit.extend(source, parse_size(how[0]), how[1], model.downsample)
    if command == "blend":
        return edit.blend(model, source, edit.open_source(model, how[0]), how[1])
    return edit.vary(model, source, *how) if command == "vary" else edit.complete(source, *how)


def _watched(
    job: Job, model: ImageGPT, canvas: Canvas, frames: Iterator[list[PartialGrid]], names: list[str], before: Shown = ()
) -> list[PartialGrid]:
    """The finished grids of a drawing, which is shown while it goes on."""
    grids, next_time = [], 0.0
    for grids in frames:
        share, began = share_drawn(canvas, grids), time.monotonic()
        if share < 1 and began < next_time:
            job.show(f"{share:.0%}")
            continue
        pictures = [preview(model, grid, canvas) for grid in grids]
        for picture in pictures:
            picture.thumbnail((LARGEST_PREVIEW, LARGEST_PREVIEW))
        job.show(f"{share:.0%}", [*before, *zip(pictures, names, strict=True)])
        next_time = time.monotonic() + (time.monotonic() - began) * (1 / PREVIEWS - 1)
    return grids
