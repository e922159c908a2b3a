"""The tabs of the page: what each of them asks for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from igpt.config import ANCHORS, DEFAULT_KEEP, DEFAULT_MIX, DEFAULT_STRENGTH, SIDES
from igpt.files import stem_for
from igpt.recipe import recipe_of
from igpt.siblings import sibling
from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.images import open_picture

from .page import BY_SEED, QUIET, Page, button, dropped, said

CANVAS_SIDE = 768  # pixels a side in the browser; the edit itself is of the picture in its own size
ON_A_PAGE = 60  # pictures on a page of the gallery


def wanted(value: Any, sentence: str) -> Any:
    """The value. Raises UserError with the sentence where there is none."""
    if not value:
        raise UserError(sentence)
    return value


def draw(page: Page) -> None:
    """New pictures."""
    about = "Any from 8 to 4096 a side, as 512 or 640x384; empty: the model's own"
    with gr.Row():
        size = gr.Textbox(label="Size in pixels", min_width=300, info=about)
        tile = gr.Checkbox(label="A texture that wraps around", elem_classes="tick")

    def press(given: dict[Any, Any]) -> int:
        return page.draw(given, size=given[size], tile=given[tile])

    page.on_press(button("Draw"), press, page.inputs(size, tile), page.seed)


# Edit


def edit(page: Page) -> None:
    """The picture with a brush, and a small tab for each edit."""
    page.source = source = dropped("A picture: dropped, or from the gallery", "source")
    brush = gr.Brush(default_size=24, colors=[("#ff00aa", 0.7)], color_mode="fixed")
    look: dict[str, Any] = {"sources": (), "transforms": (), "layers": False, "buttons": [], "height": 420}
    label = "Paint over a part"
    canvas = gr.ImageEditor(label=label, type="pil", brush=brush, elem_id="canvas", visible=False, **look)
    source.change(said(_on_canvas), source, canvas, **QUIET)

    def press(name: str, command: str, *controls: Any, how: Callable[..., Any] = lambda *values: values) -> None:
        def handle(given: dict[Any, Any]) -> int:
            path = wanted(given[source], "there is no picture to edit; drop one, or send one from the gallery")
            return page.draw(given, command, path, *how(*(given[control] for control in controls)))

        page.on_press(button(name), handle, page.inputs(source, *controls), page.seed)

    with gr.Tabs():
        with gr.Tab("Painted"):
            press("Draw the painted part anew", "inpaint", canvas, how=_mask)
        with gr.Tab("Half"):
            keep = gr.Radio(list(SIDES), value=DEFAULT_KEEP, label="Half that stays")
            press("Draw the other half", "complete", keep)
        with gr.Tab("Frame"):
            with gr.Row():
                size = gr.Textbox("512x384", label="Size of the frame", min_width=120)
                anchor = gr.Dropdown(list(ANCHORS), label="Place of the picture", min_width=150)
            press("Draw around it", "extend", size, anchor)
        with gr.Tab("Vary"):
            strength = gr.Slider(0, 1, DEFAULT_STRENGTH, step=0.05, label="Share that is drawn anew")
            press("Vary", "vary", strength)
        with gr.Tab("Blend"):
            other = dropped("The second picture", "other")
            mix = gr.Slider(0, 1, DEFAULT_MIX, step=0.05, label="Share of the second picture")
            press("Blend", "blend", other, mix, how=lambda *two: (wanted(two[0], "there is no second picture"), two[1]))


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
    masks = [layer.getchannel("A").point(lambda level: 255 * (level > 0)) for layer in painted["layers"]]
    if not any(mask.getbbox() for mask in masks):
        raise UserError("nothing is painted; paint with the brush over what is to be drawn anew")
    return (masks[0],)


# Gallery


def gallery(page: Page) -> None:
    """Pictures of the folder, newest first, and what can be done with the one that is chosen."""
    engine, path, files = page.engine, gr.State(None), gr.State([])
    with gr.Row():
        save = gr.DownloadButton("Download", interactive=False, size="md", min_width=110)
        names = "Replay", "Vary", "Edit", "As tile", "Large"
        replay, vary, send, tile, large = (gr.Button(name, size="md", min_width=110) for name in names)
        delete = gr.Button("Delete", variant="stop", size="md", min_width=110)
        sure = gr.Button("Really delete", variant="stop", visible=False, size="md", min_width=110)
    story = gr.Markdown("Choose a picture to see how it was made.", elem_id="recipe")
    turn = gr.Dropdown([1], label="Page", visible=False)
    look: dict[str, Any] = {"columns": 4, "object_fit": "contain", "fit_columns": False, "buttons": []}
    wall = gr.Gallery(show_label=False, elem_id="wall", allow_preview=False, **look)

    def pictures(number: int) -> list[Any]:
        found = sorted(engine.out.glob("*.png"), key=lambda file: file.stat().st_mtime, reverse=True)
        pages = list(range(1, max(1, -(-len(found) // ON_A_PAGE)) + 1))
        number = min(number, pages[-1])
        part = [(str(file), file.stem) for file in found[ON_A_PAGE * (number - 1) : ON_A_PAGE * number]]
        return [part, gr.Dropdown(pages, value=number, visible=len(pages) > 1), [file for file, _ in part]]

    wall_of = {"fn": pictures, "inputs": turn, "outputs": [wall, turn, files]} | QUIET
    page.tab.select(**wall_of)
    page.files.change(**wall_of)
    turn.input(**wall_of)

    def choose(there: list[str], event: gr.SelectData) -> list[Any]:
        chosen = there[event.index]
        return [chosen, _story(chosen), gr.DownloadButton(value=chosen, interactive=True), gr.Button(visible=False)]

    wall.select(choose, files, [path, story, save, sure], **QUIET)

    def chosen(path: str | None) -> str:
        if path is None or not Path(path).is_file():
            raise UserError("no picture is chosen; press one of those below")
        return path

    page.on_press(replay, lambda path: engine.replay(chosen(path)), path)
    page.on_press(tile, lambda path: engine.redraw(chosen(path), tile=True), path)
    page.on_press(large, lambda path: engine.redraw(chosen(path), scale=2), path)
    page.on_press(send, lambda path: [chosen(path), gr.Tabs(selected="Edit")], path, [page.source, page.tabs])
    how = DEFAULT_STRENGTH
    page.on_press(vary, lambda given: page.draw(given, "vary", chosen(given[path]), how), page.inputs(path), page.seed)
    page.on_press(delete, lambda path: gr.Button(visible=bool(chosen(path))), path, sure)

    def forget(path: str) -> list[Any]:
        Path(chosen(path)).unlink()
        return [None, "Deleted.", gr.Button(visible=False)]

    sure.click(said(forget), path, [path, story, sure], **QUIET).then(**wall_of)


def _story(path: str) -> str:
    """How a picture was made, in one paragraph."""
    try:
        recipe = recipe_of(path)
    except UserError as error:
        return str(error)
    size = "x".join(map(str, recipe.size)) + " pixels, a texture" * recipe.tile
    facts = {"model": recipe.model, "label": recipe.label or "none", "seed": recipe.seed, "size": size}
    facts |= {"made by": recipe.command} | asdict(recipe.options)
    words = (f"{key.replace('_', ' ')} **{value}**" for key, value in facts.items())
    return f"**{Path(path).name}**: {', '.join(words)}"


# Learn and know


def learn(page: Page) -> None:
    """Pictures of one's own, a name, a time."""
    gr.Markdown(
        "The chosen model learns your pictures. Ten or more are wanted; it stops by itself, or keeps the best "
        "so far when you stop it. Nothing is drawn meanwhile."
    )
    drop = dropped("Pictures: drop them here", "art", file_count="multiple")
    folder = gr.Textbox(label="or the path of a folder; its sub-folders become labels")
    usual = sibling("train.options").TuneOptions().minutes
    with gr.Row():
        name = gr.Textbox("my-style", label="Name of the new model", min_width=150)
        minutes = gr.Slider(1, 60, usual, step=1, label="Minutes", min_width=150)
        adapter = gr.Checkbox(label="A small adapter (4 MB)", elem_classes="tick")

    def press(model: str, paths: list[str] | None, folder: str, name: str, minutes: float, adapter: bool) -> None:
        wanted(name.strip(), "the new model has no name; a word is wanted")
        art = folder.strip() or _gathered(paths, page.engine.out / "dropped" / stem_for(name, 0))
        page.engine.learn(model, art, name, "--minutes", f"{minutes:g}", *["--adapter"] * adapter)

    page.on_press(button("Learn"), press, [page.model, drop, folder, name, minutes, adapter])


