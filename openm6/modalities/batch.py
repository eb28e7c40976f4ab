"""Segments of tokens as one example, examples packed into rows, and a batch split by examples."""

# Letters: R rows, S tokens per row, n tokens of one kind in the batch

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from openm6.modalities.image_stem import OF_SIZE, by_size
from openm6.modalities.interface import Arrays, Segment
from openm6.modalities.text import fit
from openm6.ops.matmul import ROWS
from openm6.ops.sequence import PADDING, SequenceMeta
from openm6.optim.sharding import assign_owners

MIN_TEXT_TOKENS = 16  # tokens of a text that are left if it is cut to fit a row; less would hardly be an example
ALIGNMENT = 64  # bytes from one tensor of a batch to the next, for wide loads
HEAD_COST = 0.5  # cost of one learned token's head, in units of a token's cost in the backbone
# Of a segment: the order of its first token, 1 if orders count up, its block or 0, and its position.
SegmentRule = tuple[int, int, int, int]
TensorSpec = tuple[int, torch.dtype, tuple[int, ...]]  # first byte, type and shape of a tensor in a blob


@dataclass(frozen=True)
class PackedExample:
    """One example as `length` tokens: its segments in order, and the sequence rule of each one."""

    segments: list[Segment]
    rules: list[SegmentRule]
    length: int
    task: str = ""
    weight: float = 1.0
    left: int = 0  # segments of the first side of a pair; 0: not a pair

    def __len__(self) -> int:
        return self.length

    @property
    def truncated(self) -> bool:
        return any(segment.truncated for segment in self.segments)


