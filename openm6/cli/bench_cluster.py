"""`openm6 bench rank`, `cluster`, `exchange`, `scaling` and `reshard`: what many ranks do, on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.doors import door

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")]
Of = Annotated[str, typer.Option("--of", metavar="PRESET", help="The model of which a rank has a share.")]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Ranks of the whole run.")]
Seconds = Annotated[float, typer.Option("--seconds", help="No new part begins after so long.")]


def rank(
    of: Of = "m6-10t",
    ranks: Ranks = 512,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 3,
    seconds: Seconds = 420.0,
    json: Json = None,
) -> None:
    """Train one rank's share of a large model, at each share of layers offloaded; small without a GPU.

    \b
    Example: openm6 bench rank --of m6-10t --ranks 512 --json rank.json
    """
    door("bench rank")(of, ranks, steps, seconds, json)


def cluster(
    of: Of = "m6-10t",
    ranks: Ranks = 512,
    rank: Annotated[int, typer.Option("--rank", min=0, help="Which of them.")] = 0,
    shards: Annotated[int, typer.Option("--shards", min=1, help="Ranks that cut the same experts.")] = 1,
    layers: Annotated[
        int | None, typer.Option("--layers", min=1, help="Fewer layers, for a quick look.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a rank.")] = 4,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of a row.")] = 1024,
    json: Json = None,
) -> None:
    """Rehearse a step of one rank of many without memory: bytes held, collectives and their bytes.

    \b
    Example: openm6 bench cluster --of m6-10t --ranks 512 --json cluster.json
    """
    door("bench cluster")(of, ranks, rank, shards, layers, rows, length, json)


def exchange(
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes.")] = 8,
    parts: Annotated[int, typer.Option("--parts", min=1, help="Pieces in which rows travel.")] = 2,
    json: Json = None,
) -> None:
    """Hold experts dealt out to ranks, with real numbers, against one process that has them all.

    \b
    Example: openm6 bench exchange --ranks 16
    """
    door("bench exchange")(ranks, parts, json)


def scaling(
    processes: Annotated[str, typer.Option("--processes", metavar="1,2,4", help="How many.")] = "1,2,4",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a step, of all processes.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 8,
    of: Of = "m6-10t",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="KIND", help="Of the model's GPUs, as for plan.")
    ] = "h100-80gb",
    seconds: Seconds = 150.0,
    json: Json = None,
) -> None:
    """Time a step on 1, 2 and more processes here, and model one on up to 512 GPUs.

    \b
    Example: openm6 bench scaling --json scaling.json
    """
    counts = door("process counts")(processes)
    door("bench scaling")(counts, rows, steps, of, gpu, seconds, json)


def reshard(
    size: Annotated[str, typer.Option("--size", metavar="1b|small", help="Parameters of the model.")] = "1b",
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes that write.")] = 4,
    to: Annotated[str, typer.Option("--to", metavar="2,1", help="Processes that read, in turn.")] = "2,1",
    seconds: Seconds = 420.0,
    json: Json = None,
) -> None:
    """Write a checkpoint from several processes and read it into others: seconds, memory, how long training waits.

    \b
    Example: openm6 bench reshard --ranks 4 --to 2,1 --json reshard.json
    """
    counts = door("process counts")(to)
    door("bench reshard")(size, ranks, counts, seconds, json)
