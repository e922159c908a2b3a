"""Which device to work on, whether it multiplies fast in bfloat16, and work on it that is replayed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenizer_vq.base import UserError


def devices(kind: str) -> int:
    """How many devices of a kind ("cuda", "mps" or "cpu") there are."""
    if kind == "cuda":
        return torch.cuda.device_count()
    return int(kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available()))


def pick_device(asked: str | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Raises UserError where the device asked for is unknown or absent.
    """
    present = [kind for kind in ("cuda", "mps", "cpu") if devices(kind)]
    kind, _, number = (asked or present[0]).partition(":")
    if not number and kind == "cuda":  # of several processes on a machine each has one of its own
        number = os.environ.get("LOCAL_RANK", "")
    if not (number or "0").isdecimal() or int(number or 0) >= devices(kind):
        raise UserError(f"there is no device {asked!r} here; there is {', '.join(present)}")
    return torch.device(f"{kind}:{number}" if number else kind)


@contextmanager
def own_settings() -> Iterator[None]:
    """A block in which new tensors are float32 and on the CPU unless they say otherwise, whatever a caller has set, and
    products are in the precision of the model. Forked children may draw as well."""
    _one_thread_after_fork()
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as settings:
            for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                settings.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":  # only where it is needed: it would slow every call of torch
                settings.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.set_default_dtype(dtype)


@cache
def _one_thread_after_fork() -> None:
    """The threads of OpenMP do not live on in a forked child, which would wait for them for ever."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


@cache
def fast_bf16(device: torch.device | None = None) -> bool:
    """Whether a device (default: the best there is) multiplies in bfloat16 faster than in float32."""
    if (device or pick_device()).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public question for this; where it has lost the private ones, float32 is the safe answer. The first
    # asks the processor, the second oneDNN, which does the products and may be set to use less of the processor.
    processor = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    library = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(processor and library and processor() and library())


Work = Callable[..., Tensor]


def cuda_graph(work: Work, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Work recorded as one CUDA graph: what does it again with what is then in `inputs`, and where its result is."""
    with torch.cuda.device(inputs[0].device):  # not the first one in every process
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work(*inputs)
    return graph.replay, result


class Graphs:
    """Work that comes again with tensors of the same shapes, replayed: thousands of small operations without Python.

    The first two times it is done as it is, which also warms up. Only the last recording is kept, as each holds memory.
    Where recording fails, a warning says so once, and everything is done as it is.
    """

    def __init__(self, record: Callable[..., tuple[Callable[[], None], Tensor]] | None = cuda_graph):
        self.record, self.key, self.times = record, (), 0
        self.recording: tuple[list[Tensor], Callable[[], None], Tensor] | None = None

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs(self.record)

    def __call__(self, key: Any, work: Work, inputs: Sequence[Tensor]) -> Tensor:
        """work(*inputs). `key` stands for all that matters but the values of the inputs."""
        if key != self.key:
            self.key, self.times, self.recording = key, 0, None
        self.times += 1
        if self.times > 2 and self.recording is None and self.record is not None:
            own = [x.clone() for x in inputs]
            try:
                self.recording = (own, *self.record(work, own))
            except RuntimeError as error:
                self.record = None
                warnings.warn(f"drawing goes on without CUDA graphs: {error}", stacklevel=2)
        if self.recording is None:
            return work(*inputs)
        own, replay, result = self.recording
        for mine, new in zip(own, inputs, strict=True):
            mine.copy_(new)
        replay()
        return result.clone()
