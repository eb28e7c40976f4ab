"""Root-mean-square normalisation with a hand-written adjoint for the CPU, where torch's own takes five passes more."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in fp32, returned in x's dtype.

    `weight` is D, or H D where each head has its own: ... H D -> ... H D.
    """
    if x.is_cpu and not torch.compiler.is_compiling():
        return _RmsNorm.apply(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The naive twin of `rms_norm`; a compiler fuses it well."""
    normal = F.rms_norm(x.float(), (x.shape[-1],), eps=eps)
    return (normal * weight.float()).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    """With n = x·r and r = 1/rms: dx = r·(g − n·mean(g·n)) where g = dy·weight, and dweight = Σ dy·n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
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
