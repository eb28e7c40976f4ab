"""Weights of linear maps as they are, or as int8 with a scale for each output.

int8 is for decoding, which reads every weight for each token: a quarter of the bytes of float32, half of those of
bfloat16. The copies stand beside the weights themselves, which prompts, images and audio go on using.
"""

# Letters: O outputs, I inputs, E experts, B rows, R rows sorted by expert

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.grouped import grouped_product

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
        self.rows = (wide / scale[:, None]).round().to(torch.int8).contiguous()  # O I
        self.scale = scale.to(weight.dtype)  # O

    def __call__(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.rows, self.scale)

    def plain(self) -> Tensor:
        """The weight that this stands for.  # O I"""
        return self.rows.to(self.scale.dtype) * self.scale[:, None]


class PlainStack:
    """A matrix for each expert, E I O, in the dtype in which the model lies."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def each(self, x: Tensor) -> Tensor:
        """Rows of every expert times its matrix.  # E B I -> E B O"""
        return torch.bmm(x, self.weight)

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Consecutive groups of rows, each times the matrix of its own expert.  # R I, E -> R O"""
        return grouped_product(rows, self.weight, counts)


class QuantizedStack:
    """As `PlainStack`, each matrix as int8 with a scale for each output."""

    def __init__(self, weight: Tensor) -> None:
        self.matrices = [QuantizedMatrix(matrix.t()) for matrix in weight]

    def each(self, x: Tensor) -> Tensor:
        """Rows of every expert times its matrix.  # E B I -> E B O"""
        return torch.stack([matrix(rows) for matrix, rows in zip(self.matrices, x.unbind(), strict=True)])

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Consecutive groups of rows, each times the matrix of its own expert.  # R I, E -> R O"""
        parts = rows.split(counts.tolist())
        return torch.cat(
            [matrix(part) for matrix, part in zip(self.matrices, parts, strict=True) if len(part)]
        )


Stack = PlainStack | QuantizedStack


def stack_of(weight: Tensor, precision: Precision) -> Stack:
    """The matrices of all experts, E I O; int8 as in `matrix_of`."""
    return QuantizedStack(weight.detach()) if precision == "int8" else PlainStack(weight.detach())
