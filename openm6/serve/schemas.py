"""Fields of several responses: usage, energy, distributions, rankings, whether the question was trained."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from pydantic import BaseModel, Field

from openm6.core.errors import DataError
from openm6.core.seeds import derive_seed
from openm6.inference.engine import RankedText, rank_texts
from openm6.inference.question import Coverage, assess
from openm6.inference.sampling import MaskedSampling
from openm6.modalities.histogram import Histogram
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


class MediaUsage(BaseModel):
    """Tokens as OpenAI counts those of images and transcriptions."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class EnergyReply(BaseModel):
    """Joules of a response; `joules_source` is nvml, rapl or estimate. Null if nothing measures it."""

    joules: float | None = Field(default=None, description="energy of this response in joules")
    joules_source: str | None = None

    def with_energy(self, answers: Sequence[Answer]) -> Self:
        measured = [answer.joules for answer in answers if answer.joules is not None]
        self.joules = sum(measured) if measured else None
        self.joules_source = next((answer.energy_source for answer in answers if answer.energy_source), None)
        return self


class CoveredReply(EnergyReply):
    """Joules, and whether the model was trained on such questions; if not, `note` names what it was trained on."""

    trained: bool = Field(default=True, description="false if the model was never trained on such a question")
    note: str | None = None

    def with_coverage(
        self,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        description: CheckpointConfig,
        language: str = "en",
    ) -> Self:
        """Set the joules, and `trained` and `note` by the first request that was not trained."""
        for request, answer in zip(requests, answers, strict=True):
            coverage = coverage_of(request, answer, description)
            if self.trained and not coverage.trained:
                self.trained, self.note = False, coverage.message(language)
        return self.with_energy(answers)


class Distribution(BaseModel):
    """In the column's own units, lists for several steps; `low` to `high` should hold `coverage` of the truths."""

    mean: float | list[float]
    median: float | list[float]
    low: float | list[float]
    high: float | list[float]
    coverage: float


def usage_of(answers: list[Answer], one_prompt: bool = True) -> TokenUsage:
    """Return the usage of several answers: what is generated adds up; one prompt is read once, others add up too."""
    read = [answer.usage for answer in answers[: 1 if one_prompt else None]]
    generated = sum(answer.usage.generated for answer in answers)
    counts = Counter[str]()
    for usage in read:
        counts.update({f"{modality}_tokens": tokens for modality, tokens in usage.by_modality.items()})
    return TokenUsage(
        prompt_tokens=counts.total(),
        completion_tokens=generated,
        total_tokens=counts.total() + generated,
        prompt_tokens_details=PromptDetails(cached_tokens=sum(usage.cached for usage in read), **counts),
    )


def coverage_of(request: Request, answer: Answer, description: CheckpointConfig) -> Coverage:
    """Return whether a request was trained; embeddings are refused elsewhere if they were not."""
    is_vector = isinstance(request, EmbedRequest)
    return Coverage() if is_vector else assess(request.parts, request.output, description, answer.confidence)


def distribution_of(histogram: Histogram, coverage: float) -> Distribution:
    found = (histogram.mean(), histogram.median(), *histogram.interval(coverage))
    if not all(np.isfinite(one).all() for one in found):
        raise DataError("the prediction is too large for a number: give values of a smaller size")
    mean, median, low, high = map(_rounded, found)
    return Distribution(mean=mean, median=median, low=low, high=high, coverage=coverage)


def rank_candidates(texts: Sequence[str], value: list[tuple[float, int]], normalize: bool = True) -> list[RankedText]:
    """Return the candidates of a ranking, the best first; `value` holds nats and tokens of each."""
    return rank_texts(texts, [nll for nll, _ in value], [length for _, length in value], normalize)


def _rounded(values: np.ndarray) -> float | list[float]:
    rounded = [float(f"{value:.6g}") for value in values]
    return rounded[0] if len(rounded) == 1 else rounded


def chosen_seed(seed: int | None) -> int:
    return secrets.randbelow(MAX_SEED) if seed is None else seed


def masked_sampling(steps: int | None, guidance: float | None, seed: int) -> MaskedSampling:
    """Return settings without those that are None: they are the model's own."""
    given = {"steps": steps, "guidance": guidance, "seed": seed}
    return MaskedSampling.model_validate({name: value for name, value in given.items() if value is not None})


def seed_of(seed: int, index: int) -> int:
    """Return the seed of one of several answers: the first has the client's own."""
    return seed if index == 0 else derive_seed(seed, "answer", index) % MAX_SEED
