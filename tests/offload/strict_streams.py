"""Streams that reveal a missing wait: copies that come as late as waits allow, and vector clocks that find accesses of
two streams to the same bytes without an order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openm6.offload.weight_store import Stream, Streams, WeightStore


class LateStream(Stream):
    """Holds its work back until somebody waits for it; one that is not `late` does it at once, as its waits allow."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._work: deque[Callable[[], Any]] = deque()
        self._done = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._work.append(lambda: target.copy_(source))
        if not self._late:
            self.synchronize()

    def record_event(self) -> Callable[[], None]:
        moment = self._done + len(self._work)
        return lambda: self._reach(moment)

    def wait_event(self, event: Callable[[], None] | None) -> None:
        if event is not None:
            self._work.append(event)

    def synchronize(self) -> None:
        self._reach(self._done + len(self._work))

    def _reach(self, moment: int) -> None:
        while self._done < moment:
            self._done += 1
            self._work.popleft()()


class HostStream(Stream):
    """The processor that computes: what it is given is done, and it stops to wait for others."""

    def record_event(self) -> Callable[[], None]:
        return lambda: None

    def wait_event(self, event: Callable[[], None] | None) -> None:
        if event is not None:
            event()


def late_streams(to_device: bool, to_host: bool) -> Streams:
    """Streams of which the named ones work as late as they may."""
    return Streams(HostStream(), LateStream(to_device), LateStream(to_host))


@dataclass(frozen=True)
class Access:
    """Bytes from `start` to `end`, read or written as the `moment`-th work of a stream."""

    stream: str
    moment: int
    start: int
    end: int
    writes: bool

    def clashes(self, other: Access) -> bool:
        """Whether the order of the two matters."""
        meet = self.start < other.end and other.start < self.end
        return meet and self.stream != other.stream and (self.writes or other.writes)


class WatchedStream(Stream):
    """Works at once, and keeps a vector clock: how far it knows each stream to have come."""

    def __init__(self, name: str, seen: list[Access], clashes: list[tuple[Access, Access]]) -> None:
        self._name, self._seen, self._clashes = name, seen, clashes
        self._clock: dict[str, int] = {name: 0}

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.touch([source], writes=False)
        self.touch([target], writes=True)
        target.copy_(source)

    def record_event(self) -> dict[str, int]:
        return dict(self._clock)

    def wait_event(self, event: dict[str, int] | None) -> None:
        for stream, moment in (event or {}).items():
            self._clock[stream] = max(self._clock.get(stream, 0), moment)

    def touch(self, tensors: Iterable[Tensor], writes: bool) -> None:
        """Compare an access with all that came before; one of another stream must be known to be over."""
        self._clock[self._name] += 1
        for tensor in tensors:
            start = tensor.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            access = Access(self._name, self._clock[self._name], start, end, writes)
            for other in self._seen:
                if access.clashes(other) and self._clock.get(other.stream, 0) < other.moment:
                    self._clashes.append((other, access))
            self._seen.append(access)


class WatchedStreams(Streams):
    """Three streams whose accesses without an order are gathered in `clashes`."""

    def __init__(self) -> None:
        seen: list[Access] = []
        clashes: list[tuple[Access, Access]] = []
        super().__init__(*(WatchedStream(name, seen, clashes) for name in ("compute", "to_device", "to_host")))
        object.__setattr__(self, "clashes", clashes)

    def watch(self, store: WeightStore, readable: Iterable[str]) -> None:
        """Take what lies between a set's opening and its closing for work of the compute stream."""
        opened: dict[int, list[Tensor]] = {}
        open_set, close_set, slots = store.open, store.close, set(readable)

        def open_watched(index: int) -> Any:
            views = open_set(index)
            opened[index] = [tensor for stored in views.values() for tensor in stored.values()]
            weights = [stored[slot] for stored in views.values() for slot in slots & stored.keys()]
            self.compute.touch(weights, writes=False)  # type: ignore[attr-defined]
            return views

        def close_watched(index: int, changed: bool = False) -> None:
            if changed:
                self.compute.touch(opened[index], writes=True)  # type: ignore[attr-defined]
            close_set(index, changed)

        store.open, store.close = open_watched, close_watched  # type: ignore[method-assign]
