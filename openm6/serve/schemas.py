"""Fields that several responses share: usage, energy, distributions, rankings, whether a question was trained for."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Annotated, TypeVar

import numpy as np
from pydantic import BaseModel, Field

from openm6.core.seeds import derive_seed
from openm6.inference.coverage import Coverage, assess
from openm6.modalities.numbers import Histogram
from openm6.models.description import CheckpointConfig
from openm6.serve.requests import Answer, EmbedRequest, Request

MAX_SEED = 2**31 - 1
Seed = Annotated[int | None, Field(ge=0, le=MAX_SEED)]
Steps = Annotated[int, Field(ge=1, le=64)]
Guidance = Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)]


class PromptDetails(BaseModel):
    """Prompt tokens by modality; `cached_tokens` of them were in the prefix cache."""

    cached_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    numbers_tokens: int = 0


class TokenUsage(BaseModel):
    """Prompt tokens and generated tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Energy(BaseModel):
    """Joules of a response; `joules_source` is nvml, rapl or estimate. Null if nothing measures it."""

    joules: float | None = Field(default=None, description="energy of this response in joules")
    joules_source: str | None = None


class Teaching(BaseModel):
    """Whether the model was trained for such a question; if not, `note` says what it was trained on."""

    taught: bool = Field(default=True, description="false if the model was never trained for such a question")
    note: str | None = None


class Distribution(BaseModel):
    """In the column's own units, lists for several steps; `low` to `high` should hold `coverage` of the truths."""

    mean: float | list[float]
    median: float | list[float]
    low: float | list[float]
    high: float | list[float]
    coverage: float


class RankedCandidate(BaseModel):
    """A candidate; log_likelihood is the sum over its tokens, in nats."""

    index: int
    candidate: str
    log_likelihood: float
    score: float


EnergyReply = TypeVar("EnergyReply", bound=Energy)
TeachingReply = TypeVar("TeachingReply", bound=Teaching)


def usage_of(answers: list[Answer]) -> TokenUsage:
    """Return the usage of several answers to one prompt: it is read once, what is generated adds up."""
    usage = answers[0].usage
    generated = sum(answer.usage.generated for answer in answers)
    counts = {f"{modality}_tokens": tokens for modality, tokens in usage.by_modality.items()}
    return TokenUsage(
        prompt_tokens=usage.prompt,
        completion_tokens=generated,
        total_tokens=usage.prompt + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=usage.cached, **counts),
    )


def with_energy(reply: EnergyReply, answers: Sequence[Answer]) -> EnergyReply:
    """Set the joules of a response to those of its answers together."""
    measured = [answer.joules for answer in answers if answer.joules is not None]
    reply.joules = sum(measured) if measured else None
    reply.joules_source = next((answer.energy_source for answer in answers if answer.energy_source), None)
    return reply


def verdict_on(request: Request, answer: Answer, description: CheckpointConfig) -> Coverage:
    """Return whether a request was trained for; embeddings are refused elsewhere if they were not."""
    if isinstance(request, EmbedRequest):
        return Coverage()
    return assess(request.parts, request.output, description, answer.confidence)


def with_teaching(
    reply: TeachingReply,
    requests: Sequence[Request],
    answers: Sequence[Answer],
    description: CheckpointConfig,
    language: str = "en",
) -> TeachingReply:
    """Set `taught` and `note` of a response by its first request that was not trained for."""
    for request, answer in zip(requests, answers, strict=True):
        verdict = verdict_on(request, answer, description)
        if not verdict.trained:
            reply.taught, reply.note = False, verdict.message(language)
            break
    return reply


def distribution_of(histogram: Histogram, coverage: float) -> Distribution:
    """Return mean, median and central interval of one value, or of several."""
    low, high = histogram.interval(coverage)
    return Distribution(
        mean=_rounded(histogram.mean()),
        median=_rounded(histogram.median()),
        low=_rounded(low),
        high=_rounded(high),
        coverage=coverage,
    )


def rank_candidates(
    texts: Sequence[str], value: list[tuple[float, int]], normalise: bool = True
) -> list[RankedCandidate]:
    """Return the candidates of a ranking, the best first; `value` holds nats and tokens of each."""
    found = [
        RankedCandidate(
            index=index,
            candidate=texts[index],
            log_likelihood=-nats,
            score=-nats / length if normalise else -nats,
        )
        for index, (nats, length) in enumerate(value)
    ]
    return sorted(found, key=lambda ranked: (-ranked.score, ranked.index))


def _rounded(values: np.ndarray) -> float | list[float]:
    rounded = [float(f"{value:.6g}") for value in values]
    return rounded[0] if len(rounded) == 1 else rounded


def chosen_seed(seed: int | None) -> int:
    """Return the client's seed, or a random one."""
    return secrets.randbelow(MAX_SEED) if seed is None else seed


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one of several answers: the first has the client's own."""
    return seed if index == 0 else derive_seed(seed, "answer", index) % MAX_SEED
