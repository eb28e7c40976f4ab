"""Examples packed into rows of tokens, with a cursor from which the very next batch can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

from pydantic import Field

from openm6.base.config import Config
from openm6.base.errors import DataError
from openm6.data.mixture import Draw
from openm6.data.prepare import Preparer
from openm6.data.quarantine import Quarantine
from openm6.modalities.sequence import Batch, Sequence, collate


class PackingConfig(Config):
    """A batch is `rows` rows of `length` tokens; up to `waiting` examples that do not fit wait for the next one."""

    rows: int = Field(default=4, ge=1)
    length: int = Field(default=512, ge=16)
    waiting: int = Field(default=8, ge=1)


class Packer:
    """First fit: each drawn example goes into the first row with room; those that fit nowhere open the next batch.

    A batch is closed when `waiting` examples did not fit. They are remembered as draws, not as tokens, so the
    cursor stays small and a resumed run makes the same rows.
    """

    def __init__(self, preparer: Preparer, config: PackingConfig, quarantine: Quarantine) -> None:
        self.preparer = preparer
        self.config = config
        self.quarantine = quarantine
        self.waiting: list[Draw] = []

    def state(self) -> dict[str, Any]:
        """JSON-able: the mixture's place, the draws that wait, and the quarantine's counts."""
        return {
            "mixture": self.preparer.mixture.state(),
            "waiting": [astuple(draw) for draw in self.waiting],
            "quarantine": self.quarantine.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to a place that `state` gave."""
        self.preparer.mixture.restore(state["mixture"])
        self.waiting = [Draw(*draw) for draw in state["waiting"]]
        self.quarantine.restore(state["quarantine"])

    def batches(self) -> Iterator[Batch]:
        """An endless stream of packed batches."""
        while True:
            rows = self._fill()
            yield collate(rows, self.config.length, self.state())

    def _fill(self) -> list[list[Sequence]]:
        rows: list[list[Sequence]] = [[] for _ in range(self.config.rows)]
        room = [self.config.length] * self.config.rows
        earlier, self.waiting = self.waiting, []
        while len(self.waiting) < self.config.waiting and any(room):
            draw = earlier.pop(0) if earlier else self.preparer.mixture.draw()
            sequence = self._sequence(draw)
            if sequence is None:
                continue
            row = next((number for number, left in enumerate(room) if left >= len(sequence)), None)
            if row is None:
                self.waiting.append(draw)  # made again for the next batch, and counted only then
            else:
                self.quarantine.accept()
                rows[row].append(sequence)
                room[row] -= len(sequence)
        self.waiting.extend(earlier)
        return rows

    def _sequence(self, draw: Draw) -> Sequence | None:
        """The draw as tokens; None where it is broken, which the quarantine notes."""
        try:
            sequence = self.preparer.sequence(draw)
            if len(sequence) > self.config.length:
                raise DataError(
                    f"{len(sequence)} tokens do not fit a row of {self.config.length}: "
                    "raise packing.length or shorten it"
                )
        except DataError as error:
            self.quarantine.add(*self.preparer.name(draw), error)
            return None
        return sequence
