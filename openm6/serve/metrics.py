"""Counters of a server for Prometheus, in a registry of its own, and the middleware that counts responses."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openm6.serve.engine import Engine
from openm6.serve.requests import Answer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
JOULES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class Metrics:
    """Requests, latencies, tokens and joules by kind of request, and the length of the queue."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "openm6_requests", "Requests by kind and HTTP status", ["kind", "status"], registry=registry
        )
        self.seconds = Histogram(
            "openm6_request_seconds", "Time to the whole answer", ["kind"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "openm6_first_token_seconds",
            "Time to the first token of a text",
            buckets=SECONDS,
            registry=registry,
        )
        self.tokens = Counter("openm6_tokens", "Tokens read and given", ["direction"], registry=registry)
        self.joules = Histogram(
            "openm6_request_joules", "Energy of a request", ["kind"], buckets=JOULES, registry=registry
        )
        waiting = Gauge("openm6_queue_requests", "Requests that wait", registry=registry)
        waiting.set_function(lambda: len(engine.queue))
        work = Gauge("openm6_queue_tokens", "Tokens of work that wait", registry=registry)
        work.set_function(lambda: engine.queue.work)

    def count(self, kind: str, status: int) -> None:
        """Count one HTTP response."""
        self.requests.labels(kind, str(status)).inc()

    def add(self, kind: str, answer: Answer) -> None:
        """Count one answer."""
        self.seconds.labels(kind).observe(answer.seconds)
        if answer.first_token_seconds:
            self.first_token.observe(answer.first_token_seconds)
        self.tokens.labels("read").inc(answer.usage.prompt)
        self.tokens.labels("given").inc(answer.usage.generated)
        if answer.joules is not None:
            self.joules.labels(kind).observe(answer.joules)

    def page(self) -> bytes:
        """Return the text that Prometheus reads."""
        return generate_latest(self.registry)


class MetricsMiddleware:
    """Counts every response by route and status. Pure ASGI, around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Paths that do not exist share a label: a scan must not fill the memory with labels.
                route = scope.get("route")
                self.metrics.count(getattr(route, "path", "unknown"), message["status"])
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)
