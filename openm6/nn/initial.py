"""First values of weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fill_normal(weight: Tensor, deviation: float) -> None:
    """Normal values, cut at three deviations, in place."""
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=deviation, a=-3 * deviation, b=3 * deviation)
