"""The decoder on a person's pictures: the codes stay, so that tokens and recipes stay good; only the brush changes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from igpt.evaluation.perceptual import NO_WEIGHTS
from tokenizer_vq.vq import VQTokenizer

from .collection import Collection
from .decoder import DecoderStage, FrozenCodes
from .folder import precision_of
from .loop import Schedule, run
from .options import PRESETS, TrainOptions, TuneOptions
from .plan import Plan

RATE = 2e-4
CROP = 128  # pixels a side
WORTH_IT = 0.1  # SSIM that unseen pictures must gain: below that they only got softer (EXPERIMENTS.md)


def repainted(
    tokenizer: VQTokenizer, collection: Collection, plan: Plan, options: TuneOptions, work: Path, identity: str
) -> tuple[VQTokenizer, dict[str, float]]:
    """A copy whose decoder learned the training pictures (without a discriminator, which so few pictures would make
    blind), and its numbers on validation pictures. The old one comes back where these did not gain much: without a
    discriminator a decoder also grows softer."""
    side = int(PRESETS["small"].cells**0.5) * tokenizer.downsample
    preset = replace(PRESETS["small"], crop=min(CROP, side))
    taught = TrainOptions(
        seed=options.seed, adversarial=0.0, tokenizer_lr=RATE, flip=plan.flip, precision=options.precision,
        quiet=options.quiet, perceptual=NO_WEIGHTS,  # with it time, memory and what is WORTH_IT were measured
    )  # fmt: skip
    model = copy.deepcopy(tokenizer)
    stage = DecoderStage(collection.art, collection.train, collection.validation, preset, taught, model)
    before = stage.measure(stage.modules["model"].eval())
    schedule = Schedule(
        max(1, plan.decoder_crops // plan.batch), plan.batch, 60 * options.save_minutes, options.patience,
        options.seed, precision_of(options), options.workers, options.quiet,
    )  # fmt: skip
    learned = run(stage, schedule, work, {"identity": identity})
    assert isinstance(learned, FrozenCodes)
    after = stage.measure(learned)
    numbers = {f"decoder_{name}_{when}": told[name] for name in ("psnr", "ssim")
               for when, told in (("before", before), ("after", after))}  # fmt: skip
    kept = after["ssim"] >= before["ssim"] + WORTH_IT
    return (learned.tokenizer if kept else tokenizer), numbers | {"decoder_kept": float(kept)}
