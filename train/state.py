"""The training state on disk: weights, averages, optimizers and the step, in one safetensors file written atomically.

No generator states are kept because none exist: data, dropout and dead-code draws are pure functions of (seed, step).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from igpt.files import atomic_write
from tokenizer_vq.base import UserError


def everything(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and all buffers, those too that a model file leaves out (the codebook's averages)."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def save_state(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, torch.optim.Optimizer],
    notes: dict[str, str],
) -> None:
    """`notes` are short strings (the step, the best score, what the training was started with).

    Raises UserError where the disk refuses; the state from before is still there.
    """
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v.detach().cpu() for k, v in everything(module).items()}
    for name, optimizer in optimizers.items():
        for i, slots in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{i}/{k}": v.cpu() for k, v in slots.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            save_file({k: v.contiguous() for k, v in tensors.items()}, beside, notes)
    except (OSError, SafetensorError) as error:
        raise UserError(f"the training cannot be saved to {path}: {error}; what was saved before is whole") from error


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> dict[str, str]:
    """Fill modules and optimizers in place and return the notes. Raises UserError if the state is of another shape."""
    try:
        with safe_open(path, framework="pt") as file:
            notes: dict[str, str] = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:
        raise UserError(f"the training state {path} cannot be read ({error}); delete it to start again") from error
    with torch.no_grad():
        for name, module in modules.items():
            for key, value in everything(module).items():
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
    return notes


def peek(path: Path) -> dict[str, str]:
    """The notes of a state without its tensors; empty if there is no readable state."""
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception:  # safetensors raises its own types; a broken state is reported by load_state
        return {}
