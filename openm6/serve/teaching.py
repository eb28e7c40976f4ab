"""What a response says of whether its question was trained for."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

from openm6.inference.taught import Taught, assess
from openm6.models.description import ModelDescription
from openm6.serve.requests import Answer, CodesRequest, EmbedRequest, NumbersRequest, Request


class Teaching(BaseModel):
    """Whether the model was trained for such a question; if not, `note` says what it was trained on."""

    taught: bool = Field(
        default=True, description="false where the model was never trained for such a question"
    )
    note: str | None = None


def target_of(request: Request) -> str:
    """The modality in which a request is answered."""
    if isinstance(request, CodesRequest):
        return request.want
    return "numbers" if isinstance(request, NumbersRequest) else "text"


def taught_of(request: Request, answer: Answer, description: ModelDescription) -> Taught:
    """The verdict on a request and its answer; embeddings are refused elsewhere where they were not trained."""
    if isinstance(request, EmbedRequest):
        return Taught()
    return assess(request.parts, target_of(request), description, answer.confidence)


def teaching_of(
    requests: Sequence[Request],
    answers: Sequence[Answer],
    description: ModelDescription,
    language: str = "en",
) -> tuple[bool, str | None]:
    """`taught` and `note` of several answers: of the first that was not trained for."""
    for request, answer in zip(requests, answers, strict=True):
        found = taught_of(request, answer, description)
        if not found.taught:
            return False, found.said(language)
    return True, None
