"""Several processes that learn together: what each does, and what they agree on. With one process all of it is free.

Notable choices: nobody leaves alone. What only one process finds out (a wrong option, a full disk, a signal) is told to
all before any acts on it; a process that is killed is noticed by the others, which end with a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from igpt.device import pick_device
from tokenizer_vq.base import UserError

Item = TypeVar("Item")
Found = TypeVar("Found")


def processes() -> PartialState:
    """This process among those of its training, and its device."""
    return PartialState(cpu=pick_device().type == "cpu")


def shared_out(items: Sequence[Item]) -> Sequence[Item]:
    """The part of a sequence that falls to this process: every n-th item."""
    here = processes()
    return items[here.process_index :: here.num_processes]


def total(values: Tensor) -> Tensor:
    """Sums over all processes, on the device of this one."""
    here = processes()
    return reduce(values.to(here.device), "sum") if here.num_processes > 1 else values


def agreed(*values: float) -> list[float]:
    """Means over all processes: where one alone went on or left, the others would wait for it."""
    here = processes()
    if here.num_processes == 1:
        return list(values)
    return reduce(torch.tensor(values, dtype=torch.float64, device=here.device), "mean").tolist()


def together(act: Callable[[], Found], only_main: bool = False) -> Found | None:
    """What `act` returns here. Where it raises UserError in one process, all raise it, the first one's sentence."""
    here, found, sentence = processes(), None, ""
    try:
        found = act() if here.is_main_process or not only_main else None
    except UserError as error:
        sentence = str(error)
    told = gather_object([sentence])
    if any(told):
        raise UserError(next(each for each in told if each))
    return found


def check_same_start(facts: dict[str, Any]) -> None:
    """Raises UserError, in all processes, where one was started with other facts than the first."""
    first, *others = gather_object([facts])
    for number, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {number} was started with {name.replace('_', '-')} {theirs.get(name)!r}, process 0 with "
                    f"{value!r}; the same are wanted"
                )


@contextmanager
def companions() -> Iterator[None]:
    """A block in which the end of another process is a UserError: what it was needed for cannot be had any more."""
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or "closed by peer" in str(error)
        if processes().num_processes == 1 or not lost:
            raise
        sentence = "another process of this training has ended; the same command goes on from the last save"
        raise UserError(sentence) from error
