"""What the model did with single test records: given, answered and true, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image as Pillow

from openm6.base.errors import DataError
from openm6.evaluate.figures import metric_title, plain, score, signed, standing, words
from openm6.evaluate.metrics import same_text
from openm6.evaluate.report_markup import Markup, join, quoted, tag
from openm6.evaluate.report_media import Media, heard
from openm6.evaluate.report_numbers import forecast, prediction
from openm6.evaluate.report_pairs import pair
from openm6.evaluate.results import Sample, TaskResult
from openm6.evaluate.table import answered
from openm6.modalities.interface import Part
from openm6.modalities.numbers import Histogram, NumberSeries
from openm6.modalities.sound import RATE
from openm6.modalities.text import GAP
from openm6.tasks.registry import TASKS

AT_ONCE, MOST_SAMPLES = 3, 6  # of one task: shown at once, and with those that unfold
BLANK = "____"  # for the gap of a text, whose own sign few fonts have
MOST_PARTS = 8  # of one record
MOST_COLUMNS = 10
MEDIA_BYTES = 9 * 2**20  # of all pictures and sounds together, before base64 makes them a third longer
HEADINGS = {
    "text": ("What it writes", "Text answers, beside the truth."),
    "image": ("What it draws", "Drawn pictures, beside the real ones."),
    "sound": ("What it says", "Spoken answers, beside the recordings. Each can be played."),
    "numbers": ("What it predicts", "Whole distributions, not single guesses, against what was measured."),
}


def samples_by_answer(results: list[TaskResult], numbers: dict[str, int]) -> Markup:
    """A section for each kind of answer, with a card for each task; `numbers` gives each task's anchor."""
    left, waiting = MEDIA_BYTES, sum(bool(result.samples) for result in results)
    sections = []
    for kind, (title, lead) in HEADINGS.items():
        cards = []
        for result in (result for result in results if result.samples and result.gives == kind):
            # An equal share of what is left: what one task saves, the next may use.
            media = Media(left // waiting)
            cards.append(_task(result, numbers[result.name], media))
            left, waiting = left - media.used, waiting - 1
        if cards:
            head = tag("h2", title, attributes={"id": f"gives-{kind}"})
            legend = _legend() if kind == "numbers" else None
            sections.append(tag(f"section.gives.tone-{kind}", head, tag("p.lead", lead), legend, *cards))
    return join(sections)


def _legend() -> Markup:
    entries = {"shape": "predicted", "interval": "80 % interval"}
    entries |= {name: name for name in ("median", "truth", "past")}
    return tag("ul.legend", *[tag("li", tag(f"i.{name}"), text) for name, text in entries.items()])


def _task(result: TaskResult, number: int, media: Media) -> Markup:
    task = TASKS.get(result.task)
    title = tag("h3", words(result.task), tag("small", words(result.source)))
    about = tag("p.about", f"{task.summary[0].upper()}{task.summary[1:]}.") if task else None
    cards = [_sample(sample, media) for sample in result.samples[:MOST_SAMPLES]]
    head = tag("header", tag("div", pair(result.reads, result.gives), title, about), _scores(result))
    place = {"id": f"task-{number}"}
    shown = tag("div.samples", *cards[:AT_ONCE])
    return tag("article.task", head, shown, _more(cards[AT_ONCE:]), attributes=place)


def _more(cards: list[Markup]) -> Markup | None:
    if not cards:
        return None
    return tag("details", tag("summary", f"{len(cards)} more"), tag("div.samples", *cards))


def _scores(result: TaskResult) -> Markup:
    """All metrics of a task as a short list; the first with its baseline."""
    rows = []
    for name, value in ({result.metric: result.value} | result.metrics).items():
        against = f" ({result.baseline_name} {score(name, result.baseline)})" if name == result.metric else ""
        against = against if np.isfinite(result.baseline) else ""
        value_said = tag("dd", tag("b", score(name, value)), against)
        rows.append(tag("div", tag("dt", metric_title(name)), value_said))
    bits = tag(f"b.{standing(result.information_interval)}", signed(result.information_gain))
    entropy = result.answer_entropy
    most = "" if entropy is None else f" (the answers have {plain(entropy, digits=3)})"
    rows.append(tag("div", tag("dt", "information gain, bits"), tag("dd", bits, most)))
    rows.append(tag("div", tag("dt", "test records answered"), tag("dd", answered(result))))
    return tag("dl.scores", *rows)


def _sample(sample: Sample, media: Media) -> Markup:
    parts = sample.given[:MOST_PARTS]
    past = next((part.raw for part in sample.given if isinstance(part.raw, NumberSeries)), None)
    answer = sample.answer
    if isinstance(answer, str):
        return tag("div.sample", _shown(parts, media), _text(answer, sample.truth))
    if isinstance(answer, Histogram):
        drawn = prediction(answer, sample.truth) if past is None else forecast(past, answer, sample.truth)
        return tag("div.sample", _shown(parts, media), tag("div.outcome", drawn))
    if isinstance(answer, np.ndarray):
        parts = [_as_long(part, len(answer) / RATE) for part in parts]
    # Pictures and sounds stand in one row, given ones first; words and numbers stand above it.
    told = [part for part in parts if part.modality not in ("image", "sound")]
    seen = [_given(part, media) for part in parts if part.modality in ("image", "sound")]
    show = media.picture if isinstance(answer, Pillow.Image) else media.sound
    outcome = [show(answer, "model"), show(_cut_like(answer, sample.truth), "real")]
    return tag("div.sample", _shown(told, media) if told else None, tag("div.row", *seen, *outcome))


def _shown(parts: list[Part], media: Media) -> Markup:
    return tag("div.given", *[_given(part, media) for part in parts])


def _as_long(part: Part, seconds: float) -> Part:
    """A sound with a gap at the length of the answer: the gap is given as shares of that."""
    if part.options.get("gap") is None:
        return part
    return replace(part, options={**part.options, "seconds": seconds})


def _cut_like(answer: Any, truth: Any) -> Any:
    """The true sound brought to the length that was asked for, so that both spectrograms share their time axis."""
    if not isinstance(answer, np.ndarray):
        return truth
    try:
        return heard(Part("sound", truth, {"seconds": len(answer) / RATE}))
    except DataError:
        return truth


def _text(answer: str, truth: Any) -> Markup:
    right = same_text(answer, str(truth))
    verdict = tag("dd.verdict.right", "✓", attributes={"title": "as the truth"}) if right else None
    said = quoted(answer.strip()) if answer.strip() else tag("span.missing", "(nothing)")
    rows = [tag("div", tag("dt", "model"), tag("dd.answer", said), verdict)]
    rows.append(tag("div", tag("dt", "truth"), tag("dd", quoted(str(truth).strip()))))
    return tag("dl.outcome", *rows)


def _given(part: Part, media: Media) -> Markup:
    """One part of what the model read, as it read it: with its hole or its gap."""
    if part.modality == "image":
        return media.picture(part.raw, "given", part.options.get("hole"))
    if part.modality == "sound":
        try:
            return media.sound(heard(part), "given", part.options.get("gap"))
        except DataError as error:
            return tag("p.missing", quoted(str(error)))
    if isinstance(part.raw, NumberSeries):
        return tag("p.prompt", tag("b", words(part.raw.name)), f", {len(part.raw.values)} steps")
    if isinstance(part.raw, dict):
        return _columns(part.raw)
    return quoted(str(part.raw).strip().replace(GAP, BLANK), "p.prompt")


def _columns(values: dict[str, Any]) -> Markup:
    said = {
        words(str(name)): "missing" if value is None else plain(float(value))
        for name, value in list(values.items())[:MOST_COLUMNS]
    }
    rows = [tag("div", tag("dt", name), tag("dd", value)) for name, value in said.items()]
    rest = len(values) - MOST_COLUMNS
    more = tag("div", tag("dt", f"and {rest} more"), tag("dd", "…")) if rest > 0 else None
    return tag("dl.columns", *rows, more)
