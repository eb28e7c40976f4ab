"""Products of matrices on a processor, by the library that is the faster one there.

torch hands those in fp32 to MKL, which keeps to AVX2 on processors that are not Intel's; oneDNN, which torch carries
as well, takes AVX-512 and is twice as fast, and takes bf16 in any case. It compiles a kernel for each new shape, though
(0.2 ms), so it pays only where shapes come back, for which `filled_up` rounds the number of rows.
"""

# Letters: M rows, K numbers summed over, N numbers out

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.ops.precision import HALF, product_dtype

ROWS = 32  # fewer waste less on padding; more make fewer shapes, whose kernels take memory
SMALLEST = 2**20  # multiplications: below, the longer way into oneDNN costs more than it saves


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ as `F.linear` gives it: ... K, N K -> ... N."""
    # Not by whether a gradient is wanted: a layer that is computed again must come out as it did before.
    again = (x.numel() // x.shape[-1]) % ROWS == 0 and not torch.compiler.is_compiling()
    if again and _plain(x) and (product_dtype(x) == HALF or onednn_is_faster()):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias without a gradient, for shapes that come back: M K, N K, N -> M N, of any strides."""
    if not pays(x, weight):
        return F.linear(x, weight, bias)
    answer: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return answer


def product_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Writes x · weightᵀ into `out`, M N, in out's dtype."""
    if pays(x, weight) or x.dtype != out.dtype:
        out.copy_(product(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def add_product(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x · weightᵀ to `out`, M N, in out's dtype."""
    if pays(x, weight) or x.dtype != out.dtype:
        out.add_(product(x, weight))
    else:
        out.addmm_(x, weight.t())


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` takes the other way for rows and a matrix of these sizes; bf16 goes to oneDNN by itself."""
    large = x.shape[0] * weight.numel() >= SMALLEST
    # With gaps between a matrix's rows and between its columns oneDNN takes a path a thousand times as slow.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return large and dense and _plain(x) and onednn_is_faster()


def filled_up(rows: int, dtype: torch.dtype) -> int:
    """What so many rows of a dtype should be padded to, so that few shapes occur; none where any number is as fast.

    Whole pieces of `ROWS`, and of more where rows are many: from 16 pieces on eight lengths an octave.
    """
    if dtype != HALF and not onednn_is_faster():
        return rows
    piece = ROWS
    while rows > 16 * piece:
        piece *= 2
    return -(-rows // piece) * piece


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL leaves unused, and torch the way around it."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and has_onednn() and torch.backends.mkl.is_available() and not _of_intel()


def has_onednn() -> bool:
    """Whether this torch can hand a product to oneDNN."""
    try:
        return torch.backends.mkldnn.is_available() and callable(torch.ops.mkldnn._linear_pointwise)
    except AttributeError:
        return False


def _of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "Intel" in platform.processor()


def _plain(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """dx = g · weight and dweight = gᵀ · x, each as a product of its own; what they give is in fp32 again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        dtype = product_dtype(x)
        rows, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)  # M K, N K
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.shape
        return product(rows, weight).view(*x.shape[:-1], -1).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        dtype = gradient.dtype
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)  # M N
        d_x = product(gradient, weight.t()).view(ctx.shape).to(dtype) if ctx.needs_input_grad[0] else None
        d_weight = product(gradient.t(), rows.t()).to(dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight
