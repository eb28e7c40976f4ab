"""An evaluation as a table in the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.evaluate.figures import beats, duration, metric_title, score, signed, standing
from openm6.evaluate.results import Judgement, TaskResult

WIDE = 120  # characters in a line, below which the table leaves something out
_STYLES = {"gain": "green", "unsure": "yellow", "loss": "red"}


def print_table(judgement: Judgement, console: Console) -> None:
    """One row per task: pair, score against baseline, bits gained with its 95 % interval, and how many records.

    A narrow terminal is told neither pair nor records; names are folded: one cut short could not be typed again.
    """
    narrow = console.width < WIDE
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    table.add_column("task", overflow="fold", min_width=14)
    if not narrow:
        table.add_column("pair", no_wrap=True)
    table.add_column("metric", min_width=7)
    for name in ("value", "baseline", "bits gained", "95 % interval", *([] if narrow else ["records"])):
        table.add_column(name, justify="right", no_wrap=True)
    for result in judgement.results:
        task, pair, *rest, records = _cells(result)
        table.add_row(*((task, *rest) if narrow else (task, pair, *rest, records)))
    console.print(table)
    console.print(Text(_summary(judgement), style="dim"))


def summary(result: TaskResult) -> str:
    """One result as a line of a log."""
    low, high = (signed(end) for end in result.bits_interval)
    value, baseline = (score(result.metric, figure) for figure in (result.value, result.baseline))
    bits = f"{signed(result.bits_gained)} bits ({low} … {high})"
    return f"{result.name}: {metric_title(result.metric)} {value}, baseline {baseline}, {bits}"


def _cells(result: TaskResult) -> list[Text]:
    # Text, not str: rich would read square brackets in a name as its own markup.
    better = beats(result.value, result.baseline, result.better)
    style = "" if not math.isfinite(result.baseline) else "green" if better else "red"
    bits = _STYLES[standing(result.bits_interval)]
    low, high = (signed(end) for end in result.bits_interval)
    return [
        Text(result.name),
        Text(f"{result.reads} → {result.gives}"),
        Text(metric_title(result.metric)),
        Text(score(result.metric, result.value), style=style),
        Text(score(result.metric, result.baseline)),
        Text(signed(result.bits_gained), style=bits),
        Text(f"{low} … {high}", style=bits),
        Text(str(result.records)),
    ]


def _summary(judgement: Judgement) -> str:
    used = sum(standing(result.bits_interval) == "gain" for result in judgement.results)
    return (
        f"{used} of {len(judgement.results)} tasks surely use what they are given (interval above 0); "
        f"judged in {duration(judgement.seconds)}: {judgement.checkpoint}"
    )
