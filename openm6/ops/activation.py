"""The two activations of the feed-forward parts; gate and up come from one product, side by side: [gate | up]."""

# Letters: F hidden width; R rows

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: ... 2F -> ... F."""
    if torch.compiler.is_compiling():  # which fuses the plain form, and cannot read writes into halves
        return swiglu_reference(gate_up)
    return _SwiGlu.apply(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The naive twin of `swiglu`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), exactly (the error function, not its tanh approximation)."""
    return F.gelu(x)


class _SwiGlu(torch.autograd.Function):
    """Keeps the product's output only, and writes both gradients into one buffer instead of joining two."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        d_gate.copy_(torch.ops.aten.silu_backward(gradient * up, gate))
        torch.mul(F.silu(gate), gradient, out=d_up)
        return out
