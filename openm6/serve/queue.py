"""Who is next: the client that has had the least so far, as in the virtual token counter (arXiv 2401.00588).

Each client has a counter of the work that was admitted for it. The next request is the oldest of the client with
the lowest counter; a client that comes back after a pause is lifted to the lowest counter of those who wait, so that
nobody saves up credit. Clients who always want more thus differ by one request's work at most.

Requests of different kinds need different places, so each client has a line per kind, and each kind a heap of its
clients by counter: a kind for which there is no place costs nothing, however many wait.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection
from itertools import count
from operator import itemgetter

from openm6.serve.ticket import RefusedError, Ticket

MEMORY = 4096  # counters kept of clients who are not waiting
STALE = 64  # entries of a heap that may be out of date before it is built again

_Entry = tuple[int, int, str]  # counter, turn, client


class FairQueue:
    """Waiting requests of many clients, bounded by the work they ask for; not safe for threads by itself."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.work = 0
        self.waiting: dict[str, tuple[int, int]] = {}  # counter and turn of each client that waits
        self.served: OrderedDict[str, int] = OrderedDict()
        self._lines: defaultdict[type, dict[str, deque[tuple[int, Ticket]]]] = defaultdict(dict)
        self._heaps: defaultdict[type, list[_Entry]] = defaultdict(list)
        self._numbers = count()  # of requests by age, and of clients by the time at which they came
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, ticket: Ticket, seconds_of_work: float) -> None:
        """Adds a request at the end of its client's line.

        Raises:
            RefusedError: it would have to wait behind more than `bound` tokens of work.
        """
        if self.work and self.work + ticket.prepared.work > self.bound:
            after = max(1, round(seconds_of_work))
            raise RefusedError("too many requests are waiting: try again later", after)
        client, kind = ticket.client, type(ticket.prepared.request)
        if client not in self.waiting:
            lowest = min((counter for counter, _ in self.waiting.values()), default=0)
            counter = max(lowest, self.served.get(client, 0))
            self.waiting[client] = (counter, next(self._numbers))
            self._remember(client, counter)
        line = self._lines[kind].setdefault(client, deque())
        line.append((next(self._numbers), ticket))
        if len(line) == 1:
            self._enter(kind, client)
        self.work += ticket.prepared.work
        self._size += 1

    def pop(self, fits: Callable[[Ticket], bool], kinds: Collection[type] | None = None) -> Ticket | None:
        """Takes the next request that fits what is free: by counters, and within a client by age.

        `kinds` are those requests for which there may be a place; the others are not looked at.
        """
        open_kinds = [kind for kind in self._lines if kinds is None or kind in kinds]
        in_vain: list[str] = []
        found = None
        while found is None and (client := self._lowest(open_kinds)) is not None:
            found = self._first(client, open_kinds, fits)
            if found is None:
                in_vain.append(client)
                self._leave(client, open_kinds)
        for client in in_vain:
            self._enter_all(client, open_kinds)
        return found

    def drop(self, gone: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out, without charge, all requests that are `gone`."""
        found = [
            (kind, client, numbered)
            for kind, lines in self._lines.items()
            for client, line in lines.items()
            for numbered in line
            if gone(numbered[1])
        ]
        for kind, client, numbered in found:
            self._take(kind, client, numbered)
        return [ticket for _, _, (_, ticket) in found]

    def _lowest(self, kinds: list[type]) -> str | None:
        """The client with the lowest counter of those who wait for one of the kinds."""
        tops = []
        for kind in kinds:
            heap = self._heaps[kind]
            while heap and not self._is_current(kind, heap[0]):
                heapq.heappop(heap)
            tops += heap[:1]
        return min(tops)[2] if tops else None

    def _first(self, client: str, kinds: list[type], fits: Callable[[Ticket], bool]) -> Ticket | None:
        """Takes a client's oldest request that fits, and charges it."""
        ages = heapq.merge(*(self._lines[kind].get(client, ()) for kind in kinds), key=itemgetter(0))
        for number, ticket in ages:
            if fits(ticket):
                counter = self.waiting[client][0] + ticket.prepared.work
                self._take(type(ticket.prepared.request), client, (number, ticket))
                self._remember(client, counter)
                if client in self.waiting:
                    self.waiting[client] = (counter, self.waiting[client][1])
                    self._enter_all(client, list(self._lines))
                return ticket
        return None

    def _is_current(self, kind: type, entry: _Entry) -> bool:
        *place, client = entry
        return client in self._lines[kind] and self.waiting[client] == tuple(place)

    def _leave(self, client: str, kinds: list[type]) -> None:
        """Takes a client from the top of the heaps; it is entered again later."""
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
        if len(heap) > 2 * len(self._lines[kind]) + STALE:
            heap[:] = [(*self.waiting[name], name) for name in self._lines[kind]]
            heapq.heapify(heap)

    def _take(self, kind: type, client: str, numbered: tuple[int, Ticket]) -> None:
        lines = self._lines[kind]
        lines[client].remove(numbered)
        self.work -= numbered[1].prepared.work
        self._size -= 1
        if not lines[client]:
            del lines[client]
            if not any(client in others for others in self._lines.values()):
                del self.waiting[client]

    def _remember(self, client: str, counter: int) -> None:
        self.served[client] = counter
        self.served.move_to_end(client)
        while len(self.served) > MEMORY:
            self.served.popitem(last=False)
