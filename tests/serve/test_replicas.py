"""Two replicas on this machine answer as one server: both are used, streams pass, equal seeds give equal answers."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

ray = pytest.importorskip("ray", reason="ray is not installed: pip install '.[ray]'")

from ray import serve  # noqa: E402

from openm6.serve.config import EngineConfig, ServeConfig  # noqa: E402
from openm6.serve.engine import Engine  # noqa: E402
from openm6.serve.replicas import APPLICATION, ReplicaConfig, deployment, run_replicas  # noqa: E402
from openm6.serve.run import create_app  # noqa: E402
from tests.small_model import loaded  # noqa: E402

pytestmark = pytest.mark.slow


def small_app() -> FastAPI:
    """An app that also tells which process it lives in."""
    app = create_app(Engine(loaded(), EngineConfig(max_model_len=256)), name="tiny")

    @app.get("/process")
    async def process() -> int:
        return os.getpid()

    return app


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    patience = pytest.MonkeyPatch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A machine that is busy with other tests starts Ray's proxy slower than Ray is willing to wait.
    patience.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "90")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        run_replicas(small_app, ServeConfig(port=port), ReplicaConfig(min_replicas=2, max_replicas=2, cpus=0.5))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as found:
            yield found
    finally:
        serve.shutdown()
        ray.shutdown()
        patience.undo()


def chat(client: httpx.Client, seed: int) -> str:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "draw"}],
        "max_tokens": 6,
        "temperature": 1.0,
        "seed": seed,
    }
    return client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_both_replicas_run_and_are_asked(client: httpx.Client) -> None:
    running = serve.status().applications[APPLICATION].deployments["model"].replica_states
    assert {str(state): count for state, count in running.items()} == {"RUNNING": 2}
    assert len({client.get("/process").json() for _ in range(60)}) == 2


def test_equal_seeds_give_equal_answers_wherever_they_are_answered(client: httpx.Client) -> None:
    assert len({chat(client, 5) for _ in range(8)}) == 1


def test_a_stream_passes(client: httpx.Client) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "draw"}],
        "max_tokens": 4,
        "stream": True,
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[0].startswith("data: {") and lines[-1] == "data: [DONE]"


def test_errors_keep_their_form(client: httpx.Client) -> None:
    refused = client.post("/v1/scenarios/restyle", json={"inputs": {"image": "x"}})
    assert refused.status_code == 400
    assert "needs training on style_transfer" in refused.json()["error"]["message"]


def test_autoscaling_keeps_to_its_bounds() -> None:
    made = deployment(small_app, ReplicaConfig(min_replicas=1, max_replicas=3, target_ongoing_requests=4))
    scaling = made._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 3, 4)
    with pytest.raises(ValidationError, match="must not exceed"):
        ReplicaConfig(min_replicas=3, max_replicas=1)
