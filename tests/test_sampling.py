"""Drawing: the pure functions, and the promises of the sampler."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from igpt.config import ORDERS, GPTConfig, SamplingOptions
from igpt.model import GPT, cell_positions
from igpt.sampling import cells_per_step, draw, drawing_order, generators, guide, keep_top_k, keep_top_p, pick, spread

PLAIN = SamplingOptions(guidance=1.0, autoguidance=1.0, top_p=1.0)


def make(vocab_size: int = 5) -> GPT:
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(vocab_size, 2, layers=2, width=32, heads=2, cells=16))
    nn.init.normal_(gpt.head.weight, std=0.4)
    return gpt.eval()


def last(gpt: GPT, n: int, grid: tuple[int, int], options: SamplingOptions, seed: int = 0, label: int = 0) -> Tensor:
    *_, step = draw(gpt, torch.full((n,), label), grid, options, generators(seed, n))
    return step.tokens_Bhw


@pytest.mark.parametrize("cells", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("steps", [1, 2, 8, 32, 1000])
def test_every_step_draws_a_cell_and_all_are_drawn_few_first_and_many_last(cells: int, steps: int) -> None:
    counts = cells_per_step(cells, steps)
    assert sum(counts) == cells and min(counts) >= 1 and len(counts) == min(steps, cells)
    assert counts[0] <= counts[-1]


def test_nothing_left_to_draw_is_no_step() -> None:
    assert cells_per_step(0, 8) == []


def test_top_k_keeps_the_k_largest_and_0_keeps_all() -> None:
    logits = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert torch.equal(keep_top_k(logits, 2).isfinite(), torch.tensor([False, True, False, True]))
    assert torch.equal(keep_top_k(logits, 0), logits)
    assert torch.equal(keep_top_k(logits, 9), logits)


def test_top_p_keeps_the_fewest_that_hold_p_together_and_always_one() -> None:
    logits = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    for p, kept in ((0.01, 1), (0.49, 1), (0.51, 2), (0.76, 3), (0.99, 4), (1.0, 4)):
        assert int(keep_top_p(logits, p).isfinite().sum()) == kept, p


def test_guidance_of_1_changes_nothing_and_0_forgets_the_label() -> None:
    with_label, without = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(with_label + guide(with_label, without, 1.0), with_label)
    assert torch.allclose(with_label + guide(with_label, without, 0.0), without)


def test_pick_takes_the_token_at_the_quantile() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    for uniform, token in ((0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (0.999999, 3)):
        assert int(pick(logits, torch.tensor(uniform), PLAIN)) == token
    assert int(pick(logits, torch.tensor(0.9), replace(PLAIN, temperature=0.0))) == 2
    assert int(pick(logits, torch.tensor(0.99), replace(PLAIN, top_k=1))) == 2


def test_the_samplers_distribution_is_the_models() -> None:
    """All 125 pictures of three cells, drawn one cell a step in raster order, against their exact probabilities."""
    gpt, n = make().requires_grad_(False), 6000
    everything = torch.tensor(list(itertools.product(range(5), repeat=3)))
    positions_BL2 = cell_positions(1, 3, centred=True).expand(125, -1, -1)
    logs = gpt(everything, positions_BL2, torch.ones(125, dtype=torch.long)).log_softmax(-1)
    wanted = logs.gather(-1, everything.unsqueeze(-1)).sum((1, 2)).exp()
    drawn_B3 = last(gpt, n, (1, 3), replace(PLAIN, order="raster"), label=1).flatten(1)
    seen = torch.bincount((drawn_B3 * torch.tensor([25, 5, 1])).sum(1), minlength=125).float() / n
    # The expected total variation distance of so many fair draws, with room; the uniform distribution is far off.
    noise = float((2 * wanted * (1 - wanted) / (math.pi * n)).sqrt().sum() / 2)
    assert float((seen - wanted).abs().sum() / 2) < 1.4 * noise
    assert float((wanted - 1 / 125).abs().sum() / 2) > 4 * noise


@torch.inference_mode()
def test_in_random_order_the_first_cells_distribution_is_the_models_too() -> None:
    gpt, n = make(), 4000
    steps = draw(gpt, torch.zeros(n, dtype=torch.long), (2, 2), replace(PLAIN, steps=4), generators(0, n))
    next(steps)
    first = next(steps)
    for cell in range(4):
        chosen = first.known_Bhw.flatten(1)[:, cell]
        seen = torch.bincount(first.tokens_Bhw.flatten(1)[chosen, cell], minlength=5) / chosen.sum()
        cache = gpt.start(torch.zeros(1, dtype=torch.long), 4)
        answers, _ = gpt.predict(cell_positions(2, 2, True)[None, cell : cell + 1], cache)
        wanted = gpt.head(answers).softmax(-1).flatten()
        assert torch.allclose(seen, wanted, atol=0.06)


@pytest.mark.parametrize("order", ORDERS)
def test_known_cells_are_never_redrawn(order: str) -> None:
    gpt = make()
    given_Bhw = torch.randint(5, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    given_hw = torch.zeros(4, 4, dtype=torch.bool)
    given_hw[:, :2] = given_hw[1, 3] = True
    options = SamplingOptions(steps=3, order=order, guidance=2.0)
    steps = list(draw(gpt, torch.zeros(3, dtype=torch.long), (4, 4), options, generators(0, 3), given_Bhw, given_hw))
    for step in steps:
        assert torch.equal(step.tokens_Bhw[:, given_hw], given_Bhw[:, given_hw])
    assert not steps[0].known_Bhw[:, ~given_hw].any() and steps[-1].known_Bhw.all()


def test_cells_that_are_spread_come_once_each_and_far_apart() -> None:
    for h, w in ((1, 1), (1, 7), (16, 16), (9, 31)):
        assert sorted(spread(h, w).flatten().tolist()) == list(range(h * w))

    def closest(order: str, seed: int) -> float:
        cells = drawing_order(torch.ones(16, 16, dtype=torch.bool), order, torch.Generator().manual_seed(seed))[:16]
        places = torch.stack([cells // 16, cells % 16], -1).float()
        return float((torch.cdist(places, places) + 99 * torch.eye(16)).min(0).values.mean())

    assert all(closest("spread", seed) > 3 > closest("random", seed) for seed in range(8))
    first = {int(drawing_order(torch.ones(16, 16), "spread", g)[0]) for g in generators(0, 8)}
    assert len(first) > 5  # another beginning for every seed


def test_what_is_known_changes_what_is_drawn() -> None:
    gpt, given_hw = make(), torch.zeros(4, 4, dtype=torch.bool)
    given_hw[:2] = True
    ends = []
    for token in (0, 4):
        given_Bhw, labels_B = torch.full((64, 4, 4), token), torch.zeros(64, dtype=torch.long)
        *_, end = draw(gpt, labels_B, (4, 4), PLAIN, generators(0, 64), given_Bhw, given_hw)
        ends.append(end.tokens_Bhw[:, 2:])
    assert not torch.equal(*ends)


def test_once_drawn_a_cell_stays_and_the_known_cells_grow() -> None:
    steps = list(draw(make(), torch.zeros(2, dtype=torch.long), (4, 4), SamplingOptions(steps=5), generators(7, 2)))
    assert len(steps) == 6
    for before, after in itertools.pairwise(steps):
        assert (after.known_Bhw >= before.known_Bhw).all() and after.known_Bhw.sum() > before.known_Bhw.sum()
        assert torch.equal(after.tokens_Bhw[before.known_Bhw], before.tokens_Bhw[before.known_Bhw])


def test_the_picture_for_a_seed_is_the_same_in_any_batch() -> None:
    gpt, options = make(), SamplingOptions(steps=6, guidance=2.5, top_p=0.9)
    batch = last(gpt, 16, (4, 4), options, seed=100)
    for i in (0, 7, 15):
        assert torch.equal(last(gpt, 1, (4, 4), options, seed=100 + i)[0], batch[i])
    assert len({tuple(grid.flatten().tolist()) for grid in batch}) == 16


def test_drawing_leaves_the_callers_randomness_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with torch.random.fork_rng():
        gpt = make()
    last(gpt, 1, (2, 2), PLAIN)
    assert torch.equal(torch.rand(1), expected)


def test_temperature_0_draws_the_likeliest_picture_whatever_the_seed() -> None:
    gpt, options = make(), SamplingOptions(temperature=0.0, order="raster")
    assert torch.equal(last(gpt, 1, (3, 3), options, seed=0), last(gpt, 1, (3, 3), options, seed=9))


def test_without_a_label_guidance_has_nothing_to_pull_towards() -> None:
    gpt = make()
    null = gpt.null_label
    a, b = (last(gpt, 2, (3, 3), SamplingOptions(guidance=g), label=null) for g in (1.0, 5.0))
    assert torch.equal(a, b)


def test_guidance_changes_what_is_drawn_with_a_label() -> None:
    gpt = make()
    a, b = (last(gpt, 4, (4, 4), SamplingOptions(guidance=g), label=1) for g in (1.0, 5.0))
    assert not torch.equal(a, b)


def test_autoguidance_changes_what_is_drawn_without_a_label_too() -> None:
    gpt = make()
    a, b = (last(gpt, 4, (4, 4), SamplingOptions(autoguidance=g), label=gpt.null_label) for g in (1.0, 5.0))
    assert not torch.equal(a, b)


@torch.inference_mode()
def test_guided_tokens_come_from_guided_logits() -> None:
    gpt, labels_B = make(), torch.zeros(1, dtype=torch.long)
    options = SamplingOptions(temperature=0.0, guidance=2.0, autoguidance=4.0)
    caches = [gpt.start(torch.tensor([label]), 4) for label in (0, gpt.null_label)]
    (cell,) = cell_positions(1, 1, True)
    answers, before = gpt.predict(cell.view(1, 1, 2), caches[0])
    without, _ = gpt.predict(cell.view(1, 1, 2), caches[1])
    with_label, hasty, null = (gpt.head(x).flatten() for x in (answers, before, without))
    *_, step = draw(gpt, labels_B, (1, 1), options, generators(0, 1))  # the only step has the whole pull
    assert int(step.tokens_Bhw) == int((with_label + 3 * (with_label - hasty) + (with_label - null)).argmax())


def test_only_the_wanted_cells_are_drawn_and_given_ones_stay() -> None:
    gpt = make()
    given_Bhw = torch.full((2, 3, 4), 3)
    given_hw, wanted_hw = torch.zeros(2, 3, 4, dtype=torch.bool)
    given_hw[0], wanted_hw[:2, 1:] = True, True
    labels_B = torch.zeros(2, dtype=torch.long)
    *_, step = draw(gpt, labels_B, (3, 4), PLAIN, generators(0, 2), given_Bhw, given_hw, wanted_hw)
    assert torch.equal(step.known_Bhw[0], given_hw | wanted_hw)
    assert bool((step.tokens_Bhw[:, 0] == 3).all())
    assert not bool(step.tokens_Bhw[:, ~(given_hw | wanted_hw)].any()), "nothing is there but the placeholder"


def test_every_grid_may_have_its_own_given_and_wanted_cells_and_comes_out_as_if_alone() -> None:
    gpt, labels_B = make(), torch.zeros(2, dtype=torch.long)
    given_Bhw = torch.full((2, 3, 4), 3)
    known_Bhw, wanted_Bhw = torch.zeros(2, 2, 3, 4, dtype=torch.bool)
    known_Bhw[0, 0], known_Bhw[1, :2, :2] = True, True  # four cells each
    wanted_Bhw[0, 1], wanted_Bhw[1, :2, 2:] = True, True
    *_, both = draw(gpt, labels_B, (3, 4), PLAIN, generators(5, 2), given_Bhw, known_Bhw, wanted_Bhw)
    assert torch.equal(both.known_Bhw, known_Bhw | wanted_Bhw)
    for i in range(2):
        alone = (x[i : i + 1] for x in (given_Bhw, known_Bhw, wanted_Bhw))
        *_, step = draw(gpt, labels_B[:1], (3, 4), PLAIN, generators(5 + i, 1), *alone)
        assert torch.equal(step.tokens_Bhw[0], both.tokens_Bhw[i])
