"""What a GPU reaches, in about three minutes: trains, draws and measures itself, checks itself, prints one table.

    python -m benchmarks.gpu                        # on any CUDA machine; art is painted here, no file is needed
    python -m benchmarks.gpu --device cpu --tiny    # the same code path in seconds, to see that it runs

Rows: steps of the tokenizer on crops cut on the device, steps of the GPT on grids, both eager and compiled (static
shapes, one graph a stage), against the product of two matrices and, for a card in PEAKS, its bfloat16 peak; drawing as
`igpt generate` does, with guidance, 64 and 256 pictures at a time: operation by operation, as one CUDA graph (on a CPU
by a stand-in), and up to finished pictures. Every row runs for --seconds after a warm-up; the device is waited for at
its start and its end alone. Checked: losses are finite and fall, compiled steps give the eager loss, drawn tokens are
the same every time and as a graph, no operation inside a step of the GPT waits for the device. What it cannot tell: how
good anything looks.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import flops_of
from igpt.config import GPTConfig, SamplingOptions
from igpt.device import Graphs, Work, fast_bf16, pick_device
from igpt.image_gpt import ImageGPT
from igpt.model import GPT, cell_positions
from igpt.sampling import generators, sample
from tokenizer_vq.vq import VQConfig, VQTokenizer
from train.muon import muon
from train.tokenizer import adamw

PICTURES, SIDE = 256, 288  # painted ones, and pixels a side of them
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s, dense, by the maker's data sheets (SXM)


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    vq: VQConfig
    gpt: GPTConfig
    crops: int
    crop: int  # pixels a side
    grids: int
    drawn: tuple[int, ...]  # pictures at a time
    matrix: int  # rows of the matrices whose product stands for the peak


FULL = Sizes(VQConfig(), GPTConfig(4096, 67), crops=64, crop=192, grids=256, drawn=(64, 256), matrix=8192)
TINY = Sizes(
    VQConfig(channels=(32,), codes=64, encoder_blocks=1, decoder_blocks=1),
    GPTConfig(64, 3, layers=2, width=64, heads=2, cells=16),
    crops=4,
    crop=32,
    grids=4,
    drawn=(2, 4),
    matrix=256,
)


def painted(count: int, side: int, device: torch.device) -> Tensor:
    """Smooth coloured noise as bytes on the device, [N, 3, side, side]."""
    noise = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(0)).to(device)
    return (F.interpolate(noise, size=(side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def crops_of(pictures_NCHW: Tensor, count: int, side: int, generator: torch.Generator) -> Tensor:
    """Random crops in [-1, 1], cut on the device: no loader, no copy from the host."""
    device, (n, _, height, width) = pictures_NCHW.device, pictures_NCHW.shape
    chosen_B = torch.randint(n, (count,), device=device, generator=generator)
    y_B = torch.randint(height - side + 1, (count,), device=device, generator=generator)
    x_B = torch.randint(width - side + 1, (count,), device=device, generator=generator)
    ahead = torch.arange(side, device=device)
    rows, columns = (y_B[:, None] + ahead)[:, None, :, None], (x_B[:, None] + ahead)[:, None, None, :]
    channels = torch.arange(3, device=device)[None, :, None, None]
    crops = pictures_NCHW[chosen_B[:, None, None, None], channels, rows, columns]
    return (crops.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Bench:
    """A device, and how work on it is timed."""

    def __init__(self, device: torch.device, seconds: float):
        self.device, self.seconds = device, seconds
        self.bf16 = fast_bf16(device) or device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of one call, after three that warm up."""
        for _ in range(3):
            work()
        self.wait()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < self.seconds:
            for _ in range(3):
                work()
            self.wait()
            calls += 3
        return (time.perf_counter() - start) / calls


