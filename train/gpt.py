"""Stage two: the GPT learns the token grids, every sample in a drawing order of its own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from igpt.checkpoint import Tokenizer
from igpt.config import GPTConfig, SamplingOptions
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sizes import Grids
from igpt.token_cache import TokenCache, TokenWindows
from tokenizer_vq.images import to_picture

from .muon import muon
from .options import LearningOptions, Preset, TrainOptions

LABEL_DROPOUT = 0.1  # how often the label is withheld, so that guidance and unlabelled drawing work
WEIGHT_DECAY = 0.1
TABLES = ("tokens.weight", "labels.weight", "head.weight")  # of the GPT: a row for each token or label
SHOWN = 16
SHEET_SEED = 0


class GPTStage:
    """A `loop.Stage`: the GPT on cached tokens. The tokenizer only paints the sheets."""

    name = "gpt"
    divisible = True

    def __init__(
        self, cache: TokenCache, tokenizer: Tokenizer, labels: list[str], train: list[int], held_out: list[int],
        model: GPT, options: LearningOptions, lr: float,
    ):  # fmt: skip
        self.options, self.tokenizer, self.labels, self.lr = options, tokenizer, labels, lr
        self.config = config = model.config
        self.modules: dict[str, nn.Module] = {"model": model}
        self.dataset: Dataset[Any] = TokenWindows(
            cache, train, config, options.seed, random_orders=options.random_orders, noise=options.token_noise,
            label_dropout=LABEL_DROPOUT,
        )  # fmt: skip
        judged = held_out or train[:64]
        self.judged = len(judged)
        self.measured = {
            "random": TokenWindows(cache, judged, config, options.seed + 1, random_orders=1),
            "raster": TokenWindows(cache, judged, config, options.seed + 1, random_orders=0),
        }

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        return muon(self.modules[name], self.lr, WEIGHT_DECAY, TABLES)

    def turns(self, progress: float) -> list[str]:
        return ["model"]

    def loss(
        self, turn: str, ready: dict[str, nn.Module], batch: dict[str, Tensor], progress: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        targets_BLn = batch["targets"]
        logits_BLnK = ready["model"](batch["cells"], batch["positions"], batch["label"], targets_BLn.clamp(min=0))
        loss = cross_entropy(logits_BLnK, targets_BLn)
        return loss, {"nats": loss}

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Bits per token on held-out pictures in random and in raster order, the label given."""
        bits = {
            f"bits_{order}": bits_a_token(model, dataset, self.judged) for order, dataset in self.measured.items()
        }
        mixture = self.options.random_orders
        return bits | {"score": mixture * bits["bits_random"] + (1 - mixture) * bits["bits_raster"]}

    def worries(self, progress: float, numbers: dict[str, float]) -> list[str]:
        return []

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image:
        """Samples of labels spread over the list, two of each, always from the same seeds."""
        assert isinstance(model, GPT)
        numbers = [i * max(1, len(self.labels)) // (SHOWN // 2) for i in range(SHOWN // 2) for _ in range(2)]
        grid = Grids(self.tokenizer.downsample, self.config.cell, self.config.cells).native
        labels_B = torch.tensor(numbers) if self.labels else torch.full((SHOWN,), model.null_label)
        *_, last = sample(model, labels_B, grid, SamplingOptions(), generators(SHEET_SEED, SHOWN))
        device = next(self.tokenizer.parameters(), last.tokens_Bhw).device
        images = self.tokenizer.decode(last.tokens_Bhw.to(device)).float().cpu()
        return to_picture(rearrange(images, "(rows columns) c h w -> c (rows h) (columns w)", columns=8))


def new_gpt(tokenizer: Tokenizer, labels: int, preset: Preset, options: TrainOptions) -> GPT:
    """The GPT that a training begins with: random weights."""
    torch.manual_seed(options.seed)
    return GPT(GPTConfig(
        tokenizer.vocab_size, labels, preset.layers, preset.width, preset.heads, preset.cell,
        cells=preset.cells, dropout=options.dropout,
    ))  # fmt: skip


@torch.no_grad()
def bits_a_token(model: nn.Module, windows: TokenWindows, count: int) -> float:
    """Mean bits per token of the first `count` windows."""
    device, total, tokens = next(model.parameters()).device, 0.0, 0
    for batch in DataLoader(windows, batch_size=16, sampler=range(count)):
        batch = {key: value.to(device) for key, value in batch.items()}
        here = int((batch["targets"] >= 0).sum())
        logits_BLnK = model(batch["cells"], batch["positions"], batch["label"])
        total += float(cross_entropy(logits_BLnK, batch["targets"])) * here
        tokens += here
    return total / tokens / math.log(2)


def cross_entropy(logits_BLnK: Tensor, targets_BLn: Tensor) -> Tensor:
    """Mean negative log likelihood in nats over the targets that are not -1."""
    return F.cross_entropy(logits_BLnK.float().flatten(0, 2), targets_BLn.flatten(), ignore_index=-1)
