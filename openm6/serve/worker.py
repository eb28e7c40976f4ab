"""The engine's thread: prompts are read, every text gets a token, images and audio a decoding step.

Texts are rows of a decode batch; images and audio hold a KV slot each. Requests that take one pass (numbers, ranks,
embeddings) are answered as they start, their prompts in a scratch slot. Each `RequestHandle` carries its text so far,
and in the end its answer, to whoever waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from openm6.core.device import check_alive
from openm6.core.errors import OpenM6Error
from openm6.core.log import get_log
from openm6.energy.meter import Meter
from openm6.inference.decode import TextHead
from openm6.inference.decode_batch import DecodeBatch, DecodeSequence
from openm6.inference.engine import embed_tokens, predict_numbers, score_rows, visible_text
from openm6.inference.load import LoadedModel
from openm6.inference.masked import MaskedDecodeState, masked_step
from openm6.inference.prefill import PrefixCache, prefill, prefill_packed
from openm6.modalities.text import Text
from openm6.serve import requests
from openm6.serve.config import EngineConfig

EXPIRED = "the deadline passed before the answer was there: ask for less, or again later"
FAILED = "the engine failed on this request: report it with the server's log"
LOST = "the engine stopped: ask again when the server has been started again"


@dataclass(eq=False)
class RequestHandle:
    """One request on its way: wait for the answer, read it as it grows, or cancel.

    The engine's thread writes, any number of readers wait, and none blocks the engine.
    """

    prepared: requests.PreparedRequest
    created_at: float = field(default_factory=time.monotonic)
    text: str = ""  # of a text, what may be shown so far
    tokens: list[requests.ScoredToken] = field(default_factory=list)
    cancelled: bool = False
    cached: int = 0  # prompt tokens found in the prefix cache
    started_at: float = 0.0
    first_token_seconds: float = 0.0
    joules: float = 0.0
    readers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = field(default_factory=list)
    _outcome: Future[requests.Answer] = field(default_factory=Future)

    @property
    def client(self) -> str:
        return self.prepared.request.client

    @property
    def expired(self) -> bool:
        seconds = self.prepared.request.seconds
        return seconds is not None and time.monotonic() - self.created_at > seconds

    @property
    def done(self) -> bool:
        return self._outcome.done()

    def cancel(self) -> None:
        self.cancelled = True

    def finish(self, answer: requests.Answer) -> None:
        """Set the answer, unless the request has failed; called by the engine alone."""
        if not self.done:
            self._outcome.set_result(answer)
            self.notify()

    def fail(self, error: OpenM6Error) -> None:
        """Set the reason why there is no answer; called by the engine alone."""
        if not self.done:
            self._outcome.set_exception(error)
            self.notify()

    def notify(self) -> None:
        """Wake the readers; those whose event loop is closed are skipped."""
        for loop, changed in list(self.readers):
            # The loop may close at any moment, so only the call itself shows whether it has.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

    def wait(self, seconds: float | None = None) -> requests.Answer:
        """Block until the answer is there; raise OpenM6Error if there will be none, TimeoutError after `seconds`."""
        return self._outcome.result(seconds)

    async def answer(self) -> requests.Answer:
        """Wait for the answer; a caller that stops waiting cancels it. Raise OpenM6Error if there is none."""
        try:
            # Without a reader, so that a text is decoded once, at its end. The engine alone sets the outcome.
            return await asyncio.shield(asyncio.wrap_future(self._outcome))
        except asyncio.CancelledError:
            self.cancel()
            raise


async def follow(handles: Sequence[RequestHandle]) -> AsyncGenerator[None]:
    """Yield when requests have changed, until all are done; a caller that stops cancels those that are not."""
    reader = (asyncio.get_running_loop(), asyncio.Event())
    for handle in handles:
        handle.readers.append(reader)
    try:
        done = False
        while not done:
            # Read before the yield: what is written last must not be missed.
            done = all(handle.done for handle in handles)
            yield
            if not done:
                await reader[1].wait()
                reader[1].clear()
    finally:
        for handle in handles:
            handle.readers.remove(reader)
            if not handle.done:
                handle.cancel()


class Worker:
    """All requests in work, on one model; used by one thread alone."""

    def __init__(self, loaded: LoadedModel, config: EngineConfig, meter: Meter) -> None:
        self.loaded, self.config = loaded, config
        head, device = TextHead.of(loaded.omni, loaded.text), loaded.omni.device
        self.batch_invariant = config.is_invariant(device)
        self.text = DecodeBatch(
            head,
            config.max_num_seqs,
            config.max_model_len,
            self.batch_invariant,
            config.max_cuda_graphs,
            config.compile,
        )
        self.text.capture()
        self.slots = loaded.omni.backbone.new_cache(config.max_num_media + 1, config.max_model_len)
        self.scratch_slot = config.max_num_media
        self.free_slots = list(range(config.max_num_media))
        self.masked: deque[MaskedDecodeState] = deque()
        self.unread: list[RequestHandle] = []  # texts whose prompts this tick reads together
        self.prefix_cache = PrefixCache(config.prefix_cache_bytes)
        self.energy = EnergyAttribution(meter)
        self.ended: list[tuple[RequestHandle, requests.Answer]] = []
        self.passes = self.read_tokens = 0  # of this tick

    @property
    def active(self) -> list[RequestHandle]:
        return [row.key for row in self.text.rows] + [state.key for state in self.masked] + self.unread

    @property
    def open_kinds(self) -> set[type]:
        """The kinds of requests for which there is a free slot in this tick."""
        kinds: set[type] = set()
        if self.text.free > len(self.unread):
            kinds.add(requests.TextRequest)
        if self.free_slots:
            kinds.add(requests.CodesRequest)
        if self.passes < self.config.max_num_single_pass:
            kinds |= {requests.NumbersRequest, requests.RankRequest, requests.EmbedRequest}
        return kinds

    def fits(self, handle: RequestHandle) -> bool:
        """Whether a request's prompt may still be read in this tick; at least one is."""
        tokens = self.read_tokens + handle.prepared.prompt_length
        return not self.read_tokens or tokens <= self.config.max_num_batched_tokens

    def start(self, handle: RequestHandle) -> None:
        """Start a request; one that takes a single pass is answered at once."""
        handle.started_at = time.monotonic()
        self.read_tokens += handle.prepared.prompt_length
        self._run(partial(self._start, handle), [handle])

    def tick(self) -> None:
        if self.unread:
            self._run(self._read_together, list(self.unread))
        self.drop(lambda handle: handle.cancelled or handle.expired)
        if self.masked:
            first = self.masked[0]  # it waits longest
            alike = [state for state in self.masked if state.like == first.like]
            group = [first] if self.batch_invariant else alike
            self._run(partial(self._step_masked, group), [state.key for state in group])
        if self.text.rows:
            self._run(self._step_text, [row.key for row in self.text.rows])
        self.passes = self.read_tokens = 0

    def drop(self, gone: Callable[[RequestHandle], bool]) -> None:
        """End requests in work without an answer, and free their slots."""
        rows = [row for row in self.text.rows if gone(row.key)]
        masked = [state for state in self.masked if gone(state.key)]
        for row in rows:
            self.text.remove(row)
        for state in masked:
            self._remove_masked(state)
        for handle in [row.key for row in rows] + [state.key for state in masked]:
            handle.fail(requests.DeadlineExceededError("the request was cancelled" if handle.cancelled else EXPIRED))

    def _run(self, step: Callable[[], None], handles: list[RequestHandle]) -> None:
        """Run a step of some requests; a failure ends these and no others, a lost device is raised again."""
        began = time.monotonic()
        try:
            step()
        except torch.AcceleratorError:
            # After this the device answers nothing any more.
            self._fail(handles, requests.EngineUnavailableError(LOST))
            raise
        except OpenM6Error as error:
            self._fail(handles, error)
        except Exception:
            get_log().exception("a step failed")
            self._fail(handles, requests.EngineUnavailableError(FAILED))
            # cuBLAS and Triton report a lost device by errors of their own.
            check_alive(self.loaded.omni.device)
        self.energy.add(handles, time.monotonic() - began)

    def _fail(self, handles: list[RequestHandle], error: OpenM6Error) -> None:
        for handle in handles:
            handle.fail(error)
        self.drop(lambda handle: handle.done)

    def _start(self, handle: RequestHandle) -> None:
        request = handle.prepared.request
        if isinstance(request, requests.CodesRequest):
            prepared, slot, omni = handle.prepared, self.free_slots[-1], self.loaded.omni
            position, handle.cached = prefill(omni, prepared.prompt, self.slots, slot, self.prefix_cache)
            state = MaskedDecodeState(handle, prepared.targets[0], request.sampling, slot, position, omni.device)
            self.free_slots.pop()
            self.masked.append(state)
            if not state.first_unknown:  # a mask that covers no position
                self._remove_masked(state)
                self._end(handle, state.codes.cpu(), 0)
        elif not isinstance(request, requests.TextRequest):
            self.passes += 1
            self._answer_at_once(handle)
        elif self.batch_invariant:
            self._read_text(handle)
        else:
            self.unread.append(handle)

    def _answer_at_once(self, handle: RequestHandle) -> None:
        prepared, omni, slot = handle.prepared, self.loaded.omni, self.scratch_slot
        value: object
        if isinstance(prepared.request, requests.EmbedRequest):
            value = embed_tokens(self.loaded, [prepared.prompt])[0]
        else:
            position, handle.cached = prefill(omni, prepared.prompt, self.slots, slot, self.prefix_cache)
            if isinstance(prepared.request, requests.RankRequest):
                nll = score_rows(omni, self.slots, [slot], [position], [prepared.targets])[0].tolist()
                asked, lengths = prepared.request, list(map(len, prepared.targets))
                value = self.loaded.numbers.ranking(nll, asked.candidates, lengths, asked.parts)
            else:
                value = predict_numbers(omni, self.slots, [slot], [position], prepared.targets)[0]
        self._end(handle, value, sum(map(len, prepared.targets)))

    def _read_text(self, handle: RequestHandle) -> None:
        batch, prompt = self.text, handle.prepared.prompt
        found = prefill(self.loaded.omni, prompt, batch.cache, batch.next_slot, self.prefix_cache)
        self._add_row(handle, *found)

    def _read_together(self) -> None:
        """Read prompts in one pass; if that fails, one after the other, so that only the broken one ends."""
        handles, self.unread = self.unread, []
        prompts = [handle.prepared.prompt for handle in handles]
        slots = [self.text.next_slot + index for index in range(len(handles))]
        try:
            found = prefill_packed(self.loaded.omni, prompts, self.text.cache, slots, self.prefix_cache)
        except torch.AcceleratorError:
            raise
        except Exception:
            get_log().exception("prompts could not be read together")
            found = []
        for handle, (position, cached) in zip(handles, found, strict=False):
            self._add_row(handle, position, cached)
        for handle in handles[len(found) :]:
            self._run(partial(self._read_text, handle), [handle])

    def _add_row(self, handle: RequestHandle, position: int, cached: int) -> None:
        """Add a text whose prompt is in the next slot to the decode batch."""
        request, handle.cached = handle.prepared.request, cached
        assert isinstance(request, requests.TextRequest)
        opening = handle.prepared.opening
        token = self.loaded.text.start if opening is None else opening
        self.text.add(handle, request.sampling, position, token, request.top, handle.prepared.prompt)

    def _step_text(self) -> None:
        """Generate one token of every text; decode those that end, have stop strings or are being read."""
        ended, text = self.text.step(), self.loaded.text
        for row in list(self.text.rows):
            handle: RequestHandle = row.key
            request = handle.prepared.request
            assert isinstance(request, requests.TextRequest)
            if len(row.tokens) == 1:
                handle.first_token_seconds = time.monotonic() - handle.created_at
            if not (row in ended or request.stop or handle.readers):
                continue
            handle.text, stopped = visible_text(text, row, request.stop, row in ended)
            if request.top is not None:
                whole = row in ended and not stopped
                count = len(row.tokens) if whole else shown_tokens(text, row.tokens, handle.text)
                # A list of its own, as readers hold the last one; what was scored is not scored again.
                handle.tokens = [*handle.tokens, *scored_tokens(text, row, len(handle.tokens), count)]
            if row in ended or stopped:
                self.text.remove(row)
                cut = not stopped and row.tokens[-1] not in text.ends
                self._end(handle, handle.text, len(row.tokens), cut, row.confidence)
            else:
                handle.notify()

    def _step_masked(self, group: list[MaskedDecodeState]) -> None:
        done = masked_step(self.loaded.omni, self.slots, group)
        for state in group:
            if state in done:
                self._remove_masked(state)
                self._end(state.key, state.codes.cpu(), state.first_unknown)
            else:  # it waits behind the others
                self.masked.remove(state)
                self.masked.append(state)

    def _remove_masked(self, state: MaskedDecodeState) -> None:
        assert state.slot is not None
        self.masked.remove(state)
        self.slots.clear([state.slot])  # masks do not hide NaN from other requests
        self.free_slots.append(state.slot)

    def _end(
        self, handle: RequestHandle, value: object, generated: int, cut: bool = False, confidence: float | None = None
    ) -> None:
        """Keep an answer until the end of the tick, when its joules are known."""
        answer = requests.Answer(
            value=value,
            usage=requests.Usage(handle.prepared.by_modality, handle.cached, generated),
            finish="length" if cut else "stop",
            tokens=tuple(handle.tokens),
            confidence=confidence,
            first_token_seconds=handle.first_token_seconds,
        )
        self.ended.append((handle, answer))


