"""The OpenAPI document is true: whatever it allows is answered as it says, and nothing ends in a 5xx."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from openm6.serve.config import EngineConfig, Limits, ServeConfig
from openm6.serve.engine import Engine
from openm6.serve.run import create_app
from tests.serve.running import running
from tests.small_model import loaded

EXAMPLES = 4  # in each run of the tests; `python -m tests.load.fuzz` does more
APP = create_app(
    Engine(loaded(3), EngineConfig(max_num_seqs=2, max_model_len=128)),
    ServeConfig(limits=Limits(tokens=8, answers=2)),
    "tiny",
)
SCHEMA = schemathesis.openapi.from_dict(APP.openapi())
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running(APP) as found:
        yield found


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_every_route_does_as_the_document_says(case: schemathesis.Case, address: str) -> None:
    case.call_and_validate(base_url=address, checks=CHECKS)


def test_every_route_is_described() -> None:
    paths = APP.openapi()["paths"]
    expected = {
        "/v1/models", "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits", "/v1/audio/speech",
        "/v1/audio/transcriptions", "/v1/embeddings", "/v1/predict", "/v1/rank", "/v1/models/{model}",
        "/v1/scenarios", "/v1/scenarios/{name}", "/health", "/ready", "/metrics",
    }  # fmt: skip
    assert expected == set(paths)
    for path, operations in paths.items():
        for method, operation in operations.items():
            assert operation["summary"] and "422" not in operation["responses"]
            documented = {"400", "401", "413", "429", "503"} if method == "post" else {"401"}
            assert documented <= set(operation["responses"]) or path in ("/health", "/ready")
