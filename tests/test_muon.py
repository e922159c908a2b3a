"""The optimizer of the GPT: matrices take orthogonal steps of Adam's length, everything else is AdamW's."""

from __future__ import annotations

import pytest
import torch

from igpt.device import fast_bf16
from train.muon import STEP_RMS, Muon, orthogonal


@pytest.mark.parametrize("shape", [(64, 64), (192, 64), (64, 176)])
def test_an_orthogonal_matrix_has_singular_values_of_about_one_and_the_old_directions(shape: tuple[int, int]) -> None:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(drawn, full_matrices=False)
    matrix = left @ torch.linspace(0.05, 1, min(shape)).diag() @ right * 1e-4
    turned = orthogonal(matrix)
    assert turned.dtype == (torch.bfloat16 if fast_bf16(torch.device("cpu")) else torch.float32)
    turned = turned.float()
    values = torch.linalg.svdvals(turned)
    assert 0.5 < values.min() and values.max() < 1.3
    assert (left.mT @ turned @ right.mT).diagonal().min() > 0.5  # not another orthogonal matrix: the nearest


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert orthogonal(torch.zeros(8, 4)).abs().max() == 0


def test_a_step_of_a_matrix_is_as_long_as_one_of_adam_whatever_its_gradient() -> None:
    for scale in (1e-6, 1e3):
        matrix = torch.nn.Parameter(torch.zeros(96, 32))
        optimizer = Muon([{"params": [matrix], "orthogonal": True}], lr=1e-2)
        matrix.grad = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)) * scale
        optimizer.step()
        assert matrix.detach().square().mean().sqrt() == pytest.approx(STEP_RMS * 1e-2, rel=0.3)


def test_everything_else_moves_as_with_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    optimizer = Muon([{"params": [ours], "weight_decay": 0.1}], lr=1e-2)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        ours.grad = torch.randn(6, 5, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_weights_decay_by_the_rate() -> None:
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([{"params": [matrix], "weight_decay": 0.5, "orthogonal": True}], lr=0.1)
    matrix.grad = torch.zeros(4, 4)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((4, 4), 0.95))
