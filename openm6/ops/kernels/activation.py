"""SwiGLU with the router's gate multiplied in: one pass forward, one pass backward."""

# Letters: R rows, F hidden width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_F = 1024


@triton.jit
def forward_kernel(product, gate, hidden, width, BLOCK: tl.constexpr) -> None:
    """hidden = silu(a) · b · gate, of product = [a | b]"""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(product + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(product + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(gate + row).to(tl.float32)
    value = a * tl.sigmoid(a) * b * weight
    tl.store(hidden + row * width + column, value.to(hidden.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(product, gate, upstream, d_product, d_gate, width, BLOCK: tl.constexpr) -> None:
    """With s = σ(a): da = d·gate·b·s·(1 + a·(1 − s)), db = d·gate·a·s, dgate = Σ d·a·s·b"""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(gate + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        left = row * 2 * width + column
        a = tl.load(product + left, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(product + left + width, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(upstream + row * width + column, mask=inside, other=0.0).to(tl.float32)
        s = tl.sigmoid(a)
        total += d * a * s * b
        d_a = d * weight * b * s * (1 + a * (1 - s))
        d_b = d * weight * a * s
        tl.store(d_product + left, d_a.to(d_product.dtype.element_ty), mask=inside)
        tl.store(d_product + left + width, d_b.to(d_product.dtype.element_ty), mask=inside)
    tl.store(d_gate + row, tl.sum(total, 0))


def swiglu_gate(product: Tensor, gate: Tensor) -> Tensor:
    """R 2F, R -> R F."""
    rows, width = product.shape[0], product.shape[1] // 2
    hidden = torch.empty(rows, width, dtype=product.dtype, device=product.device)
    block = min(BLOCK_F, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    forward_kernel[grid](product.contiguous(), gate.contiguous(), hidden, width, BLOCK=block)
    return hidden


def swiglu_gate_backward(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """R 2F, R, R F -> gradients of product R 2F and of gate R (fp32)."""
    rows, width = gradient.shape
    product, gate, gradient = product.contiguous(), gate.contiguous(), gradient.contiguous()
    d_product = torch.empty_like(product)
    d_gate = torch.empty(rows, dtype=torch.float32, device=product.device)
    block = min(BLOCK_F, triton.next_power_of_2(width))
    backward_kernel[(rows,)](product, gate, gradient, d_product, d_gate, width, BLOCK=block)
    return d_product, d_gate
