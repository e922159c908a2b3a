"""FLOPs and seconds to decode one 16x16 grid of tokens to 256x256 pixels: igpt's decoder against the VQ-16 shape.

VQ-16 is LlamaGen's and taming-transformers' decoder, built here from igpt's own parts. Both have random weights and
run in float32: this says nothing about how good their pictures look.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from benchmarks.timing import alternate, flops_of, median, print_machine, print_ratios
from tokenizer_vq.vq import VQConfig, VQTokenizer

CONFIGS = {"igpt": VQConfig(), "VQ-16": VQConfig.vq16()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=16, help="tokens a side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)

    tokens_Bhw = torch.randint(min(config.codes for config in CONFIGS.values()), (1, args.side, args.side))
    tokenizers = {name: VQTokenizer(config).eval() for name, config in CONFIGS.items()}
    print_machine()
    print(f"one grid of {args.side}x{args.side} tokens, 16 pixels each")
    contenders = {name: partial(tokenizer.decode, tokens_Bhw) for name, tokenizer in tokenizers.items()}
    flops = {name: flops_of(work) for name, work in contenders.items()}
    results = alternate(contenders, args.rounds)
    print_ratios(results, against="igpt")
    for name, tokenizer in tokenizers.items():
        weights = sum(p.numel() for p in tokenizer.decoder.parameters()) / 1e6
        speed, ratio = flops[name] / median(results[name]) / 1e9, flops[name] / flops["igpt"]
        print(f"{name}: {flops[name] / 1e9:.2f} GFLOP ({ratio:.2f}x), {weights:.1f} M weights, {speed:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
