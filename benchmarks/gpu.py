"""What a GPU reaches, in about three minutes: trains, draws and measures itself, checks itself, prints one table.

    python -m benchmarks.gpu                        # on any CUDA machine; art is painted here, no file is needed
    python -m benchmarks.gpu --device cpu --tiny    # the same code path in seconds, to see that it runs

Rows: steps of the tokenizer and of the GPT as `igpt train` takes them, by its own trainer, loader and tasks, eager and
compiled: pictures lie on the device as bytes, crops and fresh views are cut and encoded there. Crops are compared by
edges and SSIM alone, as no model travels with the script. Of the GPT gradients
alone, too, against the product of two matrices and, for a card in PEAKS, its bfloat16 peak; encoding views. Drawing as
`igpt generate` does, with guidance, 64 and 256 pictures at a time: operation by operation, as one CUDA graph (on a CPU
by a stand-in), and up to finished pictures. Every row runs for --seconds after a warm-up; the device is waited for at
its start and its end alone. Checked: losses are finite and fall, 30 compiled steps lead where eager ones do, drawn
tokens are the same every time and as a graph, nothing inside a step waits for the device. What it cannot tell: how good
anything looks.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import flops_of
from igpt.config import SamplingOptions
from igpt.device import Graphs, Work, fast_bf16, pick_device
from igpt.evaluation.perceptual import GradientSSIM
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sizes import Grids
from tests.painting import art_folder
from tokenizer_vq.dataset import ArtFolder
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.crops import DevicePictures, sizes_on
from train.folder import GPU_WORKERS, Run
from train.fresh import CLOSEST, PART_STEPS, FreshTask
from train.gpt import new_gpt
from train.loop import Schedule, Task, Trainer, average, rate
from train.options import PRESETS, Preset, TrainOptions
from train.tokenizer import TokenizerTask
from train.tokens import encode

PICTURES, SIDE = 128, (288, 384)  # painted ones of each label, and pixels a side of them
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, dense, by the maker's data sheets (SXM)
OPTIONS = TrainOptions(perceptual="none", quiet=True, dropout=0.0)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    preset: Preset
    drawn: tuple[int, ...]  # pictures at a time
    matrix: int  # rows of the matrices whose product stands for the peak


FULL = Sizes(PRESETS["large"], drawn=(64, 256), matrix=8192)
SMALLER: dict[str, Any] = {
    "channels": (32, 64),
    "codes": 64,
    "crop": 32,
    "cells": 16,
    "tokenizer_batch": 4,
    "gpt_batch": 4,
}
TINY = Sizes(replace(PRESETS["toy"], **SMALLER), drawn=(2, 4), matrix=256)


class Bench:
    """A device, and how work on it is timed."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.bf16 = fast_bf16(device)

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def time(self, work: Callable[[], object], at_once: int = 3) -> float:
        """Seconds of one call, after three that warm up; the device is waited for after so many."""
        for _ in range(3):
            work()
        self.wait()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < self.seconds:
            for _ in range(at_once):
                work()
            self.wait()
            calls += at_once
        return (time.perf_counter() - start) / calls


def task_of(kind: str, bench: Bench, preset: Preset, art: ArtFolder, work: Path) -> Task[Any]:
    """What `igpt train` learns with CUDA: pictures lie on the device."""
    indices = range(len(art) - 8)
    run = Run(art, indices, range(len(art) - 8, len(art)), OPTIONS, work, preset)
    side, _ = Grids(preset.downsample, preset.cell, preset.cells).native_size
    sizes = sizes_on(bench.device, art, indices, side if kind == "tokenizer" else round(side / CLOSEST), room=1e9)
    assert sizes is not None
    pictures = DevicePictures(art, indices, sizes, bench.device)
    torch.manual_seed(0)
    if kind == "tokenizer":
        return TokenizerTask(replace(run, pictures=pictures), GradientSSIM())
    tokenizer = VQTokenizer(VQConfig(channels=preset.channels, codes=preset.codes))
    tokens = encode(replace(run, train=[]), tokenizer.to(memory_format=torch.channels_last))
    return FreshTask(run, pictures, tokens, tokenizer, new_gpt(tokenizer, len(tokens.names), preset, OPTIONS))


