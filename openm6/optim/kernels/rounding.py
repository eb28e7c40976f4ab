"""Random bits and stochastic rounding in Triton, for every kernel that rounds; `optim.rounding` is the reference."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x) -> tl.tensor:
    """A permutation of 32-bit numbers without visible order ("lowbias32"), as `rounding._mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def bits_at(place, key) -> tl.tensor:
    """`rounding.random_bits` for these places of a matrix (any integer type) and the key of that matrix (uint32)."""
    return mix(place.to(tl.uint32) * 0x9E3779B9 + key)


@triton.jit
def round_bf16(value, bits) -> tl.tensor:
    """`rounding.round_to_bf16`: fp32 -> bf16, up with the probability of what is cut off; finite stays finite."""
    # bf16 is the upper half of fp32: 16 random bits added below it carry into it as often as they should.
    raised = (value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    largest = 3.3895313892515355e38
    rounded = tl.minimum(tl.maximum(raised.to(tl.float32, bitcast=True), -largest), largest)
    finite = tl.abs(value) < float("inf")  # False for NaN, too: bits added to one may make it a number
    return tl.where(finite, rounded, value).to(tl.bfloat16)
