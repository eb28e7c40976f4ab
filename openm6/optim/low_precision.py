"""Weights in bf16 and int8: stochastic rounding by counter-based random bits, and int8 blocks that share a scale."""

# Shapes: E matrices of one tensor (experts; 1 for a plain matrix), n values of each, C columns, b values of a block

import math

import torch
from torch import Tensor

from openm6.ops.random_bits import GOLDEN_32, mix_32

BF16_LARGEST = torch.finfo(torch.bfloat16).max
LEVELS = 127  # int8 weights are integers of -127 to 127 times their block's scale
STEPS = 4  # scales per doubling: a scale is 2^(exponent/4), so that one byte spans 2^±32
FILLED = 110  # level of a block's largest value at first: a margin to grow before the scale must
SPARSE = 56  # if a whole block is below this level, its scale is halved, which is exact
BLOCK = 64
NEAREST = 0x80008000 - 2**32  # bits that round to the nearest value


def random_bits(
    num_matrices: int, values: int, key: int, first: int = 0, device: torch.device | None = None, start: int = 0
) -> Tensor:
    """Return 32 random bits for `values` values from index `start` of matrices from index `first`: E n, int32.

    A pure function of (key, matrix, position): the same on every device and, for one expert, whichever of its
    neighbours are present, so that a resumed or resharded run is rounded in the same way.
    """
    keys = matrix_keys(num_matrices, key, first, device)
    positions = torch.arange(start, start + values, dtype=torch.int64, device=device).to(torch.int32)  # n
    return mix_32(positions * GOLDEN_32 + keys.unsqueeze(-1))


def matrix_keys(num_matrices: int, key: int, first: int, device: torch.device | None = None) -> Tensor:
    """Return a key for each matrix: E, int32."""
    indices = torch.arange(first, first + num_matrices, dtype=torch.int32, device=device)
    return mix_32(indices * GOLDEN_32 + ((key + 2**31) % 2**32 - 2**31))  # the int32 with the key's low bits


def round_to_bf16(x: Tensor, bits: Tensor) -> Tensor:
    """Stochastic rounding of fp32 to bf16 (E[result] = x); NaN and infinities are kept, finite values stay finite."""
    shifted = (x.view(torch.int32) + (bits & 0xFFFF)) & -65536
    rounded = shifted.view(torch.float32).clamp(-BF16_LARGEST, BF16_LARGEST)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)  # bits added to a NaN may make it a number


def round_to_levels(x: Tensor, bits: Tensor) -> Tensor:
    """Stochastic rounding of fp32 to int8 levels, up with the probability of the fraction; integers are kept."""
    threshold = ((bits >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # [0, 1)
    low = x.floor()
    return (low + (x - low > threshold)).clamp(-LEVELS, LEVELS).to(torch.int8)


def block_length(columns: int) -> int:
    """Return b, the longest block that divides a row; 64 costs 1/64 byte per weight for its scale."""
    return math.gcd(columns, BLOCK)


def scale_of(exponent: Tensor) -> Tensor:
    return torch.exp2(exponent.to(torch.float32) / STEPS)


def fit_exponent(values: Tensor) -> Tensor:
    """Return exponents with which the largest value of each block is near `FILLED`: ... C -> ... C/b, int8."""
    largest = _blocked(values).abs().amax(-1).clamp(min=1e-30)
    return (STEPS * torch.log2(largest / FILLED)).ceil().clamp(-127, 127).to(torch.int8)


def to_levels(values: Tensor, exponent: Tensor) -> Tensor:
    """Return fp32 values in units of their block's scale, not rounded: ... C -> ... C."""
    return (_blocked(values) / scale_of(exponent).unsqueeze(-1)).flatten(-2)


def from_levels(levels: Tensor, exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return (_blocked(levels).to(torch.float32) * scale_of(exponent).unsqueeze(-1)).flatten(-2).to(dtype)


def refit(levels: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return levels within ±127 and the exponents with which they mean the same as `levels`, which may exceed it.

    Scales are sticky: fitted again in each step, they would move every weight of the block by rounding noise. A scale
    grows by as little as it must, and halves (levels double, exactly) only if the whole block has become small.
    """
    largest = _blocked(levels).abs().amax(-1)
    growth = (STEPS * torch.log2(largest.clamp(min=1e-30) / (LEVELS - 1))).ceil()
    change = torch.where(largest > LEVELS - 1, growth, torch.where(largest < SPARSE, -STEPS, 0))
    change = torch.where(largest > 0, change, 0)  # a block of zeros has no size
    raised = (exponent.to(torch.float32) + change).clamp(-127, 127)
    change = raised - exponent.to(torch.float32)
    return (_blocked(levels) * torch.exp2(-change / STEPS).unsqueeze(-1)).flatten(-2), raised.to(torch.int8)


def _blocked(values: Tensor) -> Tensor:
    """... C -> ... C/b b."""
    return values.unflatten(-1, (-1, block_length(values.shape[-1])))