class Steps:
    """The steps of a training, one after another, as `train.loop.run` takes them."""

    def __init__(self, kind: str, compiled: bool, bench: Bench, sizes: Sizes, art: ArtFolder, work: Path):
        self.task = task_of(kind, bench, sizes.preset, art, work / f"{kind}-{compiled}")
        self.batch = sizes.preset.tokenizer_batch if kind == "tokenizer" else sizes.preset.gpt_batch
        workers = min(GPU_WORKERS, os.cpu_count() or 1) if bench.device.type == "cuda" else 0
        compiler = "inductor" if compiled else None
        schedule = Schedule(OPTIONS, 10**6, self.batch, bench.bf16, compiler=compiler, workers=workers)
        self.trainer = Trainer(self.task, schedule, work / f"{kind}-{compiled}")
        self.batches, self.loss = self.trainer.batches(), "l1" if kind == "tokenizer" else "nats"

    def step(self) -> Tensor:
        """One of them; its loss, still on the device."""
        self.trainer.progress = 0.1  # behind the first steps, in which a tokenizer has no codes yet
        metrics = self.trainer.gradients(next(self.batches))
        self.trainer.clip_and_step(rate(min(0.05, self.trainer.step / 20)))  # warm at once, then at the peak
        average(self.trainer.averaged, self.trainer.modules["model"], self.trainer.step)
        self.trainer.advance()
        return metrics[self.loss]

    def gradients(self) -> Callable[[], object]:
        """Those of one batch again and again, without loader and optimizer."""
        batch = next(self.batches)
        return lambda: self.trainer.gradients(batch)


def learns(step: Callable[[], Tensor], steps: int) -> tuple[float, float]:
    """The first loss, and the mean of the last five of so many; both must be finite, the second lower."""
    losses = torch.stack([step() for _ in range(steps)]).tolist()
    first, last = losses[0], sum(losses[-5:]) / 5
    assert first == first and last < first, f"the loss went from {first} to {last}"
    return first, last


def waits_for_nothing(bench: Bench, step: Callable[[], Tensor]) -> str:
    """Whether a step runs without waiting for the device; only CUDA can tell."""
    if bench.device.type != "cuda":
        return "not seen, no CUDA"
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no" if not seen else f"{len(seen)} times: {seen[0].message}"


