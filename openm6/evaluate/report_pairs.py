"""The sixteen pairs of modalities as one table: what goes in by row, what comes out by column."""

from __future__ import annotations

import math

from openm6.evaluate.figures import is_share, metric_title, score, signed, standing, words
from openm6.evaluate.report_charts import bar
from openm6.evaluate.report_markup import Markup, tag
from openm6.evaluate.results import TaskResult

MODALITIES = ("text", "image", "sound", "numbers")
_SIGNS = {"gain": "▲", "unsure": "●", "loss": "▼"}
_VERDICTS = {
    "gain": "significant information gain: the whole interval lies above 0",
    "unsure": "not significant: the interval holds 0",
    "loss": "misled by its inputs: the whole interval lies below 0",
}


def pairs(results: list[TaskResult], numbers: dict[str, int]) -> Markup:
    """The table with its legend and the note on bits; `numbers` gives each task's anchor, where it has samples."""
    signs = [tag("li", _sign(kind), text) for kind, text in _VERDICTS.items()]
    legend = tag("ul.legend", *signs, tag("li", tag("span.sign.better", "✓"), "better than the baseline"))
    table = tag(
        "table.pairs", _head(), tag("tbody", *[_row(reads, results, numbers) for reads in MODALITIES])
    )
    lead = "Rows: what the model reads. Columns: what it gives. Each bar is a score, its mark the baseline."
    head = tag("h2", "Sixteen pairs", attributes={"id": "pairs"})
    return tag("section", head, tag("p.lead", lead), table, legend, information_note())


def pair(reads: str, gives: str) -> Markup:
    """The names of two modalities with an arrow, each in its colour."""
    return tag("p.pair", tag(f"b.tone-{reads}", reads), " → ", tag(f"b.tone-{gives}", gives))


def information_note() -> Markup:
    """What the information gain means, in plain words."""
    return tag(
        "aside.note",
        tag("h3", "What “information” means"),
        tag(
            "p",
            "The information gain is how much likelier the true answer becomes when the model sees its inputs: log2 "
            "p(answer | inputs) − log2 p(answer | no inputs), averaged over test records. It cannot exceed the "
            "information in the answer: a digit holds at most 3.3 bits, an image many.",
        ),
        tag(
            "p",
            "The range is a 95 % bootstrap interval over test records. The gain is significant if all of it lies above "
            "0; “better than the baseline” (✓) is claimed only if the score’s interval agrees.",
        ),
    )


def _head() -> Markup:
    columns = [
        tag(f"th.tone-{gives}", "→ ", tag("b", gives), attributes={"scope": "col"}) for gives in MODALITIES
    ]
    return tag("thead", tag("tr", tag("td", tag("span.unseen", "in and out")), *columns))


def _row(reads: str, results: list[TaskResult], numbers: dict[str, int]) -> Markup:
    cells = []
    for gives in MODALITIES:
        inside = [
            _entry(result, numbers) for result in results if (result.reads, result.gives) == (reads, gives)
        ]
        if inside:
            cells.append(tag("td", pair(reads, gives), *inside))
        else:
            cells.append(tag("td.empty", tag("span", "not taught")))
    head = tag(f"th.tone-{reads}", tag("b", reads), " →", attributes={"scope": "row"})
    return tag("tr", head, *cells)


def _entry(result: TaskResult, numbers: dict[str, int]) -> Markup:
    kind = standing(result.information_interval)
    name = words(result.task)
    if result.samples:
        name = tag("a", name, attributes={"href": f"#task-{numbers[result.name]}"})
    low, high = (signed(end) for end in result.information_interval)
    bits = tag(
        "p.bits", _sign(kind), " ", tag("b", signed(result.information_gain)), f" bits [{low}, {high}]"
    )
    return tag(
        f"div.entry.{kind}",
        tag("p.name", name, " ", tag("small", words(result.source))),
        *_value(result),
        bits,
    )


def _value(result: TaskResult) -> list[Markup]:
    """The first metric beside its baseline, in words and as a bar."""
    value = tag("b", score(result.metric, result.value))
    line = [value, f" {metric_title(result.metric)}"]
    known = math.isfinite(result.baseline)
    if known:
        better = tag("span.better", " ✓") if result.beats_baseline else None
        line += [tag("span.base", f"{result.baseline_name} {score(result.metric, result.baseline)}", better)]
    drawn = known and math.isfinite(result.value) and min(result.value, result.baseline) >= 0
    whole = 1.0 if is_share(result.metric) and result.better == "higher" else None
    chart = bar(result.value, result.baseline, whole) if drawn else None
    return [tag("p.value", *line), *([chart] if chart else [])]


def _sign(kind: str) -> Markup:
    return tag(f"span.sign.{kind}", _SIGNS[kind])
