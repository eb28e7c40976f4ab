"""Parameters of which only a part lies here: what an update rule must ask of the ranks that hold the rest."""

# Letters: R rows of the whole, R' of them here, n values

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

ROW_MEANS, COLUMN_MEANS = "row_var", "col_var"  # factored second moments, each of which lacks one axis


class PieceGroup(Protocol):
    """The ranks that hold the parts of the same tensors; all call the same methods in the same order."""

    @property
    def rank(self) -> int:
        """The place of this process among them."""

    @property
    def size(self) -> int: ...

    def total(self, values: Tensor) -> Tensor:
        """The sum over the group, in place."""

    def exchange(self, sent: Tensor, to: Sequence[int], received: Sequence[int]) -> Tensor:
        """n values, the first `to[0]` of them for rank 0 and so on -> what came, `received[r]` values from rank r."""


class Piece:
    """How a parameter lies here; this parent is for one that lies here as a whole."""

    axis: int = 0  # along which the whole is cut
    lengths: tuple[int, ...] = ()  # of the part of each rank, along that axis
    group: PieceGroup | None = None  # None: nobody else holds a part
    first: int = 0  # number of the first of the matrices here in the whole stack

    def local(self, tensor: Tensor) -> Tensor:
        """The part of a parameter, its gradient or a slot that lies here, sharing its memory."""
        return tensor

    def slot(self, key: str, part: Tensor) -> Tensor:
        """A tensor of the optimizer's, given what of it lies here, as one that checkpoints know the place of."""
        return part

    def cuts_rows(self, dimensions: int) -> bool:
        """Whether rows of one matrix lie on several ranks, where the last two axes are rows and columns."""
        return self.group is not None and self.axis == dimensions - 2

    def rows(self, here: int) -> tuple[int, int]:
        """The first of the rows that lie here, and how many there are of all, of matrices with `here` rows here."""
        if self.group is None:
            return 0, here
        return sum(self.lengths[: self.group.rank]), sum(self.lengths)

    def total(self, values: Tensor) -> Tensor:
        """The sum over the parts, in place."""
        return values if self.group is None else self.group.total(values)


WHOLE = Piece()
Pieces = Callable[[Tensor], Piece]  # how a parameter lies here


def whole(parameter: Tensor) -> Piece:
    """For a process that holds all of everything."""
    return WHOLE


def keeps_cut(key: str, axis: int, dimensions: int) -> bool:
    """Whether a tensor kept for a parameter is cut along `axis` like it; one that lacks this axis is alike everywhere.

    `row_var` lacks columns and `col_var` rows; `dimensions` is the parameter's.
    """
    missing = {ROW_MEANS: dimensions - 1, COLUMN_MEANS: dimensions - 2}.get(key)
    return axis != missing


def chunk_lengths(length: int, ranks: int) -> tuple[int, ...]:
    """The parts of an axis as `torch.chunk` cuts it, with empty ones at the end where it runs short."""
    size = -(-length // ranks)
    return tuple(max(0, min(size, length - rank * size)) for rank in range(ranks))