def stand_in(work: Work, inputs: Sequence[Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """What `igpt.device.cuda_graph` does, without CUDA: the same memory in and out every time."""
    result = work(*inputs).clone()
    return lambda: result.copy_(work(*inputs)), result


def drawing(bench: Bench, sizes: Sizes, task: FreshTask) -> list[tuple[str, str]]:
    """The rows of drawing by `igpt generate`'s own way."""
    gpt, tokenizer, labels = task.modules["model"], task.tokenizer, task.windows.run.art.labels
    assert isinstance(gpt, GPT)
    gpt.draw_in(torch.bfloat16 if bench.bf16 else torch.float32)
    model, table = ImageGPT(tokenizer, gpt, labels), []
    for count in sizes.drawn:
        found: list[Tensor] = []

        def draw(count: int = count, found: list[Tensor] = found) -> None:
            labels_B = torch.arange(count) % len(labels)
            *_, last = sample(gpt, labels_B, model.grids.native, SamplingOptions(), generators(0, count))
            found.append(last.tokens_Bhw)

        for graphs in (None, Graphs() if gpt.query.is_cuda else Graphs(stand_in)):
            gpt.graphs, name = graphs, "eager" if graphs is None else "one graph"
            speed = count / bench.time(draw)
            assert graphs is None or graphs.recording is not None, "drawing could not be recorded"
            table.append((f"drawing {count} at a time, {name}", f"{speed:,.1f} grids/s"))
        assert all(torch.equal(tokens_Bhw, found[0]) for tokens_Bhw in found), "the same seeds drew other tokens"
        model.at_once = model.rows = count
        speed = count / bench.time(partial(model.generate, count))
        table.append((f"drawing {count} at a time, as pictures", f"{speed:,.1f} pictures/s"))
    tokens_Bhw = found[0].to(bench.device)

    def decode() -> None:
        with torch.inference_mode(), bench.autocast():
            tokenizer.decode(tokens_Bhw[:64])

    decoding = len(tokens_Bhw[:64]) / bench.time(decode)
    return [*table, ("decoding alone", f"{decoding:,.1f} pictures/s")]


def learning(name: str, bench: Bench, steps: Steps) -> tuple[float, list[tuple[str, str]]]:
    """The loss after 30 steps, and the rows of one training."""
    start, at_once = time.perf_counter(), PART_STEPS if isinstance(steps.task, FreshTask) else 3
    first, last = learns(steps.step, 30)
    losses = f"loss {first:.3f} to {last:.3f}, {time.perf_counter() - start:.0f} s before"
    speed = f"{steps.batch / bench.time(steps.step, at_once):,.0f} samples/s, {losses}"  # and all views that they want
    while steps.trainer.step % PART_STEPS == 0:
        steps.step()
    return last, [(name, speed), (f"{name}, waits for the device", waits_for_nothing(bench, steps.step))]


def rows(bench: Bench, sizes: Sizes, compiled: tuple[bool, ...], work: Path) -> list[tuple[str, str]]:
    """The table."""
    dtype = torch.bfloat16 if bench.bf16 else torch.float32
    square = torch.randn(sizes.matrix, sizes.matrix, device=bench.device, dtype=dtype)
    peak = 2 * sizes.matrix**3 / bench.time(lambda: square @ square)
    table = [(f"product of {sizes.matrix}^3 in {dtype}".replace("torch.", ""), f"{peak / 1e12:.3g} TFLOP/s")]
    art = ArtFolder(art_folder(work / "art", PICTURES, SIDE))
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    most = next((flops for name, flops in PEAKS.items() if name in card), None)
    flops = 0
    for kind in ("tokenizer", "GPT"):
        losses = []
        for on in compiled:
            steps, name = Steps(kind, on, bench, sizes, art, work), f"{kind}, {'compiled' if on else 'eager'}"
            loss, found = learning(name, bench, steps)
            losses.append(loss)
            table += found
            if kind == "GPT":
                gradients = steps.gradients()
                flops = flops or flops_of(gradients)  # counted where it is eager
                pace = flops / (seconds := bench.time(gradients))
                share = f"{pace / 1e12:.3g} TFLOP/s = {pace / peak:.0%} of the product"
                share += f", {pace / most:.0%} of the peak" if most else ""
                table.append((f"{name}, forward and back", f"{steps.batch / seconds:,.0f} grids/s, {share}"))
        assert max(losses) - min(losses) < 0.05 * max(losses), f"{kind}: eager and compiled losses differ: {losses}"
    task = steps.task
    assert isinstance(task, FreshTask)
    part = task.windows.there(0)
    speed = len(part) / bench.time(lambda: task.encoded(part))
    table.append((f"views encoded, {len(part)} of every {PART_STEPS} steps", f"{speed:,.0f} views/s"))
    task.modules["model"].eval()
    table += drawing(bench, sizes, task)
    if bench.device.type == "cuda":
        table.append(("peak of GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: the best there is")
    parser.add_argument("--tiny", action="store_true", help="models and batches of a test")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each row (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a training takes the best device that there is
    device, start = pick_device(args.device), time.perf_counter()
    if device.type == "cpu" and not args.tiny:
        sys.exit("this is for a GPU; --tiny shows on a CPU that it runs")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    bench = Bench(device, min(args.seconds, 0.2) if args.tiny else args.seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as work:
        found = rows(bench, TINY if args.tiny else FULL, (False, True) if compiled else (False,), Path(work))
    for row, number in found:
        print(f"{row:44}{number}")
    print(f"all checks passed; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
