"""The report of a run: report.html, one self-contained file, for people; report.json for programs.

`report_data` turns results into plain data, images and audio into data URLs within a limit on their bytes, and the
template report.html lays them out. The template escapes all text. In short, results are a line of the log, a table in
the terminal, and the model card README.md of a run, of the template card.md.
"""

# Shapes: P lines of metrics.jsonl, L layers; S samples, T frames in time, F frequency bands

import base64
import io
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import soundfile
import yaml
from markupsafe import Markup
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from openm6.core.errors import DataError
from openm6.core.files import plain_data, replace_text, to_json
from openm6.core.run_folder import RunFolder
from openm6.energy.carbon import GPT3_CAVEAT, in_joules
from openm6.evaluate.charts import bar, finite_mean, forecast_chart, history, value_charts
from openm6.evaluate.formatting import count, duration, plain, short_count, signed, significance, words
from openm6.evaluate.metrics import is_percent, known_metrics, metric_title, same_text, score
from openm6.evaluate.results import EvalReport, Lines, RunFacts, Sample, TaskResult, read_lines
from openm6.modalities.audio import RATE, read_audio
from openm6.modalities.chat_template import TURNS
from openm6.modalities.histogram import Histogram
from openm6.modalities.image import read_image
from openm6.modalities.interface import Part
from openm6.modalities.registry import MODALITIES
from openm6.modalities.series import NumberSeries
from openm6.modalities.text import MASK_CHARACTER
from openm6.ops.audio import mel_filters
from openm6.tasks.registry import all_tasks

# Width in characters below which the table leaves columns out.
WIDE = 120
MAX_LISTED = 4  # tasks without answers to all records


def answered(result: TaskResult) -> str:
    """How many of the test records were answered: `60 of 372`, or `60` if all were."""
    total = result.records + result.left_out
    return str(total) if result.answered == total else f"{result.answered} of {total}"


def result_line(result: TaskResult) -> str:
    value, baseline = (score(result.metric, number) for number in (result.value, result.baseline))
    low, high = (score(result.metric, end) for end in result.value_interval)
    bits_low, bits_high = (signed(end) for end in result.information_interval)
    return (
        f"{result.name}: {metric_title(result.metric)} {value} [{low}, {high}], baseline {baseline}; information "
        f"{signed(result.information_gain)} bits [{bits_low}, {bits_high}]; {answered(result)} records answered"
    )


def print_table(report: EvalReport, console: Console) -> None:
    """One row per task; a narrow terminal shows neither modalities nor records. A name cut short could not be typed."""
    narrow = console.width < WIDE
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0) if narrow else (0, 1))
    table.add_column("task", overflow="fold", min_width=14)
    if not narrow:
        table.add_column("modalities", no_wrap=True)
    table.add_column("metric", min_width=7)
    last = [] if narrow else ["answered"]
    for name in ("value", "baseline", "information", "95 % interval", *last):
        table.add_column(name, justify="right", no_wrap=True)
    colours = {"positive": "green", "none": "yellow", "negative": "red"}
    for result in report.results:
        colour = "" if not math.isfinite(result.baseline) else "green" if result.beats_baseline else "red"
        bits = colours[significance(result.information_interval)]
        low, high = (signed(end) for end in result.information_interval)
        # Text, not str: rich would read square brackets in a name as its own markup.
        table.add_row(
            Text(result.name),
            *([] if narrow else [f"{result.input_modality} → {result.output_modality}"]),
            metric_title(result.metric),
            Text(score(result.metric, result.value), style=colour),
            score(result.metric, result.baseline),
            Text(signed(result.information_gain), style=bits),
            Text(f"{low} … {high}", style=bits),
            *([] if narrow else [answered(result)]),
        )
    console.print(table)
    significant = sum(result.uses_inputs for result in report.results)
    better = sum(result.beats_baseline for result in report.results)
    partial = [f"{x.name} {answered(x)}" for x in report.results if x.answered < x.records + x.left_out]
    more = ""
    if partial:
        listed = ", ".join(partial[:MAX_LISTED]) + (" and others" if len(partial) > MAX_LISTED else "")
        more = (
            f" Not all test records were answered, to save time: {listed}. eval.seconds=N allows more, and "
            "eval.records=N eval.answers=N eval.drawn=N set the numbers."
        )
    totals = (
        f"{significant} of {len(report.results)} tasks have a significant information gain (95 % interval above 0 "
        f"bits); {better} beat their baseline in both score and information. Evaluated in {duration(report.seconds)}: "
        f"{report.checkpoint}.{more}"
    )
    console.print(Text(totals, style="dim"))


