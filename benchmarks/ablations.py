"""What each choice in the training of the GPT is worth: held-out bits a token at equal budget, one choice changed at a
time.

All learn from one token cache, from random weights, from as many samples in the same batches, and are judged on the
same windows of held-out pictures. Every model is kept in a folder that `benchmarks.settings --model` can draw with.
What is done is not trained again, so the script can be stopped and goes on.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt import checkpoint
from igpt.config import DEFAULT_MODEL, GPTConfig
from igpt.device import keep_freed_memory
from igpt.model import GPT
from igpt.token_cache import TokenCache, TokenWindows
from tokenizer_vq.art_folder import ArtFolder
from train.folder import numbers_of, precision_of
from train.gpt import LABEL_DROPOUT, TABLES, WEIGHT_DECAY, GPTStage, bits_a_token
from train.loop import Schedule, run
from train.muon import muon
from train.options import TrainOptions
from train.run import encoded


@dataclass(frozen=True)
class Contender:
    """What differs from the defaults."""

    network: dict[str, int] = field(default_factory=dict)  # of the preset
    options: dict[str, Any] = field(default_factory=dict)  # of TrainOptions
    views: tuple[int, ...] | None = None  # which encodings of a picture to learn from; None is all
    decay: float = WEIGHT_DECAY
    smoothing: float = 0.0  # of the targets
    balance: float = 1.0  # a label with n pictures is learned from in proportion to n ** balance


CONTENDERS = {
    "as shipped": Contender(),
    "raster order only": Contender(options={"random_orders": 0.0}),
    "half of the orders random": Contender(options={"random_orders": 0.5}),
    "6 layers of 192": Contender({"layers": 6, "width": 192, "heads": 3}),
    "12 layers of 256": Contender({"layers": 12}),
    "8 layers of 384": Contender({"width": 384, "heads": 6}),
    "no dropout": Contender(options={"dropout": 0.0}),
    "no token noise": Contender(options={"token_noise": 0.0}),
    "token noise 0.15": Contender(options={"token_noise": 0.15}),
    "whole pictures only": Contender(views=(1, 3)),
    "square parts only": Contender(views=(0, 2)),
    "not mirrored": Contender(views=(0, 1)),
    "labels smoothed by 0.1": Contender(smoothing=0.1),
    "labels balanced half": Contender(balance=0.5),
    "no weight decay": Contender(decay=0.0),
    "weight decay 0.3": Contender(decay=0.3),
    "rate 1.5e-3": Contender(options={"gpt_lr": 1.5e-3}),
    "rate 6e-3": Contender(options={"gpt_lr": 6e-3}),
}


class Trial(GPTStage):
    """The stage of a contender."""

    def __init__(
        self, contender: Contender, cache: TokenCache, model: checkpoint.Checkpoint, labels: list[str],
        told: list[int], held_out: list[int], gpt: GPT, options: TrainOptions,
    ):  # fmt: skip
        super().__init__(cache, model.tokenizer, labels, told, held_out, gpt, options, options.gpt_lr)
        self.contender = contender
        self.dataset = TokenWindows(
            only_views(cache, contender.views), balanced(told, cache.labels, contender.balance), self.config,
            options.seed, random_orders=options.random_orders, noise=options.token_noise, label_dropout=LABEL_DROPOUT,
        )  # fmt: skip
        self.learned = TokenWindows(cache, told[:: max(1, len(told) // 260)], self.config, 1, random_orders=1)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return muon(self.modules[name], self.lr, self.contender.decay, TABLES)

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: dict[str, Tensor], progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        logits_BLK = ready["model"](batch["tokens"], batch["positions"], batch["label"])
        loss = F.cross_entropy(
            logits_BLK.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=-1,
            label_smoothing=self.contender.smoothing,
        )  # fmt: skip
        return loss, {"nats": loss}

    def measure(self, model: nn.Module) -> dict[str, float]:
        return super().measure(model) | {"bits_learned": bits_a_token(model, self.learned, 256)}


def only_views(cache: TokenCache, views: tuple[int, ...] | None) -> TokenCache:
    """The cache with no other encodings of each picture than these."""
    if views is None:
        return cache
    numbers = [picture * cache.views + view for picture in range(len(cache)) for view in views]
    return TokenCache(len(views), cache.labels, [cache.shapes[i] for i in numbers], [cache.grids[i] for i in numbers])


def balanced(pictures: list[int], label_of: list[int], power: float) -> list[int]:
    """The pictures, those of rare labels several times: the largest label once, others so that n becomes n ** power in
    proportion."""
    count = Counter(label_of[i] for i in pictures)
    most = max(count.values())
    return [i for i in pictures for _ in range(round((most / count[label_of[i]]) ** (1 - power)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("--manifest")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer is used")
    parser.add_argument("--samples", type=int, default=4800)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--only", nargs="*", choices=[*CONTENDERS], default=[*CONTENDERS])
    args = parser.parse_args()
    keep_freed_memory()
    art, model = ArtFolder(args.art, manifest=args.manifest), checkpoint.load(args.model)
    told, held_out = art.split()
    common = TrainOptions(manifest=args.manifest, views=4, seed=1, patience=1000, quiet=True)
    args.out.mkdir(parents=True, exist_ok=True)
    preset = common.resolved()
    cache, identity = encoded(art, model.tokenizer, preset.cells, common, args.out)
    print("contender | parameters | bits, random order | raster order | random, training pictures | seconds")
    for name in args.only:
        contender = CONTENDERS[name]
        options = replace(common, **contender.options)
        network = replace(preset, **contender.network)
        torch.manual_seed(options.seed)
        gpt = GPT(GPTConfig(
            model.tokenizer.vocab_size, len(art.labels), network.layers, network.width, network.heads,
            cells=network.cells, dropout=options.dropout,
        ))  # fmt: skip
        stage = Trial(contender, cache, model, art.labels, told, held_out, gpt, options)
        folder = args.out / re.sub("[^a-z0-9.-]+", "-", name)
        folder.mkdir(exist_ok=True)
        schedule = Schedule(
            args.samples // preset.gpt_batch, preset.gpt_batch, 60 * options.save_minutes, options.patience,
            options.seed, precision_of(options), quiet=True, looks=2,
        )  # fmt: skip
        learned = run(stage, schedule, folder, {"identity": identity})
        numbers = numbers_of(stage, preset.gpt_batch, folder)
        if not (folder / checkpoint.CONFIG).is_file():
            assert isinstance(learned, GPT)
            checkpoint.save(folder, model.tokenizer, learned, art.labels, {})
        bits = " | ".join(f"{numbers[column]:.3f}" for column in ("bits_random", "bits_raster", "bits_learned"))
        size = sum(p.numel() for p in gpt.parameters()) / 1e6
        print(f"{name} | {size:.1f}M | {bits} | {numbers['seconds']:.0f}", flush=True)


if __name__ == "__main__":
    main()
