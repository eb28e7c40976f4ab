"""Who is next: the client that has had the least so far, as in the virtual token counter (arXiv 2401.00588).

Each client has a counter of the work that was admitted for it. The next request is the oldest of the client with
the lowest counter; a client that comes back after a pause is lifted to the lowest counter of those who wait, so that
nobody saves up credit. Clients who always want more thus differ by one request's work at most.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from openm6.serve.ticket import RefusedError, Ticket

MEMORY = 4096  # counters kept of clients who are not waiting


class FairQueue:
    """Waiting requests of many clients, bounded by the work they ask for; not safe for threads by itself."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.work = 0
        self.waiting: dict[str, deque[Ticket]] = {}
        self.served: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.waiting.values()))

    def push(self, ticket: Ticket, seconds_of_work: float) -> None:
        """Adds a request at the end of its client's line.

        Raises:
            RefusedError: it would have to wait behind more than `bound` tokens of work.
        """
        if self.work and self.work + ticket.prepared.work > self.bound:
            after = max(1, round(seconds_of_work))
            raise RefusedError("too many requests are waiting: try again later", after)
        client = ticket.client
        if client not in self.waiting:
            lowest = min((self.served.get(name, 0) for name in self.waiting), default=0)
            self._charge(client, max(0, lowest - self.served.get(client, 0)))
            self.waiting[client] = deque()
        self.waiting[client].append(ticket)
        self.work += ticket.prepared.work

    def pop(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """Takes the next request that fits what is free: by counters, and within a client by age."""
        for client in sorted(self.waiting, key=lambda name: self.served.get(name, 0)):
            for ticket in self.waiting[client]:
                if fits(ticket):
                    self._take(client, ticket)
                    self._charge(client, ticket.prepared.work)
                    return ticket
        return None

    def drop(self, gone: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out, without charge, all requests that are `gone`."""
        found = [(client, ticket) for client, line in self.waiting.items() for ticket in line if gone(ticket)]
        for client, ticket in found:
            self._take(client, ticket)
        return [ticket for _, ticket in found]

    def _take(self, client: str, ticket: Ticket) -> None:
        line = self.waiting[client]
        line.remove(ticket)
        self.work -= ticket.prepared.work
        if not line:
            del self.waiting[client]

    def _charge(self, client: str, work: int) -> None:
        self.served[client] = self.served.get(client, 0) + work
        self.served.move_to_end(client)
        while len(self.served) > MEMORY:
            self.served.popitem(last=False)
