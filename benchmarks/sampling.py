"""Seconds to draw one 16x16 grid of tokens: igpt in 32 steps against `transformers` in 256, all with random weights.

The shape is the reference's for all: 12 layers, 512 wide, 8 heads, 1024 codes; the peers have one more token, their
start, and 257 positions. igpt and ImageGPT are float32, GPT-2 is bfloat16. The peers run their own `generate` with its
cache (checked with transformers 5.23: one token a call, same tokens as without the cache), sampling, top-k off.

Also the floor: the weights that a step reads, over the speed at which this machine reads memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, median, print_machine, print_ratios
from igpt.config import GPTConfig, SamplingOptions
from igpt.model import GPT
from igpt.sampling import draw, generators

SIDE, CELLS, CODES = 16, 256, 1024
PEERS = ("imagegpt", "gpt2")


def igpt_model(layers: int, width: int, heads: int) -> GPT:
    """The reference GPT with a head that is not zero, so that what it draws varies as a trained model's would."""
    gpt = GPT(GPTConfig(CODES, 0, layers=layers, width=width, heads=heads)).eval()
    nn.init.normal_(gpt.head.weight, std=0.02)
    return gpt


def igpt_work(gpt: GPT, steps: int, batch: int) -> Callable[[], object]:
    """Draws `batch` grids."""
    options = SamplingOptions(steps=steps, guidance=1)
    labels_B = torch.full((batch,), gpt.null_label)
    return lambda: list(draw(gpt, labels_B, (SIDE, SIDE), options, generators(0, batch)))


def peer_work(peer: str, layers: int, width: int, heads: int, batch: int) -> Callable[[], object]:
    """Draws `batch` rows of 256 tokens with a model of `transformers`."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling
    except ImportError:
        sys.exit(f"{peer} needs transformers: `pip install transformers`, or leave it out with --peers none")
    shape = {
        "vocab_size": CODES + 1, "n_positions": CELLS + 1, "n_layer": layers, "n_embd": width, "n_head": heads,
        "bos_token_id": CODES, "eos_token_id": None,
    }  # fmt: skip
    if peer == "imagegpt":
        model = ImageGPTForCausalImageModeling(ImageGPTConfig(**shape)).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(**shape)).eval().to(torch.bfloat16)
    start = torch.full((batch, 1), CODES)

    def work() -> Tensor:
        grid: Tensor = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=CELLS,
            do_sample=True, temperature=1.0, top_k=0, use_cache=True,
        )  # fmt: skip
        return grid

    return work


def weight_bytes(gpt: GPT) -> int:
    """Bytes of weights that a step reads: all but the embeddings, of which it takes single rows."""
    embeddings = {gpt.tokens.weight, gpt.labels.weight}
    return sum(p.numel() * p.element_size() for p in gpt.parameters() if p not in embeddings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS), help="default: all")
    parser.add_argument("--steps", type=int, default=32, help="of igpt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="grids at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--read-mb", type=int, default=1024, help="tensor that measures memory (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    gpt = igpt_model(args.layers, args.width, args.heads)
    ours = f"igpt, {args.steps} steps"
    contenders = {ours: igpt_work(gpt, args.steps, args.batch)}
    for peer in args.peers:
        if peer != "none":
            contenders[peer] = peer_work(peer, args.layers, args.width, args.heads, args.batch)
    print_machine()
    print(f"{args.layers} layers, {args.width} wide, {args.heads} heads, {args.batch} grid(s) of {SIDE}x{SIDE} tokens")
    results = alternate(contenders, args.rounds)
    print_ratios(results, against=ours)

    memory = torch.ones(args.read_mb * 2**18)
    reading = median(alternate({"read": memory.sum}, args.rounds)["read"])
    speed = memory.numel() * memory.element_size() / reading
    floor = args.steps * weight_bytes(gpt) / speed
    print(f"weights read a step: {weight_bytes(gpt) / 1e6:.1f} MB; memory reads at {speed / 1e9:.1f} GB/s")
    print(f"floor of {args.steps} steps: {floor:.3f} s, so igpt reaches {floor / median(results[ours]):.0%} of it")


if __name__ == "__main__":
    main()
