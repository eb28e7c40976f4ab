"""`openm6 plan`: time, memory, energy and cost of a run before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from openm6.cli.train import Device, Overrides
from openm6.core.errors import ConfigError
from openm6.core.files import check_writable
from openm6.plan import hardware
from openm6.plan.hardware import PER_NODE

PLOTS = (".svg", ".png", ".pdf")

Model = Annotated[str | None, typer.Argument(metavar="PRESET|RECIPE", help="Preset, recipe, or folder of a run.")]
Kind = Annotated[str | None, typer.Option(metavar="KIND", help="GPU of the table; default: measure on this machine.")]
Bytes = Annotated[
    int | None,
    typer.Option(
        "--bytes", help="Bytes per parameter: 16, 12, 8, 4, 2 or 1; default: a recipe's own, or the most that fit."
    ),
]
CheckpointingEvery = Annotated[
    int | None, typer.Option(metavar="BLOCKS", help="Store the input of every n-th block only.")
]
Sweep = Annotated[str | None, typer.Option(metavar="gpus|bytes|batch", help="Compare plans along this axis.")]


def plan(
    model: Model = None,
    overrides: Overrides = None,
    gpu: Kind = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 1,
    per_node: Annotated[int, typer.Option(min=1, help="GPUs per node.")] = PER_NODE,
    gpu_table: Annotated[Path | None, typer.Option(metavar="CSV", help="Further GPUs, one per row.")] = None,
    host_memory: Annotated[float | None, typer.Option(min=0, metavar="GIB", help="Host memory of a node.")] = None,
    link: Annotated[float | None, typer.Option(metavar="GB/S", help="Host to GPU, each direction.")] = None,
    network: Annotated[float | None, typer.Option(metavar="GB/S", help="Between nodes, per GPU.")] = None,
    batch: Annotated[int | None, typer.Option(metavar="TOKENS", help="Tokens per step of one GPU.")] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of the run, such as 3e11.")] = None,
    days: Annotated[float | None, typer.Option(help="Days of the run.")] = None,
    bytes_per_parameter: Bytes = None,
    pseudo_fraction: Annotated[float, typer.Option(help="Fraction of the tokens in the pseudo stage.")] = 0.0,
    activation_checkpointing_every: CheckpointingEvery = None,
    country: Annotated[str, typer.Option(help="Country of the grid.")] = "WLD",
    pue: Annotated[float, typer.Option(help="Power usage effectiveness.")] = 1.1,
    price: Annotated[float | None, typer.Option(metavar="USD", help="US dollars per GPU and hour.")] = None,
    sweep: Sweep = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Plot of the sweep (SVG, PNG or PDF).")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the plan as JSON.")] = None,
    device: Device = "auto",
) -> None:
    """Estimate time, memory and energy of a run. Its cost, too, and whether it fits.

    With --gpu: an analytic plan for a preset or a recipe, immediately. Without it: a few real steps of the recipe on
    this machine, in about a minute.

    \b
    Example: openm6 plan m6-10t --gpus 512 --gpu v100-32gb --days 10 --json plan.json
    """
    # pydantic would slow down `openm6 --help`
    from openm6.cli.plan_page import show_measured, show_plan, show_sweep
    from openm6.core.config import build
    from openm6.energy.meter import EnergyConfig
    from openm6.plan.plan import plan_json, sweep_plans
    from openm6.plan.request import PlanRequest, read_model

    energy = {"country": country, "pue": pue}
    options = hardware.ClusterOptions(gpus, per_node, host_memory, link, network, price)
    lengths = (bytes_per_parameter, pseudo_fraction, activation_checkpointing_every)
    if gpu is None:
        defaults = options == hardware.ClusterOptions(1, PER_NODE)
        if not defaults or any((gpu_table, batch, *lengths, sweep, plot)):
            raise ConfigError(
                "without --gpu the recipe is measured on this machine: add --gpu KIND, or keep to --tokens, --days, "
                "--country, --pue and --json"
            )
        return show_measured(model, overrides or [], tokens, days, energy, json_path, device)
    if device != "auto":
        raise ConfigError("--device is where a recipe is measured: leave out --gpu, which plans for a GPU of the table")
    _check_plot(plot, sweep)
    config = build(EnergyConfig, energy, "the options of energy")
    request = PlanRequest(read_model(model, overrides), batch, tokens, days, *lengths, config)
    card = hardware.gpu(gpu, gpu_table)
    if sweep is not None:
        show_sweep(sweep_plans(request, card, options, sweep), sweep, plot, json_path)
    else:
        show_plan(plan_json(request, card, options, hardware.gpus(gpu_table).values()), json_path)


def _check_plot(plot: Path | None, sweep: str | None) -> None:
    if plot is not None:
        if sweep is None or plot.suffix not in PLOTS:
            raise ConfigError(f"--plot {plot} needs --sweep, and a file that ends in {', '.join(PLOTS)}")
        check_writable(plot, "--plot")
