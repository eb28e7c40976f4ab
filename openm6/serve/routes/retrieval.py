"""`/v1/embeddings` and `/v1/rank`: vectors, and candidates in the order of their likelihood."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field

from openm6.serve.content import Content, ContentPart, parts_of_content
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import EmbedRequest, RankRequest
from openm6.serve.schemas import EnergyReply, RankedCandidate, TokenUsage, rank_candidates, usage_of
from openm6.serve.server import Server, ThisCall

router = APIRouter(prefix="/v1", route_class=StrictRoute, responses=DOCUMENTED)

Item = str | ContentPart
Candidate = Annotated[str, Field(min_length=1, max_length=4096)]
MAX_ITEMS = 256


class EmbeddingBody(BaseModel):
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


class Vectors(EnergyReply):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Vector]
    usage: VectorUsage


class RankingBody(BaseModel):
    """`query` is a text or parts of a message. `normalise` divides by the number of tokens, so that length is free."""

    query: Content
    candidates: list[Candidate] = Field(min_length=1, max_length=256)
    model: str | None = None
    normalise: bool = True
    top: int | None = Field(default=None, ge=1)


class Ranking(EnergyReply):
    """The likeliest first."""

    object: Literal["list"] = "list"
    model: str
    data: list[RankedCandidate]
    usage: TokenUsage


@router.post("/embeddings", tags=["embeddings"])
async def embed(body: EmbeddingBody, call: ThisCall) -> Vectors:
    """Vectors whose scalar products are similarities."""
    server = call.server
    server.check_model(body.model)
    size = server.loaded.pool.size
    if body.dimensions not in (None, size):
        raise BadRequestError(f"dimensions={body.dimensions} is not offered: use {size}", "dimensions")
    items = body.input if isinstance(body.input, list) else [body.input]
    if not 1 <= len(items) <= MAX_ITEMS:
        raise BadRequestError(f"input must hold 1 to {MAX_ITEMS} items", "input")
    contents: list[Content] = [item if isinstance(item, str) else [item] for item in items]
    await server.fetcher.fetch_all((f"input.{index}", content) for index, content in enumerate(contents))
    requests = await asyncio.to_thread(_embed_requests, server, contents)
    answers = await call.answer("embeddings", requests)
    tokens = sum(answer.usage.prompt for answer in answers)
    data = []
    for index, answer in enumerate(answers):
        values = np.asarray(answer.value, "<f4")
        packed = base64.b64encode(values.tobytes()).decode() if body.encoding_format == "base64" else values.tolist()
        data.append(Vector(index=index, embedding=packed))
    usage = VectorUsage(prompt_tokens=tokens, total_tokens=tokens)
    return Vectors(model=server.name, data=data, usage=usage).with_energy(answers)


def _embed_requests(server: Server, contents: list[Content]) -> list[EmbedRequest]:
    found = []
    for index, content in enumerate(contents):
        parts = parts_of_content(content, server.limits, f"input.{index}")
        if not parts:
            raise BadRequestError(f"input.{index} is empty: leave it out", f"input.{index}")
        found.append(EmbedRequest(parts=parts))
    return found


@router.post("/rank", tags=["rank"])
async def rank(body: RankingBody, call: ThisCall) -> Ranking:
    """Orders candidates by how likely they follow the query."""
    server = call.server
    server.check_model(body.model)
    check_limit("candidates", len(body.candidates), server.limits.candidates, "texts")
    await server.fetcher.fetch_all([("query", body.query)])
    parts = await asyncio.to_thread(parts_of_content, body.query, server.limits, "query")
    answers = await call.answer("rank", [RankRequest(parts=parts, candidates=tuple(body.candidates))])
    ranked = rank_candidates(body.candidates, answers[0].value, body.normalise)
    return Ranking(model=server.name, data=ranked[: body.top], usage=usage_of(answers)).with_energy(answers)
