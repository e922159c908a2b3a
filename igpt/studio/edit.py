"""The tab that draws on from a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from igpt.config import ANCHORS, DEFAULT_KEEP, DEFAULT_MIX, DEFAULT_STRENGTH, SIDES
from tokenizer_vq.base import UserError
from tokenizer_vq.images import open_picture

from .page import QUIET, Page, said

CANVAS_SIDE = 768  # pixels a side in the browser; the edit itself is of the picture in its own size


def add_to(page: Page) -> None:
    """The picture with a brush, and a small tab for each edit."""
    source = gr.File(label="A picture: drop it here, or send one from the gallery", height=140, elem_id="source")
    page.source = source
    brush = gr.Brush(default_size=24, colors=[("#ff00aa", 0.7)], color_mode="fixed")
    look: dict[str, Any] = {"sources": (), "transforms": (), "layers": False, "buttons": [], "height": 420}
    label = "Paint what is to be drawn anew"
    canvas = gr.ImageEditor(label=label, type="pil", brush=brush, elem_id="canvas", visible=False, **look)
    source.change(said(_on_canvas), source, canvas, **QUIET)

    def press(button: Any, command: str, *controls: Any, how: Callable[..., Any] = lambda *values: values) -> None:
        def handle(given: dict[Any, Any]) -> int:
            if not given[source]:
                raise UserError("there is no picture to edit; drop one, or send one from the gallery")
            wish = page.wish(given)
            page.engine.draw(wish, command, given[source], *how(*(given[control] for control in controls)))
            return wish.how["seed"]

        page.on_press(button, handle, page.inputs(source, *controls), page.seed)

    with gr.Tabs():
        with gr.Tab("Painted"):
            press(gr.Button("Draw the painted part anew", variant="primary"), "inpaint", canvas, how=_mask)
        with gr.Tab("Half"):
            keep = gr.Radio(list(SIDES), value=DEFAULT_KEEP, label="Half that stays")
            press(gr.Button("Draw the other half", variant="primary"), "complete", keep)
        with gr.Tab("Frame"), gr.Row():
            size = gr.Textbox("512x384", label="Size of the frame", min_width=120)
            anchor = gr.Dropdown(list(ANCHORS), value=ANCHORS[0], label="Where the picture lies in it", min_width=150)
            press(gr.Button("Draw around it", variant="primary"), "extend", size, anchor)
        with gr.Tab("Vary"):
            strength = gr.Slider(0, 1, DEFAULT_STRENGTH, step=0.05, label="Share that is drawn anew")
            press(gr.Button("Vary", variant="primary"), "vary", strength)
        with gr.Tab("Blend"):
            other = gr.File(label="The second picture", height=140, elem_id="other")
            mix = gr.Slider(0, 1, DEFAULT_MIX, step=0.05, label="Share of the second picture")
            press(gr.Button("Blend", variant="primary"), "blend", other, mix, how=_second)


def _on_canvas(path: str | None) -> Any:
    """A picture for the brush, smaller where it is too large for a browser, larger where it is a sprite."""
    if path is None:
        return gr.ImageEditor(visible=False)
    picture = open_picture(Path(path), Path(path).name)
    picture.thumbnail((CANVAS_SIDE, CANVAS_SIDE))
    if (times := CANVAS_SIDE // max(picture.size)) > 4:  # a sprite
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
    return gr.ImageEditor({"background": picture, "layers": [], "composite": None}, visible=True)


def _mask(painted: dict[str, Any]) -> tuple[Image.Image]:
    """White where something is painted."""
    layers = painted["layers"]
    if not layers or not any(layer.getchannel("A").getbbox() for layer in layers):
        raise UserError("nothing is painted; paint with the brush over what is to be drawn anew")
    return (layers[0].getchannel("A").point(lambda level: 255 * (level > 0)),)


def _second(other: str | None, mix: float) -> tuple[str, float]:
    if other is None:
        raise UserError("there is no second picture; drop one")
    return other, mix
