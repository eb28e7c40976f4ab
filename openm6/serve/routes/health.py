"""`/health`, `/ready` and `/metrics`: whether the server lives, takes requests, and how it fares."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from openm6.serve.errors import DOCUMENTED
from openm6.serve.state import ThisServer

router = APIRouter(tags=["state"])


class Health(BaseModel):
    """`ok` while the process answers at all."""

    status: Literal["ok"] = "ok"
    waiting: int


@router.get("/health")
async def health(server: ThisServer) -> Health:
    """Whether the server is alive, and how many requests wait."""
    return Health(waiting=len(server.engine.queue))


@router.get("/ready", responses={503: DOCUMENTED[503]})
async def ready(server: ThisServer) -> Health:
    """Whether the engine takes requests; 503 where it does not."""
    if not server.engine.ready:
        raise server.engine.stopped
    return Health(waiting=len(server.engine.queue))


@router.get("/metrics", response_class=PlainTextResponse, responses={401: DOCUMENTED[401]})
async def metrics(server: ThisServer) -> Response:
    """Counters in Prometheus' text format."""
    return Response(server.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")
