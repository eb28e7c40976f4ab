"""Finite scalar quantization (FSQ, arXiv 2309.15505): each channel of a latent is rounded to one of a few levels."""

# Shapes: D channels of one latent; channel d has L_d levels; a code packs D cells, the first one varying fastest

from __future__ import annotations

import torch
from torch import Tensor

SATURATION = 2.5  # beyond this |z| the slope of y in `quantize` is under 8 % of its peak: the gradient vanishes


def cell_values(cells: Tensor, levels: Tensor) -> Tensor:
    """Return coordinates of cells on an even grid from -1 to 1, for odd and even numbers of them.  # ... D -> ... D"""
    return cells * (2.0 / (levels - 1)) - 1.0


def quantize(z: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return quantized coordinates with a straight-through gradient, and their cells.  # ... D -> ... D, ... D

    `z` is unbounded and should have about unit variance; it is computed in fp32, since rounding in bf16 moves cells.
    """
    # Within (-1, 1), which cells divide evenly; about uniform for unit Gaussian z (iFSQ, arXiv 2601.17124).
    y = 2.0 * torch.sigmoid(1.6 * z.float()) - 1.0
    cells = torch.minimum(torch.floor((y + 1.0) * 0.5 * levels).long().clamp(min=0), levels - 1)
    return y + (cell_values(cells, levels) - y).detach(), cells


def pack(cells: Tensor, levels: Tensor) -> Tensor:
    """One code from D cells: Σ_d cell_d · Π_{e<d} L_e.  # ... D -> ..."""
    return (cells * _strides(levels)).sum(-1)


def unpack(codes: Tensor, levels: Tensor) -> Tensor:
    """The D cells of each code; undoes `pack`.  # ... -> ... D"""
    return codes[..., None] // _strides(levels) % levels


def _strides(levels: Tensor) -> Tensor:
    return torch.cat([torch.ones_like(levels[:1]), levels[:-1].cumprod(0)])


def bits_per_channel(cells: Tensor, levels: Tensor) -> Tensor:
    """Return the entropy in bits of each channel's cells, out of log2(levels).  # N D -> D"""
    frequency = torch.nn.functional.one_hot(cells, int(levels.max())).float().mean(0)  # N D -> D L
    return -(frequency * frequency.clamp(min=1e-9).log2()).sum(-1)
