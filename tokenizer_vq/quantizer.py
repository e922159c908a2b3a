"""The codebook: l2-normalised low-dimensional codes, learned by moving averages, always computed in float32.

Notable choices: codes and inputs live on the unit sphere (ViT-VQGAN, Yu et al. 2021, section 3.2), the codebook follows
its members by exponential moving averages (VQ-VAE, van den Oord et al. 2017, appendix A.1), it starts from k-means
over the first batch, and codes that nobody uses are moved onto inputs (SoundStream, Zeghidour et al. 2021,
section 3.3). A trainer lets inputs pass unquantized at first: an untrained encoder says much the same everywhere, and a
codebook started from that collapses to one code. Nearest-code decisions must not depend on the precision around them,
hence float32 even under autocast.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

MEMORY_STEPS = 100  # the averages span so many steps ...
MEMORY_MEMBERS = 50  # ... or more, until an average code has been chosen so often
DEAD_BELOW = 0.1  # a code chosen less often than this share of the average code is dead
REVIVED_AT = 0.3  # ... and comes back as if chosen this much: it has a hundred steps to be found before it dies again
KMEANS_ROUNDS = 10
COMMITMENT = 0.25  # weight of the pull of inputs towards their codes (van den Oord et al. 2017, equation 3)


class Quantized(NamedTuple):
    codes_BEhw: Tensor  # the chosen codes, with straight-through gradients to the input
    tokens_Bhw: Tensor  # their numbers
    loss: Tensor  # scalar, to be added to the reconstruction's: what keeps inputs and codes together


class EMACodebook(nn.Module):
    """Nearest code by cosine. The codebook has no gradient: in training mode each call moves it by averages."""

    codebook_KE: Tensor
    sums_KE: Tensor
    counts_K: Tensor
    started: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        codebook_KE = F.normalize(torch.randn(codes, width), dim=-1)
        self.register_buffer("codebook_KE", codebook_KE)
        # The averages are training state: `train.state` keeps them, a model file holds the codebook alone.
        self.register_buffer("sums_KE", codebook_KE.clone(), persistent=False)
        self.register_buffer("counts_K", torch.ones(codes), persistent=False)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool), persistent=False)

    def forward(self, z_BEhw: Tensor, generator: torch.Generator | None = None, bypass: bool = False) -> Quantized:
        """Inputs [B, E, h, w] of any length and dtype to codes and tokens. In training mode the codebook learns;
        `generator` (on the CPU) makes its random choices. `bypass` only brings the inputs to length 1."""
        with torch.autocast(z_BEhw.device.type, enabled=False):
            z_BhwE = F.normalize(rearrange(z_BEhw.float(), "b e h w -> b h w e"), dim=-1)
            if bypass:
                codes_BhwE, tokens_Bhw, loss = z_BhwE, self.nearest(z_BhwE), z_BhwE.new_zeros(())
            else:
                codes_BhwE, tokens_Bhw, loss = self.quantize(z_BhwE, generator)
        return Quantized(rearrange(codes_BhwE, "b h w e -> b e h w"), tokens_Bhw, loss)

    def quantize(self, z_BhwE: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (with straight-through gradients), tokens and loss for inputs of length 1."""
        flat_ME = z_BhwE.detach().reshape(-1, z_BhwE.shape[-1])
        if self.training and not bool(self.started):
            self.start(flat_ME, generator)
        tokens_Bhw = self.nearest(z_BhwE)
        codes_BhwE = self.codebook_KE[tokens_Bhw]
        if self.training:
            self.learn(flat_ME, tokens_Bhw.flatten(), generator)
        loss = COMMITMENT * (z_BhwE - codes_BhwE).pow(2).sum(-1).mean()
        return z_BhwE + (codes_BhwE - z_BhwE).detach(), tokens_Bhw, loss

    def nearest(self, z_BhwE: Tensor) -> Tensor:
        """Number of the nearest code for inputs [..., E] of length 1."""
        return (z_BhwE @ self.codebook_KE.t()).argmax(-1)

    def lookup(self, tokens_Bhw: Tensor) -> Tensor:
        """Codes [B, E, h, w] of token numbers; the inverse of `nearest` on the codes themselves."""
        return rearrange(self.codebook_KE[tokens_Bhw], "b h w e -> b e h w")

    # Learning

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Let learning go on from the codebook as it is: averages as if every code had been chosen alike."""
        self.sums_KE = self.codebook_KE.clone()
        self.counts_K = torch.ones(len(self.codebook_KE), device=self.codebook_KE.device)
        self.started = torch.ones((), dtype=torch.bool, device=self.codebook_KE.device)

    @torch.no_grad()
    def start(self, flat_ME: Tensor, generator: torch.Generator | None) -> None:
        """Spherical k-means over the inputs of the first batch, begun from inputs drawn at random."""
        codes = len(self.codebook_KE)
        several = flat_ME.repeat(-(-codes // len(flat_ME)), 1)  # where the first batch is smaller than the codebook
        self.codebook_KE.copy_(several[torch.randperm(len(several), generator=generator)[:codes]])
        for _ in range(KMEANS_ROUNDS):
            sums_KE, counts_K = self.cluster_sums(flat_ME, self.nearest(flat_ME))
            moved_KE = F.normalize(sums_KE, dim=-1)
            self.codebook_KE.copy_(torch.where(counts_K[:, None] > 0, moved_KE, self.codebook_KE))
        self.counts_K.copy_(counts_K / counts_K.mean())
        self.sums_KE.copy_(self.codebook_KE * self.counts_K[:, None])
        self.started.fill_(True)

    @torch.no_grad()
    def learn(self, flat_ME: Tensor, tokens_M: Tensor, generator: torch.Generator | None) -> None:
        """One step of the moving averages; codes that have died are put onto inputs drawn at random.

        Sums and counts are kept in units of the average code, so that they mean the same for any size of a batch.
        """
        sums_KE, counts_K = self.cluster_sums(flat_ME, tokens_M)
        rate = float(counts_K.mean())
        step = min(1 / MEMORY_STEPS, rate / MEMORY_MEMBERS)
        self.counts_K.lerp_(counts_K / rate, step)
        self.sums_KE.lerp_(sums_KE / rate, step)
        dead_K = self.counts_K < DEAD_BELOW
        fresh = flat_ME[torch.randint(len(flat_ME), (int(dead_K.sum()),), generator=generator)]
        self.sums_KE[dead_K] = fresh * REVIVED_AT
        self.counts_K[dead_K] = REVIVED_AT
        self.codebook_KE.copy_(F.normalize(self.sums_KE, dim=-1))

    def cluster_sums(self, flat_ME: Tensor, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sum [K, E] and count [K] of the inputs that chose each code, over all processes."""
        sums_KE = torch.zeros_like(self.codebook_KE).index_add_(0, tokens_M, flat_ME)
        counts_K = torch.bincount(tokens_M, minlength=len(self.codebook_KE)).to(sums_KE)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums_KE)
            torch.distributed.all_reduce(counts_K)
        return sums_KE, counts_K


class Usage(NamedTuple):
    used: float  # share of the codes seen at least once, 0..1
    perplexity: float  # exp of the entropy of code use: the number of codes that would do if all were used alike


def codebook_usage(tokens: Tensor, codes: int) -> Usage:
    """Health of a codebook from the tokens of many pictures (any shape)."""
    share = torch.bincount(tokens.flatten().cpu(), minlength=codes).double()
    share = share / share.sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-30).log()).sum()
    return Usage(float((share > 0).double().mean()), float(entropy.exp()))
