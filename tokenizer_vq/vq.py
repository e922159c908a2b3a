"""A convolutional VQ-VAE that turns a picture into a grid of codes and back.

Notable choices: most channels sit at 1/4 to 1/16 of the picture's side, where they are cheap, and the picture enters
and leaves by (un)shuffling pixels into channels (`patch`); no attention, so any size encodes and decodes; the codebook
is small, low-dimensional and l2-normalised. `VQConfig.vq16()` spells the published 72M VQ-16 of taming-transformers and
LlamaGen with the same parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .base import UserError
from .layers import AttnBlock, Downsample, Grain, ResBlock, ShuffleUp, Upsample, bottom, group_norm
from .quantizer import Quantized
from .quantizer_kinds import make_quantizer


@dataclass(frozen=True)
class VQConfig:
    """Shape of the tokenizer. Its token side is `patch * 2 ** (len(channels) - 1)` pixels."""

    patch: int = 4  # pixels of a patch side folded into channels at the stem
    channels: tuple[int, ...] = (128, 192, 256)  # per level, finest first
    encoder_blocks: int = 1  # residual blocks a level
    decoder_blocks: int = 2
    head: tuple[int, ...] = (48, 16)  # channels after each doubling that unfolds a patch; () unfolds it at once
    grain: bool = True  # the decoder doubles smoothly and adds noise at every scale: texture without a lattice
    bottom: bool = False  # two more residual blocks at the lowest level on both sides
    attention: bool = False  # self-attention at the lowest level
    latent: int | None = None  # channels around the codebook; None = those of the lowest level
    quantizer: str = "ema"  # ema, simvq or fsq
    codes: int = 4096
    code_width: int = 8  # fsq has its own

    @classmethod
    def vq16(cls) -> VQConfig:
        """The VQ-16 of LlamaGen (Sun et al. 2024, section 2.2) and, but for the codes, of taming-transformers."""
        return cls(
            patch=1, channels=(128, 128, 256, 256, 512), encoder_blocks=2, decoder_blocks=3, head=(), grain=False,
            bottom=True, attention=True, latent=256, codes=16384, code_width=8,
        )  # fmt: skip


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] to features [B, C, h, w]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.patch = config.patch
        widths = config.channels
        self.stem = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        levels: list[nn.Module] = []
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            blocks = [ResBlock(before if j == 0 else width, width) for j in range(config.encoder_blocks)]
            last = i == len(widths) - 1
            attention = last and config.attention
            levels.append(_level(blocks, attention, width, None if last else Downsample(width)))
        self.levels = nn.Sequential(*levels)
        self.bottom = bottom(widths[-1], config.attention) if config.bottom else nn.Sequential()
        self.norm = group_norm(widths[-1])
        self.head = nn.Conv2d(widths[-1], config.latent or widths[-1], 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(images_BCHW, self.patch))
        out: Tensor = self.head(F.silu(self.norm(self.bottom(self.levels(x)))))
        return out


class Decoder(nn.Module):
    """Features [B, C, h, w] to [B, 3, H, W]. The same parts as the encoder in reverse."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.channels[::-1]
        self.stem = nn.Conv2d(config.latent or widths[0], widths[0], 3, padding=1)
        self.bottom = bottom(widths[0], config.attention) if config.bottom else nn.Sequential()
        levels: list[nn.Module] = []
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            blocks = [ResBlock(before if j == 0 else width, width) for j in range(config.decoder_blocks)]
            attention = i == 0 and config.attention
            levels.append(
                _level(blocks, attention, width, None if i == len(widths) - 1 else Upsample(width, config.grain))
            )
        self.levels = nn.Sequential(*levels)
        self.norm = group_norm(widths[-1])
        # Doubling in steps, with a convolution between, lets neighbouring patches agree; unfolded at once they show.
        tops = (widths[-1], *config.head[: int(math.log2(config.patch))])
        self.upscale = nn.ModuleList(ShuffleUp(*pair, config.grain) for pair in pairwise(tops))
        self.grains = nn.ModuleList(Grain(width) for width in (*widths, *tops[1:]) if config.grain)
        self.patch = config.patch // 2 ** (len(tops) - 1)
        self.head = nn.Conv2d(tops[-1], 3 * self.patch**2, 3, padding=1)

    def forward(self, z_BChw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """`at`: row and column of z in the grid of the whole picture."""
        grains = iter(self.grains)

        def roughen(x_BCHW: Tensor) -> Tensor:
            scale = x_BCHW.shape[-1] // z_BChw.shape[-1]
            return next(grains)(x_BCHW, at[0] * scale, at[1] * scale) if self.grains else x_BCHW

        x = self.bottom(self.stem(z_BChw))
        for level in self.levels:
            x = roughen(level(x))
        x = F.silu(self.norm(x))
        for double in self.upscale:
            x = F.silu(roughen(double(x)))
        return F.pixel_shuffle(self.head(x), self.patch)


def _level(blocks: list[ResBlock], attention: bool, width: int, resize: nn.Module | None) -> nn.Sequential:
    parts: list[nn.Module] = []
    for block in blocks:
        parts.append(block)
        if attention:
            parts.append(AttnBlock(width))
    return nn.Sequential(*parts, *([resize] if resize is not None else []))


class VQTokenizer(nn.Module):
    """Encoder, codebook, decoder. Pictures are [B, 3, H, W] in [-1, 1], tokens are [B, h, w] integers."""

    kind = "vq"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        latent = config.latent or config.channels[-1]
        self.encoder = Encoder(config)
        self.quantizer, code_width = make_quantizer(config.quantizer, config.codes, config.code_width)
        self.to_code = nn.Conv2d(latent, code_width, 1)
        self.from_code = nn.Conv2d(code_width, latent, 1)
        self.decoder = Decoder(config)

    @property
    def vocab_size(self) -> int:
        return self.config.codes

    @property
    def downsample(self) -> int:
        return int(self.config.patch * 2 ** (len(self.config.channels) - 1))

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Pictures to tokens [B, h, w]. Raises UserError where a side is no multiple of `downsample`."""
        height, width = images_BCHW.shape[-2:]
        if height % self.downsample or width % self.downsample:
            raise UserError(
                f"a picture of {width}x{height} pixels does not divide into tokens of {self.downsample} pixels a side"
            )
        tokens_Bhw: Tensor = self.quantize(images_BCHW).tokens_Bhw
        return tokens_Bhw

    def decode(self, tokens_Bhw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Tokens to pictures in about [-1, 1] (clamped when they become PIL pictures)."""
        images_BCHW: Tensor = self.decoder(self.from_code(self.quantizer.lookup(tokens_Bhw)), at)
        return images_BCHW

    def quantize(self, images_BCHW: Tensor, generator: Generator | None = None, passing: bool = False) -> Quantized:
        """Pictures to codes with straight-through gradients, for training; the arguments are the quantizer's."""
        quantized: Quantized = self.quantizer(self.to_code(self.encoder(images_BCHW)), generator, passing)
        return quantized

    def forward(
        self, images_BCHW: Tensor, generator: Generator | None = None, passing: bool = False
    ) -> tuple[Tensor, Quantized]:
        """Reconstruction through the codes, and the codes."""
        quantized = self.quantize(images_BCHW, generator, passing)
        return self.decoder(self.from_code(quantized.codes_BEhw)), quantized
