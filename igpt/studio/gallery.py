"""The tab with everything that was drawn: how each picture was made, and what to do with it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr

from igpt.config import DEFAULT_STRENGTH
from igpt.recipe import recipe_of
from tokenizer_vq.base import UserError

from .page import QUIET, Page, said

ON_A_PAGE = 60  # pictures on a page


def add_to(page: Page) -> None:
    """Pictures of the folder, newest first, and buttons for the one that is chosen."""
    engine = page.engine
    path: Any = gr.State(None)
    with gr.Row():
        save = gr.DownloadButton("Download", interactive=False, size="md", min_width=90)
        names = "Replay", "Vary", "Edit", "As tile", "Large"
        replay, vary, edit, tile, large = (gr.Button(name, size="md", min_width=90) for name in names)
        delete = gr.Button("Delete", variant="stop", size="md", min_width=90)
        sure = gr.Button("Really delete", variant="stop", visible=False, size="md", min_width=90)
    recipe = gr.Markdown("Choose a picture to see how it was made.", elem_id="recipe")
    turn = gr.Number(1, precision=0, minimum=1, label="Page", visible=False)
    look: dict[str, Any] = {"columns": 4, "object_fit": "contain", "fit_columns": False, "buttons": []}
    wall = gr.Gallery(show_label=False, elem_id="wall", allow_preview=False, **look)

    def pictures(number: int) -> list[Any]:
        files = sorted(engine.out.glob("*.png"), key=lambda file: file.stat().st_mtime, reverse=True)
        part = files[ON_A_PAGE * (number - 1) : ON_A_PAGE * number]
        return [
            [(str(file), file.stem) for file in part],
            gr.Number(visible=len(files) > ON_A_PAGE),
            list(map(str, part)),
        ]

    files: Any = gr.State([])
    wall_of = {"fn": pictures, "inputs": turn, "outputs": [wall, turn, files]} | QUIET
    page.tab.select(**wall_of)
    page.files.change(**wall_of)
    turn.change(**wall_of)

    def choose(there: list[str], event: gr.SelectData) -> list[Any]:
        chosen = there[event.index]
        return [chosen, _story(chosen), gr.DownloadButton(value=chosen, interactive=True), gr.Button(visible=False)]

    wall.select(choose, files, [path, recipe, save, sure], **QUIET)

    def chosen(path: str | None) -> str:
        if path is None or not Path(path).is_file():
            raise UserError("no picture is chosen; press one of those above")
        return path

    page.on_press(replay, lambda path: engine.replay(chosen(path)), path)
    page.on_press(tile, lambda path: engine.redraw(chosen(path), tile=True), path)
    page.on_press(large, lambda path: engine.redraw(chosen(path), scale=2), path)
    page.on_press(edit, lambda path: [chosen(path), gr.Tabs(selected="Edit")], path, [page.source, page.tabs])

    def varied(given: dict[Any, Any]) -> None:
        engine.draw(page.wish(given), "vary", chosen(given[path]), DEFAULT_STRENGTH)

    page.on_press(vary, varied, page.inputs(path))
    page.on_press(delete, lambda path: gr.Button(visible=bool(chosen(path))), path, sure)

    def forget(path: str) -> list[Any]:
        Path(chosen(path)).unlink()
        return [None, "Deleted.", gr.Button(visible=False)]

    sure.click(said(forget), path, [path, recipe, sure], **QUIET).then(**wall_of)


def _story(path: str) -> str:
    """How a picture was made, in one paragraph."""
    try:
        recipe = recipe_of(path)
    except UserError as error:
        return str(error)
    size = "x".join(map(str, recipe.size)) + " pixels, a texture" * recipe.tile
    facts = {"model": recipe.model, "label": recipe.label or "none", "seed": recipe.seed, "size": size}
    facts |= {"made by": recipe.command} | asdict(recipe.options)
    return f"**{Path(path).name}**: " + ", ".join(
        f"{key.replace('_', ' ')} **{value}**" for key, value in facts.items()
    )
