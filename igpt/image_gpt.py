"""What a user holds: `ImageGPT`, a tokenizer and a GPT that together draw pictures. Seeds, sizes and PIL live here."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from tokenizer_vq.base import UserError
from tokenizer_vq.images import to_picture

from . import checkpoint
from .config import (
    ANCHORS,
    ANY_LABEL,
    DEFAULT_KEEP,
    DEFAULT_MIX,
    DEFAULT_MODEL,
    DEFAULT_STRENGTH,
    NO_LABEL,
    SamplingOptions,
)
from .device import fast_bf16, pick_device
from .likelihood import label_nats
from .model import GPT
from .sampling import Step, draw, generators
from .siblings import sibling
from .sizes import Grids, parse_size

Size = int | str | tuple[int, int]
Picture = str | Path | Image  # to edit; a file made by the same model brings its exact tokens along
BATCH = 16  # pictures drawn at once, so that any number fits into memory; a picture is the same in any batch


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
    def load(
        cls, name: str | Path = DEFAULT_MODEL, device: str | None = None, *, adapter: str | Path | None = None,
        bf16: bool | None = None,
    ) -> ImageGPT:  # fmt: skip
        """A model folder, an in-the-box name or a Hub id, on `device` (default: the best there is), with an adapter.

        On a CPU it draws in bfloat16 or float32 (default: bfloat16 where the hardware has it). Raises UserError if
        there is no such model or device, if files are damaged or the adapter is of another model.
        """
        target = pick_device(device)
        found = checkpoint.load(name)
        if found.gpt is None:
            raise UserError(f"the model {str(name)!r} has a tokenizer but no GPT yet: train one with `igpt train gpt`")
        if adapter is not None:
            from .lora import with_adapter

            file = Path(adapter).expanduser()
            found = with_adapter(found, file)
            name = file.absolute().parent if file.name == checkpoint.ADAPTER else file.stem
        assert found.gpt is not None
        if fast_bf16(target) if bf16 is None else bf16:
            found.gpt.draw_in(torch.bfloat16)
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
        size: Size | None = None,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        tile: bool = False,
        **changes: Any,
    ) -> list[Image]:
        """Draw n pictures of exactly `size` pixels (256, "640x384" or (640, 384); default: the model's native size);
        picture i has the seed `seed + i`.

        Without a label each seed chooses one that the model draws well; "any" chooses among all, "none" draws without.
        With `tile` they are textures that wrap in both directions. `changes` are fields of SamplingOptions, as in
        generate(temperature=0.9). Raises UserError on a label, size or option that cannot be.
        """
        self._check(n, label, _changed(options, changes))
        pictures: list[Image] = []
        for start in range(0, n, BATCH):
            count = min(BATCH, n - start)
            *_, drawn = self.stream(count, size, label, seed + start, options, tile, previews=False, **changes)
            pictures += drawn
        return pictures

    def stream(
        self,
        n: int = 1,
        size: Size | None = None,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        tile: bool = False,
        previews: bool = True,
        **changes: Any,
    ) -> Iterator[list[Image]]:
        """As `generate`, but yields the unfinished pictures after every step (cells not yet drawn are mid-grey).

        Larger pictures than the model composes, and textures, show again and again while they are refined.
        """
        options = _changed(options, changes)
        self._check(n, label, options)
        canvas = sibling("generate.canvas")
        yield from canvas.pictures(self, n, self.size(size), label, seed, options, tile, previews)

    # Editing pictures

    def complete(
        self, picture: Picture, keep: str | float = DEFAULT_KEEP, *, n: int = 1, label: str | None = None,
        seed: int = 0, options: SamplingOptions | None = None, **changes: Any,
    ) -> list[Image]:  # fmt: skip
        """Keep one half of a picture (top, bottom, left, right), or that share from the top, and draw the rest n times.

        As with every edit, pixels outside what is drawn stay exactly as they are. The label, unless one is given, is
        that of the picture's recipe, or the one that fits best to what is kept.
        """
        edit = sibling("generate.edit")
        return self._edited(edit.complete(edit.open_source(self, picture), keep), n, label, seed, options, changes)

    def inpaint(
        self, picture: Picture, mask: Picture, *, n: int = 1, label: str | None = None, seed: int = 0,
        options: SamplingOptions | None = None, **changes: Any,
    ) -> list[Image]:  # fmt: skip
        """Draw a picture anew where the mask, of the same size, is white."""
        edit = sibling("generate.edit")
        asked = edit.inpaint(edit.open_source(self, picture), edit.open_source(self, mask))
        return self._edited(asked, n, label, seed, options, changes)

    def extend(
        self, picture: Picture, size: Size, anchor: str = ANCHORS[0], *, n: int = 1, label: str | None = None,
        seed: int = 0, options: SamplingOptions | None = None, **changes: Any,
    ) -> list[Image]:  # fmt: skip
        """Draw around a picture until it has the size; `anchor` (as "left", "top-right") is where the picture stays."""
        edit = sibling("generate.edit")
        asked = edit.extend(edit.open_source(self, picture), parse_size(size), anchor, self.downsample)
        return self._edited(asked, n, label, seed, options, changes)

    def vary(
        self, picture: Picture, strength: float = DEFAULT_STRENGTH, *, n: int = 1, label: str | None = None,
        seed: int = 0, options: SamplingOptions | None = None, **changes: Any,
    ) -> list[Image]:  # fmt: skip
        """Draw that share of a picture's tokens anew: 0 leaves it as it is, 1 leaves nothing of it."""
        edit = sibling("generate.edit")
        asked = edit.vary(self, edit.open_source(self, picture), strength)
        return self._edited(asked, n, label, seed, options, changes)

    def blend(
        self, a: Picture, b: Picture, mix: float = DEFAULT_MIX, *, n: int = 1, label: str | None = None, seed: int = 0,
        options: SamplingOptions | None = None, **changes: Any,
    ) -> list[Image]:  # fmt: skip
        """Draw parts of two pictures into one of the size of A, with new passages between; `mix` is the share of B."""
        edit = sibling("generate.edit")
        asked = edit.blend(self, edit.open_source(self, a), edit.open_source(self, b), mix)
        return self._edited(asked, n, label, seed, options, changes)

    def _edited(
        self, edit: Any, n: int, label: str | None, seed: int, options: SamplingOptions | None, changes: dict[str, Any]
    ) -> list[Image]:
        options = _changed(options, changes)
        self._check(n, label, options)
        pictures: list[Image] = sibling("generate.edit").edited(self, edit, n, label, seed, options)
        return pictures

    # Painting and drawing tokens

    def decode(self, tokens_Bhw: Tensor, known_Bhw: Tensor | None = None, at: tuple[int, int] = (0, 0)) -> list[Image]:
        """Pictures of token grids, at the grid's own size in pixels; unknown cells are mid-grey. A window of a larger
        picture says with `at` which row and column its first token has there."""
        with torch.inference_mode():
            # One picture at a time: convolutions gain nothing from batches on a CPU, and sums come out the same.
            images = [self.tokenizer.decode(tokens.unsqueeze(0).to(self.device), at)[0] for tokens in tokens_Bhw]
            if known_Bhw is not None:
                side = self.downsample
                known_BHW = known_Bhw.repeat_interleave(side, 1).repeat_interleave(side, 2).to(self.device)
                images = [image_CHW * known_HW for image_CHW, known_HW in zip(images, known_BHW, strict=True)]
        return [to_picture(image_CHW) for image_CHW in images]

    def draw_tokens(
        self, n: int, grid: tuple[int, int], label: str | None, seed: int, options: SamplingOptions
    ) -> Tensor:
        """Token grids [n, h, w], int64; grid i has the seed `seed + i`. The label is as in `generate`."""
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
        self._check(n, label, options)
        labels_B = self.label_numbers(self.labels_for(label, seed, n))
        return draw(self.gpt, labels_B, grid, options, generators(seed, n), given_Bhw, given_hw)

    def _check(self, n: int, label: str | None, options: SamplingOptions) -> None:
        """Raises UserError on what cannot be meant, before anything is drawn."""
        options.check()
        self.label_number(label)
        if n < 1:
            raise UserError(f"{n} pictures were asked for; 1 or more is wanted")

    # Labels

    def labels_for(self, label: str | None, seed: int, n: int = 1) -> list[str | None]:
        """What n pictures are drawn as: of `label`; without one, of a label that the seed of each chooses from those
        that the model draws well, for ANY_LABEL from all; of none in particular (None) for NO_LABEL or where the model
        has none."""
        anything = label == ANY_LABEL and ANY_LABEL not in self.labels
        if not self.labels or not (label is None or anything):
            return [None if self.label_number(label) == self.gpt.null_label else label] * n
        choice = self.labels if anything else self.default_labels
        return [random.Random(f"label/{number}").choice(choice) for number in range(seed, seed + n)]

    def guess_label(self, tokens_hw: Tensor, known_hw: Tensor) -> str:
        """The label under which the model finds some of a picture's known cells least surprising. The same every time.
        Raises UserError where it has no labels."""
        if not self.labels:
            raise UserError(f"the model {self.name!r} was trained without labels, so none can be guessed")
        return self.labels[int(label_nats(self.gpt, tokens_hw, known_hw)[:-1].argmin())]

    def label_numbers(self, labels: Sequence[str | None]) -> Tensor:
        """Indices of labels, [B]. Raises UserError as `label_number` does."""
        return torch.tensor([self.label_number(label) for label in labels])

    def label_number(self, label: str | None) -> int:
        """Index of a label; None, NO_LABEL and ANY_LABEL mean none in particular. Raises UserError naming the labels
        there are."""
        if label in self.labels:
            return self.labels.index(label)
        if label in (None, NO_LABEL, ANY_LABEL):
            return self.gpt.null_label
        if not self.labels:
            raise UserError(f"the model {self.name!r} was trained without labels, so it has no label {label!r}")
        near = get_close_matches(label, self.labels, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"there is no label {label!r}{hint}; there are {', '.join(self.labels)}")

    # What it is

    @property
    def device(self) -> torch.device:
        return self.gpt.query.device

    @property
    def downsample(self) -> int:
        return self.tokenizer.downsample

    @property
    def grids(self) -> Grids:
        """The token grids on which it draws."""
        return Grids(self.downsample, self.gpt.config.cell, self.gpt.config.cells)

    @property
    def default_labels(self) -> list[str]:
        """The labels among which a seed chooses where none is asked for: those that it learned last or draws well."""
        return [label for label in self.provenance.get("default_labels", []) if label in self.labels] or self.labels

    def size(self, size: Size | None) -> tuple[int, int]:
        """Width and height of what is asked for, or of the model's native pictures. Raises UserError as parse_size."""
        return self.grids.native_size if size is None else parse_size(size)

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
