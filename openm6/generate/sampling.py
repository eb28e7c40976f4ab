"""Choosing one of many by scores: greedy, temperature, top-k, top-p; each row draws from its own seed."""

# Letters: B rows, V choices

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from openm6.base.config import Config


class Sampling(Config):
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=64, ge=1)
    seed: int = 0


class RowNoise:
    """Noise from one generator per row, so that a row gets the same answer alone or in a crowd."""

    def __init__(self, seeds: list[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel noise.  # -> B *shape"""
        rows = [torch.rand(shape, generator=generator) for generator in self.generators]
        uniform = torch.stack(rows).clamp(1e-9, 1 - 1e-7)
        return -(-uniform.log()).log()


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Scores with everything outside the top k, and outside the smallest set of mass p, at minus infinity.  # B V"""
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the likelier ones
        outside = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def choose(logits: Tensor, sampling: Sampling, noise: RowNoise) -> Tensor:
    """One choice a row: the likeliest, or a draw by the Gumbel trick.  # B V -> B"""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = filtered(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return (scores + noise.gumbel(logits.shape[-1]).to(scores.device)).argmax(-1)
