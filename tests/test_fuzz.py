"""Odd inputs for less than a minute; `python -m tests.fuzz` goes on for as long as one likes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KINDS = ["pictures", "archives", "models", "adapters", "recipes", "palettes", "words"]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hypothesis") is None, reason="hypothesis is not installed")
def test_odd_inputs_are_taken_or_refused_in_one_sentence_and_write_nothing_unasked() -> None:
    """In a process of its own, as its memory is measured. The same inputs every time, as far as a minute goes."""
    kinds = KINDS + ["locked"] * (importlib.util.find_spec("pyrage") is not None)
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "420", "--seconds", "50", "--seed", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--kinds", *kinds], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inputs, at most" in done.stdout
