"""The sixteen pairs of modalities as one table: what goes in by row, what comes out by column."""

from __future__ import annotations

import math

from openm6.evaluate.figures import beats, is_share, metric_title, score, signed, standing, words
from openm6.evaluate.report_charts import bar
from openm6.evaluate.report_markup import Markup, tag
from openm6.evaluate.results import TaskResult

MODALITIES = ("text", "image", "sound", "numbers")
_SIGNS = {"gain": "▲", "unsure": "●", "loss": "▼"}
_VERDICTS = {
    "gain": "uses what it is given: the whole interval lies above 0",
    "unsure": "cannot be told: the interval holds 0",
    "loss": "misled by what it is given: the whole interval lies below 0",
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
    return tag("section", head, tag("p.lead", lead), table, legend, bits_note())


def pair(reads: str, gives: str) -> Markup:
    """The names of two modalities with an arrow, each in its colour."""
    return tag("p.pair", tag(f"b.tone-{reads}", reads), " → ", tag(f"b.tone-{gives}", gives))


def bits_note() -> Markup:
    """What "bits gained" means, in plain words."""
    return tag(
        "aside.note",
        tag("h3", "What “bits gained” means"),
        tag(
            "p",
            "Does the model look at what it is given, or does it only know which answers are common? Take a test "
            "record and ask how well the model foresees the true answer: once with the record’s own picture, sound, "
            "text or numbers, and once with those of another record. The difference, averaged over records, is the "
            "gain in bits. At 0 it would answer the same whatever it is shown; each bit makes the true answer twice "
            "as likely. Long answers (pictures, sounds) have many bits to gain, a single word only a few.",
        ),
        tag(
            "p",
            "The range behind it is a 95 % interval, from drawing the test records anew many times. Only where all "
            "of it is above 0 do we say that the model has learned to use its input.",
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
    kind = standing(result.bits_interval)
    name = words(result.task)
    if result.samples:
        name = tag("a", name, attributes={"href": f"#task-{numbers[result.name]}"})
    low, high = (signed(end) for end in result.bits_interval)
    bits = tag("p.bits", _sign(kind), " ", tag("b", signed(result.bits_gained)), f" bits [{low}, {high}]")
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
        better = tag("span.better", " ✓") if beats(result.value, result.baseline, result.better) else None
        line += [tag("span.base", f"{result.baseline_name} {score(result.metric, result.baseline)}", better)]
    drawn = known and math.isfinite(result.value) and min(result.value, result.baseline) >= 0
    whole = 1.0 if is_share(result.metric) and result.better == "higher" else None
    chart = bar(result.value, result.baseline, whole) if drawn else None
    return [tag("p.value", *line), *([chart] if chart else [])]


def _sign(kind: str) -> Markup:
    return tag(f"span.sign.{kind}", _SIGNS[kind])
