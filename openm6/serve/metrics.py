"""Counters of a server for Prometheus, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from openm6.serve.engine import Engine
from openm6.serve.requests import Answer

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
JOULES = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)


class Metrics:
    """Requests, latencies, tokens and joules by kind of request; the queue as it is when asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "openm6_requests", "Requests by kind and HTTP status", ["kind", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "openm6_request_seconds",
            "Time to the whole answer",
            ["kind"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "openm6_first_token_seconds",
            "Time to the first token of a text",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("openm6_tokens", "Tokens read and given", ["direction"], registry=self.registry)
        self.joules = Histogram(
            "openm6_request_joules", "Energy of a request", ["kind"], buckets=JOULES, registry=self.registry
        )
        for name, about, read in (
            ("openm6_queue_requests", "Requests that wait", lambda: len(engine.queue)),
            ("openm6_queue_tokens", "Tokens of work that wait", lambda: engine.queue.work),
        ):
            Gauge(name, about, registry=self.registry).set_function(read)

    def count(self, kind: str, status: int) -> None:
        """One HTTP response."""
        self.requests.labels(kind, str(status)).inc()

    def add(self, kind: str, answer: Answer) -> None:
        """One answer."""
        self.seconds.labels(kind).observe(answer.seconds)
        if answer.first:
            self.first.observe(answer.first)
        self.tokens.labels("read").inc(answer.usage.prompt)
        self.tokens.labels("given").inc(answer.usage.given)
        if answer.joules is not None:
            self.joules.labels(kind).observe(answer.joules)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
