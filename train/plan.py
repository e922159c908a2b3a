"""What a fine-tuning will do: shared out from the time it may take, the speed of the machine and the pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from igpt.likelihood import CELLS_ASKED
from igpt.model import GPT

from .collection import Collection
from .options import TuneOptions

LOOKING, DRAWING, ASKING = 0.1, 0.12, 0.03  # shares of the time: validation, the sheet and the copy check, the baseline
LOOKS, FEWEST_LOOKS, MOST_LOOKS = 6, 2, 20  # at validation; before there are so many, each takes fewer pictures
COLUMNS, DRAWN, FEWEST_DRAWN = 8, 24, 3  # pictures of a row of the sheet, drawn by the tuned model, and the least
FEWEST_STEPS = 10
FORWARD = 1 / 3  # of what learning from a grid costs
WRITING = 5.0  # seconds, the model and its states


class Speeds(NamedTuple):
    """Seconds that this machine takes."""

    grid: float  # to learn from one
    drawing: float  # to draw one picture


@dataclass(frozen=True)
class Plan:
    """Everything that was chosen from the time there is. Times are in seconds."""

    asked: int  # pictures by which the nearest label of the base is found
    windows: int  # of validation pictures at a look
    looks: int
    columns: int  # of the sheet
    drawn: int  # pictures by the tuned model
    samples: int  # a guess, where the time decides
    learning: float  # looks included
    ending: float  # drawing and writing, after it
    fewest: float  # of learning: FEWEST_STEPS and FEWEST_LOOKS
    least: float  # in all

    def sentences(self, options: TuneOptions, collection: Collection, speeds: Speeds, flip: bool) -> list[str]:
        """What is going to be done and why, in plain words."""
        crops, n, kept = 1 / speeds.grid, len(collection.train), len(collection.validation)
        mirrored = "mirrored at random" if flip else "not mirrored"
        told = [
            f"this machine learns from {crops:,.{int(crops < 10)}f} crops a second and draws a picture in "
            f"{speeds.drawing:.1f} seconds",
            f"about {self.samples:,} crops to learn from, {self.samples / n:.0f} of each picture, {options.batch} at "
            f"once, {mirrored}; {self.looks} looks at the {kept} kept for validation; {self.drawn} drawings in the end",
        ]
        if options.samples:
            return [*told, f"--samples decides, not --minutes: about {_say(options.samples * speeds.grid)} of learning"]
        if self.learning > self.fewest:
            return [*told, f"{_say(60 * options.minutes)} in all, less if it stops getting better before"]
        drawings = self.columns + self.drawn
        return [
            *told,
            f"--minutes {options.minutes:g} is too little on this machine: {_say(self.least)} is the least, for "
            f"{FEWEST_STEPS} steps, {FEWEST_LOOKS + 1} looks and {drawings} drawings",
        ]

    def after(self, seconds: float, minutes: float) -> Plan:
        """The plan once it is `seconds` after the start and learning begins."""
        return replace(self, learning=max(self.fewest, 60 * minutes - seconds - self.ending))


def choose(options: TuneOptions, speeds: Speeds, spent: float, windows: int, gpt: GPT) -> Plan:
    """The plan for a machine, `spent` seconds after the start; there are so many windows of validation pictures."""
    forward, total = speeds.grid * FORWARD, 60 * options.minutes
    asking = forward * (gpt.config.labels + 1) * min(1, CELLS_ASKED / gpt.config.cells)
    asked = _between(1, ASKING * total / asking, 4)
    drawings = DRAWING * total / speeds.drawing
    columns = _between(FEWEST_DRAWN, drawings / 3, COLUMNS)
    drawn = _between(columns, drawings - columns, DRAWN)
    windows = _between(1, LOOKING * total / forward / LOOKS, windows)
    look = windows * forward
    looks = _between(FEWEST_LOOKS, LOOKING * total / look - 1, MOST_LOOKS)
    ending = (columns + drawn) * speeds.drawing + WRITING
    fewest = FEWEST_STEPS * options.batch * speeds.grid + FEWEST_LOOKS * look
    before = spent + asked * asking + look
    learning = max(fewest, total - before - ending)
    samples = options.samples or max(1, int((learning - looks * look) / speeds.grid))
    return Plan(asked, windows, looks, columns, drawn, samples, learning, ending, fewest, before + fewest + ending)


def seconds_for(work: Callable[[], object]) -> float:
    """How long `work` takes once it is warm."""
    work()
    began = time.perf_counter()
    work()
    return max(1e-6, time.perf_counter() - began)


def _between(least: int, wanted: float, most: int) -> int:
    return max(least, min(most, int(wanted)))


def _say(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{math.ceil(seconds)} seconds"
