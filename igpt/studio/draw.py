"""The tab that draws new pictures."""

from __future__ import annotations

from typing import Any

import gradio as gr

from .page import Page

SIZES = ["256x256", "384x256", "256x384", "512x512", "768x512", "1024x1024"]


def add_to(page: Page) -> None:
    """The controls, and what they do."""
    with gr.Row():
        size = gr.Dropdown(
            ["", *SIZES],
            value="",
            label="Size in pixels",
            allow_custom_value=True,
            min_width=150,
            info="Any from 8 to 4096 a side, as 640x384; empty: the model's own",
        )
        tile = gr.Checkbox(label="A texture that wraps around", elem_classes="tick")
    button = gr.Button("Draw", variant="primary", elem_id="draw")

    def draw(given: dict[Any, Any]) -> int:
        wish = page.wish(given, size=given[size] or "", tile=given[tile])
        page.engine.draw(wish)
        return wish.how["seed"]

    page.on_press(button, draw, page.inputs(size, tile), page.seed)
