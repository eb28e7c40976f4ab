"""Segments of tokens as one example, examples packed into rows, and a batch split by examples."""

# Letters: R rows, S tokens a row, n tokens of one kind in the batch

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.modalities.interface import Segment
from openm6.modalities.truncation import fit
from openm6.ops.matmul import ROWS
from openm6.ops.sequence import PADDING, SequenceMeta

MIN_TEXT_TOKENS = (
    16  # tokens of a text that are left if it is cut to fit a row; less would hardly be an example
)
HEAD_COST = 0.5  # work of one learned token's head, in units of a token's way through the backbone


@dataclass(frozen=True)
class PackedExample:
    """One example as N tokens: its segments in order, and the integers of the sequence rule for each token."""

    segments: list[Segment]
    attn_order: np.ndarray  # N
    block_id: np.ndarray  # N
    positions: np.ndarray  # N 3
    task: str = ""
    weight: float = 1.0
    left: int = 0  # segments of the first side of a pair; 0: not a pair

    def __len__(self) -> int:
        return len(self.attn_order)

    @property
    def truncated(self) -> bool:
        """Whether anything of the record was cut."""
        return any(segment.truncated for segment in self.segments)


def build_sequence(
    segments: list[Segment], task: str = "", weight: float = 1.0, position: int = 0
) -> PackedExample:
    """Sources first (order 0, or one order per part), then targets: causal ones count up, blocks are hidden.

    `position` is that of the first token, for segments that continue others.
    """
    orders, blocks, positions = [], [], []
    order, block = 0, 0
    for segment in segments:
        length = len(segment)
        if segment.placement == "source":
            orders.append(np.zeros(length, np.int32))
            blocks.append(np.zeros(length, np.int32))
        elif segment.placement == "causal":
            orders.append(np.arange(order + 1, order + 1 + length, dtype=np.int32))
            blocks.append(np.zeros(length, np.int32))
            order += length
        elif segment.placement == "part":
            order += 1
            orders.append(np.full(length, order, np.int32))
            blocks.append(np.zeros(length, np.int32))
        else:
            order, block = order + 1, block + 1
            orders.append(np.full(length, order, np.int32))
            blocks.append(np.full(length, block, np.int32))
        positions.append(segment.grid + position * np.asarray(segment.moves))
        position += segment.span
    join = np.concatenate
    return PackedExample(segments, join(orders), join(blocks), join(positions).astype(np.int32), task, weight)


def build_pair(
    left: list[Segment], right: list[Segment], task: str = "", weight: float = 1.0
) -> PackedExample:
    """Two sides that never see each other, as if each stood alone: both of order 0, a block each, from position 0."""
    first, second = build_sequence(left), build_sequence(right)
    join = np.concatenate
    block_id = join([np.full(len(first), 1, np.int32), np.full(len(second), 2, np.int32)])
    attn_order, positions = (
        join([first.attn_order, second.attn_order]),
        join([first.positions, second.positions]),
    )
    return PackedExample([*left, *right], attn_order, block_id, positions, task, weight, len(left))


def shortened(sequence: PackedExample, length: int) -> PackedExample:
    """The sequence with its texts cut so that it has at most `length` tokens, if they can be cut by as much."""
    segments = fit(sequence.segments, length, MIN_TEXT_TOKENS)
    if sequence.left:
        left, right = segments[: sequence.left], segments[sequence.left :]
        return build_pair(left, right, sequence.task, sequence.weight)
    return build_sequence(segments, sequence.task, sequence.weight)


@dataclass(frozen=True)
class TokenGroup:
    """All tokens of one kind in a batch, whichever rows they lie in.

    `index` n: index in the flattened rows; `arrays`: features; `example` n: number of the example in the batch;
    `weight` n: share of the example's loss that the token carries (0 where nothing is learned); `learned` m: which of
    the n tokens have such a share, listed here because a GPU would have to wait to count them.
    """

    index: Tensor
    arrays: dict[str, Tensor]
    example: Tensor
    weight: Tensor
    learned: Tensor

    def to(self, device: torch.device | str) -> TokenGroup:
        arrays = {name: array.to(device, non_blocking=True) for name, array in self.arrays.items()}
        index, *rest = (part.to(device, non_blocking=True) for part in self._parts())
        return TokenGroup(index, arrays, *rest)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.index, self.example, self.weight, self.learned

    def __reduce__(self) -> tuple[Any, ...]:
        # Between processes as arrays: torch would open a file for each tensor.
        arrays = {name: array.numpy() for name, array in self.arrays.items()}
        return _group_of_arrays, (arrays, *(part.numpy() for part in self._parts()))


def _group_of_arrays(arrays: dict[str, np.ndarray], index: np.ndarray, *parts: np.ndarray) -> TokenGroup:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TokenGroup(torch.from_numpy(index), tensors, *(torch.from_numpy(part) for part in parts))


@dataclass(frozen=True)
class Counts:
    """Examples, tokens, positions in rows, and learned tokens of each kind."""

    examples: float
    tokens: float
    positions: float
    learned: dict[str, float]


@dataclass(frozen=True)
class Batch:
    """Packed rows of examples, ready for the model; `cursor` is the data state after it.

    `samples` holds the position of each example in the data, as the packer names it. A part of a batch keeps the
    `tasks` and `samples` of the whole batch, and the counts of the `whole`.
    """

    meta: SequenceMeta
    groups: dict[str, TokenGroup]
    tokens: int
    tasks: list[str]
    cursor: dict[str, Any] = field(default_factory=dict)
    samples: Sequence[Any] = ()
    whole: Counts | None = None

    @property
    def num_examples(self) -> int:
        return len(self.tasks)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        groups = {name: group.to(device) for name, group in self.groups.items()}
        return replace(self, meta=self.meta.to(device), groups=groups)


