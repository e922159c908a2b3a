"""The packed product is the plain product, and never a stale one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from igpt.cpu import Linear, packing_works
from igpt.device import fast_bf16


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_in_inference_mode_the_product_is_that_of_plain_torch(rows: int) -> None:
    torch.manual_seed(0)
    layer, x = Linear(48, 80), torch.randn(2, rows, 48)
    with torch.inference_mode():
        assert torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-5)


def test_drawing_in_bfloat16_rounds_to_it_and_adds_up_in_float32() -> None:
    torch.manual_seed(0)
    layer, x = Linear(512, 80), torch.randn(2, 9, 512)
    with torch.inference_mode():
        exact = layer(x)
        layer.drawing_dtype = torch.bfloat16
        rough = layer(x)
    works = packing_works(torch.bfloat16)
    assert works or not fast_bf16(torch.device("cpu"))
    assert rough.dtype == torch.float32 and torch.equal(rough, exact) != works
    assert float((rough - exact).abs().mean() / exact.abs().mean()) < 0.01
    assert torch.equal(layer(x), F.linear(x, layer.weight)), "only drawing is rounded"


@pytest.mark.skipif(not packing_works(torch.float32), reason="the plain product promises no order of adding up")
@pytest.mark.parametrize("width", [256, 704, 1408])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_comes_out_the_same_whatever_rows_go_with_it(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    layer, x = Linear(width, 256), torch.randn(2, 304, width) * 3
    layer.drawing_dtype = dtype
    with torch.inference_mode():
        together = layer(x)
        assert torch.equal(layer(x[:1, :1]), together[:1, :1])
        for count in (1, 7, 38, 64, 65, 256):
            assert torch.equal(layer(x[:, :count]), together[:, :count])


def test_changed_weights_are_packed_anew() -> None:
    layer, x = Linear(16, 16), torch.ones(1, 4, 16)
    with torch.inference_mode():
        layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.inference_mode():
        assert torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-5)
    layer.load_state_dict({"weight": torch.zeros(16, 16)})
    with torch.inference_mode():
        assert not layer(x).any()


def test_weights_changed_by_a_fused_optimizer_are_packed_anew() -> None:
    layer, x = Linear(16, 16), torch.ones(1, 4, 16)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1.0, fused=True)
    for _ in range(2):
        layer.eval()
        with torch.inference_mode():
            assert torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-5)
        layer.train()(x).sum().backward()
        optimizer.step()


def test_weights_that_cannot_be_packed_are_multiplied_as_they_are() -> None:
    """Weights made in inference mode have no version, so nobody could tell a stale copy."""
    with torch.inference_mode():
        layer, x = Linear(16, 8), torch.ones(1, 2, 16)
        assert torch.equal(layer(x), F.linear(x, layer.weight)) and layer._packed is None


def test_under_autocast_the_product_is_autocasts_and_packing_is_not_given_up_for_later() -> None:
    layer, x, works = Linear(16, 8), torch.ones(1, 2, 16), packing_works(torch.float32)
    packing_works.cache_clear()
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer(x)
    assert (layer._packed is not None) == works


def test_a_layer_that_has_drawn_can_be_copied_and_trained() -> None:
    layer, x = Linear(16, 16), torch.ones(1, 4, 16)
    with torch.inference_mode():
        before = layer(x)
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        assert torch.allclose(twin(x), before, atol=1e-6)
    twin(x).sum().backward()
    assert twin.weight.grad is not None
