"""Lanes in which a missing wait shows every time: copies that come as late as waits allow, and clocks that tell whether
two lanes' accesses to the same bytes are ordered at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from openm6.parallel.lanes import InlineLane, Lanes
from openm6.parallel.store import WeightStore


class LateLane(InlineLane):
    """Holds its work back until somebody waits for it; one that is not `late` does it at once, as its waits allow."""

    def __init__(self, late: bool) -> None:
        self._late = late
        self._work: deque[Callable[[], Any]] = deque()
        self._done = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._work.append(lambda: target.copy_(source))
        if not self._late:
            self.finish()

    def record(self) -> Callable[[], None]:
        moment = self._done + len(self._work)
        return lambda: self._reach(moment)

    def wait(self, mark: Callable[[], None] | None) -> None:
        if mark is not None:
            self._work.append(mark)

    def finish(self) -> None:
        self._reach(self._done + len(self._work))

    def _reach(self, moment: int) -> None:
        while self._done < moment:
            self._done += 1
            self._work.popleft()()


class HostLane(InlineLane):
    """The processor that computes: what it is given is done, and it stops to wait for others."""

    def record(self) -> Callable[[], None]:
        return lambda: None

    def wait(self, mark: Callable[[], None] | None) -> None:
        if mark is not None:
            mark()


def late_lanes(inward: bool, outward: bool) -> Lanes:
    """Lanes of which the named ones work as late as they may."""
    return Lanes(HostLane(), LateLane(inward), LateLane(outward))


@dataclass(frozen=True)
class Access:
    """Bytes from `start` to `end`, read or written as the `moment`-th work of a lane."""

    lane: str
    moment: int
    start: int
    end: int
    writes: bool

    def clashes(self, other: Access) -> bool:
        """Whether the order of the two matters."""
        meet = self.start < other.end and other.start < self.end
        return meet and self.lane != other.lane and (self.writes or other.writes)


class WatchedLane(InlineLane):
    """Works at once, and keeps a vector clock: how far it knows each lane to have come."""

    def __init__(self, name: str, seen: list[Access], clashes: list[tuple[Access, Access]]) -> None:
        self._name, self._seen, self._clashes = name, seen, clashes
        self._clock: dict[str, int] = {name: 0}

    def copy(self, target: Tensor, source: Tensor) -> None:
        self.touch([source], writes=False)
        self.touch([target], writes=True)
        target.copy_(source)

    def record(self) -> dict[str, int]:
        return dict(self._clock)

    def wait(self, mark: dict[str, int] | None) -> None:
        for lane, moment in (mark or {}).items():
            self._clock[lane] = max(self._clock.get(lane, 0), moment)

    def touch(self, tensors: Iterable[Tensor], writes: bool) -> None:
        """Compare an access with all that came before; one of another lane must be known to be over."""
        self._clock[self._name] += 1
        for tensor in tensors:
            start = tensor.data_ptr()
            end = start + tensor.numel() * tensor.element_size()
            access = Access(self._name, self._clock[self._name], start, end, writes)
            for other in self._seen:
                if access.clashes(other) and self._clock.get(other.lane, 0) < other.moment:
                    self._clashes.append((other, access))
            self._seen.append(access)


class WatchedLanes(Lanes):
    """Three lanes whose accesses without an order are gathered in `clashes`."""

    def __init__(self) -> None:
        seen: list[Access] = []
        clashes: list[tuple[Access, Access]] = []
        super().__init__(*(WatchedLane(name, seen, clashes) for name in ("compute", "inward", "outward")))
        object.__setattr__(self, "clashes", clashes)

    def watch(self, store: WeightStore, readable: Iterable[str]) -> None:
        """Take what lies between a set's opening and its closing for work of the compute lane."""
        opened: dict[int, list[Tensor]] = {}
        open_set, close_set, slots = store.open, store.close, set(readable)

        def open_watched(number: int) -> Any:
            views = open_set(number)
            opened[number] = [tensor for stored in views.values() for tensor in stored.values()]
            weights = [stored[slot] for stored in views.values() for slot in slots & stored.keys()]
            self.compute.touch(weights, writes=False)  # type: ignore[attr-defined]
            return views

        def close_watched(number: int, changed: bool = False) -> None:
            if changed:
                self.compute.touch(opened[number], writes=True)  # type: ignore[attr-defined]
            close_set(number, changed)

        store.open, store.close = open_watched, close_watched  # type: ignore[method-assign]
