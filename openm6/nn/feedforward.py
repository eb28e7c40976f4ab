"""The dense feed-forward part."""

# Letters: D width, F hidden, P products of the first matrix: 2F for swiglu (gate and up in one), F for gelu

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm6.nn.config import Activation, DenseConfig
from openm6.nn.initial import fill_normal
from openm6.ops.activation import gelu, swiglu
from openm6.ops.product import linear


def activate(x: Tensor, activation: Activation) -> Tensor:
    """... P -> ... F."""
    return swiglu(x) if activation == "swiglu" else gelu(x)


def first_width(hidden: int, activation: Activation) -> int:
    """P: columns of the first product."""
    return 2 * hidden if activation == "swiglu" else hidden


class FeedForward(nn.Module):
    """Widens each token, applies the activation, and narrows it again."""

    def __init__(self, width: int, config: DenseConfig) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Parameter(torch.empty(first_width(config.hidden, config.ffn), width))  # P D
        self.down = nn.Parameter(torch.empty(width, config.hidden))  # D F

    def reset_parameters(self, deviation: float, output_deviation: float) -> None:
        fill_normal(self.up, deviation)
        fill_normal(self.down, output_deviation)

    def forward(self, x: Tensor) -> Tensor:
        hidden = activate(linear(x, self.up), self.config.ffn)  # ... D -> ... F
        return linear(hidden, self.down)  # ... F -> ... D
