"""`openm6 plan`: what a run takes before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan there as JSON.")]


def plan(
    model: Annotated[
        str | None, typer.Argument(metavar="PRESET|RECIPE", help="A preset, a recipe, or a run's folder.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings to change.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="KIND", help="From the table; left out: this machine.")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many.")] = 1,
    per_node: Annotated[int, typer.Option("--per-node", min=1, help="GPUs in a node.")] = 8,
    gpu_table: Annotated[
        Path | None, typer.Option("--gpu-table", metavar="CSV", help="Further GPUs, one a row.")
    ] = None,
    host_memory: Annotated[
        float | None, typer.Option("--host-memory", min=0, metavar="GIB", help="Memory of a node.")
    ] = None,
    link: Annotated[
        float | None, typer.Option("--link", metavar="GB/S", help="Host to GPU, each way.")
    ] = None,
    network: Annotated[
        float | None, typer.Option("--network", metavar="GB/S", help="Between nodes, for each GPU.")
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="TOKENS", help="A step of one GPU.")] = None,
    tokens: Annotated[float | None, typer.Option("--tokens", help="Budget, as 3e11.")] = None,
    days: Annotated[float | None, typer.Option("--days", help="Time that there is.")] = None,
    bytes_per_parameter: Annotated[
        int | None,
        typer.Option("--bytes", help="A parameter: 16, 12, 8, 4, 2 or 1; left out: the most that fit."),
    ] = None,
    pseudo_share: Annotated[
        float, typer.Option("--pseudo-share", help="Part of the tokens while layers share weights.")
    ] = 0.0,
    country: Annotated[str, typer.Option("--country", help="Whose current it is.")] = "WLD",
    pue: Annotated[float, typer.Option("--pue", help="Joules of the building a joule of the devices.")] = 1.1,
    price: Annotated[float | None, typer.Option("--price", metavar="USD", help="Of a GPU and hour.")] = None,
    sweep: Annotated[
        str | None, typer.Option("--sweep", metavar="gpus|bytes|batch", help="Plans side by side.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the sweep (SVG, PNG or PDF).")
    ] = None,
    json_path: Json = None,
    check: Annotated[
        Path | None, typer.Option("--check", metavar="RUN", help="Compare with what that run measured.")
    ] = None,
) -> None:
    """Say what a run will take: bytes, seconds, joules, and whether it fits.

    \b
    Example: openm6 plan m6-10t --gpus 512 --gpu v100-32gb --days 10 --json plan.json
    """
    if check is not None:
        door("show check")(door("check plan")(check), json_path)
        return
    options = door("cluster options")(
        devices=gpus,
        per_node=per_node,
        host_memory=host_memory,
        host_link=link,
        network=network,
        price=price,
    )
    asked = door("plan machine")(gpu, gpu_table, options)
    question = door("plan question")(
        model,
        overrides or [],
        batch=batch,
        tokens=tokens,
        days=days,
        bytes_per_parameter=bytes_per_parameter,
        pseudo_share=pseudo_share,
        energy={"country": country, "pue": pue},
    )
    if sweep is not None:
        door("show sweep")(question, asked, sweep, plot, json_path)
    else:
        door("show plan")(question, asked, json_path)
