"""The VQ tokenizer: shapes, round trips, and a quantizer that is exact and stays alive."""

from __future__ import annotations

import os
import sys
from subprocess import run

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tokenizer_vq.base import UserError
from tokenizer_vq.layers import Grain, ShuffleUp, fixed_noise
from tokenizer_vq.quantizer import AveragedCodes, codebook_usage
from tokenizer_vq.vq import VQConfig, VQTokenizer


def make() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQConfig(channels=(32, 32, 64), codes=32)).eval()


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 5), (7, 3)])
@torch.no_grad()
def test_grids_that_are_not_square_encode_and_decode_at_their_own_shape(h: int, w: int) -> None:
    tokenizer = make()
    images_BCHW = torch.rand(2, 3, h * 16, w * 16) * 2 - 1
    tokens_Bhw = tokenizer.encode(images_BCHW)
    assert tokens_Bhw.shape == (2, h, w) and tokens_Bhw.dtype == torch.int64
    assert 0 <= int(tokens_Bhw.min()) and int(tokens_Bhw.max()) < tokenizer.vocab_size
    assert tokenizer.decode(tokens_Bhw).shape == images_BCHW.shape


def test_the_codes_of_tokens_are_those_tokens_again() -> None:
    quantizer = make().quantizer
    tokens_Bhw = torch.randint(32, (2, 3, 5))
    assert torch.equal(quantizer.eval()(quantizer.lookup(tokens_Bhw)).tokens_Bhw, tokens_Bhw)


def test_a_picture_that_does_not_divide_into_tokens_is_refused_with_its_size() -> None:
    with pytest.raises(UserError, match="20x32"):
        make().encode(torch.zeros(1, 3, 32, 20))


def test_the_token_side_follows_from_the_config() -> None:
    assert VQTokenizer(VQConfig(channels=(8, 8, 8))).downsample == 16
    assert VQTokenizer(VQConfig(patch=2, channels=(8, 8))).downsample == 4


def test_the_config_can_say_the_published_vq16() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig.vq16())
    assert tokenizer.downsample == 16 and tokenizer.vocab_size == 16384
    # LlamaGen's README: 72M
    assert sum(p.numel() for p in tokenizer.parameters()) / 1e6 == pytest.approx(71.9, abs=0.2)


@torch.no_grad()
def test_the_default_is_lean_enough_for_a_laptop() -> None:
    with torch.device("meta"):
        tokenizer = VQTokenizer(VQConfig()).eval()
        assert sum(p.numel() for p in tokenizer.parameters()) < 12e6
        with FlopCounterMode(display=False) as counter:
            tokenizer.decode(torch.zeros(1, 16, 16, dtype=torch.long))
    assert counter.get_total_flops() < 20e9


def test_doubling_in_steps_starts_without_a_checkerboard() -> None:
    torch.manual_seed(0)
    doubled_BCHW = ShuffleUp(8, 4, smooth=False)(torch.randn(1, 8, 5, 5))
    corners = [doubled_BCHW[..., y::2, x::2] for y in (0, 1) for x in (0, 1)]
    assert all(torch.equal(corner, corners[0]) for corner in corners)


# Texture


@torch.no_grad()
def test_a_smooth_doubling_cannot_repeat_every_two_pixels_whatever_its_weights() -> None:
    """The four phases of a doubled flat field are the lattice that it draws where nothing is to be seen."""
    for smooth in (False, True):
        double = ShuffleUp(8, 4, smooth)
        torch.nn.init.normal_(double.conv.weight, generator=torch.Generator().manual_seed(0))
        inside = double(torch.ones(1, 8, 8, 8))[..., 4:-4, 4:-4]
        lattice = float((inside - inside.mean((-1, -2), keepdim=True)).abs().max())
        assert (lattice < 1e-5) is smooth


def grained() -> VQTokenizer:
    tokenizer = make()
    for grain in tokenizer.decoder.grains:
        torch.nn.init.constant_(grain.strength, 0.02)
    return tokenizer


GARBAGE = """
import torch
from tokenizer_vq.layers import Downsample
torch.manual_seed(0)
halve, x = Downsample(128), torch.randn(16, 128, 8, {width})
exact = halve(x)
with torch.autocast("cpu", torch.bfloat16):
    for _ in range(3):
        assert torch.allclose(halve(x).float(), exact, atol=0.05)
"""


@pytest.mark.parametrize("width", [2, 3, 4])
def test_halving_a_narrow_map_does_not_read_memory_that_nobody_wrote(width: int) -> None:
    # glibc fills new memory with large numbers; where another C library is, this is a plain comparison
    command = [sys.executable, "-c", GARBAGE.format(width=width)]
    assert run(command, env=os.environ | {"MALLOC_PERTURB_": "128"}).returncode == 0


@torch.no_grad()
def test_grain_is_fresh_in_training_and_always_the_same_in_a_finished_model() -> None:
    tokenizer, tokens_Bhw = grained(), torch.full((2, 4, 4), 7)
    first, second = tokenizer.decode(tokens_Bhw)
    assert torch.equal(first, second) and torch.equal(first, tokenizer.decode(tokens_Bhw)[0])
    assert not torch.allclose(first, tokenizer.train().decode(tokens_Bhw)[0], atol=1e-3)
    assert not torch.allclose(first, make().decode(tokens_Bhw)[0], atol=1e-3)  # it is to be seen


