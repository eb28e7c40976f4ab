"""Cross-entropy of rows of logits, which are overwritten by their gradient."""

# Shapes: C rows, V vocabulary

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 4096


@triton.jit
def nll_kernel(logits, label, weight, nll, size, BLOCK: tl.constexpr) -> None:
    """nll = log Σ exp(x) − x[label]; then x becomes weight · (softmax(x) − one at the label)"""
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * size
    target = tl.load(label + row)
    scale = tl.load(weight + row).to(tl.float32)
    at_label = tl.load(line + target).to(tl.float32)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(line + column, mask=column < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    tl.store(nll + row, highest + tl.log(total) - at_label)
    tl.debug_barrier()  # every thread has read the label's logit before it is overwritten
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(line + column, mask=column < size, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - highest) / total - tl.where(column == target, 1.0, 0.0)) * scale
        tl.store(line + column, gradient.to(logits.dtype.element_ty), mask=column < size)


def cross_entropy_with_gradient(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """C V, C, C -> nll C (fp32); `logits` then holds the gradient of Σ weight · nll."""
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(BLOCK_V, triton.next_power_of_2(logits.shape[1]))
    with torch.cuda.device_of(logits):
        nll_kernel[(len(logits),)](logits, label, weight, nll, logits.shape[1], BLOCK=block, num_warps=8)
    return nll
