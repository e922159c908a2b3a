"""Draws the pictures of one command line into files, and draws a picture again from its recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from igpt.canvas import PartialGrid, generate_grids, share_drawn
from igpt.config import SamplingOptions
from igpt.edit import Edit, draw_edit, finish_edit
from igpt.files import Output, stem_for, write_file, write_picture
from igpt.fitting import Canvas, canvas_for, finish
from igpt.image_gpt import BATCH, ImageGPT
from igpt.recipe import Recipe, digest
from igpt.sampling import generators
from igpt.sheet import square_sheet
from tokenizer_vq.base import UserError

from .timelapse import Timelapse


@dataclass(frozen=True)
class Job:
    """What the commands that draw have in common: picture i of n is drawn from seed + i and written to `output`."""

    seed: int
    options: SamplingOptions
    output: Output
    n: int = 1
    sheet: bool = False  # also one picture of all
    force: bool = False  # replace files of the same name
    quiet: bool = False  # no progress


def generate_files(
    model: ImageGPT,
    job: Job,
    size: tuple[int, int],
    label: str | None,
    *,
    tile: bool = False,
    timelapse: str | None = None,
) -> list[Path]:
    """Draws new pictures of size (width, height), writes each with its recipe and prints each path.

    Without a label each seed chooses one of the model's, after which the file is named. With `timelapse` ("gif" or
    "webp") each gets an animation beside it. Returns the paths, that of the contact sheet last. Raises UserError for
    an unknown label and where the disk refuses.
    """
    canvas = canvas_for(model, size, tile)
    paths: list[Path] = []
    shown: list[tuple[Image, str]] = []
    batch = 1 if timelapse else BATCH
    for first in range(job.seed, job.seed + job.n, batch):
        seeds = generators(first, min(batch, job.seed + job.n - first))
        labels = model.labels_for(label, first, len(seeds))
        frames = generate_grids(model, canvas, model.label_numbers(labels), seeds, job.options)
        film = Timelapse(model, canvas) if timelapse else None
        grids = _last(film.recording(frames) if film else frames, canvas, len(seeds), job.quiet)
        for seed, (drawn_as, grid) in enumerate(zip(labels, grids, strict=True), first):
            picture = finish(model, grid.tokens_hw, canvas)
            stem = stem_for(drawn_as or model.name, seed)
            how = {"label": drawn_as, "seed": seed, "options": job.options, "tile": tile}
            recipe = _recipe(model, grid.tokens_hw, picture, **how)
            paths.append(_write(picture, job.output.picture(stem), recipe, job.force))
            if film is not None and timelapse is not None:
                beside = job.output.beside(stem, f"-timelapse.{timelapse}")
                paths.append(_say(write_file(film.encoded(timelapse), beside, force=job.force)))
            shown.append((picture, str(seed)))
    return paths + _sheet(job, shown, stem_for(label or model.name, job.seed))


def edit_files(model: ImageGPT, job: Job, edit: Edit, stem: str) -> list[Path]:
    """Draws an edit n times, writes each picture with its recipe and prints each path.

    Returns the paths, that of the contact sheet last.
    """
    canvas = canvas_for(model, edit.size)
    paths: list[Path] = []
    shown: list[tuple[Image, str]] = []
    for seed in range(job.seed, job.seed + job.n):
        (grid,) = _last(draw_edit(model, edit, seed, job.options), canvas, 1, job.quiet)
        result = finish_edit(model, edit, seed, grid.tokens_hw)
        recipe = _recipe(
            model,
            result.tokens_hw,
            result.picture,
            label=edit.label,
            seed=seed,
            options=job.options,
            command=edit.command,
            given=tuple(result.given_hw.flatten().tolist()),
        )
        paths.append(_write(result.picture, job.output.picture(stem_for(stem, seed)), recipe, job.force))
        shown.append((result.picture, str(seed)))
    return paths + _sheet(job, shown, stem_for(stem, job.seed))


# Replay


def replay(
    model: ImageGPT, recipe: Recipe, path: Path, *, from_tokens: bool = False, force: bool = False, quiet: bool = False
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
    canvas = canvas_for(model, recipe.size, recipe.tile)
    frames = None if from_tokens else _again(model, recipe, canvas, recorded_hw)
    if frames is None:
        story = f"decoded the {len(recipe.tokens)} recorded tokens"
        if not from_tokens:
            story += f", as {recipe.command} at this size needs its source picture to be drawn again"
    else:
        (grid,) = _last(frames, canvas, 1, quiet)
        if other := int((grid.tokens_hw != recorded_hw).sum()):
            raise UserError(
                f"{other} of {len(recipe.tokens)} tokens came out differently, as they may on another device, torch or "
                "igpt; --from-tokens gives the recorded picture"
            )
        story = f"drawn again from seed {recipe.seed}: all {len(recipe.tokens)} tokens equal those recorded"
    picture = finish(model, recorded_hw, canvas)
    pixels = digest(picture)
    if recipe.pixels and pixels != recipe.pixels:
        edited = "; what was taken over from the source picture is painted from its tokens, its pixels are not recorded"
        other_pixels = "; some pixels differ, as they may with another number of threads, another device or torch"
        story += edited if recipe.given else other_pixels
    path = _write(picture, path, replace(recipe, pixels=pixels), force)
    if not quiet:
        print(story, file=sys.stderr)
    return path


def _again(model: ImageGPT, recipe: Recipe, canvas: Canvas, recorded_hw: Tensor) -> Iterator[list[PartialGrid]] | None:
    """The drawing of a recipe once more; None where it cannot be had without the source picture. Raises UserError for
    a grid on which this model would not have drawn it."""
    seeds, labels_B = generators(recipe.seed, 1), model.label_numbers([recipe.label])
    if recipe.command == "generate":
        if recipe.grid != canvas.levels[-1]:
            raise UserError(
                f"the recipe's grid of {recipe.grid[0]}x{recipe.grid[1]} tokens is not that on which a picture of "
                f"{recipe.size[0]}x{recipe.size[1]} pixels is drawn; --from-tokens gives the recorded picture"
            )
        return generate_grids(model, canvas, labels_B, seeds, recipe.options)
    if not recipe.given or canvas.levels != [recipe.grid]:
        return None
    start = PartialGrid(recorded_hw, torch.tensor(recipe.given).view(recipe.grid))
    return generate_grids(model, canvas, labels_B, seeds, recipe.options, start)


# Parts


def _recipe(model: ImageGPT, tokens_hw: Tensor, picture: Image, **more: Any) -> Recipe:
    """The recipe of a picture; `more` are the fields that only its command knows."""
    return Recipe(
        model=model.name,
        weights_hash=model.weights_hash,
        size=picture.size,
        pixels=digest(picture),
        grid=(tokens_hw.shape[0], tokens_hw.shape[1]),
        tokens=tuple(tokens_hw.flatten().tolist()),
        **more,
    )


def _last(frames: Iterator[list[PartialGrid]], canvas: Canvas, n: int, quiet: bool) -> list[PartialGrid]:
    """The finished grids, with a progress line where somebody is watching."""
    if quiet or not sys.stderr.isatty():
        *_, grids = frames
        return grids
    from tqdm import tqdm

    tokens = n * sum(h * w for h, w in canvas.levels)
    with tqdm(total=tokens, unit="token", leave=False) as bar:
        for grids in frames:
            bar.update(round(share_drawn(canvas, grids) * tokens) - bar.n)
    return grids


def _sheet(job: Job, shown: list[tuple[Image, str]], stem: str) -> list[Path]:
    """The contact sheet, where one is asked for."""
    return [_write(square_sheet(shown), job.output.beside(stem, "-sheet.png"), None, job.force)] if job.sheet else []


def _write(picture: Image, path: Path, recipe: Recipe | None, force: bool) -> Path:
    return _say(write_picture(picture, path, recipe, force=force))


def _say(path: Path) -> Path:
    print(path, flush=True)
    return path
