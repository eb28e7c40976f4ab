"""The output of `openm6 plan`: one plan, a sweep of plans, a trial run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.cli.listings import in_short
from openm6.core.errors import ConfigError
from openm6.core.files import replace_text
from openm6.energy.carbon import GPT3_JOULES_PER_TOKEN, GPT3_MWH
from openm6.models.presets import PRESETS
from openm6.plan.hardware import ClusterOptions, Gpu
from openm6.plan.measured import plan_measured
from openm6.plan.plan import Plan, StagePlan, plan_json
from openm6.plan.request import PlanRequest, read_model
from openm6.plan.sweep import draw_sweep, sweep_plans

GIB = 2**30
WIDTH = 100  # characters of a sweep's table


def show_plan(
    request: PlanRequest, card: Gpu, options: ClusterOptions, known: list[Gpu], json_path: Path | None
) -> None:
    """Print a plan; write its JSON if a file is given."""
    plan, content = plan_json(request, card, options, known)
    _write(content, json_path)
    console = Console()
    console.print(Text(f"{plan.model.name} on {plan.cluster.name}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, words in _rows(plan, content["smallest"]):
        table.add_row(name, words)
    console.print(table)
    console.print(Text("Assumed: " + "; ".join(plan.cluster.assumed) + ".", style="dim"))


def show_sweep(
    request: PlanRequest,
    card: Gpu,
    options: ClusterOptions,
    kind: str,
    plot: Path | None,
    json_path: Path | None,
) -> None:
    """Print plans side by side; write and plot them if files are given."""
    rows = sweep_plans(request, card, options, kind)
    _write([{"sweep": kind, "value": value, **plan.to_json()} for value, plan in rows], json_path)
    table = Table(box=None)
    for name in (
        kind,
        "fits",
        "B/par.",
        "GPU memory",
        "host",
        "step",
        "bottleneck",
        "tokens/day",
        "days",
        "J/token",
        "MWh",
    ):
        table.add_column(name, no_wrap=True)
    for value, plan in rows:
        real = plan.real
        table.add_row(
            f"{value:,}", "yes" if plan.fits else "no", str(real.tier.bytes), in_bytes(real.budget.device),
            in_bytes(real.budget.host) if real.budget.host else "-", in_time(real.time.seconds), real.time.bottleneck,
            in_short(round(plan.tokens / plan.days)), in_figures(plan.days),
            f"{plan.energy.joules_per_token:.3g}", in_figures(plan.energy.mwh),
        )  # fmt: skip
    # A number that is cut off is worth less than a line that the terminal breaks.
    Console(width=max(WIDTH, Console().width)).print(table)
    if plot is not None:
        draw_sweep(rows, kind, plot)


def show_measured(
    recipe: str | None,
    overrides: list[str],
    tokens: float | None,
    days: float | None,
    energy: dict[str, Any],
    json_path: Path | None,
) -> None:
    """Measure a few steps of a recipe on this machine, and print the plan of the whole run."""
    read_model(recipe, overrides)  # raises for what is no recipe, or no setting, before a process starts
    assert recipe is not None
    if recipe in PRESETS:
        raise ConfigError(f"{recipe} is a preset: name a recipe to measure it here, or a GPU with --gpu")
    Console(stderr=True).print("measuring a few steps on this machine ...", style="dim")
    command = [sys.executable, "-m", "openm6.cli.trial_run", recipe, *overrides]
    content = plan_measured(command, tokens, days, energy)
    _write(content, json_path)
    seconds, spent = content["seconds"], content["energy"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {in_time(part)}" for name, part in seconds.items() if part >= 0.5
    )
    peak = content["memory_peak_bytes"]
    rows = [
        (
            "step",
            f"{in_time(content['step_seconds'])} for {content['step_tokens']:,} tokens, {content['step_joules']:.3g} J",
        ),
        ("run", f"{content['steps']:,} steps, {in_short(round(content['tokens']))} tokens: {parts}"),
        ("memory", "not reported by this system" if peak is None else f"at most {in_bytes(peak)}"),
        (
            "energy",
            f"{in_energy(spent['mwh'])}; {spent['joules_per_token']:.3g} J per token (source: {spent['source']})",
        ),
        ("carbon", f"{in_figures(spent['kg_co2e'])} kg CO2e ({spent['grid']})"),
    ]
    console = Console()
    console.print(Text(f"{content['model']} on {content['machine']}", style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(Text(f"Extrapolated from {content['measured_steps']} measured steps.", style="dim"))


def _rows(plan: Plan, smallest: dict[str, Any]) -> list[tuple[str, str]]:
    real, energy, cluster = plan.real, plan.energy, plan.cluster
    budget = real.budget
    rows = [
        ("parameters", f"{in_short(plan.total)}, {in_short(plan.active)} active per token"),
        ("precision", f"{real.tier.bytes} bytes per parameter: {real.tier.description}"),
        (
            "memory per GPU",
            f"{in_bytes(budget.device)} of {in_bytes(cluster.memory)}: states {in_bytes(budget.states)}, "
            f"step {in_bytes(budget.activations + budget.working)}, "
            f"context {in_bytes(budget.context)}",
        ),
    ]
    if budget.host:
        rows.append(("host memory per GPU", f"{in_bytes(budget.host)} of {in_bytes(cluster.host_memory)}"))
    rows += [(f"step, {name}", _step(stage)) for name, stage in plan.stages.items()]
    pseudo = f", {plan.pseudo_fraction:.0%} of them in the pseudo stage" if plan.pseudo_fraction else ""
    rows += [
        ("speed", f"{in_short(round(plan.tokens / plan.days))} tokens per day"),
        ("duration", f"{in_figures(plan.days)} days for {in_short(round(plan.tokens))} tokens{pseudo}"),
        (
            "energy",
            f"{in_energy(energy.mwh)} (GPUs at their rating: {in_energy(energy.mwh_rated)}); "
            f"{energy.joules_per_token:.3g} J per token "
            f"(GPT-3: {GPT3_JOULES_PER_TOKEN:.1f} J, {GPT3_MWH:,.0f} MWh; this is {_percent(energy.mwh / GPT3_MWH)})",
        ),
        ("carbon", f"{in_figures(energy.kg_co2e)} kg CO2e ({energy.grid})"),
    ]
    if plan.cost is not None:
        rows.append(("cost", f"{plan.cost:,.0f} US dollars"))
    rows.append(("fits", "yes" if plan.fits else "no"))
    if smallest["gpus"]:
        words = f"{smallest['gpus']:,} × {smallest['gpu']} at {smallest['bytes_per_parameter']} bytes per parameter"
        rows.append(("smallest number of GPUs", words))
    if smallest["changes"]:
        rows.append(("fits with", "; or ".join(smallest["changes"])))
    return rows


def _step(stage: StagePlan) -> str:
    time = stage.time
    parts = {"compute": time.compute, "memory": time.memory, "link": time.link, "network": time.network}
    words = ", ".join(f"{name} {in_time(seconds)}" for name, seconds in parts.items() if seconds > 0)
    return f"{in_time(time.seconds)} for {in_short(stage.tokens)} tokens; bottleneck: {time.bottleneck} ({words})"


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}" if fraction >= 1e-4 else "less than 0.01%"


def in_bytes(count: float) -> str:
    """Such as `12.3 GiB`."""
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1024:.3g} KiB"


def in_figures(number: float) -> str:
    """Three figures, and all that stand before the point: `0.0123`, `12.3`, `12,345`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def in_energy(mwh: float) -> str:
    """Such as `33.2 MWh` or `0.0457 kWh`."""
    return f"{in_figures(mwh)} MWh" if mwh >= 1 else f"{in_figures(1000 * mwh)} kWh"


def in_time(seconds: float) -> str:
    """Such as `12.3 ms`."""
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _write(content: Any, path: Path | None) -> None:
    if path is not None:
        replace_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
