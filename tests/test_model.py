"""The GPT's promises: causal in any order and within a cell, a proper distribution, a cache that changes nothing."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from igpt import checkpoint
from igpt.config import GPTConfig
from igpt.cpu import Dropout, causal_attention
from igpt.model import GPT, apply_rope, cell_positions, freqs_cis, to_cells, to_grid

PARITY = Path(__file__).parent / "data"


def make(vocab_size: int = 7, **changes: object) -> GPT:
    torch.manual_seed(0)
    defaults = {"layers": 4, "width": 32, "heads": 2, "dropout": 0.0, "head_layers": 2}
    gpt = GPT(GPTConfig(vocab_size, 2, **(defaults | changes)))  # type: ignore[arg-type]
    nn.init.normal_(gpt.head.weight, std=0.5)  # it starts at zero, where every promise would hold for nothing
    nn.init.normal_(gpt.slots, std=0.2)
    nn.init.normal_(gpt.before.weight, std=0.2)
    nn.init.normal_(gpt.tokens.weight, std=0.5)
    return gpt.eval()


def sequence(h: int, w: int, cell: int = 2, batch: int = 2, vocab_size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random cells of a grid in a random order, their places, and labels (one of them null)."""
    generator = torch.Generator().manual_seed(1)
    cells_BLn = torch.randint(vocab_size, (batch, h * w, cell**2), generator=generator)
    order = torch.randperm(h * w, generator=generator)
    positions_BL2 = cell_positions(h, w)[order].expand(batch, -1, -1)
    return cells_BLn, positions_BL2, torch.tensor([0, 2] * batch)[:batch]


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_query_does_not_move_when_a_cell_at_or_after_it_changes(place: int) -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(), sequence(3, 4)
    before = gpt(cells_BLn, positions_BL2, labels_B)
    changed_BLn = cells_BLn.clone()
    changed_BLn[:, place:] = (changed_BLn[:, place:] + 1) % 7
    after = gpt(changed_BLn, positions_BL2, labels_B)
    assert torch.equal(before[:, :place], after[:, :place])
    assert torch.equal(before[:, place, 0], after[:, place, 0]), "the first token of a cell knows nothing of the cell"
    assert place == 11 or not torch.allclose(before[:, place + 1 :], after[:, place + 1 :], atol=1e-3)


@pytest.mark.parametrize("changed", range(4))
def test_a_token_moves_when_an_earlier_token_of_its_cell_changes_and_not_for_a_later_one(changed: int) -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(), sequence(2, 3)
    before = gpt(cells_BLn, positions_BL2, labels_B)
    other_BLn = cells_BLn.clone()
    other_BLn[:, -1, changed] = (other_BLn[:, -1, changed] + 1) % 7  # the last cell is content of no other
    after = gpt(other_BLn, positions_BL2, labels_B)
    for token in range(4):
        same = torch.allclose(before[:, -1, token], after[:, -1, token], atol=1e-4)
        assert same == (token <= changed), token
    assert torch.equal(before[:, :-1], after[:, :-1])


def test_within_a_cell_the_targets_are_told_and_not_what_training_shows() -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(), sequence(2, 2)
    shown_BLn = cells_BLn.clone()
    shown_BLn[:, -1] = 0  # the last cell is shown to nobody
    told = gpt(shown_BLn, positions_BL2, labels_B, cells_BLn)
    assert torch.equal(told, gpt(cells_BLn, positions_BL2, labels_B))


def test_a_query_depends_on_the_label_on_its_place_and_on_where_the_known_cells_lie() -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(), sequence(3, 4)
    before = gpt(cells_BLn, positions_BL2, labels_B)[:, -1]
    assert not torch.allclose(before, gpt(cells_BLn, positions_BL2, 1 - labels_B.clamp(max=1))[:, -1], atol=1e-4)
    moved = positions_BL2.clone()
    moved[:, -1] += 2
    assert not torch.allclose(before, gpt(cells_BLn, moved, labels_B)[:, -1], atol=1e-4)
    swapped = positions_BL2.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert not torch.allclose(before, gpt(cells_BLn, swapped, labels_B)[:, -1], atol=1e-4)


