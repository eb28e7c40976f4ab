"""Matrix products: their precision, the faster CPU library, and grouped products of experts.

**Precision.** On a GPU autocast decides. torch's CPU autocast puts every product and all between them into bf16, and
most of that becomes slower. `bf16_matmul` keeps the rest in fp32: inputs are rounded to bf16, sums run in fp32 within
the CPU's own instruction, and the product is rounded once. It covers `linear`, the experts and the losses.

**CPU library.** torch passes fp32 products to MKL, which uses AVX2 only on CPUs that are not Intel's. oneDNN, which is
part of torch as well, uses AVX-512 and is twice as fast; bf16 goes to it in any case. It compiles a kernel for each
new shape (0.2 ms), so it pays only if shapes repeat: `pad_rows` rounds the number of rows.
"""

# Shapes: M rows, K summed over, N outputs; of experts: R rows, D inputs, F outputs, E experts

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from openm6.core.errors import ConfigError
from openm6.ops.int8 import Int8Weight

HALF = torch.bfloat16
_enabled: ContextVar[bool] = ContextVar("bf16_matmul", default=False)
ROWS = 32  # fewer waste less on padding; more make fewer shapes, whose kernels take memory
# From these on a library is chosen by the matrix alone: decoding pads its steps to multiples of them (decode_batch.py),
# and the bits of a row must not depend on how many more there are.
DECODED_ROWS = 16
MIN_PRODUCT = 2**20  # multiplications: below, the overhead of oneDNN exceeds its gain
MV_ROWS = 4  # up to so many rows are multiplied one by one in bf16
MAX_EXPERTS = 1023  # of one `F.grouped_mm` on a GPU


@contextmanager
def bf16_matmul(enabled: bool = True) -> Iterator[None]:
    """Within it, large fp32 products on a CPU run in bf16; backward passes follow their forward pass."""
    before = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(before)


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that factors of x's products are rounded to: bf16 within `bf16_matmul`, else x's own."""
    return HALF if _enabled.get() and x.is_cpu and x.dtype == torch.float32 else x.dtype


@functools.cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by its own instructions (AVX512-BF16 or AMX)."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def capture_precision(kind: str) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that restores the current precision on a kind of device, for recomputation."""
    autocast, dtype, half = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), _enabled.get()

    @contextmanager
    def restored() -> Iterator[None]:
        with torch.autocast(kind, dtype=dtype, enabled=autocast), bf16_matmul(half):
            yield

    return restored


