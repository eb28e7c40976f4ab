"""Decoding settings, and sampling from scores: greedy, temperature, top-k, top-p; each row draws from its own seed."""

# Shapes: B rows, V choices

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from openm6.core.config import Config, apply_overrides, build
from openm6.ops.random_bits import uniform

MAX_SEED = 2**62  # answers of a list draw from the next seeds, in 64 bits
MAX_TOKENS = 2**17  # for which a cache is allocated


class Sampling(Config):
    """How the next token of a text is chosen; temperature 0 takes the most likely one.

    `repetition_penalty`: above 1, tokens of the prompt and of the answer so far are less likely (see `penalize`).
    """

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    max_tokens: int = Field(default=64, ge=1, le=MAX_TOKENS)
    seed: int = Field(default=0, ge=-MAX_SEED, le=MAX_SEED)


class MaskedSampling(Config):
    """How codes are decoded in parallel.

    The pass without the prompt, for guidance, runs in every `unprompted_every`-th step, counted back from the last one;
    the steps between use its last hidden states, those before the first one go unguided, and with `guidance` 0 there is
    none. `noise` is added to the confidences, less of it with every step.
    """

    steps: int = Field(default=8, ge=1, le=256)
    guidance: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    unprompted_every: int = Field(default=2, ge=1)
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    noise: float = Field(default=2.0, ge=0, allow_inf_nan=False)
    order: Literal["confidence", "random"] = "confidence"
    seed: int = Field(default=0, ge=-MAX_SEED, le=MAX_SEED)

    def runs_unprompted(self, step: int) -> bool:
        """Whether a step, the first of which is 1, includes the pass without the prompt."""
        return self.guidance > 0 and (self.steps - step) % self.unprompted_every == 0

    @property
    def passes(self) -> int:
        """Passes over the codes, with and without the prompt."""
        return self.steps + sum(map(self.runs_unprompted, range(1, self.steps + 1)))


class Decoding(Config):
    """How answers are decoded: texts by `text`, images and audio by `masked`."""

    text: Sampling = Sampling()
    masked: MaskedSampling = MaskedSampling()


def read_decoding(settings: list[str]) -> Decoding:
    """Return decoding settings from `key=value` words, such as `masked.steps=16`; ConfigError if one is wrong."""
    return build(Decoding, apply_overrides({}, settings), "decoding")


def gumbel(seed: Tensor, draw: Tensor, *shape: int) -> Tensor:
    """Standard Gumbel noise, a function of (seed, index of the draw, position): anywhere equal.  # B, B -> B *shape"""
    noise = uniform(seed, draw, math.prod(shape))
    return -(-noise.log_()).log_().view(len(seed), *shape)


def draw_from(scores: Tensor, quantile: Tensor) -> Tensor:
    """Draw from the softmax of scores, by one number in (0, 1) for each row.  # B V, B -> B"""
    mass = scores.softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(mass, quantile[:, None] * mass[:, -1:])[:, 0]
    return drawn.clamp(max=scores.shape[-1] - 1)  # of NaN: an index beyond the end would stop a GPU


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive scores of tokens that were seen, multiply negative ones (arXiv 1909.05858, section 4.1).

    # B V, B V bool, B -> B V
    """
    penalty = torch.where(seen, penalty[:, None], 1.0)
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def filter_logits(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set to -inf what is outside the top k (V: all) or the smallest set of mass p (1: all).  # B V, B, B -> B V"""
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(logits.shape[-1], device=logits.device) >= top_k[:, None]
    mass = ordered.masked_fill(beyond, float("-inf")).softmax(-1)
    before = mass.cumsum(-1) - mass  # mass of the more likely ones
    beyond |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), float("-inf"))
