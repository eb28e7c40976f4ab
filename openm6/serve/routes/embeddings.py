"""`/v1/embeddings`: one vector of unit length for each text, picture or sound."""

from __future__ import annotations

import base64
from itertools import chain
from typing import Literal

import numpy as np
from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from openm6.inference.engine import embedding_size
from openm6.modalities.interface import Part
from openm6.serve.content import ContentPart, joined, parts_of_content, pictures_in
from openm6.serve.errors import DOCUMENTED, BadRequestError
from openm6.serve.guard import StrictRoute
from openm6.serve.replies import ask_all
from openm6.serve.requests import Answer, EmbedRequest
from openm6.serve.schemas import Energy, joules_of
from openm6.serve.state import Server, ThisClient, ThisServer

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=StrictRoute, responses=DOCUMENTED)

Item = str | ContentPart
MOST = 256


class Embedding(BaseModel):
    """Texts, as OpenAI's, or parts of a message (image_url, input_audio, numbers)."""

    input: str | ContentPart | list[Item]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)


class Vector(BaseModel):
    """`embedding` is a list, or base64 of little-endian fp32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class VectorUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Vectors(Energy):
    """Vectors in the order of what was sent."""

    object: Literal["list"] = "list"
    model: str
    data: list[Vector]
    usage: VectorUsage


@router.post("/embeddings")
async def embed(body: Embedding, server: ThisServer, client: ThisClient, http: HTTPRequest) -> Vectors:
    """Vectors whose scalar products tell how alike things are."""
    server.check_model(body.model or "default")
    width = embedding_size(server.engine.loaded)
    if body.dimensions not in (None, width):
        raise BadRequestError(f"dimensions={body.dimensions} is not offered: use {width}", "dimensions")
    items = body.input if isinstance(body.input, list) else [body.input]
    if not 1 <= len(items) <= MOST:
        raise BadRequestError(f"input must hold 1 to {MOST} things", "input")
    named = (pictures_in([item], f"input.{n}") for n, item in enumerate(items) if not isinstance(item, str))
    await server.fetcher.bring(chain.from_iterable(named))
    requests = [
        EmbedRequest(parts=_parts(server, item, number), client=client, seconds=server.config.limits.seconds)
        for number, item in enumerate(items)
    ]
    answers = await ask_all(server, http, "embeddings", requests)
    joules, source = joules_of(answers)
    read = sum(answer.usage.prompt for answer in answers)
    return Vectors(
        model=server.name,
        data=[_vector(number, answer, body.encoding_format) for number, answer in enumerate(answers)],
        usage=VectorUsage(prompt_tokens=read, total_tokens=read),
        joules=joules,
        joules_source=source,
    )


def _parts(server: Server, item: Item, number: int) -> tuple[Part, ...]:
    where = f"input.{number}"
    limits = server.config.limits
    parts = joined(parts_of_content(item if isinstance(item, str) else [item], limits, where), limits, where)
    if not parts:
        raise BadRequestError(f"{where} is empty: leave it out", where)
    return parts


def _vector(number: int, answer: Answer, form: str) -> Vector:
    values = np.asarray(answer.value, "<f4")
    if form == "base64":
        return Vector(index=number, embedding=base64.b64encode(values.tobytes()).decode())
    return Vector(index=number, embedding=values.tolist())
