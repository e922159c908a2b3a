"""Draws the pictures of one command line into files, and draws a picture again from its recipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from igpt.config import SamplingOptions
from igpt.image_gpt import ImageGPT
from igpt.sampling import Step
from igpt.sizes import grid_for
from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover

from .files import Output, Recipe, stem_for, write_picture
from .sheet import contact_sheet, thumbnail

BATCH = 16  # pictures drawn at once; a picture is the same in any batch


def generate_files(
    model: ImageGPT, *, n: int, size: tuple[int, int], label: str | None, seed: int, options: SamplingOptions,
    output: Output, sheet: bool = False, force: bool = False, quiet: bool = False,
) -> list[Path]:  # fmt: skip
    """Draws n pictures of size (width, height), picture i from seed + i, writes each with its recipe, prints each path.

    Returns the paths, that of the contact sheet last. Raises UserError for an unknown label and where the disk refuses.
    """
    grid = grid_for(*size, model.downsample, model.native_cells)
    paths: list[Path] = []
    thumbnails: list[Image] = []
    stem = label or model.name
    for start in range(0, n, BATCH):
        count = min(BATCH, n - start)
        tokens_Bhw = _draw(model, count, grid, label, seed + start, options, quiet)
        for i, picture in enumerate(_finish(model, tokens_Bhw, size), start):
            recipe = Recipe(
                model=model.name, weights_hash=model.weights_hash, label=label, seed=seed + i, size=size,
                options=options, grid=grid, tokens=_flat(tokens_Bhw[i - start]),
            )  # fmt: skip
            path = output.picture(stem_for(stem, seed + i))
            paths.append(_write(picture, path, recipe, force))
            if sheet:
                thumbnails.append(thumbnail(picture, n))
    if sheet:
        page = contact_sheet(thumbnails, [str(seed + i) for i in range(n)])
        paths.append(_write(page, output.sheet(stem_for(stem, seed)), None, force))
    return paths


def replay(
    model: ImageGPT, recipe: Recipe, *, path: Path, from_tokens: bool = False, force: bool = False, quiet: bool = False
) -> Path:
    """Draws the picture of a recipe again, writes it to `path` and prints where.

    It is drawn anew from seed, label and options, and must come out as recorded; with `from_tokens` the recorded tokens
    are only decoded. Raises UserError when the model is another one or the tokens come out differently.
    """
    if model.weights_hash != recipe.weights_hash:
        raise UserError(
            f"the picture was drawn by a model {recipe.model!r} with weights {recipe.weights_hash[:12]!r}, "
            f"the model {model.name!r} here has {model.weights_hash[:12]!r}"
        )
    if from_tokens:
        if (largest := max(recipe.tokens)) >= model.tokenizer.vocab_size:
            raise UserError(f"the recipe has the token {largest}; the model's are below {model.tokenizer.vocab_size}")
        tokens_Bhw = torch.tensor(recipe.tokens).view(1, *recipe.grid)
        story = f"decoded the {len(recipe.tokens)} recorded tokens"
    else:
        tokens_Bhw = _draw(model, 1, recipe.grid, recipe.label, recipe.seed, recipe.options, quiet)
        other = sum(a != b for a, b in zip(_flat(tokens_Bhw[0]), recipe.tokens, strict=True))
        if other:
            raise UserError(
                f"{other} of {len(recipe.tokens)} tokens came out differently, as they may on another device or torch; "
                "--from-tokens gives the recorded picture"
            )
        story = f"drawn again from seed {recipe.seed}: all {len(recipe.tokens)} tokens equal those recorded"
    (picture,) = _finish(model, tokens_Bhw, recipe.size)
    path = _write(picture, path, recipe, force)
    if not quiet:
        print(story, file=sys.stderr)
    return path


def _draw(
    model: ImageGPT, n: int, grid: tuple[int, int], label: str | None, seed: int, options: SamplingOptions, quiet: bool
) -> Tensor:
    """Tokens [n, h, w], with a progress line where somebody is watching."""
    steps = model.stream_tokens(n, grid, label, seed, options)
    if not quiet and sys.stderr.isatty():
        steps = _watched(steps, n * grid[0] * grid[1])
    *_, last = steps
    return last.tokens_Bhw


def _watched(steps: Iterator[Step], cells: int) -> Iterator[Step]:
    from tqdm import tqdm

    with tqdm(total=cells, unit="cell", leave=False) as bar:
        for step in steps:
            bar.update(int(step.known_Bhw.sum()) - bar.n)
            yield step


def _finish(model: ImageGPT, tokens_Bhw: Tensor, size: tuple[int, int]) -> list[Image]:
    return [fit_cover(picture, *size) for picture in model.decode(tokens_Bhw)]


def _flat(tokens_hw: Tensor) -> tuple[int, ...]:
    return tuple(tokens_hw.flatten().tolist())


def _write(picture: Image, path: Path, recipe: Recipe | None, force: bool) -> Path:
    path = write_picture(picture, path, recipe, force=force)
    print(path, flush=True)
    return path
