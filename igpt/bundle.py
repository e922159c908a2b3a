"""A tokenizer, a GPT and their labels as one: what all drawing stands on. `ImageGPT` is this with doors for users."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from tokenizer_vq.base import UserError, complaint
from tokenizer_vq.images import to_picture

from .checkpoint import Tokenizer
from .config import ANY_LABEL, NO_LABEL, SamplingOptions
from .likelihood import label_nats
from .model import GPT
from .recipe import sampling_options
from .sizes import Grids


class Bundle:
    """A model ready to draw. Raises UserError where tokenizer, GPT and labels do not belong together."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        gpt: GPT,
        labels: Sequence[str] = (),
        *,
        name: str = "unnamed",
        weights_hash: str = "",
        provenance: dict[str, Any] | None = None,
    ):
        if gpt.config.vocab_size != tokenizer.vocab_size or gpt.config.labels != len(labels):
            raise UserError(
                f"the GPT speaks {gpt.config.vocab_size} tokens and {gpt.config.labels} labels, but the tokenizer has "
                f"{tokenizer.vocab_size} tokens and {len(labels)} labels were given; they must agree"
            )
        self.tokenizer, self.gpt, self.labels = tokenizer.eval(), gpt.eval(), list(labels)
        self.name, self.weights_hash, self.provenance = name, weights_hash, provenance or {}
        self.device, self.downsample = gpt.query.device, tokenizer.downsample  # pixels a side of a token
        # New pictures are drawn so many together, and never in batches of fewer rows: on a GPU another number of rows
        # may round otherwise, and a picture shall not depend on what else is drawn with it.
        on_gpu = self.device.type == "cuda"
        large = on_gpu and torch.cuda.get_device_properties(self.device).total_memory > 16e9
        self.at_once = 64 if large else 16  # of the native size, which fit into memory
        self.rows, self.half = self.at_once if on_gpu else 1, on_gpu and gpt.draws_in == torch.bfloat16
        if on_gpu:
            tokenizer.to(memory_format=torch.channels_last)
        self.grids = Grids(self.downsample, gpt.config.cell, gpt.config.cells)  # the token grids on which it draws

    @property
    def sampling(self) -> SamplingOptions:
        """How it draws unless asked otherwise. Raises UserError where its config says what cannot be meant."""
        with complaint(f"the model {self.name!r} has an unknown way of drawing", ValueError, TypeError, AttributeError):
            return sampling_options(self.provenance.get("sampling", {}))

    @torch.inference_mode()
    def decode(self, tokens_Bhw: Tensor, known_Bhw: Tensor | None = None, at: tuple[int, int] = (0, 0)) -> list[Image]:
        """Pictures of token grids, at the grid's own size in pixels; unknown tokens are mid-grey. A window of a larger
        picture says with `at` which row and column its first token has there."""
        pictures: list[Image] = []
        at_once = self.rows  # on a CPU convolutions gain nothing from batches, and sums come out the same
        for first in range(0, len(tokens_Bhw), at_once):
            with torch.autocast("cuda", torch.bfloat16) if self.half else nullcontext():
                images_BCHW = self.tokenizer.decode(tokens_Bhw[first : first + at_once].to(self.device), at)
            if known_Bhw is not None:
                known_BHW = known_Bhw[first : first + at_once].to(self.device).repeat_interleave(self.downsample, 1)
                images_BCHW = images_BCHW * known_BHW.repeat_interleave(self.downsample, 2).unsqueeze(1)
            pictures += map(to_picture, images_BCHW)
        return pictures

    # Labels

    @property
    def default_labels(self) -> list[str]:
        """The labels among which a seed chooses where none is asked for: those that it learned last or draws well."""
        return [label for label in self.provenance.get("default_labels", []) if label in self.labels] or self.labels

    def labels_for(self, label: str | None, seed: int, n: int = 1) -> list[str | None]:
        """The label of each of n pictures: `label`; without one, what the seed of the picture chooses from
        `default_labels`, for ANY_LABEL from all; None for NO_LABEL or where the model has no labels."""
        anything = label == ANY_LABEL and ANY_LABEL not in self.labels
        if not self.labels or not (label is None or anything):
            return [None if self.label_number(label) == self.gpt.null_label else label] * n
        choice = self.labels if anything else self.default_labels
        return [random.Random(f"label/{number}").choice(choice) for number in range(seed, seed + n)]

    def label_numbers(self, labels: Sequence[str | None]) -> Tensor:
        """Indices of labels, [B]. Raises UserError as `label_number` does."""
        return torch.tensor([self.label_number(label) for label in labels])

    def label_number(self, label: str | None) -> int:
        """Index of a label; None, "", NO_LABEL and ANY_LABEL are the null label. Raises UserError naming the labels."""
        if label in self.labels:
            return self.labels.index(label)
        if label in (None, "", NO_LABEL, ANY_LABEL):
            return self.gpt.null_label
        if not self.labels:
            raise UserError(f"the model {self.name!r} was trained without labels, so it has no label {label!r}")
        near = get_close_matches(str(label), self.labels, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"there is no label {label!r}{hint}; there are {', '.join(self.labels)}")

    def guess_label(self, tokens_hw: Tensor, known_hw: Tensor) -> str:
        """Of a model with labels, the one under which some of a picture's known cells are likeliest."""
        return self.labels[int(label_nats(self.gpt, tokens_hw, known_hw)[:-1].argmin())]
