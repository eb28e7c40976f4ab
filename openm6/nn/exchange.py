"""The door through which rows reach experts that live on other devices; on one device it stands open."""

# Letters: R rows, D width, E experts, E' experts that live here

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class ExpertExchange(Protocol):
    """Brings rows, sorted by expert, to the devices of their experts, and the answers home in the same order.

    Only rows travel: gates stay with their tokens and multiply after `collect`.
    """

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Any]:
        """R D and E -> rows for the experts that live here, their counts E', and a plan of the way back."""
        ...

    def collect(self, rows: Tensor, plan: Any) -> Tensor:
        """The answers of the experts that live here -> R D, in the order in which the rows were sent."""
        ...


class LocalExchange:
    """All experts live here."""

    def dispatch(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, None]:
        return rows, counts, None

    def collect(self, rows: Tensor, plan: None) -> Tensor:
        return rows
