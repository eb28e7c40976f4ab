"""Sharded parameters: how an update rule sees this rank's shard, and work on matrices whose rows are sharded."""

# Shapes: E matrices of a stack, R rows of a whole matrix, R' of them on this rank, C columns, n values

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

# Factored second moments, and the number of their updates.
ROW_MEANS, COLUMN_MEANS, COUNT = "row_var", "col_var", "count"
AT_ONCE = 2**26  # values per rank of one exchange: temporary copies stay under a gigabyte


class ShardGroup(Protocol):
    """The ranks that hold the shards of the same tensors; all call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """The index of this process among them."""

    @property
    def size(self) -> int: ...

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the group, in place."""

    def all_to_all(self, sent: Tensor, to: Sequence[int], received: Sequence[int]) -> Tensor:
        """All-to-all: n values, the first `to[0]` of them for rank 0 and so on -> `received[r]` values of rank r."""


class ShardSpec:
    """How a parameter is sharded; this base class is for one that is whole on this rank."""

    axis: int = 0  # that is sharded
    lengths: tuple[int, ...] = ()  # of each rank's shard along that axis
    group: ShardGroup | None = None  # None: no other rank holds a shard
    first: int = 0  # index in the whole stack of the first matrix on this rank

    def local(self, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a parameter, its gradient or a slot, sharing its memory."""
        return tensor

    def slot(self, key: str, part: Tensor) -> Tensor:
        """Return a tensor of the optimizer, given this rank's shard of it, in the form that checkpoints save."""
        return part

    def shards_rows(self, dimensions: int) -> bool:
        """Return whether rows of one matrix are on several ranks; the last two axes are rows and columns.

        A vector counts as a matrix with one column.
        """
        return self.group is not None and self.axis == max(dimensions, 2) - 2

    def rows(self, here: int) -> tuple[int, int]:
        """Return the first row on this rank, and the number of rows of the whole, of matrices with `here` rows here."""
        if self.group is None:
            return 0, here
        return sum(self.lengths[: self.group.rank]), sum(self.lengths)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        return values if self.group is None else self.group.all_reduce(values)


REPLICATED = ShardSpec()
ShardSpecOf = Callable[[Tensor], ShardSpec]  # how a parameter is sharded


def replicated(parameter: Tensor) -> ShardSpec:
    """Return the spec of a process that holds all of everything."""
    return REPLICATED


def is_sharded_along(key: str, axis: int, dimensions: int) -> bool:
    """Return whether a tensor kept for a parameter is sharded along `axis` as the parameter is.

    One that lacks this axis is the same everywhere: `row_var` lacks columns, `col_var` rows, and `count` both;
    `dimensions` is the parameter's, and a vector counts as a matrix with one column.
    """
    rows, columns = max(dimensions, 2) - 2, max(dimensions, 2) - 1
    missing = {ROW_MEANS: {columns}, COLUMN_MEANS: {rows}, COUNT: {rows, columns}}
    return axis not in missing.get(key, set())


def shard_lengths(length: int, ranks: int) -> tuple[int, ...]:
    """Return the shards of an axis as `torch.chunk` cuts it, with empty ones at the end if it runs short."""
    size = -(-length // ranks)
    return tuple(max(0, min(size, length - rank * size)) for rank in range(ranks))


def all_reduce_coalesced(tensors: Sequence[Tensor], spec: ShardSpec) -> None:
    """Sum fp32 tensors over the shards, in place, all in one exchange."""
    if spec.group is None or not tensors:
        return
    flat = spec.group.all_reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def on_whole_matrices(
    parts: Sequence[Tensor], specs: Sequence[ShardSpec], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work`, which keeps shapes, to whole matrices, stacked as E R C; return this rank's part of each result.

    Each `parts[i]` is E R' C or R' C, rows of matrices that `specs[i]` shards over one group, the same for all and in
    the same order on all ranks of it. Each matrix is sent to one rank and back; they are assigned evenly by size.
    """
    stacks = [part if part.ndim > 2 else part.unsqueeze(0) for part in parts]  # E R' C
    # The largest shard of any rank: all ranks must find the same batches.
    sizes = [
        len(stack) * max(spec.lengths) * stack.shape[-1] for stack, spec in zip(stacks, specs, strict=True)
    ]
    found: list[Tensor] = []
    first = held = 0
    for index, size in enumerate(sizes):
        if index > first and held + size > AT_ONCE:
            found += _exchange_and_apply(stacks[first:index], specs[first:index], work)
            first, held = index, 0
        held += size
    found += _exchange_and_apply(stacks[first:], specs[first:], work)
    return [result.view(part.shape) for result, part in zip(found, parts, strict=True)]


def _exchange_and_apply(
    stacks: Sequence[Tensor], specs: Sequence[ShardSpec], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """One exchange there and one back, of stacks E R' C."""
    group = specs[0].group
    assert group is not None, "a whole matrix need not be sent"
    assigned = _assign(stacks, specs, group.size)
    mine, ranks = assigned[group.rank], range(group.size)
    rows_here = [[stacks[stack][index] for stack, index in matrices] for matrices in assigned]
    sizes_here = [[rows.numel() for rows in matrices] for matrices in rows_here]
    sizes = [[specs[stack].lengths[rank] * stacks[stack].shape[-1] for stack, _ in mine] for rank in ranks]

    received = _exchange(group, rows_here, sizes, stacks[0])
    results: dict[tuple[int, int], Tensor] = {}
    for stack in sorted({stack for stack, _ in mine}):  # matrices of one stack together, which is faster
        shape = (-1, stacks[stack].shape[-1])
        own = [position for position, one in enumerate(mine) if one[0] == stack]
        wholes = [torch.cat([received[rank][position].view(shape) for rank in ranks]) for position in own]
        results |= zip([mine[position] for position in own], work(torch.stack(wholes)), strict=True)
    rows_back = [[results[one].split(specs[one[0]].lengths)[rank] for one in mine] for rank in ranks]
    returned = _exchange(group, rows_back, sizes_here, stacks[0])

    found = [torch.empty_like(stack) for stack in stacks]
    for (stack, index), rows in zip(chain(*assigned), chain(*returned), strict=True):
        found[stack][index] = rows.view_as(found[stack][index])
    return found


def _assign(stacks: Sequence[Tensor], specs: Sequence[ShardSpec], ranks: int) -> list[list[tuple[int, int]]]:
    """Return for each rank its matrices (stack, index): the largest first, to the rank with the least work."""
    sizes = [sum(spec.lengths) * stack.shape[-1] for stack, spec in zip(stacks, specs, strict=True)]
    matrices = [(stack, index) for stack, part in enumerate(stacks) for index in range(len(part))]
    load = [0] * ranks
    assigned: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for stack, index in sorted(matrices, key=lambda matrix: -sizes[matrix[0]]):
        rank = load.index(min(load))
        load[rank] += sizes[stack]
        assigned[rank].append((stack, index))
    return [sorted(one) for one in assigned]


def _exchange(
    group: ShardGroup, sent: list[list[Tensor]], sizes: list[list[int]], like: Tensor
) -> list[list[Tensor]]:
    """Send each rank a list of tensors; return, flat, those received: `sizes[r]` are those of rank r's tensors."""
    flat = [tensor.reshape(-1) for tensors in sent for tensor in tensors]
    joined = torch.cat(flat) if flat else like.new_empty(0)
    to = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    received = [sum(one) for one in sizes]
    arrived = group.all_to_all(joined, to, received).split(received)
    return [list(part.split(one)) for part, one in zip(arrived, sizes, strict=True)]