def tokenizer_step(bench: Bench, sizes: Sizes, compiled: bool) -> Callable[[], Tensor]:
    """One step of encoder, codebook and decoder on crops; the loss."""
    torch.manual_seed(0)
    generator = torch.Generator(bench.device).manual_seed(1)
    tokenizer = VQTokenizer(sizes.vq).to(bench.device).to(memory_format=torch.channels_last).train()
    optimizer, pictures = adamw(tokenizer, 4e-4), painted(PICTURES, SIDE, bench.device)
    if compiled:
        for part in (tokenizer.encoder, tokenizer.decoder):
            part.compile(dynamic=False)

    def step() -> Tensor:
        images = crops_of(pictures, sizes.crops, sizes.crop, generator)
        with bench.autocast():
            recon, quantized = tokenizer(images, torch.Generator().manual_seed(0))
        loss = F.l1_loss(recon.float(), images) + quantized.loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def gpt_step(bench: Bench, sizes: Sizes, compiled: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor], GPT]:
    """One step of the GPT on grids whose tokens go up from cell to cell, the loss in nats; and its gradients alone."""
    torch.manual_seed(0)
    config, generator = sizes.gpt, torch.Generator(bench.device).manual_seed(1)
    gpt = GPT(config).to(bench.device).train()
    optimizer = muon(gpt, 3e-3, 0.1, ("tokens.weight", "labels.weight", "head.weight"))
    side = round(config.cells**0.5)
    positions_L2 = cell_positions(side, side).to(bench.device)
    if compiled:
        gpt.compile(dynamic=False)

    def gradients() -> Tensor:
        shape = (sizes.grids, config.cells)
        first_B11 = torch.randint(config.vocab_size, (sizes.grids, 1, 1), device=bench.device, generator=generator)
        order_BL = torch.rand(shape, device=bench.device, generator=generator).argsort(1)
        cells_BLn = (first_B11 + order_BL[..., None]).expand(*shape, config.cell**2) % config.vocab_size
        labels_B = first_B11.flatten() % config.labels
        with bench.autocast():
            logits = gpt(cells_BLn, positions_L2[order_BL], labels_B)
        loss = F.cross_entropy(logits.float().flatten(0, 2), cells_BLn.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return loss.detach()

    def step() -> Tensor:
        loss = gradients()
        nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        return loss

    return step, gradients, gpt


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


def drawing(bench: Bench, sizes: Sizes, gpt: GPT) -> list[tuple[str, str]]:
    """The rows of drawing by `igpt generate`'s own way."""
    torch.manual_seed(0)
    tokenizer, labels = VQTokenizer(sizes.vq).to(bench.device), [str(i) for i in range(sizes.gpt.labels)]
    gpt.draw_in(torch.bfloat16 if bench.bf16 else torch.float32)
    model, table = ImageGPT(tokenizer, gpt, labels), []
    for count in sizes.drawn:
        found: list[Tensor] = []

        def draw(count: int = count, found: list[Tensor] = found) -> None:
            labels_B = torch.arange(count) % sizes.gpt.labels
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


def rows(bench: Bench, sizes: Sizes, compiled: tuple[bool, ...], steps: int) -> list[tuple[str, str]]:
    """The table."""
    table: list[tuple[str, str]] = []
    dtype = torch.bfloat16 if bench.bf16 else torch.float32
    square = torch.randn(sizes.matrix, sizes.matrix, device=bench.device, dtype=dtype)
    peak = 2 * sizes.matrix**3 / bench.time(lambda: square @ square)
    table.append((f"product of {sizes.matrix}^3 in {dtype}".replace("torch.", ""), f"{peak / 1e12:.3g} TFLOP/s"))
    first_losses: dict[str, list[float]] = {"tokenizer": [], "GPT": []}
    for on in compiled:
        name, start = "compiled" if on else "eager", time.perf_counter()
        step = tokenizer_step(bench, sizes, on)
        first, last = learns(step, steps)
        first_losses["tokenizer"].append(first)
        ready = time.perf_counter() - start
        speed = sizes.crops / bench.time(step)
        losses = f"loss {first:.3f} to {last:.3f}"
        table.append((f"tokenizer, {name}", f"{speed:,.0f} crops/s, {losses}, {ready:.0f} s before"))
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else ""
    most = next((flops for name, flops in PEAKS.items() if name in card), None)
    for on in compiled:
        name, start = "compiled" if on else "eager", time.perf_counter()
        step, gradients, gpt = gpt_step(bench, sizes, on)
        if not on:
            flops = flops_of(gradients)
        first, last = learns(step, steps)
        first_losses["GPT"].append(first)
        ready = time.perf_counter() - start
        for part, work in (("step", step), ("forward and back", gradients)):
            seconds = bench.time(work)
            share = f"{flops / seconds / 1e12:.3g} TFLOP/s = {flops / seconds / peak:.0%} of the product"
            share += f", {flops / seconds / most:.0%} of the peak" if most else ""
            table.append(
                (f"GPT, {name}, {part}", f"{sizes.grids / seconds:,.0f} grids/s, {share}, {ready:.0f} s before")
            )
        table.append((f"GPT, {name}, waits for the device", waits_for_nothing(bench, step)))
    for name, firsts in first_losses.items():
        assert max(firsts) - min(firsts) < 0.02 * max(firsts), f"{name}: eager and compiled losses differ: {firsts}"
    table += drawing(bench, sizes, gpt.eval())
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
    device, start = pick_device(args.device), time.perf_counter()
    if device.type == "cpu" and not args.tiny:
        sys.exit("this is for a GPU; --tiny shows on a CPU that it runs")
    torch.set_float32_matmul_precision("high")
    compiled = device.type == "cuda" if args.compile is None else args.compile
    bench = Bench(device, min(args.seconds, 0.2) if args.tiny else args.seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}")
    for row, found in rows(bench, TINY if args.tiny else FULL, (False, True) if compiled else (False,), steps=30):
        print(f"{row:44}{found}")
    print(f"all checks passed; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
