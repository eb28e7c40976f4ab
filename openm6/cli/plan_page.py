"""The output of `openm6 plan`: one plan, a sweep of plans, a trial run."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.cli.group import write_json
from openm6.cli.listings import in_short
from openm6.core.errors import ConfigError
from openm6.core.files import check_writable
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_JOULES_PER_TOKEN, GPT3_MWH
from openm6.evaluate.formatting import duration
from openm6.models.presets import PRESETS
from openm6.plan.measured import plan_measured
from openm6.plan.memory import in_bytes
from openm6.plan.plan import Plan, StagePlan, draw_sweep
from openm6.plan.request import read_model


def show_plan(planned: tuple[Plan, dict[str, Any]], json_path: Path | None) -> None:
    """Print a plan; write its JSON if a file is given."""
    plan, content = planned
    write_json(content, json_path)
    real, energy, cluster, smallest = plan.real, plan.energy, plan.cluster, content["smallest"]
    budget, fraction, tokens = real.budget, energy.mwh / GPT3_MWH, in_short(round(plan.tokens))
    ratio = f"{fraction:.2%}" if fraction >= 1e-4 else "less than 0.01%"
    pseudo = f", {plan.pseudo_fraction:.0%} of them in the pseudo stage" if plan.pseudo_fraction else ""
    rows = {
        "parameters": f"{in_short(plan.total)}, {in_short(plan.active)} active per token",
        "precision": f"{real.tier.bytes} bytes per parameter: {real.tier.description}",
        "memory per GPU": f"{in_bytes(budget.device)} of {in_bytes(cluster.memory)}: states {in_bytes(budget.states)}, "
        f"step {in_bytes(budget.activations + budget.working)}, context {in_bytes(budget.context)}",
        "host memory per GPU": f"{in_bytes(budget.host)} of {in_bytes(cluster.host_memory)}" if budget.host else "",
        **{f"step, {name}": _step(stage) for name, stage in plan.stages.items()},
        "speed": f"{in_short(round(plan.tokens / plan.days))} tokens per day",
        "duration": f"{in_figures(plan.days)} days for {tokens} tokens{pseudo}",
        "energy": f"{in_energy(energy.mwh)} (GPUs at their rating: {in_energy(energy.mwh_rated)}); "
        f"{energy.joules_per_token:.3g} J per token "
        f"(GPT-3: {GPT3_JOULES_PER_TOKEN:.1f} J, {GPT3_MWH:,.0f} MWh; this is {ratio})",
        "carbon": f"{in_figures(energy.kg_co2e)} kg CO2e ({energy.grid})",
        "cost": "" if plan.cost is None else f"{plan.cost:,.0f} US dollars",
        "fits": "yes" if plan.fits else "no",
        "smallest number of GPUs": "",
        "fits with": "; or ".join(smallest["changes"]),
    }
    if smallest["gpus"]:
        count, size = smallest["gpus"], smallest["bytes_per_parameter"]
        rows["smallest number of GPUs"] = f"{count:,} × {smallest['gpu']} at {size} bytes per parameter"
    shown = {name: words for name, words in rows.items() if words}
    _print_page(f"{plan.model.name} on {cluster.name}", shown, f"Assumed: {'; '.join(cluster.assumed)}.")


def show_sweep(rows: list[tuple[int, Plan]], kind: str, plot: Path | None, json_path: Path | None) -> None:
    """Print plans side by side; write and plot them if files are given."""
    write_json([{"sweep": kind, "value": value, **plan.to_json()} for value, plan in rows], json_path)
    table = Table(box=None)
    measures = ("fits", "B/par.", "GPU memory", "host", "step", "bottleneck", "tokens/day", "days", "J/token", "MWh")
    for name in (kind, *measures):
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
    Console(width=max(100, Console().width)).print(table)
    if plot is not None:
        draw_sweep(rows, kind, plot)


def show_measured(
    recipe: str | None,
    overrides: list[str],
    tokens: float | None,
    days: float | None,
    energy: dict[str, Any],
    json_path: Path | None,
    device: str,
) -> None:
    """Measure a few steps of a recipe on this machine, and print the plan of the whole run."""
    model = read_model(recipe, overrides)  # raises for what is no recipe, or no setting, before a process starts
    assert recipe is not None
    if recipe in PRESETS:
        raise ConfigError(f"{recipe} is a preset: name a recipe to measure it here, or a GPU with --gpu")
    if json_path is not None:
        check_writable(json_path, "--json")
    Console(stderr=True).print("measuring a few steps on this machine ...", style="dim")
    path = str(RunFolder(Path(recipe)).config) if Path(recipe).is_dir() else recipe
    command = [sys.executable, "-m", "openm6.cli.trial_run", device, path, *overrides]
    content = {**plan_measured(command, tokens, days, energy), "model": model.name}
    write_json(content, json_path)
    seconds, spent = content["seconds"], content["energy"]
    parts = [f"{name.replace('_', ' ')} {in_time(part)}" for name, part in seconds.items() if part >= 0.5]
    peak, step = content["memory_peak_bytes"], in_time(content["step_seconds"])
    rows = {
        "step": f"{step} for {content['step_tokens']:,} tokens, {content['step_joules']:.3g} J",
        "run": f"{content['steps']:,} steps, {in_short(round(content['tokens']))} tokens: {', '.join(parts)}",
        "memory": "not reported by this system" if peak is None else f"at most {in_bytes(peak)}",
        "energy": f"{in_energy(spent['mwh'])}; {spent['joules_per_token']:.3g} J per token (source: {spent['source']})",
        "carbon": f"{in_figures(spent['kg_co2e'])} kg CO2e ({spent['grid']})",
    }
    note = f"Extrapolated from {content['measured_steps']} measured steps."
    _print_page(f"{content['model']} on {content['machine']}", rows, note)


def _print_page(title: str, rows: dict[str, str], note: str) -> None:
    console = Console()
    console.print(Text(title, style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)
    console.print(Text(note, style="dim"))


def _step(stage: StagePlan) -> str:
    parts = [f"{name} {in_time(part)}" for name, part in asdict(stage.time).items() if part > 0]
    bottleneck = f"bottleneck: {stage.time.bottleneck} ({', '.join(parts)})"
    return f"{in_time(stage.time.seconds)} for {in_short(stage.tokens)} tokens; {bottleneck}"


def in_figures(number: float) -> str:
    """Three figures, and all that stand before the point: `0.0123`, `12.3`, `12,345`."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def in_energy(mwh: float) -> str:
    """Such as `33.2 MWh` or `0.0457 kWh`."""
    return f"{in_figures(mwh)} MWh" if mwh >= 1 else f"{in_figures(1000 * mwh)} kWh"


def in_time(seconds: float) -> str:
    """Such as `12.3 ms`, `5.6 s` or `2.1 hours`."""
    if seconds >= 120:
        return duration(seconds)
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
