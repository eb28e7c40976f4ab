"""An evaluation as a table in the terminal."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.evaluate.figures import duration, metric_title, score, signed, standing
from openm6.evaluate.results import Judgement, TaskResult

WIDE = 120  # characters in a line, below which the table leaves something out
_STYLES = {"gain": "green", "unsure": "yellow", "loss": "red"}


def print_table(judgement: Judgement, console: Console) -> None:
    """One row per task: score and baseline, information gain with its 95 % interval, records answered and judged.

    A narrow terminal shows neither pair nor records; names are folded: one cut short could not be typed again.
    """
    narrow = console.width < WIDE
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    table.add_column("task", overflow="fold", min_width=14)
    if not narrow:
        table.add_column("pair", no_wrap=True)
    table.add_column("metric", min_width=7)
    last = [] if narrow else ["answered"]
    for name in ("value", "baseline", "information", "95 % interval", *last):
        table.add_column(name, justify="right", no_wrap=True)
    for result in judgement.results:
        task, pair, *rest, records = _cells(result)
        table.add_row(*((task, *rest) if narrow else (task, pair, *rest, records)))
    console.print(table)
    console.print(Text(_summary(judgement), style="dim"))


def summary(result: TaskResult) -> str:
    """One result as a line of a log."""
    value, baseline = (score(result.metric, figure) for figure in (result.value, result.baseline))
    low, high = (score(result.metric, end) for end in result.value_interval)
    bits_low, bits_high = (signed(end) for end in result.information_interval)
    return (
        f"{result.name}: {metric_title(result.metric)} {value} [{low}, {high}], baseline {baseline}; information "
        f"{signed(result.information_gain)} bits [{bits_low}, {bits_high}]; {answered(result)} records answered"
    )


def answered(result: TaskResult) -> str:
    """How many of the test records were answered: `60 of 372`, or `60` if all were."""
    return (
        str(result.records) if result.answered == result.records else f"{result.answered} of {result.records}"
    )


def _cells(result: TaskResult) -> list[Text]:
    # Text, not str: rich would read square brackets in a name as its own markup.
    style = "" if not math.isfinite(result.baseline) else "green" if result.beats_baseline else "red"
    bits = _STYLES[standing(result.information_interval)]
    low, high = (signed(end) for end in result.information_interval)
    return [
        Text(result.name),
        Text(f"{result.reads} → {result.gives}"),
        Text(metric_title(result.metric)),
        Text(score(result.metric, result.value), style=style),
        Text(score(result.metric, result.baseline)),
        Text(signed(result.information_gain), style=bits),
        Text(f"{low} … {high}", style=bits),
        Text(answered(result)),
    ]


def _summary(judgement: Judgement) -> str:
    results = judgement.results
    used = sum(result.uses_inputs for result in results)
    better = sum(result.beats_baseline for result in results)
    part = any(result.answered < result.records for result in results)
    more = " More records are answered with judge.answers=N judge.drawn=N." if part else ""
    return (
        f"{used} of {len(results)} tasks have a significant information gain (95 % interval above 0 bits); {better} "
        f"beat their baseline in both score and information. Judged in {duration(judgement.seconds)}: "
        f"{judgement.checkpoint}.{more}"
    )
