"""Drawing: the pure functions, and the promises of the sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import stand_in
from igpt.config import ORDERS, GPTConfig, SamplingOptions
from igpt.device import Graphs, Work
from igpt.model import GPT, cell_positions, to_cells
from igpt.sampling import (
    Known,
    Plan,
    cells_per_step,
    draw,
    generators,
    guidance_delta,
    keep_top_k,
    keep_top_p,
    sample,
    sample_token,
)

PLAIN = SamplingOptions(guidance=1.0, top_p=1.0)


def make(vocab_size: int = 5, cell: int = 2) -> GPT:
    torch.manual_seed(3)
    gpt = GPT(GPTConfig(vocab_size, 2, layers=2, width=32, heads=2, cell=cell, head_layers=1, cells=16))
    nn.init.normal_(gpt.head.weight, std=0.4)
    nn.init.normal_(gpt.tokens.weight, std=0.5)
    nn.init.normal_(gpt.before.weight, std=0.3)
    return gpt.eval()


def last(gpt: GPT, n: int, grid: tuple[int, int], options: SamplingOptions, seed: int = 0, label: int = 0) -> Tensor:
    *_, step = sample(gpt, torch.full((n,), label), grid, options, generators(seed, n))
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
    cond, uncond = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for weight, guided in ((0.0, uncond), (1.0, cond), (3.0, cond + 2 * (cond - uncond))):
        assert torch.allclose(uncond + guidance_delta(cond, uncond, weight), guided, atol=1e-5)


def test_a_token_is_sampled_at_its_quantile() -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    for uniform, token in ((0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (0.999999, 3)):
        assert int(sample_token(logits, torch.tensor(uniform), PLAIN)) == token
    assert int(sample_token(logits, torch.tensor(0.9), replace(PLAIN, temperature=0.0))) == 2
    assert int(sample_token(logits, torch.tensor(0.99), replace(PLAIN, top_k=1))) == 2


@pytest.mark.parametrize("temperature", [1e-40, 1e-20, 1e-6])
def test_a_temperature_that_would_overflow_takes_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log()
    assert int(sample_token(logits, torch.tensor(0.9), replace(PLAIN, temperature=temperature))) == 2


@pytest.mark.parametrize(("vocab_size", "cell", "cells"), [(5, 1, 3), (3, 2, 1), (2, 2, 2)])
def test_the_samplers_distribution_is_the_models(vocab_size: int, cell: int, cells: int) -> None:
    """All pictures of a few cells, drawn one cell a step in raster order, against their exact probabilities."""
    gpt, n = make(vocab_size, cell).requires_grad_(False), 6000
    tokens = cells * cell**2
    everything = torch.tensor(list(itertools.product(range(vocab_size), repeat=tokens)))
    cells_BLn = everything.view(-1, cells, cell**2)
    positions_BL2 = cell_positions(1, cells).expand(len(everything), -1, -1)
    logs = gpt(cells_BLn, positions_BL2, torch.ones(len(everything), dtype=torch.long)).log_softmax(-1)
    wanted = logs.gather(-1, cells_BLn.unsqueeze(-1)).sum((1, 2, 3)).exp()
    drawn_BLn = to_cells(last(gpt, n, (cell, cells * cell), replace(PLAIN, order="raster"), label=1), cell)
    places = vocab_size ** torch.arange(tokens - 1, -1, -1)
    seen = torch.bincount((drawn_BLn.flatten(1) * places).sum(1), minlength=len(everything)).float() / n
    # The expected total variation distance of so many fair draws, with room; the uniform distribution is far off.
    noise = float((2 * wanted * (1 - wanted) / (math.pi * n)).sqrt().sum() / 2)
    assert float((seen - wanted).abs().sum() / 2) < 1.4 * noise
    assert float((wanted - 1 / len(everything)).abs().sum() / 2) > 2.5 * noise


@torch.inference_mode()
def test_in_random_order_the_first_cells_distribution_is_the_models_too() -> None:
    gpt, n = make(), 4000
    steps = sample(gpt, torch.zeros(n, dtype=torch.long), (4, 4), replace(PLAIN, steps=4), generators(0, n))
    next(steps)
    first = next(steps)
    tokens_BL, known_BL = (to_cells(x, 2)[..., 0] for x in (first.tokens_Bhw, first.known_Bhw))
    for cell in range(4):
        seen = torch.bincount(tokens_BL[known_BL[:, cell], cell], minlength=5) / known_BL[:, cell].sum()
        cache = gpt.init_cache(torch.zeros(1, dtype=torch.long), 4)
        answer = gpt.query_hidden(cell_positions(2, 2)[None, cell : cell + 1], cache)
        wanted = gpt.next_token(answer, torch.zeros(1, 1, 0, dtype=torch.long)).softmax(-1).flatten()
        assert torch.allclose(seen, wanted, atol=0.06)


@pytest.mark.parametrize("order", ORDERS)
def test_known_tokens_are_never_redrawn_and_the_rest_of_a_cell_that_is_cut_is_drawn(order: str) -> None:
    gpt = make()
    given_Bhw = torch.randint(5, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    given_hw = torch.zeros(4, 4, dtype=torch.bool)
    given_hw[:, :2] = given_hw[1, 3] = True  # two cells whole, one of four tokens of another
    options = SamplingOptions(steps=3, order=order, guidance=2.0)
    known, labels_B = Known(given_Bhw, given_hw), torch.zeros(3, dtype=torch.long)
    steps = list(sample(gpt, labels_B, (4, 4), options, generators(0, 3), known))
    for step in steps:
        assert torch.equal(step.tokens_Bhw[:, given_hw], given_Bhw[:, given_hw])
    assert not steps[0].known_Bhw[:, ~given_hw].any() and steps[-1].known_Bhw.all()


@torch.inference_mode()
def test_in_a_cell_that_is_cut_a_token_is_drawn_to_the_given_ones_before_it() -> None:
    gpt, given_hw = make(), torch.tensor([[True, False], [True, True]])
    for token in range(5):
        given_Bhw = torch.full((1, 2, 2), token)
        options = replace(PLAIN, temperature=0.0)
        known, labels_B = Known(given_Bhw, given_hw), torch.zeros(1, dtype=torch.long)
        *_, step = sample(gpt, labels_B, (2, 2), options, generators(0, 1), known)
        answer = gpt.query_hidden(cell_positions(1, 1)[None], gpt.init_cache(torch.zeros(1, dtype=torch.long), 1))
        wanted = gpt.next_token(answer, torch.tensor([[[token]]])).argmax()
        assert step.tokens_Bhw[0].tolist() == [[token, int(wanted)], [token, token]]


def test_what_is_known_changes_what_is_drawn() -> None:
    gpt, given_hw = make(), torch.zeros(4, 4, dtype=torch.bool)
    given_hw[:2] = True
    ends = []
    for token in (0, 4):
        given_Bhw, labels_B = torch.full((64, 4, 4), token), torch.zeros(64, dtype=torch.long)
        *_, end = sample(gpt, labels_B, (4, 4), PLAIN, generators(0, 64), Known(given_Bhw, given_hw))
        ends.append(end.tokens_Bhw[:, 2:])
    assert not torch.equal(*ends)


def test_once_drawn_a_cell_stays_and_the_known_cells_grow() -> None:
    steps = list(sample(make(), torch.zeros(2, dtype=torch.long), (4, 4), SamplingOptions(steps=3), generators(7, 2)))
    assert len(steps) == 4
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
    assert torch.equal(last(gpt, 1, (4, 6), options, seed=0), last(gpt, 1, (4, 6), options, seed=9))


def test_without_a_label_guidance_has_nothing_to_pull_towards() -> None:
    gpt = make()
    null = gpt.null_label
    a, b = (last(gpt, 2, (4, 6), SamplingOptions(guidance=g), label=null) for g in (1.0, 5.0))
    assert torch.equal(a, b)


def test_guidance_changes_what_is_drawn_with_a_label() -> None:
    gpt = make()
    a, b = (last(gpt, 4, (4, 4), SamplingOptions(guidance=g), label=1) for g in (1.0, 5.0))
    assert not torch.equal(a, b)


def test_a_picture_without_label_is_not_pulled_by_one_with_a_label_beside_it() -> None:
    gpt, options = make(), SamplingOptions(guidance=5.0)
    *_, both = sample(gpt, torch.tensor([1, gpt.null_label]), (4, 4), options, generators(3, 2))
    *_, alone = sample(gpt, torch.tensor([gpt.null_label]), (4, 4), options, generators(4, 1))
    assert torch.equal(both.tokens_Bhw[1], alone.tokens_Bhw[0])


@torch.inference_mode()
def test_guided_tokens_come_from_guided_logits() -> None:
    gpt, labels_B = make(cell=1), torch.zeros(1, dtype=torch.long)
    options = SamplingOptions(temperature=0.0, guidance=4.0)
    logits = []
    for label in (0, gpt.null_label):
        answer = gpt.query_hidden(cell_positions(1, 1)[None], gpt.init_cache(torch.tensor([label]), 1))
        logits.append(gpt.next_token(answer, torch.zeros(1, 1, 0, dtype=torch.long)).flatten())
    *_, step = sample(gpt, labels_B, (1, 1), options, generators(0, 1))  # the only step has the whole pull
    assert int(step.tokens_Bhw) == int((logits[0] + 3 * (logits[0] - logits[1])).argmax())


def test_only_the_wanted_cells_are_drawn_and_given_ones_stay() -> None:
    gpt = make()
    given_Bhw = torch.full((2, 6, 8), 3)
    given_hw, wanted_hw = torch.zeros(2, 6, 8, dtype=torch.bool)
    given_hw[:2], wanted_hw[:4, 2:] = True, True
    labels_B = torch.zeros(2, dtype=torch.long)
    *_, step = sample(gpt, labels_B, (6, 8), PLAIN, generators(0, 2), Known(given_Bhw, given_hw, wanted_hw))
    assert torch.equal(step.known_Bhw[0], given_hw | wanted_hw)
    assert bool((step.tokens_Bhw[:, :2] == 3).all())
    assert not bool(step.tokens_Bhw[:, ~(given_hw | wanted_hw)].any()), "nothing is there but the placeholder"


def test_every_grid_may_have_its_own_given_and_wanted_cells_and_comes_out_as_if_alone() -> None:
    gpt, labels_B = make(), torch.zeros(2, dtype=torch.long)
    given_Bhw = torch.full((2, 6, 8), 3)
    known_Bhw, wanted_Bhw = torch.zeros(2, 2, 6, 8, dtype=torch.bool)
    known_Bhw[0, :2], known_Bhw[1, :4, :4] = True, True  # four cells each
    wanted_Bhw[0, 2:4], wanted_Bhw[1, :4, 4:] = True, True
    *_, both = sample(gpt, labels_B, (6, 8), PLAIN, generators(5, 2), Known(given_Bhw, known_Bhw, wanted_Bhw))
    assert torch.equal(both.known_Bhw, known_Bhw | wanted_Bhw)
    for i in range(2):
        alone = (x[i : i + 1] for x in (given_Bhw, known_Bhw, wanted_Bhw))
        *_, step = sample(gpt, labels_B[:1], (6, 8), PLAIN, generators(5 + i, 1), Known(*alone))
        assert torch.equal(step.tokens_Bhw[0], both.tokens_Bhw[i])


# As a GPU draws


def unrecordable(work: Work, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing")


def test_replayed_drawings_are_those_drawn_step_by_step_for_every_seed_label_and_option() -> None:
    plain, graphed = make(), make()
    graphed.graphs, recordings = Graphs(stand_in), []
    given_hw = torch.zeros(4, 4, dtype=torch.bool)
    given_hw[:2] = True
    known = Known(torch.full((2, 4, 4), 3), given_hw)
    options = SamplingOptions(steps=3, guidance=2.0)
    for changed, given in ((options, None), (replace(options, top_p=0.5), None), (options, known)):
        for seed in range(5):
            labels_B = torch.tensor([seed % 2, 2])
            ends = [list(sample(g, labels_B, (4, 4), changed, generators(seed, 2), given)) for g in (plain, graphed)]
            for ours, theirs in zip(*ends, strict=True):
                assert torch.equal(ours.tokens_Bhw, theirs.tokens_Bhw) and torch.equal(ours.known_Bhw, theirs.known_Bhw)
            recordings.append(graphed.graphs.recording is not None)
    assert recordings == [False, False, True, True, True] * 3, "from the third time on"
    for gpt in (plain, graphed):
        nn.init.normal_(gpt.head.weight, std=0.4, generator=torch.Generator().manual_seed(9))
    assert torch.equal(last(plain, 2, (4, 4), options, 8), last(graphed, 2, (4, 4), options, 8)), "weights were changed"


def test_where_nothing_can_be_recorded_a_warning_says_so_once_and_the_same_is_drawn() -> None:
    gpt, options = make(), SamplingOptions(steps=2)
    wanted = last(gpt, 2, (4, 4), options)
    gpt.graphs = Graphs(unrecordable)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs") as warned:
        assert all(torch.equal(last(gpt, 2, (4, 4), options), wanted) for _ in range(5))
    assert len(warned) == 1


def plan(gpt: GPT, device: str) -> Plan:
    """Of two grids of four cells, one of them seen."""
    cells_BLn, places_BL2 = torch.ones(2, 4, 4, dtype=torch.long), cell_positions(2, 2).expand(2, -1, -1)
    parts = (torch.tensor([0, 2]), cells_BLn[:, :1], places_BL2[:, :1], cells_BLn[:, 1:], cells_BLn[:, 1:] == 0)
    return Plan(*(x.to(device) for x in (*parts, places_BL2[:, 1:], torch.full((2, 3, 4), 0.5, dtype=torch.float64))))


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_no_operation_of_a_drawing_waits_for_the_device() -> None:
    """Nothing is read back: it runs where there is nothing to read, and no shape depends on a value."""
    options = SamplingOptions(top_k=3, guidance=2.0)
    with Operations() as seen:
        *_, drawn_BMn = draw(make(), plan(make(), "cpu"), [1, 2], options, True)
    waiting = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}
    assert "searchsorted" in seen.names and not seen.names & waiting
    gpt = make().to("meta")
    gpt.draw_in(torch.bfloat16)
    steps = list(draw(gpt, plan(gpt, "meta"), [1, 2], options, True))
    assert len(steps) == 2 and steps[-1].is_meta and steps[-1].shape == drawn_BMn.shape


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_devices_and_precisions_agree_where_a_gpu_draws() -> None:
    """On tensors without values, which say that they are on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            gpt = make()
        gpt.draw_in(torch.bfloat16)
        with torch.inference_mode():
            *_, drawn_BMn = draw(gpt, plan(gpt, "cuda"), [1, 2], SamplingOptions(top_k=3), True)
            logits_BLK = gpt.next_token(torch.zeros(1, 1, 32, device="cuda"), drawn_BMn[:1, :1, :0])
    assert drawn_BMn.is_cuda and logits_BLK.dtype == torch.float16 and gpt.graphs is not None
