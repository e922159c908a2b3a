"""The three ways to quantize keep the same promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from igpt.checkpoint import load, save
from tokenizer_vq.base import UserError
from tokenizer_vq.quantizer import Quantizer
from tokenizer_vq.quantizer_kinds import FSQ_LEVELS, make_quantizer
from tokenizer_vq.vq import VQConfig, VQTokenizer

KINDS = ("ema", "simvq", "fsq")


def make(kind: str, codes: int = 240) -> tuple[Quantizer, int]:
    torch.manual_seed(0)
    return make_quantizer(kind, codes, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_codes_of_tokens_are_those_tokens_again(kind: str) -> None:
    quantizer, width = make(kind)
    tokens_Bhw = torch.arange(240).view(2, 10, 12)
    codes_BEhw = quantizer.eval().lookup(tokens_Bhw)
    assert codes_BEhw.shape == (2, width, 10, 12)
    assert torch.equal(quantizer.nearest(codes_BEhw.movedim(1, -1)), tokens_Bhw)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_the_nearest_of_all_codes(kind: str) -> None:
    quantizer, width = make(kind)
    z_BEhw = torch.randn(2, width, 5, 7, generator=torch.Generator().manual_seed(1))
    out = quantizer.eval()(z_BEhw)
    bounded = quantizer.bound(z_BEhw.movedim(1, -1))
    distances = torch.cdist(bounded.flatten(0, 2), quantizer.codebook().float())
    assert torch.equal(distances.argmin(-1).view(2, 5, 7), out.tokens_Bhw)
    assert torch.allclose(out.codes_BEhw, quantizer.lookup(out.tokens_Bhw), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_input_and_passing_leaves_it_alone(kind: str) -> None:
    quantizer, width = make(kind)
    z_BEhw = torch.randn(1, width, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    quantizer(z_BEhw).codes_BEhw.square().sum().backward()
    assert z_BEhw.grad is not None and float(z_BEhw.grad.abs().sum()) > 0
    passed = quantizer(z_BEhw, passing=True)
    assert torch.equal(passed.codes_BEhw, quantizer.bound(z_BEhw.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("codes", sorted(FSQ_LEVELS))
def test_rounded_codes_reach_every_level(codes: int) -> None:
    quantizer, width = make("fsq", codes)
    out = quantizer(2 * torch.randn(1, width, 64, 64, generator=torch.Generator().manual_seed(0)))
    reached = [len(values.unique()) for values in out.codes_BEhw.round(decimals=3).movedim(1, 0)]
    assert tuple(reached) == FSQ_LEVELS[codes] and len(quantizer.codebook().unique(dim=0)) == codes
    assert int(out.tokens_Bhw.max()) < codes


def test_one_step_moves_every_code_of_simvq() -> None:
    quantizer, width = make("simvq")
    before = quantizer.codebook().detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    quantizer.train()(torch.randn(1, width, 2, 2)).loss.backward()
    optimizer.step()
    assert (quantizer.codebook().detach() - before).abs().sum(-1).min() > 0


def test_a_quantizer_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="'lfq'"):
        make("lfq")
    with pytest.raises(UserError, match="1024 codes"):
        make("fsq", 1024)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_any_kind_comes_back_from_disk_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = VQTokenizer(VQConfig(channels=(32, 32), quantizer=kind, codes=240)).eval()
    tokenizer.to(torch.bfloat16).to(torch.float32)  # what a model file has room for; the codes are whole in it
    for parameter in tokenizer.quantizer.parameters():
        parameter.data += 1e-4
    save(tmp_path, tokenizer, None, [], {})
    again = load(tmp_path).tokenizer
    generator = torch.Generator().manual_seed(0)
    tokens_Bhw = torch.randint(240, (1, 4, 6), generator=generator)
    images = torch.rand(1, 3, 32, 48, generator=generator)
    with torch.no_grad():
        assert torch.allclose(again.decode(tokens_Bhw), tokenizer.decode(tokens_Bhw), atol=1e-5)
        assert torch.equal(again.encode(images), tokenizer.encode(images))