@pytest.mark.parametrize(("grid", "cell"), [((1, 3), 1), ((2, 2), 1), ((1, 2), 2), ((2, 1), 2)])
def test_the_probabilities_of_all_pictures_sum_to_one_in_every_order(grid: tuple[int, int], cell: int) -> None:
    vocab_size = 3 if cell == 1 else 2
    gpt, cells = make(vocab_size, cell=cell).requires_grad_(False), grid[0] * grid[1]
    everything = torch.tensor(list(itertools.product(range(vocab_size), repeat=cells * cell**2)))
    everything_BLn = everything.view(-1, cells, cell**2)
    labels_B = torch.zeros(len(everything), dtype=torch.long)
    for order in itertools.permutations(range(cells)):
        cells_BLn = everything_BLn[:, list(order)]
        positions_BL2 = cell_positions(*grid)[list(order)].expand(len(everything), -1, -1)
        logs = gpt(cells_BLn, positions_BL2, labels_B).log_softmax(-1).gather(-1, cells_BLn.unsqueeze(-1))
        assert float(logs.sum((1, 2, 3)).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("cell", [1, 2])
@pytest.mark.parametrize("chunks", [(1,) * 12, (1, 3, 5, 3), (6, 6), (12,)])
@torch.inference_mode()
def test_logits_with_the_cache_equal_logits_without(chunks: tuple[int, ...], cell: int) -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(cell=cell), sequence(3, 4, cell)
    full = gpt(cells_BLn, positions_BL2, labels_B)
    cache, done = gpt.init_cache(labels_B, 12), 0
    for chunk in chunks:
        answers = gpt.query_hidden(positions_BL2[:, done : done + 1], cache)
        for j in range(cell**2):
            logits = gpt.next_token(answers, cells_BLn[:, done : done + 1, :j])
            assert torch.allclose(logits[:, 0], full[:, done, j], atol=1e-5)
        gpt.append(cells_BLn[:, done : done + chunk], positions_BL2[:, done : done + chunk], cache)
        done += chunk


@pytest.mark.parametrize("name", ["paintings", "pixels"])
def test_the_files_in_the_box_give_the_logits_they_were_published_with(name: str) -> None:
    gpt, parity = checkpoint.load(name).gpt, load_file(PARITY / f"{name}.safetensors")
    cells_BLn, order_BL = to_cells(parity["grid_BHW"].long(), gpt.config.cell), parity["order_BL"].long()
    cells_BLn = cells_BLn.gather(1, order_BL.unsqueeze(-1).expand_as(cells_BLn))
    rows, columns = (side // gpt.config.cell for side in parity["grid_BHW"].shape[1:])
    with torch.no_grad():
        logits = gpt(cells_BLn, cell_positions(rows, columns)[order_BL], parity["label_B"].long())
    assert torch.allclose(logits[..., ::16], parity["logits_BLnK"], atol=1e-3)
    nats = F.cross_entropy(logits.flatten(0, 2), cells_BLn.flatten())
    assert float(nats) == pytest.approx(float(parity["nats"]), abs=1e-4)


def test_cells_and_grids_are_inverse_and_tokens_of_a_cell_lie_in_rows() -> None:
    grid_Bhw = torch.arange(48).view(2, 4, 6)
    cells_BLn = to_cells(grid_Bhw, 2)
    assert cells_BLn[0, :2].tolist() == [[0, 1, 6, 7], [2, 3, 8, 9]]
    assert torch.equal(to_grid(cells_BLn, 2, 2), grid_Bhw)


def test_attention_in_training_is_torchs_own_up_to_rounding_and_learns_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, wanted = (torch.randn(2, 3, 17, 8, generator=generator).bfloat16() for _ in range(4))
    found = []
    for attention in (causal_attention, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=0.05)


def test_a_gpt_trained_in_bfloat16_is_causal_too() -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make().train(), sequence(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = gpt(cells_BLn, positions_BL2, labels_B)
        changed_BLn = cells_BLn.clone()
        changed_BLn[:, 4:] = (changed_BLn[:, 4:] + 1) % 7
        after = gpt(changed_BLn, positions_BL2, labels_B)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_cells_asked_together_get_the_answers_they_get_alone() -> None:
    gpt, (cells_BLn, positions_BL2, labels_B) = make(), sequence(3, 4)
    cache = gpt.init_cache(labels_B, 12)
    gpt.append(cells_BLn[:, :5], positions_BL2[:, :5], cache)
    together = gpt.query_hidden(positions_BL2[:, 5:], cache)
    alone = [gpt.query_hidden(positions_BL2[:, i : i + 1], cache) for i in range(5, 12)]
    assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-5)


def test_rotation_depends_on_the_distance_of_two_cells_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        freqs = [freqs_cis(torch.tensor([[cell]]).float(), 16, 100.0) for cell in (a, b)]
        return float((apply_rope(q, freqs[0]) * apply_rope(k, freqs[1])).sum())

    assert product((0, 0), (2, 5)) == pytest.approx(product((7, 3), (9, 8)), abs=1e-4)
    assert product((0, 0), (2, 5)) != pytest.approx(product((0, 0), (5, 2)), abs=1e-2)


def test_positions_have_the_label_in_the_middle_of_any_grid() -> None:
    for h, w in ((1, 1), (3, 4), (16, 9)):
        assert torch.equal(cell_positions(h, w).mean(0), torch.zeros(2))
        assert torch.equal(cell_positions(h, w)[-1] - cell_positions(h, w)[0], torch.tensor([h - 1.0, w - 1.0]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_whole_forward_pass_can_be_compiled_as_one_graph_and_learns_the_same(backend: str) -> None:
    """A rotation as complex numbers could not be: Inductor has none."""
    gpt, inputs, found = make().train(), sequence(3, 4), []
    for forward in (gpt, torch.compile(gpt, fullgraph=True, dynamic=False, backend=backend)):
        loss = F.cross_entropy(forward(*inputs).flatten(0, 2), inputs[0].flatten())
        found.append([loss, *torch.autograd.grad(loss, gpt.query_blocks.parameters())])
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*found, strict=True))


def test_an_untrained_gpt_finds_all_tokens_equally_likely() -> None:
    gpt = GPT(GPTConfig(7, 2, layers=2, width=32, heads=2))
    assert torch.equal(gpt(*sequence(2, 3)), torch.zeros(2, 6, 4, 7))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cell", 3),
        ("cell", 0),
        ("layers", 3),
        ("width", 30),
        ("heads", 3),
        ("labels", -1),
        ("vocab_size", 2.5),
        ("dropout", 1.5),
        ("rope_base", 0.0),
    ],
)
def test_a_shape_that_no_gpt_can_have_is_refused_with_its_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=str(value)):
        GPTConfig(**({"vocab_size": 7, "labels": 2} | {field: value}))  # type: ignore[arg-type]


