"""What a user holds: `ImageGPT`, a tokenizer and a GPT that together draw pictures. Seeds, sizes and PIL live here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from tokenizer_vq.base import UserError
from tokenizer_vq.images import fit_cover, to_picture

from . import checkpoint
from .config import DEFAULT_MODEL, SamplingOptions
from .device import pick_device
from .model import GPT
from .sampling import Step, draw, generators
from .sizes import DEFAULT_SIZE, grid_for, parse_size

Size = int | str | tuple[int, int]


class ImageGPT:
    """Draws pictures in the manner of the art it learned from. Make one with `igpt.load`."""

    def __init__(
        self,
        tokenizer: checkpoint.Tokenizer,
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

    @classmethod
    def load(cls, name: str | Path = DEFAULT_MODEL, device: str | None = None) -> ImageGPT:
        """A model folder, an in-the-box name or a Hub id, on `device` (default: the best there is).

        Raises UserError if there is no such model or device, or if the files are damaged.
        """
        target = pick_device(device)
        found = checkpoint.load(name)
        if found.gpt is None:
            raise UserError(f"the model {str(name)!r} has a tokenizer but no GPT yet: train one with `igpt train gpt`")
        return cls(
            found.tokenizer.to(target), found.gpt.to(target), found.labels, name=Path(name).name,
            weights_hash=found.weights_hash, provenance=found.provenance,
        )  # fmt: skip

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder: config.json and model.safetensors (bfloat16)."""
        checkpoint.save(folder, self.tokenizer, self.gpt, self.labels, self.provenance)

    # Drawing pictures

    def generate(
        self,
        n: int = 1,
        size: Size = DEFAULT_SIZE,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Draw n pictures of exactly `size` pixels (256, "640x384" or (640, 384)); picture i has the seed `seed + i`.

        `changes` are fields of SamplingOptions, as in generate(temperature=0.9). Raises UserError on a label, size or
        option that cannot be.
        """
        *_, pictures = self.stream(n, size, label, seed, options, previews=False, **changes)
        return pictures

    def stream(
        self,
        n: int = 1,
        size: Size = DEFAULT_SIZE,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        previews: bool = True,
        **changes: Any,
    ) -> Iterator[list[Image]]:
        """As `generate`, but yields the unfinished pictures after every step (cells not yet drawn are mid-grey)."""
        width, height = parse_size(size)
        options = _changed(options, changes)
        grid = grid_for(width, height, self.downsample, self.native_cells)
        for step in self.stream_tokens(n, grid, label, seed, options):
            done = bool(step.known_Bhw.all())
            if done or previews:
                pictures = self.decode(step.tokens_Bhw, None if done else step.known_Bhw)
                yield [fit_cover(picture, width, height) for picture in pictures]

    def decode(self, tokens_Bhw: Tensor, known_Bhw: Tensor | None = None) -> list[Image]:
        """Pictures of token grids, at the grid's own size in pixels; unknown cells are mid-grey."""
        with torch.inference_mode():
            # One picture at a time: convolutions gain nothing from batches on a CPU, and sums come out the same.
            images = [self.tokenizer.decode(tokens.unsqueeze(0).to(self.device))[0] for tokens in tokens_Bhw]
            if known_Bhw is not None:
                side = self.downsample
                known_BHW = known_Bhw.repeat_interleave(side, 1).repeat_interleave(side, 2).to(self.device)
                images = [image_CHW * known_HW for image_CHW, known_HW in zip(images, known_BHW, strict=True)]
        return [to_picture(image_CHW) for image_CHW in images]

    # Drawing tokens

    def draw_tokens(
        self, n: int, grid: tuple[int, int], label: str | None, seed: int, options: SamplingOptions
    ) -> Tensor:
        """Token grids [n, h, w], int64; grid i has the seed `seed + i`."""
        *_, last = self.stream_tokens(n, grid, label, seed, options)
        return last.tokens_Bhw

    def stream_tokens(
        self,
        n: int,
        grid: tuple[int, int],
        label: str | None,
        seed: int,
        options: SamplingOptions,
        given_Bhw: Tensor | None = None,
        given_hw: Tensor | None = None,
    ) -> Iterator[Step]:
        """Token grids after every step. Cells where the mask `given_hw` is true come from `given_Bhw` unchanged."""
        options.check()
        if n < 1:
            raise UserError(f"{n} pictures were asked for; 1 or more is wanted")
        labels_B = torch.full((n,), self.label_number(label))
        return draw(self.gpt, labels_B, grid, options, generators(seed, n), given_Bhw, given_hw)

    # What it is

    def label_number(self, label: str | None) -> int:
        """Index of a label; None means no label in particular. Raises UserError naming the labels that exist."""
        if label is None:
            return self.gpt.null_label
        if label in self.labels:
            return self.labels.index(label)
        if not self.labels:
            raise UserError(f"the model {self.name!r} was trained without labels, so it has no label {label!r}")
        near = get_close_matches(label, self.labels, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"there is no label {label!r}{hint}; there are {', '.join(self.labels)}")

    @property
    def device(self) -> torch.device:
        return self.gpt.query.device

    @property
    def downsample(self) -> int:
        return self.tokenizer.downsample

    @property
    def native_cells(self) -> int:
        """How many cells the pictures had that the GPT was trained on."""
        return self.gpt.config.cells

    def info(self) -> dict[str, Any]:
        """What the model is, as plain values."""
        return {
            "name": self.name,
            "weights_hash": self.weights_hash,
            "parameters": {
                "gpt": sum(p.numel() for p in self.gpt.parameters()),
                "tokenizer": sum(p.numel() for p in self.tokenizer.parameters()),
            },
            "tokenizer": {"kind": self.tokenizer.kind} | asdict(self.tokenizer.config),
            "gpt": asdict(self.gpt.config),
            "labels": self.labels,
            "provenance": self.provenance,
        }


def _changed(options: SamplingOptions | None, changes: dict[str, Any]) -> SamplingOptions:
    """The options with some of their fields changed. Raises UserError for a field that does not exist."""
    options = options or SamplingOptions()
    if unknown := sorted(set(changes) - set(asdict(options))):
        raise UserError(f"there is no option {unknown[0]!r}; there are {', '.join(asdict(options))}")
    return replace(options, **changes)
