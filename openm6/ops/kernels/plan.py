"""The journey of rows to their experts without a sort: count per block, add up, place."""

# Letters: N tokens, K choices per token, R = N·K rows, E experts, P blocks of choices

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CHOICES = 128  # each is compared with all others of its block: 16,384 comparisons


@triton.jit
def count_kernel(chosen, counts, num_rows, num_experts, BLOCK: tl.constexpr, BINS: tl.constexpr) -> None:
    """counts[p, e]: how many choices of block p fell on expert e"""
    block = tl.program_id(0)
    choice = block * BLOCK + tl.arange(0, BLOCK)
    # What lies beyond the end falls into a bin of its own, which is not written.
    expert = tl.load(chosen + choice, mask=choice < num_rows, other=num_experts).to(tl.int32)
    found = tl.histogram(expert, BINS)
    number = tl.arange(0, BINS)
    tl.store(counts + block * num_experts + number, found, mask=number < num_experts)


@triton.jit
def place_kernel(chosen, first, slot, choices, num_rows, num_experts, BLOCK: tl.constexpr) -> None:
    """slot[c] = first[p, e] + the choices before c in its block that fell on the same expert; choices inverts it"""
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


def plan_rows(chosen: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """N K -> choice R (flat number of the choice in each row), slot N K, ends E (int32); stable, nothing waits."""
    flat, device = chosen.reshape(-1), chosen.device
    num_rows = flat.shape[0]
    blocks = triton.cdiv(num_rows, BLOCK_CHOICES)
    counts = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    bins = triton.next_power_of_2(num_experts + 1)
    count_kernel[(blocks,)](flat, counts, num_rows, num_experts, BLOCK=BLOCK_CHOICES, BINS=bins)
    through = counts.cumsum(0, dtype=torch.int32)  # P E
    ends = through[-1].cumsum(0, dtype=torch.int32)  # E
    first = through - counts + (ends - through[-1])  # P E
    slot = torch.empty(chosen.shape, dtype=torch.int64, device=device)
    choices = torch.empty(num_rows, dtype=torch.int64, device=device)
    place_kernel[(blocks,)](flat, first, slot, choices, num_rows, num_experts, BLOCK=BLOCK_CHOICES)
    return choices, slot, ends
