"""The stage of a fine-tuning: a GPT that can draw already learns a few pictures more, and is watched for copying."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from igpt.checkpoint import Tokenizer
from igpt.config import SamplingOptions
from igpt.lora import add_low_rank, with_labels
from igpt.model import GPT
from igpt.sampling import generators, sample
from igpt.sheet import equal_sheet
from igpt.token_cache import TokenCache, TokenWindows
from tokenizer_vq.images import to_picture

from .gpt import LABEL_DROPOUT, SHEET_SEED, GPTStage, bits_a_token
from .options import TuneOptions
from .plan import REHEARSED, Plan

WATCHED, COMPARED = 48, 24  # windows of validation and of training pictures at every look
BY_HEART = 1.0  # bits a token that training pictures may be easier than unseen ones
SHOWN, QUICK = 4, 16  # pictures on a sheet while it learns, and the steps that draw them
SCANNED = 6  # windows by which the labels of the base are ranked
DRAWN_AT_ONCE = 16

# Windows


def whole_and_square(cache: TokenCache, pictures: Sequence[int], labels: Sequence[int] | None = None) -> TokenCache:
    """The plain views of some pictures, the whole and its middle square, one grid each; with these labels or theirs."""
    labels = labels or [cache.labels[i] for i in pictures]
    places = [i * cache.views + view for i in pictures for view in (0, 1)]
    return TokenCache(
        1, [label for label in labels for _ in (0, 1)], [cache.shapes[p] for p in places],
        [cache.grids[p] for p in places],
    )  # fmt: skip


def bits_of(gpt: nn.Module, plain: TokenCache, seed: int, most: int) -> float:
    """Bits a token of about `most` windows of plain views in random orders: each view equally often."""
    assert isinstance(gpt, GPT)
    count = len(plain) * max(1, most // len(plain)) if len(plain) < most else most
    windows = TokenWindows(plain, list(range(len(plain))), gpt.config, seed + 1, random_orders=1)
    return bits_a_token(gpt, windows, count)


def ranked_labels(gpt: GPT, plain: TokenCache, seed: int) -> list[tuple[float, int]]:
    """All labels of a model and the null label, the one that finds these pictures least surprising first."""
    found = []
    for label in range(gpt.config.labels + 1):
        same = TokenCache(1, [label] * len(plain), plain.shapes, plain.grids)
        found.append((bits_of(gpt, same, seed, SCANNED), label))
    return sorted(found)


# Before it learns


def prepared(base: GPT, starts: Sequence[int], method: str, rank: int, options: TuneOptions) -> GPT:
    """The base with a new label for every one of `starts`, which says whose embedding it begins with."""
    torch.manual_seed(options.seed)
    gpt = with_labels(base, base.labels.weight.detach()[list(starts)])
    for part in gpt.modules():
        if isinstance(part, nn.Dropout):
            part.p = options.dropout
    if method == "lora":
        add_low_rank(gpt, rank)
    return gpt


def rehearsal(gpt: GPT, views: int, seed: int) -> TokenCache:
    """What the base draws of each of its labels, to be learned along (deep generative replay, Shin et al. 2017, arXiv
    1705.08690): one "picture" a label, whose views are REHEARSED drawings again and again."""
    side = math.isqrt(gpt.config.cells)
    faithful = SamplingOptions(guidance=1, autoguidance=1, top_p=1)  # the model as it is, not prettier
    labels = torch.arange(gpt.config.labels).repeat_interleave(REHEARSED)
    grids: list[Tensor] = []
    for first in range(0, len(labels), DRAWN_AT_ONCE):
        part = labels[first : first + DRAWN_AT_ONCE]
        *_, last = sample(gpt, part, (side, side), faithful, generators(seed + first, len(part)))
        grids += list(last.tokens_Bhw.flatten(1).to(torch.uint16))
    numbers = range(gpt.config.labels)
    chosen = [grids[label * REHEARSED + view % REHEARSED] for label in numbers for view in range(views)]
    return TokenCache(views, list(numbers), [(side, side)] * len(chosen), chosen)


def together(
    own: TokenCache, rehearsed: TokenCache, train: Sequence[int], share: float
) -> tuple[TokenCache, list[int]]:
    """Both caches in one, and the pictures of a pass over it: about `share` of them rehearsed."""
    both = TokenCache(
        own.views, own.labels + rehearsed.labels, own.shapes + rehearsed.shapes, own.grids + rehearsed.grids
    )
    others = list(range(len(own), len(both)))
    if not others or not share:
        return own, list(train)
    times = max(1, round(len(others) * (1 - share) / share / len(train)))
    wanted = round(times * len(train) * share / (1 - share))
    return both, list(train) * times + [others[i % len(others)] for i in range(max(1, wanted))]


# While it learns


class TuneStage(GPTStage):
    """A `loop.Stage`: the GPT on the crops of a few pictures, with some of its own drawings between them."""

    name = "finetune"

    def __init__(
        self, cache: TokenCache, tokenizer: Tokenizer, labels: list[str], train: list[int], validation: list[int],
        model: GPT, options: TuneOptions, plan: Plan, rehearsed: TokenCache | None,
    ):  # fmt: skip
        super().__init__(cache, tokenizer, labels, train, validation, model, options, plan.lr)
        both, pictures = cache, train
        if rehearsed is not None:
            both, pictures = together(cache, rehearsed, train, options.rehearse)
        self.dataset = TokenWindows(
            both, pictures, model.config, options.seed, random_orders=options.random_orders,
            noise=options.token_noise, label_dropout=LABEL_DROPOUT,
        )  # fmt: skip
        self.validation = whole_and_square(cache, validation)
        self.training = whole_and_square(cache, train[:: max(1, len(train) // (COMPARED // 2))])
        self.drawn = sorted({cache.labels[i] for i in train})
        self._before = self._bits(model.eval())

    def _bits(self, model: nn.Module) -> dict[str, float]:
        return {
            "bits_validation": bits_of(model, self.validation, self.options.seed, WATCHED),
            "bits_training": bits_of(model, self.training, self.options.seed, COMPARED),
        }

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Bits a token of the validation pictures, and of as many training pictures."""
        bits = self._bits(model)
        return bits | {"score": bits["bits_validation"]}

    def worries(self, progress: float, numbers: dict[str, float]) -> list[str]:
        """Learning by heart, in plain words: training pictures became far easier than unseen ones of the folder."""
        lead = numbers["bits_validation"] - numbers["bits_training"]
        before = self._before["bits_validation"] - self._before["bits_training"]
        if lead - before <= BY_HEART:
            return []
        return [
            f"a token of its training pictures costs it {lead:.1f} bits less than one of the pictures kept for "
            "validation: it begins to learn them by heart and may repeat them; more pictures or fewer --samples help"
        ]

    @torch.no_grad()
    def sheet(self, model: nn.Module) -> Image.Image:
        """A few quick samples of the folder's labels, always from the same seeds."""
        assert isinstance(model, GPT)
        labels = [self.drawn[i % len(self.drawn)] for i in range(SHOWN)]
        side = math.isqrt(self.config.cells)
        pictures = draw_pictures(model, self.tokenizer, labels, (side, side), SHEET_SEED, SamplingOptions(steps=QUICK))
        return equal_sheet([[(picture, "") for picture in pictures]], 128)


