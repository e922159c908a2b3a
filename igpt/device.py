"""Which device to work on, and whether it multiplies fast in bfloat16."""

from __future__ import annotations

from functools import cache

import torch

from tokenizer_vq.base import UserError


def pick_device(asked: str | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA, then Apple's MPS, then the CPU.

    Raises UserError where the device asked for is unknown or absent.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked is None:
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if present[name]))
    kind, _, number = asked.partition(":")
    known = present.get(kind, False) and (not number or (number.isdecimal() and int(number) < devices(kind)))
    if not known:
        here = ", ".join(name for name, is_here in present.items() if is_here)
        raise UserError(f"there is no device {asked!r} here; there is {here}")
    return torch.device(asked)


def devices(kind: str) -> int:
    """How many devices of a kind there are."""
    return torch.cuda.device_count() if kind == "cuda" else 1


@cache
def fast_bf16(device: torch.device | None = None) -> bool:
    """Whether a device (default: the best there is) multiplies in bfloat16 faster than in float32."""
    if (device or pick_device()).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # torch has no public question for this; where it has lost the private ones, float32 is the safe answer. The first
    # asks the processor, the second oneDNN, which does the products and can be told to use less of the processor.
    processor = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    library = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(processor and library and processor() and library())