@torch.no_grad()
def test_a_window_of_a_picture_has_the_grain_of_its_place() -> None:
    grain = Grain(3).eval()
    torch.nn.init.ones_(grain.strength)
    whole = grain(torch.zeros(1, 3, 40, 40), 0, 0)
    assert torch.equal(grain(torch.zeros(1, 3, 8, 12), 16, 24), whole[..., 16:24, 24:36])
    # Deep inside, a decoded window is the picture it was cut from, up to what GroupNorm makes of its colours.
    tokenizer, tokens_Bhw = grained(), torch.full((1, 12, 12), 7)
    part = tokenizer.decode(tokens_Bhw[:, 2:, 3:], at=(2, 3))[..., 64:96, 64:96]
    elsewhere = tokenizer.decode(tokens_Bhw[:, 2:, 3:])[..., 64:96, 64:96]
    inside = tokenizer.decode(tokens_Bhw)[..., 96:128, 112:144]
    assert float((part - inside).abs().mean()) < 0.2 * float((elsewhere - inside).abs().mean())


def test_the_fixed_noise_is_noise() -> None:
    noise = fixed_noise(0, 0, 256, 256, seed=16)
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(1, abs=0.02)
    spectrum = torch.fft.rfft2(noise).abs().square() / noise.numel()
    assert float(spectrum.max()) < 20  # of white noise: none of 32,000 powers of mean 1 stands out
    assert float((noise * fixed_noise(0, 0, 256, 256, seed=48)).mean().abs()) < 0.02
    assert [round(float(x), 3) for x in fixed_noise(3, 5, 1, 3, seed=1)[0]] == [
        -0.02,
        0.535,
        -0.386,
    ]  # on every machine


# The quantizer


def test_the_quantizer_decides_in_float32_under_autocast() -> None:
    quantizer = AveragedCodes(512, 8).eval()
    z_BEhw = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = quantizer(z_BEhw)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z_BEhw)
        careless = (F.normalize(z_BEhw.movedim(1, -1), dim=-1) @ quantizer.codebook_KE.t()).argmax(-1)
    assert torch.equal(plain.tokens_Bhw, mixed.tokens_Bhw) and mixed.codes_BEhw.dtype == torch.float32
    assert not torch.equal(plain.tokens_Bhw, careless)  # what bfloat16 would have done: the test can fail


def test_gradients_pass_straight_through_to_the_input() -> None:
    quantizer = AveragedCodes(16, 4).eval()
    z_BEhw = torch.randn(1, 4, 3, 3, requires_grad=True)
    quantizer(z_BEhw).codes_BEhw.square().sum().backward()
    assert z_BEhw.grad is not None and float(z_BEhw.grad.abs().sum()) > 0


def test_dead_codes_come_back() -> None:
    """A codebook of which one corner is used: the others are moved onto inputs after a while, and found."""
    torch.manual_seed(0)
    quantizer = AveragedCodes(16, 4).train()
    with torch.no_grad():
        quantizer.codebook_KE[1:] = torch.tensor([-1.0, 0, 0, 0])
        quantizer.codebook_KE[0] = torch.tensor([1.0, 0, 0, 0])
    quantizer.restart_averages()
    generator = torch.Generator().manual_seed(0)

    def inputs() -> torch.Tensor:
        z = torch.randn(4, 4, 4, 4, generator=generator) * 0.3
        z[:, 0] += 1
        return z

    assert codebook_usage(quantizer(inputs(), generator).tokens_Bhw, 16).used == 1 / 16
    for _ in range(400):
        tokens_Bhw = quantizer(inputs(), generator).tokens_Bhw
    assert codebook_usage(tokens_Bhw, 16).used > 0.9


def test_the_codebook_starts_from_k_means_of_the_first_inputs() -> None:
    torch.manual_seed(0)
    corners = F.normalize(torch.randn(4, 4), dim=-1)
    z_BEhw = corners.repeat(16, 1).t().reshape(1, 4, 8, 8) + 0.02 * torch.randn(1, 4, 8, 8)
    quantizer = AveragedCodes(16, 4).train()
    assert float((corners @ quantizer.codebook_KE.t()).max(1).values.min()) < 0.9
    quantizer(z_BEhw, torch.Generator().manual_seed(0))
    assert float((corners @ quantizer.codebook_KE.t()).max(1).values.min()) > 0.99


def test_learning_moves_the_codebook_and_evaluation_does_not() -> None:
    quantizer, z_BEhw = AveragedCodes(8, 4), torch.randn(2, 4, 4, 4)
    before = quantizer.codebook_KE.clone()
    quantizer.eval()(z_BEhw)
    assert torch.equal(quantizer.codebook_KE, before)
    quantizer.train()(z_BEhw)
    assert not torch.equal(quantizer.codebook_KE, before)


def test_codebook_usage_counts_codes_and_their_evenness() -> None:
    even = codebook_usage(torch.arange(16), 32)
    assert even.used == 0.5 and even.perplexity == pytest.approx(16)
    assert codebook_usage(torch.zeros(9, dtype=torch.long), 32).perplexity == pytest.approx(1)
