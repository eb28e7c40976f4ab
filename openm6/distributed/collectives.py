"""Collectives with gradients: the all-to-all of expert parallelism, the all-gather of contrastive losses."""

# Dimensions: R rows, D width, E experts, P ranks that share the experts, E' = E/P experts of one rank, Q chunks,
# N rows of this rank, M rows of all ranks

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from openm6.nn.moe import ChunkOfExperts, Meanwhile, TokenDispatcher


@dataclass
class AsyncAllToAll:
    """Handle of an all-to-all of rows, and of the reverse one for their gradients.

    sent, received: rows to and from each rank.
    """

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]
    work: Any = None
    back: Any = None
    returned: Tensor | None = None

    def start(self, rows: Tensor) -> Tensor:
        """Send `rows`, sorted by the rank they go to; the result may be read after `self.work.wait()`."""
        arrived, self.work = _exchange(rows, self.sent, self.received, self.group)
        return arrived

    def start_back(self, gradient: Tensor) -> None:
        """Send gradients back, where `end_back` waits for them."""
        self.returned, self.back = _exchange(gradient, self.received, self.sent, self.group)

    def end_back(self) -> Tensor:
        self.back.wait()
        returned, self.returned = self.returned, None
        assert returned is not None
        return returned


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> tuple[Tensor, Any]:
    rows = rows.contiguous()
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    return arrived, dist.all_to_all_single(arrived, rows, received, sent, group=group, async_op=True)


# Two functions for one all-to-all: what is computed between them overlaps with it, forwards and backwards.
class _StartAllToAll(torch.autograd.Function):
    """Start the all-to-all; backwards, wait for the gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.end_back(), None  # the incoming gradient has the shape of what was sent


class _WaitAllToAll(torch.autograd.Function):
    """Wait for the rows; backwards, start the all-to-all of their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: AsyncAllToAll) -> Tensor:
        transfer.work.wait()
        ctx.transfer = transfer
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start_back(gradient)
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


class AllToAllDispatcher(TokenDispatcher):
    """Rank p of the group holds the experts p·E' to (p+1)·E' - 1 of each layer.

    Every rank takes part in every exchange, with no rows if need be, so no rank waits for one that has nothing to send.
    Numbers of rows are exchanged first and read by the host, once a layer; with a capacity they are known. `chunks`
    divides the experts of a rank, and with them the rows, into so many all-to-alls, of which one overlaps with the
    computation of another.
    """

    def __init__(self, group: dist.ProcessGroup, chunks: int = 1) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.chunks = chunks

    def exchange(
        self, rows: Tensor, counts: Tensor, capacity: int | None, experts: ChunkOfExperts, meanwhile: Meanwhile
    ) -> tuple[Tensor, Tensor | None]:
        """R D and E -> R D in the order of the rows; all chunks are being sent before the first is computed.

        Raises:
            ValueError: the experts cannot be distributed over the ranks and chunks evenly.
        """
        if len(counts) % (self.size * self.chunks):
            raise ValueError(
                f"{len(counts)} experts cannot be distributed over {self.size} ranks in {self.chunks} chunks"
            )
        ours = counts.view(self.size, -1)  # P E'
        theirs = self._exchange_counts(ours) if capacity is None else ours
        sent, received = self._splits(ours, theirs, capacity)  # P Q each
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

    def all_reduce(self, load: Tensor) -> Tensor:
        """The sum over all ranks of the run, not only those that share the experts."""
        return sum_copy(load)

    def _exchange_counts(self, ours: Tensor) -> Tensor:
        theirs = torch.empty_like(ours)
        dist.all_to_all_single(theirs, ours.contiguous(), group=self.group)
        return theirs

    def _splits(self, ours: Tensor, theirs: Tensor, capacity: int | None) -> tuple[list[list[int]], list[list[int]]]:
        """Rows to and from each rank in each chunk, on the host: P Q."""
        if capacity is not None:
            even = [[capacity * ours.shape[1] // self.chunks] * self.chunks] * self.size
            return even, even
        both = torch.stack([ours, theirs]).view(2, self.size, self.chunks, -1).sum(-1)
        sent, received = both.tolist()
        return sent, received


class CopiesDispatcher(TokenDispatcher):
    """All experts are on every rank; only counts are summed."""

    def all_reduce(self, load: Tensor) -> Tensor:
        return sum_copy(load)


def sum_copy(load: Tensor) -> Tensor:
    """The sum over all ranks, in a tensor of its own; without gradient."""
    load = load.detach().clone()
    dist.all_reduce(load)
    return load


def _expert_order(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the permutation from (rank, expert) to (expert, rank) and its inverse; counts P E."""
    ranks, experts = counts.shape
    segment = torch.arange(ranks * experts, device=counts.device).repeat_interleave(
        counts.reshape(-1), output_size=total
    )
    order = (segment % experts * ranks + segment // experts).argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(total, device=counts.device)
    return order, inverse


def open_gather(group: dist.ProcessGroup | None = None) -> RankGather | None:
    """Gather over the ranks of a group (by default all); None if this process is alone."""
    alone = not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1
    return None if alone else RankGather(group)


class RankGather:
    """Gathers rows over a process group; ranks may bring unlike numbers of them, also none."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group

    def __call__(self, x: Tensor) -> tuple[Tensor, int]:
        """N … -> M …, and where our own begin: a `Gather` of modalities/pool.py."""
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
        longest = max(1, *lengths)  # collectives need the same shape on all ranks
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
