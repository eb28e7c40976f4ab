"""Answers of one pass: `/v1/embeddings` and `/v1/rank` (vectors, candidates by likelihood), `/v1/predict` (numbers)."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, Field

from openm6.inference.engine import RankedText
from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve import schemas
from openm6.serve.content import Cell, ColumnName, Content, ContentPart, Series, part_prompt, parts_of_content
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.requests import EmbedRequest, NumbersRequest, RankRequest
from openm6.serve.server import Server, StrictRoute, ThisCall

router = APIRouter(prefix="/v1", route_class=StrictRoute, responses=DOCUMENTED)

Item = str | ContentPart
Candidate = Annotated[str, Field(min_length=1, max_length=4096)]
MAX_ITEMS = 256


class EmbeddingBody(BaseModel):
    """Texts, as OpenAI's, or parts of a message (image_url, input_audio, numbers)."""

    input: str | ContentPart | Annotated[list[Item], Field(fail_fast=True)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None  # float
    dimensions: int | None = Field(default=None, ge=1)


class Vector(BaseModel):
    """`embedding` is a list, or base64 of little-endian fp32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class VectorUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class Vectors(schemas.EnergyReply):
    """Vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Vector]
    usage: VectorUsage


class RankingBody(BaseModel):
    """`query` is a text or parts of a message. `normalize` divides by the number of tokens, so that length is free."""

    query: Content
    candidates: list[Candidate] = Field(min_length=1, max_length=256)
    model: str | None = None
    normalize: bool = True
    top: int | None = Field(default=None, ge=1)


class Ranking(schemas.EnergyReply):
    """The likeliest first."""

    object: Literal["list"] = "list"
    model: str
    data: list[RankedText]
    usage: schemas.TokenUsage


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
    check_limit("candidates", sum(map(len, body.candidates)), server.limits.characters, "characters")
    await server.fetcher.fetch_all([("query", body.query)])
    parts = await asyncio.to_thread(parts_of_content, body.query, server.limits, "query")
    answers = await call.answer("rank", [RankRequest(parts=parts, candidates=tuple(body.candidates))])
    ranked = schemas.rank_candidates(body.candidates, answers[0].value, body.normalize)
    return Ranking(model=server.name, data=ranked[: body.top], usage=schemas.usage_of(answers)).with_energy(answers)


Row = dict[ColumnName, Cell]


class PredictionBody(BaseModel):
    """Either `rows` with the `columns` to predict (default: those that are null), or a `series` and steps `ahead`."""

    model: str | None = None
    rows: list[Row] | None = Field(default=None, min_length=1, max_length=256)
    columns: list[ColumnName] | None = Field(default=None, min_length=1, max_length=16)
    series: Series | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class PredictedRow(BaseModel):
    """A distribution for each predicted column; of a forecast, one for each step ahead."""

    index: int
    columns: dict[str, schemas.Distribution]


class Predictions(schemas.EnergyReply):
    object: Literal["list"] = "list"
    model: str
    data: list[PredictedRow]
    usage: schemas.TokenUsage


@router.post("/predict", tags=["numbers"])
async def predict(body: PredictionBody, call: ThisCall) -> Predictions:
    """Predicts missing columns of rows, or continues a series."""
    server = call.server
    server.check_model(body.model)
    if (body.rows is None) == (body.series is None):
        raise BadRequestError("give either rows or series", "rows")
    if body.series is not None:
        series = NumberSeries(body.series.name, body.series.values)
        parts = part_prompt("time_series_forecasting", Part("numbers", series))
        requests = [(0, NumbersRequest(parts=parts, series=series, ahead=body.ahead))]
    else:
        requests = [
            (index, request)
            for index, row in enumerate(body.rows or [])
            for request in _row_requests(f"rows.{index}", row, body.columns, server.limits.columns)
        ]
    check_limit("rows", len(requests), server.limits.rows, "predictions")
    answers = await call.answer("predict", [request for _, request in requests])
    rows: dict[int, dict[str, schemas.Distribution]] = {}
    for (index, request), answer in zip(requests, answers, strict=True):
        rows.setdefault(index, {})[request.name] = schemas.distribution_of(answer.value, body.coverage)
    data = [PredictedRow(index=index, columns=columns) for index, columns in rows.items()]
    usage = schemas.usage_of(answers, one_prompt=False)
    return Predictions(model=server.name, data=data, usage=usage).with_energy(answers)


def _row_requests(param: str, row: Row, columns: list[str] | None, limit: int) -> list[NumbersRequest]:
    """One request for each column to predict: the model was trained on one column at a time."""
    if not row:
        raise BadRequestError(f"{param} must hold at least 1 column", param)
    check_limit(param, len(row), limit, "columns")
    targets = columns or [name for name, value in row.items() if value is None]
    if not targets:
        raise BadRequestError(f"{param} lacks nothing: set what is to be predicted to null, or name columns", "columns")
    inputs = {name: value for name, value in row.items() if name not in targets}
    if not inputs:
        raise BadRequestError(f"{param} holds no value to predict from: add one", param)
    return [
        NumbersRequest(
            parts=part_prompt("tabular_regression", Part("numbers", inputs), column=column), columns=(column,)
        )
        for column in targets
    ]