def _token_rules(segments: list[Segment], rules: list[SegmentRule]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Order, block and position of each token of the segments.  # N, N, N 3"""
    lengths = np.asarray([len(segment.grid) for segment in segments], np.int64)
    order, step, block, position = np.asarray(rules, np.int32).reshape(-1, 4).T
    moves = np.asarray([segment.moves for segment in segments], np.int32).reshape(-1, 3) * position[:, None]
    # Of each token within its segment.
    index = np.arange(lengths.sum(), dtype=np.int32) - np.repeat((lengths.cumsum() - lengths).astype(np.int32), lengths)
    attn_order = np.repeat(order, lengths) + np.repeat(step, lengths) * index
    grids = np.concatenate([np.empty((0, 3), np.int32), *(segment.grid for segment in segments)])
    return attn_order, np.repeat(block, lengths), (grids + np.repeat(moves, lengths, 0)).astype(np.int32, copy=False)


def build_sequence(segments: list[Segment], task: str = "", weight: float = 1.0, position: int = 0) -> PackedExample:
    """Sources (order 0, or one order per part) and targets: causal ones count up, blocks and asides are hidden.

    What follows a hidden target has a later order than all of its tokens, so that these do not attend to it.
    `position` is that of the first token, for segments that continue others.
    """
    rules: list[SegmentRule] = []
    length = order = blocks = 0
    for segment in segments:
        size, placement = len(segment.grid), segment.placement
        hidden = placement in ("block", "aside")
        blocks += hidden
        if placement in ("causal", "aside"):
            rules.append((order + 1, 1, blocks if hidden else 0, position))
            order += size
        else:
            order += placement != "source"
            rules.append((order, 0, blocks if hidden else 0, position))
        position += segment.span
        length += size
    return PackedExample(segments, rules, length, task, weight)


def build_pair(left: list[Segment], right: list[Segment], task: str = "", weight: float = 1.0) -> PackedExample:
    """Two sides that never attend to each other: both of order 0, a block each, both from position 0."""
    first, second = build_sequence(left), build_sequence(right)
    rules = [(order, step, side, at) for side, one in ((1, first), (2, second)) for order, step, _, at in one.rules]
    return PackedExample([*left, *right], rules, len(first) + len(second), task, weight, len(left))


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

    `index` n: index in the flattened rows; `arrays`: features, and of images that are convolved the tables of
    `by_size`; `example` n: index of the example; `weight` n: fraction of the example's loss that the token carries;
    `learned` m: those of the n tokens with a weight, listed here because a GPU would have to wait to count them.
    """

    index: Tensor
    arrays: dict[str, Tensor]
    example: Tensor
    weight: Tensor
    learned: Tensor


def _group_of_arrays(index: np.ndarray, arrays: Arrays, example: np.ndarray, weight: np.ndarray) -> TokenGroup:
    tables = by_size(arrays["shapes"]) if "shapes" in arrays else {}
    tensors = {name: torch.from_numpy(array) for name, array in (arrays | tables).items()}
    rest = map(torch.from_numpy, (example, weight, np.flatnonzero(weight)))
    return TokenGroup(torch.from_numpy(index), tensors, *rest)


def _meta_of(rows: int, length: int, index: np.ndarray, parts: Iterable[np.ndarray]) -> SequenceMeta:
    """The sequence rule of rows: its parts for the tokens at `index` of the flattened rows, and padding elsewhere."""
    found = []
    for part, fill in zip(parts, (PADDING, 0, 0, 0), strict=True):
        padded = np.full((rows * length, *part.shape[1:]), fill, np.int32)
        padded[index] = part
        found.append(torch.from_numpy(padded.reshape(rows, length, *part.shape[1:])))
    return SequenceMeta(*found)


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

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device, by one copy, for which a GPU is not waited for."""
        device = torch.device(device)
        if device == self.meta.example_id.device:
            return self
        blob, specs = packed(self._tensors())
        meta, groups = _of_tensors(views(moved(blob, device), specs), self._keys())
        return replace(self, meta=meta, groups=groups)

    def _tensors(self) -> list[Tensor]:
        groups = ((x.index, *x.arrays.values(), x.example, x.weight, x.learned) for x in self.groups.values())
        return [*self.meta.parts(), *(tensor for group in groups for tensor in group)]

    def __getstate__(self) -> dict[str, Any]:
        """One array between processes, so that one copy moves it to a GPU; torch would open a file for each tensor."""
        blob, specs = packed(self._tensors())
        rest = {key: value for key, value in vars(self).items() if key not in ("meta", "groups")}
        return {"blob": blob.numpy(), "specs": specs, "keys": self._keys(), "rest": rest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = views(torch.from_numpy(state["blob"]), state["specs"])
        vars(self)["meta"], vars(self)["groups"] = _of_tensors(tensors, state["keys"])
        vars(self).update(state["rest"])

    def _keys(self) -> dict[str, list[str]]:
        return {name: list(group.arrays) for name, group in self.groups.items()}


def _of_tensors(tensors: Iterable[Tensor], keys: dict[str, list[str]]) -> tuple[SequenceMeta, dict[str, TokenGroup]]:
    """What `Batch._tensors` listed, together again; `keys` are those of each group's arrays."""
    left = iter(tensors)
    meta = SequenceMeta(*islice(left, 4))
    return meta, {
        name: TokenGroup(next(left), {key: next(left) for key in names}, *islice(left, 3))
        for name, names in keys.items()
    }


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[TensorSpec]]:
    """All tensors as one of bytes, and where each is in it; no copy if they are views of one already."""
    specs: list[TensorSpec] = []
    size = 0
    if len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1:
        for tensor in tensors:
            specs.append((int(tensor.storage_offset()) * tensor.element_size(), tensor.dtype, tuple(tensor.shape)))
        storage = tensors[0].untyped_storage()
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), specs
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
        return blob.to(device)
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
    examples = [example for row in rows for example in row]
    segments = [segment for example in examples for segment in example.segments]
    sizes = [example.length for example in examples]
    # Of each token: its example, and its index in the flattened rows.
    example = np.repeat(np.arange(len(examples)), sizes)
    used = [sum(example.length for example in row) for row in rows]
    index = np.arange(len(example)) + np.repeat(np.arange(len(rows)) * length - np.cumsum(used) + used, used)
    in_row = np.asarray([number for row in rows for number in range(len(row))], np.int32)
    rules = _token_rules(segments, [rule for example in examples for rule in example.rules])
    meta = _meta_of(len(rows), length, index, (in_row[example], *rules))
    learn = np.concatenate([np.zeros(0, bool), *(segment.learn for segment in segments)])
    learned = np.bincount(example, learn, minlength=len(examples)).tolist()
    weights = [example.weight / max(1.0, count) for example, count in zip(examples, learned, strict=True)]
    weight = learn * np.asarray(weights, np.float32)[example]
    present = [segment for segment in segments if len(segment.grid)]
    kind_of = np.repeat([segment.kind for segment in present], [len(segment.grid) for segment in present])
    groups = {}
    for kind in sorted({segment.kind for segment in present}):
        found, here = [segment for segment in present if segment.kind == kind], np.flatnonzero(kind_of == kind)
        arrays = {name: np.concatenate([segment.arrays[name] for segment in found]) for name in found[0].arrays}
        groups[kind] = _group_of_arrays(index[here], arrays, example[here], weight[here])
    tasks = [example.task for example in examples]
    return Batch(meta, groups, len(example), tasks, cursor or {})


