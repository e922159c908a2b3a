"""The GPT's promises: causal in any order, a proper distribution, and a cache that changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from igpt.config import GPTConfig
from igpt.model import GPT, Dropout, attend, cell_positions, rotate, turns


def make(vocab_size: int = 7, **changes: object) -> GPT:
    torch.manual_seed(0)
    defaults = {"layers": 4, "width": 32, "heads": 2, "dropout": 0.0}
    gpt = GPT(GPTConfig(vocab_size, 2, **(defaults | changes)))  # type: ignore[arg-type]
    nn.init.normal_(gpt.head.weight, std=0.5)  # it starts at zero, where every promise would hold for nothing
    return gpt.eval()


def sequence(h: int, w: int, batch: int = 2, vocab_size: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Random tokens of a grid in a random order, their cells, and labels (one of them null)."""
    generator = torch.Generator().manual_seed(1)
    tokens_BL = torch.randint(vocab_size, (batch, h * w), generator=generator)
    order = torch.randperm(h * w, generator=generator)
    positions_BL2 = cell_positions(h, w, centred=True)[order].expand(batch, -1, -1)
    return tokens_BL, positions_BL2, torch.tensor([0, 2] * batch)[:batch]


@pytest.mark.parametrize("place", [0, 4, 11])
def test_a_query_does_not_move_when_any_token_at_or_after_it_changes(place: int) -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make(), sequence(3, 4)
    before = gpt(tokens_BL, positions_BL2, labels_B)
    changed_BL = tokens_BL.clone()
    changed_BL[:, place:] = (changed_BL[:, place:] + 1) % 7
    after = gpt(changed_BL, positions_BL2, labels_B)
    assert torch.equal(before[:, : place + 1], after[:, : place + 1])
    assert place == 11 or not torch.allclose(before[:, place + 1 :], after[:, place + 1 :], atol=1e-3)


def test_a_query_depends_on_the_label_on_its_cell_and_on_where_the_known_tokens_lie() -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make(), sequence(3, 4)
    before = gpt(tokens_BL, positions_BL2, labels_B)[:, -1]
    assert not torch.allclose(before, gpt(tokens_BL, positions_BL2, 1 - labels_B.clamp(max=1))[:, -1], atol=1e-3)
    moved = positions_BL2.clone()
    moved[:, -1] += 2
    assert not torch.allclose(before, gpt(tokens_BL, moved, labels_B)[:, -1], atol=1e-3)
    swapped = positions_BL2.clone()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    assert not torch.allclose(before, gpt(tokens_BL, swapped, labels_B)[:, -1], atol=1e-3)


@pytest.mark.parametrize("grid", [(1, 3), (2, 2)])
def test_the_probabilities_of_all_pictures_sum_to_one_in_every_order(grid: tuple[int, int]) -> None:
    gpt, cells = make(vocab_size=3).requires_grad_(False), grid[0] * grid[1]
    everything = torch.tensor(list(itertools.product(range(3), repeat=cells)))
    labels_B = torch.zeros(len(everything), dtype=torch.long)
    for order in itertools.permutations(range(cells)):
        tokens_BL = everything[:, list(order)]
        positions_BL2 = cell_positions(*grid, centred=True)[list(order)].expand(len(everything), -1, -1)
        logs = gpt(tokens_BL, positions_BL2, labels_B).log_softmax(-1).gather(-1, tokens_BL.unsqueeze(-1))
        assert float(logs.sum((1, 2)).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("chunks", [(1,) * 12, (1, 3, 5, 3), (6, 6), (12,)])
@torch.inference_mode()
def test_logits_with_the_cache_equal_logits_without(chunks: tuple[int, ...]) -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make(), sequence(3, 4)
    full = gpt(tokens_BL, positions_BL2, labels_B)
    cache, done = gpt.start(labels_B, 12), 0
    for chunk in chunks:
        asked = gpt.head(gpt.predict(positions_BL2[:, done : done + 1], cache)[0])
        assert torch.allclose(asked[:, 0], full[:, done], atol=1e-5)
        gpt.remember(tokens_BL[:, done : done + chunk], positions_BL2[:, done : done + chunk], cache)
        done += chunk


def test_attention_in_training_is_torchs_own_up_to_rounding_and_learns_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, wanted = (torch.randn(2, 3, 17, 8, generator=generator).bfloat16() for _ in range(4))
    found = []
    for attention in (attend, lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), atol=0.05)


