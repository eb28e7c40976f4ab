"""What a caller holds while the engine works: wait for the whole, read it as it grows, or give it up."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field

from openm6.base.errors import OpenM6Error
from openm6.serve.prepare import Prepared
from openm6.serve.requests import Answer, Scored


class RefusedError(OpenM6Error):
    """Too much is waiting already; `after` is the number of seconds in which to try again."""

    def __init__(self, message: str, after: int) -> None:
        super().__init__(message)
        self.after = after


class LateError(OpenM6Error):
    """The deadline passed before the answer was there."""


class StoppedError(OpenM6Error):
    """The server is going down, or its engine failed."""


@dataclass
class _Reader:
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event


@dataclass(eq=False)
class Ticket:
    """One request on its way. The engine's thread writes, any number of readers wait; nobody blocks the engine."""

    prepared: Prepared
    born: float = field(default_factory=time.monotonic)
    text: str = ""  # what may be shown of a text so far
    scored: list[Scored] = field(default_factory=list)
    cancelled: bool = False
    known: int = 0  # tokens of its prompt that had been read before
    started: float = 0.0
    first: float = 0.0  # seconds until the first token
    joules: float = 0.0
    _answer: Answer | None = None
    _error: OpenM6Error | None = None
    _over: threading.Event = field(default_factory=threading.Event)
    _readers: list[_Reader] = field(default_factory=list)

    @property
    def client(self) -> str:
        return self.prepared.request.client

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        seconds = self.prepared.request.seconds
        return seconds is not None and time.monotonic() - self.born > seconds

    @property
    def over(self) -> bool:
        return self._over.is_set()

    def cancel(self) -> None:
        """Nobody wants the answer any more; the engine drops it at its next tick."""
        self.cancelled = True

    def finish(self, answer: Answer) -> None:
        """Hands over the answer; called by the engine alone."""
        self._answer = answer
        self._end()

    def fail(self, error: OpenM6Error) -> None:
        """Says why there is no answer; called by the engine alone."""
        self._error = error
        self._end()

    def _end(self) -> None:
        self._over.set()
        self.announce()

    def announce(self) -> None:
        """Wakes the readers; a loop that is gone has nobody left to wake."""
        for reader in list(self._readers):
            # The loop may close at any moment, so only the call itself can tell.
            with suppress(RuntimeError):
                reader.loop.call_soon_threadsafe(reader.changed.set)

    def wait(self, seconds: float | None = None) -> Answer:
        """Blocks until the answer is there; not for use in an event loop.

        Raises:
            LateError: it took longer than `seconds`.
            OpenM6Error: there will be none.
        """
        if not self._over.wait(seconds):
            self.cancel()
            raise LateError(f"no answer within {seconds:g} seconds: ask for less, or again later")
        return self.result()

    def result(self) -> Answer:
        """The answer of a request that is over."""
        if self._error is not None:
            raise self._error
        assert self._answer is not None
        return self._answer

    async def answer(self) -> Answer:
        """Waits for the answer; whoever stops waiting gives the request up.

        Raises:
            OpenM6Error: there will be none.
        """
        async for _ in self.growth():
            pass
        return self.result()

    @property
    def watched(self) -> bool:
        """Whether somebody reads it as it grows."""
        return bool(self._readers)

    async def growth(self) -> AsyncIterator[str]:
        """The text so far, each time there is more of it; ends when the request is over, well or not."""
        reader = _Reader(asyncio.get_running_loop(), asyncio.Event())
        self._readers.append(reader)
        shown = ""
        try:
            while True:
                over = self.over  # looked at before the text: what is written last must not be missed
                if len(self.text) > len(shown):
                    shown = self.text
                    yield shown
                if over:
                    return
                await reader.changed.wait()
                reader.changed.clear()
        finally:
            self._readers.remove(reader)
            if not self.over:
                self.cancel()
