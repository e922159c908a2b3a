"""Seconds to draw pictures of 256 px: igpt from label to pixels against three peers that draw as many tokens.

igpt draws with the model in the box in its default way: guidance on, so every picture is drawn twice, and decoded to
pixels. The peers, of the same shape (12 layers, 512 wide, 8 heads, 4,096 codes, random weights), draw rows of 1,024
tokens without guidance and decode nothing: they run their own `generate` with its cache, one token a call, sampling
without a filter. `transformers`' ImageGPT and GPT-2 (checked with 5.24) and x-transformers' AutoregressiveWrapper
(2.31) are each tried in float32 and in bfloat16, and run in the rounds in the faster of the two.

On a machine that multiplies in bfloat16, `ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2` before the command shows
what a laptop without it would see.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import igpt
from benchmarks.timing import alternate, measure, median, print_machine, print_ratios
from igpt.config import DEFAULT_MODEL
from igpt.device import fast_bf16

TOKENS, CODES, LAYERS, WIDTH, HEADS = 1024, 4096, 12, 512, 8
Work = Callable[[], object]


def transformers_work(peer: str, batch: int, dtype: torch.dtype) -> Work:
    """Draws `batch` rows of 1,024 tokens with a model of `transformers`."""
    from transformers import GPT2Config, GPT2LMHeadModel, ImageGPTConfig, ImageGPTForCausalImageModeling

    shape = {
        "vocab_size": CODES + 1,
        "n_positions": TOKENS + 1,
        "n_layer": LAYERS,
        "n_embd": WIDTH,
        "n_head": HEADS,
        "bos_token_id": CODES,
        "eos_token_id": None,
    }
    if peer == "imagegpt":
        model = ImageGPTForCausalImageModeling(ImageGPTConfig(**shape))
    else:
        model = GPT2LMHeadModel(GPT2Config(**shape))
    model, start = model.eval().to(dtype), torch.full((batch, 1), CODES)

    def work() -> Tensor:
        grid: Tensor = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=TOKENS,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            use_cache=True,
        )
        return grid

    return work


def x_transformers_work(batch: int, dtype: torch.dtype) -> Work:
    """Draws `batch` rows of 1,024 tokens with x-transformers."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    blocks = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=True)
    model = TransformerWrapper(num_tokens=CODES + 1, max_seq_len=TOKENS + 1, attn_layers=blocks)
    wrapper, start = AutoregressiveWrapper(model).eval().to(dtype), torch.full((batch, 1), CODES)
    return lambda: wrapper.generate(start, TOKENS, filter_logits_fn=lambda logits: logits, cache_kv=True)


PEERS = {"imagegpt": "transformers", "gpt2": "transformers", "x-transformers": "x-transformers"}


def best_precision(peer: str, batch: int, dtypes: list[torch.dtype]) -> tuple[str, Work]:
    """The peer in the precision in which one call is fastest; with its name."""
    seconds, works = {}, {}
    for dtype in dtypes:
        name = f"{peer}, {str(dtype).removeprefix('torch.')}"
        try:
            make: Any = x_transformers_work if peer == "x-transformers" else transformers_work
            works[name] = make(*(() if peer == "x-transformers" else (peer,)), batch, dtype)
        except ImportError:
            sys.exit(f"{peer} is missing: `pip install {PEERS[peer]}`, or leave it out with --peers none")
        seconds[name] = measure(works[name]).seconds
        print(f"{name}: {seconds[name]:.2f} s in a first call", flush=True)
    name = min(seconds, key=seconds.__getitem__)
    return name, works[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=[*PEERS, "none"], default=list(PEERS), help="default: all")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="of igpt (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    parser.add_argument("--fp32", action="store_true", help="try the peers in float32 only (bfloat16 is emulated)")
    args = parser.parse_args()
    torch.manual_seed(0)

    print_machine()
    model = igpt.load(args.model, "cpu")
    print(f"{args.batch} picture(s) of {model.grids.native_size[0]} px against {args.batch} row(s) of {TOKENS} tokens")
    ours = f"igpt, {'bfloat16' if fast_bf16(model.device) else 'float32'}, {igpt.SamplingOptions().steps} steps"
    contenders: dict[str, Work] = {ours: lambda: model.generate(args.batch, label=model.labels[0])}
    dtypes = [torch.float32] if args.fp32 else [torch.float32, torch.bfloat16]
    contenders |= dict(best_precision(peer, args.batch, dtypes) for peer in args.peers if peer != "none")
    results = alternate(contenders, args.rounds)
    print_ratios(results, against=ours)
    if peers := [name for name in results if name != ours]:
        best = min(peers, key=lambda name: median(results[name]))
        print(f"the best peer ({best}) takes {median(results[best]) / median(results[ours]):.2f} times as long as igpt")


if __name__ == "__main__":
    main()
