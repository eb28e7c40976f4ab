"""The image codec: a small convolutional autoencoder whose latent is a grid of FSQ codes or codebook vectors."""

# Shapes: B batch, H W height and width in pixels, h w in positions, C channels of the latent, G groups

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from openm6.codecs.base import (
    MAX_CODEBOOK,
    GroupedQuantizer,
    Quantized,
    QuantizerConfig,
    TrainableCodec,
    VectorQuantizer,
)
from openm6.core.errors import DataError

STEM = 4  # pixels folded into channels before the first convolution, which makes the codec fast on a CPU


class ImageCodecConfig(QuantizerConfig):
    """Shape of the network: one width and number of residual blocks per scale, the first at a quarter of the size.

    With `codebook`, each of the `groups` codes of a position is one of so many vectors of `latent` numbers, the second
    of what the first left over, and there are no `levels`.
    """

    groups: int = Field(default=4, ge=1)
    codebook: int | None = Field(default=None, ge=2, le=MAX_CODEBOOK)
    latent: int = Field(default=16, ge=1)
    widths: tuple[int, ...] = (96, 192)
    encoder_blocks: tuple[int, ...] = (2, 2)
    decoder_blocks: tuple[int, ...] = (2, 2)

    @model_validator(mode="after")
    def _scales_agree(self) -> Self:
        if not len(self.widths) == len(self.encoder_blocks) == len(self.decoder_blocks) >= 1:
            raise ValueError("widths, encoder_blocks and decoder_blocks must have one entry per scale each")
        if any(width % 8 for width in self.widths):
            raise ValueError("widths must be multiples of 8, for the group normalization")
        return self

    @property
    def codebook_size(self) -> int:
        return self.codebook or super().codebook_size

    @property
    def vector_size(self) -> int:
        return super().vector_size if self.codebook is None else self.latent

    @property
    def stride(self) -> int:
        """Pixels per position, along each side."""
        return STEM * 2 ** (len(self.widths) - 1)


class Residual(nn.Module):
    """Adds two convolutions to its input; the last begins at zero, so that a fresh network is near linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(F.silu(self.first_norm(x)))
        return x + self.second(F.silu(self.second_norm(inner)))  # B C h w -> B C h w


def _output(width: int, channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)]


class ImageCodec(TrainableCodec):
    """Images in [-1, 1] of any size divisible by the stride, to codes and back: B 3 H W to B h w G."""

    kind: ClassVar[str] = "image"
    config: ImageCodecConfig

    def __init__(self, config: ImageCodecConfig) -> None:
        super().__init__()
        self.config, self.step, widths = config, config.stride, config.widths
        layers: list[nn.Module] = [nn.PixelUnshuffle(STEM), nn.Conv2d(3 * STEM**2, widths[0], 3, padding=1)]
        for scale, width in enumerate(widths):
            if scale:
                layers += [nn.PixelUnshuffle(2), nn.Conv2d(4 * widths[scale - 1], width, 1)]
            layers += [Residual(width) for _ in range(config.encoder_blocks[scale])]
        self.encoder = nn.Sequential(*layers, *_output(widths[-1], config.vector_size))  # B 3 H W -> B C h w
        layers = [nn.Conv2d(config.vector_size, widths[-1], 3, padding=1)]
        for scale, width in reversed(list(enumerate(widths))):
            layers += [Residual(width) for _ in range(config.decoder_blocks[scale])]
            if scale:
                layers += [nn.Conv2d(width, 4 * widths[scale - 1], 1), nn.PixelShuffle(2)]
        layers += [*_output(widths[0], 3 * STEM**2), nn.PixelShuffle(STEM)]
        self.decoder = nn.Sequential(*layers)  # B C h w -> B 3 H W
        self.quantizer = (
            GroupedQuantizer(config)
            if config.codebook is None
            else VectorQuantizer(config.groups, config.codebook, config.latent)
        )

    def quantized(self, raw: Tensor) -> Quantized:
        """The quantized latent of images; DataError unless their sides are multiples of the stride."""
        sides, stride = raw.shape[2:], self.config.stride
        if raw.dim() != 4 or raw.shape[1] != 3 or any(side % stride or side == 0 for side in sides):
            raise DataError(
                f"images of shape {tuple(raw.shape)} do not fit the codec: it reads B 3 H W with H and W"
                f" multiples of {stride}; resize or pad them"
            )
        latent = self.encoder(raw).movedim(1, -1)  # B C h w -> B h w C
        with torch.autocast(raw.device.type, enabled=False):  # rounding must not depend on the precision around it
            return self.quantizer(latent)

    def synthesize(self, latent: Tensor) -> Tensor:
        """Images of a quantized latent.  # B h w C -> B 3 H W"""
        return self.decoder(latent.movedim(-1, 1)).float()
