"""What replicas ask of Ray, and what the driver does itself; Ray is replaced by what is called of it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from openm6.core.errors import CheckpointError, ConfigError
from openm6.serve.config import EngineConfig, ServeConfig

MODULE = "openm6.serve.replicas"


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with a Ray that keeps the settings of deployments and runs nothing."""
    ray, serve = ModuleType("ray"), ModuleType("ray.serve")
    ray.serve = serve  # type: ignore[attr-defined]
    for name in ("start", "run", "shutdown", "deployment"):
        setattr(serve, name, Mock())
    serve.ingress = lambda build: lambda: build  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    before = sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]
    if before is not None:
        sys.modules[MODULE] = before


@pytest.mark.parametrize(
    ("device", "there", "settings", "gpus"),
    [
        ("auto", True, {}, 1.0),
        ("auto", False, {}, 0.0),
        ("cuda", False, {}, 1.0),  # of another machine of the cluster
        ("cpu", True, {}, 0.0),
        ("auto", True, {"gpus": 0.5}, 0.5),
        ("cpu", False, {"gpus": 2}, 2.0),
    ],
)
def test_a_replica_asks_for_the_gpu_that_it_will_use(
    device: str, there: bool, settings: dict[str, float], gpus: float, replicas: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    config = ServeConfig(engine=EngineConfig(device=device))
    replicas.run_replicas(lambda: None, config, replicas.ReplicaConfig(**settings))
    asked = replicas.ray_serve.deployment.call_args.kwargs["ray_actor_options"]
    assert asked == {"num_cpus": 1.0, "num_gpus": gpus}


def test_a_gpu_by_its_number_is_rays_choice(replicas: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use --device cuda, without a number"):
        replicas.serve_replicas(tmp_path, ServeConfig(engine=EngineConfig(device="cuda:1")))


def test_the_driver_loads_no_model_and_each_replica_its_own(
    replicas: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loads = Mock(return_value=SimpleNamespace())
    monkeypatch.setattr(replicas, "load", loads)
    with pytest.raises(CheckpointError, match="no run or checkpoint"):
        replicas.serve_replicas(tmp_path / "nowhere", ServeConfig())
    monkeypatch.setattr(replicas, "latest", lambda path: path)
    monkeypatch.setattr(replicas, "read_texts", lambda path: None)
    monkeypatch.setattr(replicas, "Engine", Mock())
    monkeypatch.setattr(replicas, "create_app", Mock())
    # Of this module alone: other threads wait for events as well.
    interrupted = SimpleNamespace(Event=Mock(side_effect=KeyboardInterrupt), Timer=Mock())
    monkeypatch.setattr(replicas, "threading", interrupted)
    built = Mock()
    monkeypatch.setattr(replicas, "deployment", lambda build, settings: built(build))
    with pytest.raises(KeyboardInterrupt):
        replicas.serve_replicas(tmp_path / "run", ServeConfig(engine=EngineConfig(device="cpu")))
    loads.assert_not_called()
    (build,) = built.call_args.args
    build()
    loads.assert_called_once_with((tmp_path / "run").resolve(), "cpu", None)
