"""`openm6 serve`: a checkpoint behind an address."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from openm6.base.config import apply_overrides, build
from openm6.base.errors import ConfigError
from openm6.base.log import get_log
from openm6.generate.load import load
from openm6.serve.app import create_app
from openm6.serve.config import ServeConfig
from openm6.serve.engine import Engine

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
    """
    loaded = load(trained, resident=config.engine.resident)
    app = dress(create_app(Engine(loaded, config.engine), config, name or trained.resolve().name))
    get_log().info(f"serving {trained} on http://{config.host}:{config.port}/docs")
    uvicorn.run(app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=5)
