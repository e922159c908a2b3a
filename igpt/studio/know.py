"""The tab that tells what a picture or a model is."""

from __future__ import annotations

import gradio as gr

from tokenizer_vq.base import UserError

from .page import BY_SEED, Page


def add_to(page: Page) -> None:
    """The surprise map and the audit of a picture, the card of the model."""
    engine = page.engine
    picture = gr.File(label="A picture: drop it here", height=140, elem_id="looked-at")
    art = gr.Textbox(label="Path of the folder that it is compared with, in an audit")
    with gr.Row():
        surprise, audit, card = (gr.Button(name, size="md", min_width=90) for name in ("Surprise map", "Audit", "Card"))
    text = gr.Markdown(elem_id="card")

    def given_picture(path: str | None) -> str:
        if path is None:
            raise UserError("there is no picture to look at; drop one")
        return path

    def ask(model: str, label: str, path: str | None) -> None:
        engine.surprise(model, None if label == BY_SEED else label, given_picture(path))

    def compare(model: str, path: str | None, folder: str) -> None:
        if not folder.strip():
            raise UserError("an audit compares with a folder of pictures; its path is wanted")
        engine.audit(model, given_picture(path), folder.strip())

    page.on_press(surprise, ask, [page.model, page.label, picture])
    page.on_press(audit, compare, [page.model, picture, art])
    page.on_press(card, engine.card, page.model, text)
