"""Windows that cover a grid: equal and overlapping for the tokenizer, with cores of their own for the GPT."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor


class Span(NamedTuple):
    """One window along one axis: tokens from `start` to `stop`."""

    start: int
    stop: int


def spans(length: int, window: int, overlap: int) -> list[Span]:
    """Equal windows that cover `length` tokens, as few and then as small as can be; `overlap` or more are shared."""
    if length <= window:
        return [Span(0, length)]
    count = -(-(length - overlap) // (window - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    return [Span(start, start + size) for start in (i * (length - size) // (count - 1) for i in range(count))]


def window_for(h: int, w: int, side: int) -> tuple[int, int]:
    """Rows and columns of a window with at most side * side cells: longer where the grid is narrow."""
    rows = min(h, max(side, side * side // w))
    return rows, min(w, side * side // rows)


# Windows of cells


def cell_windows(h: int, w: int, native_cells: int, wraps: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Rounds of windows of at most `native_cells`: the numbers of their cells and their cores (bool), both [W, h, w].

    Cores tile the grid; no window of a round has another's core in sight.
    """
    shape = window_for(h, w, math.isqrt(native_cells))
    for rows in rounds_of(cores(h, shape[0], wraps)):
        for columns in rounds_of(cores(w, shape[1], wraps)):
            row, inside_rows = _cells_of(rows, shape[0], h)
            column, inside_columns = _cells_of(columns, shape[1], w)
            cells = rearrange(row, "y h -> y 1 h 1") * w + rearrange(column, "x w -> 1 x 1 w")
            core = rearrange(inside_rows, "y h -> y 1 h 1") & rearrange(inside_columns, "x w -> 1 x 1 w")
            yield cells.flatten(0, 1), core.flatten(0, 1)


def rounds_of(windows: list[tuple[int, Span]]) -> list[list[tuple[int, Span]]]:
    """Every other window of an axis, then those between; the last by itself where it may reach to another of its round.

    That is so where it is the next but one of the first, around the edge, or its core shorter than the others.
    """
    (_, first), (_, last) = windows[0], windows[-1]
    alone = len(windows) > 1 and (len(windows) % 2 or last.stop - last.start < first.stop - first.start)
    paired = windows[:-1] if alone else windows
    return [part for part in (paired[::2], paired[1::2], windows[-1:] if alone else []) if part]


def _cells_of(windows: list[tuple[int, Span]], window: int, length: int) -> tuple[Tensor, Tensor]:
    """Of windows along one axis the numbers of their cells, and which of these are in the core."""
    cells = (torch.tensor([[first] for first, _ in windows]) + torch.arange(window)) % length
    start, stop = (torch.tensor([[core[side]] for _, core in windows]) for side in (0, 1))
    return cells, (cells >= start) & (cells < stop)


def cores(length: int, window: int, wraps: bool) -> list[tuple[int, Span]]:
    """Along one axis: where each window begins, and the middle half of it that it draws (all of it, at an edge)."""
    if window == length and not wraps:
        return [(0, Span(0, length))]
    core = max(1, window // 2)
    found = []
    for start in range(0, length, core):
        first = start - (window - core) // 2
        first = first if wraps else min(max(0, first), length - window)
        found.append((first, Span(start, min(start + core, length))))
    return found
