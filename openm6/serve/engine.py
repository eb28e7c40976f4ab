"""The door to the model: requests go in from any thread or event loop, one thread of its own answers them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from openm6.base.energy.meter import Meter, open_meter
from openm6.base.log import get_log
from openm6.inference.load import LoadedModel
from openm6.nn.moe import Router
from openm6.serve.config import EngineConfig
from openm6.serve.prepare import Prepared, prepare
from openm6.serve.queue import FairQueue
from openm6.serve.requests import Answer, Request
from openm6.serve.ticket import LateError, RefusedError, StoppedError, Ticket
from openm6.serve.worker import LOST, Worker

PREPARING = 64  # requests whose pictures and sounds are being unpacked or wait to be


class Engine:
    """Answers requests in the order that fairness asks for. Use it as a context, or call `start` and `stop`."""

    def __init__(
        self, loaded: LoadedModel, config: EngineConfig | None = None, meter: Meter | None = None
    ) -> None:
        """Without a meter it opens one of its own."""
        self.config = config or EngineConfig()
        self.loaded = _in_precision(loaded, self.config)
        self.meter = meter or open_meter()
        self._own_meter = meter is None
        self.queue = FairQueue(self.config.waiting)
        self._changed = threading.Condition()
        self._preparing = 0
        self._pool = ThreadPoolExecutor(2, "prepare")
        self._thread = threading.Thread()
        self._alive = False
        self.failure: str | None = None  # why the engine ended by itself, if it did
        self.on_failure: Callable[[], None] = lambda: None  # called in the engine's thread
        self._speed = 1000.0  # tokens of work a second, for Retry-After

    def start(self) -> Engine:
        """Begins to answer."""
        worker = Worker(self.loaded, self.config, self.meter)
        self._thread = threading.Thread(target=self._run, args=(worker,), name="engine", daemon=True)
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
        if self._own_meter:
            self.meter.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._alive and self._thread.is_alive()

    @property
    def stopped(self) -> StoppedError:
        """What to answer when it is not ready."""
        return StoppedError(self.failure or "the engine does not run: start the server again")

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
            self._leave_preparation()
        return self.submit(prepared)

    def ask_and_wait(self, request: Request) -> Answer:
        """The answer to a request, for callers without an event loop; raises as `ask` and `Ticket.wait` do."""
        return self.submit(self._prepare(request)).wait(request.seconds)

    def _enter_preparation(self) -> None:
        with self._changed:  # each event loop that asks has a thread of its own
            if self._preparing >= PREPARING:
                raise RefusedError("too many requests are being read: try again later", 1)
            self._preparing += 1

    def _leave_preparation(self) -> None:
        with self._changed:
            self._preparing -= 1

    def _prepare(self, request: Request) -> Prepared:
        return prepare(request, self.loaded, self.config.room)

    def submit(self, prepared: Prepared) -> Ticket:
        """Queues a prepared request; raises as `ask` does."""
        ticket = Ticket(prepared)
        with self._changed:
            if not self.ready:
                raise self.stopped
            self.queue.push(ticket, self.queue.work / self._speed)
            self._changed.notify()
        return ticket

    def _run(self, worker: Worker) -> None:
        try:
            while self._admit(worker):
                began = time.monotonic()
                worker.tick()
                self._hand_over(worker, time.monotonic() - began)
        except BaseException as error:
            get_log().exception("the engine stopped")
            first_line = (str(error).splitlines() or [""])[0]
            self.failure = (
                f"the engine stopped ({type(error).__name__}: {first_line}): start the server again"
            )
        finally:
            self._close(worker)
            if self.failure is not None:
                self.on_failure()

    def _admit(self, worker: Worker) -> bool:
        """Waits until there is something to do and starts what fits; false when it is time to end."""
        with self._changed:
            if not worker.busy and not len(self.queue):
                worker.energy.settle()
                self._changed.wait_for(lambda: not self._alive or len(self.queue))
                worker.energy.settle()  # what was counted meanwhile is nobody's
            if not self._alive:
                return False
            gone = self.queue.drop(lambda ticket: ticket.cancelled or ticket.late)
        for ticket in gone:
            ticket.fail(LateError("the deadline passed before the request's turn: ask again later"))
        while True:
            with self._changed:
                found = self.queue.pop(worker.fits, worker.open_to)
            if found is None:
                return True
            worker.start(found)

    def _hand_over(self, worker: Worker, seconds: float) -> None:
        """Answers of this tick, with their joules."""
        if not worker.ended:
            return
        worker.energy.settle()
        now = time.monotonic()
        for ticket, answer in worker.ended:
            whole = replace(
                answer, joules=ticket.joules, source=worker.energy.source, seconds=now - ticket.born
            )
            worked = max(now - ticket.started, 1e-3) / max(1, len(worker.live) + len(worker.ended))
            self._speed += 0.1 * (ticket.prepared.work / worked - self._speed)
            ticket.finish(whole)
        worker.ended.clear()

    def _close(self, worker: Worker) -> None:
        self._alive = False
        with self._changed:
            left = self.queue.drop(lambda ticket: True)
        for ticket in [*left, *worker.live, *(ticket for ticket, _ in worker.ended)]:
            if not ticket.over:
                ticket.fail(
                    StoppedError(LOST if self.failure else "the server is going down: ask again later")
                )


def _in_precision(loaded: LoadedModel, config: EngineConfig) -> LoadedModel:
    """The model in the dtype asked for; int8 keeps what is not decoding as it is.

    Routers keep their balance bias in fp32: it is small against the scores, and rounded it would choose otherwise.
    """
    if config.weights == "bfloat16":
        routers = [module for module in loaded.omni.modules() if isinstance(module, Router)]
        biases = [router.bias for router in routers]
        loaded.omni.to(torch.bfloat16)
        for router, bias in zip(routers, biases, strict=True):
            router.bias = bias
    return loaded