def shown_tokens(text: Text, tokens: Sequence[int], shown: str) -> int:
    """How many of the tokens the part of their text that is shown takes."""
    count = len(tokens) if shown else 0
    # From the end, as all but the last few are shown.
    while count > 1 and text.decode(tokens[: count - 1]).startswith(shown):
        count -= 1
    return count


def scored_tokens(text: Text, row: DecodeSequence, first: int, count: int) -> list[requests.ScoredToken]:
    """The tokens of a row from `first` to `count` with their scores, without the one that ends it."""

    def scored(token: int, score: float, likely: Sequence[tuple[int, float]] = ()) -> requests.ScoredToken:
        others = tuple(scored(*one) for one in likely)
        own = text.bytes_of(token)
        return requests.ScoredToken(own.decode(errors="replace"), own, score, others)

    pairs = zip(row.tokens[first:count], row.scores[first:count], strict=True)
    return [scored(token, *scores) for token, scores in pairs if token not in text.ends]


class EnergyAttribution:
    """Divides what the meter counts among requests by the seconds spent on each; idle energy belongs to none."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.reading = meter.joules()
        self.seconds: dict[RequestHandle, float] = {}

    def add(self, handles: list[RequestHandle], seconds: float) -> None:
        """Add time that was spent on these requests together."""
        for handle in handles:
            self.seconds[handle] = self.seconds.get(handle, 0.0) + seconds / len(handles)

    def settle(self) -> None:
        """Divide what was counted since the last call, to the last joule."""
        reading = self.meter.joules(fresh=True)
        counted, self.reading = reading.joules - self.reading.joules, reading
        # A coarse clock may count no time at all.
        total = sum(self.seconds.values()) or 1.0
        for handle, seconds in self.seconds.items():
            handle.joules += counted * seconds / total
        self.seconds.clear()
