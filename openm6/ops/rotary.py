"""Rotary positions over three axes (time, height, width); equal on all axes they are the common 1-D rotary."""

# Letters: B rows, S tokens, H heads, d size of a head

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def axis_of_frequency(sections: tuple[int, int, int]) -> list[int]:
    """Which axis drives each of the d/2 frequencies: taken in turn, so that each axis has fast and slow ones."""
    left = list(sections)
    axes: list[int] = []
    while any(left):
        for axis in range(3):
            if left[axis]:
                axes.append(axis)
                left[axis] -= 1
    return axes


def rotary_table(positions: Tensor, theta: float, sections: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles at each position, in fp32: B S 3 -> twice B S 1 d/2."""
    half = sum(sections)
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency = 1.0 / theta**exponent  # d/2
    # Stacking views, for an index made on the host would make a GPU wait.
    along = positions.to(torch.float32).unbind(-1)
    angle = torch.stack([along[axis] for axis in axis_of_frequency(sections)], dim=-1) * frequency  # B S d/2
    return angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + d/2]) by their angles: B S H d -> B S H d, in x's dtype."""
    if torch.compiler.is_compiling():  # which fuses the plain form, and cannot read writes into halves
        first, second = x.float().chunk(2, dim=-1)
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.cat(turned, dim=-1).to(x.dtype)
    return _Rotate.apply(x, cosine, sine)


def rotate_reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The naive twin of `rotate`: a product of complex numbers."""
    first, second = x.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * torch.complex(cosine.double(), sine.double())
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """A rotation's adjoint is the rotation back: nothing but the table needs to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn(gradient, cosine, sine, -1.0), None, None


def _turn(x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
    """Writes both halves into one buffer: no concatenation, four passes in all."""
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine, value=-sign)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine, value=sign)
    return out.to(x.dtype)
