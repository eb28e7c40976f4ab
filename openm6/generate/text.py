"""Text, one token after the other, from cached keys and values."""

# Letters: B prompts, V vocabulary

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openm6.generate.load import Loaded
from openm6.generate.prompt import Prompt, Reading, read_prompts
from openm6.generate.sampling import RowNoise, Sampling, choose
from openm6.generate.taught import confidence_of
from openm6.modalities.text import Text


class Written(NamedTuple):
    """A text, and the geometric mean probability of its tokens, its end mark among them."""

    text: str
    confidence: float


def write(loaded: Loaded, prompts: list[Prompt], sampling: Sampling) -> list[str]:
    """The text that follows each prompt, until its end mark or `max_tokens`; row i draws from seed + i."""
    return [written.text for written in write_with_confidence(loaded, prompts, sampling)]


@torch.inference_mode()
def write_with_confidence(loaded: Loaded, prompts: list[Prompt], sampling: Sampling) -> list[Written]:
    """As `write`, with the confidence in each text."""
    reading = read_prompts(loaded.omni, prompts, sampling.max_tokens + 1)
    noise = RowNoise([sampling.seed + row for row in range(len(prompts))])
    text = loaded.text
    token = torch.full((len(prompts),), text.start, device=reading.place.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=token.device)
    unsayable = _unsayable(text, token.device)
    written: list[Tensor] = []
    nats = torch.zeros(len(prompts), device=token.device)
    for step in range(sampling.max_tokens):
        logits = next_logits(reading, token, step)
        logits = logits.masked_fill(unsayable, float("-inf"))
        token = torch.where(ended, text.end, choose(logits, sampling, noise))
        chosen = logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(-1)  # B
        nats -= torch.where(ended, 0.0, chosen)
        ended = ended | (token == text.end)
        written.append(token)
        if bool(ended.all()):
            break
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    found = []
    for row, lost in zip(rows, nats.tolist(), strict=True):
        words = row[: row.index(text.end)] if text.end in row else row
        count = min(len(words) + 1, len(row))
        found.append(Written(text.decode(words), confidence_of(lost, count)))
    return found


def _unsayable(text: Text, device: torch.device) -> Tensor:
    """Marks other than the end, which a text never holds.  # V bool"""
    token = torch.arange(text.vocabulary_size, device=device)
    return (token >= text.first_mark) & (token != text.end)


def next_logits(reading: Reading, token: Tensor, step: int) -> Tensor:
    """Scores of the token after `token`, the `step`-th of the wanted text.  # B -> B V"""
    grid = torch.full((1, 3), step, device=token.device)
    arrays = {"ids": token, "labels": torch.full_like(token, -1)}
    hidden = reading.run("text", arrays, reading.layout(step + 1, grid))  # B 1 D
    return reading.omni.text.logits(hidden[:, 0]).float()
