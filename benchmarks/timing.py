"""Fair timing on a shared machine: contenders take turns, medians count, and runs that others disturbed do not.

Notable choices: every run also measures how much of the machine other processes used meanwhile (/proc/stat, less our
own time), because a loaded machine can make a run ten times slower; a run is lengthened by repeating short work, so
that clock ticks of 10 ms suffice for that; ratios are only ever taken between medians of the same process.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

LOUD = 0.08  # of the machine's CPU time: a run that lost more than this to others is left out where a quiet one exists
AT_LEAST = 0.5  # seconds that one run lasts


@dataclass(frozen=True)
class Run:
    seconds: float  # of one call
    foreign: float  # share of the machine's CPU time that other processes took, 0..1; 0 where the system cannot tell


def machine_seconds() -> tuple[float, float]:
    """Busy and available CPU seconds of all cores since the machine started; zeros where there is no /proc/stat."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0.0, 0.0
    user, nice, system, idle, waiting, irq, softirq, steal = (int(word) for word in first.split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    busy = user + nice + system + irq + softirq + steal
    return busy / ticks, (busy + idle + waiting) / ticks


def own_seconds() -> float:
    """CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(work: Callable[[], object], at_least: float = AT_LEAST) -> Run:
    """One run: `work` again and again until `at_least` seconds have passed."""
    calls, (busy, available), own, start = 0, machine_seconds(), own_seconds(), time.perf_counter()
    while not calls or time.perf_counter() - start < at_least:
        work()
        calls += 1
    seconds, own = time.perf_counter() - start, own_seconds() - own
    busy, available = (after - before for after, before in zip(machine_seconds(), (busy, available), strict=True))
    return Run(seconds / calls, max(0.0, busy - own) / available if available else 0.0)


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Run]]:
    """Runs of all contenders in turns, A B A B, after one unmeasured call of each."""
    for work in contenders.values():
        work()
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            runs[name].append(measure(work))
    return runs


def quiet(runs: list[Run]) -> list[Run]:
    """The runs that others did not disturb, or all of them if there is no such run."""
    return [run for run in runs if run.foreign <= LOUD] or runs


def median(runs: list[Run]) -> float:
    """Seconds of the median quiet run."""
    return statistics.median(run.seconds for run in quiet(runs))


def flops_of(work: Callable[[], object]) -> int:
    """Floating point operations of a call; a multiplication and an addition are two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def print_ratios(results: Mapping[str, list[Run]], against: str) -> None:
    """One row per contender: median, spread, how many runs were quiet, and its median over that of `against`."""
    indent = max(len(name) for name in results) + 2
    print(f"{'':{indent}}{'median':>10}{'fastest':>10}{'slowest':>10}   quiet   ratio to {against}")
    for name, runs in results.items():
        seconds = [run.seconds for run in quiet(runs)]
        count = sum(run.foreign <= LOUD for run in runs)
        ratio = median(runs) / median(results[against])
        columns = f"{median(runs):8.4f} s{min(seconds):8.4f} s{max(seconds):8.4f} s"
        print(f"{name:{indent}}{columns}   {count} of {len(runs)}  {ratio:6.2f}")
    loudest = max(run.foreign for runs in results.values() for run in runs)
    print(f"other processes took up to {loudest:.0%} of the machine during a run; more than {LOUD:.0%} is not quiet")
    if loud := [name for name, runs in results.items() if all(run.foreign > LOUD for run in runs)]:
        print(f"NOT TO BE QUOTED: no run of {', '.join(loud)} was quiet")


def print_machine() -> None:
    """What the numbers below it were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    print(f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
