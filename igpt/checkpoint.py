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

from tokenizer_vq.base import CONTROLS, UserError, complaint
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from tokenizer_vq.vq import VQConfig, VQTokenizer

from .config import GPTConfig
from .files import atomic_write
from .locked import is_locked, unlock
from .model import GPT

FORMAT = 3
FILES = CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
MOST_CELLS = 2**14  # of a picture in training; attention to many more would take minutes a picture
NO_MODEL = LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError  # of an odd config
ROW_SCALES = ".scale"  # ends the name of the scales of int8 rows
ADAPTER = "adapter.safetensors"  # what `igpt finetune --adapter` leaves in a folder instead of a model

Tokenizer = VQTokenizer | PaletteTokenizer


class Checkpoint(NamedTuple):
    """A model as it lies on disk."""

    tokenizer: Tokenizer
    gpt: GPT
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
    """The folder of a model given as a folder, an in-the-box name, or a Hub id "user/model" (downloaded once); the file
    itself of a locked one.

    Raises UserError listing what exists if there is no such model.
    """
    text, boxed = str(name), in_the_box()
    with complaint(f"there is no model {text!r:.200}", OSError, RuntimeError):  # too long, unreadable, no such user
        folder = Path(name).expanduser()
        there, is_model = folder.is_dir(), (folder / CONFIG).is_file() or (folder.is_file() and is_locked(folder))
    if is_model or text in boxed:
        return folder if is_model else boxed[text]
    if there and (folder / ADAPTER).is_file():
        raise UserError(f"{text!r} holds an adapter: --model BASE --adapter {folder / ADAPTER} is wanted")
    if there:
        raise UserError(f"the folder {text!r} holds no model: {CONFIG} is missing")
    if folder.is_file():
        raise UserError(f"{text!r} is neither a model folder nor a file that `igpt lock` made")
    if not re.fullmatch("[^/.]+/[^/]+", text):
        names = f"a model folder, a Hub id like user/model, or one of these is wanted: {', '.join(boxed) or '(none)'}"
        raise UserError(f"there is no model {text!r}: {names}")
    from huggingface_hub import snapshot_download  # only here: it takes a second to import

    try:
        return Path(snapshot_download(text, allow_patterns=[CONFIG, WEIGHTS, CARD]))
    except Exception as error:  # network, access and naming errors have no common parent
        hub = "could not be had from the Hub either: is it spelled right, and is there a connection?"
        raise UserError(f"there is no folder {text!r}, and a model of that name {hub}") from error


# Reading


def read_files(place: Path) -> dict[str, bytes]:
    """The files of a model folder, or of a locked one, by their names; what was locked never lies open on a disk.

    Raises UserError for what cannot be read, and for links out of the folder: a stranger may have made them.
    """
    if place.is_file():
        return unlock(place)
    files: dict[str, bytes] = {}
    with complaint(f"the model in {place} cannot be read", OSError, RuntimeError):
        # In its cache the Hub's library links the files of a version to where those of all versions lie.
        root = (place.parent.parent if place.parent.name == "snapshots" else place).resolve()
        for name in FILES:
            path = (place / name).resolve()
            if not path.is_relative_to(root):
                raise UserError(f"{place / name} is a link out of the model folder; a copy of the file is wanted there")
            if path.is_file():
                files[name] = path.read_bytes()
    return files


class _NoRandomWeights(TorchFunctionMode):
    """Skips torch.nn.init. (The meta device would do as well, but loads the compiler of torch, for two seconds.)"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def load(name: str | Path) -> Checkpoint:
    """A model ready for use on the CPU, weights in float32. Raises UserError on anything missing or damaged."""
    folder = find(name)
    files = read_files(folder)
    stored = files.get(WEIGHTS, b"")
    with complaint(f"the weights {folder / WEIGHTS} cannot be read", SafetensorError, ValueError):
        tensors = dequantize_rows(load_bytes(stored))
    tokenizer, gpt, labels, provenance = _described(folder / CONFIG, files.get(CONFIG, b""), tensors)
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


def _described(path: Path, data: bytes, tensors: dict[str, Tensor]) -> tuple[Tokenizer, GPT, list[str], dict[str, Any]]:
    """What a config.json describes, still without its weights. Raises UserError where it does not."""
    with complaint(f"{path} does not describe a model", *NO_MODEL):
        config = printable(json.loads(data.decode("utf-8")))
        if (found := config["format"]) != FORMAT:
            raise ValueError(f"it is of format {found!r:.20}, this igpt reads format {FORMAT}: train the model anew")
        if not config["gpt"]:
            raise ValueError("it has a tokenizer and no GPT: train the model anew")
        _check(config, tensors)
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in config["tokenizer"].items()}
        kinds: dict[Any, Callable[..., Tokenizer]] = {
            "vq": lambda **given: VQTokenizer(VQConfig(**given)),
            "palette": lambda **given: PaletteTokenizer(PaletteConfig(**given)),
        }
        with _NoRandomWeights():  # no time is lost on random weights that are overwritten at once
            tokenizer = kinds[given.pop("kind")](**given)
            gpt = GPT(GPTConfig(**config["gpt"]))
        return tokenizer, gpt, list(config["labels"]), dict(config.get("provenance", {}))


def _check(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for what no model means. Above all for numbers that no tensor has room for: to build millions
    of layers, or one of millions of channels, would take all memory before the weights are seen not to fit."""
    largest = max([len(tensors), *(side for value in tensors.values() for side in value.shape)])
    for part in (config["tokenizer"], config["gpt"]):
        for name, value in dict(part).items():
            most = MOST_CELLS if name == "cells" else largest
            if any(type(number) is int and number > most for number in (value if isinstance(value, list) else [value])):
                raise ValueError(f"{name} is {value!s:.60}, more than these weights have room for")
    check_labels(config["labels"], config.get("provenance", {}))


def check_labels(labels: Any, provenance: Any) -> None:
    """Raises ValueError, or another error of NO_MODEL, for labels of a stranger's file that cannot be."""
    some = dict(provenance).get("default_labels", [])
    if not all(isinstance(label, str) for label in [*labels, *some]) or len(set(labels)) < len(labels):
        raise ValueError("labels are wanted that are names and differ")


def printable(value: Any) -> Any:
    """What JSON says, with no control characters in its strings: a stranger may mean them for your terminal."""
    if isinstance(value, dict):
        return {printable(key): printable(part) for key, part in value.items()}
    if isinstance(value, list):
        return [printable(part) for part in value]
    return value.translate(CONTROLS) if isinstance(value, str) else value


def _parts(tokenizer: Tokenizer, gpt: GPT) -> dict[str, nn.Module]:
    """By the first word of their names in a file."""
    return {"tokenizer": tokenizer, "gpt": gpt}


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
    gpt: GPT,
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
        "gpt": asdict(gpt.config),
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
    # All are written before any takes its place: where the disk is full, the model from before stays whole.
    with atomic_write(folder / WEIGHTS) as weights, atomic_write(folder / CONFIG) as description:
        save_file(tensors, weights)
        # File names in the provenance may be of bytes that are no UTF-8.
        description.write_bytes((json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(errors="replace"))
        if card is not None:
            with atomic_write(folder / CARD) as readme:
                readme.write_bytes(card.encode(errors="replace"))
