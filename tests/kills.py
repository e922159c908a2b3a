"""Kills igpt at random moments and goes on: `python -m tests.kills --kills 100`.

`train`, `finetune` and `generate -n` get SIGKILL, again and again, until so many kills are done; the same command goes
on. No half file may lie anywhere at any time, no picture that was printed may be missing, and what is made in the end
must be, bit for bit, what a run makes that nobody disturbs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from safetensors import safe_open
from tqdm import tqdm

from igpt.cli import main as igpt
from tests.conftest import save_tiny
from tests.painting import art_folder

PICTURES = 20  # more than are drawn at once
TRAIN = "--tokens vq --preset toy --tokenizer-crops 64 --decoder-crops 16 --gpt-samples 128"
TRAIN += " --adversarial 0 --perceptual none"
FACTS = "facts.json"  # what a fine-tuning has measured; in the end it also has results
MEASURED = {"windows", "seconds", "nearest", "base_bits"}
COMMANDS = {  # each is run in a folder with `art` and the model `tiny`
    "train": f"train art {TRAIN} --save-minutes 0 --quiet",
    "finetune": "finetune art --model tiny --samples 200 --minutes 0.05 --save-minutes 0 --quiet",
    "generate": f"generate --model tiny -n {PICTURES} --size 24 --steps 4 --seed 0 --force",
}


def run(words: list[str], log: Path, seconds: float = 600) -> int | None:
    """The exit status of a command line; None where it had not ended after so many seconds and was killed. What it
    prints goes to `log`.

    Its process is forked, so that nobody waits for torch to load: this one must have no threads.
    """
    ended, held = os.pipe()  # the child's end of it closes when the child is gone, however it goes
    if not (child := os.fork()):
        _be(words, log)
    os.close(held)
    over, _, _ = select.select([ended], [], [], seconds)
    os.close(ended)
    if not over:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) if over else None


def _be(words: list[str], log: Path) -> NoReturn:
    """What the child does."""
    status = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        status = igpt(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


# What lies there


def check_whole(folder: Path) -> None:
    """Every file but hidden ones, which nobody takes for finished, is one from its beginning to its end."""
    for path in (path for path in folder.rglob("*") if path.is_file() and path.name not in ("lock", "process")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    assert all(file.get_tensor(key).numel() for key in file.keys())
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".jsonl":
                assert all(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            elif path.suffix in (".png", ".jpg"):
                with Image.open(path) as picture:
                    picture.load()
            else:
                assert path.read_bytes().endswith(b"\n")
        except Exception as error:
            raise AssertionError(f"half a file: {path}, {path.stat().st_size} bytes: {error}") from error


def result_of(out: Path) -> dict[str, bytes]:
    """What must be the same in the end: the weights of a model, or all pictures."""
    weights = out / "model.safetensors"
    return {path.name: path.read_bytes() for path in ([weights] if weights.exists() else sorted(out.glob("*.png")))}


def undisturbed(command: str, out: Path, log: Path) -> dict[str, bytes]:
    """The result of a run that is left alone."""
    status = run([*command.split(), "--out", str(out)], log)
    assert status == 0, (status, log.read_text())
    return result_of(out)


class Wanted:
    """What a command makes where nobody disturbs it. A fine-tuning plans by what it has measured of the machine, so it
    is compared with one that has the same plan."""

    def __init__(self, name: str, command: str):
        self.name, self.command, self.log = name, command, Path(f"{name}.log")
        self.results: dict[str, dict[str, bytes]] = {}
        began = time.monotonic()
        self.first = undisturbed(command, Path(f"{name}-alone"), self.log)
        self.seconds = time.monotonic() - began

    def like(self, out: Path) -> dict[str, bytes]:
        """The result with the plan that lies in `out`."""
        if not (facts := out / "training" / FACTS).is_file():
            return self.first
        plan = {key: value for key, value in json.loads(facts.read_text()).items() if key in MEASURED}
        if (key := str(plan | {"seconds": 0})) not in self.results:  # where --samples decides, seconds do not matter
            like = Path(f"{self.name}-like-{len(self.results)}")
            (like / "training").mkdir(parents=True)
            (like / "training" / FACTS).write_text(json.dumps(plan))
            self.results[key] = undisturbed(self.command, like, self.log)
        return self.results[key]


# Killing


@dataclass
class Killed:
    """What became of one command."""

    kills: int = 0
    runs: int = 0  # that came to their end
    seconds: float = 0.0  # of one that is left alone
    in_all: float = 0.0


def torment(name: str, kills: int, rng: random.Random) -> Killed:
    """Kill a command so many times, in the current folder, and check what it leaves. Raises AssertionError."""
    start, command, wanted = time.monotonic(), COMMANDS[name], Wanted(name, COMMANDS[name])
    found, log = Killed(seconds=wanted.seconds), wanted.log
    while found.kills < kills:
        out = Path(f"{name}-{found.runs}")
        words, status, lives = [*command.split(), "--out", str(out)], None, 0
        while status is None:
            log.unlink(missing_ok=True)
            began, lives = time.monotonic(), lives + 1
            status = run(words, log, rng.uniform(0, found.seconds) if found.kills < kills else 600)
            found.kills += status is None
            if out.exists():
                check_whole(out)
            printed = [line for line in log.read_text().splitlines() if line.endswith(".png")] if log.exists() else []
            assert all(Path(line).is_file() for line in printed), "a picture is lost"
            for left in out.rglob(".*"):
                os.utime(left, (0, 0))  # as if an hour had passed
        assert status == 0, (status, log.read_text())
        if lives == 1:  # the moments shall lie in all of a run, however busy the machine is now
            found.seconds = time.monotonic() - began
        assert not list(out.rglob(".*")), f"what was begun and killed is still in {out}"
        result = result_of(out)
        assert result and result == wanted.like(out), f"{out} is not what an undisturbed run makes"
        found.runs += 1
        shutil.rmtree(out)
        print(f"{name}: {found.kills} kills, {found.runs} runs came to their end, all alike", file=sys.stderr)
    found.in_all = time.monotonic() - start
    return found


def on_a_desk(commands: Iterable[str], task: Callable[[], None]) -> None:
    """Do it in a new folder with art and a tiny model, which is gone afterwards. The commands are run once here: what
    they load, every child has."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or it would start a thread
    before, folder = Path.cwd(), tempfile.mkdtemp()
    try:
        os.chdir(folder)
        save_tiny(Path("tiny"))
        art_folder(Path("art"), each=5)
        with contextlib.redirect_stdout(io.StringIO()):
            for i, command in enumerate(commands):
                assert igpt([*command.split(), "--out", f"once-{i}"]) == 0
        task()
    finally:
        os.chdir(before)
        shutil.rmtree(folder)


def main() -> None:
    """The command. Ends with an AssertionError where something is lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description="Kill igpt at random moments.")
    parser.add_argument("--kills", type=int, default=100, help="of each command (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments (default: 1)")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS), help="default: all")
    args = parser.parse_args()

    found: dict[str, Killed] = {}

    def task() -> None:
        for name in args.commands:
            found[name] = torment(name, args.kills, random.Random(f"{args.seed}/{name}"))

    on_a_desk([COMMANDS[name] for name in args.commands], task)
    print("| command | killed | runs, all alike | seconds of one left alone | seconds in all |")
    print("| --- | --- | --- | --- | --- |")
    for name, each in found.items():
        print(f"| {name} | {each.kills} times | {each.runs} | {each.seconds:.1f} | {each.in_all:.0f} |")


if __name__ == "__main__":
    main()