def test_the_names_of_the_weights_are_frozen() -> None:
    block = ["norm1", "project", "q_norm", "attention_out", "norm2", "feed_forward.gate_and_value", "feed_forward.out"]
    names = ["tokens", "labels", "norm", "head", "shared_norm", "shared_kv", "shared_k_norm", "before", "head_norms.N"]
    names += [f"head_blocks.N.{part}" for part in ("gate_and_value", "out")]
    names += [f"content_blocks.N.{part}" for part in (*block, "k_norm")] + [f"query_blocks.N.{part}" for part in block]
    found = {re.sub(r"\.\d\b", ".N", name) for name in make().state_dict()}
    assert found == {"query", "slots", *(f"{name}.weight" for name in names)}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_blanks_that_share_keeps_the_mean_and_lets_gradients_through_where_it_kept(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(401, 251, requires_grad=True)  # an odd number of elements
    dropped = Dropout(p).train()(x)
    assert float((dropped == 0).float().mean()) == pytest.approx(p, abs=0.005)
    assert p == 1 or float(dropped.detach().mean()) == pytest.approx(1, abs=0.01)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)
    assert torch.equal(Dropout(p).eval()(x), x)


def test_dropout_is_independent_from_element_to_element_and_repeats_with_the_seed() -> None:
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(Dropout(0.5).train()(torch.ones(400, 400)) / 2)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    for shift in (1, 2, 3, 4, 400):
        assert float((draws[0].flatten() * draws[0].flatten().roll(shift)).mean()) == pytest.approx(0.25, abs=0.01)
