"""Weights of layers on the device or in host memory, and the few device buffers through which the latter pass.

Training and inference use the same store. All tensors that are kept for the matrices of a group of layers (which share
them) lie in one flat record, so that one copy fetches them, and a shorter one the weights alone. Copies run on streams
of the device, which wait for one another by events; a CPU runs everything at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openm6.nn.block import TransformerBlock
from openm6.offload.pinned_memory import PinnedArena
from openm6.optim.rules import WEIGHT, Shape, Slot, Slots, UpdateRule

Event = Any  # None on a CPU, torch.cuda.Event on a GPU


class Stream:
    """Work that is done in the order in which it was enqueued; on a CPU at once, so that an event is always reached."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record_event(self) -> Event:
        """Return the event that is reached when everything enqueued so far is done."""

    def wait_event(self, event: Event) -> None:
        """Make everything enqueued from now on wait for an event of another stream."""

    def record_stream(self, tensor: Tensor) -> None:
        """Keep the tensor's memory from the allocator, once it is freed, until this stream is done with it."""

    def synchronize(self) -> None:
        """Return when everything is done."""


class CudaStream(Stream):
    """A stream of a GPU; None stands for whichever stream is current."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device, self._own = device, stream

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._own if self._own is not None else torch.cuda.current_stream(self._device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record_event(self) -> Event:
        return self._stream.record_event()

    def wait_event(self, event: Event) -> None:
        if event is not None:
            self._stream.wait_event(event)

    def record_stream(self, tensor: Tensor) -> None:
        tensor.record_stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


@dataclass(frozen=True)
class Streams:
    """The three that offloading needs: for the blocks, and for the copies in each direction."""

    compute: Stream
    to_device: Stream
    to_host: Stream


def open_streams(device: torch.device) -> Streams:
    if device.type != "cuda":
        return Streams(Stream(), Stream(), Stream())
    own = (None, torch.cuda.Stream(device), torch.cuda.Stream(device))
    return Streams(*(CudaStream(device, stream) for stream in own))


ALIGNMENT = 256  # of each tensor, for the matrix units
PAGE = 4096  # of each record, for the host


@dataclass(frozen=True)
class WeightsOnly:
    """The weights in one dtype, for inference."""

    dtype: torch.dtype
    read_slots: tuple[str, ...] = (WEIGHT,)

    def slots(self, shape: Shape) -> list[Slot]:
        return [Slot(WEIGHT, shape, self.dtype)]


# Which slots are kept for a parameter: first the `read_slots` of the forward pass, then what only updates need.
StorageFormat = UpdateRule | WeightsOnly


class RecordLayout:
    """Where in a record each slot is: first those that the forward pass reads, then what only updates need.

    `frozen` parameters, which come first, have the former alone; the others are `trained`.
    """

    def __init__(self, shapes: Mapping[str, Shape], storage: StorageFormat, frozen: Collection[str] = ()) -> None:
        self.shapes, self.frozen = dict(shapes), frozenset(frozen)
        self.trained = [name for name in shapes if name not in self.frozen]
        self.entries: list[tuple[str, Slot, int]] = []  # parameter, slot, offset
        read, kept = set(storage.read_slots), [(name, slot) for name in shapes for slot in storage.slots(shapes[name])]
        slots = [(name, slot) for name, slot in kept if name in self.trained or slot.name in read]
        self.frozen_bytes = self.read_bytes = end = 0
        for name, slot in sorted(slots, key=lambda pair: (pair[1].name not in read, pair[0] in self.trained)):
            self.entries.append((name, slot, end))
            end = _rounded(end + slot.num_bytes, ALIGNMENT)
            self.read_bytes = end if slot.name in read else self.read_bytes
            self.frozen_bytes = end if name in self.frozen else self.frozen_bytes
        self.num_bytes = _rounded(end, PAGE)

    @property
    def num_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def views(self, record: Tensor) -> dict[str, Slots]:
        """Return parameter -> its slots, as views of a record's bytes (uint8)."""
        found: dict[str, Slots] = {name: {} for name in self.shapes}
        for parameter, slot, start in self.entries:
            flat = record[start : start + slot.num_bytes]
            found[parameter][slot.name] = flat.view(slot.dtype).view(slot.shape)
        return found


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def matrix_shapes(block: TransformerBlock) -> dict[str, Shape]:
    """Return the shapes of a block's matrices, which are offloaded; its norms and router stay on the device."""
    return {name: tuple(matrix.shape) for name, matrix in block.matrices().items()}


@dataclass(frozen=True)
class Use:
    """A record that will be needed: with the state that its update needs if `whole`, else the weights alone."""

    index: int
    whole: bool


@dataclass(eq=False)
class _Buffer:
    record: Tensor
    index: int | None = None  # of the record that it holds
    whole: bool = False
    open: bool = False
    ready: Event = None  # the record has arrived
    free: Event = None  # the compute stream reads or writes it no more
    left: Event = None  # the last write-back from it is done


