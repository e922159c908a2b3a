"""What lets a training stop and go on: its state on disk, a Ctrl-C that waits for the end of a step, seeded blocks.

A state is weights, averages, optimizers and the step, in one safetensors file that is written atomically. It holds no
generator states: data, dropout and the codebook's random choices are pure functions of (seed, step).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from igpt.device import devices, pick_device
from igpt.files import atomic_write
from igpt.lora import FROZEN, LoRALinear
from tokenizer_vq.base import UserError

# On disk


def all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and all buffers, also those that a model file leaves out (the codebook's averages), but none of a
    base inside low-rank layers: it stays as it is, and where it is locked it must not lie open on the disk."""
    frozen = FROZEN if any(isinstance(part, LoRALinear) for part in module.modules()) else ()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value for name, value in tensors.items() if not name.endswith(frozen)}


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    metadata: dict[str, str],
) -> None:
    """`metadata` are short strings: the step, the best score, what the training was started with.

    Raises UserError where the file cannot be written; the state from before is still there.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v.detach().cpu() for k, v in all_tensors(module).items()}
    for name, optimizer in optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{i}/{k}": v.cpu() for k, v in slots.items()}
    try:
        with atomic_write(path) as part:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the training cannot be saved to {path}: {error}; what was saved before is whole") from error


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, str]:
    """Fill modules and optimizers in place and return the metadata. Raises UserError if the shapes do not agree."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:
        raise UserError(f"the training state {path} cannot be read ({error}); delete it to start again") from error
    with torch.no_grad():
        for name, module in modules.items():
            for key, value in all_tensors(module).items():
                saved = tensors.get(f"module/{name}/{key}")
                if saved is None or saved.shape != value.shape:
                    raise UserError(
                        f"the training state {path} is of a model of another shape; use the options it was "
                        "started with, or another --out"
                    )
                value.copy_(saved)
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        slots: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizer/{name}/"
        for key, value in tensors.items():
            if key.startswith(prefix):
                i, slot = key.removeprefix(prefix).split("/")
                if value.shape == (parameter := parameters[int(i)]).shape:
                    # In the parameter's own memory format: fused AdamW walks both in the order they lie in memory.
                    value = torch.empty_like(parameter, device="cpu", dtype=value.dtype).copy_(value)
                slots.setdefault(int(i), {})[slot] = value
        optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
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
    """A block in which the first Ctrl-C only sets the event; a second one interrupts at once, as usual."""
    asked, before = threading.Event(), None

    def handle(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is threading.main_thread():  # signals cannot be caught elsewhere
        before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A block with torch's own generators seeded; afterwards those of the caller go on as if nothing had happened."""
    kind = pick_device().type
    numbers = range(devices(kind)) if kind != "cpu" else ()  # the CPU's is kept in any case
    with torch.random.fork_rng(numbers, device_type=kind):
        torch.manual_seed(seed)
        yield
