"""The container files, as far as they can be held to the package without building an image."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import typer.main
import yaml

from openm6.cli.main import app

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SERVICE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["openm6"]


def test_the_command_is_one_that_the_program_understands() -> None:
    found = re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert found is not None
    words = json.loads(found.group(1))
    command = typer.main.get_command(app)
    assert words[0] == "openm6"
    serve = command.commands[words[1]]  # type: ignore[attr-defined]
    context = serve.make_context("serve", [*words[2:], *SERVICE["command"]], resilient_parsing=False)
    assert context.params["host"] == "0.0.0.0" and context.params["playground"]
    assert str(context.params["model"]) == SERVICE["volumes"][0].split(":")[1]


def test_a_container_is_healthy_while_its_engine_is_ready_and_can_compile() -> None:
    assert "/ready" in DOCKERFILE.split("HEALTHCHECK")[1].splitlines()[1]
    assert "gcc libc6-dev" in DOCKERFILE and "TRITON_CACHE_DIR=/tmp/" in DOCKERFILE and "/tmp:exec" in SERVICE["tmpfs"]


def test_what_is_copied_and_installed_exists() -> None:
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        for name in shlex.split(line)[:-1]:
            assert (ROOT / name).exists(), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "serve" in extras["project"]["optional-dependencies"] and '".[serve]"' in DOCKERFILE


def test_the_service_is_closed_to_the_world() -> None:
    assert all(port.startswith("127.0.0.1:") for port in SERVICE["ports"])
    assert "OPENM6_API_KEYS" in SERVICE["environment"]
    assert (
        SERVICE["read_only"]
        and SERVICE["restart"] == "unless-stopped"
        and SERVICE["cap_drop"] == ["ALL"]
        and "USER openm6" in DOCKERFILE
    )
