"""SwiGLU, RMSNorm and the rotary embedding, with hand-written adjoints that write each result once.

The rotary embedding has three axes (time, height, width); with equal positions on all axes it is the common 1-D one.
Under torch.compile the plain forms are used: it fuses them, and does not support writes into halves.
"""

# Shapes: B rows, S tokens, H heads, d head size, D hidden size, F intermediate size

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up: ... 2F -> ... F."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SwiGlu.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGlu(torch.autograd.Function):
    """Keep the product's output only, and write both gradients into one buffer."""

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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in fp32, returned in x's dtype; weight: D, or H D."""
    if x.is_cpu and not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            return _RmsNorm.apply(x, weight, eps)
        wide = x.float()
        return (wide * _inverse_rms(wide, eps)).mul_(weight).to(x.dtype)
    normal = F.rms_norm(x.float(), (x.shape[-1],), eps=eps)
    return (normal * weight.float()).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _RmsNorm(torch.autograd.Function):
    """With n = x·r and r = 1/rms: dx = r·(g − n·mean(g·n)) where g = dy·weight, and dweight = Σ dy·n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = _inverse_rms(wide, eps)
        normal = wide * inverse
        ctx.save_for_backward(normal, inverse, weight)
        ctx.dtype = x.dtype
        return (normal * weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normal, inverse, weight = ctx.saved_tensors
        gradient = gradient.float()
        product = gradient * normal
        d_weight = product.flatten(0, -1 - weight.dim()).sum(0).to(weight.dtype)
        mean = torch.linalg.vecdot(product, weight.float()).div_(normal.shape[-1]).unsqueeze(-1)
        d_x = torch.mul(gradient, weight, out=product)
        d_x.addcmul_(normal, mean, value=-1).mul_(inverse)
        return d_x.to(ctx.dtype), d_weight, None


def rotary_table(
    positions: Tensor, theta: float, sections: tuple[int, int, int], divisors: tuple[float, ...] | None = None,
    amplitude: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cosines and sines of the angles at each position, in fp32: B S 3 -> twice B S 1 d/2.

    Frequencies go to the axes in turn, so that each axis has fast and slow ones, `sections` of them in all. For longer
    contexts each is divided by its divisor, and the result multiplied by the amplitude.
    """
    half = sum(sections)
    exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
    frequency = 1.0 / theta**exponent  # d/2
    if divisors is not None:
        frequency = frequency / torch.tensor(divisors, device=positions.device)
    # Stacked views, because an index from the host would make a GPU wait.
    along = positions.to(torch.float32).unbind(-1)
    turns = [along[axis] for turn in range(max(sections)) for axis in range(3) if turn < sections[axis]]
    angle = torch.stack(turns, dim=-1) * frequency  # B S d/2
    cosine, sine = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
    return (cosine, sine) if amplitude == 1.0 else (cosine * amplitude, sine * amplitude)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) by their angles: B S H d -> B S H d, in x's dtype."""
    if not torch.compiler.is_compiling():
        return _Rotate.apply(x, cosine, sine) if torch.is_grad_enabled() else _rotated(x, cosine, sine, 1.0)
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(rotated, dim=-1).to(x.dtype)


class _Rotate(torch.autograd.Function):
    """The adjoint of a rotation is the rotation back: only the table needs to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(gradient, cosine, sine, -1.0), None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
    """Write both halves into one buffer: no concatenation, four passes in all."""
    first, second = x.float().chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cosine, out=out_first).addcmul_(second, sine, value=-sign)
    torch.mul(second, cosine, out=out_second).addcmul_(first, sine, value=sign)
    return out.to(x.dtype)
