"""Features of images by convolutions that were trained to classify them, for models too small to learn them."""

# Shapes: B batch, S side in pixels, C channels, K = S / 16 tokens a side, N = K * K, D width, Q queries

from typing import ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from openm6.codecs.conv_encoder import ConvEncoder, Convolution, halvings
from openm6.core.config import Config

PIXELS = 16  # a side of the square that a token stands for


class PixelEncoderConfig(Config):
    """`channels` at a half, a quarter and an eighth of `side`, then `width` features of each token of 16 x 16 pixels.

    `layers` of residual convolutions over 3 x 3 tokens follow. Each of `queries` sums up the image.
    """

    side: int = Field(default=64, ge=PIXELS)
    channels: tuple[int, int, int] = (32, 64, 128)
    width: int = Field(default=192, ge=1)
    layers: int = Field(default=2, ge=0)
    queries: int = Field(default=4, ge=1)

    @property
    def across(self) -> int:
        return self.side // PIXELS

    @model_validator(mode="after")
    def _whole_rows(self) -> Self:
        if self.side % PIXELS:
            raise ValueError(f"side={self.side} is no multiple of {PIXELS}, the side of a token: change it")
        if self.queries % self.across:
            raise ValueError(f"queries={self.queries} do not fill rows of {self.across} tokens: use a multiple")
        return self


class PixelEncoder(ConvEncoder):
    """Features of a square image: `width` numbers for each token of 16 x 16 pixels and what is around it.

    Rows of summaries follow below, one token for each query: means of the others, weighted by how well they fit it.
    """

    kind: ClassVar[str] = "image encoder"
    config: PixelEncoderConfig

    def __init__(self, config: PixelEncoderConfig) -> None:
        super().__init__()
        self.config, self.width = config, config.width
        self.halve = halvings((3, *config.channels, config.width))
        self.context = nn.ModuleList(
            Convolution(nn.Conv2d(config.width, config.width, 3, padding=1, bias=False)) for _ in range(config.layers)
        )
        self.queries = nn.Conv1d(config.width, config.queries, 1)

    def features(self, inputs: Tensor) -> Tensor:
        """Features of images with values in [-1, 1].  # B 3 S S -> B D N"""
        x = self.halve(inputs.contiguous(memory_format=torch.channels_last))  # B D K K
        for layer in self.context:
            x = x + layer(x)
        return x.flatten(2)

    @torch.inference_mode()
    def forward(self, values: np.ndarray) -> np.ndarray:
        """Features in half precision of an image with values in [-1, 1], and its summaries.  # S S 3 -> K+Q/K K D"""
        features = self.features(torch.from_numpy(values).permute(2, 0, 1)[None])
        found = torch.cat((features, self.summaries(features)), 2)[0].T.half()
        return found.unflatten(0, (-1, self.config.across)).numpy()
