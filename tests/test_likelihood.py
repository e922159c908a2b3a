"""Bits a token: against the step-by-step way of the sampler, and on models whose answer is known."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from igpt.config import SurpriseOptions
from igpt.evaluation.metrics import auc
from igpt.evaluation.surprise import heat_map, surprise_map
from igpt.image_gpt import ImageGPT
from igpt.likelihood import bits_per_token, label_nats, token_nats
from igpt.model import cell_positions, to_cells
from tests.painting import COLOURS, paint

TOKENS = torch.randint(32, (3, 4, 6), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2])


@torch.inference_mode()
def test_raster_bits_are_what_the_sampler_would_pay_step_by_step(tiny_model: ImageGPT) -> None:
    gpt, cells_BLn = tiny_model.gpt, to_cells(TOKENS, 2)
    positions = cell_positions(2, 3).expand(3, -1, -1)
    found = token_nats(gpt, cells_BLn, positions, LABELS) / math.log(2)
    cache = gpt.init_cache(LABELS, 6)
    for i in range(6):
        answers = gpt.query_hidden(positions[:, i : i + 1], cache)
        for j in range(4):
            chances = gpt.next_token(answers, cells_BLn[:, i : i + 1, :j])[:, 0].softmax(-1)
            wanted = -chances[torch.arange(3), cells_BLn[:, i, j]].log2()
            assert torch.allclose(found[:, i, j], wanted, atol=1e-4)
        gpt.append(cells_BLn[:, i : i + 1], positions[:, i : i + 1], cache)


def test_random_orders_follow_from_the_seed_and_not_from_the_batch(tiny_model: ImageGPT) -> None:
    many, labels = TOKENS.repeat(8, 1, 1), LABELS.repeat(8)
    found = bits_per_token(tiny_model.gpt, many, labels, [1])
    assert not torch.allclose(found, bits_per_token(tiny_model.gpt, many, labels, [2]))
    assert torch.allclose(found[:3], bits_per_token(tiny_model.gpt, TOKENS, LABELS, [1]), atol=1e-4)


def test_several_orders_are_averaged(tiny_model: ImageGPT) -> None:
    several = ([0], range(64), range(64, 128))
    few, many, again = (bits_per_token(tiny_model.gpt, TOKENS, LABELS, seeds) for seeds in several)
    assert float((many - again).abs().mean()) < 0.5 * float((few - again).abs().mean())


def test_a_model_that_knows_nothing_pays_the_whole_vocabulary(tiny_model: ImageGPT) -> None:
    gpt = copy.deepcopy(tiny_model.gpt)
    nn.init.zeros_(gpt.head.weight)
    assert torch.allclose(bits_per_token(gpt, TOKENS, LABELS), torch.tensor(math.log2(32)).double())
    nats = label_nats(gpt, TOKENS[0], torch.ones(4, 6, dtype=torch.bool))
    assert torch.allclose(nats, torch.full((3,), math.log(32)))


def test_labels_are_compared_by_cells_that_are_known_whole_and_by_no_others(tiny_model: ImageGPT) -> None:
    known_hw = torch.zeros(4, 6, dtype=torch.bool)
    known_hw[:2, :2] = known_hw[2, 2] = True
    nats, other_hw = label_nats(tiny_model.gpt, TOKENS[0], known_hw), TOKENS[0].clone()
    other_hw[2:] = other_hw[:, 2:] = 0
    assert torch.equal(nats, label_nats(tiny_model.gpt, other_hw, known_hw))
    other_hw[0, 0] += 1
    assert not torch.equal(nats, label_nats(tiny_model.gpt, other_hw, known_hw))
    assert not label_nats(tiny_model.gpt, TOKENS[0], known_hw & False).any()


def test_a_model_that_has_learned_pictures_by_heart_gives_them_away(tiny_model: ImageGPT) -> None:
    learned, unseen = torch.randint(32, (2, 4, 4, 4), generator=torch.Generator().manual_seed(1))
    gpt, labels = copy.deepcopy(tiny_model.gpt).train(), torch.zeros(4, dtype=torch.long)
    positions, cells_BLn = cell_positions(2, 2).expand(4, -1, -1), to_cells(learned, 2)
    adam = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the dropout
        for _ in range(60):
            adam.zero_grad()
            logits = gpt(cells_BLn, positions, labels)
            torch.nn.functional.cross_entropy(logits.flatten(0, 2), cells_BLn.flatten()).backward()
            adam.step()
    bits = [bits_per_token(gpt.eval(), tokens, labels).mean((1, 2)) for tokens in (learned, unseen)]
    assert auc(-bits[0], -bits[1]) == 1


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (20, 300)])
def test_a_map_has_a_cell_for_every_token_and_says_where_it_is_brightest(
    size: tuple[int, int], tiny_model: ImageGPT
) -> None:
    found = surprise_map(tiny_model, paint(1, COLOURS["red"], size), 0, SurpriseOptions(orders=2))
    assert found.bits_hw.shape == tiny_model.grids.composition(*size)
    assert f"{float(found.bits_hw.max()):.2f}" in found.sentence
    assert found.sheet.width > 2 * found.bits_hw.shape[1] * 4


def test_more_surprise_is_always_brighter() -> None:
    levels = heat_map(torch.linspace(3, 7, 101)[None]).convert("L").tobytes()
    assert list(levels) == sorted(levels) and levels[0] < 40 and levels[-1] > 220
