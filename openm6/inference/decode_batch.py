"""Continuous batching of text: sequences join and leave at any step, each with its own prompt, settings and seed.

On a GPU the whole step, from embedding to sampled token, is a captured CUDA graph per size: a step of a small model is
hundreds of launches of a few microseconds each, a replay is one.
"""

# Shapes: B rows of a pass, V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openm6.core.device import check_alive
from openm6.core.errors import first_line
from openm6.core.log import get_log
from openm6.inference.decode import DecodeStep, TextHead
from openm6.inference.sampling import Sampling, filter_logits, gumbel, penalize
from openm6.modalities.interface import Segment
from openm6.ops.matmul import DECODED_ROWS

SamplingMode = Literal["greedy", "unfiltered", "filtered", "penalized"]  # each does what those before it do
# Rows of a pass from which on a product's bits do not depend on how many more there are (measured, MKL).
PADDED_ROWS = DECODED_ROWS
MIN_TEMPERATURE = 1e-6  # below it, the most likely token is taken
# The keys of a pass are a multiple of this many.
STRIDE = 64
# Sizes of graphs. A padded row costs little as long as reading the weights takes most of the time.
BATCHES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
KEYS = (128, 256, 512, 1024, 2048, 4096, 8192, 16_384)
# Without cuDNN, which plans again for each shape; that takes longer than the step.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(eq=False)
class DecodeSequence:
    """A sequence being generated. `key` is the caller's own reference."""

    key: Any
    sampling: Sampling
    # Of the next token.
    position: int
    # The last token, which is not in the cache yet.
    token: int
    # If set: scores of each token and of so many most likely ones are kept.
    top: int | None = None
    # Its texts count for `repetition_penalty`.
    prompt: Sequence[Segment] = ()
    tokens: list[int] = field(default_factory=list)
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    # Negative log-likelihood of the tokens.
    nll: float = 0.0

    @property
    def may_hold_nan(self) -> bool:
        """Whether its keys may be NaN, which masks do not hide from the next sequence in its slot."""
        return math.isnan(self.nll) or not self.tokens

    @property
    def confidence(self) -> float:
        """Geometric mean probability of the tokens; 0 without tokens."""
        return math.exp(-self.nll / len(self.tokens)) if self.tokens else 0.0


