"""A convolutional VQ-VAE that turns a picture into a grid of codes and back.

Notable choices: most channels sit at 1/4 and 1/8 of the picture's side, where they are cheap, and the picture enters
and leaves by (un)shuffling pixels into channels (`patch`); no attention, so any size encodes and decodes; the codebook
is small, low-dimensional and l2-normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .base import MAX_CODES, UserError
from .layers import Downsample, NoiseInjection, ResBlock, ShuffleUp, Upsample, group_norm
from .quantizer import EMACodebook, Quantized


@dataclass(frozen=True)
class VQConfig:
    """Shape of the tokenizer. Its token side is `patch * 2 ** (len(channels) - 1)` pixels."""

    patch: int = 4  # pixels of a patch side folded into channels at the stem
    channels: tuple[int, ...] = (160, 256)  # per level, finest first
    encoder_blocks: int = 2  # residual blocks a level
    decoder_blocks: int = 2
    head: tuple[int, ...] = (48, 16)  # channels after each doubling that unfolds a patch
    codes: int = 4096
    code_width: int = 8

    def __post_init__(self) -> None:
        """Raises UserError on values that cannot be meant."""
        for name, value in vars(self).items():
            several = name in ("channels", "head")
            numbers = value if isinstance(value, tuple) else (value,)
            if isinstance(value, tuple) != several or not all(type(n) is int and n > 0 for n in numbers):
                wanted = "a tuple of whole numbers" if several else "a whole number"
                raise UserError(f"{name} of a tokenizer is {value!r}; {wanted} above 0 is wanted")
        if not self.channels:
            raise UserError("a tokenizer has no channels; one number a level is wanted")
        if 2**self.doublings != self.patch:
            raise UserError(f"the patch of a tokenizer has {self.patch} pixels a side; a power of two is wanted")
        if len(self.head) < self.doublings:
            raise UserError(
                f"the head of a tokenizer is {self.head}; a patch of {self.patch} pixels wants {self.doublings} numbers"
            )
        if not 2 <= self.codes <= MAX_CODES:
            raise UserError(f"a tokenizer has {self.codes} codes; 2 to {MAX_CODES} are wanted")

    @property
    def doublings(self) -> int:
        """Steps in which the decoder unfolds a patch."""
        return self.patch.bit_length() - 1


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] to features [B, C, h, w]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.patch = config.patch
        widths = config.channels
        self.stem = nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)
        levels = [_blocks(*pair, config.encoder_blocks) for pair in pairwise((widths[0], *widths))]
        for level, width in zip(levels[:-1], widths[:-1], strict=True):
            level.append(Downsample(width))
        self.levels = nn.Sequential(*levels)
        self.bottom = _blocks(widths[-1], widths[-1], 2)
        self.norm = group_norm(widths[-1])
        self.head = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        x = self.stem(F.pixel_unshuffle(images_BCHW, self.patch))
        out: Tensor = self.head(F.silu(self.norm(self.bottom(self.levels(x)))))
        return out


class Decoder(nn.Module):
    """Features [B, C, h, w] to [B, 3, H, W]. The same parts as the encoder in reverse."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = config.channels[::-1]
        self.stem = nn.Conv2d(widths[0], widths[0], 3, padding=1)
        self.bottom = _blocks(widths[0], widths[0], 2)
        levels = [_blocks(*pair, config.decoder_blocks) for pair in pairwise((widths[0], *widths))]
        for level, width in zip(levels[:-1], widths[:-1], strict=True):
            level.append(Upsample(width))
        self.levels = nn.Sequential(*levels)
        self.norm = group_norm(widths[-1])
        # Doubling in steps, with a convolution between, lets neighbouring patches agree; unfolded at once they show.
        tops = (widths[-1], *config.head[: config.doublings])
        self.upscale = nn.ModuleList(ShuffleUp(*pair) for pair in pairwise(tops))
        noises = (NoiseInjection(width) for width in (*widths, *tops[1:]))
        self.grains = nn.ModuleList(noises)  # model files know them by this name
        self.head = nn.Conv2d(tops[-1], 3, 3, padding=1)

    def forward(self, z_BChw: Tensor, at: tuple[int, int] = (0, 0)) -> Tensor:
        """`at`: row and column of z in the grid of the whole picture."""
        noises = iter(self.grains)

        def add_noise(x_BCHW: Tensor) -> Tensor:
            scale = x_BCHW.shape[-1] // z_BChw.shape[-1]
            noisy_BCHW: Tensor = next(noises)(x_BCHW, at[0] * scale, at[1] * scale)
            return noisy_BCHW

        x = self.bottom(self.stem(z_BChw))
        for level in self.levels:
            x = add_noise(level(x))
        x = F.silu(self.norm(x))
        for double in self.upscale:
            x = F.silu(add_noise(double(x)))
        images_BCHW: Tensor = self.head(x)
        return images_BCHW


def _blocks(channels_in: int, channels_out: int, count: int) -> nn.Sequential:
    """Residual blocks, of which the first changes the width."""
    return nn.Sequential(*(ResBlock(channels_in if i == 0 else channels_out, channels_out) for i in range(count)))


class VQTokenizer(nn.Module):
    """Encoder, codebook, decoder. Pictures are [B, 3, H, W] in [-1, 1], tokens are [B, h, w] integers."""

    kind = "vq"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        width = config.channels[-1]
        self.encoder = Encoder(config)
        self.quantizer = EMACodebook(config.codes, config.code_width)
        self.to_code = nn.Conv2d(width, config.code_width, 1)
        self.from_code = nn.Conv2d(config.code_width, width, 1)
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

    def quantize(self, images_BCHW: Tensor, generator: Generator | None = None, bypass: bool = False) -> Quantized:
        """Pictures to codes with straight-through gradients, for training; the arguments are the quantizer's."""
        quantized: Quantized = self.quantizer(self.to_code(self.encoder(images_BCHW)), generator, bypass)
        return quantized

    def forward(
        self, images_BCHW: Tensor, generator: Generator | None = None, bypass: bool = False
    ) -> tuple[Tensor, Quantized]:
        """Reconstruction through the codes, and the codes."""
        quantized = self.quantize(images_BCHW, generator, bypass)
        return self.decoder(self.from_code(quantized.codes_BEhw)), quantized
