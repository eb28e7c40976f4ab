"""`openm6 serve`: a checkpoint behind an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from openm6.base.config import apply_overrides, build
from openm6.base.errors import ConfigError, EngineError
from openm6.base.log import get_log
from openm6.inference.load import load
from openm6.serve.app import create_app
from openm6.serve.config import ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.guard import PLAYGROUND
from openm6.serve.listening import address_of, bind, http_server, is_public

KEY_VARIABLE = "OPENM6_API_KEYS"


def read_serve_config(settings: list[str], keys: Path | None = None) -> ServeConfig:
    """Settings from `key=value` words; API keys come from a file (one a line) or from OPENM6_API_KEYS (commas).

    Raises:
        ConfigError: an unknown setting, or a file of keys that cannot be read or is empty.
    """
    values: dict[str, Any] = apply_overrides({}, settings)
    found = [key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip()]
    if keys is not None:
        try:
            found = [line.strip() for line in keys.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {keys} cannot be read: {error}") from None
        if not found:
            raise ConfigError(f"{keys} holds no key: write one on each line")
    return build(ServeConfig, {**values, "keys": [*values.get("keys", []), *found]}, "serve")


def serve(
    trained: Path,
    config: ServeConfig,
    name: str | None = None,
    dress: Callable[[FastAPI], FastAPI] = lambda app: app,
) -> None:
    """Serves a run or checkpoint until it is interrupted; `dress` may put more on the app, as a playground.

    Raises:
        CheckpointError: there is no model there.
        ConfigError: the address cannot be listened on.
        EngineError: the engine stopped by itself, and the server with it.
    """
    with bind(config.host, config.port) as listener:
        if is_public(listener) and not config.keys:
            get_log().warning(
                f"no API keys: whoever reaches {config.host} may ask the model, open the page and upload files; "
                f"set {KEY_VARIABLE} or --keys"
            )
        engine = Engine(load(trained, resident=config.engine.resident), config.engine)
        app = dress(create_app(engine, config, name or trained.resolve().name))
        server = http_server(app, config.limits)
        engine.on_failure = partial(setattr, server, "should_exit", True)
        address = address_of(listener)
        get_log().info(f"serving {trained} on {address}/docs")
        if getattr(app.state, "playground", False):
            get_log().info(f"playground on {address}{PLAYGROUND}")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    if engine.failure is not None:
        raise EngineError(engine.failure)
