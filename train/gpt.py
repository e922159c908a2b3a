"""Stage two: the GPT learns token grids, every sample in a drawing order of its own."""

from __future__ import annotations

import math
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

from .loop import Task
from .muon import muon
from .options import LearningOptions, Preset
from .state import seeded

LABEL_DROPOUT = 0.1  # share of samples without their label, which guidance and unlabelled drawing want
WEIGHT_DECAY = 0.1
TABLES = ("tokens.weight", "labels.weight", "head.weight")  # of the GPT: a row for each token or label
SHEET_SAMPLES, SHEET_SEED = 16, 0


class GPTTask(Task[GPT]):
    """A `loop.Task`: the GPT on cached tokens. `split` are pictures to learn from and held-out ones; the tokenizer only
    paints the sheets."""

    name = "gpt"
    divisible = True

    def __init__(
        self,
        cache: TokenCache,
        split: tuple[list[int], list[int]],
        tokenizer: Tokenizer,
        model: GPT,
        options: LearningOptions,
        lr: float,
    ):
        self.tokenizer, self.lr, self.config = tokenizer, lr, model.config
        self.random_orders = share = options.random_orders
        self.modules: dict[str, nn.Module] = {"model": model}
        about = (model.config, options.seed)
        noise: dict[str, Any] = {"noise": options.token_noise, "label_dropout": LABEL_DROPOUT}
        self.dataset: Dataset[Any] = TokenWindows(cache, split[0], *about, random_orders=share, **noise)
        about, held_out = (model.config, options.seed + 1), split[1] or split[0][:64]
        self.held_out = {
            order: TokenWindows(cache, held_out, *about, random_orders=share)
            for order, share in (("random", 1), ("raster", 0))
        }

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """Muon, and AdamW for what is no matrix."""
        return muon(self.modules[name], self.lr, WEIGHT_DECAY, TABLES)

    def loss(
        self, modules: dict[str, nn.Module], batch: dict[str, Tensor], progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of samples of TokenWindows: `cross_entropy`."""
        targets_BLn = batch["targets"]
        logits_BLnK = modules["model"](batch["cells"], batch["positions"], batch["label"], targets_BLn.clamp(min=0))
        loss = cross_entropy(logits_BLnK, targets_BLn)
        return loss, {"nats": loss}

    def measure(self, model: GPT, progress: float = 1.0) -> dict[str, float]:
        """Bits per token of held-out pictures in random and in raster order, the label given."""
        bits = {}
        for order, windows in self.held_out.items():
            batch = default_collate([windows[i] for i in range(len(windows.pictures))])
            nats_BLn = token_nats(model, batch["cells"], batch["positions"], batch["label"])
            bits[f"bits_{order}"] = float(nats_BLn[batch["targets"] >= 0].mean()) / math.log(2)
        share = self.random_orders
        return bits | {"score": share * bits["bits_random"] + (1 - share) * bits["bits_raster"]}

    @torch.no_grad()
    def sheet(self, model: GPT) -> Image | None:
        """Samples of labels spread over the list, two of each, always from the same seeds."""
        half = SHEET_SAMPLES // 2
        labels_B = torch.tensor([i * self.config.labels // half for i in range(half) for _ in range(2)])  # none: null
        grid = Grids(self.tokenizer.downsample, self.config.cell, self.config.cells).native
        *_, last = sample(model, labels_B, grid, SamplingOptions(), generators(SHEET_SEED, SHEET_SAMPLES))
        device = next(self.tokenizer.parameters(), last.tokens_Bhw).device
        images = self.tokenizer.decode(last.tokens_Bhw.to(device)).float().cpu()
        return to_picture(rearrange(images, "(rows columns) c h w -> c (rows h) (columns w)", columns=8))


def new_gpt(tokenizer: Tokenizer, labels: int, preset: Preset, options: LearningOptions) -> GPT:
    """The GPT that a training starts with: random weights."""
    shape = (tokenizer.vocab_size, labels, preset.layers, preset.width, preset.heads, preset.cell)
    with seeded(options.seed):
        return GPT(GPTConfig(*shape, cells=preset.cells, dropout=options.dropout))


def cross_entropy(logits_BLnK: Tensor, targets_BLn: Tensor) -> Tensor:
    """Mean negative log likelihood in nats over the targets that are not -1."""
    return F.cross_entropy(logits_BLnK.float().flatten(0, 2), targets_BLn.flatten(), ignore_index=-1)
