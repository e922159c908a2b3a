"""Odd inputs of all kinds, for as long as one likes: `python -m tests.fuzz --inputs 10000 --seed 1`.

Hypothesis draws the inputs, tests/odd.py says of what. Each must be taken, or refused by a UserError (a command line by
exit status 2 and one sentence); nothing may be written but what was asked for; 20 seconds of CPU and 2 GB are the most.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import igpt
from igpt import cli
from tests import odd
from tests.conftest import save_tiny
from tests.painting import art_folder, paint
from tokenizer_vq.base import UserError

MOST_SECONDS, MOST_BYTES = 20, 2 * 10**9  # of CPU for an input, so that a busy machine is no fault; of memory for all
WAITING = 300  # seconds after which nothing is waited for any more
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Found:
    """What became of the inputs of one kind."""

    taken: int = 0
    refused: int = 0
    seconds: float = 0.0  # of CPU, of the slowest
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def inputs(self) -> int:
        return self.taken + self.refused + self.faults.total()


class TooMuch(BaseException):
    """An input that takes too long; no `except Exception` may hold it up."""


class Desk:
    """The folder in which inputs are tried. What lies there is watched, and what is written anywhere."""

    def __init__(self, folder: Path):
        self.folder, self.model = folder, igpt.load(save_tiny(folder / "tiny"), "cpu")
        art_folder(folder / "art", each=2, size=(32, 32))
        for name, size in (("a.png", (16, 16)), ("b.png", (20, 16))):
            paint(3, (40, 60, 200), size).save(folder / name)
        self.written: list[str] = []
        self.first = self.tree()
        sys.addaudithook(self._told)

    def _told(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str) and isinstance(args[2], int):
            if args[2] & (os.O_WRONLY | os.O_RDWR) and args[0] != os.devnull:
                self.written.append(os.path.abspath(args[0]))

    def tree(self) -> dict[str, tuple[int, int]]:
        """All files, by size and time."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}

    def changed(self) -> list[str]:
        """What was written where nothing was asked for; results go to `out`, which is gone when an input is through."""
        outside = [path for path in self.written if not path.startswith(f"{self.folder / 'out'}{os.sep}")]
        return outside + [path for path, _ in self.tree().items() ^ self.first.items()]


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """A block that may take no longer than it should."""

    def stop(number: int, frame: Any) -> None:
        raise TooMuch(f"over {MOST_SECONDS if number == signal.SIGPROF else WAITING} seconds")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, MOST_SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, WAITING)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def peak_memory() -> int:
    """Of this process, in bytes. Not getrusage's where it can be helped: that begins with what the parent had."""
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1])  # type: ignore[index]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def attempt(desk: Desk, use: Callable[..., None], case: Any, found: Found) -> str | None:
    """Try one input and count it; the fault, where there is one."""
    fault, refused, began = None, False, time.process_time()
    desk.written.clear()
    quiet = io.StringIO()
    try:
        with limits(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
                use(desk.model, case)
    except UserError as error:
        refused = True
        if not str(error) or "\n" in str(error):
            fault = f"not one sentence: {error!r:.200}"
    except (Exception, TooMuch) as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        ours = [frame for frame in frames if "/tests/" not in frame.filename] or frames
        fault = f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} {type(error).__name__}: {error!s:.200}"
    found.seconds = max(found.seconds, time.process_time() - began)
    if changed := desk.changed():
        fault = f"written unasked: {', '.join(changed[:3])}; {fault or 'no other fault'}"
    if (peak := peak_memory()) > MOST_BYTES:
        fault = f"{peak / 1e9:.1f} GB of memory; {fault or 'no other fault'}"
    if fault is not None:
        found.faults[fault] += 1
    elif refused:
        found.refused += 1
    else:
        found.taken += 1
    return fault


def fuzz_kind(kind: str, desk: Desk, inputs: int, number: int, until: float, keep: Path | None = None) -> Found:
    """Try inputs of one kind, until a time of the monotonic clock at most. `keep`: a folder for those with faults."""
    found = Found()
    strategy, use = odd.KINDS[kind](desk.folder / "tiny")

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def one(case: Any) -> None:
        if time.monotonic() < until:
            fault = attempt(desk, use, case, found)
            if fault and keep is not None and found.faults[fault] == 1:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{kind}-{found.inputs}.txt").write_text(
                    f"{fault}\n{case!r}\n", encoding="utf-8", errors="replace"
                )

    one()
    return found


def fuzz(kinds: Sequence[str], inputs: int, number: int, seconds: float, keep: Path | None = None) -> dict[str, Found]:
    """Try so many inputs, as many of each kind, in so many seconds at most; what became of them."""
    torch.set_num_threads(1)
    results, before, began = {}, Path.cwd(), time.monotonic()
    build_parser = cli.build_parser
    cli.build_parser = functools.cache(build_parser)  # a third of all time would go into building it
    folder = Path(tempfile.mkdtemp()).resolve()
    caches = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE")}
    try:
        os.chdir(folder)
        os.environ.update(XDG_CACHE_HOME="out/cache", HF_HOME="out/cache", HF_HUB_OFFLINE="1")
        desk = Desk(folder)
        for i, kind in enumerate(kinds):
            count = inputs // len(kinds) + (i < inputs % len(kinds))
            results[kind] = fuzz_kind(kind, desk, count, number, began + seconds * (i + 1) / len(kinds), keep)
            said = f"{kind}: {results[kind].inputs} inputs, {len(results[kind].faults)} faults"
            print(f"{said}, {time.monotonic() - began:.0f} s so far", file=sys.stderr, flush=True)
    finally:
        cli.build_parser = build_parser
        os.chdir(before)
        shutil.rmtree(folder)
        for name, value in caches.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return results


def report(results: dict[str, Found]) -> str:
    """A table of what became of the inputs, and the faults below it."""
    lines = [
        "| kind | inputs | taken | refused | faults | slowest, s of CPU |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kind, found in results.items():
        numbers = (found.inputs, found.taken, found.refused, found.faults.total(), f"{found.seconds:.1f}")
        lines.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    peak = peak_memory() / 1e9
    lines += ["", f"{sum(found.inputs for found in results.values())} inputs, at most {peak:.2f} GB of memory"]
    return "\n".join(lines + [f"{n}x {kind}: {fault}" for kind, f in results.items() for fault, n in f.faults.items()])


def main() -> int:
    """The command; its exit status is 1 where there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Try odd inputs of all kinds.")
    parser.add_argument("--inputs", type=int, default=1000, help="in all (default: 1000)")
    parser.add_argument("--seed", type=int, default=1, help="the same seed draws the same inputs (default: 1)")
    parser.add_argument("--kinds", nargs="+", choices=list(odd.KINDS), default=list(odd.KINDS), help="default: all")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many, a share for each kind")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the inputs with faults there")
    args = parser.parse_args()
    keep = args.keep and args.keep.resolve()
    results = fuzz(args.kinds, args.inputs, args.seed, args.seconds, keep)
    print(report(results))
    return int(any(found.faults for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
