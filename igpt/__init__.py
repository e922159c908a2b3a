"""igpt: an image-GPT that learns from a folder of art and paints new pictures in its manner.

    import igpt
    model = igpt.load()
    pictures = model.generate(n=4, label="ukiyo_e", seed=7)      # a list of PIL images

`import igpt` alone loads no torch; it comes with the first use.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizer_vq.base import UserError

from .config import DEFAULT_MODEL, SamplingOptions
from .siblings import sibling

if TYPE_CHECKING:
    from PIL.Image import Image

    from .image_gpt import ImageGPT as ImageGPT

__version__ = "0.2.0"
__all__ = ["ImageGPT", "SamplingOptions", "UserError", "finetune", "load", "save"]


def load(name: str | Path = DEFAULT_MODEL, device: str | None = None, *, adapter: str | Path | None = None) -> ImageGPT:
    """As `ImageGPT.load`."""
    from .image_gpt import ImageGPT

    return ImageGPT.load(name, device, adapter=adapter)


def finetune(art: str | Path, out: str | Path, model: str | Path = DEFAULT_MODEL, **options: Any) -> ImageGPT:
    """Teach `model` the pictures of a folder or .tar and write what comes of it to `out`; the tuned model.

    `options` are the flags of `igpt finetune`, as minutes=5. Raises UserError on pictures, options or a model that
    cannot be used, and where `out` holds something else.
    """
    return sibling("train.finetune").finetuned(art, out, str(model), options)


def save(picture: Image, path: str | Path, *, force: bool = False) -> Path:
    """Write a picture that igpt drew, with its recipe, to a .png, .webp or .jpg; the path, with a number where the name
    was taken, unless with `force`. Raises UserError for another suffix and where the disk refuses."""
    return importlib.import_module(".files", __name__).save(picture, path, force=force)


def __getattr__(name: str) -> Any:
    if name == "ImageGPT":
        return importlib.import_module(".image_gpt", __name__).ImageGPT
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
