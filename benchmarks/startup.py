"""Seconds of whole processes: `igpt generate`, with both models in the box, and `igpt --help` against importing torch.

The file cache is warm, as after a first picture: each command runs once unmeasured. They run in the clone's folder, so
that the code beside this file is what is measured, whatever is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import alternate, print_machine, print_ratios

CLONE = Path(__file__).resolve().parent.parent
BASE = 'python -c "import torch"'


def process(*words: str) -> Callable[[], object]:
    """Runs python with these words; ends this script with the command's own complaint if it fails."""

    def work() -> None:
        done = subprocess.run([sys.executable, *words], cwd=CLONE, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"`python {' '.join(words)}` failed: {done.stderr.strip()}")

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    args = parser.parse_args()

    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        draw = ["generate", "--seed", "1", "--quiet", "--out", f"{folder}/picture.png", "--force"]
        contenders = {
            BASE: process("-c", "import torch"),
            "igpt generate --size 256": process("-m", "igpt", *draw, "--size", "256"),
            "igpt generate --model pixels": process("-m", "igpt", *draw, "--model", "pixels"),
            "igpt --help": process("-m", "igpt", "--help"),
        }
        print_ratios(alternate(contenders, args.rounds), against=BASE)


if __name__ == "__main__":
    main()
