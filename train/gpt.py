"""Stage two, and fine-tuning: the GPT learns token grids, every sample in a drawing order of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from igpt.checkpoint import Tokenizer
from igpt.config import GPTConfig, SamplingOptions
from igpt.likelihood import bits_per_token, token_nats
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sizes import Grids
from tokenizer_vq.images import to_picture

from .folder import Run
from .loop import Task
from .muon import muon
from .options import LearningOptions, Preset
from .processes import shared_out, total
from .shards import TokenShards
from .state import seeded
from .tokens import TokenWindows, Views, Window

LABEL_DROPOUT = 0.1  # share of samples without their label, which guidance and unlabelled drawing want
WEIGHT_DECAY = 0.1
TABLES = ("tokens.weight", "labels.weight", "head.weight")  # of the GPT: a row for each token or label
SHEET_SAMPLES, SHEET_SEED = 16, 0
MEASURED_GRIDS = 1024  # held-out ones, at most
LEARNED_GRIDS = 64  # that are measured where none is held out
SHEETS_TIME = 0.03  # share of the time of a fine-tuning


class GPTLoss(nn.Module):
    """A GPT and its loss in one, so that where it is compiled no memory ever holds its logits in float32."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, cells_BLn: Tensor, positions_BL2: Tensor, labels_B: Tensor, targets_BLn: Tensor) -> Tensor:
        """Of samples of TokenWindows; the target of what is not asked for is -1."""
        return cross_entropy(self.model(cells_BLn, positions_BL2, labels_B, targets_BLn.clamp(min=0)), targets_BLn)


class GPTTask(Task[GPT]):
    """A `loop.Task`: the GPT on cached tokens. The tokenizer only paints the sheets."""

    name = "gpt"
    divisible = True

    def __init__(self, run: Run[Any], cache: TokenShards | Views, tokenizer: Tokenizer, model: GPT, lr: float):
        self.tokenizer, self.lr, self.config = tokenizer, lr, model.config
        options = run.options
        self.modules: dict[str, nn.Module] = {"model": model}
        self.stages: Sequence[nn.Module] = [GPTLoss(model)]
        self.dataset: Dataset[Any] = TokenWindows(
            cache, run.train, model.config, options.seed, options.token_noise, LABEL_DROPOUT
        )
        held_out = run.val or run.train[:LEARNED_GRIDS]
        held_out = held_out[:: -(-len(held_out) // MEASURED_GRIDS)]
        self.held_out = TokenWindows(cache, held_out, model.config, options.seed + 1)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """Muon, and AdamW for what is no matrix."""
        return muon(self.modules[name], self.lr, WEIGHT_DECAY, TABLES)

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """How many tokens are asked for."""
        return (batch["targets"] >= 0).sum()

    def loss(
        self, batch: dict[str, Tensor], progress: float, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of samples of TokenWindows: `cross_entropy`."""
        loss = self.stages[0](batch["cells"], batch["positions"], batch["label"], batch["targets"])
        return loss, {"nats": loss}

    def measure(self, model: GPT, progress: float = 1.0) -> dict[str, float]:
        """Bits a token of held-out pictures, the label given."""
        sums = torch.zeros(2, dtype=torch.float64)  # of nats, and how many
        if numbers := shared_out(range(len(self.held_out.pictures))):
            batch = default_collate([self.held_out[i] for i in numbers])
            nats_BLn = token_nats(model, batch["cells"], batch["positions"], batch["label"]).cpu()
            asked_BLn = batch["targets"] >= 0
            sums += torch.stack([nats_BLn[asked_BLn].double().sum(), asked_BLn.sum()])
        nats, count = total(sums).tolist()
        bits = nats / count / math.log(2)
        return {"bits": bits, "score": bits}

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


class TuneTask(GPTTask):
    """A `loop.Task`: the GPT on the views of a few pictures. Its score is bits a token of validation windows.

    By AdamW: orthogonal steps (Muon) cost as much as five grids, and so few steps gain nothing from them.
    """

    name = "finetune"

    def __init__(self, views: Views, model: GPT, draw: Callable[[GPT], Image]):
        super().__init__(views.run, views, views.model.tokenizer, model, views.run.options.peak_lr)
        self.windows: list[Window] = []  # of validation pictures, as many as there will be time for
        self.draw, self.started, self.drawing_seconds = draw, time.monotonic(), 0.0

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """AdamW, with weight decay for matrices that are no tables."""
        learning = {key: p for key, p in self.modules[name].named_parameters() if p.requires_grad}
        decayed = [p for key, p in learning.items() if p.dim() == 2 and key not in TABLES]
        others = [p for key, p in learning.items() if p.dim() != 2 or key in TABLES]
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def measure(self, model: GPT, progress: float = 1.0) -> dict[str, float]:
        """Bits a token of the validation windows."""
        bits = bits_of(model, self.windows)
        return {"bits": bits, "score": bits}

    def sheet(self, model: GPT) -> Image | None:
        """What it draws by now; none where sheets have had their share of the time, in which more could be learned."""
        start = time.monotonic()
        if self.drawing_seconds > SHEETS_TIME * (start - self.started):
            return None
        picture = self.draw(model)
        self.drawing_seconds += time.monotonic() - start
        return picture


def new_gpt(tokenizer: Tokenizer, labels: int, preset: Preset, options: LearningOptions) -> GPT:
    """The GPT that a training starts with: random weights."""
    shape = (tokenizer.vocab_size, labels, preset.layers, preset.width, preset.heads, preset.cell)
    with seeded(options.seed):
        return GPT(GPTConfig(*shape, cells=preset.cells, dropout=options.dropout))


def cross_entropy(logits_BLnK: Tensor, targets_BLn: Tensor) -> Tensor:
    """Mean negative log likelihood in nats over the targets that are not -1."""
    return F.cross_entropy(logits_BLnK.float().flatten(0, 2), targets_BLn.flatten(), ignore_index=-1)


def bits_of(gpt: GPT, windows: Sequence[Window]) -> float:
    """Mean bits a token of grids of any shapes under their labels, in random orders that are the same every time."""
    bits = []
    for shape in dict.fromkeys(grid_hw.shape for grid_hw, _ in windows):
        grids, labels = zip(*((grid_hw, label) for grid_hw, label in windows if grid_hw.shape == shape), strict=True)
        bits.append(bits_per_token(gpt, torch.stack(grids), torch.tensor(labels)).flatten())
    return float(torch.cat(bits).mean())
