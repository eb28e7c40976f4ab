"""The report of a run: report.html, one self-contained file, for people; report.json for programs.

`report_data` turns results into plain data and the template report.html lays them out. The template escapes all text.
"""

# Shapes: P lines of metrics.jsonl, L layers

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from openm6.core.errors import DataError
from openm6.core.files import replace_text, to_json
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_CAVEAT, in_joules
from openm6.evaluate.charts import (
    Chart,
    ForecastChart,
    ValueChart,
    bar,
    finite_mean,
    forecast_chart,
    history,
    value_charts,
)
from openm6.evaluate.energy import Lines, read_lines
from openm6.evaluate.formatting import count, duration, plain, short_count, signed, significance, words
from openm6.evaluate.media import Media, MediaBudget, cut_audio
from openm6.evaluate.metrics import METRICS, is_percent, metric_title, same_text, score
from openm6.evaluate.results import EvalReport, RunFacts, Sample, TaskResult
from openm6.evaluate.summary import answered
from openm6.modalities.audio import RATE
from openm6.modalities.interface import Part
from openm6.modalities.numbers import Histogram, NumberSeries
from openm6.modalities.text import MASK_CHARACTER
from openm6.tasks.registry import TASKS

# Modalities in the order of the page, with their titles.
MODALITIES = {"text": "text", "image": "image", "audio": "audio", "numbers": "numbers"}
MAX_SAMPLES, MAX_PARTS, MAX_COLUMNS = 6, 8, 10
MAX_CHARACTERS = 260
# Bytes of all images and audio together; base64 makes them a third longer.
MEDIA_BYTES = 9 * 2**20
TEXT_GAP = "____"  # few fonts have a glyph for MASK_CHARACTER
CODEC_MEASURES = {"psnr": "PSNR", "ssim": "SSIM", "log_mel_l1": "log-mel L1", "bits": "bits per position"}
# Fraction of a run, at its end, whose mean is reported as the final value.
FINAL_FRACTION = 0.1
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_CHINESE = re.compile("[\u3400-\u9fff]")


