"""Seconds to draw 16x16 grids of tokens: igpt in its default steps against the best of three peers, random weights.

The shape is the reference's for all: 12 layers, 512 wide, 8 heads, 1024 codes; the peers have one more token, their
start, and 257 positions. They run their own `generate` with its cache, one token a call, sampling without a filter:
`transformers`' ImageGPT and GPT-2 (checked with 5.24) and x-transformers' AutoregressiveWrapper (2.31). igpt draws in
the precision of its default on this machine; every peer is tried in float32 and in bfloat16, and runs in the rounds in
the faster of the two.

Also the floor: the weights that a step reads, over the speed at which this machine reads memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, measure, median, print_machine, print_ratios
from igpt.config import GPTConfig, SamplingOptions
from igpt.device import fast_bf16
from igpt.linear import Linear
from igpt.model import GPT
from igpt.sampling import draw, generators

SIDE, CELLS, CODES = 16, 256, 1024
Work = Callable[[], object]


def igpt_model(layers: int, width: int, heads: int) -> GPT:
    """The reference GPT with a head that is not zero, so that what it draws varies as a trained model's would."""
    gpt = GPT(GPTConfig(CODES, 0, layers=layers, width=width, heads=heads)).eval()
    nn.init.normal_(gpt.head.weight, std=0.02)
    if fast_bf16():
        gpt.draw_in(torch.bfloat16)
    return gpt


def igpt_work(gpt: GPT, steps: int, batch: int) -> Work:
    """Draws `batch` grids."""
    options = SamplingOptions(steps=steps, guidance=1)
    labels_B = torch.full((batch,), gpt.null_label)
    return lambda: list(draw(gpt, labels_B, (SIDE, SIDE), options, generators(0, batch)))


def transformers_work(peer: str, layers: int, width: int, heads: int, batch: int, dtype: torch.dtype) -> Work:
    """Draws `batch` rows of 256 tokens with a model of `transformers`."""
    from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling

    shape = {
        "vocab_size": CODES + 1, "n_positions": CELLS + 1, "n_layer": layers, "n_embd": width, "n_head": heads,
        "bos_token_id": CODES, "eos_token_id": None,
    }  # fmt: skip
    if peer == "imagegpt":
        model = ImageGPTForCausalImageModeling(ImageGPTConfig(**shape))
    else:
        model = GPT2LMHeadModel(GPT2Config(**shape))
    model, start = model.eval().to(dtype), torch.full((batch, 1), CODES)

    def work() -> Tensor:
        grid: Tensor = model.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=CELLS,
            do_sample=True, temperature=1.0, top_k=0, use_cache=True,
        )  # fmt: skip
        return grid

    return work


def x_transformers_work(layers: int, width: int, heads: int, batch: int, dtype: torch.dtype) -> Work:
    """Draws `batch` rows of 256 tokens with x-transformers."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    blocks = Decoder(dim=width, depth=layers, heads=heads, attn_dim_head=width // heads, attn_flash=True)
    model = TransformerWrapper(num_tokens=CODES + 1, max_seq_len=CELLS + 1, attn_layers=blocks)
    wrapper, start = AutoregressiveWrapper(model).eval().to(dtype), torch.full((batch, 1), CODES)
    return lambda: wrapper.generate(start, CELLS, filter_logits_fn=lambda logits: logits, cache_kv=True)


PEERS = {"imagegpt": "transformers", "gpt2": "transformers", "x-transformers": "x-transformers"}


def best_precision(peer: str, layers: int, width: int, heads: int, batch: int) -> tuple[str, Work]:
    """The peer in float32 or bfloat16, whichever one call is faster in; with its name."""
    seconds, works = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        name = f"{peer}, {str(dtype).removeprefix('torch.')}"
        try:
            if peer == "x-transformers":
                works[name] = x_transformers_work(layers, width, heads, batch, dtype)
            else:
                works[name] = transformers_work(peer, layers, width, heads, batch, dtype)
        except ImportError:
            sys.exit(f"{peer} is missing: `pip install {PEERS[peer]}`, or leave it out with --peers none")
        seconds[name] = measure(works[name]).seconds
        print(f"{name}: {seconds[name]:.2f} s in a first call", flush=True)
    name = min(seconds, key=seconds.__getitem__)
    return name, works[name]


def weight_bytes(gpt: GPT) -> int:
    """Bytes of weights that a step reads: all but the embeddings, of which it takes single rows."""
    linears = [module for module in gpt.modules() if isinstance(module, Linear)]
    rest = {*gpt.parameters()} - {gpt.tokens.weight, gpt.labels.weight} - {layer.weight for layer in linears}
    products = sum(layer.weight.numel() * layer.drawing_dtype.itemsize for layer in linears)
    return products + sum(p.numel() * p.element_size() for p in rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS), help="default: all")
    parser.add_argument("--steps", type=int, default=SamplingOptions().steps, help="of igpt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="grids at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--read-mb", type=int, default=1024, help="tensor that measures memory (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    print_machine()
    print(f"{args.layers} layers, {args.width} wide, {args.heads} heads, {args.batch} grid(s) of {SIDE}x{SIDE} tokens")
    gpt = igpt_model(args.layers, args.width, args.heads)
    ours = f"igpt, {'bfloat16' if fast_bf16() else 'float32'}, {args.steps} steps"
    contenders = {ours: igpt_work(gpt, args.steps, args.batch)}
    shape = args.layers, args.width, args.heads, args.batch
    contenders |= dict(best_precision(peer, *shape) for peer in args.peers if peer != "none")
    results = alternate(contenders, args.rounds)
    print_ratios(results, against=ours)
    if peers := [name for name in results if name != ours]:
        best = min(peers, key=lambda name: median(results[name]))
        print(f"the best peer ({best}) takes {median(results[best]) / median(results[ours]):.2f} times as long as igpt")

    memory = torch.ones(args.read_mb * 2**18)
    reading = median(alternate({"read": memory.sum}, args.rounds)["read"])
    speed = memory.numel() * memory.element_size() / reading
    step, floor = median(results[ours]) / args.steps, weight_bytes(gpt) / speed
    print(f"weights read a step: {weight_bytes(gpt) / 1e6:.1f} MB; memory reads at {speed / 1e9:.1f} GB/s")
    print(f"floor of a step: {floor * 1e3:.2f} ms; igpt takes {step * 1e3:.2f} ms, so it reaches {floor / step:.0%}")


if __name__ == "__main__":
    main()