def card(report: EvalReport, facts: RunFacts) -> str:
    """The model card: metadata for the Hugging Face Hub, size and training, scores, energy and limits."""
    front = yaml.safe_dump(_metadata(report, facts), sort_keys=False, allow_unicode=True)
    template = report_environment().overlay(autoescape=False, finalize=None).get_template("card.md")
    return template.render(report=report, facts=facts, front=front, gpt3_caveat=GPT3_CAVEAT) + "\n"


def _metadata(report: EvalReport, facts: RunFacts) -> dict[str, Any]:
    """What is known of a model in the form of the Hub: languages of its prompts, origins, emissions, scores."""
    found: dict[str, Any] = {"library_name": "openm6", "pipeline_tag": "any-to-any", "license": "unknown"}
    if (description := facts.description) is not None:
        known, tasks = all_tasks(description.tasks), {one.task for one in description.trained_tasks}
        found["pipeline_tag"] = "any-to-any" if tasks else "text-generation"
        found["language"] = sorted({code for name in tasks & known.keys() for code in known[name].prompts})
        paths = {one["path"] for one in description.sources.values() if one.get("kind") == "datasets"}
        found["datasets"] = sorted(path for path in paths if not Path(path).expanduser().exists())
        base = Path(description.base_model)  # a local path is absolute, one on the Hub is OWNER/NAME or a file in it
        found["base_model"] = "" if base.is_absolute() else "/".join(base.parts[:2]).partition("@")[0]
    if (account := facts.energy) is not None:
        found["co2_eq_emissions"] = {
            "emissions": account.grams(account.tracker.joules),
            "source": f"metered by OpenM6 ({account.tracker.source}), {account.grid.grams_per_kwh:g} g CO2e per kWh",
            "geographical_location": account.grid.name,
        }
    results = [
        {
            "task": {"type": one.task.replace("_", "-"), "name": one.task},
            "dataset": {"type": one.source, "name": one.source, "split": "test"},
            "metrics": [
                {"type": metric, "name": metric_title(metric), "value": value}
                for metric, value in plain_data({one.metric: one.value, **one.metrics}).items()
                if value is not None
            ],
        }
        for one in report.results
    ]
    found["model-index"] = [{"name": facts.name, "results": results}] if results else []
    return {name: value for name, value in plain_data(found).items() if value}


def _inline(text: str) -> str:
    """Text as it may stand in a line or a cell of Markdown."""
    encodable = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes a question mark
    return " ".join(encodable.replace("|", "/").replace("`", "'").split())


MAX_SIDE = 320  # pixels kept of a larger image
# Pixels on the page of an image's longer side: a multiple of 32 and 64, so that small images stay crisp.
SHOWN_SIDE = 128
MAX_SECONDS = 8.0
WINDOW, BANDS, FRAMES = 512, 48, 120  # of a spectrogram
_COLOURS = np.array([[17, 18, 33], [48, 44, 107], [28, 103, 133], [56, 166, 137], [197, 205, 104], [255, 246, 214]])


@dataclass(frozen=True)
class Media:
    """An image, or audio with its spectrogram as the image; `missing` is the reason if there is neither.

    mask: left, top, right and bottom as fractions of the sides.
    """

    caption: str
    image: str = ""
    audio: str = ""
    width: int = 0
    height: int = 0
    enlarged: bool = False
    mask: tuple[float, float, float, float] | None = None
    missing: str = ""


