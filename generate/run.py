"""Draws the pictures of one command line into files, and draws a picture again from its recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL.Image import Image

from igpt.canvas import Drawing, finish, levels_for, paint, share_drawn
from igpt.config import SamplingOptions
from igpt.edit import Edit, draw_edit, finish_edit
from igpt.image_gpt import BATCH, ImageGPT
from igpt.recipe import Recipe, digest
from igpt.sampling import generators
from igpt.sizes import Grid
from tokenizer_vq.base import UserError

from .files import Output, stem_for, write_file, write_picture
from .sheet import contact_sheet, thumbnail
from .timelapse import Timelapse


def generate_files(
    model: ImageGPT, *, n: int, size: tuple[int, int], label: str | None, seed: int, options: SamplingOptions,
    output: Output, tile: bool = False, timelapse: str | None = None, sheet: bool = False, force: bool = False,
    quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Draws n pictures of size (width, height), picture i from seed + i, writes each with its recipe, prints each path.

    Without a label each seed chooses one of the model's, after which the file is named.
    With `timelapse` ("gif" or "webp") each gets an animation beside it. Returns the paths, that of the contact sheet
    last. Raises UserError for an unknown label and where the disk refuses.
    """
    levels = levels_for(model, size)
    paths: list[Path] = []
    thumbnails: list[Image] = []
    batch = 1 if timelapse else BATCH
    for start in range(0, n, batch):
        seeds = generators(seed + start, min(batch, n - start))
        labels = model.labels_for(label, seed + start, len(seeds))
        frames = paint(model, levels, model.label_numbers(labels), seeds, options, wraps=tile)
        film = Timelapse(model, levels, size, tile) if timelapse else None
        drawings = _last(film.recording(frames) if film else frames, levels, len(seeds), quiet)
        for i, (drawn_as, drawing) in enumerate(zip(labels, drawings, strict=True), start):
            picture = finish(model, drawing.tokens_hw, size, tile)
            stem = stem_for(drawn_as or model.name, seed + i)
            recipe = _recipe(model, drawn_as, seed + i, size, options, drawing.tokens_hw, picture, tile=tile)
            path = output.picture(stem)
            paths.append(_write(picture, path, recipe, force))
            if film is not None and timelapse is not None:
                beside = output.beside(stem, f"-timelapse.{timelapse}")
                paths.append(_told(write_file(film.encoded(timelapse), beside, force=force)))
            if sheet:
                thumbnails.append(thumbnail(picture, n))
    if sheet:
        page = contact_sheet(thumbnails, [str(seed + i) for i in range(n)])
        paths.append(_write(page, output.sheet(stem_for(label or model.name, seed)), None, force))
    return paths