def write_report(run: RunFolder, report: EvalReport, facts: RunFacts) -> None:
    """Write report.html and report.json into the run's folder; each file is replaced whole or not at all.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    replace_text(run.path / "report.json", report_json(report, facts))
    replace_text(run.path / "report.html", report_html(run, report, facts))


def report_json(report: EvalReport, facts: RunFacts) -> str:
    """Training and results as JSON: `seconds` of training, `params`, `tokens`, `steps`, `tasks`, `codecs`, `energy`."""
    content = {
        "seconds": facts.seconds,
        "params": {"total": facts.total_parameters, "active": facts.active_parameters},
        "tokens": facts.tokens,
        "steps": facts.steps,
        "tasks": {result.name: result.to_json() for result in report.results},
        "codecs": facts.codecs,
        "energy": facts.energy.to_json() if facts.energy is not None else None,
    }
    return to_json(content, indent=1) + "\n"


def report_html(run: RunFolder, report: EvalReport, facts: RunFacts) -> str:
    """The whole page; training curves come from the run's metrics.jsonl."""
    template = files("openm6.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    data = report_data(run, report, facts)
    return report_environment().from_string(template).render(data) + "\n"


def report_environment() -> jinja2.Environment:
    """The template engine: all text is escaped, and an unknown name in the template is an error."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (plain, count, short_count, duration, score, metric_title, words, signed, shorten)
    environment.filters |= {function.__name__: function for function in filters} | {"joules": in_joules}
    environment.tests |= {"finite": math.isfinite, "chinese": _is_chinese}
    return environment


def _printable(value: Any) -> Any:
    """Text without the characters that no page may contain; called on each value before it is escaped."""
    is_text = isinstance(value, str) and not isinstance(value, Markup)
    return _CONTROL.sub("\ufffd", value) if is_text else value


def _is_chinese(text: str) -> bool:
    return _CHINESE.search(text[:MAX_CHARACTERS]) is not None


def shorten(text: str) -> str:
    """Text cut to the width of MAX_CHARACTERS Latin letters."""
    width = MAX_CHARACTERS // 2 if _is_chinese(text) else MAX_CHARACTERS
    return text if len(text) <= width else text[: width - 1].rstrip() + "…"


def report_data(run: RunFolder, report: EvalReport, facts: RunFacts) -> dict[str, Any]:
    """Everything that the template shows."""
    results = report.results
    compared = [result for result in results if math.isfinite(result.baseline)]
    used = {name for result in results for name in (result.metric, *result.metrics)}
    pairs = {(result.input_modality, result.output_modality) for result in results}
    return {
        "facts": facts,
        "report": report,
        "modalities": MODALITIES,
        "inputs": _listed(title for kind, title in MODALITIES.items() if kind in {x for x, _ in pairs}),
        "outputs": _listed(title for kind, title in MODALITIES.items() if kind in {y for _, y in pairs}),
        "num_significant": sum(result.uses_inputs for result in results),
        "num_compared": len(compared),
        "num_better": sum(result.beats_baseline for result in compared),
        "entries": _entries(results),
        "sections": _sample_sections(results),
        "training": _training(read_lines(run), facts),
        "gpt3_caveat": GPT3_CAVEAT,
        "codecs": {name: codec_rows(scores) for name, scores in facts.codecs.items()},
        "codec_measures": CODEC_MEASURES,
        "metrics": [metric for name, metric in METRICS.items() if name in used],
    }


def _listed(names: Iterable[str]) -> str:
    *first, last = list(names) or ["nothing that was evaluated"]
    return f"{', '.join(first)} and {last}" if first else last


def _entries(results: list[TaskResult]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Results by modality of inputs and outputs, with the link to their samples and the bar of their score."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for index, result in enumerate(results):
        drawn = math.isfinite(result.value) and min(result.value, result.baseline) >= 0  # False for NaN
        whole = 1.0 if is_percent(result.metric) and result.better == "higher" else None
        entry = {
            "result": result,
            "significance": significance(result.information_interval),
            "link": f"task-{index}" if result.samples else None,
            "bar": bar(result.value, result.baseline, whole) if drawn else None,
        }
        found.setdefault((result.input_modality, result.output_modality), []).append(entry)
    return found


def _sample_sections(results: list[TaskResult]) -> dict[str, list[dict[str, Any]]]:
    """Cards of tasks with samples, by output modality."""
    left, waiting = MEDIA_BYTES, sum(bool(result.samples) for result in results)
    sections: dict[str, list[dict[str, Any]]] = {}
    for kind in MODALITIES:
        for index, result in enumerate(results):
            if not result.samples or result.output_modality != kind:
                continue
            # An equal part of the bytes that are left: what one task saves, the next may use.
            media = MediaBudget(left // waiting)
            card = {
                "result": result,
                "link": f"task-{index}",
                "summary": TASKS[result.task].summary if result.task in TASKS else "",
                "metrics": {result.metric: result.value} | result.metrics,
                "significance": significance(result.information_interval),
                "answered": answered(result),
                "samples": [sample_data(sample, media) for sample in result.samples[:MAX_SAMPLES]],
            }
            sections.setdefault(kind, []).append(card)
            left, waiting = left - media.used, waiting - 1
    return sections


@dataclass(frozen=True)
class Columns:
    """Named values of a row; `left_out` counts those beyond MAX_COLUMNS."""

    values: dict[str, str]
    left_out: int


@dataclass(frozen=True)
class SampleData:
    """A test record: its inputs, and the answer beside the truth in the form that fits the output modality.

    `media` holds images and audio, inputs first: they share a row with an answer of that kind.
    """

    inputs: list[Any]
    media: list[Media]
    text: dict[str, Any] | None = None
    values: list[ValueChart] | None = None
    values_left_out: int = 0
    forecast: ForecastChart | None = None


def sample_data(sample: Sample, media: MediaBudget) -> SampleData:
    """A sample as the template shows it."""
    parts, answer, truth = sample.inputs[:MAX_PARTS], sample.answer, sample.truth
    if isinstance(answer, str):
        correct = same_text(answer, str(truth))
        text = {"answer": answer.strip(), "truth": str(truth).strip(), "correct": correct}
        return SampleData([_input(part, media) for part in parts], [], text)
    if isinstance(answer, Histogram):
        inputs = [_input(part, media) for part in parts]
        past = next((part.raw for part in sample.inputs if isinstance(part.raw, NumberSeries)), None)
        forecast = None if past is None else forecast_chart(past, answer, truth)
        if forecast is not None:
            return SampleData(inputs, [], forecast=forecast)
        values = value_charts(answer, truth)
        return SampleData(inputs, [], values=values, values_left_out=len(answer.probability) - len(values))
    if isinstance(answer, np.ndarray):
        seconds = len(answer) / RATE
        truth = _cut_truth(truth, seconds)
        for index, part in enumerate(parts):
            # A masked span is in fractions of the length of the answer.
            if part.options.get("mask_span") is not None:
                parts[index] = replace(part, options={**part.options, "seconds": seconds})
    rest = [_input(part, media) for part in parts if part.modality not in ("image", "audio")]
    row = [_input_media(part, media) for part in parts if part.modality in ("image", "audio")]
    show = media.image if isinstance(answer, Image.Image) else media.audio
    return SampleData(rest, [*row, show(answer, "model"), show(truth, "truth")])


def _cut_truth(truth: Any, seconds: float) -> Any:
    """The true audio at the length of the answer, so that both spectrograms share their time axis."""
    try:
        return cut_audio(Part("audio", truth, {"seconds": seconds}))
    except DataError:
        return truth


def _input(part: Part, media: MediaBudget) -> str | Media | NumberSeries | Columns:
    """One part of the inputs as the model saw it."""
    if part.modality in ("image", "audio"):
        return _input_media(part, media)
    if isinstance(part.raw, NumberSeries):
        return part.raw
    if isinstance(part.raw, dict):
        shown = list(part.raw.items())[:MAX_COLUMNS]
        values = {str(name): "missing" if value is None else plain(float(value)) for name, value in shown}
        return Columns(values, len(part.raw) - len(shown))
    return str(part.raw).strip().replace(MASK_CHARACTER, TEXT_GAP)


def _input_media(part: Part, media: MediaBudget) -> Media:
    """An image or audio of the inputs with its mask."""
    if part.modality == "image":
        return media.image(part.raw, "input", part.options.get("mask_box"))
    try:
        return media.audio(cut_audio(part), "input", part.options.get("mask_span"))
    except DataError as error:
        return Media("input", missing=str(error))


def _curve(title: str, reading: str, chart: Chart, tone: str = "plain", note: str = "") -> dict[str, Any]:
    """A chart of the training with its title, the reading beside it, its colour and a note below."""
    return {"title": title, "reading": reading, "chart": chart, "tone": tone, "note": note}


def _training(lines: Lines, facts: RunFacts) -> dict[str, Any]:
    last = lines[-1] if lines else {}
    steps, drawn = np.array([line["step"] for line in lines], float), len(lines) >= 2
    return {
        "speed": facts.tokens / facts.seconds if facts.seconds > 0 else math.nan,
        "skipped": last.get("non_finite", 0),
        "spikes": last.get("spikes", 0),
        "losses": _loss_curves(steps, lines) if drawn else [],
        "curves": [*_load_curve(steps, lines), _speed_curve(steps, lines)] if drawn else [],
    }


def _loss_curves(steps: np.ndarray, lines: Lines) -> list[dict[str, Any]]:
    """The losses by modality, in the order of MODALITIES; the total if there are none."""
    names = {
        key.removeprefix("loss/").removesuffix("_out"): key for line in lines for key in line if key.startswith("loss/")
    }
    order = [*(kind for kind in MODALITIES if kind in names), *sorted(names.keys() - MODALITIES)]
    curves = []
    for kind in order or ["loss"]:
        values = _column(lines, names.get(kind, kind))
        first, last = _ends(values)
        drawing = history(steps, values[None], f"loss {kind} over steps")
        reading = f"{plain(first, 3)} → {plain(last, 3)}"
        curves.append(_curve(MODALITIES.get(kind, kind), reading, drawing, kind))
    return curves


def _load_curve(steps: np.ndarray, lines: Lines) -> list[dict[str, Any]]:
    """The coefficient of variation of the experts' load; none for a dense model."""
    rows = [line.get("expert_load_cv") or [] for line in lines]
    depth = max(len(row) for row in rows)
    if not depth:
        return []
    layers = np.array([[_number(row[i] if i < len(row) else None) for row in rows] for i in range(depth)])  # L P
    drawing = history(steps, layers, "coefficient of variation of expert load over steps", from_zero=True)
    _, last = _ends(np.array([finite_mean(column) for column in layers.T]))
    note = "σ/μ of the tokens per expert, by layer (fine) and on average: 0 is a perfect balance."
    return [_curve("expert load CV", plain(last, 3), drawing, note=note)]


def _speed_curve(steps: np.ndarray, lines: Lines) -> dict[str, Any]:
    values = _column(lines, "tokens_per_second")
    median = float(np.nanmedian(values)) if np.isfinite(values).any() else math.nan
    drawing = history(steps, values[None], "tokens per second over steps", from_zero=True)
    note = "Packed input and target tokens; median above."
    return _curve("tokens per second", plain(median), drawing, note=note)


def _column(lines: Lines, name: str) -> np.ndarray:
    """Values of one key; NaN where a line lacks it.  # P"""
    return np.array([_number(line.get(name)) for line in lines])


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _ends(values: np.ndarray) -> tuple[float, float]:
    """The first value, and the mean of the last FINAL_FRACTION."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    return float(finite[0]), float(finite[-max(1, round(FINAL_FRACTION * len(finite))) :].mean())


def codec_rows(scores: dict[str, float]) -> dict[str, dict[str, float]]:
    """Scores such as `digits_32 psnr` by the records they are of: `digits, 32 pixels` -> measure -> value."""
    rows: dict[str, dict[str, float]] = {}
    for key, value in scores.items():
        records, _, measure = key.rpartition(" ")
        name, _, size = records.rpartition("_")
        has_size = name and size.isdigit()
        title = f"{words(name)}, {size} pixels" if has_size else words(records or "all")
        rows.setdefault(title, {})[measure] = value
    return rows
