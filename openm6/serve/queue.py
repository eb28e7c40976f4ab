"""The fair queue: the client for which the least work was admitted so far is next.

As in the virtual token counter (arXiv 2401.00588), each client has a counter of the work that was admitted for it.
The next request is the oldest of the client with the lowest counter; a client that comes back after a pause is lifted
to the lowest counter of those that wait, so that nobody saves up credit. Clients that always want more thus differ by
one request's work at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from openm6.serve.requests import QueueFullError
from openm6.serve.worker import RequestHandle

MAX_COUNTERS = 4096  # counters kept of clients that do not wait


@dataclass
class _Line:
    """The waiting requests of a client, the oldest first, and the work that was admitted for it."""

    counter: int
    handles: dict[RequestHandle, None] = field(default_factory=dict)


class FairQueue:
    """Waiting requests of many clients, bounded by their work; not safe for threads by itself."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.work = 0
        self.waiting: dict[str, _Line] = {}
        self.counters: OrderedDict[str, int] = OrderedDict()  # of clients that do not wait, the latest last
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, handle: RequestHandle, seconds_of_work: float) -> None:
        """Add a request at the end of its client's line.

        Raises:
            QueueFullError: it would have to wait behind more than `bound` tokens of work.
        """
        if self.work and self.work + handle.prepared.work > self.bound:
            retry_after = max(1, round(seconds_of_work))
            raise QueueFullError("too many requests are waiting: try again later", retry_after)
        if handle.client not in self.waiting:
            lowest = min((line.counter for line in self.waiting.values()), default=0)
            counter = max(lowest, self.counters.pop(handle.client, 0))
            self.waiting[handle.client] = _Line(counter)
        self.waiting[handle.client].handles[handle] = None
        self.work += handle.prepared.work
        self._size += 1

    def pop(
        self, fits: Callable[[RequestHandle], bool], kinds: Collection[type] | None = None
    ) -> RequestHandle | None:
        """Remove and return the next request that fits: by counters, and within a client by age.

        `kinds` are those requests for which there may be a free slot; the others are not examined.
        """
        for line in sorted(self.waiting.values(), key=lambda line: line.counter):
            for handle in line.handles:
                if (kinds is None or type(handle.prepared.request) in kinds) and fits(handle):
                    line.counter += handle.prepared.work
                    self._remove(handle)
                    return handle
        return None

    def drop(self, gone: Callable[[RequestHandle], bool]) -> list[RequestHandle]:
        """Remove and return, without charge, all requests that are `gone`."""
        found = [handle for line in self.waiting.values() for handle in line.handles if gone(handle)]
        for handle in found:
            self._remove(handle)
        return found

    def _remove(self, handle: RequestHandle) -> None:
        line = self.waiting[handle.client]
        del line.handles[handle]
        self.work -= handle.prepared.work
        self._size -= 1
        if not line.handles:
            del self.waiting[handle.client]
            self.counters[handle.client] = line.counter
            if len(self.counters) > MAX_COUNTERS:
                self.counters.popitem(last=False)
