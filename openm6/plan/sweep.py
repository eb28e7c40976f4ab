"""Plans side by side: the same request with one change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from openm6.core.errors import ConfigError, nearest
from openm6.plan.hardware import ClusterOptions, Gpu, gpu_cluster
from openm6.plan.memory import TIERS
from openm6.plan.plan import Plan, make_plan
from openm6.plan.request import PlanRequest

AXES = {"gpus": "GPUs", "bytes": "bytes per parameter", "batch": "tokens per step on each GPU"}
FACTORS = (0.25, 0.5, 1, 2, 4)
Row = tuple[int, Plan]


def sweep_plans(request: PlanRequest, card: Gpu, options: ClusterOptions, kind: str) -> list[Row]:
    """A plan for each value of `kind`: GPUs from a quarter of the requested number to four times as many, all tiers, or
    batches from a quarter to four times the size.

    Raises:
        ConfigError: another kind.
    """
    if kind not in AXES:
        raise ConfigError(f"--sweep {kind!r} is not known; {nearest(kind, list(AXES))}")
    if kind == "gpus":
        counts = sorted({max(1, round(options.devices * factor)) for factor in FACTORS})
        clusters = [gpu_cluster(card, replace(options, devices=count)) for count in counts]
        return [(count, make_plan(request, one)) for count, one in zip(counts, clusters, strict=True)]
    if kind == "bytes":
        requests = {size: replace(request, bytes_per_parameter=size) for size in TIERS}
    else:
        sizes = [max(1, round((request.batch or request.model.batch) * factor)) for factor in FACTORS]
        requests = {size: replace(request, batch=size) for size in sizes}
    return [(value, make_plan(one, gpu_cluster(card, options))) for value, one in requests.items()]


def draw_sweep(rows: list[Row], kind: str, path: Path) -> None:
    """Plot tokens per day and joules per token over the value that was changed; plans that do not fit are hollow.

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
    series = {
        "tokens per day": [plan.tokens / plan.days for _, plan in rows],
        "joules per token": [plan.energy.joules_per_token for _, plan in rows],
    }
    colours = ["C0" if plan.fits else "white" for _, plan in rows]
    for axes, (title, heights) in zip(figure.subplots(1, 2), series.items(), strict=True):
        axes.plot(values, heights, color="0.6", zorder=1)
        axes.scatter(values, heights, c=colours, edgecolors="C0", zorder=2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda height, _: _short(height)))
        axes.yaxis.set_minor_formatter("")
        axes.set_xticks(values, [f"{value:,}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(AXES[kind])
        axes.set_title(title)
    if not all(plan.fits for _, plan in rows):
        figure.suptitle("hollow: does not fit", fontsize="small", color="0.4")
    figure.savefig(path)


def _short(number: float) -> str:
    """Such as `1.5B` or `0.02`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
