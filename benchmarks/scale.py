"""How cost grows with tokens, width, pictures and processes: measured steps of small GPTs, and formulas for large ones.

Measured rows are ratios within one run, on the CPU: FLOPs are counted, times are medians. The lines on paper come from
the formulas that are printed with them, for --layers, --width, --pictures and --gpus.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import flops_of
from igpt.config import GPTConfig
from igpt.model import GPT, cell_positions
from tests.test_shards import token_shards
from train.tokens import TokenWindows

CELLS, HEADS, LAYERS = 64, 4, 4
PEAK, REACHED = 990e12, 0.4  # bf16 products of an H100 a second (data sheet, dense), and the share that is the goal
LINK = 50e9  # bytes a second of a GPU to others: 400 Gb/s


def step_of(width: int, cells: int, batch: int = 4) -> tuple[float, int, int]:
    """Seconds (median of five) and FLOPs of forward and backward, and weights."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(1024, 1, layers=LAYERS, width=width, heads=HEADS, cells=cells, dropout=0.0))
    side = round(cells**0.5)
    cells_BLn, positions = torch.randint(1024, (batch, cells, 4)), cell_positions(side, side).expand(batch, -1, -1)

    def step() -> None:
        logits = gpt(cells_BLn, positions, torch.zeros(batch, dtype=torch.long))
        F.cross_entropy(logits.flatten(0, 2), cells_BLn.flatten()).backward()

    flops, times = flops_of(step), []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return sorted(times)[2], flops, sum(p.numel() for p in gpt.parameters())


def measured() -> None:
    """Rows from runs."""
    print("tokens a picture | weights | GFLOP a step of 4 | seconds | against the first")
    rows = [(128, 64), (128, 256), (128, 1024), (256, 64), (512, 64)]
    results = [step_of(*row) for row in rows]
    for (width, cells), (seconds, flops, weights) in zip(rows, results, strict=True):
        first = f"{flops / results[0][1]:.1f} x FLOPs, {seconds / results[0][0]:.1f} x time"
        print(f"{4 * cells} ({width} wide) | {weights / 1e6:.1f} M | {flops / 1e9:.2f} | {seconds:.3f} | {first}")
    print("pictures | ms to take a sample of tokens")
    for pictures in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            shards = -(-pictures // 1000)
            tokens = token_shards(Path(folder), [(pictures // shards, 0)] * shards, side=16)
            windows = TokenWindows(tokens, tokens.train, GPTConfig(2**17, 2, cells=64), 0)
            start = time.perf_counter()
            for k in range(1000):
                windows[k]
            print(f"{pictures:,} | {time.perf_counter() - start:.2f}")


def on_paper(layers: int, width: int, pictures: float, gpus: int) -> None:
    """Lines with their formulas."""
    tokens, views, codes, batch = 1024, 2, 4096, 16
    head = 24 * width**2 + codes * width  # works on every token; all else on cells of four
    weights = 11 * layers * width**2 + 3 * width**2 + head + codes * width / 4
    grid = 6 * tokens / 4 * (weights + 3 * head)
    speed = gpus * REACHED * PEAK
    lines = [
        ("weights P", "11 L w^2 + 3 w^2 + H + K w/4; head H = 24 w^2 + K w", f"{weights / 1e9:.2f}B"),
        ("weights, gradients, sum, momentum, average", "P x 5 x 4 bytes", f"{20 * weights / 1e9:.0f} GB a GPU"),
        ("FLOPs of a grid F", "6 x T/4 x (P + 3 H)", f"{grid:.2g}"),
        ("hours of one pass", "F N / (G x 0.4 x peak) / 3600", f"{grid * pictures / speed / 3600:.1f}"),
        (f"a step of {batch} grids a GPU", f"{batch} F / (0.4 x peak)", f"{batch * grid / REACHED / PEAK:.2f} s"),
        ("adding gradients up, after that", "2 x 4 P / link", f"{8 * weights / LINK:.2f} s"),
        ("tokens on disk", "N x views x T x 2 bytes", f"{pictures * views * tokens * 2 / 1e12:.1f} TB"),
        ("pictures on disk", "N x 100 kB", f"{pictures * 1e5 / 1e12:.0f} TB"),
        ("shards S of 10,000 pictures", "N / 10,000", f"{pictures / 1e4:,.0f}"),
        ("encoding at 768 views/s a GPU", "N x views / (768 G)", f"{pictures * views / (768 * gpus) / 3600:.1f} h"),
        ("index of token shards in memory", "S x 100 bytes", f"{pictures / 1e4 * 100 / 1e6:.0f} MB a process"),
        ("a state on disk", "P x 12 bytes", f"{12 * weights / 1e9:.0f} GB"),
    ]
    print(f"N = {pictures:.2g} pictures, L = {layers}, w = {width}, G = {gpus}, T = {tokens} tokens, K = {codes} codes")
    for line in lines:
        print(" | ".join(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"layers": 40, "width": 2560, "pictures": 10**9, "gpus": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    measured()
    on_paper(args.layers, args.width, args.pictures, args.gpus)


if __name__ == "__main__":
    main()
