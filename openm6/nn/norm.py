"""The norm before each part of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from openm6.ops.normalise import rms_norm


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis and multiplies by a learnt weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # ... D -> ... D
