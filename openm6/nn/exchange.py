"""The door through which rows reach experts that live on other devices; on one device it stands open."""

# Letters: R rows, D width, E experts, E' experts that live here

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from torch import Tensor


class Parcel(Protocol):
    """Rows on their way to some of the experts that live here; parcels of a layer divide those evenly, in order."""

    @property
    def counts(self) -> Tensor:
        """Rows of each expert."""

    def rows(self) -> Tensor:
        """The rows, sorted by expert; waits for them where they come from elsewhere."""


AnyParcel = TypeVar("AnyParcel", bound=Parcel)


class ExpertExchange(Protocol[AnyParcel]):
    """Brings rows, sorted by expert, to the devices of their experts, and the answers home in the same order.

    Only rows travel: gates stay with their tokens and multiply after `collect`. Rows may come in several parcels, so
    that one travels while another is computed; `reply` sends a parcel's answers on their way.
    """

    def dispatch(self, rows: Tensor, counts: Tensor, capacity: int | None) -> Sequence[AnyParcel]:
        """R D and E -> parcels of rows for the experts that live here; `capacity`, if given, equals all counts."""
        ...

    def reply(self, parcel: AnyParcel, answers: Tensor) -> None:
        """Sends home what the experts of a parcel answered."""
        ...

    def collect(self, parcels: Sequence[AnyParcel]) -> Tensor:
        """All answers -> R D, in the order in which the rows were sent."""
        ...

    def total(self, load: Tensor) -> Tensor:
        """A count of this rank's tokens, summed over all ranks of the run."""
        ...


class LocalParcel:
    """All rows at once, for all experts."""

    def __init__(self, rows: Tensor, counts: Tensor) -> None:
        self.counts = counts
        self.held = rows

    def rows(self) -> Tensor:
        return self.held


class LocalExchange:
    """All experts live here."""

    def dispatch(self, rows: Tensor, counts: Tensor, capacity: int | None) -> list[LocalParcel]:
        return [LocalParcel(rows, counts)]

    def reply(self, parcel: LocalParcel, answers: Tensor) -> None:
        parcel.held = answers

    def collect(self, parcels: Sequence[LocalParcel]) -> Tensor:
        return parcels[0].held

    def total(self, load: Tensor) -> Tensor:
        return load
