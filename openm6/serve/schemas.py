"""Pieces of responses that several routes share."""

from __future__ import annotations

import secrets

from pydantic import BaseModel, Field

from openm6.base.seeds import derive_seed
from openm6.serve.requests import Answer, Usage

MAX_SEED = 2**31 - 1


class PromptDetails(BaseModel):
    """Prompt tokens by modality; `cached_tokens` of them had been read before."""

    cached_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    audio_tokens: int = 0
    numbers_tokens: int = 0


class TokenUsage(BaseModel):
    """Tokens read and given."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Energy(BaseModel):
    """Joules of a response; `source` says who counted: nvml, rapl or estimate. Null where nothing counts."""

    joules: float | None = Field(default=None, description="energy of this response in joules")
    joules_source: str | None = None


def usage_of(answers: list[Answer]) -> TokenUsage:
    """Usage of several answers to one prompt: it is read once, what is given adds up."""
    read: Usage = answers[0].usage
    given = sum(answer.usage.given for answer in answers)
    details = PromptDetails(
        cached_tokens=read.cached,
        text_tokens=read.read.get("text", 0),
        image_tokens=read.read.get("image", 0),
        audio_tokens=read.read.get("audio", 0),
        numbers_tokens=read.read.get("numbers", 0),
    )
    return TokenUsage(
        prompt_tokens=read.prompt,
        completion_tokens=given,
        total_tokens=read.prompt + given,
        prompt_tokens_details=details,
    )


def joules_of(answers: list[Answer]) -> tuple[float | None, str | None]:
    """Joules of several answers together."""
    counted = [answer.joules for answer in answers if answer.joules is not None]
    source = next((answer.source for answer in answers if answer.source), None)
    return (sum(counted) if counted else None), source


def chosen_seed(seed: int | None) -> int:
    """The client's seed, or a fresh one."""
    return secrets.randbelow(MAX_SEED) if seed is None else seed


def seed_of(seed: int, number: int) -> int:
    """The seed of the n-th of several answers: the first has the client's own."""
    return seed if number == 0 else derive_seed(seed, "answer", number) % MAX_SEED
