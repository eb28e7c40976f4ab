"""Rows of all ranks for a loss over the whole batch, with gradients that find their way home."""

# Letters: N rows of this rank, M rows of all ranks, L most rows of any rank

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openm6.nn.gather import Gather, LocalGather


def open_gather(group: dist.ProcessGroup | None = None) -> Gather:
    """Gathers over the ranks of a group (by default all), or over this process alone where there are no others."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
    return LocalGather() if alone else RankGather(group)


class RankGather:
    """Gathers rows over a process group; ranks may bring unlike numbers of them, also none."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def rows(self, x: Tensor) -> tuple[Tensor, int]:
        """N … -> M …, and where our own begin.  See nn.gather.Gather."""
        ranks, own = dist.get_world_size(self.group), dist.get_rank(self.group)
        count = torch.tensor([len(x)], device=x.device)
        counts = torch.zeros(ranks, dtype=count.dtype, device=x.device)
        dist.all_gather_into_tensor(counts, count, group=self.group)
        lengths = counts.tolist()
        return _GatherRows.apply(x, lengths, own, self.group), sum(lengths[:own])


class _GatherRows(torch.autograd.Function):
    """Forward: all ranks' rows. Backward: the sum over ranks of what each found for our rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], own: int, group: dist.ProcessGroup | None) -> Tensor:
        ctx.lengths, ctx.own, ctx.group = lengths, own, group
        longest = max(1, *lengths)  # collectives want one shape of all
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x.detach()
        found = x.new_empty(len(lengths) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(found, padded, group=group)
        parts = found.unflatten(0, (len(lengths), longest))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        total = gradient.contiguous()
        dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.lengths[: ctx.own])
        return total[start : start + ctx.lengths[ctx.own]], None, None, None
