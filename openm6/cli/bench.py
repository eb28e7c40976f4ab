"""`openm6 bench …`: one command for each benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.bench_cluster import cluster, exchange, rank, reshard, scaling
from openm6.cli.bench_giant import giant
from openm6.cli.doors import door

bench_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure, beside the peer where there is one."
)

Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")]


@bench_app.callback()
def start() -> None:
    """Every benchmark prints one JSON object; all but soak and fuzz end within eight minutes, also where they are cut
    short, with what there is by then.
    """


bench_app.command()(giant)
for command in (rank, cluster, exchange, scaling, reshard):
    bench_app.command()(command)

Sizes = Annotated[
    str | None,
    typer.Option("--config", metavar="a|fine|cpu", help="Sizes: by default those that fit the device."),
]
Peer = Annotated[
    str, typer.Option("--peer", metavar="transformers|none", help="Whom to measure beside ours.")
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        min=1.0,
        help="After these it prints what it has (experts 60; train: GPU 420, CPU 120; fp8: GPU 300, CPU 90).",
    ),
]


@bench_app.command("experts")
def bench_experts(
    config: Sizes = None,
    peer: Peer = "transformers",
    seconds: Seconds = None,
    json: Json = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Top-k beside prototypes and shared experts, without the peer.")
    ] = False,
) -> None:
    """One sparse layer, forward and backward, and how much of it is products.

    Example: openm6 bench experts --config fine --json experts.json
    """
    door("bench experts")(config, peer, seconds, json, compare)


@bench_app.command("train")
def bench_train(
    config: Sizes = None,
    peer: Peer = "transformers",
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Tokens a second of a whole training step, and where its time goes.

    Example: openm6 bench train --config a --json train.json
    """
    door("bench train")(config, peer, seconds, json)


@bench_app.command("packing")
def bench_packing(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Settings of the recipe demo.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", min=1.0, help="After these it prints what it has (GPU 300, CPU 120)."),
    ] = None,
    json: Json = None,
) -> None:
    """Packed examples of all modalities beside dense rows of text: tokens a second of one model, and padding.

    Example: openm6 bench packing --json packing.json
    """
    door("bench packing")(seconds, json, overrides or [])


@bench_app.command("fp8")
def bench_fp8(config: Sizes = None, seconds: Seconds = None, json: Json = None) -> None:
    """Expert products in eight bits: rounding errors and loss everywhere, and the time on a Hopper GPU.

    Example: openm6 bench fp8 --config a --json fp8.json
    """
    door("bench fp8")(config, seconds, json)


@bench_app.command()
def machine(json_path: Json = None) -> None:
    """Measure this machine's ceilings once and keep them for openm6 plan; about five minutes.

    \b
    Example: openm6 bench machine --json machine.json
    """
    door("bench machine")(json_path)


@bench_app.command("plan")
def bench_plan(
    only: Annotated[
        str | None, typer.Option("--only", metavar="FIRST:LAST", help="Some of the cases.")
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1.0, help="After these it prints what it has.")
    ] = 440.0,
    json_path: Json = None,
) -> None:
    """Hold the planner against short runs of eighteen configurations; run openm6 bench machine first.

    \b
    Example: openm6 bench plan --json calibration.json
    """
    door("bench plan")(json_path, seconds, only)


@bench_app.command()
def serve(
    json_path: Json = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Length of the mixed load.")] = 20.0,
) -> None:
    """Text by continuous batching beside transformers on the same weights; then a mixed load.

    \b
    Example: openm6 bench serve --json serve.json
    """
    door("bench serve")(json_path, seconds)


@bench_app.command()
def generate(json_path: Json = None) -> None:
    """A picture of 256 places masked-parallel, and place after place.

    \b
    Example: openm6 bench generate --json generate.json
    """
    door("bench generate")(json_path)


@bench_app.command()
def soak(
    trained: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The model to serve.")],
    minutes: Annotated[float, typer.Option("--minutes", min=0.01)] = 10.0,
    json_path: Json = None,
) -> None:
    """Serve at twice the capacity: every answer compared, memory and /health watched.

    \b
    Example: openm6 bench soak runs/demo --minutes 10
    """
    door("bench soak")(trained, minutes, json_path)


@bench_app.command()
def fuzz(
    trained: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="The model to serve.")],
    uploads: Annotated[
        int, typer.Option("--uploads", min=1, help="Broken files and bodies to send.")
    ] = 10_000,
    json_path: Json = None,
) -> None:
    """Send a server broken pictures, sounds and bodies; nothing may end in a 5xx.

    \b
    Example: openm6 bench fuzz runs/demo --uploads 10000
    """
    door("bench fuzz")(trained, uploads, json_path)
