"""What a fine-tuning will do: chosen from the number of pictures, the speed of the machine and the time it may take."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor, nn

from igpt.checkpoint import Tokenizer
from igpt.files import atomic_write
from igpt.model import GPT, cell_positions
from tokenizer_vq.base import UserError

from .collection import Collection
from .gpt import TABLES, cross_entropy
from .muon import muon
from .options import TuneOptions

BATCH, SMALL_BATCH, FEW = 16, 8, 20  # with few pictures, many small steps go further than few large ones
RATES = {"full": 3e-3, "lora": 1e-2}  # peak learning rates; measured in EXPERIMENTS.md
RANKS = ((30, 8), (100, 16), (10**9, 32))  # pictures below which a rank is enough
PASSES = 120  # over every picture, at most
ENCODING = 0.15  # share of the time that goes into crops
FEWEST_VIEWS, MOST_VIEWS = 4, 24
FEWEST_STEPS = 20
REHEARSED = 4  # pictures the base draws for each of its labels
REPAINTING, MOST_REPAINTED = 0.12, 1200  # share of the time that goes into the decoder, and its crops at most
A_CROP = 0.8  # time in which the decoder learns from a crop, over that of a sample for the GPT

# Time that the rest takes, in units of a training step of 16 samples (two CPU cores, 256 cells, VQ of 17 GFLOP)
A_FORWARD = 0.33 / 16
A_LOOK, LOOKS = 2.5, 20
A_DRAWING = 0.25  # one picture, drawn and decoded
A_REHEARSAL = 0.1  # one picture, drawn only
DRAWN = 48  # pictures for sheets and the copy check


ViewOf = Callable[[Image, int, int], Tensor]  # a picture, its number, the number of the view


class Speeds(NamedTuple):
    """What this machine does in a second."""

    crops: float  # cut and encoded
    samples: float  # learned from


@dataclass(frozen=True)
class Plan:
    """Everything that was chosen. `seconds` is the estimate of the whole."""

    method: str
    rank: int
    flip: bool
    views: int
    samples: int
    batch: int
    lr: float
    decoder_crops: int
    seconds: float

    def sentences(self, collection: Collection, speeds: Speeds) -> list[str]:
        """What is going to be done and why, in plain words."""
        n, side = len(collection.train), "mirrored at random" if self.flip else "not mirrored"
        why = "" if self.flip else ": left and right differ in the same way in all of them"
        what = f"additions of rank {self.rank} to its weights (LoRA)" if self.method == "lora" else "all its weights"
        decoder = f"; then the decoder from {self.decoder_crops:,} crops" if self.decoder_crops else ""
        return [
            f"{self.views} crops of each picture, {side}{why}",
            f"the GPT learns {what}: {self.samples:,} samples, {self.samples / n:.0f} a picture, {self.batch} at once, "
            f"at a rate of {self.lr:g}{decoder}",
            f"this machine encodes {speeds.crops:.0f} crops and learns from {speeds.samples:.1f} samples a second: "
            f"about {_minutes(self.seconds)} in all, less if it stops learning anything new before",
        ]

    def save(self, path: Path) -> None:
        """Raises UserError where the disk refuses."""
        try:
            with atomic_write(path) as beside:
                beside.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")
        except OSError as error:
            raise UserError(f"the plan cannot be written to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Raises UserError for a damaged plan."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged; delete it to go on, or use another --out") from error


def choose(
    options: TuneOptions, collection: Collection, speeds: Speeds, *, labels: int, largest_rank: int
) -> Plan:
    """The plan for a collection on a machine. `labels` are those of the base. What the options say stays as said."""
    n = len(collection.train)
    wanted = options.rank or next(rank for below, rank in RANKS if n < below)
    rank = min(wanted, largest_rank) if options.adapter else wanted
    if options.rank and rank < wanted:
        raise UserError(f"--rank {wanted} makes an adapter of more than 4 MB; {rank} is the most for this base")
    batch = options.batch or (BATCH if n >= FEW else SMALL_BATCH)
    pictures = n + len(collection.validation)
    seconds = 60 * options.minutes
    fitting = int(ENCODING * seconds * speeds.crops / pictures)
    views = max(2, options.views or min(MOST_VIEWS, max(FEWEST_VIEWS, fitting)))
    step = BATCH / speeds.samples
    new = len(collection.art.labels)
    overhead = pictures * views / speeds.crops + 3 * min(n, 300) / speeds.crops
    overhead += step * (A_FORWARD * (labels * (6 + 2 * max(new, 4)) + 500) + A_LOOK * LOOKS + A_DRAWING * DRAWN)
    overhead += step * A_REHEARSAL * REHEARSED * labels * (options.rehearse > 0)
    decoder_crops = options.decoder_crops
    if decoder_crops is None:
        fitting = int(REPAINTING * seconds * speeds.samples / A_CROP)
        decoder_crops = 0 if options.adapter else min(MOST_REPAINTED, fitting) // batch * batch
    overhead += decoder_crops * A_CROP / speeds.samples
    samples = options.samples or int(min(PASSES * n, max(0.0, seconds - overhead) * speeds.samples))
    samples = max(1 if options.samples else FEWEST_STEPS, samples // batch) * batch
    return Plan(
        options.method, rank, collection.flip_is_wise if options.flip is None else options.flip, views, samples, batch,
        options.lr or RATES[options.method], decoder_crops, overhead + samples / speeds.samples,
    )  # fmt: skip


def measure_speeds(
    gpt: GPT, tokenizer: Tokenizer, pictures: list[Image], view: ViewOf, *, device: torch.device, bf16: bool
) -> Speeds:
    """Encodes a few crops and takes a few steps that are thrown away."""
    def encode(i: int) -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokenizer.encode(view(pictures[i % len(pictures)], i, i).unsqueeze(0).to(device)).cpu()

    model, cells = copy.deepcopy(gpt).to(device).train(), gpt.config.cells
    optimizer = muon(model, 1e-9, 0.0, TABLES)
    side = int(cells**0.5)
    positions_BL2 = cell_positions(side, side, True).expand(BATCH, -1, -1).to(device)
    tokens_BL = torch.randint(gpt.config.vocab_size, (BATCH, side * side), generator=torch.Generator().manual_seed(0))

    def step(_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = cross_entropy(
                model(tokens_BL.to(device), positions_BL2, tokens_BL[:, 0].to(device) * 0), tokens_BL.to(device)
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for a GPU

    return Speeds(1 / _time_of(encode, 6), BATCH / _time_of(step, 3))


def _time_of(work: Callable[[int], None], times: int) -> float:
    """Seconds that `work` takes once it is warm."""
    work(0)
    began = time.perf_counter()
    for i in range(1, times):
        work(i)
    return max(1e-6, (time.perf_counter() - began) / (times - 1))


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
