"""A CPU without bfloat16 works in float32, and packs it. Torch is told to take this one for such a CPU (one with AVX2
alone), in a process of its own, since it looks only once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CHECKS = """
import torch
from igpt.device import fast_bf16
from igpt.cpu import Linear, packing_works
from train import muon

assert not fast_bf16(torch.device("cpu"))
assert packing_works(torch.float32)

layer, x = Linear(48, 80), torch.randn(2, 9, 48)
for layer.drawing_dtype in (torch.float32, torch.bfloat16):
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight), rtol=1e-5, atol=1e-5)
    assert layer._packed is not None

turned, orthogonal = [], muon.orthogonal
muon.orthogonal = lambda matrices: turned.append(orthogonal(matrices)) or turned[-1]
matrix = torch.nn.Parameter(torch.zeros(8, 4))
matrix.grad = torch.randn(8, 4)
muon.Muon([{"params": [matrix], "orthogonal": True}], lr=0.1).step()
assert [t.dtype for t in turned] == [torch.float32] and matrix.any()
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86")
def test_without_bfloat16_hardware_drawing_and_learning_are_in_float32_and_drawing_is_packed() -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", CHECKS]
    told = subprocess.run(command, cwd=root, env=os.environ | AVX2, capture_output=True, text=True, timeout=120)
    assert told.returncode == 0, told.stderr