def collate(rows: list[list[PackedExample]], length: int, cursor: dict[str, Any] | None = None) -> Batch:
    """Rows of whole examples, padded to `length` tokens, as one batch."""
    example_id = np.full((len(rows), length), PADDING, np.int32)
    attn_order, block_id = np.zeros_like(example_id), np.zeros_like(example_id)
    positions = np.zeros((len(rows), length, 3), np.int32)
    segments: dict[str, list[tuple[Segment, int, int, np.ndarray]]] = {}
    tasks: list[str] = []
    for row, sequences in enumerate(rows):
        start = 0
        for index, sequence in enumerate(sequences):
            stop = start + len(sequence)
            example_id[row, start:stop] = index
            attn_order[row, start:stop], block_id[row, start:stop] = sequence.attn_order, sequence.block_id
            positions[row, start:stop] = sequence.positions
            _add_segments(segments, sequence, row * length + start, len(tasks))
            tasks.append(sequence.task)
            start = stop
    meta = SequenceMeta(*(torch.from_numpy(part) for part in (example_id, attn_order, block_id, positions)))
    groups = {kind: _gather(found) for kind, found in sorted(segments.items())}
    return Batch(meta, groups, sum(len(s) for row in rows for s in row), tasks, cursor or {})


def _add_segments(
    segments: dict[str, list[tuple[Segment, int, int, np.ndarray]]],
    sequence: PackedExample,
    start: int,
    example: int,
) -> None:
    learned = max(1, sum(int(segment.learn.sum()) for segment in sequence.segments))
    for segment in sequence.segments:
        if len(segment):
            weight = segment.learn.astype(np.float32) * np.float32(sequence.weight / learned)
            segments.setdefault(segment.kind, []).append((segment, start, example, weight))
        start += len(segment)


def _gather(found: list[tuple[Segment, int, int, np.ndarray]]) -> TokenGroup:
    arrays = {
        name: torch.from_numpy(np.concatenate([segment.arrays[name] for segment, *_ in found]))
        for name in found[0][0].arrays
    }
    index = np.concatenate([np.arange(start, start + len(segment)) for segment, start, _, _ in found])
    example = np.concatenate([np.full(len(segment), index) for segment, _, index, _ in found])
    weight = np.concatenate([weight for *_, weight in found])
    parts = (example, weight, np.flatnonzero(weight))
    return TokenGroup(torch.from_numpy(index), arrays, *(torch.from_numpy(part) for part in parts))


def count(batch: Batch) -> Counts:
    """What a batch holds."""
    learned = {name: float(len(group.learned)) for name, group in batch.groups.items()}
    return Counts(batch.num_examples, batch.tokens, batch.meta.example_id.numel(), learned)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Whole examples divided into parts of about equal work, each one row; the first keeps the cursor.

    Examples see only themselves, so where they lie changes nothing but the order of sums. Rows end with less than
    `ROWS` positions of padding, so that their lengths, and with them the shapes of products, come back.
    """
    example_of = torch.full((batch.meta.example_id.numel(),), -1)  # R*S -> example
    cost = torch.zeros(batch.num_examples)
    for group in batch.groups.values():
        example_of[group.index] = group.example
        learned = (group.weight > 0).to(cost.dtype)
        cost.index_add_(0, group.example, 1 + HEAD_COST * learned)
    owner = torch.tensor([*_divide(cost.tolist(), parts), -1])[example_of]  # R*S -> part; padding has none
    held = count(batch)
    divided = [_part_of(batch, (owner == part).nonzero()[:, 0], held) for part in range(parts)]
    return [replace(divided[0], cursor=batch.cursor), *divided[1:]]


def _divide(cost: list[float], parts: int) -> list[int]:
    """The part of each example: the most expensive first, each to the part with the least work so far."""
    load, owner = [0.0] * parts, [0] * len(cost)
    for index in sorted(range(len(cost)), key=lambda index: -cost[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += cost[index]
    return owner


def _part_of(batch: Batch, tokens: Tensor, whole: Counts) -> Batch:
    """The tokens with the indices `tokens` of the flattened rows as one row, with padding at its end."""
    rows = batch.meta
    row_number = tokens // rows.length
    # Examples are numbered within their row, so two rows use the same numbers.
    example_id, attn_order, block_id, positions = (part.flatten(0, 1)[tokens][None] for part in rows.parts())
    example_id = example_id * rows.batch + row_number.to(example_id.dtype)
    meta = SequenceMeta(*(_lengthened(part) for part in (example_id, attn_order, block_id, positions)))
    meta.example_id[:, len(tokens) :] = PADDING
    moved = torch.full((rows.batch * rows.length,), -1)
    moved[tokens] = torch.arange(len(tokens))
    groups = {}
    for name, group in batch.groups.items():
        here = (moved[group.index] >= 0).nonzero()[:, 0]
        if len(here):
            arrays = {key: array[here] for key, array in group.arrays.items()}
            index = moved[group.index[here]]
            weight = group.weight[here]
            groups[name] = TokenGroup(index, arrays, group.example[here], weight, weight.nonzero()[:, 0])
    return replace(batch, meta=meta, groups=groups, tokens=len(tokens), cursor={}, whole=whole)


def _lengthened(part: Tensor) -> Tensor:
    """1 S … -> 1 S' … with zeros at the end, S' being a multiple of `ROWS`."""
    return torch.cat([part, part.new_zeros(1, -part.shape[1] % ROWS, *part.shape[2:])], dim=1)
