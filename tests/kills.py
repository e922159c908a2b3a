"""Kills igpt at random moments and goes on: `python -m tests.kills --kills 100`.

`train`, `finetune` and `generate -n` get SIGKILL, again and again, until so many kills are done; the same command goes
on. No half file may lie anywhere at any time, no picture that was printed may be missing, and what is made in the end
must be, bit for bit, what a run makes that nobody disturbs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import safe_open

from igpt.cli import main as igpt
from igpt.siblings import sibling
from tests.conftest import save_tiny
from tests.painting import art_folder

PICTURES = 20  # more than are drawn at once
TRAIN = "--tokens vq --preset toy --tokenizer-crops 64 --decoder-crops 16 --gpt-samples 128"
TRAIN += " --adversarial 0 --perceptual none"
FACTS = "facts.json"  # what a fine-tuning has measured; in the end it also has results
MEASURED = {"windows", "seconds", "nearest", "base_bits"}
COMMANDS = {  # each is run in a folder with `art` and the model `tiny`
    "train": f"train art {TRAIN} --save-minutes 0 --quiet",
    "finetune": "finetune art --model tiny --samples 200 --save-minutes 0 --quiet",
    "generate": f"generate --model tiny -n {PICTURES} --size 24 --steps 4 --seed 0 --force",
}


def begin(words: list[str], log: Path) -> int:
    """The number of a new process that runs a command line; what it prints goes to `log`.

    It is forked, so that nobody waits for torch to load: this process must have no threads.
    """
    if child := os.fork():
        return child
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


def run(words: list[str], log: Path, seconds: float = 600) -> int | None:
    """Its exit status; None where it had not ended after so many seconds and was killed."""
    child, until = begin(words, log), time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# What lies there


def check_whole(folder: Path) -> None:
    """Every file but hidden ones, which nobody takes for finished, is one from its beginning to its end."""
    for path in [path for path in folder.rglob("[!.]*") if path.is_file() and path.name not in ("lock", "process")]:
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


def undisturbed(command: str, out: Path, log: Path, like: Path | None = None) -> dict[str, bytes]:
    """The result of a run that is left alone; it takes over what another run has measured of the machine."""
    if like is not None and (facts := like / "training" / FACTS).is_file():
        (out / "training").mkdir(parents=True)
        measured = {key: value for key, value in json.loads(facts.read_text()).items() if key in MEASURED}
        (out / "training" / FACTS).write_text(json.dumps(measured))
    status = run([*command.split(), "--out", str(out)], log)
    assert status == 0, (status, log.read_text())
    return result_of(out)


# Killing


@dataclass
class Killed:
    """What became of one command."""

    kills: int = 0
    runs: int = 0  # that came to their end
    seconds: float = 0.0  # of one that is left alone


def torment(name: str, kills: int, rng: random.Random, say: Callable[[str], None] = print) -> Killed:
    """Kill a command so many times, in the current folder, and check what it leaves. Raises AssertionError."""
    found, command, log, began = Killed(), COMMANDS[name], Path(f"{name}.log"), time.monotonic()
    wanted = undisturbed(command, Path(f"{name}-alone"), log)
    found.seconds = time.monotonic() - began
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
        if (out / "training" / FACTS).is_file():
            wanted = undisturbed(command, Path(f"{name}-like-{found.runs}"), log, out)
        assert result_of(out) == wanted and wanted, f"{out} is not what an undisturbed run makes"
        found.runs += 1
        say(f"{name}: {found.kills} kills, {found.runs} runs came to their end, all alike")
    return found


def on_a_desk(task: Callable[[], None]) -> None:
    """Do it in a new folder with art and a tiny model, which is gone afterwards."""
    torch.set_num_threads(1)
    for module in ("train.run", "train.finetune", "generate.run"):
        sibling(module)  # what is loaded here, every child has
    before, folder = Path.cwd(), tempfile.mkdtemp()
    try:
        os.chdir(folder)
        save_tiny(Path("tiny"))
        art_folder(Path("art"), each=5)
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

    def task() -> None:
        for name in args.commands:
            found = torment(
                name, args.kills, random.Random(f"{args.seed}/{name}"), lambda said: print(said, flush=True)
            )
            print(
                f"{name}: killed {found.kills} times in {found.runs} runs ({found.seconds:.1f} s left alone)",
                flush=True,
            )

    on_a_desk(task)


if __name__ == "__main__":
    main()