class WeightStore:
    """Fetch records in the order of a plan, the next ones while one is in use, and write changed ones back.

    Four things are waited for: a record's arrival before it is used; the end of a buffer's use before it is filled
    again; the end of the write-back that began in a buffer, however often the record was used since, before that
    buffer is filled or changed again; and a record's write-back before it is fetched (or saved) the next time.
    """

    def __init__(
        self, layouts: Sequence[RecordLayout], on_device: Sequence[int], device: torch.device, streams: Streams,
        num_buffers: int, pin: bool, read: Callable[[int, dict[str, Slots]], None] | None = None,
    ) -> None:  # fmt: skip
        """With `read`, which fills the views of a record, records are read for each use and not kept in host memory."""
        self.layouts, self.device, self.streams = list(layouts), device, streams
        self.on_device = frozenset(on_device)
        self.span: Callable[[str], AbstractContextManager[object]] = nullcontext  # replaced to time what it names
        self.moved_bytes = 0  # in both directions
        self._read = read
        offloaded = [index for index in range(len(layouts)) if index not in self.on_device]
        sizes = [layouts[index].num_bytes for index in offloaded]
        self._arena = PinnedArena(sizes if read is None else (), pin and device.type == "cuda")
        hosted = iter(self._arena.buffers)
        self.storage = [
            torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device) if index in self.on_device else next(hosted)
            for index, layout in enumerate(layouts if read is None else ())
        ]
        largest, count = max(sizes, default=0), num_buffers if offloaded else 0
        self._buffers = [_Buffer(torch.empty(largest, dtype=torch.uint8, device=device)) for _ in range(count)]
        self._written: dict[int, Event] = {}
        self._uses: deque[Use] = deque()
        # Their memory may have been another tensor's, still in use on the device.
        for buffer in self._buffers:
            buffer.free = streams.compute.record_event()
            streams.to_device.record_stream(buffer.record)
            streams.to_host.record_stream(buffer.record)

    def stored(self, index: int) -> dict[str, Slots]:
        """Return a record in its storage; call `synchronize` first if it may be on its way."""
        return self.layouts[index].views(self.storage[index])

    def plan(self, uses: Sequence[Use]) -> None:
        """Set the uses to come, in order, in place of those that were planned before."""
        for buffer in self._buffers:
            if buffer.open:  # by a pass that broke off, perhaps in the middle of a change
                buffer.open, buffer.index, buffer.free = False, None, self.streams.compute.record_event()
        self._uses = deque(uses)
        self._fetch_ahead()

    def open(self, index: int) -> dict[str, Slots]:
        """Return the next record of the plan, on the device, where it stays until `close`."""
        if not self._uses or self._uses[0].index != index:
            raise RuntimeError(f"record {index} was not planned to be used now")
        whole = self._uses.popleft().whole
        if index in self.on_device:
            return self.stored(index)
        buffer = self._holding(index)
        assert buffer is not None, "the plan fetches every record before its use"
        with self.span("fetch"):
            self.streams.compute.wait_event(buffer.ready)
        if whole:
            with self.span("write_back"):
                self.streams.compute.wait_event(buffer.left)
        buffer.open = True
        self._fetch_ahead()
        return self.layouts[index].views(buffer.record)

    def close(self, index: int, changed: bool = False) -> None:
        """End the use of a record by the work enqueued so far; write it back if that changed it."""
        buffer = self._holding(index)
        if index in self.on_device or buffer is None:
            return
        buffer.free = self.streams.compute.record_event()
        if changed:
            stream = self.streams.to_host
            stream.wait_event(buffer.free)
            with self.span("write_back"):
                start, end = self.layouts[index].frozen_bytes, self.layouts[index].num_bytes
                stream.copy(self.storage[index][start:end], buffer.record[start:end])
            self._written[index] = buffer.left = stream.record_event()
            self.moved_bytes += end - start
        buffer.open = False
        self._fetch_ahead()

    def synchronize(self) -> None:
        for stream in (self.streams.compute, self.streams.to_device, self.streams.to_host):
            stream.synchronize()

    def invalidate(self) -> None:
        """Drop what the buffers hold, because the storage was changed from outside."""
        self.synchronize()
        for buffer in self._buffers:
            buffer.index = None

    def free(self) -> None:
        self.synchronize()
        self._buffers, self.storage = [], []
        self._arena.close()

    def _fetch_ahead(self) -> None:
        taken = [buffer for buffer in self._buffers if buffer.open]
        for use in self._uses:
            if len(taken) == len(self._buffers):
                return
            if use.index in self.on_device:
                continue
            buffer = self._holding(use.index) or next(one for one in self._buffers if one not in taken)
            if buffer.index != use.index or (use.whole and not buffer.whole):
                self._fetch(buffer, use)
            if buffer not in taken:
                taken.append(buffer)

    def _fetch(self, buffer: _Buffer, use: Use) -> None:
        """Fill a buffer with a record, or with what an update needs besides the weights, if these are there."""
        layout, stream = self.layouts[use.index], self.streams.to_device
        start = layout.read_bytes if buffer.index == use.index else 0
        end = layout.num_bytes if use.whole else layout.read_bytes
        if not start:
            stream.wait_event(buffer.free)
            stream.wait_event(buffer.left)
        stream.wait_event(self._written.get(use.index))
        buffer.index = None  # until it is filled: reading may fail
        with self.span("fetch"):  # on a CPU the copy itself; on a GPU it is only enqueued
            if self._read is not None:
                self._read(use.index, layout.views(buffer.record))
            else:
                stream.copy(buffer.record[start:end], self.storage[use.index][start:end])
        buffer.ready, buffer.index, buffer.whole = stream.record_event(), use.index, use.whole
        self.moved_bytes += end - start

    def _holding(self, index: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.index == index), None)
