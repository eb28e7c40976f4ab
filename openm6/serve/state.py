"""What every route shares: the engine, the settings, the model's name, and who is asking."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from openm6.serve.config import ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.errors import BadRequestError
from openm6.serve.fetching import Fetcher
from openm6.serve.metrics import Metrics
from openm6.serve.scenarios.scores import Scores


@dataclass(frozen=True)
class Server:
    """One model behind one address."""

    engine: Engine
    config: ServeConfig
    name: str
    metrics: Metrics
    fetcher: Fetcher
    scores: Scores = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    def check_model(self, name: str) -> None:
        """Refuses another model's name.

        Raises:
            BadRequestError: it is not the one that is served.
        """
        if name not in (self.name, "default"):
            raise BadRequestError(f"no model is called {name!r} here: use {self.name!r}", "model")


def _server(request: Request) -> Server:
    found = request.app.state.server
    assert isinstance(found, Server)
    return found


def _client(request: Request) -> str:
    """The key's number where keys are asked for, else the address."""
    key = request.scope.get("openm6.client")
    address = request.client.host if request.client else ""
    return key if isinstance(key, str) else address


ThisServer = Annotated[Server, Depends(_server)]
ThisClient = Annotated[str, Depends(_client)]
