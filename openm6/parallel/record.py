"""All that is kept for one weight set, as one run of bytes: one copy fetches it, a shorter one the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.nn.block import Block
from openm6.optim.rules import Shape, Slot, Stored, UpdateRule

ALIGNMENT = 256  # of each tensor, for the matrix units
PAGE = 4096  # of each record, for the host


@dataclass(frozen=True)
class Entry:
    """One slot of one parameter and where it lies."""

    parameter: str
    slot: Slot
    start: int

    def view(self, record: Tensor) -> Tensor:
        """The tensor within a record's bytes."""
        flat = record[self.start : self.start + self.slot.num_bytes]
        return flat.view(self.slot.dtype).view(self.slot.shape)


class RecordLayout:
    """Where each slot lies: first those that are read to compute with, then what only updates need."""

    def __init__(self, shapes: Mapping[str, Shape], rule: UpdateRule) -> None:
        self.shapes = dict(shapes)
        slots = [(name, slot) for name, shape in shapes.items() for slot in rule.slots(shape)]
        read = [pair for pair in slots if pair[1].name in rule.read_slots]
        rest = [pair for pair in slots if pair[1].name not in rule.read_slots]
        self.entries: list[Entry] = []
        self.read_bytes = self._place(read, 0)
        self.num_bytes = _rounded(self._place(rest, self.read_bytes), PAGE)

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def views(self, record: Tensor) -> dict[str, Stored]:
        """parameter -> its slots, as views of a record's bytes (uint8)."""
        found: dict[str, Stored] = {name: {} for name in self.shapes}
        for entry in self.entries:
            found[entry.parameter][entry.slot.name] = entry.view(record)
        return found

    def _place(self, slots: list[tuple[str, Slot]], start: int) -> int:
        for parameter, slot in slots:
            self.entries.append(Entry(parameter, slot, start))
            start = _rounded(start + slot.num_bytes, ALIGNMENT)
        return start


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def set_shapes(block: Block) -> dict[str, tuple[int, ...]]:
    """The matrices of a weight set that are streamed; a router that it holds stays with the edges."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in block.named_parameters()
        if not name.startswith("router.")
    }
