"""Tokens a second of a training step in bfloat16 autocast: igpt against `transformers`' GPT-2 and nanoGPT.

All have 12 layers, 512 wide, 8 heads, 4096 codes, no dropout, and take the same step: rows of 1,024 random tokens,
forward, backward, gradients clipped to 1, fused AdamW (which nanoGPT's own script turns on for CUDA only). The first
step, which creates the optimizer's state, is not measured. nanoGPT is no package: name the folder of its clone.
Beside them the speed of a bfloat16 matrix product, measured in the same turns, and the share of it that each reaches.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import alternate, flops_of, median, print_machine, print_ratios
from igpt.config import GPTConfig
from igpt.model import GPT, cell_positions, to_cells

SIDE, TOKENS, CODES = 32, 1024, 4096
Loss = Callable[[Tensor, Tensor], Tensor]  # of what a model of text sees and of what it should say, both [B, L]


def igpt(layers: int, width: int, heads: int) -> tuple[nn.Module, Loss]:
    """The reference GPT, a new drawing order for each row. It leaves out the last token by itself."""
    gpt = GPT(GPTConfig(CODES, 0, layers=layers, width=width, heads=heads, dropout=0.0))
    cell = gpt.config.cell
    cells_L2 = cell_positions(SIDE // cell, SIDE // cell)

    def loss(_: Tensor, targets_BL: Tensor) -> Tensor:
        cells_BLn = to_cells(targets_BL.view(-1, SIDE, SIDE), cell)
        positions_BL2 = cells_L2[torch.rand(cells_BLn.shape[:2]).argsort(dim=1)]
        logits_BLnK = gpt(cells_BLn, positions_BL2, torch.full((len(targets_BL),), gpt.null_label))
        return cross_entropy(logits_BLnK.flatten(1, 2), cells_BLn.flatten(1))

    return gpt, loss


def gpt2(layers: int, width: int, heads: int) -> tuple[nn.Module, Loss]:
    """The same size in `transformers`; the loss is ours, on its logits."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        sys.exit("gpt2 needs transformers: `pip install transformers`, or leave it out with --peers none")
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=CODES,
            n_positions=TOKENS,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return model, lambda seen, targets: cross_entropy(model(seen, use_cache=False).logits, targets)


def nanogpt(folder: Path, layers: int, width: int, heads: int) -> tuple[nn.Module, Loss]:
    """The same size in nanoGPT, with its own loss."""
    if not (folder / "model.py").is_file():
        sys.exit(f"there is no model.py in {folder}; the folder of a clone of karpathy/nanoGPT is wanted")
    names = runpy.run_path(str(folder / "model.py"))
    model = names["GPT"](
        names["GPTConfig"](
            block_size=TOKENS, vocab_size=CODES, n_layer=layers, n_head=heads, n_embd=width, dropout=0.0, bias=False
        )
    )
    return model, lambda seen, targets: model(seen, targets)[1]


def cross_entropy(logits_BLK: Tensor, targets_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLK.float().flatten(0, 1), targets_BL.flatten())


def step_of(model: nn.Module, loss: Loss, tokens_BL: Tensor) -> Callable[[], object]:
    """One training step on rows of 1,025 tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous())
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", choices=["gpt2", "none"], default="gpt2", help="default: %(default)s")
    parser.add_argument("--nanogpt", type=Path, metavar="FOLDER", help="a clone of karpathy/nanoGPT (default: without)")
    for name, default in {"rounds": 3, "batch": 4, "layers": 12, "width": 512, "heads": 8, "matrix": 2048}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)

    shape = (args.layers, args.width, args.heads)
    models = {"igpt": igpt(*shape)}
    if args.peers == "gpt2":
        models["gpt2"] = gpt2(*shape)
    if args.nanogpt is not None:
        models["nanogpt"] = nanogpt(args.nanogpt, *shape)
    tokens_BL = torch.randint(CODES, (args.batch, TOKENS + 1))
    flops = {name: flops_of(step_of(*model, tokens_BL[:1])) * args.batch for name, model in models.items()}
    square = torch.randn(args.matrix, args.matrix, dtype=torch.bfloat16)
    product = f"product of {args.matrix}^3"
    contenders = {name: step_of(*model, tokens_BL) for name, model in models.items()}
    results = alternate(contenders | {product: lambda: square @ square}, args.rounds)

    print_machine()
    print(f"{args.layers} layers, {args.width} wide, {args.heads} heads; a step is {args.batch} x {TOKENS} tokens")
    print_ratios(results, against="igpt")
    peak = 2 * args.matrix**3 / median(results[product])
    print(f"{product} in bfloat16: {peak / 1e9:.0f} GFLOP/s")
    for name, (model, _) in models.items():
        tokens, speed = args.batch * TOKENS / median(results[name]), flops[name] / median(results[name])
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{name}: {tokens:.0f} tokens/s, {weights:.1f} M weights, {speed / 1e9:.0f} GFLOP/s = {speed / peak:.0%}")


if __name__ == "__main__":
    main()
