"""A disk that is full, or read-only, from the n-th write on, for all n: `python -m tests.full_disk`.

Writing is made to fail at the door of the operating system (tests/full_disk.c, by LD_PRELOAD), so that it reaches
Python, Pillow and safetensors alike. Each time the command must end with status 2 and one sentence that names the disk,
every file that is there must be whole, and on a healthy disk the same command must go on to the same result.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests import kills

SAID = {errno.ENOSPC: "No space left on device", errno.EROFS: "Read-only file system"}
COMMANDS = {  # shorter than those that are killed: each is run a hundred times
    "train": "train art --preset toy --tokenizer-crops 16 --decoder-crops 0 --gpt-samples 32 --perceptual none --quiet",
    "finetune": "finetune art --model tiny --samples 8 --save-minutes 0 --quiet",
    "generate": "generate --model tiny -n 3 --size 16 --steps 1 --seed 0 --force",
}


def library(folder: Path) -> Path:
    """The compiled tests/full_disk.c. Raises OSError where there is no compiler."""
    path = folder / "full_disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl"], check=True)
    return path


def run(command: str, out: Path, log: Path, first: int = 0, error: int = 0) -> int | None:
    """The exit status of a command whose writes to `out` fail from the first on that is named; 0 lets all pass."""
    log.unlink(missing_ok=True)
    # The child is forked, and has what was set here.
    ctypes.CDLL(None).fail_from(os.fsencode(out.absolute()), ctypes.c_long(first), error)
    try:
        return kills.run([*command.split(), "--out", str(out)], log)
    finally:
        ctypes.CDLL(None).fail_from(b"", ctypes.c_long(0), 0)


def check(name: str, error: int, numbers: Sequence[int] | None = None) -> int:
    """Let a command fail at the named writes, or at all, one after the other; how often it did. Raises AssertionError
    for anything but one sentence and whole files."""
    command, log = COMMANDS[name], Path(f"{name}.log")
    wanted = kills.undisturbed(command, Path(f"{name}-alone"), log)
    number, failed = 0, 0
    for number in numbers or iter(int, 1):
        number = number or failed + 1
        out = Path(f"{name}-{error}-{number}")
        status = run(command, out, log, number, error)
        if out.exists():
            kills.check_whole(out)
        if status == 0:  # there are not so many writes
            assert kills.result_of(out)
            break
        said = log.read_text()
        where = f"{name}, {SAID[error]} at write {number}"
        assert status == 2 and "Traceback" not in said, (where, status, said)
        *_, last = said.splitlines()
        assert last.startswith("igpt: ") and SAID[error] in last, (where, last)
        result = kills.undisturbed(command, out, log)
        if (out / "training" / kills.FACTS).is_file():
            wanted = kills.undisturbed(command, Path(f"{out}-like"), log, out)
        assert result == wanted, where
        failed += 1
        print(f"{name}: write {number} failed, {SAID[error]}", flush=True)
        shutil.rmtree(out)
    return failed


def main() -> None:
    """The command. Ends with an AssertionError where something is lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.full_disk", description="Fill the disk at every write.")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="default: all")
    parser.add_argument("--numbers", nargs="+", type=int, help="of the writes that fail first (default: all)")
    args = parser.parse_args()
    if not hasattr(ctypes.CDLL(None), "fail_from"):
        with tempfile.TemporaryDirectory() as folder:
            more = {"LD_PRELOAD": str(library(Path(folder))), "OMP_NUM_THREADS": "1"}
            sys.exit(
                subprocess.run(
                    [sys.executable, "-m", "tests.full_disk", *sys.argv[1:]], env=os.environ | more
                ).returncode
            )

    def task() -> None:
        for name in args.commands:
            for error, said in SAID.items():
                print(f"{name}: {said}: {check(name, error, args.numbers)} writes failed", flush=True)

    kills.on_a_desk(task)


if __name__ == "__main__":
    main()
