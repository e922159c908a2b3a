"""A convolutional VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937): a picture to a grid of codes and back.

Notable choices: pixels are (un)shuffled into channels at both ends (`patch`), so that most of the network works at 1/4
and 1/8 of the picture's side, where it is cheap; no attention, so any size encodes and decodes; the codebook is small,
low-dimensional and l2-normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .base import MAX_CODES, UserError
from .layers import Downsample, NoiseInjection, ResBlock, ShuffleUp, Upsample, group_norm
from .quantizer import EMACodebook, Quantized


@dataclass(frozen=True)
class VQConfig:
    """Shape of the tokenizer. A token is a square of `patch * 2 ** (len(channels) - 1)` pixels a side.

    Raises UserError on impossible values.
    """

    patch: int = 4  # pixels a side that the encoder unshuffles into channels, a power of two
    channels: tuple[int, ...] = (160, 256)  # of each level, finest first
    encoder_blocks: int = 2  # residual blocks in each level
    decoder_blocks: int = 2
    head: tuple[int, ...] = (48, 16)  # channels after each of the decoder's log2(patch) last doublings
    codes: int = 4096  # size of the codebook
    code_width: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if name in ("channels", "head") else (value,)
            if type(numbers) is not tuple or not all(type(n) is int and n > 0 for n in numbers):
                raise UserError(f"{name} of a tokenizer is {value!r}; whole numbers above 0 are wanted")
        if not self.channels or not 2 <= self.codes <= MAX_CODES:
            wanted = f"one number of channels a level and 2 to {MAX_CODES} codes are wanted"
            raise UserError(f"a tokenizer has the channels {self.channels} and {self.codes} codes; {wanted}")
        if 2 ** (self.patch.bit_length() - 1) != self.patch or 2 ** len(self.head) < self.patch:
            wanted = "a power of two and the channels of each doubling are wanted"
            raise UserError(f"the patch of a tokenizer is {self.patch} and its head {self.head}; {wanted}")


def _blocks(channels_in: int, channels_out: int, count: int) -> nn.Sequential:
    """Residual blocks, the first of which changes the width."""
    return nn.Sequential(*(ResBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(count)))


def _levels(widths: tuple[int, ...], blocks: int, resize: Callable[[int], nn.Module]) -> nn.Sequential:
    """Residual blocks at each level, and between two levels a change of the resolution."""
    levels = [_blocks(*pair, blocks) for pair in pairwise((widths[0], *widths))]
    for level, width in zip(levels[:-1], widths[:-1], strict=True):
        level.append(resize(width))
    return nn.Sequential(*levels)


class Encoder(nn.Module):
    """Pictures to features."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.patch, widths = config.patch, config.channels
        self.stem = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        self.levels = _levels(widths, config.encoder_blocks, Downsample)
        self.bottom = _blocks(widths[-1], widths[-1], 2)
        self.norm = group_norm(widths[-1])
        self.head = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to [B, C, h, w]."""
        x = self.stem(F.pixel_unshuffle(images_BCHW, self.patch))
        return self.head(F.silu(self.norm(self.bottom(self.levels(x)))))


class Decoder(nn.Module):
    """Features to pictures: the encoder in reverse, with noise after every level and doubling."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.channels[::-1]
        self.stem = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        self.bottom = _blocks(widths[0], widths[0], 2)
        self.levels = _levels(widths, config.decoder_blocks, Upsample)
        self.norm = group_norm(widths[-1])
        # Several doublings with convolutions between them: shuffled to pixels at once, the edges of patches would show.
        tops = (widths[-1], *config.head[: config.patch.bit_length() - 1])
        self.upscale = nn.ModuleList(ShuffleUp(*pair) for pair in pairwise(tops))
        self.grains = nn.ModuleList(NoiseInjection(width) for width in (*widths, *tops[1:]))  # a name in model files
        self.head = nn.Conv2d(tops[-1], 3, 3, padding=1)

    def forward(self, z_BChw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """[B, C, h, w] to [B, 3, H, W]. `at`: row and column of z in the token grid of the whole picture."""
        noises = iter(self.grains)

        def add_noise(x_BCHW: Tensor) -> Tensor:
            scale = x_BCHW.shape[-1] // z_BChw.shape[-1]
            return next(noises)(x_BCHW, at[0] * scale, at[1] * scale)

        x = self.bottom(self.stem(z_BChw))
        for level in self.levels:
            x = add_noise(level(x))
        x = F.silu(self.norm(x))
        for double in self.upscale:
            x = F.silu(add_noise(double(x)))
        return self.head(x)


class VQTokenizer(nn.Module):
    """Encoder, codebook and decoder. A GPT does not know whether its tokens are these codes or those of a palette."""

    kind = "vq"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config, width = config, config.channels[-1]
        self.vocab_size, self.downsample = config.codes, config.patch * 2 ** (len(config.channels) - 1)
        self.encoder = Encoder(config)
        self.quantizer = EMACodebook(config.codes, config.code_width)
        self.to_code = nn.Conv2d(width, config.code_width, 1)
        self.from_code = nn.Conv2d(config.code_width, width, 1)
        self.decoder = Decoder(config)

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] to tokens [B, h, w]. Raises UserError where a side is no multiple of `downsample`."""
        height, width = images_BCHW.shape[-2:]
        if height % self.downsample or width % self.downsample:
            side = f"{self.downsample} pixels a side"
            raise UserError(f"a picture of {width}x{height} pixels does not divide into tokens of {side}")
        return self.quantizer(self.to_code(self.encoder(images_BCHW))).tokens_Bhw

    def decode(self, tokens_Bhw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """Tokens to [B, 3, H, W] in about [-1, 1]; `to_picture` clamps them. `at` as in Decoder.forward."""
        return self.decoder(self.from_code(self.quantizer.lookup(tokens_Bhw)), at)

    def forward(
        self, images_BCHW: Tensor, generator: Generator | None = None, bypass: bool = False
    ) -> tuple[Tensor, Quantized]:
        """For training: the reconstruction, and its codes. `generator` and `bypass` as in EMACodebook.forward."""
        quantized = self.quantizer(self.to_code(self.encoder(images_BCHW)), generator, bypass)
        return self.decoder(self.from_code(quantized.codes_BEhw)), quantized
