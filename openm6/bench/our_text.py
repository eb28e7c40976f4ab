"""Our side of the benchmark of text: prompts of ids through rows that come and go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from openm6.generate.rows import TextRows
from openm6.generate.sampling import Sampling
from openm6.ops.sequence import causal_layout


@dataclass
class Seen:
    """Tokens given, and when the first and the last token of each request came, in seconds from the start."""

    tokens: int = 0
    first: dict[int, float] = field(default_factory=dict)
    last: dict[int, float] = field(default_factory=dict)


@torch.inference_mode()
def answer_prompts(
    rows: TextRows, prompts: list[list[int]], given: int, moments: list[float] | None = None
) -> Seen:
    """All prompts through the rows, greedily, each from its moment on (None: all are there at once)."""
    moments = [0.0] * len(prompts) if moments is None else moments
    waiting, seen = list(enumerate(prompts)), Seen()
    sampling = Sampling(max_tokens=given)
    began = time.perf_counter()
    while waiting or rows.rows:
        now = time.perf_counter() - began
        if not rows.rows and moments[waiting[0][0]] > now:
            time.sleep(moments[waiting[0][0]] - now)
        while waiting and rows.free and moments[waiting[0][0]] <= time.perf_counter() - began:
            number, prompt = waiting.pop(0)
            _read(rows, prompt)
            rows.add(number, sampling, len(prompt) - 1, prompt[-1])
        ended = rows.step()
        now = time.perf_counter() - began
        seen.tokens += len(rows.rows)
        for row in rows.rows:
            seen.first.setdefault(row.key, now)
        for row in ended:
            seen.last[row.key] = now
            rows.remove(row)
    return seen


def _read(rows: TextRows, prompt: list[int]) -> None:
    """All but the last token, which the first step runs."""
    speaker = rows.speaker
    ids: Tensor = torch.tensor([prompt[:-1]], device=speaker.embedding.device)
    layout = causal_layout(1, len(prompt) - 1, device=ids.device)
    embedded = torch.nn.functional.embedding(ids, speaker.embedding)
    speaker.backbone(embedded, layout, rows.cache.writer(rows.next_slot))
