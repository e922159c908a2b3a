"""What each way to quantize gives at equal budget: a table of reconstructions of held-out pictures.

All start from one trunk, the encoder and decoder of a trained model, with fresh codes and fresh layers around them, and
learn from the same crops in the same order. The last two keep the model's own codes and train its decoder alone,
without and with a discriminator. What is done is not trained again, so the script can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from igpt import checkpoint
from igpt.config import DEFAULT_MODEL
from tokenizer_vq.art_folder import ArtFolder
from tokenizer_vq.vq import VQTokenizer
from train.options import TrainOptions
from train.run import train
from train.tokenizer import TokenizerStage

CODES: dict[str, dict[str, Any]] = {
    "ema 4096": {"codes": 4096},
    "ema 1024": {"codes": 1024},
    "simvq 4096": {"quantizer": "simvq", "codes": 4096},
    "simvq 1024": {"quantizer": "simvq", "codes": 1024},
    "fsq 4375": {"quantizer": "fsq", "codes": 4375},
    "fsq 1000": {"quantizer": "fsq", "codes": 1000},
    "ema 4096, f8": {"codes": 4096, "downsample": 8},
    "ema 4096, encoder": {"codes": 4096, "perceptual": DEFAULT_MODEL},
    "ema 4096, no LPIPS": {"codes": 4096, "perceptual": "none"},
}
DECODERS: dict[str, dict[str, Any]] = {  # the model's own codes, frozen, under a decoder that goes on learning
    "decoder": {"adversarial": 0.0},
    "decoder and critic": {},
}
JUDGE = "lpips-squeeze"
NATIVE = 256  # pixels a side of a picture
COLUMNS = ("psnr", "ssim", JUDGE, "codes_used", "perplexity", "grid")


def trunk(model: str, folder: Path) -> str:
    """The model's tokenizer with codes of a width that nothing fits: what starts from it keeps encoder and decoder."""
    old = checkpoint.load(model).tokenizer
    assert isinstance(old, VQTokenizer)
    torch.manual_seed(0)
    new = VQTokenizer(replace(old.config, code_width=old.config.code_width - 1))
    own = new.state_dict()
    own |= {name: value for name, value in old.state_dict().items() if value.shape == own[name].shape}
    new.load_state_dict(own)
    checkpoint.save(folder, new, None, [], {})
    return str(folder)


def measured(folder: Path, art: ArtFolder, options: TrainOptions) -> dict[str, float]:
    """Its numbers on all held-out pictures, LPIPS among them however it was trained."""
    found = checkpoint.load(folder)
    numbers: dict[str, float] = found.provenance["tokenizer"]
    if JUDGE in numbers:
        return numbers
    assert isinstance(found.tokenizer, VQTokenizer)
    told, held_out = art.split()
    preset = options.suited(len(told), NATIVE, found.tokenizer.downsample)
    return TokenizerStage(art, told, held_out, preset, options, found.tokenizer.eval()).measure_all(found.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--perceptual", required=True, help="folder with LPIPS weights, which judge all contenders")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose encoder and decoder all start from")
    parser.add_argument("--crops", type=int, default=2400)
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    parser.add_argument("--only", nargs="*", choices=[*CODES, *DECODERS], default=[*CODES, *DECODERS])
    args = parser.parse_args()
    art = ArtFolder(args.art, manifest=args.manifest)
    common = TrainOptions(manifest=args.manifest, perceptual=args.perceptual, quiet=True)
    from_trunk = replace(
        common, start_from=trunk(args.model, args.out / "trunk"), tokenizer_crops=args.crops, decoder_crops=0
    )
    frozen = replace(  # one step at a vanishing rate stands for the first stage
        common, start_from=args.model, tokenizer_crops=1, decoder_crops=args.crops,
        codes=checkpoint.load(args.model).tokenizer.vocab_size,
    )  # fmt: skip
    print(" | ".join(("contender", *COLUMNS)))
    for name in args.only:
        options = replace(from_trunk, **CODES[name]) if name in CODES else replace(frozen, **DECODERS[name])
        folder = args.out / re.sub("[, ]+", "-", name)
        train("tokenizer", args.art, folder, options)
        numbers = measured(folder, art, common)
        print(" | ".join((name, *(f"{numbers[column]:.4g}" for column in COLUMNS))), flush=True)


if __name__ == "__main__":
    main()
