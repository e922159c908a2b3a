"""What a CPU needs to be fast: a linear layer for a few rows, dropout, attention in training, and kept memory.

Drawing a few cells multiplies a few rows. In float32 with 1 to 32 of them `F.linear` spends most of its time walking
the weights in an order that suits large products: 11 ms for the 48 layers of a 37M model with 8 rows, against 4 ms with
weights laid out by oneDNN beforehand (on two cores; `benchmarks/sampling.py`). The operators are private to torch, so
they are tried first, and where they are missing or wrong the plain product is used.

CPUs that multiply bfloat16 in hardware are faster in it with 64 rows and more: three to seven times with AMX, 1.5 to
1.7 times with AVX-512 alone. So a layer may draw in it, as it does on a GPU. Sums are float32 either way.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ROWS = 8  # the layout is chosen for about so many rows
AMX_ROWS = 64  # multiplied at once in bfloat16 with AMX
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # numbers of malloc.h

# Products


class Linear(nn.Linear):
    """nn.Linear without a bias. In inference mode it keeps a second copy of its weights: packed on a CPU, and on a GPU
    in `drawing_dtype`, in which the result is then too."""

    def __init__(self, features_in: int, features_out: int):
        super().__init__(features_in, features_out, bias=False)
        self.drawing_dtype = torch.float32  # of the copy, which is float32 where packing in this does not work
        self._packed: Tensor | None = None
        self._packed_from: tuple[Any, ...] = ()  # address and version of the weights that were copied, and precision

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        weight = self.weight
        compiling = torch.compiler.is_compiling()  # where no other question can be asked
        if compiling or not (torch.is_inference_mode_enabled() and _can_copy(weight, x)):
            return F.linear(x, weight)
        dtype = self.drawing_dtype if not weight.is_cpu or packing_works(self.drawing_dtype) else torch.float32
        now = (weight.data_ptr(), weight._version, dtype)
        if self._packed is None or self._packed_from != now:
            copied = weight.detach().to(dtype)
            self._packed, self._packed_from = _pack(copied) if weight.is_cpu else copied, now
        if not weight.is_cpu:
            return F.linear(x.to(dtype), self._packed)
        return (_exact_product if dtype == x.dtype else _rough_product)(x, self._packed)

    def train(self, mode: bool = True) -> Linear:
        """Forgets the packed weights: fused optimizers change weights without moving on their version."""
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the packed weights, which are opaque."""
        return self.__dict__ | {"_packed": None, "_packed_from": ()}


def _can_copy(weight: Tensor, x: Tensor) -> bool:
    """Never under autocast, which asks for plain products in another precision: `packing_works` compares with them."""
    autocast = torch.is_autocast_enabled("cpu" if weight.is_cpu else "cuda")
    plain = weight.dtype == torch.float32 and not weight.is_inference() and not autocast
    return plain and (not weight.is_cpu or (x.dtype == torch.float32 and packing_works(torch.float32)))


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_ROWS)


def _product(x: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _exact_product(x: Tensor, packed: Tensor) -> Tensor:
    """In float32. A single row goes through twice: with AVX-512 oneDNN adds up more than 1,024 numbers in another order
    where a row is alone, and a picture shall not depend on what else is drawn with it."""
    alone = x.numel() == x.shape[-1]
    return _product(x.expand(2, *x.shape), packed)[0] if alone else _product(x, packed)


def _rough_product(x: Tensor, packed: Tensor) -> Tensor:
    """In bfloat16. With AMX always as many rows at a time: oneDNN adds up in another order there for other numbers of
    rows, and rounding so coarse would make another picture of the same seed in another batch."""
    rows_NI = x.bfloat16().flatten(0, -2)
    if not getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)():  # where torch cannot tell, it may have AMX
        return _product(rows_NI, packed).to(x.dtype).view(*x.shape[:-1], -1)
    *whole, rest = torch.split(rows_NI, AMX_ROWS)
    rest = F.pad(rest, (0, 0, 0, AMX_ROWS - len(rest)))
    parts = [_product(part, packed) for part in (*whole, rest)]
    out_NO = torch.cat(parts) if whole else parts[0]
    return out_NO[: len(rows_NI)].to(x.dtype).view(*x.shape[:-1], -1)


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators and they give the plain product on this machine, in float32 or bfloat16."""
    product, rtol, atol = (_exact_product, 1e-5, 1e-4) if dtype == torch.float32 else (_rough_product, 0.02, 0.2)
    with torch.inference_mode():
        weight, x = torch.linspace(-1, 1, 32 * 64).view(32, 64), torch.linspace(1, -1, 3 * 64).view(1, 3, 64)
        try:
            return torch.allclose(product(x, _pack(weight.to(dtype))), F.linear(x, weight), rtol, atol)
        except (AttributeError, RuntimeError, TypeError):
            return False


# Training


class Dropout(nn.Dropout):
    """nn.Dropout with 16 random bits an element, so that p is met to 1/65536. On a CPU the 32 or 64 bits an element of
    torch's own take a tenth of a training step."""

    def forward(self, x: Tensor) -> Tensor:
        """x, in training with a share p of zeros and the others divided by 1 - p."""
        if torch.compiler.is_compiling() or not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = bits.view(torch.int16)[: x.numel()].view_as(x)  # -32768 to 32767
        passed = round((1 - self.p) * 65536)
        return x * (levels < passed - 32768).type_as(x).mul_(65536 / max(1, passed))


def causal_attention(q_BNLE: Tensor, k_BNLE: Tensor, v_BNLE: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(E)) V, each query with the keys up to its own.

    For training in bfloat16 on a CPU by plain products: torch's fused kernel there takes two to three times as long,
    most of it on the way back. Scores are rounded to bfloat16, which only training can bear.
    """
    if not (q_BNLE.is_cpu and q_BNLE.dtype == torch.bfloat16 and q_BNLE.requires_grad):
        return F.scaled_dot_product_attention(q_BNLE, k_BNLE, v_BNLE, is_causal=True)
    hidden_LL = torch.ones(q_BNLE.shape[-2], k_BNLE.shape[-2], dtype=torch.bool).triu(1)
    scores_BNLL = q_BNLE * q_BNLE.shape[-1] ** -0.5 @ k_BNLE.mT
    return scores_BNLL.masked_fill(hidden_LL, -torch.inf).softmax(-1).type_as(v_BNLE) @ v_BNLE


def keep_freed_memory() -> None:
    """Have the C library, where it is glibc, keep what torch frees instead of handing it back to the system.

    On a CPU a training step allocates the same few gigabytes again and again, and a fifth of its time went to the
    system, which zeroes every page it gives (EXPERIMENTS.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)
