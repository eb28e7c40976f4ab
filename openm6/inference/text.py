"""Continuous batching of text: rows join and leave at any step, each with its own prompt, settings and seed."""

# Shapes: B rows of a pass, V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from openm6.inference.decode import DecodeStep, Precision, TextHead
from openm6.inference.sampling import Sampling, filter_logits, gumbel

SamplingMode = Literal["greedy", "unfiltered", "filtered"]
# Rows of a pass from which on a product's bits do not depend on how many more there are (measured, MKL).
PADDED_ROWS = 16
STRIDE = 64  # keys are looked at in whole multiples of this many


@dataclass(eq=False)
class DecodeSequence:
    """A sequence being generated. `key` is the caller's own reference."""

    key: Any
    sampling: Sampling
    position: int  # position of the next token
    token: int  # the last token, which is not in the cache yet
    tokens: list[int] = field(default_factory=list)
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    top: int | None = None
    nll: float = 0.0  # negative log-likelihood of the tokens


class DecodeBatch:
    """A decode batch: rows 0 to n-1 of a slot cache are active; the last row moves into the slot of one that ends."""

    def __init__(
        self,
        text_head: TextHead,
        rows: int,
        room: int,
        precision: Precision = "float32",
        deterministic: bool = False,
    ) -> None:
        """`deterministic` pads every pass to whole multiples of 16 rows and runs all experts.

        Padding rows write to slots that are not in use; their state is set again when a row takes the slot.
        """
        self.text_head = text_head
        self.deterministic = deterministic
        slots = -(-rows // PADDED_ROWS) * PADDED_ROWS if deterministic else rows
        self.capacity = rows
        self.cache = text_head.backbone.new_cache(slots, room)
        self.step_of = DecodeStep(text_head, self.cache, precision, deterministic)
        self.rows: list[DecodeSequence] = []
        device = self.cache.keys.device
        self.token, self.position, self.length, self.seed, self.draw, self.active = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(6)
        )
        self.top_k = torch.zeros_like(self.token)
        self.temperature, self.top_p = (torch.zeros(slots, device=device) for _ in range(2))

    @property
    def free(self) -> int:
        """Number of rows that may be added."""
        return self.capacity - len(self.rows)

    @property
    def next_slot(self) -> int:
        """The slot for the prompt of the next row."""
        return len(self.rows)

    def add(
        self, key: Any, sampling: Sampling, position: int, token: int, top: int | None = None
    ) -> DecodeSequence:
        """Add a row whose prompt is in `next_slot`; `token` opens its text at `position`."""
        row = DecodeSequence(key, sampling, position, token, top=top)
        self._set(len(self.rows), row)
        self.rows.append(row)
        return row

    def _set(self, slot: int, row: DecodeSequence) -> None:
        sampling = row.sampling
        vocabulary = len(self.text_head.head)
        self.token[slot], self.position[slot] = row.token, row.position
        self.length[slot], self.seed[slot] = self.cache.lengths[slot], sampling.seed
        self.draw[slot], self.temperature[slot] = len(row.tokens), sampling.temperature
        self.active[slot] = 1
        self.top_k[slot] = min(sampling.top_k or vocabulary, vocabulary)
        self.top_p[slot] = 1.0 if sampling.top_p is None else sampling.top_p

    def remove(self, row: DecodeSequence) -> None:
        """Remove a row, ended or not; the last row moves into its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot != last:
            self.cache.move(last, slot)
            self._set(slot, self.rows[last])
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        for state in (self.length, self.position, self.active, self.temperature):
            state[last] = 0

    @torch.inference_mode()
    def step(self) -> list[DecodeSequence]:
        """Draw the next token of every row; return the rows that have ended or reached their bound."""
        count = len(self.rows)
        longest = max(self.cache.lengths[:count]) + 1
        longest = min(-(-longest // STRIDE) * STRIDE, self.cache.room)
        drawn, logits = self._run(self._padded(count), longest, self._mode())
        logits, drawn = logits[:count], drawn[:count]
        chosen = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)  # B
        return self._settle(drawn.tolist(), chosen.tolist(), logits)

    def _padded(self, count: int) -> int:
        """Rows of a pass with `count` active ones."""
        return -(-count // PADDED_ROWS) * PADDED_ROWS if self.deterministic else count

    def _mode(self) -> SamplingMode:
        """The simplest sampling that serves all rows of this pass."""
        settings = [row.sampling for row in self.rows]
        if all(sampling.temperature == 0 for sampling in settings):
            return "greedy"
        unfiltered = all(sampling.top_k is None and sampling.top_p is None for sampling in settings)
        return "unfiltered" if unfiltered else "filtered"

    def _run(self, batch: int, longest: int, mode: SamplingMode) -> tuple[Tensor, Tensor]:
        """Draw, and advance the state of the rows, all of it on the device.  # -> B, B V"""
        token, position, length = self.token[:batch], self.position[:batch], self.length[:batch]
        logits = self.step_of(token, position, length, longest)  # B V
        drawn = self._drawn(logits, mode)
        token.copy_(drawn)
        active = self.active[:batch]
        for counter in (position, length, self.draw[:batch]):
            counter += active  # padding stays at its position, so that it does not leave its slot
        return drawn, logits

    def _drawn(self, logits: Tensor, mode: SamplingMode) -> Tensor:
        """Sample every row by its own settings.  # B V -> B"""
        if mode == "greedy":
            return logits.argmax(-1)
        batch = len(logits)
        temperature = self.temperature[:batch, None]
        scores = logits / torch.where(temperature > 0, temperature, 1.0)
        if mode == "filtered":
            scores = filter_logits(scores, self.top_k[:batch], self.top_p[:batch])
        noise = gumbel(self.seed[:batch], self.draw[:batch], logits.shape[-1])
        return torch.where(temperature > 0, scores + noise, logits).argmax(-1)

    def _settle(self, drawn: list[int], chosen: list[float], logits: Tensor) -> list[DecodeSequence]:
        ended = []
        scored = {slot for slot, row in enumerate(self.rows) if row.top is not None}
        for slot, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
            row.token = token
            row.position += 1
            self.cache.lengths[slot] += 1
            row.tokens.append(token)
            row.nll -= chosen[slot]
            if slot in scored:
                row.scores.append(_score(logits[slot], token, row.top or 0))
            full = self.cache.lengths[slot] + 1 >= self.cache.room
            if token == self.text_head.end or len(row.tokens) >= row.sampling.max_tokens or full:
                ended.append(row)
        return ended


def _score(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token, and ids and log-probabilities of the `top` most likely.  # V"""
    scores = logits.log_softmax(-1)
    best = scores.topk(top) if top else None
    rivals = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(scores[token]), rivals
