"""`openm6 serve`: the HTTP API of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from openm6.base.errors import ConfigError
from openm6.cli.doors import door

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="engine.rows=32, limits.pixels=…")
]
Keys = Annotated[
    Path | None, typer.Option("--keys", metavar="FILE", help="API keys, one a line; else OPENM6_API_KEYS.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="Pictures may be fetched from there, by https."),
]
Replicas = Annotated[
    list[str] | None,
    typer.Option(
        "--replicas", metavar="KEY=VALUE", help="With --ray: least=1 most=4 ongoing=8 cpus=1 gpus=1."
    ),
]


def serve(
    trained: Annotated[
        Path, typer.Argument(metavar="RUN|CHECKPOINT", help="Folder of a run or of one checkpoint.")
    ],
    settings: Settings = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535)] = 8000,
    name: Annotated[str | None, typer.Option("--name", help="What clients call the model.")] = None,
    keys: Keys = None,
    allow_host: Hosts = None,
    playground: Annotated[
        bool, typer.Option("--playground", help="A page to try it in the browser, at /playground.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="As replicas on Ray Serve; see --replicas. Needs the extra [ray].")
    ] = False,
    replicas: Replicas = None,
) -> None:
    """Serve a trained model: chat, pictures, speech, embeddings and numbers in OpenAI's forms.

    \b
    Example: openm6 serve runs/demo --port 8000
    """
    settings = [f"host={host}", f"port={port}", *(settings or [])]
    if allow_host:
        settings.append(f"hosts={json.dumps(allow_host)}")
    config = door("serve config")(settings, keys)
    if ray:
        if playground:
            raise ConfigError("--playground keeps its visits in one process: leave it out with --ray")
        door("serve replicas")(trained, config, name, replicas)
        return
    dress = {"dress": door("playground")} if playground else {}
    door("serve")(trained, config, name, **dress)
