"""Models on disk: a folder with config.json, model.safetensors and README.md (the model card).

Nothing pickled is ever read. Names resolve in one place: a folder, an in-the-box model, or a Hub id. Matrices of the
GPT are stored as int8 rows with one float32 scale a row (`name` [O, I], `name.scale` [O]): half the size of bfloat16
for 0.0002 bits a token. All else that is no codebook is bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenizer_vq.base import UserError
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from tokenizer_vq.vq import VQConfig, VQTokenizer

from .config import GPTConfig
from .files import atomic_write
from .model import GPT

FORMAT = 3
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
ROW_SCALES = ".scale"  # ends the name of the scales of int8 rows
ADAPTER = "adapter.safetensors"  # what `igpt finetune --adapter` leaves in a folder instead of a model

Tokenizer = VQTokenizer | PaletteTokenizer


class Checkpoint(NamedTuple):
    """A model as it lies on disk."""

    tokenizer: Tokenizer
    gpt: GPT | None  # absent while only the tokenizer is trained
    labels: list[str]
    provenance: dict[str, Any]  # what it was trained on and how
    weights_hash: str  # SHA-256 of model.safetensors


# Finding


def in_the_box() -> dict[str, Path]:
    """Names and folders of the models that come with igpt."""
    here = Path(__file__).resolve().parent
    # Installed, `assets` lies inside the package; in a clone it lies one level up.
    assets = here / "assets" if (here / "assets").is_dir() else here.parent / "assets"
    return {path.parent.name: path.parent for path in sorted(assets.glob(f"*/{CONFIG}"))}


def find(name: str | Path) -> Path:
    """The folder of a model given as a folder, an in-the-box name, or a Hub id "user/model" (downloaded once).

    Raises UserError listing what exists if there is no such model.
    """
    text, boxed = str(name), in_the_box()
    try:
        folder = Path(name).expanduser()
        there, is_model = folder.is_dir(), (folder / CONFIG).is_file()
    except (OSError, RuntimeError) as error:  # too long a name, an unreadable folder, no such user
        raise UserError(f"there is no model {text!r:.200}: {error}") from error
    if is_model or text in boxed:
        return folder if is_model else boxed[text]
    if there and (folder / ADAPTER).is_file():
        raise UserError(f"{text!r} holds an adapter: --model BASE --adapter {folder / ADAPTER} is wanted")
    if there:
        raise UserError(f"the folder {text!r} holds no model: {CONFIG} is missing")
    if not re.fullmatch("[^/.]+/[^/]+", text):
        names = f"a model folder, a Hub id like user/model, or one of these is wanted: {', '.join(boxed) or '(none)'}"
        raise UserError(f"there is no model {text!r}: {names}")
    from huggingface_hub import snapshot_download  # only here: it takes a second to import

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except Exception as error:  # network, access and naming errors have no common parent
        reason = f"the model could not be had from the Hub ({type(error).__name__})"
        raise UserError(f"there is no folder {text!r}, and {reason}") from error


# Reading


class _NoRandomWeights(TorchFunctionMode):
    """Skips torch.nn.init. (The meta device would do as well, but loads the compiler of torch, for two seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load(name: str | Path) -> Checkpoint:
    """A model ready for use on the CPU, weights in float32. Raises UserError on anything missing or damaged."""
    folder = find(name)
    tokenizer, gpt, labels, provenance = _described(folder / CONFIG)
    try:
        stored = (folder / WEIGHTS).read_bytes()
        tensors = dequantize_rows(load_bytes(stored))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"the weights {folder / WEIGHTS} cannot be read: {error}") from error
    try:
        for part, module in _parts(tokenizer, gpt).items():
            names = [key for key in tensors if key.startswith(f"{part}.")]
            module.load_state_dict({key.removeprefix(f"{part}."): tensors.pop(key) for key in names}, assign=True)
            module.eval()
        if tensors:
            raise RuntimeError(f"unexpected {next(iter(tensors))}")
    except RuntimeError as error:
        first = str(error).split("\n\t")[-1].strip()
        raise UserError(f"{folder / CONFIG} does not match its weights: {first}") from error
    if isinstance(tokenizer, VQTokenizer):
        tokenizer.quantizer.reset_ema()
    return Checkpoint(tokenizer, gpt, labels, provenance, hashlib.sha256(stored).hexdigest())


