"""Weights at one byte each: whole numbers of -127 to 127 times a scale that a short block of them shares."""

# Letters: R rows, C columns, b values of a block along the columns

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127
STEPS = 4  # scales per doubling: a scale is 2^(exponent/4), so one byte spans 2^±32
FILLED = 110  # where the largest value of a block lies at first: room to grow before the scale must
SPARSE = 56  # below it for the whole block, the scale is halved, which loses nothing
BLOCKS = (64, 32, 16, 8, 4, 2, 1)


def block_length(columns: int) -> int:
    """b: the longest block that divides a row; 64 costs 1/64 byte a weight for its scale."""
    return next(length for length in BLOCKS if columns % length == 0)


def scale_of(exponent: Tensor) -> Tensor:
    """int8 exponents -> fp32 scales."""
    return torch.exp2(exponent.to(torch.float32) / STEPS)


def fit_exponent(values: Tensor) -> Tensor:
    """The exponents under which the largest of each block comes near `FILLED`: ... C -> ... C/b, int8."""
    largest = _blocked(values).abs().amax(-1).clamp(min=1e-30)
    return (STEPS * torch.log2(largest / FILLED)).ceil().clamp(-127, 127).to(torch.int8)


def to_levels(values: Tensor, exponent: Tensor) -> Tensor:
    """fp32 values in units of their block's scale, not rounded: ... C -> ... C."""
    return (_blocked(values) / scale_of(exponent).unsqueeze(-1)).flatten(-2)


def from_levels(levels: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that levels stand for: ... C -> ... C in `dtype`."""
    return (_blocked(levels).to(torch.float32) * scale_of(exponent).unsqueeze(-1)).flatten(-2).to(dtype)


def refit(levels: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Levels that may lie outside ±127 -> levels that do not, and the exponents under which they mean the same.

    Scales are sticky: drawn anew each step they would move every weight of the block by rounding noise, also those
    that the gradient leaves alone. A scale grows by as little as it must, and halves (levels double, exactly) only
    where the whole block has become small.
    """
    largest = _blocked(levels).abs().amax(-1)
    growth = (STEPS * torch.log2(largest.clamp(min=1e-30) / (LEVELS - 1))).ceil()
    change = torch.where(largest > LEVELS - 1, growth, torch.where(largest < SPARSE, -STEPS, 0))
    change = torch.where(largest > 0, change, 0)  # a block of zeros says nothing about its size
    raised = (exponent.to(torch.float32) + change).clamp(-127, 127)
    change = raised - exponent.to(torch.float32)
    return (_blocked(levels) * torch.exp2(-change / STEPS).unsqueeze(-1)).flatten(-2), raised.to(torch.int8)


def _blocked(values: Tensor) -> Tensor:
    """... C -> ... C/b b."""
    return values.unflatten(-1, (-1, block_length(values.shape[-1])))
