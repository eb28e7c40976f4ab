"""Choosing one of many by scores: greedy, temperature, top-k, top-p; each row draws from its own seed."""

# Letters: B rows, V choices

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from openm6.base.config import Config
from openm6.ops.random_bits import uniform


class Sampling(Config):
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: int = Field(default=64, ge=1)
    seed: int = 0


def gumbel(seed: Tensor, draw: Tensor, *shape: int) -> Tensor:
    """Standard Gumbel noise that is a function of (seed, number of the draw, position).  # B, B -> B *shape

    So a row draws the same alone or in a batch, on a CPU or a GPU, and within a captured graph.
    """
    noise = uniform(seed, draw, math.prod(shape))
    return -(-noise.log_()).log_().view(len(seed), *shape)


class RowNoise:
    """Noise of a number of rows, each from its own seed, one draw after the other."""

    def __init__(self, seeds: list[int], device: torch.device | str = "cpu") -> None:
        self.seed = torch.tensor(seeds, device=device)
        self.draw = torch.zeros_like(self.seed)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel noise.  # -> B *shape"""
        noise = gumbel(self.seed, self.draw, *shape)
        self.draw += 1
        return noise


def filtered(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Scores with everything outside the top k, and outside the smallest set of mass p, at minus infinity.  # B V"""
    rows, choices = logits.shape
    k = torch.full((rows,), min(top_k or choices, choices), device=logits.device)
    p = torch.full((rows,), 1.0 if top_p is None else top_p, device=logits.device)
    return filtered_rows(logits, k, p)


def filtered_rows(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The same with a k and a p for each row; V and 1 leave all.  # B V, B, B -> B V"""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= top_k[:, None]
    mass = ordered.masked_fill(beyond, float("-inf")).softmax(-1)
    before = mass.cumsum(-1) - mass  # mass of the likelier ones
    beyond |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), float("-inf"))


def choose(logits: Tensor, sampling: Sampling, noise: RowNoise) -> Tensor:
    """One choice a row: the likeliest, or a draw by the Gumbel trick.  # B V -> B"""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    scores = logits / sampling.temperature
    if sampling.top_k is not None or sampling.top_p is not None:
        scores = filtered(scores, sampling.top_k, sampling.top_p)
    return (scores + noise.gumbel(logits.shape[-1]).to(scores.device)).argmax(-1)
