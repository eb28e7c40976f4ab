"""Weights of a linear map as they are, or as int8 with one scale a row, which halves what decoding must read."""

# Letters: O outputs, I inputs

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["float32", "bfloat16", "int8"]
Matrix = Callable[[Tensor], Tensor]


def matrix_of(weight: Tensor, precision: Precision) -> Matrix:
    """x -> x · weightᵀ for a weight O I; int8 keeps a quantised copy, the other precisions the weight itself."""
    return QuantizedMatrix(weight) if precision == "int8" else PlainMatrix(weight.detach())


class PlainMatrix:
    """The weight in the dtype in which the model lies."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class QuantizedMatrix:
    """Each row of the weight as int8 and the scale that makes its largest entry 127."""

    def __init__(self, weight: Tensor) -> None:
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=1e-12) / 127
        self.rows = (wide / scale[:, None]).round().to(torch.int8)  # O I
        self.scale = scale.to(weight.dtype)  # O

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.rows, self.scale)

    def plain(self) -> Tensor:
        """The weight that this stands for.  # O I"""
        return self.rows.to(self.scale.dtype) * self.scale[:, None]
