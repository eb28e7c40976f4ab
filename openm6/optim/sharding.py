"""Sharded parameters: how an update rule sees this rank's shard, and work on matrices whose rows are sharded."""

# Shapes: E matrices of a stack, R rows of a whole matrix, R' of them on this rank, C columns, n values

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, groupby, islice

import torch
import torch.distributed as dist
from torch import Tensor

# Factored second moments, and the number of their updates.
ROW_MEANS, COLUMN_MEANS, COUNT = "row_var", "col_var", "count"
AT_ONCE = 2**26  # values per rank of one exchange: temporary copies stay under a gigabyte


class ShardSpec:
    """How a parameter is sharded along one axis; by default it is whole on this rank."""

    def __init__(self, axis: int = 0, length: int = 0, group: dist.ProcessGroup | None = None, first: int = 0) -> None:
        """`length`: of the whole axis; `group`: ranks with the shards; `first`: index of the first matrix here."""
        self.axis, self.length, self.group, self.first = axis, length, group, first
        ranks = 1 if group is None else group.size()
        size = -(-length // ranks)  # as `torch.chunk` divides an axis, with empty shards at the end if it runs short
        self.lengths = tuple(max(0, min(size, length - rank * size)) for rank in range(ranks))

    def local(self, tensor: Tensor) -> Tensor:
        """Return this rank's shard of a parameter, its gradient or a slot, sharing its memory."""
        return tensor

    def slot(self, key: str, part: Tensor) -> Tensor:
        """Return a tensor of the optimizer, given this rank's shard of it, in the form that checkpoints save."""
        return part

    def shards_rows(self, dimensions: int) -> bool:
        """Return whether rows of one matrix (the last but one axis, the only one of a vector) are on several ranks."""
        return self.group is not None and self.axis == max(dimensions, 2) - 2

    def rows(self, here: int) -> tuple[int, int]:
        """Return the first row on this rank, and the number of rows of the whole, of matrices with `here` rows here."""
        if self.group is None:
            return 0, here
        return sum(self.lengths[: self.group.rank()]), self.length

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


REPLICATED = ShardSpec()
ShardSpecOf = Callable[[Tensor], ShardSpec]  # how a parameter is sharded


def replicated(parameter: Tensor) -> ShardSpec:
    """Return the spec of a process that holds all of everything."""
    return REPLICATED


def is_sharded_along(key: str, axis: int, dimensions: int) -> bool:
    """Return whether a tensor kept for a parameter is sharded along `axis` as it is, or lacks that axis."""
    rows, columns = max(dimensions, 2) - 2, max(dimensions, 2) - 1
    missing = {ROW_MEANS: {columns}, COLUMN_MEANS: {rows}, COUNT: {rows, columns}}
    return axis not in missing.get(key, set())


def on_whole_matrices(
    parts: Sequence[Tensor], specs: Sequence[ShardSpec], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work`, which keeps shapes, to whole matrices, stacked as E R C; return this rank's part of each result.

    Each `parts[i]` is E R' C or R' C, rows of matrices that `specs[i]` shards over one group, the same for all and in
    the same order on all ranks of it. Each matrix is sent to one rank and back; they are assigned evenly by size.
    """
    stacks = [part if part.ndim > 2 else part.unsqueeze(0) for part in parts]  # E R' C
    found: list[Tensor] = []
    first = held = 0
    for index, (stack, spec) in enumerate(zip(stacks, specs, strict=True)):
        # The largest shard of any rank, so that all ranks find the same batches.
        size = len(stack) * max(spec.lengths) * stack.shape[-1]
        if index > first and held + size > AT_ONCE:
            found += _exchange_and_apply(stacks[first:index], specs[first:index], work)
            first, held = index, 0
        held += size
    found += _exchange_and_apply(stacks[first:], specs[first:], work)
    return [result.view(part.shape) for result, part in zip(found, parts, strict=True)]


def _exchange_and_apply(
    stacks: Sequence[Tensor], specs: Sequence[ShardSpec], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """One exchange there and one back, of stacks E R' C. Matrices are counted over all stacks."""
    group = specs[0].group
    assert group is not None, "a whole matrix need not be sent"
    parts = [part for stack in stacks for part in stack]  # R' C
    stack_of = [index for index, stack in enumerate(stacks) for _ in stack]
    lengths = [specs[index].lengths for index in stack_of]
    sizes = [sum(rows) * part.shape[-1] for rows, part in zip(lengths, parts, strict=True)]
    owners, ranks = assign_owners(sizes, group.size()), range(group.size())
    assigned = [[matrix for matrix, owner in enumerate(owners) if owner == rank] for rank in ranks]
    mine = assigned[group.rank()]

    sent = [[parts[matrix] for matrix in one] for one in assigned]
    expected = [[lengths[matrix][rank] * parts[matrix].shape[-1] for matrix in mine] for rank in ranks]
    received = zip(*_exchange(group, sent, expected, parts[0]), strict=True)  # by matrix, then by rank
    wholes = {
        matrix: torch.cat([rows.view(-1, parts[matrix].shape[-1]) for rows in shards])
        for matrix, shards in zip(mine, received, strict=True)
    }
    results: dict[int, Tensor] = {}
    for _, own in groupby(mine, key=stack_of.__getitem__):  # matrices of one stack together, which is faster
        together = list(own)
        stacked = torch.stack([wholes[matrix] for matrix in together])
        results |= zip(together, work(stacked), strict=True)

    sent = [[results[matrix].split(lengths[matrix])[rank] for matrix in mine] for rank in ranks]
    expected = [[parts[matrix].numel() for matrix in one] for one in assigned]
    returned = _exchange(group, sent, expected, parts[0])
    found = dict(zip(chain(*assigned), chain(*returned), strict=True))
    in_order = (found[matrix].view_as(part) for matrix, part in enumerate(parts))
    return [torch.stack(list(islice(in_order, len(stack)))) for stack in stacks]


def assign_owners(sizes: Sequence[float], ranks: int) -> list[int]:
    """Return the rank that owns each tensor: the largest first, each to the rank with the least so far."""
    load, owner = [0.0] * ranks, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += sizes[index]
    return owner


def _exchange(
    group: dist.ProcessGroup, sent: list[list[Tensor]], expected: list[list[int]], like: Tensor
) -> list[list[Tensor]]:
    """Send each rank a list of tensors; return, flat, those received: `expected[r]` are the sizes of rank r's."""
    joined = torch.cat([like.new_empty(0), *(tensor.reshape(-1) for tensors in sent for tensor in tensors)])
    to = [sum(tensor.numel() for tensor in tensors) for tensors in sent]
    received = [sum(sizes) for sizes in expected]
    arrived = like.new_empty(sum(received))
    dist.all_to_all_single(arrived, joined, received, to, group=group)
    return [list(part.split(sizes)) for part, sizes in zip(arrived.split(received), expected, strict=True)]
