"""Killed or out of disk in the middle of work: nothing half is left, nothing is lost, and the same command goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def done(*words: str) -> str:
    """What a harness says; it must end well."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
@pytest.mark.parametrize("command", ["train", "finetune", "generate"])
def test_a_command_killed_three_times_goes_on_to_the_very_same_result(command: str) -> None:
    assert f"| {command} | 3 times |" in done("tests.kills", "--kills", "3", "--commands", command)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="Linux and a C compiler are wanted")
@pytest.mark.parametrize(
    ("command", "numbers"),
    [("train", ["4", "31", "60"]), ("finetune", ["9", "40", "80"]), ("generate", ["1", "5", "9"])],
)
def test_a_disk_that_is_full_or_read_only_is_named_and_the_same_command_goes_on_later(
    command: str, numbers: list[str]
) -> None:
    said = done("tests.full_disk", "--commands", command, "--numbers", *numbers)
    for error in ("No space left on device", "Read-only file system"):
        assert f"| {command} | {error} | 3 |" in said
