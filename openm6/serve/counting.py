"""Counts every response by route and status, whoever gave it."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm6.serve.metrics import Metrics


class Counting:
    """Pure ASGI, around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths that do not exist share a label: a scan must not fill the memory with labels.
                route = scope.get("route")
                self.metrics.count(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        await self.app(scope, receive, counted)
