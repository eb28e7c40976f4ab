"""The door to the model: requests go in from any thread or event loop, one thread of its own answers them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from openm6.base.errors import OpenM6Error
from openm6.base.log import get_log
from openm6.generate.load import Loaded
from openm6.serve.alone import value_alone
from openm6.serve.config import EngineConfig
from openm6.serve.prepare import Prepared, prepare
from openm6.serve.queue import FairQueue
from openm6.serve.requests import Answer, Request, Usage
from openm6.serve.ticket import LateError, RefusedError, StoppedError, Ticket

PREPARING = 64  # requests whose pictures and sounds are being unpacked or wait to be


class Engine:
    """Answers requests in the order that fairness asks for. Use it as a context, or call `start` and `stop`."""

    def __init__(self, loaded: Loaded, config: EngineConfig | None = None) -> None:
        self.loaded = loaded
        self.config = config or EngineConfig()
        self.queue = FairQueue(self.config.waiting)
        self._changed = threading.Condition()
        self._preparing = 0
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._alive = False

    def start(self) -> Engine:
        """Begins to answer."""
        self._alive = True
        self._thread.start()
        return self

    def stop(self) -> None:
        """Fails what waits and ends the thread."""
        with self._changed:
            self._alive = False
            self._changed.notify_all()
        self._thread.join()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._alive and self._thread.is_alive()

    async def ask(self, request: Request) -> Ticket:
        """Prepares a request in a thread of its own and queues it.

        Raises:
            DataError: it is broken or out of bounds.
            RefusedError: too much is waiting.
            StoppedError: the engine does not run.
        """
        self._enter_preparation()
        try:
            loop = asyncio.get_running_loop()
            prepared = await loop.run_in_executor(self._pool, self._prepare, request)
        finally:
            self._preparing -= 1
        return self.submit(prepared)

    def ask_and_wait(self, request: Request) -> Answer:
        """The answer to a request, for callers without an event loop; raises as `ask` and `Ticket.wait` do."""
        return self.submit(self._prepare(request)).wait(request.seconds)

    def _enter_preparation(self) -> None:
        if self._preparing >= PREPARING:
            raise RefusedError("too many requests are being read: try again later", 1)
        self._preparing += 1

    def _prepare(self, request: Request) -> Prepared:
        return prepare(request, self.loaded, self.config.room)

    def submit(self, prepared: Prepared) -> Ticket:
        """Queues a prepared request; raises as `ask` does."""
        ticket = Ticket(prepared)
        with self._changed:
            if not self.ready:
                raise StoppedError("the engine does not run: start the server again")
            self.queue.push(ticket, 1.0)
            self._changed.notify()
        return ticket

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._alive and not len(self.queue):
                    self._changed.wait()
                if not self._alive:
                    break
                for gone in self.queue.drop(lambda ticket: ticket.cancelled or ticket.late):
                    gone.fail(LateError("the deadline passed before the request's turn: ask again later"))
                ticket = self.queue.pop(lambda ticket: True)
            if ticket is not None:
                self._answer(ticket)
        for ticket in self.queue.drop(lambda ticket: True):
            ticket.fail(StoppedError("the server is going down: ask again later"))

    def _answer(self, ticket: Ticket) -> None:
        began = time.monotonic()
        try:
            value = value_alone(self.loaded, ticket.prepared)
        except OpenM6Error as error:
            ticket.fail(error)
        except Exception:
            get_log().exception("a request failed")
            ticket.fail(StoppedError("the engine failed on this request: report it with the server's log"))
        else:
            ticket.text = value if isinstance(value, str) else ""
            usage = Usage(ticket.prepared.read, 0, 0)
            waited = began - ticket.born
            ticket.finish(
                Answer(value=value, usage=usage, waited=waited, seconds=time.monotonic() - ticket.born)
            )
