"""The engine: requests enter from any thread or event loop, and one thread of its own answers them in a fair order.

As in the virtual token counter (arXiv 2401.00588), each client has a counter of the work that was admitted for it.
The next request is the oldest of the client with the lowest counter; a client that comes back after a pause is lifted
to the lowest counter of those that wait, or that of the last request if none waits, so that none saves up credit.
Clients that always want more thus differ by one request's work at most.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch

from openm6.core.errors import first_line
from openm6.core.log import get_log
from openm6.energy.meter import open_meter
from openm6.inference.load import LoadedModel, convert_weights
from openm6.serve.config import EngineConfig
from openm6.serve.requests import (
    Answer,
    DeadlineExceededError,
    EngineUnavailableError,
    PreparedRequest,
    QueueFullError,
    Request,
    prepare,
)
from openm6.serve.worker import LOST, RequestHandle, Worker

MAX_PREPARING = 64  # requests whose images and audio are being decoded or wait to be
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
        self.floor = 0  # the counter of the request that was taken last, before it was charged
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, handles: Sequence[RequestHandle], seconds_of_work: float) -> None:
        """Add requests to the lines of their clients, all or, with QueueFullError, none.

        No more than `bound` tokens of work wait, but for what comes while nothing waits: otherwise it never could.
        """
        if self.work and self.work + sum(handle.prepared.work for handle in handles) > self.bound:
            raise QueueFullError("too many requests are waiting: try again later", max(1, round(seconds_of_work)))
        for handle in handles:
            if handle.client not in self.waiting:
                lowest = min((line.counter for line in self.waiting.values()), default=self.floor)
                self.waiting[handle.client] = _Line(max(lowest, self.counters.pop(handle.client, 0)))
            self.waiting[handle.client].handles[handle] = None
            self.work += handle.prepared.work
            self._size += 1

    def pop(self, fits: Callable[[RequestHandle], bool], kinds: Collection[type] | None = None) -> RequestHandle | None:
        """Remove and return the next request that fits, and is of `kinds`: by counters, within a client by age."""
        # Of equal counters, that of the client that waits longest.
        for line in sorted(self.waiting.values(), key=attrgetter("counter")):
            for handle in line.handles:
                if (kinds is None or type(handle.prepared.request) in kinds) and fits(handle):
                    self.floor = line.counter
                    self._remove(handle, charge=handle.prepared.work)
                    return handle
        return None

    def drop(self, gone: Callable[[RequestHandle], bool]) -> list[RequestHandle]:
        """Remove and return, without charge, all requests that are `gone`."""
        found = [handle for line in self.waiting.values() for handle in line.handles if gone(handle)]
        for handle in found:
            self._remove(handle, charge=0)
        return found

    def _remove(self, handle: RequestHandle, charge: int) -> None:
        """Remove a request and add `charge` to its client's counter."""
        line = self.waiting[handle.client]
        del line.handles[handle]
        line.counter += charge
        self.work -= handle.prepared.work
        self._size -= 1
        if not line.handles:
            del self.waiting[handle.client]
            self.counters[handle.client] = line.counter
            if len(self.counters) > MAX_COUNTERS:
                self.counters.popitem(last=False)


