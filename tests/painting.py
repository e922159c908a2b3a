"""Pictures that tests paint for themselves, or let a tiny model draw into files."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from generate.run import Target, draw_files
from igpt.canvas import Task
from igpt.files import plan_output
from igpt.image_gpt import ImageGPT

COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 200)}


def paint(seed: int, colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A few discs of about one colour on a light ground."""
    rng = random.Random(seed)
    picture = Image.new("RGB", size, (240, 230, 210))
    pen = ImageDraw.Draw(picture)
    for _ in range(3):
        x, y, r = rng.randrange(size[0]), rng.randrange(size[1]), rng.randrange(8, 24)
        shade = tuple(min(255, max(0, channel + rng.randint(-40, 40))) for channel in colour)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=shade)
    return picture


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Every pixel of a colour of its own."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def art_folder(folder: Path, each: int = 4, size: tuple[int, int] = (64, 64)) -> Path:
    """`each` painted pictures in each of the sub-folders red and blue."""
    for first, (label, colour) in enumerate(COLOURS.items()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            paint(100 * first + i, colour, size).save(folder / label / f"{i}.png")
    return folder


def drawn(model: ImageGPT, folder: Path, task: Task | None = None, **more: Any) -> list[Path]:
    """Files with what a model draws: a new picture, unless there is a task, of label red and seed 7, unless `more` says
    otherwise."""
    how = {name: more.pop(name) for name in ("sheet", "timelapse") if name in more}
    task = task or model.new_picture(more.pop("size", None), more.pop("tile", False))
    asked: dict[str, Any] = ({"seed": 7} if task.start else {"seed": 7, "label": "red"}) | more
    output = plan_output(folder, asked.get("n", 1))
    batches = model.batches(task, at_once=1 if how.get("timelapse") else None, **asked)
    return draw_files(batches, Target(output, "piece" if task.start else asked["label"] or model.name, **how))
