"""Triton kernels of the mixture of experts: the permutation of rows, their gather and sum, gated SwiGLU."""

# Shapes: N tokens, D hidden size, F intermediate size, E experts, K choices per token, R = N·K rows, P blocks of them

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CHOICES = 128  # each is compared with all others of its block: 16,384 comparisons
WIDEST = 2048  # elements of a row that one program moves
BLOCK_F = 1024


@triton.jit
def count_kernel(chosen, counts, num_rows, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr) -> None:
    """counts[p, e]: how many choices of block p are expert e"""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    # What is beyond the end is counted in an extra bin, which is not written.
    expert = tl.load(chosen + choice, mask=choice < num_rows, other=num_experts).to(tl.int32)
    found = tl.histogram(expert, BINS)
    index = tl.arange(0, BINS)
    tl.store(counts + block * num_experts + index, found, mask=index < num_experts)


@triton.jit
def slot_kernel(chosen, first, slot, choices, num_rows, num_experts, BLOCK: tl.constexpr) -> None:
    """slot[c] = first[p, e] + the choices before c in its block of the same expert; choices is its inverse"""
    block = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    choice = block * BLOCK + local
    inside = choice < num_rows
    expert = tl.load(chosen + choice, mask=inside, other=num_experts).to(tl.int32)
    earlier = (expert[:, None] == expert[None, :]) & (local[:, None] > local[None, :])
    rank = tl.sum(earlier.to(tl.int32), 1)
    row = tl.load(first + block * num_experts + expert, mask=inside, other=0) + rank
    tl.store(slot + choice, row.to(tl.int64), mask=inside)
    tl.store(choices + row, choice.to(tl.int64), mask=inside)


def sort_by_expert(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """N K -> choice R (flat index of the choice in each row), slot N K, ends E (int32); stable, nothing waits."""
    flat, device = chosen.reshape(-1), chosen.device
    num_rows = flat.shape[0]
    blocks = triton.cdiv(num_rows, BLOCK_CHOICES)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    bins = triton.next_power_of_2(num_experts + 1)
    with torch.cuda.device_of(flat):
        count_kernel[(blocks,)](flat, counts, num_rows, num_experts, BLOCK=BLOCK_CHOICES, BINS=bins)
    through = counts.cumsum(0, dtype=torch.int32)  # P E
    ends = through[-1].cumsum(0, dtype=torch.int32)  # E
    first = through - counts + (ends - through[-1])  # P E
    slot = torch.empty(chosen.shape, dtype=torch.int64, device=device)
    choices = torch.empty(num_rows, dtype=torch.int64, device=device)
    with torch.cuda.device_of(flat):
        slot_kernel[(blocks,)](flat, first, slot, choices, num_rows, num_experts, BLOCK=BLOCK_CHOICES)
    return choices, slot, ends


@triton.jit
def gather_kernel(x, source, rows, width, BLOCK: tl.constexpr) -> None:
    """rows[r] = x[source[r]]"""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(source + row).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + token * width + column, mask=inside)
    tl.store(rows + row * width + column, value, mask=inside)


@triton.jit
def sum_kernel(rows, slot, y, width, K: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """y[n] = Σ_k rows[slot[n, k]], summed in fp32 in the order of k: the same bits every time"""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(slot + token * K + k).to(tl.int64)
        total += tl.load(rows + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=inside)


def gather_rows(x: Tensor, source: Tensor) -> Tensor:
    """N D, R -> R D."""
    rows = torch.empty(source.shape[0], x.shape[1], dtype=x.dtype, device=x.device)
    grid, block = _grid(len(source), x.shape[1])
    with torch.cuda.device_of(x):
        gather_kernel[grid](x.contiguous(), source, rows, x.shape[1], BLOCK=block)
    return rows


def sum_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """R D, N K -> N D."""
    tokens, choices = slot.shape
    y = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    grid, block = _grid(tokens, rows.shape[1])
    with torch.cuda.device_of(rows):
        sum_kernel[grid](rows.contiguous(), slot, y, rows.shape[1], K=choices, BLOCK=block)
    return y


def _grid(count: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(WIDEST, triton.next_power_of_2(width))
    return (count, triton.cdiv(width, block)), block


@triton.jit
def swiglu_gate_kernel(product, gate, hidden, width, BLOCK: tl.constexpr) -> None:
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
def swiglu_gate_backward_kernel(product, gate, upstream, d_product, d_gate, width, BLOCK: tl.constexpr) -> None:
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
    with torch.cuda.device_of(product):
        swiglu_gate_kernel[grid](product.contiguous(), gate.contiguous(), hidden, width, BLOCK=block)
    return hidden


def swiglu_gate_backward(product: Tensor, gate: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """R 2F, R, R F -> gradients of product R 2F and of gate R (fp32)."""
    rows, width = gradient.shape
    product, gate, gradient = product.contiguous(), gate.contiguous(), gradient.contiguous()
    d_product = torch.empty_like(product)
    d_gate = torch.empty(rows, dtype=torch.float32, device=product.device)
    block = min(BLOCK_F, triton.next_power_of_2(width))
    with torch.cuda.device_of(product):
        swiglu_gate_backward_kernel[(rows,)](product, gate, gradient, d_product, d_gate, width, BLOCK=block)
    return d_product, d_gate