class Engine:
    """Answers requests in a fair order, within its context; at the end of it, what waits fails."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        self.loaded, self.config = loaded, config or EngineConfig()
        device = loaded.omni.device
        precision, invariant = self.config.precision(device), self.config.is_invariant(device)
        if precision != "float32":
            convert_weights(loaded.omni, precision)
        if device.type == "cuda":
            bits = (
                "has the same bits alone and among others" if invariant else "may differ in its last bits among others"
            )
            get_log().info(f"weights in {precision}; a request {bits} (engine.weights, engine.batch_invariant)")
        self.meter = open_meter((device.index,) if device.type == "cuda" else ())
        self.queue = FairQueue(self.config.max_queued_tokens)
        self._changed = threading.Condition()
        self._preparing = threading.Semaphore(MAX_PREPARING)
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._thread = threading.Thread()
        self._running = False
        self.failure: str | None = None  # why the engine ended by itself, if it did
        self.on_failure: Callable[[], None] = lambda: None  # called in the engine's thread
        self._speed = 1000.0  # tokens of work per second, for Retry-After

    def __enter__(self) -> Engine:
        try:
            worker = Worker(self.loaded, self.config, self.meter)
        except BaseException as error:
            self.failure = f"the engine cannot start ({type(error).__name__}: {first_line(error)})"
            raise
        self._thread = threading.Thread(target=self._run, args=(worker,), name="engine", daemon=True)
        self._running = True
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._running = False
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        self.meter.close()

    @property
    def ready(self) -> bool:
        return self._running and self._thread.is_alive()

    @property
    def unavailable(self) -> EngineUnavailableError:
        return EngineUnavailableError(self.failure or "the engine does not run: start the server again")

    async def ask_all(self, requests: Iterable[Request], client: str, seconds: float) -> list[RequestHandle]:
        """Prepare requests of a client in threads and queue all, or none; each must be answered within `seconds`.

        Raise DataError if one is broken or out of bounds, QueueFullError, or EngineUnavailableError if nothing runs.
        """
        return self.submit([await self._read(replace(request, client=client, seconds=seconds)) for request in requests])

    async def _read(self, request: Request) -> PreparedRequest:
        if not self._preparing.acquire(blocking=False):
            raise QueueFullError("too many requests are being read: try again later", 1)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, request)
        finally:
            self._preparing.release()

    def ask_and_wait(self, request: Request) -> Answer:
        """Return the answer, for callers without an event loop; raise as `ask_all` and `RequestHandle.wait`."""
        return self.submit([self._prepare(request)])[0].wait()

    def _prepare(self, request: Request) -> PreparedRequest:
        return prepare(request, self.loaded, self.config.max_model_len)

    def submit(self, prepared: Sequence[PreparedRequest]) -> list[RequestHandle]:
        """Queue all prepared requests, or none; raise as `ask_all`."""
        handles = [RequestHandle(one) for one in prepared]
        with self._changed:
            if not self.ready:
                raise self.unavailable
            self.queue.push(handles, self.queue.work / self._speed)
            self._changed.notify()
        return handles

    def _run(self, worker: Worker) -> None:
        try:
            if (device := self.loaded.omni.device).type == "cuda":
                torch.cuda.set_device(device)  # the current GPU is a property of the thread
            while self._admit(worker):
                worker.tick()
                self._hand_over(worker)
        except BaseException as error:
            get_log().exception("the engine stopped")
            self.failure = f"the engine stopped ({type(error).__name__}: {first_line(error)}): start the server again"
        finally:
            self._running = False
            with self._changed:
                left = self.queue.drop(lambda handle: True)
            reason = LOST if self.failure else "the server is shutting down: ask again later"
            for handle in [*left, *worker.active, *(handle for handle, _ in worker.ended)]:
                handle.fail(EngineUnavailableError(reason))
            if self.failure is not None:
                self.on_failure()

    def _admit(self, worker: Worker) -> bool:
        """Wait until there is work and start what fits; return False when it is time to end."""
        with self._changed:
            if not worker.active and not len(self.queue):
                worker.energy.settle()
                self._changed.wait_for(lambda: not self._running or len(self.queue))
                worker.energy.settle()  # the energy of idle time belongs to no request
            if not self._running:
                return False
            gone = self.queue.drop(lambda handle: handle.cancelled or handle.expired)
        for handle in gone:
            handle.fail(DeadlineExceededError("the deadline passed before the request's turn: ask again later"))
        while True:
            with self._changed:
                found = self.queue.pop(worker.fits, worker.open_kinds)
            if found is None:
                return True
            worker.start(found)

    def _hand_over(self, worker: Worker) -> None:
        """Finish the requests that ended in this tick, with their joules."""
        if worker.ended:
            worker.energy.settle()
        now = time.monotonic()
        for handle, answer in worker.ended:
            worked = max(now - handle.started_at, 1e-3) / max(1, len(worker.active) + len(worker.ended))
            self._speed += 0.1 * (handle.prepared.work / worked - self._speed)
            seconds, source = now - handle.created_at, worker.energy.reading.source
            handle.finish(replace(answer, joules=handle.joules, energy_source=source, seconds=seconds))
        worker.ended.clear()


def cancel_all(handles: Iterable[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()
