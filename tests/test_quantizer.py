"""The codebook: exact whatever the precision around it, and alive."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from igpt.checkpoint import load, save
from igpt.config import GPTConfig
from igpt.model import GPT
from tokenizer_vq.quantizer import EMACodebook, codebook_usage
from tokenizer_vq.vq import VQConfig, VQTokenizer


def make() -> EMACodebook:
    torch.manual_seed(0)
    return EMACodebook(240, 8)


def test_the_codes_of_tokens_are_those_tokens_again() -> None:
    quantizer = make()
    tokens_Bhw = torch.arange(240).view(2, 10, 12)
    codes_BEhw = quantizer.eval().lookup(tokens_Bhw)
    assert codes_BEhw.shape == (2, 8, 10, 12)
    assert torch.equal(quantizer(codes_BEhw).tokens_Bhw, tokens_Bhw)


def test_what_comes_out_is_the_nearest_of_all_codes() -> None:
    quantizer = make()
    z_BEhw = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1))
    out = quantizer.eval()(z_BEhw)
    distances = torch.cdist(F.normalize(z_BEhw, dim=1).movedim(1, -1).flatten(0, 2), quantizer.codebook_KE)
    assert torch.equal(distances.argmin(-1).view(2, 5, 7), out.tokens_Bhw)
    assert torch.allclose(out.codes_BEhw, quantizer.lookup(out.tokens_Bhw), atol=1e-6)


def test_gradients_pass_straight_through_to_the_input_and_a_bypass_only_brings_it_to_length_1() -> None:
    quantizer = make()
    z_BEhw = torch.randn(1, 8, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantizer(z_BEhw).codes_BEhw.square().sum().backward()
    assert z_BEhw.grad is not None and float(z_BEhw.grad.abs().sum()) > 0
    assert torch.allclose(quantizer(z_BEhw, bypass=True).codes_BEhw, F.normalize(z_BEhw, dim=1))


def test_a_tokenizer_comes_back_from_disk_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQConfig(channels=(32, 32), codes=240)).eval()
    tokenizer.to(torch.bfloat16).to(torch.float32)  # what a model file has room for; the codes are whole in it
    tokenizer.quantizer.codebook_KE += 1e-4
    gpt = GPT(GPTConfig(vocab_size=240, labels=0, layers=2, width=32, heads=2, cells=16))
    save(tmp_path, tokenizer, gpt, [], {})
    again = load(tmp_path).tokenizer
    generator = torch.Generator().manual_seed(0)
    tokens_Bhw = torch.randint(240, (1, 4, 6), generator=generator)
    images = torch.rand(1, 3, 32, 48, generator=generator)
    with torch.no_grad():
        assert torch.allclose(again.decode(tokens_Bhw), tokenizer.decode(tokens_Bhw), atol=1e-5)
        assert torch.equal(again.encode(images), tokenizer.encode(images))


def test_the_quantizer_decides_in_float32_under_autocast() -> None:
    quantizer = EMACodebook(512, 8).eval()
    z_BEhw = torch.randn(4, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = quantizer(z_BEhw)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z_BEhw)
        careless = (F.normalize(z_BEhw.movedim(1, -1), dim=-1) @ quantizer.codebook_KE.t()).argmax(-1)
    assert torch.equal(plain.tokens_Bhw, mixed.tokens_Bhw) and mixed.codes_BEhw.dtype == torch.float32
    assert not torch.equal(plain.tokens_Bhw, careless)  # what bfloat16 would have done: the test can fail


def test_dead_codes_come_back() -> None:
    """A codebook of which one corner is used: the others are moved onto inputs after a while, and found."""
    torch.manual_seed(0)
    quantizer = EMACodebook(16, 4).train()
    with torch.no_grad():
        quantizer.codebook_KE[1:] = torch.tensor([-1.0, 0, 0, 0])
        quantizer.codebook_KE[0] = torch.tensor([1.0, 0, 0, 0])
    quantizer.reset_ema()
    generator = torch.Generator().manual_seed(0)

    def inputs() -> torch.Tensor:
        z = torch.randn(4, 4, 4, 4, generator=generator) * 0.3
        z[:, 0] += 1
        return z

    assert codebook_usage(quantizer(inputs(), generator).tokens_Bhw.flatten().bincount(minlength=16))[0] == 1 / 16
    for _ in range(400):
        tokens_Bhw = quantizer(inputs(), generator).tokens_Bhw
    assert codebook_usage(tokens_Bhw.flatten().bincount(minlength=16))[0] > 0.9


def test_the_codebook_starts_from_k_means_of_the_first_inputs() -> None:
    torch.manual_seed(0)
    corners = F.normalize(torch.randn(4, 4), dim=-1)
    z_BEhw = corners.repeat(16, 1).t().reshape(1, 4, 8, 8) + 0.02 * torch.randn(1, 4, 8, 8)
    quantizer = EMACodebook(16, 4).train()
    assert float((corners @ quantizer.codebook_KE.t()).max(1).values.min()) < 0.9
    quantizer(z_BEhw, torch.Generator().manual_seed(0))
    assert float((corners @ quantizer.codebook_KE.t()).max(1).values.min()) > 0.99


def test_learning_moves_the_codebook_and_evaluation_does_not() -> None:
    quantizer, z_BEhw = EMACodebook(8, 4), torch.randn(2, 4, 4, 4)
    before = quantizer.codebook_KE.clone()
    quantizer.eval()(z_BEhw)
    assert torch.equal(quantizer.codebook_KE, before)
    quantizer.train()(z_BEhw)
    assert not torch.equal(quantizer.codebook_KE, before)


def test_codebook_usage_counts_codes_and_their_evenness() -> None:
    even = codebook_usage(torch.ones(32) * (torch.arange(32) < 16))
    assert even[0] == 0.5 and even[1] == pytest.approx(16)
    assert codebook_usage(torch.tensor([9.0, *[0.0] * 31]))[1] == pytest.approx(1)
