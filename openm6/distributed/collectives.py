"""Collectives with gradients: the all-to-all of expert parallelism, the all-gather of contrastive losses."""

# Dimensions: R rows, D width, E experts, P ranks that share the experts, E' = E/P experts of one rank, Q chunks,
# N rows of this rank, M rows of all ranks

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openm6.nn.moe import ChunkOfExperts, Meanwhile, TokenDispatcher


@dataclass
class AsyncAllToAll:
    """Handle of an all-to-all of rows, and of the reverse one for their gradients."""

    group: dist.ProcessGroup
    sent: list[int]  # rows to each rank
    received: list[int]  # and from each
    work: Any = None  # of the exchange that is under way
    gradient: Tensor | None = None  # of what was sent

    def start(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send `rows`, sorted by the rank they go to; the result may be read after `self.work.wait()`."""
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        self.work = dist.all_to_all_single(arrived, rows, received, sent, group=self.group, async_op=True)
        return arrived


# Two functions for one all-to-all: what is computed between them overlaps with it, forwards and backwards.
class _StartAllToAll(torch.autograd.Function):
    """Start the all-to-all; backwards, wait for the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows, transfer.sent, transfer.received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        transfer: AsyncAllToAll = ctx.transfer
        transfer.work.wait()
        found, transfer.gradient = transfer.gradient, None
        return found, None  # not `gradient`, which only stands for it


class _WaitAllToAll(torch.autograd.Function):
    """Wait for the rows; backwards, start the all-to-all of their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        transfer.work.wait()
        ctx.transfer = transfer
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        transfer: AsyncAllToAll = ctx.transfer
        transfer.gradient = transfer.start(gradient, transfer.received, transfer.sent)
        return gradient, None


class _Reorder(torch.autograd.Function):
    """rows[order] for a permutation; autograd would scatter backwards, where the inverse gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


class CopiesDispatcher(TokenDispatcher):
    """Counts are summed over all ranks of the run; each has copies of all experts, unless a subclass sends rows."""

    def all_reduce(self, load: Tensor) -> Tensor:
        load = load.detach().clone()
        dist.all_reduce(load)
        return load


class AllToAllDispatcher(CopiesDispatcher):
    """Rank p of the group holds the experts p·E' to (p+1)·E' - 1 of each layer.

    Every rank takes part in every exchange, with no rows if need be, so no rank waits for one that has nothing to send.
    Numbers of rows are exchanged first and read by the host, once a layer; with a capacity they are known. `chunks`
    divides the experts of a rank, and with them the rows, into so many all-to-alls, of which one overlaps with the
    computation of another.
    """

    is_local = False

    def __init__(self, group: dist.ProcessGroup, chunks: int = 1) -> None:
        self.group, self.size, self.chunks = group, dist.get_world_size(group), chunks

    def exchange(
        self, rows: Tensor, counts: Tensor, capacity: int | None, experts: ChunkOfExperts, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """R D and E -> R D in the order of the rows; all chunks are being sent before the first is computed."""
        ours = counts.view(self.size, -1)  # P E'
        if capacity is None:
            theirs = torch.empty_like(ours)
            dist.all_to_all_single(theirs, ours.contiguous(), group=self.group)
            both = torch.stack([ours, theirs]).view(2, self.size, self.chunks, -1).sum(-1)
            sent, received = both.tolist()  # P Q each, on the host
        else:
            theirs = ours
            sent = received = [[capacity * ours.shape[1] // self.chunks] * self.chunks] * self.size
        by_chunk = rows.split([number for by_rank in sent for number in by_rank])
        sending = []
        for chunk in range(self.chunks):
            transfer = AsyncAllToAll(self.group, [row[chunk] for row in sent], [row[chunk] for row in received])
            outgoing = torch.cat(by_chunk[chunk :: self.chunks]) if self.chunks > 1 else rows
            sending.append((_StartAllToAll.apply(outgoing, transfer), transfer))
        result = meanwhile()
        returning = []
        for chunk, (arriving, transfer) in enumerate(sending):
            by_rank = theirs.view(self.size, self.chunks, -1)[:, chunk]  # P E'/Q
            order, inverse = _expert_order(by_rank, sum(transfer.received))
            # They are sorted by (rank, expert); the grouped product needs the rows of one expert together.
            arrived = _Reorder.apply(_WaitAllToAll.apply(arriving, transfer), order, inverse)
            outputs = _Reorder.apply(experts(chunk, arrived, by_rank.sum(0)), inverse, order)
            back = AsyncAllToAll(self.group, transfer.received, transfer.sent)
            returning.append((_StartAllToAll.apply(outputs, back), back))
        # P parts of each chunk
        parts = [_WaitAllToAll.apply(arriving, back).split(back.received) for arriving, back in returning]
        return torch.cat([part for of_rank in zip(*parts, strict=True) for part in of_rank]), result


def _expert_order(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the permutation from (rank, expert) to (expert, rank) and its inverse; counts P E."""
    ranks, experts = counts.shape
    positions = torch.arange(ranks * experts, device=counts.device)
    segment = positions.repeat_interleave(counts.reshape(-1), output_size=total)
    order = (segment % experts * ranks + segment // experts).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total, device=counts.device)
    return order, inverse


def open_gather() -> Callable[[Tensor], tuple[Tensor, int]] | None:
    """Return `gather_rows`, or None if this process is alone."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1
    return None if alone else gather_rows


def gather_rows(x: Tensor) -> tuple[Tensor, int]:
    """Gather the rows of ranks (a `Gather` of modalities/pool.py), any number of each: N … -> M …, where ours begin."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=x.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(x)], device=x.device))
    lengths, own = counts.tolist(), dist.get_rank()
    return _GatherRows.apply(x, lengths, own), sum(lengths[:own])


class _GatherRows(torch.autograd.Function):
    """Forward: all ranks' rows. Backward: the sum over ranks of what each found for our rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: list[int], own: int) -> Tensor:
        ctx.lengths, ctx.own = lengths, own
        longest = max(1, *lengths)  # collectives need the same shape on all ranks
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x.detach()
        found = x.new_empty(len(lengths) * longest, *x.shape[1:])
        dist.all_gather_into_tensor(found, padded)
        parts = found.unflatten(0, (len(lengths), longest))
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total.split(ctx.lengths)[ctx.own], None, None