def edit_files(
    model: ImageGPT, edit: Edit, stem: str, *, n: int, seed: int, options: SamplingOptions, output: Output,
    sheet: bool = False, force: bool = False, quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Draws an edit n times, time i from seed + i, writes each picture with its recipe and prints each path.

    Returns the paths, that of the contact sheet last.
    """
    levels = levels_for(model, edit.size)
    paths: list[Path] = []
    thumbnails: list[Image] = []
    for number in range(seed, seed + n):
        (drawing,) = _last(draw_edit(model, edit, number, options), levels, 1, quiet)
        piece = finish_edit(model, edit, number, drawing.tokens_hw)
        recipe = _recipe(
            model, edit.label, number, edit.size, options, piece.tokens_hw, piece.picture, command=edit.command,
            given=tuple(piece.given_hw.flatten().tolist()),
        )  # fmt: skip
        paths.append(_write(piece.picture, output.picture(stem_for(stem, number)), recipe, force))
        if sheet:
            thumbnails.append(thumbnail(piece.picture, n))
    if sheet:
        page = contact_sheet(thumbnails, [str(number) for number in range(seed, seed + n)])
        paths.append(_write(page, output.sheet(stem_for(stem, seed)), None, force))
    return paths


# Replay


def replay(
    model: ImageGPT, recipe: Recipe, *, path: Path, from_tokens: bool = False, force: bool = False, quiet: bool = False
) -> Path:
    """Draws the picture of a recipe again, writes it to `path` and prints where.

    It is drawn anew from seed, label and options, and must come out as recorded; with `from_tokens`, and where an edit
    would need its source picture, the recorded tokens are only decoded. Raises UserError when the model is another one
    or the tokens come out differently.
    """
    if model.weights_hash != recipe.weights_hash:
        raise UserError(
            f"the picture was drawn by a model {recipe.model!r} with weights {recipe.weights_hash[:12]!r}, "
            f"the model {model.name!r} here has {model.weights_hash[:12]!r}"
        )
    if (largest := max(recipe.tokens)) >= model.tokenizer.vocab_size:
        raise UserError(f"the recipe has the token {largest}; the model's are below {model.tokenizer.vocab_size}")
    recorded_hw = torch.tensor(recipe.tokens).view(recipe.grid)
    frames = None if from_tokens else _again(model, recipe)
    if frames is None:
        story = f"decoded the {len(recipe.tokens)} recorded tokens"
        if not from_tokens:
            story += f", as {recipe.command} at this size needs its source picture to be drawn again"
    else:
        (drawing,) = _last(frames, _levels(model, recipe), 1, quiet)
        if other := int((drawing.tokens_hw != recorded_hw).sum()):
            raise UserError(
                f"{other} of {len(recipe.tokens)} tokens came out differently, as they may on another device, torch or "
                "igpt; --from-tokens gives the recorded picture"
            )
        story = f"drawn again from seed {recipe.seed}: all {len(recipe.tokens)} tokens equal those recorded"
    picture = finish(model, recorded_hw, recipe.size, recipe.tile)
    pixels = digest(picture)
    if recipe.pixels and pixels != recipe.pixels:
        edited = "; what was taken over from the source picture is painted from its tokens, its pixels are not recorded"
        story += edited if recipe.given else "; some pixels differ, as they may on another device or torch"
    path = _write(picture, path, replace(recipe, pixels=pixels), force)
    if not quiet:
        print(story, file=sys.stderr)
    return path


def _levels(model: ImageGPT, recipe: Recipe) -> list[Grid]:
    """The grids on which the picture of a recipe was drawn. Raises UserError where this model would choose others."""
    levels = levels_for(model, recipe.size)
    if recipe.grid != levels[-1]:
        rows, columns = recipe.grid
        raise UserError(
            f"the recipe's grid of {rows}x{columns} tokens is not that on which a picture of {recipe.size[0]}x"
            f"{recipe.size[1]} pixels is drawn; --from-tokens gives the recorded picture"
        )
    return levels


def _again(model: ImageGPT, recipe: Recipe) -> Iterator[list[Drawing]] | None:
    """The drawing of a recipe once more; None where it cannot be had without the source picture."""
    seeds, labels_B = generators(recipe.seed, 1), model.label_numbers([recipe.label])
    if recipe.command == "generate":
        levels = _levels(model, recipe)
        return paint(model, levels, labels_B, seeds, recipe.options, wraps=recipe.tile)
    if not recipe.given or levels_for(model, recipe.size) != [recipe.grid]:
        return None
    tokens_hw, given_hw = (torch.tensor(values).view(recipe.grid) for values in (recipe.tokens, recipe.given))
    return paint(model, [recipe.grid], labels_B, seeds, recipe.options, start=Drawing(tokens_hw, given_hw))


# Parts


def _recipe(
    model: ImageGPT, label: str | None, seed: int, size: tuple[int, int], options: SamplingOptions,
    tokens_hw: torch.Tensor, picture: Image, *, command: str = Recipe.command, tile: bool = False,
    given: tuple[bool, ...] = (),
) -> Recipe:  # fmt: skip
    return Recipe(
        model=model.name, weights_hash=model.weights_hash, label=label, seed=seed, size=size, options=options,
        grid=(tokens_hw.shape[0], tokens_hw.shape[1]), tokens=tuple(tokens_hw.flatten().tolist()), command=command,
        tile=tile, given=given, pixels=digest(picture),
    )  # fmt: skip


def _last(frames: Iterator[list[Drawing]], levels: Sequence[Grid], n: int, quiet: bool) -> list[Drawing]:
    """The finished drawings, with a progress line where somebody is watching."""
    if quiet or not sys.stderr.isatty():
        *_, drawings = frames
        return drawings
    from tqdm import tqdm

    tokens = n * sum(h * w for h, w in levels)
    with tqdm(total=tokens, unit="token", leave=False) as bar:
        for drawings in frames:
            bar.update(round(share_drawn(levels, drawings) * tokens) - bar.n)
    return drawings


def _write(picture: Image, path: Path, recipe: Recipe | None, force: bool) -> Path:
    return _told(write_picture(picture, path, recipe, force=force))


def _told(path: Path) -> Path:
    print(path, flush=True)
    return path
