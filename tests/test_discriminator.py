"""The adversary: it learns, it looks at features where there are some, and it cannot push harder than its share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import squeezenet1_1

from igpt.evaluation.perceptual import LPIPS, LPIPS_LINEAR, SQUEEZENET, GradientSSIM
from train.decoder import (
    FeatureDiscriminator,
    PatchDiscriminator,
    adaptive_gan_gradient,
    discriminator_for,
    hinge_loss,
    mean_score,
)

CHANNELS = (64, 128, 256, 384, 384, 512, 512)


@pytest.fixture(scope="module")
def random_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the LPIPS weights, the weights random."""
    folder = tmp_path_factory.mktemp("features")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(squeezenet1_1().features.state_dict(), folder / SQUEEZENET)
        save_file({f"lin{i}": torch.rand(count) for i, count in enumerate(CHANNELS)}, folder / LPIPS_LINEAR)
    return folder


def test_the_discriminators_loss_is_zero_only_beyond_the_margins() -> None:
    real, fake = [torch.tensor([1.0, 2.0])], [torch.tensor([-1.0, -3.0])]
    assert float(hinge_loss(real, fake)) == 0
    assert float(hinge_loss(fake, real)) == pytest.approx((3 + 2.5) / 2)


def test_every_scale_has_the_same_say() -> None:
    assert float(mean_score([torch.ones(2, 1000), -torch.ones(2, 4)])) == 0


@pytest.mark.parametrize("on", ["pixels", "features"])
def test_the_discriminator_learns_to_tell_noise_from_stripes(on: str, random_features: Path) -> None:
    torch.manual_seed(0)
    small = PatchDiscriminator(width=8, layers=2)
    lpips = LPIPS(random_features)
    discriminator = small if on == "pixels" else FeatureDiscriminator(lpips, width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3)
    stripes = torch.sign(torch.sin(torch.arange(32) / 2.0)).expand(4, 3, 32, 32)
    for _ in range(40):
        noise = torch.randn(4, 3, 32, 32)
        loss = hinge_loss(discriminator(stripes, lpips.features(stripes)), discriminator(noise, lpips.features(noise)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5


def test_a_discriminator_of_features_and_pixels_reaches_the_picture_and_saves_no_features(
    random_features: Path,
) -> None:
    lpips = LPIPS(random_features)
    discriminator = discriminator_for(lpips)
    assert isinstance(discriminator_for(GradientSSIM()), PatchDiscriminator)
    assert not any("squeeze" in name or "features" in name for name in discriminator.state_dict())
    assert sum(p.numel() for p in discriminator.parameters()) < 4e6
    image = torch.rand(2, 3, 64, 48, requires_grad=True)
    scores = discriminator(image, lpips.features(image))
    mean_score(scores).backward()
    assert len(scores) == 5 and all(each.shape[0] == 2 for each in scores)
    assert image.grad is not None and float(image.grad.abs().sum()) > 0


@pytest.mark.parametrize("strength", [1e-6, 1.0, 1e6])
def test_the_adversary_pulls_as_hard_as_its_weight_says_and_no_harder(strength: float) -> None:
    leaf = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    main, side = 2 * leaf.detach(), leaf.detach().cos()
    gradient = adaptive_gan_gradient(leaf.square().sum(), strength * leaf.sin().sum(), 0.5, leaf)
    torch.testing.assert_close(gradient, main + 0.5 * main.norm() / side.norm() * side, rtol=1e-4, atol=1e-5)
    assert torch.equal(adaptive_gan_gradient(leaf.square().sum(), None, 0.0, leaf), main)
