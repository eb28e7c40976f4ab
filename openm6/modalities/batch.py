"""Segments of tokens as one example, examples packed into rows, and a batch split by examples."""

# Letters: R rows, S tokens per row, n tokens of one kind in the batch

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openm6.modalities.interface import Arrays, Segment
from openm6.modalities.text import fit
from openm6.ops.matmul import ROWS
from openm6.ops.sequence import PADDING, SequenceMeta

# Tokens of a text that are left if it is cut to fit a row; less would hardly be an example.
MIN_TEXT_TOKENS = 16
ALIGNMENT = 64  # bytes from one tensor of a batch to the next, for wide loads
# Cost of one learned token's head, in units of a token's cost in the backbone.
HEAD_COST = 0.5


@dataclass(frozen=True)
class PackedExample:
    """One example as N tokens: its segments in order, and the integers of the sequence rule for each token."""

    segments: list[Segment]
    attn_order: np.ndarray  # N
    block_id: np.ndarray  # N
    positions: np.ndarray  # N 3
    task: str = ""
    weight: float = 1.0
    # Segments of the first side of a pair; 0: not a pair.
    left: int = 0

    def __len__(self) -> int:
        return len(self.attn_order)

    @property
    def truncated(self) -> bool:
        """Whether anything of the record was cut."""
        return any(segment.truncated for segment in self.segments)


def build_sequence(segments: list[Segment], task: str = "", weight: float = 1.0, position: int = 0) -> PackedExample:
    """Sources first (order 0, or one order per part), then targets: causal ones count up, blocks are hidden.

    `position` is that of the first token, for segments that continue others.
    """
    length = sum(map(len, segments))
    attn_order, block_id = np.zeros(length, np.int32), np.zeros(length, np.int32)
    positions = np.empty((length, 3), np.int32)
    start = order = block = 0
    for segment in segments:
        here = slice(start, start + len(segment))
        start = here.stop
        if segment.placement == "causal":
            attn_order[here] = np.arange(order + 1, order + 1 + len(segment))
            order += len(segment)
        elif segment.placement != "source":
            order += 1
            attn_order[here] = order
        if segment.placement == "block":
            block += 1
            block_id[here] = block
        positions[here] = segment.grid + np.multiply(position, segment.moves)
        position += segment.span
    return PackedExample(segments, attn_order, block_id, positions, task, weight)


def build_pair(left: list[Segment], right: list[Segment], task: str = "", weight: float = 1.0) -> PackedExample:
    """Two sides that never attend to each other: both of order 0, a block each, both from position 0."""
    first, second = build_sequence(left), build_sequence(right)
    block_id = np.repeat(np.asarray([1, 2], np.int32), [len(first), len(second)])
    attn_order = np.concatenate([first.attn_order, second.attn_order])
    positions = np.concatenate([first.positions, second.positions])
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
    """All tokens of one kind in a batch, in whatever rows.

    `index` n: index in the flattened rows; `arrays`: features; `example` n: index of the example in the batch;
    `weight` n: fraction of the example's loss that the token carries (0 if nothing is learned); `learned` m: which of
    the n tokens have a weight, listed here because a GPU would have to wait to count them.
    """

    index: Tensor
    arrays: dict[str, Tensor]
    example: Tensor
    weight: Tensor
    learned: Tensor


def _group_of_arrays(index: np.ndarray, arrays: Arrays, *rest: np.ndarray) -> TokenGroup:
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return TokenGroup(torch.from_numpy(index), tensors, *map(torch.from_numpy, rest))


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
        """The same batch on another device, by one copy, for which a GPU is not waited for."""
        device = torch.device(device)
        if device == self.meta.example_id.device:
            return self
        blob, specs = packed(self._tensors())
        meta, groups = _of_tensors(views(moved(blob, device), specs), self.meta.causal, self._keys())
        return replace(self, meta=meta, groups=groups)

    def _tensors(self) -> list[Tensor]:
        groups = ((x.index, *x.arrays.values(), x.example, x.weight, x.learned) for x in self.groups.values())
        return [*self.meta.parts(), *(tensor for group in groups for tensor in group)]

    def __getstate__(self) -> dict[str, Any]:
        """One array between processes, so that one copy moves it to a GPU; torch would open a file for each tensor."""
        blob, specs = packed(self._tensors())
        rest = {key: value for key, value in vars(self).items() if key not in ("meta", "groups")}
        return {"blob": blob.numpy(), "specs": specs, "causal": self.meta.causal, "keys": self._keys(), "rest": rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = views(torch.from_numpy(state["blob"]), state["specs"])
        vars(self)["meta"], vars(self)["groups"] = _of_tensors(tensors, state["causal"], state["keys"])
        vars(self).update(state["rest"])

    def _keys(self) -> dict[str, list[str]]:
        return {name: list(group.arrays) for name, group in self.groups.items()}


def _of_tensors(
    tensors: Iterable[Tensor], causal: bool, keys: dict[str, list[str]]
) -> tuple[SequenceMeta, dict[str, TokenGroup]]:
    """What `Batch._tensors` listed, together again; `keys` are those of each group's arrays."""
    left = iter(tensors)
    meta = SequenceMeta(*islice(left, 4), causal=causal)
    return meta, {
        name: TokenGroup(next(left), {key: next(left) for key in names}, *islice(left, 3))
        for name, names in keys.items()
    }


TensorSpec = tuple[int, torch.dtype, tuple[int, ...]]  # first byte, type and shape of a tensor in a blob


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[TensorSpec]]:
    """All tensors as one of bytes, and where each is in it; no copy if they are views of one already."""
    specs: list[TensorSpec] = []
    size = 0
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1:
        for tensor in tensors:
            specs.append((int(tensor.storage_offset()) * tensor.element_size(), tensor.dtype, tuple(tensor.shape)))
        return torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage()), specs
    for tensor in tensors:
        specs.append((size, tensor.dtype, tuple(tensor.shape)))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    blob = torch.empty(size, dtype=torch.uint8)
    for view, tensor in zip(views(blob, specs), tensors, strict=True):
        view.copy_(tensor)
    return blob, specs


