"""Stage two: the GPT learns token grids, every sample in a drawing order of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from igpt.checkpoint import Tokenizer
from igpt.config import GPTConfig, SamplingOptions
from igpt.likelihood import token_nats
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sizes import Grids
from igpt.token_cache import TokenCache, TokenWindows
from tokenizer_vq.images import to_picture

from .muon import muon
from .options import LearningOptions, Preset
from .state import seeded

LABEL_DROPOUT = 0.1  # share of samples without their label, which guidance and unlabelled drawing want
WEIGHT_DECAY = 0.1
TABLES = ("tokens.weight", "labels.weight", "head.weight")  # of the GPT: a row for each token or label
SHOWN, MEASURED = 16, 1024  # pictures on a sheet; held-out pictures
SHEET_SEED = 0


class GPTTask:
    """A `loop.Task`: the GPT on cached tokens. `split` are pictures to learn from and held-out ones; the tokenizer only
    paints the sheets."""

    name = "gpt"
    divisible = True

    def __init__(
        self,
        cache: TokenCache,
        split: tuple[Sequence[int], Sequence[int]],
        tokenizer: Tokenizer,
        model: GPT,
        options: LearningOptions,
        lr: float,
    ):
        self.options, self.tokenizer, self.lr = options, tokenizer, lr
        self.config = config = model.config
        self.modules: dict[str, nn.Module] = {"model": model}
        self.dataset: Dataset[Any] = TokenWindows(
            cache,
            split[0],
            config,
            options.seed,
            random_orders=options.random_orders,
            noise=options.token_noise,
            label_dropout=LABEL_DROPOUT,
        )
        held_out = split[1] or split[0][:64]
        held_out = held_out[:: -(-len(held_out) // MEASURED)]
        self.measured = {
            order: TokenWindows(cache, held_out, config, options.seed + 1, random_orders=share)
            for order, share in (("random", 1), ("raster", 0))
        }

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return muon(self.modules[name], self.lr, WEIGHT_DECAY, TABLES)

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Tensor], progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        targets_BLn = batch["targets"]
        logits_BLnK = modules["model"](batch["cells"], batch["positions"], batch["label"], targets_BLn.clamp(min=0))
        loss = cross_entropy(logits_BLnK, targets_BLn)
        return loss, {"nats": loss}

    def measure(self, model: nn.Module, progress: float = 1.0) -> dict[str, float]:
        """Bits per token of held-out pictures in random and in raster order, the label given."""
        assert isinstance(model, GPT)
        bits = {}
        for order, windows in self.measured.items():
            batch = default_collate([windows[i] for i in range(len(windows.pictures))])
            nats_BLn = token_nats(model, batch["cells"], batch["positions"], batch["label"])
            bits[f"bits_{order}"] = float(nats_BLn[batch["targets"] >= 0].mean()) / math.log(2)
        share = self.options.random_orders
        return bits | {"score": share * bits["bits_random"] + (1 - share) * bits["bits_raster"]}

    def warnings(self, progress: float, metrics: dict[str, float]) -> list[str]:
        return []

    def sheet(self, model: nn.Module) -> Image | None:
        """Samples of labels spread over the list, two of each, always from the same seeds."""
        assert isinstance(model, GPT)
        labels = [i * self.config.labels // (SHOWN // 2) for i in range(SHOWN // 2) for _ in range(2)]  # none: null
        grid = Grids(self.tokenizer.downsample, self.config.cell, self.config.cells).native
        *_, last = sample(model, torch.tensor(labels), grid, SamplingOptions(), generators(SHEET_SEED, SHOWN))
        with torch.no_grad():
            device = next(self.tokenizer.parameters(), last.tokens_Bhw).device
            images = self.tokenizer.decode(last.tokens_Bhw.to(device)).float().cpu()
        return to_picture(rearrange(images, "(rows columns) c h w -> c (rows h) (columns w)", columns=8))


def new_gpt(tokenizer: Tokenizer, labels: int, preset: Preset, options: LearningOptions) -> GPT:
    """The GPT that a training begins with: random weights."""
    with seeded(options.seed):
        return GPT(
            GPTConfig(
                tokenizer.vocab_size,
                labels,
                preset.layers,
                preset.width,
                preset.heads,
                preset.cell,
                cells=preset.cells,
                dropout=options.dropout,
            )
        )


def cross_entropy(logits_BLnK: Tensor, targets_BLn: Tensor) -> Tensor:
    """Mean negative log likelihood in nats over the targets that are not -1."""
    return F.cross_entropy(logits_BLnK.float().flatten(0, 2), targets_BLn.flatten(), ignore_index=-1)
