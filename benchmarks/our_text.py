"""Our side of the benchmark of text: prompts of ids through rows that come and go."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch

from openm6.inference.sampling import Sampling
from openm6.inference.text import TextRows
from openm6.ops.sequence import causal_meta, join
from openm6.serve.config import EngineConfig


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
            now = moments[waiting[0][0]]
        arrived: list[tuple[int, list[int]]] = []
        while waiting and rows.free > len(arrived) and _fits(arrived, waiting[0][1]):
            if moments[waiting[0][0]] > now:
                break
            arrived.append(waiting.pop(0))
        if arrived:
            _read(rows, [prompt for _, prompt in arrived])
        for number, prompt in arrived:
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


def _fits(arrived: list[tuple[int, list[int]]], prompt: list[int]) -> bool:
    """Whether one more prompt may be read in the same pass, as the engine's `prefill` has it."""
    return not arrived or sum(len(other) for _, other in arrived) + len(prompt) <= EngineConfig().prefill


def _read(rows: TextRows, prompts: list[list[int]]) -> None:
    """All but the last token of each, which the first step runs; several packed in one row."""
    speaker = rows.speaker
    device = speaker.embedding.device
    ids = torch.tensor([token for prompt in prompts for token in prompt[:-1]], device=device)
    layouts = [causal_meta(1, len(prompt) - 1, device=device) for prompt in prompts]
    slots = [rows.next_slot + number for number in range(len(prompts))]
    embedded = torch.nn.functional.embedding(ids[None], speaker.embedding)
    if len(prompts) == 1:
        speaker.backbone(embedded, layouts[0], rows.cache.writer(slots[0]))
        return
    layout = join([replace(part, example_id=part.example_id + n) for n, part in enumerate(layouts)])
    speaker.backbone(embedded, layout, rows.cache.packed_writer(slots))
