"""`openm6 serve`: the HTTP API of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.train import Device, Dtype, Trained
from openm6.core.errors import ConfigError


def serve(
    trained: Trained,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings: engine.max_num_seqs=32, limits.pixels=…"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Model name in requests; default: the folder.")] = None,
    keys: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of API keys, one per line; default: OPENM6_API_KEYS.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="Host of images to fetch by https; repeatable.")
    ] = None,
    playground: Annotated[
        bool, typer.Option("--playground", help="Add a page for the browser at /playground.")
    ] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Run replicas on Ray Serve; needs the extra [ray].")] = False,
    replicas: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With --ray: min_replicas, max_replicas, cpus, gpus, …"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a trained model over HTTP, with routes that follow the OpenAI API.

    \b
    Example: openm6 serve runs/demo --port 8000
    """
    settings = [f"host={host}", f"port={port}", f"engine.device={device}", *(settings or [])]
    if allow_host:
        settings.append(f"hosts={json.dumps(allow_host)}")
    # torch takes seconds to import, and the server's packages are an extra
    from openm6.inference.load import precision_of
    from openm6.serve.run import read_serve_config
    from openm6.serve.run import serve as serve_api

    precision = precision_of(dtype)
    settings = [*settings, f"engine.weights={precision}"] if precision else settings

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
