"""What a user holds: `ImageGPT`, a model that draws and edits pictures. Seeds, sizes and PIL live here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from tokenizer_vq.base import UserError

from . import checkpoint, edit
from .bundle import Bundle
from .canvas import PartialGrid, generate_grids, now_and_then, preview
from .config import ANCHORS, DEFAULT_KEEP, DEFAULT_MIX, DEFAULT_MODEL, DEFAULT_STRENGTH, SamplingOptions
from .device import fast_bf16, pick_device
from .edit import Edit, Picture
from .fitting import Canvas, canvas_for, finish
from .sampling import generators
from .sizes import parse_size

Size = int | str | tuple[int, int]
BATCH = 16  # pictures drawn at once, so that any number fits into memory; a picture is the same in any batch


class ImageGPT(Bundle):
    """Draws pictures in the manner of the art it learned from. Make one with `igpt.load`."""

    @classmethod
    def load(
        cls,
        name: str | Path = DEFAULT_MODEL,
        device: str | None = None,
        *,
        adapter: str | Path | None = None,
        bf16: bool | None = None,
    ) -> ImageGPT:
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
            found.tokenizer.to(target),
            found.gpt.to(target),
            found.labels,
            name=Path(name).name,
            weights_hash=found.weights_hash,
            provenance=found.provenance,
        )

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder: config.json and model.safetensors."""
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
        self._check(n, label, self._options(options, changes))
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
        *,
        previews: bool = True,
        **changes: Any,
    ) -> Iterator[list[Image]]:
        """As `generate`, but yields the unfinished pictures after every step (what is not yet drawn is mid-grey).

        Larger pictures than the model composes, and textures, show again and again while they are refined.
        """
        options = self._options(options, changes)
        self._check(n, label, options)
        labels_B = self.label_numbers(self.labels_for(label, seed, n))
        canvas = canvas_for(self, self.size(size), tile)
        frames = generate_grids(self, canvas, labels_B, generators(seed, n), options)
        return self._shown(frames, canvas, previews)

    def _shown(self, frames: Iterator[list[PartialGrid]], canvas: Canvas, previews: bool) -> Iterator[list[Image]]:
        """The pictures of grids on their way, or with previews off only the finished ones."""
        if previews:
            for grids in now_and_then(frames, canvas):
                yield [preview(self, grid, canvas) for grid in grids]
        else:
            *_, grids = frames
            yield [finish(self, grid.tokens_hw, canvas) for grid in grids]

    def size(self, size: Size | None) -> tuple[int, int]:
        """Width and height of what is asked for, or of the model's native pictures. Raises UserError as parse_size."""
        return self.grids.native_size if size is None else parse_size(size)

    # Editing pictures

    def complete(
        self,
        picture: Picture,
        keep: str | float = DEFAULT_KEEP,
        *,
        n: int = 1,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Keep one half of a picture (top, bottom, left, right), or that share from the top, and draw the rest n times.

        As with every edit, pixels outside what is drawn stay exactly as they are. The label, unless one is given, is
        that of the picture's recipe, or the one that fits best to what is kept.
        """
        return self._edited(edit.complete(edit.open_source(self, picture), keep), n, label, seed, options, changes)

    def inpaint(
        self,
        picture: Picture,
        mask: Picture,
        *,
        n: int = 1,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Draw a picture anew where the mask, of the same size, is white."""
        asked = edit.inpaint(edit.open_source(self, picture), edit.open_source(self, mask))
        return self._edited(asked, n, label, seed, options, changes)

    def extend(
        self,
        picture: Picture,
        size: Size,
        anchor: str = ANCHORS[0],
        *,
        n: int = 1,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Draw around a picture until it has the size; `anchor` (as "left", "top-right") is where the picture stays."""
        asked = edit.extend(edit.open_source(self, picture), parse_size(size), anchor, self.downsample)
        return self._edited(asked, n, label, seed, options, changes)

    def vary(
        self,
        picture: Picture,
        strength: float = DEFAULT_STRENGTH,
        *,
        n: int = 1,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Draw that share of a picture's cells anew: 0 leaves it as it is, 1 leaves nothing of it."""
        asked = edit.vary(self, edit.open_source(self, picture), strength)
        return self._edited(asked, n, label, seed, options, changes)

    def blend(
        self,
        a: Picture,
        b: Picture,
        mix: float = DEFAULT_MIX,
        *,
        n: int = 1,
        label: str | None = None,
        seed: int = 0,
        options: SamplingOptions | None = None,
        **changes: Any,
    ) -> list[Image]:
        """Draw parts of two pictures into one of the size of A, with new passages between; `mix` is the share of B."""
        asked = edit.blend(self, edit.open_source(self, a), edit.open_source(self, b), mix)
        return self._edited(asked, n, label, seed, options, changes)

    def _edited(
        self,
        asked: Edit,
        n: int,
        label: str | None,
        seed: int,
        options: SamplingOptions | None,
        changes: dict[str, Any],
    ) -> list[Image]:
        options = self._options(options, changes)
        self._check(n, label, options)
        return edit.edited(self, asked, n, label, seed, options)

    def _options(self, options: SamplingOptions | None, changes: dict[str, Any]) -> SamplingOptions:
        """The options, or the model's own, with some of their fields changed. Raises UserError for a field that does
        not exist."""
        options = options or self.sampling
        if unknown := sorted(set(changes) - set(asdict(options))):
            raise UserError(f"there is no option {unknown[0]!r}; there are {', '.join(asdict(options))}")
        return replace(options, **changes)

    def _check(self, n: int, label: str | None, options: SamplingOptions) -> None:
        """Raises UserError on what cannot be meant, before anything is drawn."""
        options.check()
        self.label_number(label)
        if n < 1:
            raise UserError(f"{n} pictures were asked for; 1 or more is wanted")

    # What it is

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
