"""Reconstruction measures against independent arithmetic, and the losses of training."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from igpt.evaluation.perceptual import (
    LPIPS,
    EncoderDistance,
    GradientSSIM,
    normalize_channels,
    perceptual,
    psnr,
    reconstruction,
    ssim,
)
from igpt.image_gpt import ImageGPT
from tokenizer_vq.base import UserError


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 40, 52, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    a, b = pair()
    for i in range(2):
        x, y = (np.moveaxis(image[i].double().numpy() / 2 + 0.5, 0, -1) for image in (a, b))
        assert float(psnr(a, b)[i]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), abs=1e-3)
        wanted = structural_similarity(x, y, channel_axis=-1, data_range=1)
        assert float(ssim(a, b)[i]) == pytest.approx(wanted, abs=1e-4)


def test_the_weight_free_distance_is_zero_for_equals_and_grows_with_blur() -> None:
    a, _ = pair()
    distance = GradientSSIM()
    assert torch.allclose(distance(a, a), torch.zeros(2), atol=1e-5)
    blurred = [torch.nn.functional.avg_pool2d(a, k, stride=1, padding=k // 2) for k in (3, 7)]
    assert (distance(a, blurred[0]) < distance(a, blurred[1])).all()


def test_vectors_of_no_length_at_all_have_a_finite_gradient() -> None:
    x = torch.randn(2, 5, 3, 4)
    x[0, :, 1, 2] = 0
    normalized = normalize_channels(x.requires_grad_(), 1e-5)
    assert torch.allclose(normalized.norm(dim=1), (x.norm(dim=1) > 0).float(), atol=1e-4)
    (gradient,) = torch.autograd.grad(normalized.sum(), x)
    assert float(gradient.abs().max()) <= 1e5


def test_missing_perceptual_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="squeezenet1_1_features"):
        perceptual(str(tmp_path))
    assert isinstance(perceptual(None), GradientSSIM) and isinstance(perceptual("none"), GradientSSIM)
    with pytest.raises(UserError, match="no model"):
        perceptual("nobody")
    with pytest.raises(UserError, match="its tokens are colours"):
        perceptual("pixels")


def test_the_encoder_of_a_model_judges_pictures_where_there_are_no_lpips_weights(tiny_folder: Path) -> None:
    distance = perceptual(str(tiny_folder))
    assert isinstance(distance, EncoderDistance)
    a, _ = pair()
    a = a[..., : a.shape[-2] - 1, : a.shape[-1] - 1]  # sides that are no multiple of a token's
    assert torch.equal(distance(a, a), torch.zeros(2))
    blurred = [torch.nn.functional.avg_pool2d(a, k, stride=1, padding=k // 2).requires_grad_() for k in (3, 7)]
    near, far = (distance(a, b) for b in blurred)
    assert (near < far).all()
    far.sum().backward()
    assert blurred[1].grad is not None and blurred[1].grad.abs().max() > 0
    assert not any(weight.requires_grad for weight in distance.parameters())


def test_a_tokenizer_is_measured_on_tiles_of_any_kind(each_model: ImageGPT) -> None:
    """Also of a palette, whose pictures are as small as sprites are."""
    side, _ = each_model.grids.native_size
    tiles = torch.rand(5, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = reconstruction(each_model.tokenizer, tiles.split(2), GradientSSIM())
    assert found.keys() == {"psnr", "ssim", "gradient-ssim", "codes_used", "perplexity"}
    recon = each_model.tokenizer.decode(each_model.tokenizer.encode(tiles)).detach().clamp(-1, 1)
    assert found["psnr"] == pytest.approx(float(psnr(tiles, recon).mean()), rel=1e-4)
    assert found["gradient-ssim"] == pytest.approx(float(GradientSSIM()(tiles, recon).mean()), rel=1e-4)
    assert 0 < found["codes_used"] <= 1 and 1 <= found["perplexity"] <= each_model.tokenizer.vocab_size


FEATURES = Path(os.environ.get("IGPT_FEATURES", Path(__file__).parent.parent.parent / "shared" / "features"))


@pytest.mark.skipif(not FEATURES.is_dir(), reason="no LPIPS weights: the variable IGPT_FEATURES names their folder")
def test_lpips_of_the_published_example() -> None:
    """torchmetrics' documentation: seed 123, two rand(10, 3, 100, 100) * 2 - 1, SqueezeNet: 0.1008."""
    generator = torch.Generator().manual_seed(123)
    a, b = (torch.rand(10, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert float(LPIPS(FEATURES)(a, b).mean()) == pytest.approx(0.1008, abs=5e-5)