def _gathered(paths: list[str] | None, folder: Path) -> str:
    """The folder to which dropped pictures are copied, so that a training can go on another day."""
    given = wanted(paths, "there are no pictures to learn from; drop some, or name a folder")
    with complaint(f"{folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        for path in map(Path, given):  # each in a folder that is called by its contents: two may have one name
            shutil.copy(path, folder / f"{path.stem}-{path.parent.name[:8]}{path.suffix}")
    return str(folder)


def know(page: Page) -> None:
    """What a picture or a model is."""
    picture = dropped("A picture: drop it here", "looked-at")
    art = gr.Textbox(label="Path of the folder that it is compared with, in an audit")
    with gr.Row():
        surprise, audit, card = (gr.Button(name, size="md", min_width=90) for name in ("Surprise", "Audit", "Card"))
    text, no_picture = gr.Markdown(elem_id="card"), "there is no picture to look at; drop one"

    def ask(model: str, label: str, path: str | None) -> None:
        page.engine.surprise(model, None if label == BY_SEED else label, wanted(path, no_picture))

    def compare(model: str, path: str | None, folder: str) -> None:
        art = wanted(folder.strip(), "an audit compares with a folder of pictures; its path is wanted")
        page.engine.audit(model, wanted(path, no_picture), art)

    page.on_press(surprise, ask, [page.model, page.label, picture])
    page.on_press(audit, compare, [page.model, picture, art])
    page.on_press(card, page.engine.card, page.model, text)
