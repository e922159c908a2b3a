"""What a user holds: `ImageGPT`, a model that draws and edits pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL.Image import Image

from tokenizer_vq.base import MAX_PIXELS, UserError
from tokenizer_vq.palette import PaletteConfig

from . import checkpoint, config, edit
from .bundle import Bundle
from .canvas import Batch, Task
from .config import ANCHORS, AS_DRAWN, SamplingOptions, SpriteOptions
from .device import fast_bf16, own_settings, pick_device
from .edit import Picture
from .fitting import Inpainting, canvas_for, on_grid
from .recipe import CHUNK, check_seeds
from .sizes import Size, parse_size
from .sprites import colours_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

SPRITES = ("scale", "ground", "palette")  # of DrawArguments, those for palette models


class DrawArguments(TypedDict, total=False):
    """What all that draws can be asked for by name. `steps` to `order` are fields of SamplingOptions; `scale`, `ground`
    ("transparent" or "keep") and `palette` (a .gpl or .hex file) are for models of which a token is a pixel."""

    label: str | None
    seed: int
    options: SamplingOptions | None
    steps: int
    temperature: float
    top_k: int
    top_p: float
    guidance: float
    order: str
    scale: int
    ground: str
    palette: str | Path


class ImageGPT(Bundle):
    """Draws pictures in the manner of the art it learned from. Make one with `igpt.load`.

    All that draws takes `n`, how many pictures, and `DrawArguments`: picture i has the seed `seed + i`, sampling is the
    model's own unless `options` or single fields say otherwise, and what cannot be raises UserError before anything is
    drawn. Of an edited picture the pixels outside what is drawn stay as they are, and its label, unless one is asked
    for, is that of the picture's recipe or the one that fits best to what stays.
    """

    @classmethod
    @own_settings()
    def load(
        cls, name: str | Path = config.DEFAULT_MODEL, device: str | None = None, *, adapter: str | Path | None = None
    ) -> ImageGPT:
        """A model folder, an in-the-box name or a Hub id, on `device` (default: the best there is), with an adapter.

        It draws in bfloat16 where the hardware has it. Raises UserError if there is no such model or device, if files
        are damaged or the adapter is of another model.
        """
        target = pick_device(device)
        found = checkpoint.load(name)
        if adapter is not None:
            from .lora import with_adapter

            file = Path(adapter).expanduser()
            found = with_adapter(found, file)
            name = file.absolute().parent if file.name == checkpoint.ADAPTER else file.stem
        parts = found.tokenizer.to(target), found.gpt.to(target), found.labels
        found.gpt.draw_in(torch.bfloat16 if fast_bf16(target) else torch.float32)
        return cls(*parts, name=Path(name).name, weights_hash=found.weights_hash, provenance=found.provenance)

    def save(self, folder: str | Path) -> None:
        """Write the model to a folder: config.json and model.safetensors."""
        checkpoint.save(folder, self.tokenizer, self.gpt, self.labels, self.provenance)

    # Drawing pictures

    def generate(
        self, n: int = 1, size: Size | None = None, *, tile: bool = False, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Draw n pictures of exactly `size` pixels (256, "640x384" or (640, 384); default: the model's native size).

        Without a label each seed chooses one that the model draws well; "any" chooses among all, "none" draws without.
        With `tile` they are textures that wrap in both directions.
        """
        return self._drawn(self.new_picture(size, tile), n, draw)

    def stream(
        self, n: int = 1, size: Size | None = None, *, tile: bool = False, **draw: Unpack[DrawArguments]
    ) -> Iterator[list[Image]]:
        """As `generate`, but yields the unfinished pictures again and again (what is not yet drawn is mid-grey)."""
        (batch,) = self.batches(self.new_picture(size, tile), n, at_once=n, **draw)
        steps = batch.some_steps()

        @own_settings()
        def step() -> list[Image] | None:
            grids = next(steps, None)
            return None if grids is None else [batch.preview(grid) for grid in grids]

        return iter(step, None)

    def new_picture(self, size: Size | None = None, tile: bool = False) -> Task:
        """The task of `generate`, for `batches`."""
        return Task("generate", canvas_for(self, self.grids.native_size if size is None else parse_size(size), tile))

    def batches(
        self, task: Task, n: int = 1, *, at_once: int | None = None, **draw: Unpack[DrawArguments]
    ) -> Iterator[Batch]:
        """What draws n pictures of a task, step by step and with their recipes; of an edit one at a time, of new ones
        at most `at_once` together (default: as many as fit into memory)."""
        changes: dict[str, Any] = {"label": None, "seed": 0, "options": None, **draw}
        label, seed, options = (changes.pop(name) for name in ("label", "seed", "options"))
        sprite = self._sprite({name: changes.pop(name) for name in SPRITES if name in changes})
        if (pixels := task.canvas.size[0] * task.canvas.size[1] * sprite.scale**2) > MAX_PIXELS:
            raise UserError(
                f"--scale {sprite.scale} makes {pixels} pixels of a picture; at most {MAX_PIXELS} are wanted"
            )
        task = task._replace(sprite=sprite)
        options = options or self.sampling
        if unknown := sorted(changes.keys() - asdict(options).keys()):
            raise UserError(f"there is no option {unknown[0]!r}; there are {', '.join(asdict(options))}")
        options = replace(options, **changes)
        options.check()
        seed, n = check_seeds(seed, n)
        label, at_once = self.label_for(task, label), 1 if task.start is not None else at_once or self.at_once
        return (
            Batch(self, task, self.labels_for(label, first, min(at_once, seed + n - first)), first, options)
            for first in range(seed, seed + n, at_once)
        )

    def _sprite(self, asked: dict[str, Any]) -> SpriteOptions:
        own = self.tokenizer.config
        if not asked:
            return AS_DRAWN
        if not isinstance(own, PaletteConfig):
            raise UserError(f"--{next(iter(asked))} is for sprites; the model {self.name!r} has no palette")
        palette, ground = asked.pop("palette", None), asked.get("ground", AS_DRAWN.ground)
        options = SpriteOptions(**asked, colours=() if palette is None else colours_of(own, palette, ground))
        options.check()
        return options

    def label_for(self, task: Task, label: str | None) -> str | None:
        """The label asked for; of an edit without one that of its picture, or the one that fits best to what is given;
        None where that of a new picture is left to its seed, and where the model has none."""
        self.label_number(label)
        if label is not None or task.label is not None or task.start is None or not self.labels:
            return label if label is not None else task.label
        start = task.start(0)
        tokens_hw, known_hw = on_grid(self, start, task.canvas.levels[0]) if isinstance(start, Inpainting) else start
        return self.guess_label(tokens_hw, known_hw if known_hw.any() else torch.ones_like(known_hw))

    @own_settings()
    def _drawn(self, task: Task, n: int, draw: DrawArguments) -> list[Image]:
        pictures = []
        for batch in self.batches(task, n, **draw):
            for picture, recipe in batch.draw():
                picture.info[CHUNK] = recipe.to_json()  # for `igpt.save`
                pictures.append(picture)
        return pictures

    # Editing pictures

    def complete(
        self, picture: Picture, keep: str | float = config.DEFAULT_KEEP, *, n: int = 1, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Keep one half of a picture (top, bottom, left, right), or that share from the top, and draw the rest."""
        return self._drawn(edit.complete(self, picture, keep), n, draw)

    def inpaint(
        self, picture: Picture, mask: Picture | None = None, *, n: int = 1, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Draw a picture anew where the mask, of the same size, is white; without one where it is transparent."""
        return self._drawn(edit.inpaint(self, picture, mask), n, draw)

    def extend(
        self, picture: Picture, size: Size, anchor: str = ANCHORS[0], *, n: int = 1, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Draw around a picture until it has the size; `anchor` (as "left", "top-right") is where the picture stays."""
        return self._drawn(edit.extend(self, picture, size, anchor), n, draw)

    def vary(
        self, picture: Picture, strength: float = config.DEFAULT_STRENGTH, *, n: int = 1, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Draw that share of a picture's cells anew: 0 leaves it as it is, 1 leaves nothing of it."""
        return self._drawn(edit.vary(self, picture, strength), n, draw)

    def blend(
        self, a: Picture, b: Picture, mix: float = config.DEFAULT_MIX, *, n: int = 1, **draw: Unpack[DrawArguments]
    ) -> list[Image]:
        """Draw parts of two pictures into one of the size of A, with new passages between; `mix` is the share of B."""
        return self._drawn(edit.blend(self, a, b, mix), n, draw)
