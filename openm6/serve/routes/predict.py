"""`/v1/predict`: rows of a table or a series in, numbers with intervals out."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from openm6.modalities.interface import Part
from openm6.modalities.series import NumberSeries
from openm6.serve.content import Series, part_prompt
from openm6.serve.errors import DOCUMENTED, BadRequestError, check_limit
from openm6.serve.middleware import StrictRoute
from openm6.serve.requests import NumbersRequest
from openm6.serve.schemas import Distribution, EnergyReply, TokenUsage, distribution_of, usage_of
from openm6.serve.server import ThisCall

router = APIRouter(prefix="/v1", tags=["numbers"], route_class=StrictRoute, responses=DOCUMENTED)

Row = dict[str, float | None]


class PredictionBody(BaseModel):
    """Either `rows` with the `columns` to predict (default: those that are null), or a `series` and steps `ahead`."""

    model: str | None = None
    rows: list[Row] | None = Field(default=None, min_length=1, max_length=256)
    columns: list[str] | None = Field(default=None, min_length=1, max_length=16)
    series: Series | None = None
    ahead: int = Field(default=8, ge=1, le=64)
    coverage: float = Field(default=0.8, gt=0, lt=1)


class PredictedRow(BaseModel):
    """A distribution for each predicted column; of a forecast, one for each step ahead."""

    index: int
    columns: dict[str, Distribution]


class Predictions(EnergyReply):
    object: Literal["list"] = "list"
    model: str
    data: list[PredictedRow]
    usage: TokenUsage


@router.post("/predict")
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
    rows: dict[int, dict[str, Distribution]] = {}
    for (index, request), answer in zip(requests, answers, strict=True):
        rows.setdefault(index, {})[request.name] = distribution_of(answer.value, body.coverage)
    data = [PredictedRow(index=index, columns=columns) for index, columns in rows.items()]
    return Predictions(model=server.name, data=data, usage=usage_of(answers)).with_energy(answers)


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
