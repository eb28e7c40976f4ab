"""Work that needs whole matrices, where their rows lie on several ranks: each matrix visits one rank and goes home."""

# Letters: E matrices of a stack, R rows of the whole, R' of them here, C columns

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.optim.pieces import Piece, PieceGroup

AT_ONCE = (
    2**26
)  # values of this rank that travel together: what is in two places at once stays under a gigabyte


def on_whole_matrices(
    parts: Sequence[Tensor], pieces: Sequence[Piece], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`work`, which keeps shapes, done to whole matrices, stacked as E R C; gives of each result what belongs here.

    Each `parts[n]` is E R' C or R' C, rows of matrices that `pieces[n]` cuts over one group, the same for all and in
    the same order on all ranks of it. The matrices are dealt out evenly by size.
    """
    found: list[Tensor] = []
    for first, last in _batches(parts, pieces):
        found += _Visit(parts[first:last], pieces[first:last]).do(work)
    return found


def _batches(parts: Sequence[Tensor], pieces: Sequence[Piece]) -> Iterator[tuple[int, int]]:
    """Ranges of parts, by the most that any rank holds: all must come to the same ranges."""
    first = held = 0
    for number, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        stack = part.shape[0] if part.ndim > 2 else 1
        size = stack * max(piece.lengths) * part.shape[-1]
        if number > first and held + size > AT_ONCE:
            yield first, number
            first, held = number, 0
        held += size
    if len(parts) > first:
        yield first, len(parts)


@dataclass(frozen=True)
class _Matrix:
    """Matrix `place` of stack `stack`, and the rank that works on it."""

    stack: int
    place: int
    owner: int


class _Visit:
    """One exchange there and one back."""

    def __init__(self, parts: Sequence[Tensor], pieces: Sequence[Piece]) -> None:
        group = pieces[0].group
        assert group is not None, "a whole matrix need not travel"
        self.group: PieceGroup = group
        self.pieces = pieces
        self.shapes = [part.shape for part in parts]
        self.stacks = [part if part.ndim > 2 else part.unsqueeze(0) for part in parts]  # E R' C
        self.matrices = self._deal()

    def do(self, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
        group, ranks = self.group, range(self.group.size)
        mine = [matrix for matrix in self.matrices if matrix.owner == group.rank]
        going = [[self._rows_here(one) for one in self.matrices if one.owner == rank] for rank in ranks]
        to = [sum(rows.numel() for rows in rank) for rank in going]
        coming = [[self._size(one, rank) for one in mine] for rank in ranks]
        received = [sum(sizes) for sizes in coming]
        arrived = group.exchange(_joined(going, self.stacks[0]), to, received)
        wholes = self._assembled(mine, arrived, coming)
        answers = self._worked(mine, wholes, work)
        leaving = [[self._rows_of(one, answers[one], rank) for one in mine] for rank in ranks]
        returned = group.exchange(_joined(leaving, self.stacks[0]), received, to)
        return self._placed(returned)

    def _deal(self) -> list[_Matrix]:
        """The largest first, each to the rank with the least so far; sorted by owner, as they travel."""
        load = [0] * self.group.size
        dealt = []
        numbers = [(stack, place) for stack, part in enumerate(self.stacks) for place in range(len(part))]
        for stack, place in sorted(numbers, key=lambda pair: -self._values(pair[0])):
            owner = load.index(min(load))
            load[owner] += self._values(stack)
            dealt.append(_Matrix(stack, place, owner))
        return sorted(dealt, key=lambda one: (one.owner, one.stack, one.place))

    def _values(self, stack: int) -> int:
        return sum(self.pieces[stack].lengths) * self.stacks[stack].shape[-1]

    def _size(self, one: _Matrix, rank: int) -> int:
        return self.pieces[one.stack].lengths[rank] * self.stacks[one.stack].shape[-1]

    def _rows_here(self, one: _Matrix) -> Tensor:
        return self.stacks[one.stack][one.place]

    def _rows_of(self, one: _Matrix, whole: Tensor, rank: int) -> Tensor:
        return whole.split(self.pieces[one.stack].lengths)[rank]

    def _assembled(
        self, mine: list[_Matrix], arrived: Tensor, coming: list[list[int]]
    ) -> dict[_Matrix, Tensor]:
        flat = arrived.split([size for sizes in coming for size in sizes])
        wholes = {}
        for number, one in enumerate(mine):
            columns = self.stacks[one.stack].shape[-1]
            rows = [flat[rank * len(mine) + number].view(-1, columns) for rank in range(self.group.size)]
            wholes[one] = torch.cat(rows)
        return wholes

    def _worked(
        self, mine: list[_Matrix], wholes: dict[_Matrix, Tensor], work: Callable[[Tensor], Tensor]
    ) -> dict[_Matrix, Tensor]:
        """Matrices of one stack together, which is what products like."""
        answers: dict[_Matrix, Tensor] = {}
        for stack in sorted({one.stack for one in mine}):
            together = [one for one in mine if one.stack == stack]
            answers |= zip(together, work(torch.stack([wholes[one] for one in together])), strict=True)
        return answers

    def _placed(self, returned: Tensor) -> list[Tensor]:
        """What came home, in the form of the parts."""
        results = [torch.empty_like(stack) for stack in self.stacks]
        sizes = [self._rows_here(one).numel() for one in self.matrices]
        for one, rows in zip(self.matrices, returned.split(sizes), strict=True):
            results[one.stack][one.place] = rows.view_as(results[one.stack][one.place])
        return [result.view(shape) for result, shape in zip(results, self.shapes, strict=True)]


def _joined(by_rank: list[list[Tensor]], like: Tensor) -> Tensor:
    flat = [rows.reshape(-1) for rank in by_rank for rows in rank]
    return torch.cat(flat) if flat else like.new_empty(0)
