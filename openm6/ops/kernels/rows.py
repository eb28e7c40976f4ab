"""Rows on their way to experts and back: a gather, and a sum of each token's K rows."""

# Letters: N tokens, D width, K choices per token, R rows sent to experts

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 2048  # elements of a row that one program moves


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
    gather_kernel[grid](x.contiguous(), source, rows, x.shape[1], BLOCK=block)
    return rows


def sum_rows(rows: Tensor, slot: Tensor) -> Tensor:
    """R D, N K -> N D."""
    tokens, choices = slot.shape
    y = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    grid, block = _grid(tokens, rows.shape[1])
    sum_kernel[grid](rows.contiguous(), slot, y, rows.shape[1], K=choices, BLOCK=block)
    return y


def _grid(count: int, width: int) -> tuple[tuple[int, int], int]:
    block = min(WIDEST, triton.next_power_of_2(width))
    return (count, triton.cdiv(width, block)), block
