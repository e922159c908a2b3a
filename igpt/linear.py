"""A linear layer that is fast for a few rows on a CPU, which is what drawing a few cells at a time needs.

`F.linear` in float32 with 1 to 32 rows spends most of its time walking the weights in an order that suits large
products: 11 ms for the 48 layers of a 37M model with 8 rows, against 4 ms with weights laid out by oneDNN beforehand
(measured on two cores; `benchmarks/sampling.py`). The operators are private to torch, so they are tried first, and
where they are missing or wrong the plain product is used.

CPUs that multiply bfloat16 in hardware are faster in it with 64 rows and more: three to seven times with AMX, 1.5 to
1.7 times with AVX-512 alone. So a layer can be told to draw in it. Sums are float32 either way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .device import has_amx

ROWS = 8  # the layout is chosen for about so many rows
ROWS_AT_ONCE = 64  # in bfloat16 with AMX


class Linear(nn.Linear):
    """nn.Linear without a bias. In inference mode on a CPU in float32 it keeps a second, packed copy of its weights."""

    def __init__(self, features_in: int, features_out: int):
        super().__init__(features_in, features_out, bias=False)
        self.drawing_dtype = torch.float32  # of the packed copy, which is float32 where packing in this does not work
        self._packed: Tensor | None = None
        self._packed_from: tuple[Any, ...] = ()  # address and version of the weights that were packed, and precision

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if not (torch.is_inference_mode_enabled() and x.dtype == torch.float32 and _can_pack(weight)):
            return nn.functional.linear(x, weight)
        dtype = self.drawing_dtype if packing_works(self.drawing_dtype) else torch.float32
        now = (weight.data_ptr(), weight._version, dtype)
        if self._packed is None or self._packed_from != now:
            self._packed, self._packed_from = _pack(weight.to(dtype)), now
        return (_exact_product if dtype == x.dtype else _rough_product)(x, self._packed)

    def train(self, mode: bool = True) -> Linear:
        """Forgets the packed weights: fused optimizers change weights without moving on their version."""
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go without the packed weights, which are opaque."""
        return self.__dict__ | {"_packed": None, "_packed_from": ()}


def _can_pack(weight: Tensor) -> bool:
    """Never under autocast, which asks for plain products in another precision: `packing_works` compares with them."""
    plain = weight.is_cpu and weight.dtype == torch.float32 and not weight.is_inference()
    return plain and not torch.is_autocast_enabled("cpu") and packing_works(torch.float32)


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
    return packed


def _product(x: Tensor, packed: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return product


def _exact_product(x: Tensor, packed: Tensor) -> Tensor:
    """In float32. A single row goes through twice: with AVX-512 oneDNN adds up more than 1,024 numbers in another order
    where a row is alone, and a picture shall not depend on what is drawn beside it."""
    alone = x.numel() == x.shape[-1]
    return _product(x.expand(2, *x.shape), packed)[0] if alone else _product(x, packed)


def _rough_product(x: Tensor, packed: Tensor) -> Tensor:
    """In bfloat16. With AMX always as many rows at a time: oneDNN adds up in another order there for other numbers of
    rows, and where results are rounded so coarsely, that would make another picture of the same seed in another batch.
    """
    if not has_amx():
        return _product(x.bfloat16(), packed).to(x.dtype)
    rows_NI = x.bfloat16().flatten(0, -2)
    *whole, rest = torch.split(rows_NI, ROWS_AT_ONCE)
    rest = nn.functional.pad(rest, (0, 0, 0, ROWS_AT_ONCE - len(rest)))
    parts = [_product(part, packed) for part in (*whole, rest)]
    out_NO = (torch.cat(parts) if whole else parts[0])[: len(rows_NI)]
    return out_NO.to(x.dtype).view(*x.shape[:-1], -1)


@cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether this torch has the operators and they give the plain product on this machine, in float32 or bfloat16."""
    product, rtol, atol = (_exact_product, 1e-5, 1e-4) if dtype == torch.float32 else (_rough_product, 0.02, 0.2)
    with torch.inference_mode():
        weight, x = torch.linspace(-1, 1, 32 * 64).view(32, 64), torch.linspace(1, -1, 3 * 64).view(1, 3, 64)
        try:
            return torch.allclose(product(x, _pack(weight.to(dtype))), nn.functional.linear(x, weight), rtol, atol)
        except (AttributeError, RuntimeError, TypeError):
            return False
