"""The handle of a request on its way, and the fair queue: the client that has had the least so far is next.

As in the virtual token counter (arXiv 2401.00588), each client has a counter of the work that was admitted for it.
The next request is the oldest of the client with the lowest counter; a client that comes back after a pause is lifted
to the lowest counter of those who wait, so that nobody saves up credit. Clients who always want more thus differ by
one request's work at most.

Requests of different kinds need different slots, so each client has a line per kind, and each kind a heap of its
clients by counter: a kind without a free slot costs nothing, however many wait.
"""

from __future__ import annotations

import asyncio
import heapq
import threading
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter

from openm6.core.errors import OpenM6Error
from openm6.serve.requests import Answer, PreparedRequest, ScoredToken

MAX_COUNTERS = 4096  # counters kept of clients who are not waiting
MAX_STALE = 64  # entries of a heap that may be out of date before it is built again

_Entry = tuple[int, int, str]  # counter, turn, client


class QueueFullError(OpenM6Error):
    """Too much is waiting; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceededError(OpenM6Error):
    """The deadline passed before the answer was there, or the request was cancelled."""


class EngineUnavailableError(OpenM6Error):
    """The server is shutting down, or its engine failed."""


@dataclass
class _Reader:
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event


@dataclass(eq=False)
class RequestHandle:
    """One request on its way: wait for the answer, read it as it grows, or cancel.

    The engine's thread writes, any number of readers wait; nobody blocks the engine.
    """

    prepared: PreparedRequest
    created_at: float = field(default_factory=time.monotonic)
    text: str = ""  # of a text, what may be shown so far
    tokens: list[ScoredToken] = field(default_factory=list)
    cancelled: bool = False
    cached: int = 0  # prompt tokens found in the prefix cache
    started_at: float = 0.0
    first_token_seconds: float = 0.0
    joules: float = 0.0
    _answer: Answer | None = None
    _error: OpenM6Error | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    _readers: list[_Reader] = field(default_factory=list)

    @property
    def client(self) -> str:
        return self.prepared.request.client

    @property
    def expired(self) -> bool:
        """Whether its deadline has passed."""
        seconds = self.prepared.request.seconds
        return seconds is not None and time.monotonic() - self.created_at > seconds

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._done.is_set()

    @property
    def has_readers(self) -> bool:
        """Whether somebody waits for it in an event loop."""
        return bool(self._readers)

    def cancel(self) -> None:
        """Give the request up; the engine drops it at its next tick."""
        self.cancelled = True

    def finish(self, answer: Answer) -> None:
        """Set the answer; called by the engine alone."""
        self._answer = answer
        self._done.set()
        self.notify()

    def fail(self, error: OpenM6Error) -> None:
        """Set the reason why there is no answer; called by the engine alone."""
        self._error = error
        self._done.set()
        self.notify()

    def notify(self) -> None:
        """Wake the readers; those whose event loop is closed are skipped."""
        for reader in list(self._readers):
            # The loop may close at any moment, so only the call itself can tell.
            with suppress(RuntimeError):
                reader.loop.call_soon_threadsafe(reader.changed.set)

    def wait(self, seconds: float | None = None) -> Answer:
        """Block until the answer is there; not for use in an event loop.

        Raises:
            DeadlineExceededError: it took longer than `seconds`.
            OpenM6Error: there will be none.
        """
        if not self._done.wait(seconds):
            self.cancel()
            raise DeadlineExceededError(f"no answer within {seconds:g} seconds: ask for less, or again later")
        return self.result()

    def result(self) -> Answer:
        """Return the answer of a request that is done, or raise its error."""
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    async def answer(self) -> Answer:
        """Wait for the answer; whoever stops waiting cancels the request.

        Raises:
            OpenM6Error: there will be none.
        """
        async for _ in self.stream():
            pass
        return self.result()

    async def stream(self) -> AsyncIterator[str]:
        """Yield the text so far, each time there is more of it, until the request is done, with or without success."""
        reader = _Reader(asyncio.get_running_loop(), asyncio.Event())
        self._readers.append(reader)
        shown = ""
        try:
            while True:
                done = self.done  # read before the text: what is written last must not be missed
                if len(self.text) > len(shown):
                    shown = self.text
                    yield shown
                if done:
                    return
                await reader.changed.wait()
                reader.changed.clear()
        finally:
            self._readers.remove(reader)
            if not self.done:
                self.cancel()


class FairQueue:
    """Waiting requests of many clients, bounded by their work; not safe for threads by itself."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.work = 0
        self.waiting: dict[str, tuple[int, int]] = {}  # counter and turn of each client that waits
        self.served: OrderedDict[str, int] = OrderedDict()
        self._lines: defaultdict[type, dict[str, deque[tuple[int, RequestHandle]]]] = defaultdict(dict)
        self._heaps: defaultdict[type, list[_Entry]] = defaultdict(list)
        self._ages = count()  # of requests, and of clients by the time at which they came
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, handle: RequestHandle, seconds_of_work: float) -> None:
        """Add a request at the end of its client's line.

        Raises:
            QueueFullError: it would have to wait behind more than `bound` tokens of work.
        """
        if self.work and self.work + handle.prepared.work > self.bound:
            raise QueueFullError(
                "too many requests are waiting: try again later", max(1, round(seconds_of_work))
            )
        client, kind = handle.client, type(handle.prepared.request)
        if client not in self.waiting:
            lowest = min((counter for counter, _ in self.waiting.values()), default=0)
            counter = max(lowest, self.served.get(client, 0))
            self.waiting[client] = (counter, next(self._ages))
            self._remember(client, counter)
        line = self._lines[kind].setdefault(client, deque())
        line.append((next(self._ages), handle))
        if len(line) == 1:
            self._enter(kind, client)
        self.work += handle.prepared.work
        self._size += 1

    def pop(
        self, fits: Callable[[RequestHandle], bool], kinds: Collection[type] | None = None
    ) -> RequestHandle | None:
        """Remove and return the next request that fits: by counters, and within a client by age.

        `kinds` are those requests for which there may be a free slot; the others are not examined.
        """
        open_kinds = [kind for kind in self._lines if kinds is None or kind in kinds]
        skipped: list[str] = []
        found = None
        while found is None and (client := self._lowest(open_kinds)) is not None:
            found = self._first(client, open_kinds, fits)
            if found is None:
                skipped.append(client)
                self._leave(client, open_kinds)
        for client in skipped:
            self._enter_all(client, open_kinds)
        return found

    def drop(self, gone: Callable[[RequestHandle], bool]) -> list[RequestHandle]:
        """Remove and return, without charge, all requests that are `gone`."""
        found = [
            (kind, client, entry)
            for kind, lines in self._lines.items()
            for client, line in lines.items()
            for entry in line
            if gone(entry[1])
        ]
        for kind, client, entry in found:
            self._remove(kind, client, entry)
        return [handle for _, _, (_, handle) in found]

    def _lowest(self, kinds: list[type]) -> str | None:
        """The client with the lowest counter of those who wait for one of the kinds."""
        tops = []
        for kind in kinds:
            heap = self._heaps[kind]
            while heap and not self._is_current(kind, heap[0]):
                heapq.heappop(heap)
            tops += heap[:1]
        return min(tops)[2] if tops else None

    def _first(
        self, client: str, kinds: list[type], fits: Callable[[RequestHandle], bool]
    ) -> RequestHandle | None:
        """Remove a client's oldest request that fits, and charge it."""
        by_age = heapq.merge(*(self._lines[kind].get(client, ()) for kind in kinds), key=itemgetter(0))
        for age, handle in by_age:
            if fits(handle):
                counter = self.waiting[client][0] + handle.prepared.work
                self._remove(type(handle.prepared.request), client, (age, handle))
                self._remember(client, counter)
                if client in self.waiting:
                    self.waiting[client] = (counter, self.waiting[client][1])
                    self._enter_all(client, list(self._lines))
                return handle
        return None

    def _is_current(self, kind: type, entry: _Entry) -> bool:
        *rank, client = entry
        return client in self._lines[kind] and self.waiting[client] == tuple(rank)

    def _leave(self, client: str, kinds: list[type]) -> None:
        """Remove a client from the top of the heaps; it is entered again later."""
        entry = (*self.waiting[client], client)
        for kind in kinds:
            heap = self._heaps[kind]
            while heap and heap[0] == entry:
                heapq.heappop(heap)

    def _enter_all(self, client: str, kinds: list[type]) -> None:
        for kind in kinds:
            if client in self._lines[kind]:
                self._enter(kind, client)

    def _enter(self, kind: type, client: str) -> None:
        heap = self._heaps[kind]
        heapq.heappush(heap, (*self.waiting[client], client))
        if len(heap) > 2 * len(self._lines[kind]) + MAX_STALE:
            heap[:] = [(*self.waiting[name], name) for name in self._lines[kind]]
            heapq.heapify(heap)

    def _remove(self, kind: type, client: str, entry: tuple[int, RequestHandle]) -> None:
        lines = self._lines[kind]
        lines[client].remove(entry)
        self.work -= entry[1].prepared.work
        self._size -= 1
        if not lines[client]:
            del lines[client]
            if not any(client in others for others in self._lines.values()):
                del self.waiting[client]

    def _remember(self, client: str, counter: int) -> None:
        self.served[client] = counter
        self.served.move_to_end(client)
        while len(self.served) > MAX_COUNTERS:
            self.served.popitem(last=False)
