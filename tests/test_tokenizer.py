"""The VQ tokenizer: shapes, round trips, and texture of noise that stays where it is."""

from __future__ import annotations

import os
import sys
from subprocess import run
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tokenizer_vq.base import UserError
from tokenizer_vq.layers import NoiseInjection, ShuffleUp, cached_noise, fixed_noise
from tokenizer_vq.vq import VQConfig, VQTokenizer


def make() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQConfig(channels=(32, 64), codes=32)).eval()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 5), (7, 3)])
@torch.no_grad()
def test_grids_that_are_not_square_encode_and_decode_at_their_own_shape(h: int, w: int) -> None:
    tokenizer = make()
    images_BCHW = torch.rand(2, 3, h * 8, w * 8) * 2 - 1
    tokens_Bhw = tokenizer.encode(images_BCHW)
    assert tokens_Bhw.shape == (2, h, w) and tokens_Bhw.dtype == torch.int64
    assert 0 <= int(tokens_Bhw.min()) and int(tokens_Bhw.max()) < tokenizer.vocab_size
    assert tokenizer.decode(tokens_Bhw).shape == images_BCHW.shape


def test_a_picture_that_does_not_divide_into_tokens_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match="20x32"):
        make().encode(torch.zeros(1, 3, 32, 20))


def test_the_token_side_follows_from_the_config() -> None:
    assert VQTokenizer(VQConfig(channels=(8, 8, 8))).downsample == 16
    assert VQTokenizer(VQConfig(patch=2, channels=(8, 8))).downsample == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("patch", 3),
        ("patch", 8),
        ("channels", ()),
        ("channels", (32, 0)),
        ("channels", 32),
        ("channels", [32]),
        ("encoder_blocks", 0),
        ("decoder_blocks", -1),
        ("head", (48,)),
        ("codes", 1),
        ("codes", 65537),
        ("codes", 64.0),
        ("code_width", "8"),
        ("code_width", True),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_in_one_sentence(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^.*{field}.* want.*$"):
        VQConfig(**{field: value})


@torch.no_grad()
def test_the_default_is_lean_enough_for_a_laptop() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig()).eval()
        assert sum(p.numel() for p in tokenizer.parameters()) < 14e6
        with FlopCounterMode(display=False) as counter:
            tokenizer.decode(torch.zeros(1, 32, 32, dtype=torch.long))
    assert counter.get_total_flops() < 30e9


