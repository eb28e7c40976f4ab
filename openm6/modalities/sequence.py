"""Pieces of tokens laid out as one example, and examples packed into rows, with the sequence rule's integers."""

# Letters: R rows, S tokens a row, n tokens of one kind in the batch

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.modalities.interface import Tokens
from openm6.ops.sequence import PADDING, Layout


@dataclass(frozen=True)
class Sequence:
    """One example as a run of tokens: its pieces in order, and the integers of the sequence rule for each token."""

    pieces: list[Tokens]
    order: np.ndarray  # N
    private: np.ndarray  # N
    positions: np.ndarray  # N 3
    task: str = ""
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.order)


def lay_out(pieces: list[Tokens], task: str = "", weight: float = 1.0) -> Sequence:
    """Sources first (order 0), then targets: causal ones count up, each block has one order and is private."""
    orders, privates, positions = [], [], []
    order, block, place = 0, 0, 0
    for piece in pieces:
        length = len(piece)
        if piece.placement == "source":
            orders.append(np.zeros(length, np.int32))
            privates.append(np.zeros(length, np.int32))
        elif piece.placement == "causal":
            orders.append(np.arange(order + 1, order + 1 + length, dtype=np.int32))
            privates.append(np.zeros(length, np.int32))
            order += length
        else:
            order, block = order + 1, block + 1
            orders.append(np.full(length, order, np.int32))
            privates.append(np.full(length, block, np.int32))
        positions.append(piece.grid + place)
        place += piece.span
    join = np.concatenate
    return Sequence(pieces, join(orders), join(privates), join(positions).astype(np.int32), task, weight)


def lay_out_pair(left: list[Tokens], right: list[Tokens], task: str = "", weight: float = 1.0) -> Sequence:
    """Two sides that never see each other, as if each stood alone: both of order 0, private, from place 0."""
    first, second = lay_out(left), lay_out(right)
    join = np.concatenate
    private = join([np.full(len(first), 1, np.int32), np.full(len(second), 2, np.int32)])
    order, positions = join([first.order, second.order]), join([first.positions, second.positions])
    return Sequence([*left, *right], order, private, positions, task, weight)


@dataclass(frozen=True)
class KindOfTokens:
    """All tokens of one kind in a batch, whichever rows they lie in.

    `index` n: place in the flattened rows; `arrays`: features; `example` n: number of the example in the batch;
    `weight` n: share of the example's loss that the token carries (0 where nothing is learned).
    """

    index: Tensor
    arrays: dict[str, Tensor]
    example: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> KindOfTokens:
        arrays = {name: array.to(device, non_blocking=True) for name, array in self.arrays.items()}
        moved = (part.to(device, non_blocking=True) for part in (self.index, self.example, self.weight))
        index, example, weight = moved
        return KindOfTokens(index, arrays, example, weight)


@dataclass(frozen=True)
class Batch:
    """Packed rows of examples, ready for the model; `cursor` is the data state after it.

    `draws` says of each example where in the data it was drawn, as the packer names it.
    """

    layout: Layout
    kinds: dict[str, KindOfTokens]
    tokens: int
    tasks: list[str]
    cursor: dict[str, Any] = field(default_factory=dict)
    draws: Many[Any] = ()

    @property
    def num_examples(self) -> int:
        return len(self.tasks)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        kinds = {name: kind.to(device) for name, kind in self.kinds.items()}
        return replace(self, layout=self.layout.to(device), kinds=kinds)


def collate(rows: list[list[Sequence]], length: int, cursor: dict[str, Any] | None = None) -> Batch:
    """Rows of whole examples, padded to `length` tokens, as one batch."""
    sample = np.full((len(rows), length), PADDING, np.int32)
    order, private = np.zeros_like(sample), np.zeros_like(sample)
    positions = np.zeros((len(rows), length, 3), np.int32)
    pieces: dict[str, list[tuple[Tokens, int, int, np.ndarray]]] = {}
    tasks: list[str] = []
    for row, sequences in enumerate(rows):
        start = 0
        for number, sequence in enumerate(sequences):
            stop = start + len(sequence)
            sample[row, start:stop] = number
            order[row, start:stop], private[row, start:stop] = sequence.order, sequence.private
            positions[row, start:stop] = sequence.positions
            _add_pieces(pieces, sequence, row * length + start, len(tasks))
            tasks.append(sequence.task)
            start = stop
    layout = Layout(*(torch.from_numpy(part) for part in (sample, order, private, positions)))
    kinds = {kind: _gather(found) for kind, found in sorted(pieces.items())}
    return Batch(layout, kinds, sum(len(s) for row in rows for s in row), tasks, cursor or {})


def _add_pieces(
    pieces: dict[str, list[tuple[Tokens, int, int, np.ndarray]]], sequence: Sequence, start: int, example: int
) -> None:
    learned = max(1, sum(int(piece.learn.sum()) for piece in sequence.pieces))
    for piece in sequence.pieces:
        if len(piece):
            weight = piece.learn.astype(np.float32) * np.float32(sequence.weight / learned)
            pieces.setdefault(piece.kind, []).append((piece, start, example, weight))
        start += len(piece)


def _gather(found: list[tuple[Tokens, int, int, np.ndarray]]) -> KindOfTokens:
    arrays = {
        name: torch.from_numpy(np.concatenate([piece.arrays[name] for piece, *_ in found]))
        for name in found[0][0].arrays
    }
    index = np.concatenate([np.arange(start, start + len(piece)) for piece, start, _, _ in found])
    example = np.concatenate([np.full(len(piece), number) for piece, _, number, _ in found])
    weight = np.concatenate([weight for *_, weight in found])
    return KindOfTokens(torch.from_numpy(index), arrays, torch.from_numpy(example), torch.from_numpy(weight))
