"""Writes the pictures of one command line into files, also as animations, and draws a picture again from its recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path

import torch
from PIL.Image import Image, Resampling, new

from igpt.canvas import Batch, Result, Task
from igpt.files import Output, encode_picture, stem_for, write_file, write_picture
from igpt.fitting import PartialGrid, canvas_for
from igpt.image_gpt import ImageGPT
from igpt.recipe import Recipe, recipe_of
from igpt.sheet import square_sheet
from tokenizer_vq.base import UserError

from .atlas import Sprite, atlas

FRAMES = 48  # about
FRAME_TIME = 80  # milliseconds
LAST_FRAME_TIME = 2500  # the finished picture stays so long
WEBP_QUALITY = 90  # up to 100
LARGEST_FRAME = 512  # pixels a side


@dataclass(frozen=True)
class Target:
    """What is written of pictures, and where to."""

    output: Output
    title: str  # of all of them; an edit is named after it, a new picture after its label
    sheet: bool = False  # also one picture of all
    atlas: bool = False  # also one for game engines
    timelapse: str | None = None  # "gif" or "webp": also an animation of each
    force: bool = False  # replace files of the same name
    quiet: bool = False  # no progress
    draw: Callable[[Batch], list[PartialGrid]] | None = None  # without a timelapse: by which the caller watches


def draw_files(batches: Iterable[Batch], target: Target) -> list[Path]:
    """Draws pictures, writes each with its recipe and prints each path.

    Returns the paths, that of the contact sheet last. Raises UserError where the disk refuses.
    """
    paths: list[Path] = []
    captioned: list[tuple[Image, str]] = []  # for the sheet
    sprites: list[Sprite] = []

    def encode(result: Result) -> tuple[str, bytes]:
        picture, recipe = result
        stem = stem_for(target.title if batch.task.start else recipe.label or recipe.model, recipe.seed)
        return stem, encode_picture(picture, target.output.picture(stem), recipe)

    with ThreadPoolExecutor() as pool:  # compressing a picture takes longer than a GPU takes to draw it
        for batch in batches:
            frames: list[Image] = []
            steps = recorded(batch, frames) if target.timelapse else batch.steps()
            results = batch.results(target.draw(batch) if target.draw else _last(steps, batch, target.quiet))
            for (picture, recipe), (stem, encoded) in zip(results, pool.map(encode, results), strict=True):
                paths.append(_say(write_file(encoded, target.output.picture(stem), force=target.force)))
                sprites += [Sprite(paths[-1].name, picture, recipe.label, recipe.seed)] * target.atlas
                if target.timelapse:
                    data = animation(frames, target.timelapse, exact=batch.model.downsample == 1)
                    place = target.output.companion(stem, f"-timelapse.{target.timelapse}")
                    paths.append(_say(write_file(data, place, force=target.force)))
                captioned += [(picture, str(recipe.seed))] * target.sheet
    if target.sheet:
        place = target.output.companion(stem_for(target.title, int(captioned[0][1])), "-sheet.png")
        paths.append(_say(write_picture(square_sheet(captioned), place, force=target.force)))
    if target.atlas:
        stem = stem_for(target.title, sprites[0].seed)
        place, described = (target.output.companion(stem, f"-atlas{suffix}") for suffix in (".png", ".json"))
        paths.append(_say(write_picture(atlas(sprites, place.name)[0], place, force=target.force)))
        text = atlas(sprites, paths[-1].name)[1].encode()
        paths.append(_say(write_file(text, described, force=target.force)))
    return paths


def shared_out(batches: Iterable[Batch], target: Target, process: int, processes: int) -> Iterator[Batch]:
    """The batches that fall to one of several processes, without those that are on disk already, of this model and with
    these options: of each the last one is looked into."""
    for batch in islice(batches, process, None, processes):
        stems = [stem_for(label or batch.model.name, s) for label, s in zip(batch.labels, batch.seeds, strict=True)]
        places = [target.output.picture(stem) for stem in stems]
        wanted = (batch.model.weights_hash, batch.options, batch.canvas.size, batch.canvas.wraps, batch.task.sprite)
        there = recipe_of(places[-1]) if all(place.is_file() for place in places) else None
        if not there or (there.weights_hash, there.options, there.size, there.tile, there.sprite) != wanted:
            yield batch


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
    count = len(recipe.tokens)
    if (largest := max(recipe.tokens)) >= model.tokenizer.vocab_size:
        raise UserError(f"the recipe has the token {largest}; the model's are below {model.tokenizer.vocab_size}")
    known = recipe.given or [False] * count  # what an edit took over
    recorded = PartialGrid(*(torch.tensor(values).view(recipe.grid) for values in (recipe.tokens, known)))
    start = None if recipe.command == "generate" else lambda seed: recorded
    task = Task(recipe.command, canvas_for(model, recipe.size, recipe.tile), start, sprite=recipe.sprite)
    batch = Batch(model, task, [recipe.label], recipe.seed, recipe.options)
    message = f"decoded the {count} recorded tokens"
    if task.start is not None and (not recipe.given or batch.canvas.levels != [recipe.grid]) and not from_tokens:
        message += f", as {recipe.command} at this size needs its source picture to be drawn again"
    elif not from_tokens:
        _check_tokens(batch, recorded, quiet)
        message = f"drawn again from seed {recipe.seed}: all {count} tokens equal those recorded"
    ((picture, again),) = batch.results([recorded])
    if recipe.pixels and again.pixels != recipe.pixels:
        edited = "; what was taken over from the source picture is drawn from its tokens, its pixels are not recorded"
        other_pixels = "; some pixels differ, as they may with another number of threads, another device or torch"
        message += edited if recipe.given else other_pixels
    path = _say(write_picture(picture, path, replace(recipe, pixels=again.pixels), force=force))
    if not quiet:
        print(message, file=sys.stderr)
    return path


def _check_tokens(batch: Batch, recorded: PartialGrid, quiet: bool) -> None:
    """Draws a picture again. Raises UserError where other tokens than the recorded ones come out."""
    (rows, columns), (width, height) = recorded.tokens_hw.shape, batch.canvas.size
    if batch.canvas.levels[-1] != (rows, columns):
        raise UserError(
            f"the recipe's grid of {rows}x{columns} tokens is not that on which a picture of {width}x{height} pixels "
            "is drawn; --from-tokens gives the recorded picture"
        )
    (grid,) = _last(batch.steps(), batch, quiet)
    if other := int((grid.tokens_hw != recorded.tokens_hw).sum()):
        raise UserError(
            f"{other} of {rows * columns} tokens came out differently, as they may on another device, torch or igpt; "
            "--from-tokens gives the recorded picture"
        )


def _last(steps: Iterator[list[PartialGrid]], batch: Batch, quiet: bool) -> list[PartialGrid]:
    """The finished grids, with a progress line where somebody is watching."""
    if quiet or not sys.stderr.isatty():
        *_, grids = steps
        return grids
    from tqdm import tqdm

    tokens = len(batch.labels) * sum(h * w for h, w in batch.canvas.levels)
    with tqdm(total=tokens, unit="token", leave=False) as bar:
        for grids in steps:
            bar.update(round(batch.share_drawn(grids) * tokens) - bar.n)
    return grids


def _say(path: Path) -> Path:
    print(path, flush=True)
    return path


# Time-lapses


def recorded(batch: Batch, frames: list[Image]) -> Iterator[list[PartialGrid]]:
    """Steps of a batch of one picture, while what it looks like is added to the frames."""
    for grids in batch.some_steps(FRAMES):
        frame = batch.preview(grids[0]).convert("RGB")
        frame.thumbnail((LARGEST_FRAME, LARGEST_FRAME), Resampling.LANCZOS)
        frames.append(frame)
        yield grids


def animation(frames: list[Image], kind: str, *, exact: bool) -> bytes:
    """The frames as a "gif" or "webp" that repeats for ever; `exact` is for sprites, of which a lossy WebP would blur
    the pixels."""
    if kind == "gif":  # one palette, that of the finished picture and mid-grey: changing colours would flicker
        last = frames[-1]
        with_grey = new("RGB", (last.width, last.height + max(1, last.height // 16)), (128, 128, 128))
        with_grey.paste(last, (0, 0))
        palette = with_grey.quantize(256)
        frames = [frame.quantize(palette=palette) for frame in frames]
    times, data = [FRAME_TIME] * (len(frames) - 1) + [LAST_FRAME_TIME], BytesIO()
    more = {"append_images": frames[1:], "duration": times, "loop": 0, "quality": WEBP_QUALITY, "lossless": exact}
    frames[0].save(data, kind, save_all=True, **more)
    return data.getvalue()
