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
TINY = "--tokens vq --preset toy --tokenizer-crops 16 --decoder-crops 8 --gpt-samples 32 --adversarial 0"
COMMANDS = {  # shorter than those that are killed: each is run two hundred times
    "train": f"train art {TINY} --perceptual none --quiet",
    "finetune": "finetune art --model tiny --samples 8 --minutes 0.05 --save-minutes 0 --quiet",
    "generate": "generate --model tiny -n 3 --size 16 --steps 1 --seed 0 --force",
}


def library(folder: Path) -> Path:
    """The compiled tests/full_disk.c. Raises OSError where there is no compiler."""
    path = folder / "full_disk.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", path, source, "-ldl"], check=True)
    return path


def run(command: str, out: Path, log: Path, first: int = 0, error: int = 0) -> tuple[int | None, int]:
    """The exit status of a command whose writes to `out` fail from the first on that is named (0 lets all pass), and
    how many there were."""
    log.unlink(missing_ok=True)
    disk = ctypes.CDLL(None)
    disk.fail_from(os.fsencode(out.absolute()), ctypes.c_long(first), error)  # the child is forked, and has it
    status = kills.run([*command.split(), "--out", str(out)], log)
    writes = disk.calls()
    disk.fail_from(b"", ctypes.c_long(0), 0)
    return status, writes


def check(name: str, error: int, numbers: Sequence[int]) -> tuple[int, int]:
    """Let a command fail at the named writes, or at all, one after the other; how often it failed, and how many writes
    it makes where it does not. Raises AssertionError for anything but one sentence and whole files."""
    command, log = COMMANDS[name], Path(f"{name}.log")
    wanted, failed = kills.Wanted(f"{name}-{error}", command), 0
    status, writes = run(command, Path("counted"), log)
    shutil.rmtree("counted")
    for number in numbers or range(1, 10**6):
        out = Path(f"{name}-{error}-{number}")
        status, _ = run(command, out, log, number, error)
        if out.exists():
            kills.check_whole(out)
        if status == 0:  # it has made fewer
            assert kills.result_of(out)
            break
        said, where = log.read_text(), f"{name}, {SAID[error]} at write {number}"
        assert status == 2 and "Traceback" not in said, (where, status, said)
        *_, last = said.splitlines()
        assert last.startswith("igpt: ") and SAID[error] in last, (where, last)
        assert kills.undisturbed(command, out, log) == wanted.like(out), where
        failed += 1
        print(f"{where} of about {writes}: said, and made good", file=sys.stderr)
        shutil.rmtree(out)
    return failed, writes


def main() -> None:
    """The command. Ends with an AssertionError where something is lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.full_disk", description="Fill the disk at every write.")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="default: all")
    parser.add_argument(
        "--numbers", nargs="+", type=int, default=[], help="of the writes that fail first (default: all)"
    )
    args = parser.parse_args()
    if not hasattr(ctypes.CDLL(None), "fail_from"):
        with tempfile.TemporaryDirectory() as folder:
            more = {"LD_PRELOAD": str(library(Path(folder))), "OMP_NUM_THREADS": "1"}
            again = [sys.executable, "-m", "tests.full_disk", *sys.argv[1:]]
            sys.exit(subprocess.run(again, env=os.environ | more).returncode)
    lines = ["| command | error | failed at | of writes |", "| --- | --- | --- | --- |"]

    def task() -> None:
        for name in args.commands:
            for error, said in SAID.items():
                failed, writes = check(name, error, args.numbers)
                lines.append(f"| {name} | {said} | {failed} | {writes} |")

    kills.on_a_desk([COMMANDS[name] for name in args.commands], task)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
