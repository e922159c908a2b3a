"""What lets a training stop and go on: its state on disk, a Ctrl-C that waits for the end of a step, seeded blocks.

A state is weights, averages, optimizers and the step, in one safetensors file that is written atomically. It holds no
generator states: data, dropout and the codebook's random choices are pure functions of (seed, step).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from igpt.device import devices, pick_device
from igpt.files import atomic_write
from igpt.model import GPT
from tokenizer_vq.base import UserError, complaint

Modules = Mapping[str, nn.Module]
Optimizers = Mapping[str, torch.optim.Optimizer]

# On disk


def _module_tensors(modules: Modules) -> dict[str, Tensor]:
    """All parameters and all buffers, also those that a model file leaves out (the codebook's averages); not those of a
    GPT that stay as they are: where its base is locked, they must not lie open on the disk."""
    return {
        f"module/{name}/{key}": value.detach()
        for name, module in modules.items()
        for key, value in (*module.named_parameters(), *module.named_buffers())
        if not (isinstance(module, GPT) and key in module.frozen)
    }


def save_state(path: Path, modules: Modules, optimizers: Optimizers, metadata: dict[str, str]) -> None:
    """`metadata` are short strings: the step, the best score, what the training was started with.

    Raises UserError where the file cannot be written; the state from before is still there.
    """
    tensors = _module_tensors(modules)
    for name, optimizer in optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{i}/{slot}": value for slot, value in slots.items()}
    with atomic_write(path) as part:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part, metadata)


@torch.no_grad()
def load_state(path: Path, modules: Modules, optimizers: Optimizers | None = None) -> dict[str, str]:
    """Fill modules and optimizers in place and return the metadata. Raises UserError if the shapes do not agree."""
    sentence = f"the training state {path} cannot be read, delete it to start again"
    with complaint(sentence, Exception), safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = dict(file.metadata() or {})
        saved = {key: file.get_tensor(key) for key in file.keys()}
    for key, value in _module_tensors(modules).items():
        if key not in saved or saved[key].shape != value.shape:
            wanted = "the options that it was started with, or another --out, are wanted"
            raise UserError(f"the training state {path} is of a model of another shape; {wanted}")
        value.copy_(saved[key])
    for name, optimizer in (optimizers or {}).items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {i: {} for i in range(len(parameters))}
        for key in saved:
            if key.startswith(prefix := f"optimizer/{name}/"):
                i, slot = key.removeprefix(prefix).split("/")
                value, parameter = saved[key], parameters[int(i)]
                if value.shape == parameter.shape:
                    # In the parameter's own memory format: fused AdamW walks both in the order they lie in memory.
                    value = torch.empty_like(parameter, device="cpu", dtype=value.dtype).copy_(value)
                slots[int(i)][slot] = value
        state = {i: filled for i, filled in slots.items() if filled}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return metadata


def peek(path: Path) -> dict[str, str]:
    """The metadata of a state without its tensors; empty if there is no readable state."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # none there, or damaged, which load_state reports
        return {}


# In the process


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """A block in which the first Ctrl-C only sets the event, as does SIGTERM, which launchers of several processes and
    cluster schedulers send; a second Ctrl-C interrupts at once, as usual."""
    interrupt, pressed = threading.Event(), threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if pressed.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            pressed.set()
        interrupt.set()

    if threading.current_thread() is not threading.main_thread():  # signals cannot be caught elsewhere
        yield interrupt
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def loaded(dataset: Dataset[Any], batches: Iterable[list[int]], workers: int, pin: bool) -> Generator[Any, None, None]:
    """The batches with these numbers, loaded by so many processes. Whoever takes them closes this in the end."""
    how: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "worker_init_fn": _outlive_signal}
    loader: Any = iter(DataLoader(dataset, batch_sampler=batches, **how))
    try:
        yield from loader
    finally:
        if workers:  # now: at its end Python would wait for ever for those that outlive its signal
            loader._shutdown_workers()


def _outlive_signal(worker: int) -> None:
    """In a process that loads samples: what a scheduler sends to all is for the training, which ends this one when it
    has saved; a second SIGTERM ends it at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block with torch's own generators seeded; afterwards those of the caller go on as if nothing had happened."""
    kind = pick_device().type
    numbers = range(devices(kind)) if kind != "cpu" else ()  # the CPU's is kept in any case
    with torch.random.fork_rng(numbers, device_type=kind):
        torch.manual_seed(seed)
        yield
