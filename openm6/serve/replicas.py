"""`openm6 serve --ray`: the same app as replicas on Ray Serve, one model each, more of them under load."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import Field, model_validator
from ray import serve as ray_serve

from openm6.checkpoint.folder import latest
from openm6.core.config import Config, apply_overrides
from openm6.core.config import build as build_config
from openm6.core.errors import ConfigError
from openm6.core.log import get_log
from openm6.hub.find import find_model
from openm6.inference.load import load, read_texts
from openm6.serve.config import ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app, warn_without_keys

APPLICATION = "openm6"


class ReplicaConfig(Config):
    """How many replicas, and the resources of each.

    min_replicas, max_replicas: the range of autoscaling; equal numbers switch it off
    target_ongoing_requests: per replica; Ray queues requests above twice as many
    max_queued_requests: requests that may wait in Ray before more are answered with 503
    cpus, gpus: what one replica occupies; gpus by default: 1 if there is a GPU and --device does not exclude it
    """

    min_replicas: int = Field(default=1, ge=1, le=1024)
    max_replicas: int = Field(default=1, ge=1, le=1024)
    target_ongoing_requests: float = Field(default=8.0, gt=0)
    max_queued_requests: int = Field(default=256, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _in_order(self) -> ReplicaConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} must not exceed max_replicas={self.max_replicas}")
        return self


def deployment(build: Callable[[], FastAPI], replicas: ReplicaConfig) -> ray_serve.Application:
    """Return an app, built in the process of each replica, as a Ray Serve application; each answers whole requests."""
    scaling = replicas.model_dump(include={"min_replicas", "max_replicas", "target_ongoing_requests"})
    is_fixed = replicas.min_replicas == replicas.max_replicas
    replicated = ray_serve.deployment(
        name="model",
        num_replicas=replicas.min_replicas if is_fixed else None,
        autoscaling_config=None if is_fixed else scaling,
        max_ongoing_requests=max(1, round(2 * replicas.target_ongoing_requests)),
        max_queued_requests=replicas.max_queued_requests,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus or 0.0},
    )
    return replicated(ray_serve.ingress(build)()).bind()


def run_replicas(build: Callable[[], FastAPI], config: ServeConfig, replicas: ReplicaConfig) -> None:
    """Start the replicas, on this machine or on its cluster; return when they answer."""
    device = config.engine.device
    if replicas.gpus is None:
        has_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        replicas = replicas.model_copy(update={"gpus": float(has_gpu)})
    ray_serve.start(http_options={"host": config.host, "port": config.port})
    ray_serve.run(deployment(build, replicas), name=APPLICATION, route_prefix="/")


def app_of(trained: Path, config: ServeConfig, name: str) -> FastAPI:
    engine = Engine(load(trained, config.engine.device, config.engine.num_gpu_layers), config.engine)
    # Ray replaces a replica that has ended; the delay lets its last answers out.
    engine.on_failure = threading.Timer(1.0, os._exit, (1,)).start
    return create_app(engine, config, name)


def serve_replicas(
    trained: Path | str, config: ServeConfig, name: str | None = None, settings: list[str] | None = None
) -> None:
    """Serve a model (a folder or name, else CheckpointError) on Ray until interrupted; `settings`: ReplicaConfig's."""
    if config.engine.device.startswith("cuda:"):
        raise ConfigError("Ray assigns each replica its own GPU: use --device cuda, without a number")
    replicas = build_config(ReplicaConfig, apply_overrides({}, settings or []), "--ray")
    folder = find_model(trained).resolve()
    read_texts(latest(folder))  # an error is raised here, not in every replica
    warn_without_keys(config)
    run_replicas(partial(app_of, folder, config, name or folder.name), config, replicas)
    get_log().info(f"serving {trained} on http://{config.host}:{config.port}/docs")
    try:
        threading.Event().wait()
    finally:
        ray_serve.shutdown()
