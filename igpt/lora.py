"""Small changes to a GPT: low-rank layers (LoRA), new labels, and the adapter file that carries both for one base.

LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1): the matrix of a linear layer stays as it is, and the product of
two thin matrices that learn is added to it. Vectors (norms, query) and labels are small and learn themselves.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenizer_vq.base import UserError, complaint

from .checkpoint import NO_MODEL, Checkpoint, check_labels, printable
from .cpu import Linear
from .files import atomic_write
from .model import GPT

LORA_SCALE = 2.0  # of the product, whatever the rank: alpha / r in the paper
ADAPTER_BYTES = 4_000_000  # the largest adapter file, which must be easy to send
HEADER_BYTES = 100_000  # of it, for names of tensors and provenance
ADAPTER_DTYPE = torch.float16  # finer steps than bfloat16, and nothing in an adapter is large
HEADER = ("base", "base_hash", "labels", "rank", "provenance")  # what an adapter says of itself; labels: all of them
FROZEN = (".base.weight", "tokens.weight")  # ends of the names of what stays as it is

# Layers


class LoRALinear(nn.Module):
    """x W' + LORA_SCALE * x down' up': W stays as it is, `down` and `up` learn."""

    def __init__(self, base: Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.base = base
        weight, down = base.weight.detach(), torch.randn(rank, base.in_features, generator=generator)
        self.down = nn.Parameter(down.to(weight) / base.in_features**0.5)
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank))  # nothing is changed yet

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * LORA_SCALE


def apply_lora(gpt: GPT, rank: int, seed: int = 0) -> GPT:
    """Put low-rank layers around all linear ones, in place. All matrices but these and the labels stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    for parent, name, layer in _layers(gpt, Linear):
        setattr(parent, name, LoRALinear(layer, rank, generator))
    gpt.frozen = frozenset(name for name, _ in gpt.named_parameters() if name.endswith(FROZEN))
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name not in gpt.frozen)
    return gpt


@torch.no_grad()
def merge_lora(gpt: GPT) -> GPT:
    """The plain GPT that does the same as one with low-rank layers; a copy."""
    plain = copy.deepcopy(gpt)
    for parent, name, layer in _layers(plain, LoRALinear):
        layer.base.weight.add_(layer.up @ layer.down * LORA_SCALE)
        setattr(parent, name, layer.base)
    return plain.requires_grad_(True)


def _layers(gpt: GPT, kind: type[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """All layers of a kind, with the module that holds each and its name there."""
    parents = gpt.modules()
    return [(parent, *child) for parent in parents for child in parent.named_children() if isinstance(child[1], kind)]


def largest_rank(gpt: GPT) -> int:
    """The highest rank at which an adapter for `gpt`, its labels included, stays within ADAPTER_BYTES; at least 1."""
    layers = [layer for layer in gpt.modules() if isinstance(layer, Linear)]
    matrices = sum(layer.weight.numel() for layer in layers) + gpt.tokens.weight.numel()
    rest = sum(parameter.numel() for parameter in gpt.parameters()) - matrices
    room = (ADAPTER_BYTES - HEADER_BYTES) // ADAPTER_DTYPE.itemsize - rest
    return max(1, room // sum(layer.in_features + layer.out_features for layer in layers))


# Labels


def with_labels(gpt: GPT, count: int) -> GPT:
    """A copy that knows `count` more labels, behind its own and before the null label.

    Each begins as the mean of the others: as good as the nearest of them, which would first have to be found.
    """
    table = gpt.labels.weight.detach()
    mean = table[: max(1, len(table) - 1)].mean(0, keepdim=True)
    wider = copy.deepcopy(gpt)
    wider.config = replace(gpt.config, labels=gpt.config.labels + count)
    wider.labels.num_embeddings = wider.config.labels + 1
    wider.labels.weight = nn.Parameter(torch.cat([table[:-1], mean.expand(count, -1), table[-1:]]))
    return wider


def with_tokens(gpt: GPT, like: Tensor) -> GPT:
    """A copy that knows more tokens, behind its own; each begins as the token [N] that it is like."""
    wider = copy.deepcopy(gpt)
    wider.config = replace(gpt.config, vocab_size=gpt.config.vocab_size + len(like))
    wider.tokens.num_embeddings = wider.head.out_features = wider.config.vocab_size
    for table in (wider.tokens, wider.head):
        table.weight = nn.Parameter(torch.cat([table.weight.detach(), table.weight.detach()[like]]))
    return wider


# The file


def _learned(gpt: GPT) -> dict[str, Tensor]:
    """What an adapter carries of a GPT with low-rank layers."""
    return {name: value.detach() for name, value in gpt.named_parameters() if not name.endswith(FROZEN)}


def save_adapter(
    path: Path, gpt: GPT, labels: Sequence[str], base: tuple[str, str], provenance: dict[str, Any]
) -> None:
    """Write what `apply_lora` and training made of the base, which is given by its name and weights hash.

    Raises UserError where the disk refuses, and for more than ADAPTER_BYTES.
    """
    rank = len(_layers(gpt, LoRALinear)[0][2].down)
    header = dict(zip(HEADER, (*base, list(labels), rank, provenance), strict=True))
    tensors = {name: value.to("cpu", ADAPTER_DTYPE).contiguous() for name, value in _learned(gpt).items()}
    with atomic_write(path) as part:
        save_file(tensors, part, {"igpt-adapter": json.dumps(header)})
        if (size := part.stat().st_size) > ADAPTER_BYTES:
            raise UserError(f"the adapter would be {size / 1e6:.1f} MB, more than 4; a smaller --rank is wanted")


@torch.no_grad()
def with_adapter(found: Checkpoint, path: Path) -> Checkpoint:
    """A model with an adapter merged into it. Raises UserError for a damaged file and for one of another base."""
    if not path.is_file():
        raise UserError(f"there is no adapter at {str(path)!r}; a .safetensors file of igpt finetune is wanted")
    unreadable = OSError, SafetensorError, ValueError, TypeError, KeyError
    with complaint(f"{path} is no adapter that can be read; one made by igpt finetune is wanted", *unreadable):
        with safe_open(path, framework="pt") as file:
            header = printable(json.loads((file.metadata() or {})["igpt-adapter"]))
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        base, base_hash, labels, rank, provenance = (header[key] for key in HEADER)
    if base_hash != found.weights_hash:
        raise UserError(
            f"the adapter {path} belongs to the model {base!r} with weights {base_hash!s:.12}, and this model has "
            f"weights {found.weights_hash:.12}; an adapter works with the very model it was made for"
        )
    with complaint(f"the adapter {path} does not fit the model it names", *NO_MODEL):
        check_labels(labels, provenance)
        if rank not in {side for value in tensors.values() for side in value.shape}:  # or it might fill all memory
            raise ValueError(f"its rank is {rank!s:.60}")
        gpt = apply_lora(with_labels(found.gpt, len(labels) - len(found.labels)), rank)
        if {k: v.shape for k, v in _learned(gpt).items()} != {k: v.shape for k, v in tensors.items()}:
            raise ValueError("its tensors have other names or shapes")
        gpt.load_state_dict(tensors, strict=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    both = hashlib.sha256(f"{found.weights_hash}+{digest}".encode()).hexdigest()
    return Checkpoint(found.tokenizer, merge_lora(gpt).eval(), labels, provenance, both)
