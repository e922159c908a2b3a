"""The tab that teaches a model pictures of one's own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gradio as gr

from igpt.files import stem_for
from igpt.siblings import sibling
from tokenizer_vq.base import UserError, complaint

from .page import Page


def add_to(page: Page) -> None:
    """Pictures, a name, a time."""
    gr.Markdown(
        "The chosen model learns your pictures. Ten or more are wanted; it stops by itself, or keeps the best "
        "so far when you stop it. Nothing is drawn meanwhile."
    )
    drop = gr.File(label="Pictures: drop them here", file_count="multiple", height=140, elem_id="art")
    folder = gr.Textbox(label="or the path of a folder; its sub-folders become labels")
    with gr.Row():
        name = gr.Textbox("my-style", label="Name of the new model", min_width=150)
        minutes = gr.Slider(
            1, 60, sibling("train.options").TuneOptions().minutes, step=1, label="Minutes", min_width=150
        )
        adapter = gr.Checkbox(label="A small adapter (4 MB)", elem_classes="tick")

    def learn(given: dict[Any, Any]) -> None:
        if not given[name].strip():
            raise UserError("the new model has no name; a word is wanted")
        art = given[folder].strip() or _gathered(given[drop], page.engine.out / "dropped", given[name])
        flags = ["--minutes", f"{given[minutes]:g}", *["--adapter"] * given[adapter]]
        page.engine.learn(given[page.model], art, given[name], *flags)

    button = gr.Button("Learn", variant="primary")
    page.on_press(button, learn, {page.model, drop, folder, name, minutes, adapter})


def _gathered(paths: list[str] | None, place: Path, name: str) -> str:
    """The folder to which dropped pictures are copied, so that a training can go on another day."""
    if not paths:
        raise UserError("there are no pictures to learn from; drop some, or name a folder")
    folder = place / stem_for(name, 0)
    with complaint(f"{folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, folder)
    return str(folder)
