"""Small changes to a GPT: low-rank layers (LoRA), new labels, and the adapter file that carries both for one base.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): the weights of a linear layer stay as they are, and the product of
two thin matrices that are learned is added to them. `merged` adds it for good.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer_vq.base import UserError

from .checkpoint import Checkpoint
from .cpu import Linear
from .files import atomic_write
from .model import GPT

STRENGTH = 2.0  # of the product, whatever the rank
ADAPTER_BYTES = 4_000_000  # the largest adapter file, which must be easy to send
LABELS = "labels.weight"  # the rows of all labels, old and new, travel with an adapter: 1 kB each
NUMBER = torch.float16  # of the tensors in a file: finer steps than bfloat16, and nothing in them is large

# Layers


class LowRank(nn.Module):
    """A linear layer that stays as it is, and a product of two thin matrices beside it that learns."""

    def __init__(self, base: Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))  # nothing is changed yet

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + F.linear(F.linear(x, self.down), self.up) * STRENGTH
        return out

    def merged(self) -> Tensor:
        """The weights [out, in] of the one plain layer that does the same."""
        return self.base.weight + self.up @ self.down * STRENGTH


def add_low_rank(gpt: GPT, rank: int) -> None:
    """Put low-rank layers around all linear ones, in place. Only these and the labels learn from here on."""
    gpt.requires_grad_(False)
    gpt.labels.weight.requires_grad_(True)
    for parent, name, layer in list(_linear_layers(gpt)):
        setattr(parent, name, LowRank(layer, rank))


def merged(gpt: GPT) -> GPT:
    """A plain GPT that does what `gpt` with its low-rank layers does; a copy."""
    plain = copy.deepcopy(gpt)
    for parent in list(plain.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LowRank):
                with torch.no_grad():
                    layer.base.weight.copy_(layer.merged())
                setattr(parent, name, layer.base)
    return plain.requires_grad_(True)


def largest_rank(gpt: GPT) -> int:
    """The highest rank at which an adapter stays within ADAPTER_BYTES (with room for many labels), at least 1."""
    per_rank = sum(layer.in_features + layer.out_features for _, _, layer in _linear_layers(gpt)) * 2
    return max(1, int(0.9 * ADAPTER_BYTES) // per_rank)


def _linear_layers(gpt: GPT) -> Iterator[tuple[nn.Module, str, Linear]]:
    """Every linear layer, with its parent and its name there."""
    for parent in gpt.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, Linear) and not isinstance(parent, LowRank):
                yield parent, name, layer


# Labels


def with_labels(gpt: GPT, rows_ND: Tensor) -> GPT:
    """A copy that knows N more labels, behind its own and before the null label, with these embeddings."""
    wider = GPT(replace(gpt.config, labels=gpt.config.labels + len(rows_ND)))
    old = gpt.labels.weight.detach()
    table = torch.cat([old[:-1], rows_ND.to(old), old[-1:]])
    wider.load_state_dict(gpt.state_dict() | {LABELS: table})
    return wider.to(old.device)


# The file


class _Header(NamedTuple):
    """What an adapter says of itself."""

    base: str  # name and weights hash of the model that it changes
    base_hash: str
    labels: list[str]  # all of them, those of the base first
    provenance: dict[str, Any]


def save_adapter(
    path: Path, gpt: GPT, labels: list[str], base: str, base_hash: str, provenance: dict[str, Any]
) -> None:
    """Write what `add_low_rank` and training made of the base. Raises UserError where the disk refuses."""
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach()
        for name, layer in gpt.named_modules() if isinstance(layer, LowRank) for part in ("down", "up")
    }  # fmt: skip
    tensors[LABELS] = gpt.labels.weight.detach()
    header = _Header(base, base_hash, labels, provenance)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as beside:
            small = {name: value.cpu().to(NUMBER).contiguous() for name, value in tensors.items()}
            save_file(small, beside, {"igpt-adapter": json.dumps(header._asdict(), ensure_ascii=False)})
            if (size := beside.stat().st_size) > ADAPTER_BYTES:
                raise UserError(f"the adapter would be {size / 1e6:.1f} MB, more than 4; a smaller --rank is wanted")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the adapter cannot be written to {path}: {error}") from error


def with_adapter(found: Checkpoint, path: Path) -> Checkpoint:
    """A model with an adapter merged into it. Raises UserError for a damaged file and for one of another base."""
    header, tensors, digest = _read(path)
    if header.base_hash != found.weights_hash:
        raise UserError(
            f"the adapter {path} belongs to the model {header.base!r} with weights {header.base_hash[:12]}, and this "
            f"model has weights {found.weights_hash[:12]}; an adapter works with the very model it was made for"
        )
    assert found.gpt is not None
    known, rows = len(found.labels), tensors.pop(LABELS, torch.zeros(0)).float()
    try:
        gpt = with_labels(found.gpt, rows[known:-1])
        if len(header.labels) != gpt.config.labels:
            raise ValueError(f"{len(header.labels)} labels")
        weights = dict(gpt.named_parameters())
        with torch.no_grad():
            weights[LABELS].copy_(rows)
            for name in (key.removesuffix(".down") for key in tensors if key.endswith(".down")):
                change = tensors[f"{name}.up"].float() @ tensors[f"{name}.down"].float()
                weights[f"{name}.weight"].add_(change * STRENGTH)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the adapter {path} does not fit the model it names: {error}") from error
    both = hashlib.sha256(f"{found.weights_hash}+{digest}".encode()).hexdigest()
    return Checkpoint(found.tokenizer, gpt.eval(), header.labels, header.provenance, both)


def _read(path: Path) -> tuple[_Header, dict[str, Tensor], str]:
    """Header, tensors and SHA-256 of an adapter file."""
    if not path.is_file():
        raise UserError(f"there is no adapter at {str(path)!r}; a .safetensors file of igpt finetune is wanted")
    try:
        with safe_open(path, framework="pt") as file:
            header = _Header(**json.loads((file.metadata() or {})["igpt-adapter"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        return header, tensors, hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no adapter that can be read; one made by igpt finetune is wanted") from error
