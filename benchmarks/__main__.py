"""`python -m benchmarks NAME …`: one command for each benchmark."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from openm6.cli.group import PlainGroup

DOORS = {
    "giant size": "benchmarks.giant:GiantSize",
    "bench rank": "benchmarks.rank:bench_rank",
    "bench cluster": "benchmarks.cluster:bench_cluster",
    "bench exchange": "benchmarks.exchange:bench_exchange",
    "bench scaling": "benchmarks.scaling:bench_scaling",
    "bench reshard": "benchmarks.reshard:bench_reshard",
    "process counts": "benchmarks.scaling:parse_counts",
    "bench giant": "benchmarks.giant:bench_giant",
    "bench serve": "benchmarks.serve:bench_serve",
    "bench generate": "benchmarks.generate:bench_generate",
    "bench experts": "benchmarks.experts:bench_experts",
    "bench train": "benchmarks.train:bench_train",
    "bench fp8": "benchmarks.fp8:bench_fp8",
    "bench packing": "benchmarks.packing:bench_packing",
}

app = typer.Typer(
    cls=PlainGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Limit = Annotated[float, typer.Option("--seconds", help="No new part begins after so long.")]


def door(name: str) -> Any:
    """The function of a benchmark, imported when it is called."""
    module, _, function = DOORS[name].partition(":")
    return getattr(importlib.import_module(module), function)


Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there as well.")]


@app.callback()
def start() -> None:
    """Every benchmark prints one JSON object; all end within eight minutes, also where they are cut
    short, with what there is by then.
    """


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


@app.command("experts")
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

    Example: python -m benchmarks experts --config fine --json experts.json
    """
    door("bench experts")(config, peer, seconds, json, compare)


@app.command("train")
def bench_train(
    config: Sizes = None,
    peer: Peer = "transformers",
    seconds: Seconds = None,
    json: Json = None,
) -> None:
    """Tokens a second of a whole training step, and where its time goes.

    Example: python -m benchmarks train --config a --json train.json
    """
    door("bench train")(config, peer, seconds, json)


@app.command("packing")
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

    Example: python -m benchmarks packing --json packing.json
    """
    door("bench packing")(seconds, json, overrides or [])


@app.command("fp8")
def bench_fp8(config: Sizes = None, seconds: Seconds = None, json: Json = None) -> None:
    """Expert products in eight bits: rounding errors and loss everywhere, and the time on a Hopper GPU.

    Example: python -m benchmarks fp8 --config a --json fp8.json
    """
    door("bench fp8")(config, seconds, json)


@app.command()
def serve(
    json_path: Json = None,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Length of the mixed load.")] = 20.0,
) -> None:
    """Text by continuous batching beside transformers on the same weights; then a mixed load.

    \b
    Example: python -m benchmarks serve --json serve.json
    """
    door("bench serve")(json_path, seconds)


@app.command()
def generate(json_path: Json = None) -> None:
    """A picture of 256 places masked-parallel, and place after place.

    \b
    Example: python -m benchmarks generate --json generate.json
    """
    door("bench generate")(json_path)


Of = Annotated[str, typer.Option("--of", metavar="PRESET", help="The model of which a rank has a share.")]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Ranks of the whole run.")]


@app.command()
def rank(
    of: Of = "m6-10t",
    ranks: Ranks = 512,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 3,
    seconds: Limit = 420.0,
    json: Json = None,
) -> None:
    """Train one rank's share of a large model, at each share of layers offloaded; small without a GPU.

    \b
    Example: python -m benchmarks rank --of m6-10t --ranks 512 --json rank.json
    """
    door("bench rank")(of, ranks, steps, seconds, json)


@app.command()
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
    Example: python -m benchmarks cluster --of m6-10t --ranks 512 --json cluster.json
    """
    door("bench cluster")(of, ranks, rank, shards, layers, rows, length, json)


@app.command()
def exchange(
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes.")] = 8,
    parts: Annotated[int, typer.Option("--parts", min=1, help="Pieces in which rows travel.")] = 2,
    json: Json = None,
) -> None:
    """Hold experts dealt out to ranks, with real numbers, against one process that has them all.

    \b
    Example: python -m benchmarks exchange --ranks 16
    """
    door("bench exchange")(ranks, parts, json)


@app.command()
def scaling(
    processes: Annotated[str, typer.Option("--processes", metavar="1,2,4", help="How many.")] = "1,2,4",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of a step, of all processes.")] = 8,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps.")] = 8,
    of: Of = "m6-10t",
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="KIND", help="Of the model's GPUs, as for plan.")
    ] = "h100-80gb",
    seconds: Limit = 150.0,
    json: Json = None,
) -> None:
    """Time a step on 1, 2 and more processes here, and model one on up to 512 GPUs.

    \b
    Example: python -m benchmarks scaling --json scaling.json
    """
    counts = door("process counts")(processes)
    door("bench scaling")(counts, rows, steps, of, gpu, seconds, json)


@app.command()
def reshard(
    size: Annotated[str, typer.Option("--size", metavar="1b|small", help="Parameters of the model.")] = "1b",
    ranks: Annotated[int, typer.Option("--ranks", min=2, help="Processes that write.")] = 4,
    to: Annotated[str, typer.Option("--to", metavar="2,1", help="Processes that read, in turn.")] = "2,1",
    seconds: Limit = 420.0,
    json: Json = None,
) -> None:
    """Write a checkpoint from several processes and read it into others: seconds, memory, how long training waits.

    \b
    Example: python -m benchmarks reshard --ranks 4 --to 2,1 --json reshard.json
    """
    counts = door("process counts")(to)
    door("bench reshard")(size, ranks, counts, seconds, json)


Whole = Annotated[int, typer.Option(min=1)]


@app.command()
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
    Example: python -m benchmarks giant --width 4096 --layers 51 --experts 32 --hidden 4096 --rows 32 --length 2048
    --bytes 2 --resident auto --micro-batches 4 --json giant.json
    """
    sizes = (
        width, layers, experts, hidden, top_k, rows, length, vocabulary, size, resident, micro_batches,
        recompute_every, boundaries, margin,
    )  # fmt: skip
    door("bench giant")(door("giant size")(*sizes), steps, peer, curve, seconds, json_path)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
