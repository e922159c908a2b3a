"""FLOPs and seconds to decode one grid of 32x32 tokens to 256x256 pixels, in float32 and in bfloat16.

The weights are random: this says nothing about how good the pictures look.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import alternate, flops_of, median, print_machine, print_ratios
from tokenizer_vq.vq import VQConfig, VQTokenizer


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="tokens a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokenizer = VQTokenizer(VQConfig()).eval()
    tokens_Bhw = torch.randint(tokenizer.vocab_size, (1, args.side, args.side))

    def decode(bf16: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            tokenizer.decode(tokens_Bhw)

    print_machine()
    print(f"one grid of {args.side}x{args.side} tokens, {tokenizer.downsample} pixels each")
    flops = flops_of(lambda: decode(False))
    results = alternate({"float32": lambda: decode(False), "bfloat16": lambda: decode(True)}, args.rounds)
    print_ratios(results, against="float32")
    weights = sum(p.numel() for p in tokenizer.decoder.parameters()) / 1e6
    print(f"{flops / 1e9:.2f} GFLOP, {weights:.1f} M weights, {flops / median(results['float32']) / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