class DecodeBatch:
    """A decode batch: slots 0 to n-1 of a cache are active; the last sequence moves into the slot of one that ends.

    On a GPU passes are replayed, unless layers are offloaded, which a graph cannot wait for; sizes are rounded up to a
    few, each captured by `capture` or when it first occurs. A graph holds addresses: of the cache, of the state, of the
    outputs, all of which stay where they are. Its sizes are constants, so they are its key. Sizes beyond `max_graphs`
    run as they are.

    `batch_invariant` pads every pass to whole multiples of 16 rows and runs all experts; a graph is padded to the
    largest number of rows. Padding rows write to slots that are not in use; their state is set again when a sequence
    takes the slot. With `compiled`, layers run compiled on a CPU (decode.py).
    """

    def __init__(
        self, text_head: TextHead, max_num_seqs: int, max_model_len: int, batch_invariant: bool = False,
        max_graphs: int = 128, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.text_head, self.capacity, self.batch_invariant = text_head, max_num_seqs, batch_invariant
        self.max_graphs = max_graphs
        self.graphed = max_graphs > 0 and text_head.embedding.is_cuda and not text_head.backbone.executor.offloaded
        slots = self._padded(max_num_seqs)
        self.cache = text_head.backbone.new_cache(slots, max_model_len)
        self.decode_step = DecodeStep(text_head, self.cache, batch_invariant and not self.graphed, compiled)
        device = self.cache.keys.device
        self.graphs: dict[tuple[int, int, SamplingMode], torch.cuda.CUDAGraph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.graphed else None
        # Torch's own for captures is on the GPU of the first one; with one stream, graphs share the pool's memory.
        self.stream = torch.cuda.Stream(device) if self.graphed else None
        self.rows: list[DecodeSequence] = []
        self.token, self.position, self.length, self.seed, self.draw, self.active, self.top_k = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(7)
        )
        self.temperature, self.top_p = (torch.zeros(slots, device=device) for _ in range(2))
        self.penalty = torch.ones(slots, device=device)
        # Which tokens a row has, once one is penalized.  # slots V
        self.seen: Tensor | None = None
        # What graphs write: the tokens and the logits of a pass.
        self.sampled = torch.zeros(slots if self.graphed else 0, dtype=torch.int64, device=device)
        self.logits = torch.zeros(len(self.sampled), len(text_head.head), device=device)

    @property
    def free(self) -> int:
        return self.capacity - len(self.rows)

    @property
    def next_slot(self) -> int:
        """The slot for the prompt of the next sequence."""
        return len(self.rows)

    def add(
        self, key: Any, sampling: Sampling, position: int, token: int, top: int | None = None,
        prompt: Sequence[Segment] = (),
    ) -> DecodeSequence:  # fmt: skip
        """Add a sequence whose prompt is in `next_slot`; `token` opens its text at `position`."""
        row = DecodeSequence(key, sampling, position, token, top, prompt)
        self._set(len(self.rows), row)
        self.rows.append(row)
        return row

    def _set(self, slot: int, row: DecodeSequence) -> None:
        sampling = row.sampling
        vocabulary = len(self.text_head.head)
        self.token[slot], self.position[slot] = row.token, row.position
        self.length[slot], self.seed[slot] = self.cache.lengths[slot], sampling.seed
        # Divided by less, logits are infinite.
        temperature = sampling.temperature if sampling.temperature >= MIN_TEMPERATURE else 0.0
        self.draw[slot], self.temperature[slot] = len(row.tokens), temperature
        self.active[slot] = 1
        self.top_k[slot] = min(sampling.top_k or vocabulary, vocabulary)
        self.top_p[slot] = 1.0 if sampling.top_p is None else sampling.top_p
        self.penalty[slot] = sampling.repetition_penalty
        if sampling.repetition_penalty == 1:
            return
        if self.seen is None:
            self.seen = torch.zeros(len(self.token), vocabulary, dtype=torch.bool, device=self.token.device)
        seen = torch.zeros(vocabulary, dtype=torch.bool)
        for ids in (*(part.arrays["ids"] for part in row.prompt if part.kind == "text"), row.tokens):
            seen[torch.as_tensor(ids, dtype=torch.int64)] = True
        seen[list(self.text_head.ends)] = False  # a prompt of several turns has them, and must not delay the end
        self.seen[slot] = seen

    def remove(self, row: DecodeSequence) -> None:
        """Remove a sequence, ended or not; the last one moves into its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        moved = self.rows[last]
        if row.may_hold_nan:
            self.cache.clear([slot])
        if slot != last:
            self.cache.move(last, slot)
            self._set(slot, moved)
            self.rows[slot] = moved
            if moved.may_hold_nan:
                self.cache.clear([last])
        self.rows.pop()
        for state in (self.length, self.position, self.active, self.temperature):
            state[last] = 0

    @torch.inference_mode()
    def step(self) -> list[DecodeSequence]:
        """Sample the next token of every sequence; return those that have ended or reached their bound."""
        count, capacity = len(self.rows), self.cache.capacity
        longest = max(self.cache.lengths[:count]) + 1
        bound = max(longest, capacity - 1) if self.decode_step.compiled else capacity
        longest = min(-(-longest // STRIDE) * STRIDE, bound)
        settings = [row.sampling for row in self.rows]
        unfiltered = all(sampling.top_k is None and sampling.top_p is None for sampling in settings)
        greedy = all(sampling.temperature == 0 for sampling in settings)
        mode: SamplingMode = "greedy" if greedy else "unfiltered" if unfiltered else "filtered"  # as simple as possible
        if any(sampling.repetition_penalty != 1 for sampling in settings):
            mode = "penalized"
        run = self._replay if self.graphed else self._run
        sampled, logits = run(self._padded(count), longest, mode)
        logits, sampled = logits[:count], sampled[:count]
        scores = logits.gather(1, sampled[:, None])[:, 0] - logits.logsumexp(-1)  # B
        ended = []
        for slot, (row, token, score) in enumerate(zip(self.rows, sampled.tolist(), scores.tolist(), strict=True)):
            row.token = token
            row.position += 1
            self.cache.lengths[slot] += 1
            row.tokens.append(token)
            row.nll -= score
            if row.top is not None:
                all_scores = logits[slot].log_softmax(-1)  # V
                best = all_scores.topk(row.top)
                likely = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
                row.scores.append((float(all_scores[token]), likely))
            full = self.cache.lengths[slot] + 1 >= capacity
            if token in self.text_head.ends or len(row.tokens) >= row.sampling.max_tokens or full:
                ended.append(row)
        return ended

    def _padded(self, count: int) -> int:
        """Rows of a pass with `count` active ones."""
        if self.graphed:
            return next(size for size in BATCHES if size >= (self.capacity if self.batch_invariant else count))
        return -(-count // PADDED_ROWS) * PADDED_ROWS if self.batch_invariant else count

    def _run(self, batch: int, longest: int, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        """Sample, and advance the state of the rows, all of it on the device.  # -> B, B V"""
        token, position, length = self.token[:batch], self.position[:batch], self.length[:batch]
        logits = self.decode_step(token, position, length, longest)  # B V
        sampled = self._sample(logits, mode)
        token.copy_(sampled)
        # Padding stays at its position, so that it does not leave its slot.
        active = self.active[:batch]
        for counter in (position, length, self.draw[:batch]):
            counter += active
        return sampled, logits

    def _sample(self, logits: Tensor, mode: SamplingMode) -> Tensor:
        if mode == "greedy":
            return logits.argmax(-1)
        batch = len(logits)
        seen = None if mode != "penalized" or self.seen is None else self.seen[:batch]
        if seen is not None:
            logits = penalize(logits, seen, self.penalty[:batch])
        temperature = self.temperature[:batch, None]
        scores = logits / torch.where(temperature > 0, temperature, 1.0)
        if mode != "unfiltered":
            scores = filter_logits(scores, self.top_k[:batch], self.top_p[:batch])
        noise = gumbel(self.seed[:batch], self.draw[:batch], logits.shape[-1])
        sampled = torch.where(temperature > 0, scores + noise, logits).argmax(-1)
        if seen is not None:
            seen.scatter_(1, sampled[:, None], True)
        return sampled

    def capture(self) -> None:
        """Capture the passes of all sizes, the shortest first, or prepare compiled layers, before there are texts."""
        if not self.graphed:
            sizes = {self._padded(1), self._padded(self.capacity)} if self.decode_step.compiled else ()
            with torch.inference_mode():
                for batch in sizes:
                    self.decode_step(self.token[:batch], self.position[:batch], self.length[:batch], 2)
            return
        began = time.perf_counter()
        batches = dict.fromkeys(map(self._padded, range(1, self.capacity + 1)))
        lengths = sorted({min(size, self.cache.capacity) for size in (*KEYS, self.cache.capacity)})
        with torch.inference_mode():
            modes = [mode for mode in get_args(SamplingMode) if mode != "penalized"]  # rare: captured when it occurs
            for longest, batch, mode in product(lengths, batches, modes):
                self._graph(batch, longest, mode)
        seconds = time.perf_counter() - began
        get_log().info(f"{len(self.graphs)} passes of up to {max(batches)} texts captured in {seconds:.1f} s")

    def _replay(self, batch: int, longest: int, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        """As `_run`, with a graph of at least so many keys if there is one."""
        longest = min(self.cache.capacity, next((size for size in KEYS if size >= longest), self.cache.capacity))
        graph = self._graph(batch, longest, mode)
        if graph is None:
            with sdpa_kernel(ATTENTION):
                return self._run(batch, longest, mode)
        graph.replay()
        return self.sampled[:batch], self.logits[:batch]

    def _graph(self, batch: int, longest: int, mode: SamplingMode) -> torch.cuda.CUDAGraph | None:
        """Return the graph of a pass, captured now if need be; None if there is no room, or capturing failed."""
        key = batch, longest, mode
        if key not in self.graphs and len(self.graphs) < self.max_graphs:
            try:
                with torch.cuda.device_of(self.token):
                    self.graphs[key] = self._captured(*key)
            except Exception as error:
                self.max_graphs = len(self.graphs)
                check_alive(self.token.device)
                reason = f"{type(error).__name__}: {first_line(error)}"
                get_log().warning(f"a decoding pass could not be captured ({reason}), so it runs as it is, and slower")
        return self.graphs.get(key)

    def _captured(self, batch: int, longest: int, mode: SamplingMode) -> torch.cuda.CUDAGraph:
        """Run the pass a few times on a side stream, as libraries set themselves up when first called, then record it.

        The state is restored each time; what the passes wrote into the cache is written again by the next one.
        """
        state = [self.token, self.position, self.length, self.draw, *([] if self.seen is None else [self.seen])]
        before = [part.clone() for part in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), sdpa_kernel(ATTENTION):
            for _ in range(3):
                try:
                    self._run(batch, longest, mode)
                finally:
                    for part, old in zip(state, before, strict=True):
                        part.copy_(old)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local")
        with recording, sdpa_kernel(ATTENTION):
            sampled, logits = self._run(batch, longest, mode)
            # Outputs of its own would keep their memory, as many times as there are graphs.
            self.sampled[:batch].copy_(sampled)
            self.logits[:batch].copy_(logits)
        return graph
