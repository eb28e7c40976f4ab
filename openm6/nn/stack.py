"""The door through which somebody else runs a backbone's layers: one whose weights live elsewhere and come by turns."""

# Letters: B rows, S tokens, D width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from openm6.nn.block import Block, Context, LayerParts
from openm6.nn.experts import RouterLoad
from openm6.ops.sequence import SequenceMeta

MakeContext = Callable[[Tensor, SequenceMeta], Context]


class BlockSource(Protocol):
    """Gives the block of each layer where not all of them stand on the device at once."""

    def block(self, layer: int) -> Block:
        """The block, ready on the device until that of another layer is asked for."""
        ...


class BlockRunner(Protocol):
    """Runs all layers on embedded tokens, in as many parts of the batch as it sees fit."""

    def run(
        self, x: Tensor, layout: SequenceMeta, layers: Sequence[LayerParts], make_context: MakeContext
    ) -> tuple[Tensor, list[RouterLoad]]:
        """B S D -> B S D before the final norm, and a report for each sparse layer.

        `make_context` gives what the layers need to know about some of the rows.
        """
        ...
