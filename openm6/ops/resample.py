"""Another sampling rate for a sound, by cutting or padding its spectrum: exact for what both rates can hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def resample(samples: Tensor, old_rate: int, new_rate: int) -> Tensor:
    """The sound at `new_rate`.  # S -> S·new/old, rounded up

    The signal is padded with silence at its end, so that the spectrum's wrap-around falls there.
    """
    if old_rate == new_rate:
        return samples
    length = samples.shape[-1]
    wanted = -(-length * new_rate // old_rate)
    # A whole number of old periods must be a whole number of new ones, or the pitch would shift.
    unit = old_rate // math.gcd(old_rate, new_rate)
    padded = smooth(-(-(length + old_rate // 20) // unit)) * unit
    count = padded * new_rate // old_rate
    values = torch.fft.rfft(samples.double(), n=padded)
    kept = min(values.shape[-1], count // 2 + 1)
    out = torch.zeros(count // 2 + 1, dtype=values.dtype)
    out[:kept] = values[:kept]
    return (torch.fft.irfft(out, n=count) * (count / padded))[:wanted].to(samples.dtype)


def smooth(number: int) -> int:
    """The least product of 2, 3 and 5 that is not below a number: a transform of such a length is quick."""
    best = 1 << max(0, number - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            least = -(-number // three)
            best = min(best, three << max(0, least - 1).bit_length())
            three *= 3
        five *= 5
    return best
