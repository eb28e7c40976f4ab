"""Weight sets at home, on the device or in host memory, and the few device buffers through which the latter pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openm6.optim.rules import Stored
from openm6.parallel.lanes import Lanes, Mark
from openm6.parallel.record import RecordLayout
from openm6.parallel.slab import HostSlab
from openm6.parallel.stopwatch import Stopwatch


@dataclass(frozen=True)
class Use:
    """A set that will be needed: `whole` with what its update needs, else the weights alone."""

    number: int
    whole: bool


class _Buffer:
    """Room on the device for one set."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.record = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.number: int | None = None  # the set that it holds
        self.whole = False
        self.open = False
        self.ready: Mark = None  # the set has arrived
        self.free: Mark = None  # the compute lane reads or writes it no more
        self.left: Mark = None  # what goes home from it has gone; a later use does not make that earlier


class WeightStore:
    """Brings sets in the order of a plan, the next ones while one is in use, and takes changed ones home.

    Four things are waited for: a set's arrival before it is used; the end of a buffer's use before it is filled
    again; the end of the way home that began in a buffer, however often the set was used since, before that buffer is
    filled or changed again; and a set's way home before it is fetched (or saved) the next time.
    """

    def __init__(
        self,
        layouts: Sequence[RecordLayout],
        resident: Sequence[int],
        device: torch.device,
        lanes: Lanes,
        num_buffers: int,
        pin: bool,
    ) -> None:
        self.layouts, self.device, self.lanes = list(layouts), device, lanes
        self.resident = frozenset(resident)
        self.stopwatch = Stopwatch(device)
        self.moved_bytes = 0  # over the link, both ways
        streamed = [number for number in range(len(layouts)) if number not in self.resident]
        self._slab = HostSlab(
            [layouts[number].num_bytes for number in streamed], pin and device.type == "cuda"
        )
        runs = dict(zip(streamed, self._slab.runs, strict=True))
        self.homes: list[Tensor] = [
            runs[number] if number in runs else _on_device(layout, device)
            for number, layout in enumerate(layouts)
        ]
        largest = max((layouts[number].num_bytes for number in streamed), default=0)
        self._buffers = [_Buffer(largest, device) for _ in range(num_buffers)] if streamed else []
        self._written: dict[int, Mark] = {}
        self._uses: deque[Use] = deque()
        # Their memory may have been another tensor's, still at work on the device.
        for buffer in self._buffers:
            buffer.free = lanes.compute.record()
            lanes.inward.hold(buffer.record)
            lanes.outward.hold(buffer.record)

    def home(self, number: int) -> dict[str, Stored]:
        """A set where it lives; call `settle` first where it may be on its way."""
        return self.layouts[number].views(self.homes[number])

    def plan(self, uses: Sequence[Use]) -> None:
        """The uses to come, in order; whatever was planned before is forgotten."""
        for buffer in self._buffers:
            if buffer.open:  # by a pass that broke off, perhaps in the middle of a change
                buffer.open, buffer.number, buffer.free = False, None, self.lanes.compute.record()
        self._uses = deque(uses)
        self._fetch_ahead()

    def open(self, number: int) -> dict[str, Stored]:
        """The next set of the plan, on the device; it stays there until `close`."""
        if not self._uses or self._uses[0].number != number:
            raise RuntimeError(f"weight set {number} was not planned to be used now")
        whole = self._uses.popleft().whole
        if number in self.resident:
            return self.home(number)
        buffer = self._holding(number)
        assert buffer is not None, "the plan fetches every set before its use"
        with self.stopwatch.span("fetch"):
            self.lanes.compute.wait(buffer.ready)
        if whole:
            with self.stopwatch.span("write_back"):
                self.lanes.compute.wait(buffer.left)
        buffer.open = True
        self._fetch_ahead()
        return self.layouts[number].views(buffer.record)

    def close(self, number: int, changed: bool = False) -> None:
        """The work given so far is the last on this set for now; if it changed the set, it goes home."""
        buffer = self._holding(number)
        if number in self.resident or buffer is None:
            return
        buffer.free = self.lanes.compute.record()
        if changed:
            self._take_home(number, buffer)
        buffer.open = False
        self._fetch_ahead()

    def settle(self) -> None:
        """Returns when every set is at home."""
        for lane in (self.lanes.compute, self.lanes.inward, self.lanes.outward):
            lane.finish()

    def forget(self) -> None:
        """Sets at home were changed from outside: what the buffers hold is out of date."""
        self.settle()
        for buffer in self._buffers:
            buffer.number = None

    def dispose(self) -> None:
        """Gives the host memory back."""
        self.settle()
        self._buffers, self.homes = [], []
        self._slab.close()

    def _fetch_ahead(self) -> None:
        """Fill free buffers with the sets that come next."""
        taken = [buffer for buffer in self._buffers if buffer.open]
        for use in self._uses:
            if len(taken) == len(self._buffers):
                return
            if use.number in self.resident:
                continue
            buffer = self._holding(use.number)
            if buffer is None:
                buffer = next(one for one in self._buffers if one not in taken)
                self._fetch(buffer, use)
            elif use.whole and not buffer.whole:
                self._complete(buffer, use.number)
            if buffer not in taken:
                taken.append(buffer)

    def _fetch(self, buffer: _Buffer, use: Use) -> None:
        layout, lane = self.layouts[use.number], self.lanes.inward
        end = layout.num_bytes if use.whole else layout.read_bytes
        lane.wait(buffer.free)
        lane.wait(buffer.left)
        lane.wait(self._written.get(use.number))
        with self.stopwatch.span("fetch"):  # on a processor the copy itself; on a GPU it only joins a queue
            lane.copy(buffer.record[:end], self.homes[use.number][:end])
        buffer.ready, buffer.number, buffer.whole = lane.record(), use.number, use.whole
        self.moved_bytes += end

    def _complete(self, buffer: _Buffer, number: int) -> None:
        """Bring what an update needs besides the weights, which are there."""
        layout, lane = self.layouts[number], self.lanes.inward
        start, end = layout.read_bytes, layout.num_bytes
        lane.wait(self._written.get(number))
        lane.copy(buffer.record[start:end], self.homes[number][start:end])
        buffer.ready, buffer.whole = lane.record(), True
        self.moved_bytes += end - start

    def _take_home(self, number: int, buffer: _Buffer) -> None:
        end, lane = self.layouts[number].num_bytes, self.lanes.outward
        lane.wait(buffer.free)
        with self.stopwatch.span("write_back"):
            lane.copy(self.homes[number][:end], buffer.record[:end])
        self._written[number] = buffer.left = lane.record()
        self.moved_bytes += end

    def _holding(self, number: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.number == number), None)


def _on_device(layout: RecordLayout, device: torch.device) -> Tensor:
    return torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
