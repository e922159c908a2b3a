"""Several processes that learn together: what each does, and what they agree on. With one process all of it is free.

Notable choices: nobody leaves alone. What only one process finds out (a wrong option, a full disk, a signal) is told to
all before any acts on it; a process that is killed is noticed by the others, which end with a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from igpt.device import pick_device
from tokenizer_vq.base import UserError
from tokenizer_vq.quantizer import several_processes, summed

Item = TypeVar("Item")
Found = TypeVar("Found")


def processes() -> PartialState:
    """This process among those of its training, and its device."""
    return PartialState(cpu=pick_device().type == "cpu")


def shared_out(items: Sequence[Item]) -> Sequence[Item]:
    """The part of a sequence that falls to this process: every n-th item."""
    here = processes()
    return items[here.process_index :: here.num_processes]


def micro_batches(batch: Any, count: int) -> list[Any]:
    """A batch (a dict of tensors, where it is to be cut) in `count` parts at most."""
    if count == 1:
        return [batch]
    size = len(next(iter(batch.values())))
    parts = {name: value.tensor_split(min(count, size)) for name, value in batch.items()}
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def total(values: Tensor) -> Tensor:
    """Sums over all processes, on the device of this one."""
    return summed(values.to(processes().device)) if several_processes() else values


def agreed(*values: float) -> list[float]:
    """Means over all processes: where one alone went on or left, the others would wait for it."""
    means = total(torch.tensor(values, dtype=torch.float64)) / processes().num_processes
    return means.tolist() if several_processes() else list(values)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Each of these tensors becomes its sum over all processes, by one message."""
    if several_processes():
        sums = summed(torch.cat([each.flatten() for each in tensors]))
        for each, values in zip(tensors, torch.split(sums, [each.numel() for each in tensors]), strict=True):
            each.copy_(values.view_as(each))


class News:
    """Means over all processes of what each says, told a call later, so that no step waits for the news, nor for the
    device that brings them; at the first call and with one process at once."""

    def __init__(self) -> None:
        self.said: tuple[Tensor, Any] | None = None

    def __call__(self, *values: float) -> list[float]:
        """What was said at the call before."""
        here = processes()
        if here.num_processes == 1:
            return list(values)
        own = [torch.full((), float(value), dtype=torch.float64, device=here.device) for value in values]
        now = (summed(torch.stack(own)) / here.num_processes).to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if here.device.type == "cuda" else None
        (before, when), self.said = self.said or (now, arrived), (now, arrived)
        if when:
            when.synchronize()
        return before.tolist()


def together(act: Callable[[], Found], only_main: bool = False) -> Found:
    """What `act` returns; with `only_main` only the first process acts, and gets that. Where one raises UserError, all
    raise it, with the first one's sentence."""
    here, found, sentence = processes(), None, ""
    try:
        if here.is_main_process or not only_main:
            found = act()
    except UserError as error:
        sentence = str(error)
    sentences = gather_object([sentence])
    if any(sentences):
        raise UserError(next(each for each in sentences if each))
    return cast(Found, found)


def check_same_start(facts: dict[str, Any]) -> None:
    """Raises UserError, in all processes, where one was started with other facts than the first."""
    first, *others = gather_object([facts])
    for number, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs.get(name) != value:
                what = f"{name.replace('_', '-')} {theirs.get(name)!r}, process 0 with {value!r}"
                raise UserError(f"process {number} was started with {what}; the same are wanted")


@contextmanager
def companions() -> Iterator[None]:
    """A block in which the end of another process is a UserError, as what it was needed for cannot be had any more; and
    a UserError of one that loads samples, which comes as a traceback, is its sentence."""
    try:
        yield
    except (RuntimeError, UserError) as error:
        kind, _, sentence = str(error).strip().rpartition("\n")[2].partition(": ")
        if kind.endswith((".UserError", ".UnreadablePicture")):
            raise UserError(sentence) from error
        lost = isinstance(error, torch.distributed.DistError) or re.search(r"peer|gloo|nccl", str(error), re.IGNORECASE)
        if processes().num_processes == 1 or isinstance(error, UserError) or not lost:
            raise
        raise UserError("another process of this training has ended; the same command goes on from its save") from error
