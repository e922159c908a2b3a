"""The script that measures a GPU runs here on the CPU, by the same code path, and checks itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_cpu_and_passes_its_own_checks() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for row in ("crops/s", "grids/s", "of the product", "drawing and decoding", "all checks passed"):
        assert row in done.stdout
    refused = subprocess.run(command[:-1], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1 and "--tiny shows" in refused.stderr
