"""Shared by all tests: two tiny models with random weights, made once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from igpt.config import GPTConfig
from igpt.image_gpt import ImageGPT
from igpt.model import GPT
from tokenizer_vq.palette import PaletteConfig, PaletteTokenizer
from tokenizer_vq.vq import VQConfig, VQTokenizer


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone, and find nothing in it that another machine would not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("TORCH_HOME", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_as_usual() -> None:
    """What was started in the background of a shell ignores it, and so do its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny networks are slower on more: on a busy machine two threads wait for each other most of the time."""
    torch.set_num_threads(1)


def loud(config: GPTConfig) -> GPT:
    """A GPT of random weights that are large enough: near zero what is drawn would depend on nothing."""
    gpt = GPT(config)
    for part in (gpt.head, gpt.tokens, gpt.before):
        nn.init.normal_(part.weight, std=1.0 if part is gpt.head else 0.5)
    return gpt


def save_tiny(folder: Path) -> Path:
    """Writes a model of 32 codes of 4x4 pixels, 16 cells of 2x2 codes, the labels red and blue."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQTokenizer(VQConfig(channels=(32,), codes=32, encoder_blocks=1, decoder_blocks=1))
        nn.init.normal_(tokenizer.decoder.head.weight)  # or all that an untrained decoder paints is nearly one grey
        gpt = loud(GPTConfig(vocab_size=32, labels=2, layers=2, width=32, heads=2, head_layers=1, cells=16))
    ImageGPT(tokenizer, gpt, ["red", "blue"]).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model called `tiny`."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> ImageGPT:
    """The same model, loaded on the CPU."""
    return ImageGPT.load(tiny_folder, "cpu")


@pytest.fixture(scope="session")
def tiny_pixels(tmp_path_factory: pytest.TempPathFactory) -> ImageGPT:
    """A model called `pixels` of which a token is a pixel: six colours, 64 cells of 2x2 of them, the labels of
    `tiny`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        colours = ("#000000", "#ffffff", "#d03030", "#30a030", "#3040d0", "#f0d040")
        gpt = loud(GPTConfig(len(colours), labels=2, layers=2, width=32, heads=2, head_layers=1, cells=64))
    folder = tmp_path_factory.mktemp("models") / "pixels"
    ImageGPT(PaletteTokenizer(PaletteConfig(colours)), gpt, ["red", "blue"]).save(folder)
    return ImageGPT.load(folder, "cpu")


@pytest.fixture(params=["tiny_model", "tiny_pixels"])
def each_model(request: pytest.FixtureRequest) -> ImageGPT:
    """Both of them, one after the other."""
    model: ImageGPT = request.getfixturevalue(request.param)
    return model
