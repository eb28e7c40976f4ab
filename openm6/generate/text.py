"""Text, one token after the other, from cached keys and values."""

# Letters: B prompts, V vocabulary

from __future__ import annotations

import torch
from torch import Tensor

from openm6.generate.load import Loaded
from openm6.generate.prompt import Prompt, Reading, read_prompts
from openm6.generate.sampling import RowNoise, Sampling, choose
from openm6.modalities.text import Text


@torch.inference_mode()
def write(loaded: Loaded, prompts: list[Prompt], sampling: Sampling) -> list[str]:
    """The text that follows each prompt, until its end mark or `max_tokens`; row i draws from seed + i."""
    reading = read_prompts(loaded.omni, prompts, sampling.max_tokens + 1)
    noise = RowNoise([sampling.seed + row for row in range(len(prompts))])
    text = loaded.text
    token = torch.full((len(prompts),), text.start, device=reading.place.device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=token.device)
    unsayable = _unsayable(text, token.device)
    written: list[Tensor] = []
    for step in range(sampling.max_tokens):
        logits = next_logits(reading, token, step)
        logits = logits.masked_fill(unsayable, float("-inf"))
        token = torch.where(ended, text.end, choose(logits, sampling, noise))
        ended = ended | (token == text.end)
        written.append(token)
        if bool(ended.all()):
            break
    rows = torch.stack(written, 1).tolist() if written else [[] for _ in prompts]
    return [text.decode(row[: row.index(text.end)] if text.end in row else row) for row in rows]


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