def count(batch: Batch) -> Counts:
    learned = {name: float(len(group.learned)) for name, group in batch.groups.items()}
    return Counts(batch.num_examples, batch.tokens, batch.meta.example_id.numel(), learned)


def split(batch: Batch, parts: int) -> list[Batch]:
    """Whole examples divided into parts of about equal cost, each one row; the first keeps the cursor.

    Examples attend only to themselves, so their row changes nothing but the order of sums. Rows end with less than
    `ROWS` positions of padding, so that their lengths, and with them the shapes of products, occur again.
    """
    example_of = np.full(batch.meta.example_id.numel(), -1)  # R*S -> example
    cost = np.zeros(batch.num_examples)
    for group in batch.groups.values():
        example = group.example.numpy()
        example_of[group.index.numpy()] = example
        cost += np.bincount(example, 1 + HEAD_COST * (group.weight.numpy() > 0), minlength=len(cost))
    owner = np.asarray([*assign_owners(cost.tolist(), parts), -1])[example_of]  # R*S -> part; padding has none
    held = count(batch)
    divided = [_part_of(batch, np.flatnonzero(owner == part), held) for part in range(parts)]
    return [replace(divided[0], cursor=batch.cursor), *divided[1:]]


def _part_of(batch: Batch, tokens: np.ndarray, whole: Counts) -> Batch:
    """The tokens with the indices `tokens` of the flattened rows as one row, padded to a multiple of `ROWS`."""
    rows, count = batch.meta, len(tokens)
    flat = [part.flatten(0, 1).numpy()[tokens] for part in rows.parts()]
    # Examples are numbered within their row, so two rows use the same numbers.
    flat[0] = flat[0] * rows.batch + (tokens // rows.length).astype(flat[0].dtype)
    # A part without an example, of a batch of few long ones, is padding alone.
    length = max(ROWS, count + -count % ROWS)
    moved = np.full(rows.batch * rows.length, -1)
    moved[tokens] = np.arange(count)
    groups = {}
    for name, group in batch.groups.items():
        index = moved[group.index.numpy()]
        here = np.flatnonzero(index >= 0)
        if len(here):
            kept = (key for key in group.arrays if not key.startswith(OF_SIZE))
            arrays = {key: group.arrays[key].numpy()[here] for key in kept}
            example, weight = group.example.numpy()[here], group.weight.numpy()[here]
            groups[name] = _group_of_arrays(index[here], arrays, example, weight)
    meta = _meta_of(1, length, np.arange(count), flat)
    return replace(batch, meta=meta, groups=groups, tokens=count, cursor={}, whole=whole)
