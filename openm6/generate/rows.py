"""Continuous batching of text: rows come and go at any step, each with its own prompt, settings and seed."""

# Letters: B rows at work, V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from openm6.generate.decode import DecodeStep, Speaker
from openm6.generate.matrices import Precision
from openm6.generate.sampling import Sampling, filtered_rows, gumbel

Way = Literal["likeliest", "whole", "filtered"]
# Rows of a pass from which on a product's bits do not depend on how many more there are (measured, MKL).
FEWEST = 16
STRIDE = 64  # keys are looked at in whole multiples of this many


@dataclass(eq=False)
class Row:
    """A text on its way: what was drawn, and where it stands. `key` is the caller's own mark."""

    key: Any
    sampling: Sampling
    place: int  # position of the next token
    token: int  # the last token, which is not in the cache yet
    tokens: list[int] = field(default_factory=list)
    scores: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    top: int | None = None
    nats: float = 0.0  # negative log-likelihood of what was drawn


class TextRows:
    """Rows 0 to n-1 of a slot cache are at work; a row that ends gives its slot to the last one."""

    def __init__(
        self,
        speaker: Speaker,
        rows: int,
        room: int,
        precision: Precision = "float32",
        deterministic: bool = False,
    ) -> None:
        """`deterministic` pads every pass to whole multiples of 16 rows and multiplies by all experts.

        Padding rows write to slots that nobody uses yet; their state is set anew when a row takes the slot.
        """
        self.speaker = speaker
        self.deterministic = deterministic
        slots = -(-rows // FEWEST) * FEWEST if deterministic else rows
        self.capacity = rows
        self.cache = speaker.new_slots(slots, room)
        self.step_of = DecodeStep(speaker, self.cache, precision, deterministic)
        self.rows: list[Row] = []
        device = self.cache.keys.device
        self.token, self.place, self.length, self.seed, self.draw, self.active = (
            torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(6)
        )
        self.top_k = torch.zeros_like(self.token)
        self.temperature, self.top_p = (torch.zeros(slots, device=device) for _ in range(2))

    @property
    def free(self) -> int:
        """Rows that may be added."""
        return self.capacity - len(self.rows)

    @property
    def next_slot(self) -> int:
        """The slot into which the prompt of the next row is to be read."""
        return len(self.rows)

    def add(self, key: Any, sampling: Sampling, place: int, token: int, top: int | None = None) -> Row:
        """A row whose prompt stands in `next_slot`; `token` opens its text at position `place`."""
        row = Row(key, sampling, place, token, top=top)
        self._set(len(self.rows), row)
        self.rows.append(row)
        return row

    def _set(self, slot: int, row: Row) -> None:
        sampling = row.sampling
        vocabulary = len(self.speaker.head)
        self.token[slot], self.place[slot] = row.token, row.place
        self.length[slot], self.seed[slot] = self.cache.lengths[slot], sampling.seed
        self.draw[slot], self.temperature[slot] = len(row.tokens), sampling.temperature
        self.active[slot] = 1
        self.top_k[slot] = min(sampling.top_k or vocabulary, vocabulary)
        self.top_p[slot] = 1.0 if sampling.top_p is None else sampling.top_p

    def remove(self, row: Row) -> None:
        """Takes a row out, ended or not; the last row moves into its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot != last:
            self.cache.move(last, slot)
            self._set(slot, self.rows[last])
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        for state in (self.length, self.place, self.active, self.temperature):
            state[last] = 0

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Draws the next token of every row; gives the rows that have reached their end or their bound."""
        count = len(self.rows)
        longest = max(self.cache.lengths[:count]) + 1
        longest = min(-(-longest // STRIDE) * STRIDE, self.cache.room)
        drawn, logits = self._run(self._padded(count), longest, self._way())
        logits, drawn = logits[:count], drawn[:count]
        chosen = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(-1)  # B
        return self._settle(drawn.tolist(), chosen.tolist(), logits)

    def _padded(self, count: int) -> int:
        """Rows of a pass that has `count` to write."""
        return -(-count // FEWEST) * FEWEST if self.deterministic else count

    def _way(self) -> Way:
        """How the rows of this pass are drawn: the least that all of them need."""
        settings = [row.sampling for row in self.rows]
        if all(sampling.temperature == 0 for sampling in settings):
            return "likeliest"
        whole = all(sampling.top_k is None and sampling.top_p is None for sampling in settings)
        return "whole" if whole else "filtered"

    def _run(self, batch: int, longest: int, way: Way) -> tuple[Tensor, Tensor]:
        """Draws, and moves the state of the rows on; all of it on the device.  # -> B, B V"""
        token, place, length = self.token[:batch], self.place[:batch], self.length[:batch]
        logits = self.step_of(token, place, length, longest)  # B V
        drawn = self._drawn(logits, way)
        token.copy_(drawn)
        active = self.active[:batch]
        for counter in (place, length, self.draw[:batch]):
            counter += active  # padding stays where it is: it must not walk out of its slot
        return drawn, logits

    def _drawn(self, logits: Tensor, way: Way) -> Tensor:
        """Each row's choice by its own settings.  # B V -> B"""
        if way == "likeliest":
            return logits.argmax(-1)
        batch = len(logits)
        temperature = self.temperature[:batch, None]
        scores = logits / torch.where(temperature > 0, temperature, 1.0)
        if way == "filtered":
            scores = filtered_rows(scores, self.top_k[:batch], self.top_p[:batch])
        noise = gumbel(self.seed[:batch], self.draw[:batch], logits.shape[-1])
        return torch.where(temperature > 0, scores + noise, logits).argmax(-1)

    def _settle(self, drawn: list[int], chosen: list[float], logits: Tensor) -> list[Row]:
        ended = []
        scored = {slot for slot, row in enumerate(self.rows) if row.top is not None}
        for slot, (row, token) in enumerate(zip(self.rows, drawn, strict=True)):
            row.token = token
            row.place += 1
            self.cache.lengths[slot] += 1
            row.tokens.append(token)
            row.nats -= chosen[slot]
            if slot in scored:
                row.scores.append(_score(logits[slot], token, row.top or 0))
            full = self.cache.lengths[slot] + 1 >= self.cache.room
            if token == self.speaker.end or len(row.tokens) >= row.sampling.max_tokens or full:
                ended.append(row)
        return ended


def _score(logits: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token and those of the likeliest few.  # V"""
    scores = logits.log_softmax(-1)
    best = scores.topk(top) if top else None
    rivals = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return float(scores[token]), rivals
