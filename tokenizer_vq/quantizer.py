"""The codebook: l2-normalised low-dimensional codes, learned by moving averages, always computed in float32.

Notable choices: codes and inputs are unit vectors (ViT-VQGAN, Yu et al. 2021, section 3.2); the codebook is an
exponential moving average of the inputs (VQ-VAE, van den Oord et al. 2017, appendix A.1), initialised by k-means over
the first batch that is not bypassed, as the outputs of an untrained encoder are nearly all alike; dead codes are
replaced by inputs (SoundStream, Zeghidour et al. 2021, section 3.3); bfloat16 would change which code is nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor, nn

EMA_STEPS = 100  # the averages are over at least this many steps
EMA_INPUTS = 50  # and over at least this many inputs of an average code
DEAD_BELOW = 0.1  # count, relative to the average code, below which a code is dead
REVIVED_AT = 0.3  # count of a replaced code: about 100 steps until it would be dead again
KMEANS_ROUNDS = 10
COMMITMENT = 0.25  # beta in equation 3 of van den Oord et al. 2017


class Quantized(NamedTuple):
    """What the codebook makes of its inputs."""

    codes_BEhw: Tensor  # the nearest codes, with straight-through gradients to the input
    tokens_Bhw: Tensor  # their indices
    loss: Tensor  # the commitment loss, a scalar


class EMACodebook(nn.Module):
    """Nearest code by cosine. The codebook has no gradient: in training mode each call updates its moving averages."""

    codebook_KE: Tensor
    sums_KE: Tensor
    counts_K: Tensor
    started: Tensor

    def __init__(self, codes: int, width: int):
        super().__init__()
        codebook_KE = F.normalize(torch.randn(codes, width), dim=-1)
        self.register_buffer("codebook_KE", codebook_KE)
        # The averages are training state: `train.state` saves them, a model file has the codebook alone.
        self.register_buffer("sums_KE", codebook_KE.clone(), persistent=False)
        self.register_buffer("counts_K", torch.ones(codes), persistent=False)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool), persistent=False)
        self.surely_started = False

    def forward(self, z_BEhw: Tensor, generator: Generator | None = None, bypass: bool = False) -> Quantized:
        """Inputs [B, E, h, w] of any length and dtype to codes and tokens. In training mode the codebook learns;
        `generator` (on the CPU) makes its random choices. `bypass` only normalises the inputs."""
        with torch.autocast(z_BEhw.device.type, enabled=False):
            z_BhwE = F.normalize(rearrange(z_BEhw.float(), "b e h w -> b h w e"), dim=-1)
            if bypass:
                return Quantized(z_BhwE.movedim(-1, 1), self.nearest(z_BhwE), z_BhwE.new_zeros(()))
            flat_ME = z_BhwE.detach().flatten(0, 2)
            if self.training and not self.surely_started:  # asked of the device once, as it would wait for the answer
                if not self.started:
                    self.start(flat_ME, generator)
                self.surely_started = True
            tokens_Bhw = self.nearest(z_BhwE)
            codes_BhwE = self.codebook_KE[tokens_Bhw]
            if self.training:
                self.learn(flat_ME, tokens_Bhw.flatten(), generator)
            loss = COMMITMENT * (z_BhwE - codes_BhwE).pow(2).sum(-1).mean()
            codes_BhwE = z_BhwE + (codes_BhwE - z_BhwE).detach()
        return Quantized(rearrange(codes_BhwE, "b h w e -> b e h w"), tokens_Bhw, loss)

    def nearest(self, z_BhwE: Tensor) -> Tensor:
        """Index of the nearest code of unit vectors [..., E]: argmin |z - c|^2 = argmax z c."""
        return (z_BhwE @ self.codebook_KE.t()).argmax(-1)

    def lookup(self, tokens_Bhw: Tensor) -> Tensor:
        """Codes [B, E, h, w] of tokens; the inverse of `nearest` on the codes themselves."""
        return rearrange(self.codebook_KE[tokens_Bhw], "b h w e -> b e h w")

    # Learning

    @torch.no_grad()
    def reset_ema(self) -> None:
        """Continue from the codebook as it is, with averages as if every code had been chosen equally often."""
        self.sums_KE = self.codebook_KE.clone()
        self.counts_K = torch.ones_like(self.codebook_KE[:, 0])
        self.started = torch.ones_like(self.started)

    @torch.no_grad()
    def start(self, flat_ME: Tensor, generator: Generator | None) -> None:
        """Spherical k-means over the inputs of the first batch, initialised with inputs drawn at random: different ones
        where there are enough."""
        inputs, codes = int(summed(flat_ME.new_tensor(len(flat_ME)))), len(self.codebook_KE)
        chosen_K = torch.cat([torch.randperm(inputs, generator=generator) for _ in range(-(-codes // inputs))])[:codes]
        self.codebook_KE.copy_(inputs_of_all(flat_ME, chosen_K.to(flat_ME.device)))
        for _ in range(KMEANS_ROUNDS):
            sums_KE, counts_K = self.cluster_sums(flat_ME, self.nearest(flat_ME))
            self.codebook_KE.copy_(torch.where(counts_K[:, None] > 0, F.normalize(sums_KE, dim=-1), self.codebook_KE))
        self.counts_K.copy_(counts_K / counts_K.mean())
        self.sums_KE.copy_(self.codebook_KE * self.counts_K[:, None])
        self.started.fill_(True)

    @torch.no_grad()
    def learn(self, flat_ME: Tensor, tokens_M: Tensor, generator: Generator | None) -> None:
        """One step of the moving averages; dead codes are replaced by inputs drawn at random.

        Sums and counts are relative to the mean count of a code, so they do not depend on the batch size.
        """
        sums_KE, counts_K = self.cluster_sums(flat_ME, tokens_M)
        mean = counts_K.mean()
        step = (mean / EMA_INPUTS).clamp(max=1 / EMA_STEPS)
        self.counts_K.lerp_(counts_K / mean, step)
        self.sums_KE.lerp_(sums_KE / mean, step)
        dead_K = self.counts_K < DEAD_BELOW
        # One for every code, needed or not: how many are dead only the device knows.
        places_K = torch.rand(len(dead_K), generator=generator, dtype=torch.float64)
        places_K = places_K.to(flat_ME.device, non_blocking=True)
        revived_KE = inputs_of_all(flat_ME, (places_K * counts_K.sum()).long()) * REVIVED_AT
        self.sums_KE.copy_(torch.where(dead_K[:, None], revived_KE, self.sums_KE))
        self.counts_K.masked_fill_(dead_K, REVIVED_AT)
        self.codebook_KE.copy_(F.normalize(self.sums_KE, dim=-1))

    def cluster_sums(self, flat_ME: Tensor, tokens_M: Tensor) -> tuple[Tensor, Tensor]:
        """Sum [K, E] and count [K] of the inputs that chose each code, over all processes."""
        sums_KE = torch.zeros_like(self.codebook_KE).index_add_(0, tokens_M, flat_ME)
        counts_K = torch.zeros_like(sums_KE[:, 0]).index_add_(0, tokens_M, torch.ones_like(flat_ME[:, 0]))
        return summed(sums_KE), summed(counts_K)


def several_processes() -> bool:
    """Whether a training shares its batches among processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def summed(values: Tensor) -> Tensor:
    """Sums over all processes, in place."""
    if several_processes():
        torch.distributed.all_reduce(values)
    return values


def inputs_of_all(flat_ME: Tensor, places_K: Tensor) -> Tensor:
    """The inputs [K, E] at these places of the inputs of all processes, one process after another."""
    own_K = places_K
    if several_processes():
        rank, counts = torch.distributed.get_rank(), flat_ME.new_zeros(torch.distributed.get_world_size())
        counts[rank] = len(flat_ME)
        own_K = places_K - summed(counts)[:rank].sum().long()
    here_K = (own_K >= 0) & (own_K < len(flat_ME))
    return summed(torch.where(here_K[:, None], flat_ME[own_K.clamp(0, len(flat_ME) - 1)], 0.0))


def codebook_usage(counts_K: Tensor) -> tuple[float, float]:
    """Health of a codebook from how often each code occurs in many pictures: the share of the codes that occur, 0 to 1,
    and perplexity, exp of the entropy of the codes: the size of a codebook used uniformly with that entropy."""
    share_K = counts_K.double() / counts_K.sum().clamp(min=1)
    return float((share_K > 0).double().mean()), float(torch.special.entr(share_K).sum().exp())
