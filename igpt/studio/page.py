"""What all tabs share: the settings above them, and next to them the easel with what is being drawn."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr

from igpt.config import ANY_LABEL, GROUNDS, NO_LABEL, ORDERS
from tokenizer_vq.base import UserError

from .engine import Engine, Wish

BY_SEED = "chosen by the seed"
LARGEST_NEW_SEED = 1_000_000  # short enough to be remembered
LOOK_EVERY = 0.05  # seconds between two looks at a job
QUIET: dict[str, Any] = {"show_progress": "hidden"}
# How `watch` is called: once more after it ended, where it is asked for meanwhile.
WATCHING = QUIET | {"trigger_mode": "always_last", "concurrency_limit": None}


class Page:
    """The engine, and the parts of the page that more than one tab needs."""

    tabs: Any
    tab: Any  # the one that is being built
    source: Any  # the picture to edit

    def __init__(self, engine: Engine):
        self.engine = engine

    def settings(self) -> None:
        """Model, label, how many and which seed, for everything that draws."""
        names = list(self.engine.places)
        with gr.Row():
            self.model = gr.Dropdown(names, value=names[0], label="Model", min_width=150)
            self.label = gr.Dropdown(label="Label", min_width=150)
            self.n = gr.Slider(1, 16, 1, step=1, label="How many", min_width=150)
            self.seed = gr.Number(0, precision=0, minimum=0, label="Seed of the first", min_width=150)
            self.fresh = gr.Checkbox(True, label="A new seed each time", elem_classes="tick")
        self.strip = gr.Image(visible=False, show_label=False, buttons=[], elem_id="strip", interactive=False)
        with gr.Accordion("Sampling", open=False), gr.Row():
            self.sampling = {
                "steps": gr.Slider(1, 256, step=1, label="Steps", min_width=150),
                "temperature": gr.Slider(0, 2, step=0.05, label="Temperature", min_width=150),
                "guidance": gr.Slider(0, 10, step=0.1, label="Guidance towards the label", min_width=150),
                "top_k": gr.Slider(0, 4096, step=1, label="Top k (0: all)", min_width=150),
                "top_p": gr.Slider(0.05, 1, step=0.05, label="Top p", min_width=150),
                "order": gr.Radio(list(ORDERS), label="Order of the cells", min_width=150),
            }
        with gr.Accordion("Sprites", open=False, visible=False) as self.sprites, gr.Row():
            with gr.Column(min_width=300):
                self.scale = gr.Slider(1, 16, 1, step=1, label="Pixels a side of each pixel")
                self.clear = gr.Checkbox(True, label="The ground is transparent")
                self.atlas = gr.Checkbox(label="All of them on one atlas, too")
            self.palette = dropped("Another palette: .gpl or .hex", "palette")
        self.model.input(self.for_model, self.model, self.of_model, **QUIET)
        self.label.change(self._example, [self.model, self.label], self.strip, **QUIET)

    def easel(self) -> None:
        """What is being drawn or was drawn last, whoever asked for it."""
        self.status = gr.Markdown(elem_id="status")
        look: dict[str, Any] = {"object_fit": "contain", "fit_columns": False, "format": "png", "show_label": False}
        self.pictures = gr.Gallery(elem_id="easel", buttons=["fullscreen"], **look)
        with gr.Row():
            stop = gr.Button("Stop", variant="stop", size="md", min_width=90)
            self.download = gr.DownloadButton("Download", interactive=False, size="md", min_width=90)
        self.log = gr.Textbox(visible=False, label="What it says", lines=2, max_lines=16, elem_id="log")
        look = {"headers": ["file", "use", "reason"], "column_widths": ["44%", "26%", "30%"], "wrap": True}
        self.table = gr.Dataframe(visible=False, interactive=False, max_height=300, elem_id="files", **look)
        self.files: Any = gr.State([])  # the files on the easel
        stop.click(self.engine.stop, **QUIET)
        self.pictures.select(_chosen, self.files, self.download, **QUIET)

    # What a tab asks for

    def inputs(self, *more: Any) -> set[Any]:
        """The settings and what a tab adds to them: the inputs of a handler that calls `draw`."""
        own = self.model, self.label, self.n, self.seed, self.fresh, self.scale, self.palette, self.clear, self.atlas
        return {*own, *self.sampling.values(), *more}

    def draw(self, given: dict[Any, Any], command: str = "", *parameters: Any, **more: Any) -> int:
        """Have drawn what the settings ask for, as `Engine.draw`; the seed of the first."""
        how = {name: given[control] for name, control in self.sampling.items()}
        how["label"] = None if given[self.label] == BY_SEED else given[self.label]
        how["seed"] = secrets.randbelow(LARGEST_NEW_SEED) if given[self.fresh] else int(given[self.seed] or 0)
        sprite = {"scale": int(given[self.scale] or 1), "ground": GROUNDS[not given[self.clear]]}
        sprite |= {"palette": given[self.palette]} if given[self.palette] else {}
        wish = Wish(given[self.model], int(given[self.n] or 1), how, sprite, atlas=given[self.atlas], **more)
        self.engine.draw(wish, command, *parameters)
        return int(how["seed"])

    def on_press(self, button: Any, handler: Callable[..., Any], inputs: Any = None, outputs: Any = None) -> None:
        """Do something where a button is pressed, however often, and watch what comes of it."""
        pressed = button.click(said(handler), inputs, outputs, trigger_mode="multiple", **QUIET)
        pressed.then(self.watch, None, self.views, **WATCHING)

    # What changes

    @property
    def views(self) -> list[Any]:
        """What `watch` gives new values."""
        return [self.status, self.model, self.log, self.table, self.pictures, self.download, self.files]

    async def watch(self) -> AsyncIterator[list[Any]]:
        """What the easel shows, as far as it changes, until everything is done."""
        seen = [object()] * len(self.views)  # equal to nothing
        while True:
            idle, now = self.engine.idle, self._now()
            if now != seen:
                yield [gr.skip() if new == old else view for new, old, view in zip(now, seen, _views(now), strict=True)]
                seen = now
            elif idle:
                return
            await asyncio.sleep(LOOK_EVERY)

    def _now(self) -> list[Any]:
        """Of each view what it shows."""
        job, waiting = self.engine.now, self.engine.waiting.qsize()
        status = ": ".join(filter(None, (job.title, job.state)))
        status += f"; {waiting} more waiting until it is done" * bool(waiting)
        pictures = [(p, caption) for p, caption in job.pictures if not isinstance(p, Path) or p.exists()]
        files = [_download(p) if isinstance(p, Path) else None for p, _ in pictures]
        last = next((file for file in reversed(files) if file), None)
        return [status, list(self.engine.places), "\n".join(job.lines), job.table, pictures, last, files]

    @property
    def of_model(self) -> list[Any]:
        """What has other values with every model."""
        return [self.label, self.sprites, *self.sampling.values()]

    def for_model(self, name: str) -> list[Any]:
        """The values of `of_model` for the model of that name."""
        model = said(self.engine.model)(name)
        labels = [BY_SEED, ANY_LABEL, *model.labels, NO_LABEL] if model.labels else [NO_LABEL]
        sampling = [getattr(model.sampling, field) for field in self.sampling]
        return [gr.Dropdown(labels, value=labels[0]), gr.Accordion(visible=model.downsample == 1), *sampling]

    def _example(self, name: str, label: str) -> Any:
        picture = said(self.engine.examples)(name, label)
        return gr.Image(picture, visible=picture is not None)


def button(name: str) -> Any:
    """The one that a tab is about."""
    return gr.Button(name, variant="primary")


def dropped(label: str, name: str, **more: Any) -> Any:
    """A box to drop a file into."""
    return gr.File(label=label, height=140, elem_id=name, min_width=150, **more)


def said(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with what a user can put right said on the page."""

    def handle(*given: Any) -> Any:
        try:
            return handler(*given)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return handle


def _views(now: list[Any]) -> list[Any]:
    """What shows it."""
    status, names, lines, table, pictures, last, files = now
    columns = 1 if len(files) < 2 else 2 if len(files) < 5 else 4
    return [
        status,
        gr.Dropdown(names),
        gr.Textbox(lines, visible=bool(lines)),
        gr.Dataframe(table, visible=bool(table)),
        gr.Gallery(pictures, columns=columns, selected_index=None),
        gr.DownloadButton(value=last, interactive=last is not None),
        files,
    ]


def _download(path: Path) -> str:
    """The file of a picture; of an atlas the .zip that also has its JSON."""
    both = path.with_suffix(".zip")
    return str(both if both.exists() else path)


def _chosen(files: list[str | None], event: gr.SelectData) -> Any:
    return gr.DownloadButton(value=files[event.index], interactive=files[event.index] is not None)
