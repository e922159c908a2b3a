"""Reconstruction measures against independent arithmetic, and the losses of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tokenizer_vq.base import UserError
from train.evaluate import psnr
from train.losses import GradientSSIM, PatchDiscriminator, hinge, perceptual, ssim


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 40, 52, generator=generator) * 2 - 1
    return a, (a + 0.3 * torch.randn(a.shape, generator=generator)).clamp(-1, 1)


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    a, b = pair()
    for i in range(2):
        x, y = (np.moveaxis(image[i].double().numpy(), 0, -1) for image in (a, b))
        assert float(psnr(a, b)[i]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=2), abs=1e-3)
        wanted = structural_similarity(x, y, channel_axis=-1, data_range=2)
        assert float(ssim(a, b)[i]) == pytest.approx(wanted, abs=1e-4)


def test_the_weight_free_distance_is_zero_for_equals_and_grows_with_blur() -> None:
    a, _ = pair()
    distance = GradientSSIM()
    assert torch.allclose(distance(a, a), torch.zeros(2), atol=1e-5)
    blurred = [torch.nn.functional.avg_pool2d(a, k, stride=1, padding=k // 2) for k in (3, 7)]
    assert (distance(a, blurred[0]) < distance(a, blurred[1])).all()


def test_missing_perceptual_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="squeezenet1_1_features"):
        perceptual(str(tmp_path))
    assert isinstance(perceptual(None), GradientSSIM)


def test_the_discriminators_loss_is_zero_only_beyond_the_margins() -> None:
    real, fake = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -3.0])
    assert float(hinge(real, fake)) == 0
    assert float(hinge(fake, real)) == pytest.approx((3 + 2.5) / 2)


def test_the_discriminator_learns_to_tell_noise_from_stripes() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(width=8, layers=2)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3)
    stripes = torch.sign(torch.sin(torch.arange(32) / 2.0)).expand(4, 3, 32, 32)
    for _ in range(40):
        loss = hinge(critic(stripes), critic(torch.randn(4, 3, 32, 32)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5
