"""Where a token lies within its own picture or sound: rotary positions only tell how far apart two tokens are."""

# Letters: N tokens, H and W tokens down and across, Q frequencies, D width

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

OCTAVES = (-2, -1, 0, 1, 2, 3)  # waves of 4 sides (or seconds) down to an eighth of one


def picture_places(down: int, across: int) -> np.ndarray:
    """Row and column of each token's middle, as shares of the sides.  # H*W 2"""
    rows, columns = np.divmod(np.arange(down * across), across)
    return np.stack([(rows + 0.5) / down, (columns + 0.5) / across], axis=1).astype(np.float32)


def sound_places(count: int, seconds: float) -> np.ndarray:
    """Time of each token's middle in seconds, for tokens of `seconds` each; the second axis is not used.  # N 2"""
    times = (np.arange(count) + 0.5) * seconds
    return np.stack([times, np.zeros(count)], axis=1).astype(np.float32)


class PlaceEmbedding(nn.Module):
    """Waves of several lengths along both axes, mixed into the model's width.  # N 2 -> N D"""

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer(
            "frequencies", torch.tensor([2.0**octave for octave in OCTAVES]), persistent=False
        )
        self.mix = nn.Linear(4 * len(OCTAVES), width)

    def forward(self, places: Tensor) -> Tensor:
        angles = (2 * math.pi * places[..., None] * self.frequencies).flatten(1)  # N 2 -> N 2Q
        return self.mix(torch.cat((angles.sin(), angles.cos()), -1).to(self.mix.weight.dtype))
