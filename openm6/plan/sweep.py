"""Plans side by side: the same request with one change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from openm6.core.errors import ConfigError, nearest
from openm6.plan.memory import TIERS
from openm6.plan.plan import BATCH, Plan, make_plan
from openm6.plan.request import PlanRequest, PlanTarget

KINDS = ("gpus", "bytes", "batch")
AXES = {"gpus": "GPUs", "bytes": "bytes per parameter", "batch": "tokens per step on each GPU"}
Row = tuple[int, Plan]


def sweep_plans(request: PlanRequest, target: PlanTarget, kind: str) -> list[Row]:
    """A plan for each value of `kind`: GPUs from a quarter of the requested number to four times as many, all tiers, or
    batches from a quarter to four times the size.

    Raises:
        ConfigError: another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"--sweep {kind!r} is not known; {nearest(kind, KINDS)}")
    if kind == "gpus":
        counts = sorted({max(1, round(target.options.devices * factor)) for factor in (0.25, 0.5, 1, 2, 4)})
        clusters = [replace(target, options=replace(target.options, devices=count)) for count in counts]
        return [
            (count, make_plan(request, one.cluster())) for count, one in zip(counts, clusters, strict=True)
        ]
    if kind == "bytes":
        plans = [(size, replace(request, bytes_per_parameter=size)) for size in TIERS]
    else:
        model = request.model
        base = request.batch or (model.rows * model.length if model.rows else BATCH)
        sizes = [max(1, round(base * factor)) for factor in (0.25, 0.5, 1, 2, 4)]
        plans = [(size, replace(request, batch=size)) for size in sizes]
    return [(value, make_plan(one, target.cluster())) for value, one in plans]


def sweep_json(rows: list[Row], kind: str) -> list[dict[str, Any]]:
    """One object for each plan, with what was changed (`sweep`) and to which `value`."""
    return [{"sweep": kind, "value": value, **plan.to_json()} for value, plan in rows]


def draw_sweep(rows: list[Row], kind: str, path: Path) -> None:
    """Tokens a day and joules a token over the value that was changed; plans that do not fit are hollow.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package
        from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'openm6[report]'") from None
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    values = [value for value, _ in rows]
    series = (
        ("tokens a day", [plan.tokens / plan.days for _, plan in rows]),
        ("joules a token", [plan.energy.joules_per_token for _, plan in rows]),
    )
    for place, (title, heights) in enumerate(series, 1):
        axes = figure.add_subplot(1, 2, place)
        axes.plot(values, heights, color="0.6", zorder=1)
        for value, height, (_, plan) in zip(values, heights, rows, strict=True):
            axes.scatter(
                [value], [height], facecolors="C0" if plan.fits else "white", edgecolors="C0", zorder=2
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: _in_short(height)))
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(AXES[kind])
        axes.set_title(title)
    if not all(plan.fits for _, plan in rows):
        figure.suptitle("hollow: does not fit", fontsize="small", color="0.4")
    figure.savefig(path)


def _in_short(number: float) -> str:
    """Such as `1.5B` or `0.02`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