def views(blob: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """The tensors of a blob, which share its memory."""
    return [
        blob[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape) for start, dtype, shape in specs
    ]


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches are copied to a GPU while it computes."""
    return torch.cuda.Stream(device)


def moved(blob: Tensor, device: torch.device) -> Tensor:
    """A copy on a device; what is enqueued on a GPU from now on waits for it, the host only if it is not pinned."""
    if device.type != "cuda":
        return blob.to(device, non_blocking=True)
    stream, compute = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        copy = blob.to(device, non_blocking=True)
    compute.wait_stream(stream)
    copy.record_stream(compute)
    return copy


def wait_for_copies(device: torch.device) -> None:
    """Return when the batches that were moved to a GPU are there, and what they were copied from may change."""
    if device.type == "cuda":
        copy_stream(device).record_event().synchronize()


def collate(rows: list[list[PackedExample]], length: int, cursor: dict[str, Any] | None = None) -> Batch:
    """Rows of whole examples, padded to `length` tokens, as one batch."""
    example_id = np.full((len(rows), length), PADDING, np.int32)
    attn_order, block_id = np.zeros_like(example_id), np.zeros_like(example_id)
    positions = np.zeros((len(rows), length, 3), np.int32)
    # Of each kind: its segments, with the index of the first token, the example, and the weights of the tokens.
    found: dict[str, list[tuple[Segment, int, int, np.ndarray]]] = {}
    tasks: list[str] = []
    tokens = 0
    for row, sequences in enumerate(rows):
        start = 0
        for index, sequence in enumerate(sequences):
            here = slice(start, start + len(sequence))
            example_id[row, here] = index
            attn_order[row, here], block_id[row, here] = sequence.attn_order, sequence.block_id
            positions[row, here] = sequence.positions
            learned = max(1, sum(int(segment.learn.sum()) for segment in sequence.segments))
            for segment in sequence.segments:
                if len(segment):
                    weight = segment.learn.astype(np.float32) * np.float32(sequence.weight / learned)
                    first = row * length + start
                    found.setdefault(segment.kind, []).append((segment, first, len(tasks), weight))
                start += len(segment)
            tasks.append(sequence.task)
        tokens += start
    meta = SequenceMeta(*map(torch.from_numpy, (example_id, attn_order, block_id, positions)))
    groups = {kind: _gather(segments) for kind, segments in sorted(found.items())}
    return Batch(meta, groups, tokens, tasks, cursor or {})


def _gather(found: list[tuple[Segment, int, int, np.ndarray]]) -> TokenGroup:
    arrays = {name: np.concatenate([segment.arrays[name] for segment, *_ in found]) for name in found[0][0].arrays}
    index = np.concatenate([np.arange(start, start + len(segment)) for segment, start, _, _ in found])
    example = np.repeat([example for _, _, example, _ in found], [len(segment) for segment, *_ in found])
    weight = np.concatenate([weight for *_, weight in found])
    return _group_of_arrays(index, arrays, example, weight, np.flatnonzero(weight))


def count(batch: Batch) -> Counts:
    """What a batch holds."""
    learned = {name: float(len(group.learned)) for name, group in batch.groups.items()}
    return Counts(batch.num_examples, batch.tokens, batch.meta.example_id.numel(), learned)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Whole examples divided into parts of about equal cost, each one row; the first keeps the cursor.

    Examples attend only to themselves, so their row changes nothing but the order of sums. Rows end with less than
    `ROWS` positions of padding, so that their lengths, and with them the shapes of products, occur again.
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
    """The part of each example: the most expensive first, each to the part with the lowest cost so far."""
    load, owner = [0.0] * parts, [0] * len(cost)
    for index in sorted(range(len(cost)), key=lambda index: -cost[index]):
        owner[index] = load.index(min(load))
        load[owner[index]] += cost[index]
    return owner


def _part_of(batch: Batch, tokens: Tensor, whole: Counts) -> Batch:
    """The tokens with the indices `tokens` of the flattened rows as one row, padded to a multiple of `ROWS`."""
    rows = batch.meta
    padding = -len(tokens) % ROWS
    flat = [part.flatten(0, 1)[tokens] for part in rows.parts()]
    # Examples are numbered within their row, so two rows use the same numbers.
    flat[0] = flat[0] * rows.batch + (tokens // rows.length).to(flat[0].dtype)
    meta = SequenceMeta(*(torch.cat([part, part.new_zeros(padding, *part.shape[1:])])[None] for part in flat))
    meta.example_id[:, len(tokens) :] = PADDING
    moved = torch.full((rows.batch * rows.length,), -1)
    moved[tokens] = torch.arange(len(tokens))
    groups = {}
    for name, group in batch.groups.items():
        here = (moved[group.index] >= 0).nonzero()[:, 0]
        if len(here):
            arrays = {key: array[here] for key, array in group.arrays.items()}
            index, weight = moved[group.index[here]], group.weight[here]
            groups[name] = TokenGroup(index, arrays, group.example[here], weight, weight.nonzero()[:, 0])
    return replace(batch, meta=meta, groups=groups, tokens=len(tokens), cursor={}, whole=whole)
