"""The door through which streamed weight sets reach the ranks that hold the rest of them; here a rank holds all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from openm6.optim.pieces import WHOLE, Piece
from openm6.optim.rules import Shape


class WeightSets:
    """What lies here of each weight set: all of it, in one process; the parent of sets on several ranks.

    `number` is that of a set, `name` that of one of its matrices.
    """

    def __init__(self, shapes: Sequence[Mapping[str, Shape]]) -> None:
        """`shapes` are those of whole sets."""
        self.shapes = shapes

    @property
    def parted(self) -> bool:
        """Whether ranks hold unlike parts, so that using a set is an exchange."""
        return False

    def is_sharded(self, number: int, name: str) -> bool:
        """Whether only some rows of a matrix lie here, so that it must be gathered to be used."""
        return False

    def piece(self, number: int, name: str) -> Piece:
        """How a matrix lies here."""
        return WHOLE

    def part(self, number: int, name: str, whole: Tensor, dealt: bool = False) -> Tensor:
        """What lies here of a whole matrix, of which experts may be `dealt` out already."""
        return whole

    def local_shapes(self, number: int) -> dict[str, Shape]:
        """The shapes of what lies here of a set."""
        return dict(self.shapes[number])

    def gather(self, number: int, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those matrices that travel, in full; of experts that are dealt out, those here. All ranks call it alike."""
        return parts

    def gathered(self, number: int) -> int:
        """Numbers in a set as it is computed with here."""
        return sum(math.prod(shape) for shape in self.local_shapes(number).values())

    def reduce(self, number: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of what was gathered -> of what lies here, summed over ranks."""
        return gradients

    def total(self, square: Tensor) -> Tensor:
        """A sum over what lies here -> over all of a set, in place."""
        return square

    def in_whole(self, number: int, name: str, slot: str, part: Tensor) -> Tensor:
        """What lies here of a tensor kept for a matrix, as the part of the whole that a checkpoint takes it for.

        On the host, and without a copy where it is there already.
        """
        return part.cpu()

    def here(self, part: Tensor) -> Tensor:
        """What `in_whole` was given, from what it gave."""
        return part
