"""`openm6 serve`: the HTTP API of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.train import Trained
from openm6.core.errors import ConfigError

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.PATH=VALUE]...", help="engine.max_num_seqs=32, limits.pixels=…"),
]
Keys = Annotated[
    Path | None, typer.Option("--keys", metavar="FILE", help="API keys, one per line; else OPENM6_API_KEYS.")
]
Hosts = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="HOST", help="Images may be fetched from there, by https."),
]
Replicas = Annotated[
    list[str] | None,
    typer.Option(
        "--replicas", metavar="KEY=VALUE", help="With --ray: least=1 most=4 ongoing=8 cpus=1 gpus=1."
    ),
]


def serve(
    trained: Trained,
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
    """Serve a trained model: chat, images, speech, embeddings and numbers in OpenAI's formats.

    \b
    Example: openm6 serve runs/demo --port 8000
    """
    settings = [f"host={host}", f"port={port}", *(settings or [])]
    if allow_host:
        settings.append(f"hosts={json.dumps(allow_host)}")
    # torch takes seconds to import, and the server's packages are an extra
    from openm6.serve.run import read_serve_config
    from openm6.serve.run import serve as serve_api

    config = read_serve_config(settings, keys)
    if ray:
        if playground:
            raise ConfigError("--playground keeps its visits in one process: leave it out with --ray")
        # Ray is an extra of its own
        from openm6.serve.replicas import serve_replicas

        serve_replicas(trained, config, name, replicas)
    elif playground:
        # only this page needs its packages
        from openm6.serve.playground.page import add_playground

        serve_api(trained, config, name, configure_app=add_playground)
    else:
        serve_api(trained, config, name)
