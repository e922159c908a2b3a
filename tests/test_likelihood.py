"""Bits a token: against the step-by-step way of the sampler, and on models whose answer is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from igpt.image_gpt import ImageGPT
from igpt.model import cell_positions
from igpt.sizes import grid_for
from tests.painting import COLOURS, paint
from train import likelihood
from train.fidelity import auc
from train.likelihood import surprise
from train.surprise import heat, surprise_map

TOKENS = torch.randint(32, (3, 3, 4), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2])


@torch.inference_mode()
def test_raster_surprise_is_what_the_sampler_would_pay_step_by_step(tiny_model: ImageGPT) -> None:
    told = surprise(tiny_model, TOKENS, LABELS, order="raster").flatten(1)
    positions = cell_positions(3, 4, tiny_model.gpt.config.centred).expand(3, -1, -1)
    cache = tiny_model.gpt.start(LABELS, 12)
    for i, tokens in enumerate(TOKENS.flatten(1).T):
        chances = tiny_model.gpt.head(tiny_model.gpt.predict(positions[:, i : i + 1], cache)[0])[:, 0].softmax(-1)
        assert torch.allclose(told[:, i].float(), -chances[torch.arange(3), tokens].log2(), atol=1e-4)
        tiny_model.gpt.remember(tokens[:, None], positions[:, i : i + 1], cache)


def test_random_orders_follow_from_the_seed_and_not_from_the_batch(
    tiny_model: ImageGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = surprise(tiny_model, TOKENS, LABELS, order="random", seed=1)
    assert not torch.allclose(told, surprise(tiny_model, TOKENS, LABELS, order="random", seed=2))
    monkeypatch.setattr(likelihood, "BATCH", 1)
    assert torch.allclose(told, surprise(tiny_model, TOKENS, LABELS, order="random", seed=1), atol=1e-4)


def test_several_orders_are_averaged(tiny_model: ImageGPT) -> None:
    few, many = (surprise(tiny_model, TOKENS, LABELS, order="random", orders=orders, seed=0) for orders in (1, 64))
    again = surprise(tiny_model, TOKENS, LABELS, order="random", orders=64, seed=5)
    assert float((many - again).abs().mean()) < 0.5 * float((few - again).abs().mean())


def test_a_model_that_knows_nothing_pays_the_whole_vocabulary(tiny_model: ImageGPT) -> None:
    blank = ImageGPT(tiny_model.tokenizer, copy.deepcopy(tiny_model.gpt), tiny_model.labels)
    nn.init.zeros_(blank.gpt.head.weight)
    for order in ("random", "raster"):
        assert torch.allclose(surprise(blank, TOKENS, LABELS, order=order), torch.tensor(math.log2(32)).double())


def test_a_model_that_has_learned_pictures_by_heart_gives_them_away(tiny_model: ImageGPT) -> None:
    told, unseen = torch.randint(32, (2, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    gpt, labels = copy.deepcopy(tiny_model.gpt).train(), torch.zeros(4, dtype=torch.long)
    positions = cell_positions(4, 4, gpt.config.centred).expand(4, -1, -1)
    adam = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the dropout
        for _ in range(60):
            adam.zero_grad()
            logits = gpt(told.flatten(1), positions, labels)
            torch.nn.functional.cross_entropy(logits.transpose(1, 2), told.flatten(1)).backward()
            adam.step()
    parrot = ImageGPT(tiny_model.tokenizer, gpt, tiny_model.labels)
    bits = [surprise(parrot, tokens, labels, order="raster").mean((1, 2)) for tokens in (told, unseen)]
    assert auc(-bits[0], -bits[1]) == 1


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (20, 300)])
def test_a_map_has_a_cell_for_every_token_and_says_where_it_is_brightest(
    size: tuple[int, int], tiny_model: ImageGPT
) -> None:
    told = surprise_map(tiny_model, paint(1, COLOURS["red"], size), 0, orders=2, seed=0)
    assert told.bits_hw.shape == grid_for(*size, 8, tiny_model.native_cells)
    assert f"{float(told.bits_hw.max()):.2f}" in told.sentence
    assert told.sheet.width > 2 * told.bits_hw.shape[1] * 8


def test_more_surprise_is_always_brighter() -> None:
    brightness = heat(torch.linspace(0, 1, 101)).double().mean(-1)
    assert bool((brightness.diff() >= 0).all()) and brightness[0] < 40 and brightness[-1] > 220
