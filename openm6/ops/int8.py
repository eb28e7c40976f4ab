"""Weights in int8 with a scale per output, as inference keeps them: a quarter of the bytes of fp32.

On a processor with VNNI each row of inputs is rounded to int8 as well, by a scale of its own. Sums of integers are
exact, so the bits of a row do not depend on the other rows of a pass. Elsewhere inputs stay as they are.
"""

# Shapes: M rows, I inputs, O outputs, E experts, R rows sorted by expert

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 128  # up to so many rows a GPU multiplies int8 directly; for more, the weights are converted first
TINY = torch.tensor(1e-12)  # so that a row of zeros can be divided by its scale


@functools.cache
def has_vnni() -> bool:
    """Whether this CPU multiplies int8 by its own instructions (AVX512-VNNI)."""
    return torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()


class Int8Weight:
    """A matrix O I, or one per expert E O I, whose largest entry per output is 127 times its scale."""

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        """values: int8 ... O I; scale: ... O, in fp32."""
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        """Quantize a matrix, or one matrix after the other of a stack."""
        if weight.dim() > 2:
            parts = [cls.of(matrix) for matrix in weight]
            return cls(torch.stack([part.values for part in parts]), torch.stack([part.scale for part in parts]))
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=1e-12) / 127
        return cls((wide / scale[:, None]).round().to(torch.int8).contiguous(), scale)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def bytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def __getitem__(self, index: int | Tensor) -> Int8Weight:
        return Int8Weight(self.values[index], self.scale[index])

    def plain(self, dtype: torch.dtype) -> Tensor:
        """Return the weights that these stand for.  # ... O I"""
        return self.values.to(dtype) * self.scale.to(dtype).unsqueeze(-1)

    def linear(self, x: Tensor) -> Tensor:
        """x · weightᵀ for a matrix.  # ... I -> ... O"""
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if x.is_cpu and has_vnni():  # inputs rounded to int8; few operations, because a step has many
            wide = rows.float()
            scale = torch.add(TINY, wide.abs().amax(-1, keepdim=True), alpha=1 / 127)  # M 1
            levels = wide.div(scale).round_().to(torch.int8)
            y = torch._int_mm(levels, self.values.t()).mul(self.scale).mul_(scale).to(x.dtype)
        elif x.is_cuda and len(rows) <= FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.values, self.scale.to(x.dtype))
        else:
            y = F.linear(rows, self.plain(x.dtype))
        return y.view(*x.shape[:-1], len(self))

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Consecutive groups of rows, each times the matrix of its own expert.  # R I, E -> R O"""
        groups = rows.split(counts.tolist())
        found = [self[expert].linear(group) for expert, group in enumerate(groups) if len(group)]
        return torch.cat(found) if found else rows.new_empty(0, self.values.shape[1])
