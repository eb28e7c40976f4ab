"""The door through which a loss over the batch sees the rows of other ranks; on one device it stands open."""

# Letters: N rows of this rank, M rows of all ranks, D width

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Gather(Protocol):
    """Lays the rows of all ranks under one another; every rank must call it equally often, with or without rows."""

    def rows(self, x: Tensor) -> tuple[Tensor, int]:
        """N … -> M … in the order of ranks, and where our own rows begin; gradients find their way home."""
        ...


class LocalGather:
    """There is one rank."""

    def rows(self, x: Tensor) -> tuple[Tensor, int]:
        return x, 0
