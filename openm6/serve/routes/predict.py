"""`/v1/predict`: rows of a table or a series in, numbers with intervals out."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from fastapi import Request as HTTPRequest
from pydantic import BaseModel, Field

from openm6.modalities.interface import Part
from openm6.modalities.numbers import NumberSeries
from openm6.serve.content import Series
from openm6.serve.distributions import Distribution, described
from openm6.serve.errors import DOCUMENTED, BadRequestError
from openm6.serve.guard import StrictRoute
from openm6.serve.replies import ask_all
from openm6.serve.requests import NumbersRequest
from openm6.serve.schemas import Energy, TokenUsage, joules_of, usage_of
from openm6.serve.state import Server, ThisClient, ThisServer
from openm6.serve.words import part_in_words

router = APIRouter(prefix="/v1", tags=["numbers"], route_class=StrictRoute, responses=DOCUMENTED)

Row = dict[str, float | None]


class Prediction(BaseModel):
    """Either `rows` with the `columns` wanted (default: those that are null), or a `series` and steps `ahead`."""

    model: str | None = None
    rows: list[Row] | None = Field(default=None, min_length=1, max_length=256)
    columns: list[str] | None = Field(default=None, min_length=1, max_length=16)
    series: Series | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class PredictedRow(BaseModel):
    """A distribution for each wanted column; of a forecast, one for each step ahead."""

    index: int
    columns: dict[str, Distribution]


class Predictions(Energy):
    object: Literal["list"] = "list"
    model: str
    data: list[PredictedRow]
    usage: TokenUsage


@router.post("/predict")
async def predict(body: Prediction, server: ThisServer, client: ThisClient, http: HTTPRequest) -> Predictions:
    """Predicts missing columns of rows, or goes on with a series."""
    server.check_model(body.model or "default")
    asked = _asked(server, body, client)
    answers = await ask_all(server, http, "predict", [request for _, _, request in asked])
    rows: dict[int, dict[str, Distribution]] = {}
    for (index, column, _), answer in zip(asked, answers, strict=True):
        rows.setdefault(index, {})[column] = described(answer.value, body.coverage)
    joules, source = joules_of(answers)
    return Predictions(
        model=server.name,
        data=[PredictedRow(index=index, columns=columns) for index, columns in rows.items()],
        usage=usage_of(answers),
        joules=joules,
        joules_source=source,
    )


def _asked(server: Server, body: Prediction, client: str) -> list[tuple[int, str, NumbersRequest]]:
    """One request for each row and column: the model was taught to give one column at a time."""
    if (body.rows is None) == (body.series is None):
        raise BadRequestError("give either rows or series", "rows")
    seconds = server.config.limits.seconds
    if body.series is not None:
        name = body.series.name
        parts = part_in_words("forecast", Part("numbers", NumberSeries(name, body.series.values)))
        return [
            (
                0,
                name,
                NumbersRequest(parts=parts, client=client, seconds=seconds, series=name, ahead=body.ahead),
            )
        ]
    found = []
    for index, row in enumerate(body.rows or []):
        if not 1 <= len(row) <= server.config.limits.columns:
            raise BadRequestError(
                f"rows.{index} must hold 1 to {server.config.limits.columns} columns", f"rows.{index}"
            )
        wanted = body.columns or [name for name, value in row.items() if value is None]
        if not wanted:
            raise BadRequestError(
                f"rows.{index} lacks nothing: set what is wanted to null, or name columns", "columns"
            )
        for column in wanted:
            given = {name: value for name, value in row.items() if name not in wanted}
            if not given:
                raise BadRequestError(
                    f"rows.{index} gives no value to predict from: add one", f"rows.{index}"
                )
            parts = part_in_words("predict_number", Part("numbers", given), column=column)
            request = NumbersRequest(parts=parts, client=client, seconds=seconds, columns=(column,))
            found.append((index, column, request))
    if len(found) > server.config.limits.rows:
        raise BadRequestError(
            f"{len(found)} predictions exceed {server.config.limits.rows}: send fewer rows", "rows"
        )
    return found
