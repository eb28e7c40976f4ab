"""`openm6 bench giant`: streamed training of a given size, measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door

Whole = Annotated[int, typer.Option(min=1)]


def giant(
    width: Whole = 128,
    layers: Whole = 6,
    experts: Whole = 8,
    hidden: Annotated[int, typer.Option("--hidden", min=8, help="Width of one expert.")] = 128,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Experts a token.")] = 1,
    rows: Whole = 4,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of a row.")] = 256,
    vocabulary: Whole = 2048,
    size: Annotated[int, typer.Option("--bytes", metavar="16|4|2|1", help="Bytes a parameter.")] = 2,
    resident: Annotated[
        str, typer.Option("--resident", help="Layers that stay on the device: a number, or auto.")
    ] = "0",
    micro_batches: Annotated[int, typer.Option("--micro-batches", min=1)] = 2,
    recompute_every: Annotated[int, typer.Option("--recompute-every", min=1)] = 1,
    boundaries: Annotated[
        str, typer.Option("--boundaries", help="device or host: where inputs of layers wait.")
    ] = "device",
    margin: Annotated[float, typer.Option("--margin", help="GiB that auto leaves free.")] = 4.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 4,
    curve: Annotated[
        bool, typer.Option("--curve", help="Also the time of a step by the share of layers streamed.")
    ] = False,
    peer: Annotated[
        str | None, typer.Option("--peer", help="deepspeed: the largest size that it trains.")
    ] = None,
    seconds: Annotated[float, typer.Option("--seconds", help="No new part begins after so long.")] = 420.0,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")
    ] = None,
) -> None:
    """Train a streamed model for a few steps and say where the time goes.

    \b
    Example: openm6 bench giant --width 4096 --layers 51 --experts 32 --hidden 4096 --rows 32 --length 2048
    --bytes 2 --resident auto --micro-batches 4 --json giant.json
    """
    sizes = (
        width, layers, experts, hidden, top_k, rows, length, vocabulary, size, resident, micro_batches,
        recompute_every, boundaries, margin,
    )  # fmt: skip
    door("bench giant")(door("giant size")(*sizes), steps, peer, curve, seconds, json_path)