def linear(x: Tensor, weight: Tensor | Int8Weight) -> Tensor:
    """x · weightᵀ as `F.linear` computes it: ... K, N K -> ... N."""
    if isinstance(weight, Int8Weight):
        return weight.linear(x)
    compiling = torch.compiler.is_compiling()
    # Dynamo cannot trace the question to the processor; torch.export runs it.
    unknown = torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled()
    if x.dtype == HALF and x.is_cpu and not (unknown or has_bf16()):
        return _half_linear(x, weight)
    # Not by whether a gradient is needed: a recomputed layer must have the same result.
    repeats = not compiling and (x.numel() // x.shape[-1]) % DECODED_ROWS == 0
    if repeats and _plain(x) and (matmul_dtype(x) == HALF or onednn_is_faster()):
        return _Linear.apply(x, weight)
    return F.linear(x, weight)


def _half_linear(x: Tensor, weight: Tensor) -> Tensor:
    """As `linear` on a CPU without bf16 instructions, where torch's product of several rows is three times as slow."""
    rows, compiling = x.reshape(-1, x.shape[-1]), torch.compiler.is_compiling()
    if compiling and rows.shape[0] == 1:
        y = (weight.float() * rows.float()).sum(-1).to(x.dtype)
    elif not compiling and 0 < len(rows) <= MV_ROWS and weight.is_contiguous():
        y = torch.stack([torch.mv(weight, row) for row in rows])
    else:
        y = F.linear(rows.float(), weight.float()).to(x.dtype)
    return y.view(*x.shape[:-1], len(weight))


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias without a gradient, for shapes that repeat: M K, N K, N -> M N, of any strides."""
    if not use_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def matmul_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Write x · weightᵀ to `out`, M N, in out's dtype."""
    if use_onednn(x, weight) or x.dtype != out.dtype:
        out.copy_(matmul(x, weight))
    else:
        torch.mm(x, weight.t(), out=out)


def matmul_add(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """Add x · weightᵀ to `out`, M N, in out's dtype."""
    if use_onednn(x, weight) or x.dtype != out.dtype:
        out.add_(matmul(x, weight))
    else:
        out.addmm_(x, weight.t())


def use_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `matmul` calls oneDNN for rows and a matrix of these sizes; torch itself does so for bf16."""
    rows = ROWS if x.shape[0] >= DECODED_ROWS else x.shape[0]
    large = rows * weight.numel() >= MIN_PRODUCT
    # With gaps between a matrix's rows and between its columns oneDNN is a thousand times as slow.
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    return large and dense and _plain(x) and onednn_is_faster()


def pad_rows(rows: int, dtype: torch.dtype) -> int:
    """Return to how many rows to pad, so that few shapes occur: multiples of `ROWS`, from 16 on eight per octave."""
    if dtype != HALF and not onednn_is_faster():
        return rows
    step = ROWS
    while rows > 16 * step:
        step *= 2
    return -(-rows // step) * step


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this CPU has AVX-512 that MKL leaves unused, and torch has oneDNN."""
    try:
        vendor = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        vendor = platform.processor()
    has_onednn = torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, "_linear_pointwise", None))
    unused = torch.backends.mkl.is_available() and "GenuineIntel" not in vendor
    return has_onednn and unused and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _plain(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    """dx = g · weight and dweight = gᵀ · x, each as a product of its own; their results are in fp32 again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        dtype = matmul_dtype(x)
        rows, weight = x.reshape(-1, x.shape[-1]).to(dtype), weight.to(dtype)  # M K, N K
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.shape
        return matmul(rows, weight).view(*x.shape[:-1], len(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        dtype = gradient.dtype
        gradient = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)  # M N
        d_x = matmul(gradient, weight.t()).view(ctx.shape).to(dtype) if ctx.needs_input_grad[0] else None
        d_weight = matmul(gradient.t(), rows.t()).to(dtype) if ctx.needs_input_grad[1] else None
        return d_x, d_weight


def grouped_mm(rows: Tensor, weight: Tensor | Int8Weight, counts: Tensor) -> Tensor:
    """The first counts[0] rows times weight[0], the next counts[1] times weight[1], and so on: R D -> R F.

    weight is E D F; counts is E, its sum is R. D and F must be multiples of 16 bytes. Under autocast the product has
    autocast's dtype, as `F.linear`'s. In int8, weight is E F D.
    """
    if isinstance(weight, Int8Weight):
        return weight.grouped(rows, counts)
    rows, matrices = cast_alike(rows, weight)
    if rows.is_cuda and rows.dtype != torch.bfloat16:  # on a GPU the kernel supports bf16 only; other dtypes are slow
        groups = rows.split(counts.tolist())
        return torch.cat([group @ matrix for group, matrix in zip(groups, matrices.unbind(), strict=True)])
    ends = counts.cumsum(0).to(torch.int32)
    check_experts(len(matrices), rows.device)
    if rows.is_cuda:
        matrices = _IdleWithoutGradient.apply(matrices, counts)
    return F.grouped_mm(rows, matrices, offs=ends)


def check_experts(count: int, device: torch.device) -> None:
    """Raise ConfigError if one product has more experts than the kernel of a GPU supports."""
    if device.type == "cuda" and count > MAX_EXPERTS:
        raise ConfigError(
            f"a layer has {count} experts on one GPU, whose grouped product takes {MAX_EXPERTS}: "
            f"lower experts.num_experts, or spread them over more ranks with parallel.ep"
        )


def idle(counts: Tensor) -> Tensor:
    """Return which experts have no rows, E 1 1: `F.grouped_mm` may not set their gradient (pytorch issue 172439)."""
    return (counts == 0)[:, None, None]


class _IdleWithoutGradient(torch.autograd.Function):
    """The weight as it is; its gradient is zero for experts without rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(counts)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (counts,) = ctx.saved_tensors
        return gradient.masked_fill(idle(counts), 0.0), None


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return autocast's dtype on the device of `x`, or without autocast its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def cast_alike(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the weight's dtype, or under autocast in autocast's."""
    dtype = autocast_dtype(weight)
    return rows.to(dtype), weight.to(dtype)
