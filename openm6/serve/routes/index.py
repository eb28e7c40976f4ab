"""`/`: where everything is, for whoever opens the bare address."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from openm6.serve.guard import PLAYGROUND

router = APIRouter(include_in_schema=False)

LINKS = {"documentation": "/docs", "models": "/v1/models", "health": "/health", "ready": "/ready"}


@router.get("/")
async def index(http: Request) -> Response:
    """The playground where there is one, else a few links."""
    if getattr(http.app.state, "playground", False):
        return RedirectResponse(PLAYGROUND)
    return JSONResponse({"name": http.app.title, "version": http.app.version, **LINKS})
