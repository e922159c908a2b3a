"""Two more ways to quantize, for comparison: SimVQ and FSQ, beside the codebook of moving averages."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .base import FSQ_LEVELS, UserError
from .quantizer import COMMITMENT, AveragedCodes, Quantizer


class SimCodes(Quantizer):
    """SimVQ (Zhu et al. 2024, arXiv 2411.02038, section 4): a frozen random codebook under one learned linear map, so
    that every code moves with every step and none dies."""

    basis_KE: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        self.register_buffer("basis_KE", torch.randn(codes, width) / math.sqrt(width))
        self.map = nn.Linear(width, width, bias=False)

    def bound(self, z_BhwE: Tensor) -> Tensor:
        return z_BhwE

    def nearest(self, z_BhwE: Tensor) -> Tensor:
        codes_KE = self.codebook().detach()
        return (z_BhwE.detach() @ codes_KE.t() - 0.5 * codes_KE.pow(2).sum(-1)).argmax(-1)

    def codebook(self) -> Tensor:
        codes_KE: Tensor = self.map(self.basis_KE)
        return codes_KE

    def choose(self, z_BhwE: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        tokens_Bhw = self.nearest(z_BhwE)
        codes_BhwE = self.codebook()[tokens_Bhw]
        towards_codes = (z_BhwE - codes_BhwE.detach()).pow(2).mean()
        towards_inputs = (codes_BhwE - z_BhwE.detach()).pow(2).mean()
        return codes_BhwE, tokens_Bhw, towards_inputs + COMMITMENT * towards_codes


class RoundedCodes(Quantizer):
    """FSQ (Mentzer et al. 2023, arXiv 2309.15505, section 3.1): each dimension is bounded and rounded to a few levels;
    nothing to learn, nothing to die."""

    levels_E: Tensor
    strides_E: Tensor

    def __init__(self, codes: int):
        super().__init__()
        levels = FSQ_LEVELS[codes]
        self.register_buffer("levels_E", torch.tensor(levels), persistent=False)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("strides_E", torch.tensor(strides), persistent=False)

    def bound(self, z_BhwE: Tensor) -> Tensor:
        """To between -(L - 1) / 2 and (L - 1) / 2 in a dimension of L levels, which lie one apart."""
        return torch.tanh(z_BhwE) * (self.levels_E - 1) / 2 * 0.999

    def nearest(self, z_BhwE: Tensor) -> Tensor:
        steps_BhwE = (z_BhwE + (self.levels_E - 1) / 2).round().long()
        return (steps_BhwE * self.strides_E).sum(-1)

    def codebook(self) -> Tensor:
        numbers_K1 = torch.arange(int(self.levels_E.prod()), device=self.levels_E.device)[:, None]
        return (numbers_K1 // self.strides_E) % self.levels_E - (self.levels_E - 1) / 2

    def choose(self, z_BhwE: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        tokens_Bhw = self.nearest(z_BhwE)
        return self.codebook()[tokens_Bhw], tokens_Bhw, z_BhwE.new_zeros(())


def make_quantizer(kind: str, codes: int, width: int) -> tuple[Quantizer, int]:
    """The quantizer, and the width of its codes (FSQ's follows from their number). Raises UserError on another kind or
    a number of codes that FSQ has no levels for."""
    if kind == "ema":
        return AveragedCodes(codes, width), width
    if kind == "simvq":
        return SimCodes(codes, width), width
    if kind != "fsq":
        raise UserError(f"there is no quantizer {kind!r}; ema, simvq or fsq is wanted")
    if codes not in FSQ_LEVELS:
        raise UserError(f"fsq has no levels for {codes} codes; one of {', '.join(map(str, FSQ_LEVELS))} is wanted")
    return RoundedCodes(codes), len(FSQ_LEVELS[codes])