def test_doubling_in_steps_starts_without_a_checkerboard() -> None:
    torch.manual_seed(0)
    doubled_BCHW = torch.nn.functional.pixel_shuffle(ShuffleUp(8, 4).conv(torch.randn(1, 8, 5, 5)), 2)
    corners = [doubled_BCHW[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]
    assert all(torch.equal(corner, corners[0]) for corner in corners)


# Texture


@torch.no_grad()
def test_a_doubling_cannot_repeat_every_two_pixels_whatever_its_weights() -> None:
    """The four phases of a doubled flat field are the lattice that it draws where nothing is to be seen."""
    double = ShuffleUp(8, 4)
    torch.nn.init.normal_(double.conv.weight, generator=torch.Generator().manual_seed(0))
    inside = double(torch.ones(1, 8, 8, 8))[..., 4:-4, 4:-4]
    assert float((inside - inside.mean((-1, -2), keepdim=True)).abs().max()) < 1e-5


def textured() -> VQTokenizer:
    tokenizer = make()
    for noise in tokenizer.decoder.grains:
        torch.nn.init.constant_(noise.strength, 0.02)
    return tokenizer


GARBAGE = """
import torch
from tokenizer_vq.layers import Downsample
torch.manual_seed(0)
halve = Downsample(128)
for width in (2, 3, 4):
    x = torch.randn(16, 128, 8, width)
    exact = halve(x)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert torch.allclose(halve(x).float(), exact, atol=0.05)
"""


def test_halving_a_narrow_map_does_not_read_memory_that_nobody_wrote() -> None:
    # glibc fills new memory with large numbers; where another C library is, this is a plain comparison
    assert run([sys.executable, "-c", GARBAGE], env=os.environ | {"MALLOC_PERTURB_": "128"}).returncode == 0


@torch.no_grad()
def test_noise_is_fresh_in_training_and_always_the_same_in_a_finished_model() -> None:
    tokenizer, tokens_Bhw = textured(), torch.full((2, 4, 4), 7)
    first, second = tokenizer.decode(tokens_Bhw)
    assert torch.equal(first, second) and torch.equal(first, tokenizer.decode(tokens_Bhw)[0])
    assert not torch.allclose(first, tokenizer.train().decode(tokens_Bhw)[0], atol=1e-3)
    assert not torch.allclose(first, make().decode(tokens_Bhw)[0], atol=1e-3)  # it is to be seen


@torch.no_grad()
def test_a_window_of_a_picture_has_the_noise_of_its_place() -> None:
    noise = NoiseInjection(3).eval()
    torch.nn.init.ones_(noise.strength)
    whole = noise(torch.zeros(1, 3, 40, 40), 0, 0)
    assert torch.equal(noise(torch.zeros(1, 3, 8, 12), 16, 24), whole[..., 16:24, 24:36])
    # Deep inside, a decoded window is the picture it was cut from, up to what GroupNorm makes of its colours.
    tokenizer, tokens_Bhw = textured(), torch.full((1, 24, 24), 7)
    part = tokenizer.decode(tokens_Bhw[:, 4:, 6:], at=(4, 6))[..., 64:96, 64:96]
    elsewhere = tokenizer.decode(tokens_Bhw[:, 4:, 6:])[..., 64:96, 64:96]
    inside = tokenizer.decode(tokens_Bhw)[..., 96:128, 112:144]
    assert float((part - inside).abs().mean()) < 0.2 * float((elsewhere - inside).abs().mean())


def test_the_fixed_noise_is_noise() -> None:
    noise = fixed_noise(0, 0, 256, 256, seed=16)
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1, abs=0.02)
    spectrum = torch.fft.rfft2(noise).abs().square() / noise.numel()
    assert float(spectrum.max()) < 20  # of white noise: none of 32,000 powers of mean 1 stands out
    assert float((noise * fixed_noise(0, 0, 256, 256, seed=48)).mean().abs()) < 0.02
    on_every_machine = torch.tensor([[-0.0203, 0.5345, -0.3857]])
    assert torch.allclose(fixed_noise(3, 5, 1, 3, seed=1), on_every_machine, atol=1e-4)


@torch.no_grad()
def test_a_second_picture_of_a_size_makes_no_noise_anew_and_has_the_same_pixels() -> None:
    cached_noise.cache_clear()
    tokenizer, tokens_Bhw = textured(), torch.full((1, 4, 6), 7)
    first = tokenizer.decode(tokens_Bhw)
    made = cached_noise.cache_info().misses
    assert made == len(tokenizer.decoder.grains)
    assert torch.equal(tokenizer.decode(tokens_Bhw), first) and cached_noise.cache_info().misses == made
    tokenizer.decode(tokens_Bhw, at=(0, 1))
    assert cached_noise.cache_info().misses == 2 * made


def test_cached_noise_is_bounded_and_of_use_where_gradients_flow() -> None:
    cached_noise.cache_clear()
    noise = NoiseInjection(3).eval()
    with torch.inference_mode():
        noise(torch.zeros(1, 3, 513, 512), 0, 0)
        assert cached_noise.cache_info().currsize == 0
        noise(torch.zeros(1, 3, 8, 8), 0, 0)
    noise(torch.zeros(1, 3, 8, 8), 0, 0).sum().backward()
    assert noise.strength.grad is not None and cached_noise.cache_info().hits == 1