@torch.no_grad()
def draw_pictures(
    gpt: GPT, tokenizer: Tokenizer, labels: Sequence[int], grid: tuple[int, int], seed: int,
    options: SamplingOptions | None = None,
) -> list[Image.Image]:  # fmt: skip
    """One picture for each label; picture i is drawn from seed + i."""
    pictures, device = [], next(gpt.parameters()).device
    tokenizer = tokenizer.to(device)
    for first in range(0, len(labels), DRAWN_AT_ONCE):
        labels_B = torch.tensor(labels[first : first + DRAWN_AT_ONCE])
        *_, last = sample(gpt, labels_B, grid, options or SamplingOptions(), generators(seed + first, len(labels_B)))
        for tokens_hw in last.tokens_Bhw:
            pictures.append(to_picture(tokenizer.decode(tokens_hw.unsqueeze(0).to(device))[0].float()))
    return pictures


def write_sheet(path: Path, pictures: list[Image.Image], before: list[Image.Image], after: list[Image.Image]) -> None:
    """Pictures of the folder above what was drawn before and after from the same seeds."""
    side = 160
    tall = round(side * before[0].height / before[0].width)
    names = ("the folder", "before", "after")
    rows = [
        [(p, name if i == 0 else " ") for i, p in enumerate(row)]
        for name, row in zip(names, (pictures, before, after), strict=True)
    ]
    equal_sheet(rows, side, tall).save(path, "JPEG", quality=88)