def test_a_gpt_trained_in_bfloat16_is_causal_too() -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make().train(), sequence(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        before = gpt(tokens_BL, positions_BL2, labels_B)
        changed_BL = tokens_BL.clone()
        changed_BL[:, 4:] = (changed_BL[:, 4:] + 1) % 7
        after = gpt(changed_BL, positions_BL2, labels_B)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:])


def test_cells_asked_together_get_the_logits_they_get_alone() -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make(), sequence(3, 4)
    cache = gpt.start(labels_B, 12)
    gpt.remember(tokens_BL[:, :5], positions_BL2[:, :5], cache)
    together = gpt.predict(positions_BL2[:, 5:], cache)
    alone = [gpt.predict(positions_BL2[:, i : i + 1], cache) for i in range(5, 12)]
    for answers, each in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(answers, torch.cat(each, dim=1), atol=1e-5)


def test_the_opinion_before_the_last_query_block_is_the_answer_of_a_gpt_without_it() -> None:
    gpt, (tokens_BL, positions_BL2, labels_B) = make(layers=4), sequence(3, 4)
    found = []
    for _ in range(2):
        cache = gpt.start(labels_B, 12)
        gpt.remember(tokens_BL[:, :5], positions_BL2[:, :5], cache)
        found.append(gpt.predict(positions_BL2[:, 5:], cache))
        gpt.query_blocks = gpt.query_blocks[:-1]
    (last, before), (shorter, _) = found
    assert torch.equal(before, shorter) and not torch.allclose(before, last, atol=1e-3)


def test_rotation_depends_on_the_distance_of_two_cells_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        turned = [turns(torch.tensor([[cell]]).float(), 16, 100.0) for cell in (a, b)]
        return float((rotate(q, turned[0]) * rotate(k, turned[1])).sum())

    assert product((0, 0), (2, 5)) == pytest.approx(product((7, 3), (9, 8)), abs=1e-4)
    assert product((0, 0), (2, 5)) != pytest.approx(product((0, 0), (5, 2)), abs=1e-2)


def test_centred_positions_have_the_label_in_the_middle_of_any_grid() -> None:
    for h, w in ((1, 1), (3, 4), (16, 9)):
        positions_L2 = cell_positions(h, w, centred=True)
        assert torch.equal(positions_L2.mean(0), torch.zeros(2))
        assert torch.equal(cell_positions(h, w, centred=False)[-1], torch.tensor([h - 1.0, w - 1.0]))


def test_an_untrained_gpt_finds_all_tokens_equally_likely() -> None:
    gpt = GPT(GPTConfig(7, 2, layers=2, width=32, heads=2))
    tokens_BL, positions_BL2, labels_B = sequence(2, 3)
    assert torch.equal(gpt(tokens_BL, positions_BL2, labels_B), torch.zeros(2, 6, 7))


def test_the_config_can_say_arpg_with_the_parameters_of_the_published_models() -> None:
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in GPT(GPTConfig.arpg(*shape)).parameters()) / 1e6
            for shape in ((24, 1024, 16), (36, 1280, 20))
        ]
    # ARPG's README: 320M and 719M; its table of embeddings has two rows more than ours
    assert sizes == pytest.approx([320, 719], rel=0.01)


def test_the_names_of_the_weights_are_frozen() -> None:
    names = {name.replace(".0.", ".N.").replace(".1.", ".N.") for name in make().state_dict()}
    assert names == {
        "query", "tokens.weight", "labels.weight", "norm.weight", "head.weight",
        "shared_norm.weight", "shared_kv.weight", "shared_k_norm.weight",
        *(f"content_blocks.N.{part}.weight" for part in (
            "norm1", "project", "q_norm", "k_norm", "attention_out", "norm2",
            "feed_forward.gate_and_value", "feed_forward.out")),
        *(f"query_blocks.N.{part}.weight" for part in (
            "norm1", "project", "q_norm", "attention_out", "norm2",
            "feed_forward.gate_and_value", "feed_forward.out")),
    }  # fmt: skip


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