@dataclass
class MediaBudget:
    """Encodes images and audio until `limit` bytes are used up; whatever comes later is named, not shown."""

    limit: int
    used: int = 0
    full: bool = False

    def add(self, part: Part, caption: str) -> Media:
        """An image or audio with what was masked for the model; audio is as long as its options ask for."""
        show = self._image if part.modality == "image" else self._audio
        try:
            media = None if self.full else show(part, caption)
        except DataError as error:
            return Media(caption, missing=str(error))
        return Media(caption, missing="left out to keep this page small") if media is None or self.full else media

    def _image(self, part: Part, caption: str) -> Media:
        image = read_image(part.raw, sys.maxsize)  # the model has read it, with a bound of its own
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        url = self._data_url("image/png", lambda stream: image.save(stream, "PNG", optimize=True))
        scale = SHOWN_SIDE / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        mask = part.options.get("mask_box")
        return Media(caption, url, width=width, height=height, enlarged=scale > 1, mask=mask)

    def _audio(self, part: Part, caption: str) -> Media:
        samples = read_audio(part.raw, sys.maxsize)
        seconds, span = part.options.get("seconds"), part.options.get("mask_span")
        if seconds is not None:
            samples = samples[: round(seconds * RATE)]
            missing = round(seconds * RATE) - len(samples)
            samples = read_audio(np.pad(samples, (0, missing)), sys.maxsize)  # refuses an empty one
        start, stop = (round(fraction * len(samples)) for fraction in span or (0, 0))
        position = np.arange(len(samples))
        samples = np.where((position >= start) & (position < stop), 0, samples)[: int(MAX_SECONDS * RATE)]
        drawn = spectrogram(samples)
        image = self._data_url("image/png", lambda stream: drawn.save(stream, "PNG", optimize=True))
        audio = self._data_url(
            "audio/wav", lambda stream: soundfile.write(stream, samples, RATE, "PCM_16", format="WAV")
        )
        left, right = (min(1.0, end / len(samples)) for end in (start, stop))
        mask = None if span is None else (left, 0.0, right, 1.0)
        return Media(f"{caption}, {len(samples) / RATE:.1f} s", image, audio, mask=mask)

    def _data_url(self, kind: str, write: Callable[[io.BytesIO], None]) -> str:
        """A file as a data URL; empty if it does not fit any more."""
        stream = io.BytesIO()
        write(stream)
        content = stream.getvalue()
        self.full = self.full or self.used + len(content) > self.limit
        if self.full:
            return ""
        self.used += len(content)
        return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def spectrogram(samples: np.ndarray) -> Image.Image:
    """Loudness over time and mel frequency.  # S"""
    hop = max(64, len(samples) // FRAMES)
    padded = np.pad(samples, (WINDOW // 2, WINDOW // 2 + hop)).astype(np.float64)
    starts = np.arange(0, len(padded) - WINDOW, hop)
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[starts] * np.hanning(WINDOW)  # T WINDOW
    filters = mel_filters(BANDS, WINDOW, RATE).numpy()
    power = np.square(np.abs(np.fft.rfft(frames, axis=1))) @ (filters / filters.max(0))  # T F
    loudness = 10 * np.log10(power.T[::-1] + 1e-8)  # F T, high frequencies first
    # 60 dB below the loudest is black; the lower limit keeps silence from being stretched into noise.
    top = max(float(loudness.max()), -10.0)
    level = np.clip((loudness - top + 60) / 60, 0, 1) * (len(_COLOURS) - 1)
    colours = [np.interp(level, np.arange(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(colours, -1).astype(np.uint8)).quantize(64)


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
    """Write report.json, report.html and README.md, the model card, each whole or not at all (OutputError)."""
    replace_text(run.path / "report.json", report_json(report, facts))
    replace_text(run.path / "report.html", report_html(run, report, facts))
    replace_text(run.path / "README.md", card(report, facts))


def report_json(report: EvalReport, facts: RunFacts) -> str:
    """Training and results as JSON; `weights_of_step` is the step whose weights the model has, if not the last."""
    content = {
        "seconds": facts.seconds,
        "params": {"total": facts.total_parameters, "active": facts.active_parameters},
        "tokens": facts.tokens,
        "steps": facts.steps,
        "weights_of_step": facts.weights_of_step,
        "tasks": {result.name: result.to_json() for result in report.results},
        "codecs": facts.codecs,
        "energy": facts.energy.to_json() if facts.energy is not None else None,
    }
    return to_json(content, indent=1) + "\n"


def report_html(run: RunFolder, report: EvalReport, facts: RunFacts) -> str:
    return report_environment().get_template("report.html").render(report_data(run, report, facts)) + "\n"


def report_environment() -> jinja2.Environment:
    """The template engine: all text is escaped, and an unknown name in the template is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        finalize=_printable, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    filters = (
        plain, count, short_count, duration, score, metric_title, words, signed, shorten, significance, answered,
    )  # fmt: skip
    environment.filters |= {function.__name__: function for function in filters}
    environment.filters |= {"joules": in_joules, "inline": _inline}
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
    results = report.results
    compared = [result for result in results if math.isfinite(result.baseline)]
    used = {name for result in results for name in (result.metric, *result.metrics)}
    cards: list[dict[str, Any]] = []
    entries: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for index, result in enumerate(results):
        drawn = math.isfinite(result.value) and min(result.value, result.baseline) >= 0  # False for NaN
        whole = 1.0 if is_percent(result.metric) and result.better == "higher" else None
        drawing = bar(result.value, result.baseline, whole) if drawn else None
        cards.append({"result": result, "link": f"task-{index}", "bar": drawing, "summary": result.summary})
        entries.setdefault((result.input_modality, result.output_modality), []).append(cards[-1])
    return {
        "facts": facts,
        "report": report,
        "modalities": list(MODALITIES),
        "inputs": _listed(kind for kind in MODALITIES if kind in {x for x, _ in entries}),
        "outputs": _listed(kind for kind in MODALITIES if kind in {y for _, y in entries}),
        "num_significant": sum(result.uses_inputs for result in results),
        "num_compared": len(compared),
        "num_better": sum(result.beats_baseline for result in compared),
        "entries": entries,
        "sections": _sample_sections(cards),
        "training": _training(read_lines(run), facts),
        "gpt3_caveat": GPT3_CAVEAT,
        "codecs": {name: codec_rows(scores) for name, scores in facts.codecs.items()},
        "codec_measures": CODEC_MEASURES,
        "metrics": [metric for name, metric in known_metrics().items() if name in used],
    }


def _listed(names: Iterable[str]) -> str:
    *first, last = list(names) or ["nothing that was evaluated"]
    return f"{', '.join(first)} and {last}" if first else last


def _sample_sections(cards: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The cards of results with samples, with these as the template shows them, by output modality."""
    sections = {
        kind: [x for x in cards if x["result"].output_modality == kind and x["result"].samples] for kind in MODALITIES
    }
    shown = [entry for found in sections.values() for entry in found]
    left = MEDIA_BYTES
    for index, entry in enumerate(shown):
        # An equal part of the bytes that are left: what one task saves, the next may use.
        media = MediaBudget(left // (len(shown) - index))
        entry["samples"] = [sample_data(sample, media) for sample in entry["result"].samples[:MAX_SAMPLES]]
        left -= media.used
    return {kind: found for kind, found in sections.items() if found}


def sample_data(sample: Sample, media: MediaBudget) -> dict[str, Any]:
    """A test record as the template shows it: its inputs, and the answer beside the truth.

    Texts are in `text`, numbers in `forecast` or in `charts` and the number of those `left_out`, images and audio in
    `media`, those of the inputs first.
    """
    parts, answer, truth = sample.inputs[:MAX_PARTS], sample.answer, sample.truth
    if isinstance(answer, str):
        true = "" if truth is None else str(truth).strip()
        text = {"answer": answer.strip(), "truth": true, "correct": bool(true) and same_text(answer, str(truth))}
        return {"inputs": _inputs(parts, media), "text": text}
    if isinstance(answer, Histogram):
        inputs = _inputs(parts, media)
        past = next((part.raw for part in sample.inputs if isinstance(part.raw, NumberSeries)), None)
        forecast = None if past is None else forecast_chart(past, answer, truth)
        if forecast is not None:
            return {"inputs": inputs, "forecast": forecast}
        charts = value_charts(answer, truth)
        return {"inputs": inputs, "charts": charts, "left_out": len(answer.probability) - len(charts)}
    kind, options = "image", {}
    if isinstance(answer, np.ndarray):
        # The truth is cut to the length of the answer, so that both spectrograms share their time axis. A masked span
        # is in fractions of that length.
        kind, options = "audio", {"seconds": len(answer) / RATE}
        parts = [
            replace(part, options=part.options | options) if part.options.get("mask_span") is not None else part
            for part in parts
        ]
    inputs = _inputs((part for part in parts if part.modality in ("text", "numbers")), media)
    row = [media.add(part, "input") for part in parts if part.modality in ("image", "audio")]
    row += [media.add(Part(kind, answer), "model")]
    row += [] if truth is None else [media.add(Part(kind, truth, options), "truth")]
    return {"inputs": inputs, "media": row}


def _inputs(parts: Iterable[Part], media: MediaBudget) -> list[Any]:
    return [shown for part in parts if (shown := _input(part, media)) != ""]


def _input(part: Part, media: MediaBudget) -> str | Media | NumberSeries | dict[str, Any]:
    if part.modality in ("image", "audio"):
        return media.add(part, "input")
    if isinstance(part.raw, NumberSeries):
        return part.raw
    if isinstance(part.raw, dict):
        shown = list(part.raw.items())[:MAX_COLUMNS]
        columns = {  # dates are text
            name: value if isinstance(value, str) else "missing" if value is None else plain(float(value))
            for name, value in shown
        }
        return {"columns": columns, "left_out": len(part.raw) - len(shown)}
    return TURNS.sub("", str(part.raw)).strip().replace(MASK_CHARACTER, TEXT_GAP)


def _training(lines: Lines, facts: RunFacts) -> dict[str, Any]:
    last, drawn = lines[-1] if lines else {}, len(lines) >= 2
    return {
        "speed": facts.tokens / facts.seconds if facts.seconds > 0 else math.nan,
        "skipped": last.get("non_finite", 0),
        "spikes": last.get("spikes", 0),
        "losses": _loss_curves(lines) if drawn else [],
        "curves": _system_curves(lines) if drawn else [],
    }


def _loss_curves(lines: Lines) -> list[dict[str, Any]]:
    """The losses by modality, in the order of MODALITIES; the total if there are none."""
    names = {
        key.removeprefix("loss/").removesuffix("_out"): key for line in lines for key in line if key.startswith("loss/")
    }
    order = [*(kind for kind in MODALITIES if kind in names), *sorted(names.keys() - MODALITIES)]
    curves = []
    for kind in order or ["loss"]:
        values = _column(lines, names.get(kind, kind))
        first, last = _ends(values)
        drawing = history(_column(lines, "step"), values[None], f"loss {kind} over steps")
        reading = f"{plain(first, 3)} → {plain(last, 3)}"
        curves.append({"title": kind, "reading": reading, "chart": drawing, "tone": kind, "note": ""})
    return curves


def _system_curves(lines: Lines) -> list[dict[str, Any]]:
    """The coefficient of variation of the experts' load, if there are experts, and the speed."""
    steps, curves = _column(lines, "step"), []
    layers = np.array([*zip_longest(*(line.get("expert_load_cv") or [] for line in lines))], float)  # L P
    if len(layers):
        drawing = history(steps, layers, "coefficient of variation of expert load over steps", from_zero=True)
        _, last = _ends(np.array([finite_mean(column) for column in layers.T]))
        note = "σ/μ of the tokens per expert, by layer (fine) and on average: 0 is a perfect balance."
        reading = plain(last, 3)
        curves.append({"title": "expert load CV", "reading": reading, "chart": drawing, "tone": "plain", "note": note})
    speeds = _column(lines, "tokens_per_second")
    drawing = history(steps, speeds[None], "tokens per second over steps", from_zero=True)
    known, note = speeds[np.isfinite(speeds)], "Packed input and target tokens; median above."
    reading = plain(float(np.median(known)) if len(known) else math.nan)
    curves.append({"title": "tokens per second", "reading": reading, "chart": drawing, "tone": "plain", "note": note})
    return curves


def _column(lines: Lines, name: str) -> np.ndarray:
    """Values of one key; NaN where a line lacks it.  # P"""
    return np.array([line.get(name) for line in lines], float)


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