def _described(path: Path) -> tuple[Tokenizer, GPT | None, list[str], dict[str, Any]]:
    """What a config.json describes, still without weights. Raises UserError where it does not."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if (found := config["format"]) != FORMAT:
            raise ValueError(f"it is of format {found!r:.20}, this igpt reads format {FORMAT}: train the model anew")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in config["tokenizer"].items()}
        kinds: dict[Any, Callable[..., Tokenizer]] = {
            "vq": lambda **given: VQTokenizer(VQConfig(**given)),
            "palette": lambda **given: PaletteTokenizer(PaletteConfig(**given)),
        }
        with _NoRandomWeights():  # no time is lost on random weights that are overwritten at once
            tokenizer = kinds[given.pop("kind")](**given)
            gpt = GPT(GPTConfig(**config["gpt"])) if config.get("gpt") else None
        return tokenizer, gpt, list(config["labels"]), dict(config.get("provenance", {}))
    except (OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not describe a model: {error}") from error


def _parts(tokenizer: Tokenizer, gpt: GPT | None) -> dict[str, nn.Module]:
    """By the first word of their names in a file."""
    return {"tokenizer": tokenizer} | ({} if gpt is None else {"gpt": gpt})


# int8 rows


def quantize_rows(name: str, matrix_OI: Tensor) -> dict[str, Tensor]:
    """A matrix as int8 rows and their float32 scales, under the names that `dequantize_rows` wants."""
    scale_O = matrix_OI.float().abs().amax(1) / 127
    scale_O[scale_O == 0] = 1.0  # a row of zeros; a scale of zero would be a damaged file
    rows_OI = (matrix_OI / scale_O[:, None]).round().clamp(-127, 127).to(torch.int8)
    return {name: rows_OI, name + ROW_SCALES: scale_O}


def dequantize_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with all floating-point values and int8 rows in float32, and no scales any more.

    Raises ValueError for int8 rows without scales above zero of their own, and for scales without rows.
    """
    found, nothing = {}, torch.zeros(0)
    for name, value in tensors.items():
        owner = name.removesuffix(ROW_SCALES)
        rows_OI, scale_O = tensors.get(owner, nothing), tensors.get(owner + ROW_SCALES, nothing)
        above_zero = scale_O.is_floating_point() and bool((scale_O.isfinite() & (scale_O > 0)).all())
        if value.dtype != torch.int8 and scale_O is nothing:
            found[name] = value.float() if value.is_floating_point() else value
        elif rows_OI.dtype != torch.int8 or rows_OI.dim() != 2 or scale_O.shape != rows_OI.shape[:1] or not above_zero:
            raise ValueError(f"{owner} is not int8 rows with a finite scale above zero for each")
        elif name == owner:
            found[name] = rows_OI * scale_O.float()[:, None]
    return found


# Writing


def save(
    folder: str | Path,
    tokenizer: Tokenizer,
    gpt: GPT | None,
    labels: list[str],
    provenance: dict[str, Any],
    card: str | None = None,
) -> None:
    """Write a model folder; all files appear whole or none does. Matrices of the GPT are stored as int8 rows, the
    codebook in float32, as which code is nearest must not change, the rest in bfloat16."""
    folder = Path(folder)
    config = {
        "format": FORMAT,
        "tokenizer": {"kind": tokenizer.kind} | asdict(tokenizer.config),
        "gpt": asdict(gpt.config) if gpt is not None else None,
        "labels": labels,
        "provenance": provenance,
    }
    tensors: dict[str, Tensor] = {}
    for part, module in _parts(tokenizer, gpt).items():
        for key, value in module.state_dict().items():
            value, name = value.detach().cpu(), f"{part}.{key}"
            if part == "gpt" and key.endswith(".weight") and value.dim() == 2:
                tensors |= quantize_rows(name, value)
            else:
                exact = not value.is_floating_point() or "quantizer" in key
                tensors[name] = value.to(value.dtype if exact else torch.bfloat16).contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All are written before any takes its place: where the disk is full, the model from before stays whole.
        with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as description:
            save_file(tensors, weights)
            description.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if card is not None:
                with atomic_write(folder / CARD) as readme:
                    readme.write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"the model cannot be written to {folder}: {error}") from error
