"""How the run went: loss by modality, load of the experts, speed and time, read from metrics.jsonl."""

# Letters: P lines of metrics.jsonl, L layers

from __future__ import annotations

import math
from typing import Any

import numpy as np

from openm6.base.run_folder import RunFolder
from openm6.evaluate.figures import count, duration, plain
from openm6.evaluate.lines import Lines, read_lines
from openm6.evaluate.report_charts import history, mean_of
from openm6.evaluate.report_markup import Markup, tag
from openm6.evaluate.report_pairs import MODALITIES
from openm6.evaluate.results import Judgement, RunFacts

_ENDING = 0.1  # part of the run, at its end, whose mean is told as where a value arrived


def training(run: RunFolder, judgement: Judgement, facts: RunFacts) -> Markup:
    """The section on training."""
    lines = read_lines(run)
    head = tag("h2", "How it was trained", attributes={"id": "training"})
    if len(lines) < 2:
        none = tag("p.lead", "No curves: metrics.jsonl of this run holds fewer than two lines.")
        return tag("section", head, _facts(lines, judgement, facts), none)
    steps = np.array([line["step"] for line in lines], float)
    lead = "Surprise at the true answers while training, by what the model gives, in nats a token: lower is better."
    losses = [_loss(name, steps, lines) for name in loss_names(lines)]
    return tag(
        "section",
        head,
        _facts(lines, judgement, facts),
        tag("h3", "Loss"),
        tag("p.lead", lead),
        tag("div.charts", *losses),
        tag("div.charts", _load(steps, lines), _speed(steps, lines)),
    )


def loss_names(lines: Lines) -> list[str]:
    """Keys of losses by modality, in the report's order of modalities; the total where there are none."""
    names = sorted({key for line in lines for key in line if key.startswith("loss/")})
    order = {kind: place for place, kind in enumerate(MODALITIES)}
    return sorted(names, key=lambda name: order.get(_kind(name), len(order))) or ["loss"]


def _kind(name: str) -> str:
    return name.removeprefix("loss/").removesuffix("_out")


def _loss(name: str, steps: np.ndarray, lines: Lines) -> Markup:
    kind = _kind(name)
    values = _column(lines, name)
    first, last = _ends(values)
    drawing = history(steps, values[None], f"loss {kind} over steps")
    return _chart(kind, f"{plain(first, 3)} → {plain(last, 3)}", drawing, kind)


def _load(steps: np.ndarray, lines: Lines) -> Markup | None:
    layers = _layers(lines, "c_v")  # L P
    if not len(layers):
        return None
    chart = history(steps, layers, "load variation of the experts over steps", from_zero=True)
    last = _ends(np.array([mean_of(column) for column in layers.T]))[1]
    note = "σ/μ of the tokens per expert, by layer (fine) and on average: 0 is a perfect balance."
    return _chart("expert load c_v", plain(last, 3), chart, "plain", note)


def _speed(steps: np.ndarray, lines: Lines) -> Markup:
    values = _column(lines, "tokens_per_second")
    middle = float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan
    chart = history(steps, values[None], "tokens a second over steps", from_zero=True)
    note = "Packed tokens, source and target, median above."
    return _chart("tokens a second", plain(middle), chart, "plain", note)


def _chart(title: str, reading: str, drawing: Markup, tone: str, note: str | None = None) -> Markup:
    head = tag("figcaption", tag("span", title), tag("b", reading))
    return tag(f"figure.chart.tone-{tone}", head, drawing, tag("p.axis", note or "", tag("span", "steps")))


def _facts(lines: Lines, judgement: Judgement, facts: RunFacts) -> Markup:
    last = lines[-1] if lines else {}
    speed = facts.tokens / facts.seconds if facts.seconds > 0 else math.nan
    rows = {
        "training": f"{duration(facts.seconds)}, {count(facts.steps)} steps",
        "speed": f"{plain(speed)} tokens a second",
        "judging": f"{duration(judgement.seconds)} for {len(judgement.results)} tasks",
        "steps skipped": f"{last.get('non_finite', 0)} (loss or gradient not finite)",
        "loss spikes": str(last.get("spikes", 0)),
        "checkpoint": judgement.checkpoint,
    }
    return tag("dl.facts", *[tag("div", tag("dt", name), tag("dd", value)) for name, value in rows.items()])


def _column(lines: Lines, name: str) -> np.ndarray:
    """Values of one key; NaN where a line lacks it or holds null.  # P"""
    return np.array([_number(line.get(name)) for line in lines])


def _layers(lines: Lines, name: str) -> np.ndarray:
    """Values of a key that holds one value for each layer.  # L P"""
    rows = [line.get(name) or [] for line in lines]
    deep = max((len(row) for row in rows), default=0)
    return np.array(
        [[_number(row[layer] if layer < len(row) else None) for row in rows] for layer in range(deep)]
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The first value, and the mean of the last tenth."""
    seen = values[np.isfinite(values)]
    if not len(seen):
        return math.nan, math.nan
    return float(seen[0]), float(seen[-max(1, round(_ENDING * len(seen))) :].mean())
