"""What the engine's thread does in a tick: admit, read prompts, draw a step of a picture or sound, write a token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

from openm6.base.energy.meter import Meter
from openm6.base.errors import OpenM6Error
from openm6.base.log import get_log
from openm6.inference.decode import TextHead
from openm6.inference.engine import embed_tokens, predict_numbers, score_candidates
from openm6.inference.graphs import open_batch
from openm6.inference.load import LoadedModel
from openm6.inference.masked import MaskedDecodeState, masked_step
from openm6.inference.prefill import PrefixCache, prefill, prefill_packed
from openm6.inference.taught import confidence_of
from openm6.inference.text import DecodeSequence
from openm6.serve.config import EngineConfig
from openm6.serve.energy import EnergyShares
from openm6.serve.requests import (
    Answer,
    CodesRequest,
    EmbedRequest,
    NumbersRequest,
    RankRequest,
    TextRequest,
    Usage,
)
from openm6.serve.ticket import LateError, StoppedError, Ticket
from openm6.serve.writing import scored_tokens, shown_text

LATE = "the deadline passed before the answer was there: ask for less, or again later"
FAILED = "the engine failed on this request: report it with the server's log"
LOST = "the engine stopped: ask again when the server has been started again"
# After these the device answers nothing any more.
FATAL = (torch.AcceleratorError,)


class Worker:
    """All requests at work, on one model; used by one thread alone."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, meter: Meter) -> None:
        self.loaded, self.config = loaded, config
        text_head = TextHead.of(loaded.omni, loaded.text)
        self.text = open_batch(text_head, config.rows, config.room, config.weights, config.deterministic)
        self.shelf = loaded.omni.backbone.new_cache(config.canvases + 1, config.room)
        self.desk = config.canvases  # its last slot, for prompts that are answered at once
        self.shelf_free = list(range(config.canvases))
        self.canvases: deque[MaskedDecodeState] = deque()
        self.gathered: list[Ticket] = []  # texts whose prompts this tick reads together
        self.memory = PrefixCache(config.prefixes)
        self.energy = EnergyShares(meter)
        self.ended: list[tuple[Ticket, Answer]] = []
        self.passes = self.read = 0

    @property
    def busy(self) -> bool:
        return bool(self.text.rows or self.canvases or self.gathered)

    @property
    def live(self) -> list[Ticket]:
        """All tickets at work."""
        rows = [row.key for row in self.text.rows]
        return rows + [canvas.key for canvas in self.canvases] + self.gathered

    @property
    def open_to(self) -> set[type]:
        """The kinds of requests for which there is a place in this tick."""
        kinds: set[type] = set()
        if self.text.free > len(self.gathered):
            kinds.add(TextRequest)
        if self.shelf_free:
            kinds.add(CodesRequest)
        if self.passes < self.config.passes:
            kinds |= {NumbersRequest, RankRequest, EmbedRequest}
        return kinds

    def fits(self, ticket: Ticket) -> bool:
        """Whether a request's prompt may still be read in this tick; at least one is."""
        return not self.read or self.read + ticket.prepared.length <= self.config.prefill

    def start(self, ticket: Ticket) -> None:
        """Begins a request; one that takes a single pass is answered at once."""
        ticket.started = time.monotonic()
        self.read += ticket.prepared.length
        self._alone(ticket, self._start)
        self.energy.spent([ticket], time.monotonic() - ticket.started)

    def _alone(self, ticket: Ticket, step: Callable[[Ticket], None]) -> None:
        """A step of one request, whose failure ends it with its own sentence; one that is fatal goes on up."""
        try:
            step(ticket)
        except OpenM6Error as error:
            ticket.fail(error)
        except FATAL:
            ticket.fail(StoppedError(LOST))
            raise
        except Exception:
            get_log().exception("a request failed")
            ticket.fail(StoppedError(FAILED))

    def _start(self, ticket: Ticket) -> None:
        request = ticket.prepared.request
        if isinstance(request, TextRequest):
            if self.config.deterministic:
                self._read_text(ticket)
            else:
                self.gathered.append(ticket)
        elif isinstance(request, CodesRequest):
            self._start_canvas(ticket, request)
        else:
            self.passes += 1
            self._answer_at_once(ticket)

    def _answer_at_once(self, ticket: Ticket) -> None:
        """Answer a request that takes one pass after its prompt, which is read into the last slot meanwhile."""
        prepared, omni = ticket.prepared, self.loaded.omni
        value: object
        if isinstance(prepared.request, EmbedRequest):
            value = embed_tokens(self.loaded, [prepared.prompt])[0]
        else:
            place, ticket.known = prefill(omni, prepared.prompt, self.shelf, self.desk, self.memory)
            if isinstance(prepared.request, RankRequest):
                nats = score_candidates(omni, self.shelf, self.desk, place, prepared.wanted)
                value = list(zip(nats, map(len, prepared.wanted), strict=True))
            else:
                value = predict_numbers(omni, self.shelf, [self.desk], [place], prepared.wanted)[0]
        self._end(ticket, value, sum(map(len, prepared.wanted)))

    def _open(self, ticket: Ticket, place: int, known: int) -> None:
        """A row of text whose prompt stands in the next slot."""
        request, ticket.known = ticket.prepared.request, known
        assert isinstance(request, TextRequest)
        self.text.add(ticket, request.sampling, place, self.loaded.text.start, request.top)

    def _read_text(self, ticket: Ticket) -> None:
        slot, cache = self.text.next_slot, self.text.cache
        self._open(ticket, *prefill(self.loaded.omni, ticket.prepared.prompt, cache, slot, self.memory))

    def _read_gathered(self) -> None:
        """All in one pass; where that fails, one after the other, so that only what is broken ends."""
        tickets, self.gathered = self.gathered, []
        prompts = [ticket.prepared.prompt for ticket in tickets]
        slots = [self.text.next_slot + number for number in range(len(tickets))]
        try:
            found = prefill_packed(self.loaded.omni, prompts, self.text.cache, slots, self.memory)
        except FATAL:
            raise
        except Exception:
            get_log().exception("prompts could not be read together")
            found = []
        for ticket, (place, known) in zip(tickets, found, strict=False):
            self._open(ticket, place, known)
        for ticket in tickets[len(found) :]:
            self._alone(ticket, self._read_text)

    def _start_canvas(self, ticket: Ticket, request: CodesRequest) -> None:
        prompt, wanted = ticket.prepared.prompt, ticket.prepared.wanted[0]
        slot = self.shelf_free[-1]
        place, ticket.known = prefill(self.loaded.omni, prompt, self.shelf, slot, self.memory)
        self.shelf_free.pop()
        canvas = MaskedDecodeState.of(ticket, wanted, request.sampling, slot, place, self.loaded.omni.device)
        if canvas.first_unknown:
            self.canvases.append(canvas)
        else:  # a hole that touches nothing
            self._release(canvas)
            self._end(ticket, canvas.codes.cpu(), 0)

    def tick(self) -> None:
        """One step of everything that is at work."""
        if self.gathered:
            self._guarded(self._read_gathered, list(self.gathered))
        self.drop(lambda ticket: ticket.cancelled or ticket.late)
        if self.canvases:
            self._guarded(self._draw, [canvas.key for canvas in self._next_canvases()])
        if self.text.rows:
            self._guarded(self._write, [row.key for row in self.text.rows])
        self.passes = self.read = 0

    def _guarded(self, step: Callable[[], None], tickets: list[Ticket]) -> None:
        """A step whose failure ends the requests in it, and nothing else; one that is fatal goes on up."""
        began = time.monotonic()
        try:
            step()
        except FATAL:
            for ticket in tickets:
                ticket.fail(StoppedError(LOST))
            raise
        except Exception:
            get_log().exception("a step failed")
            for ticket in tickets:
                ticket.fail(StoppedError(FAILED))
            self.drop(lambda ticket: ticket.over)
        self.energy.spent(tickets, time.monotonic() - began)

    def _next_canvases(self) -> list[MaskedDecodeState]:
        """Those to be advanced together: the one that waits longest, and those that are like it."""
        first = self.canvases[0]
        if self.config.deterministic:
            return [first]
        return [canvas for canvas in self.canvases if canvas.like == first.like]

    def _draw(self) -> None:
        group = self._next_canvases()
        done = masked_step(self.loaded.omni, self.shelf, group)
        for canvas in group:
            self.canvases.remove(canvas)
            if canvas in done:
                self._release(canvas)
                self._end(canvas.key, canvas.codes.cpu(), canvas.first_unknown)
            else:
                self.canvases.append(canvas)

    def _write(self) -> None:
        ended = self.text.step()
        for row in list(self.text.rows):
            ticket: Ticket = row.key
            over = row in ended
            if len(row.tokens) == 1:
                ticket.first = time.monotonic() - ticket.born
            request = ticket.prepared.request
            assert isinstance(request, TextRequest)
            if over or request.stop or ticket.watched:
                self._show(row, ticket, request, over)

    def _show(self, row: DecodeSequence, ticket: Ticket, request: TextRequest, over: bool) -> None:
        text = self.loaded.text
        shown, stopped = shown_text(text, row, request.stop, over)
        if request.top is not None:
            ticket.scored = scored_tokens(text, row)
        ticket.text = shown
        if over or stopped:
            self.text.remove(row)
            ended = stopped or row.tokens[-1] == text.end
            sure = confidence_of(row.nll, len(row.tokens))
            self._end(ticket, shown, len(row.tokens), cut=not ended, confidence=sure)
        else:
            ticket.announce()

    def _end(
        self, ticket: Ticket, value: object, given: int, cut: bool = False, confidence: float | None = None
    ) -> None:
        """The answer is there; its joules are not known before the tick's end."""
        read = ticket.prepared.read
        answer = Answer(
            value=value,
            usage=Usage(read, ticket.known, given),
            finish="length" if cut else "stop",
            scored=tuple(ticket.scored),
            confidence=confidence,
            waited=ticket.started - ticket.born,
            first=ticket.first,
        )
        self.ended.append((ticket, answer))

    def _release(self, canvas: MaskedDecodeState) -> None:
        assert canvas.slot is not None
        self.shelf_free.append(canvas.slot)

    def drop(self, gone: Callable[[Ticket], bool]) -> None:
        """Ends requests at work without an answer, and frees what they held."""
        for row in [row for row in self.text.rows if gone(row.key)]:
            self.text.remove(row)
            self._fail(row.key)
        for canvas in [canvas for canvas in self.canvases if gone(canvas.key)]:
            self.canvases.remove(canvas)
            self._release(canvas)
            self._fail(canvas.key)

    def _fail(self, ticket: Ticket) -> None:
        if not ticket.over:
            ticket.fail(LateError("the request was given up" if ticket.cancelled else LATE))
