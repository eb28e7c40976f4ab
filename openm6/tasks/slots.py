"""Slots: how a task finds a text, an image, an audio recording or numbers in a record.

Some targets are built together with some inputs, because both depend on one random decision: cuts, masks, columns,
matches. Each function for them takes a record and the context of the example, and returns both sides.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from openm6.modalities.audio import random_span, random_speed
from openm6.modalities.image import random_box
from openm6.modalities.interface import Cuttable, Part
from openm6.modalities.series import NumberSeries, SeriesStats, fit_scale
from openm6.modalities.text import MASK_CHARACTER

Record = dict[str, Any]
MAX_TOKENS = 256
SHORT = 16  # at most so many tokens are a name or a category
ABSENT: tuple[object, ...] = (None, "", [], ())  # but not 0 and False, which are answers
MIN_STATED = 3  # letters of an answer that a text states
METRICS: dict[str, tuple[str, ...]] = {
    "text": ("exact_match",),
    "image": ("bits_per_code",),
    "audio": ("bits_per_code",),
    "numbers": ("relative_crps", "mae", "coverage_80"),
}


class Slot(ABC):
    """One part of a record. As a target it determines the metrics of its task."""

    modality: str

    @abstractmethod
    def present(self, record: Record, language: str) -> bool:
        """Whether the record holds what this slot needs."""

    @abstractmethod
    def part(self, record: Record, language: str) -> Part:
        """The part as input or target."""

    def key(self, record: Record, language: str) -> str:
        """Equal answers have equal keys: the label if there is one, else the id of the record."""
        return str(record.get("label") or record.get("id"))

    def metrics(self) -> tuple[str, ...]:
        return METRICS[self.modality]


def localised(record: Record, name: str, language: str) -> Any:
    """A field in a language.

    `text` and `tags` carry a language suffix; `label` is English and `label_zh` Chinese; the other known keys have
    none. Any other name is looked up in `extra`: `name_en` or `name_zh`, else `name` if it is in that language.
    """
    if name in ("text", "tags"):
        return record.get(f"{name}_{language}")
    if name == "label" and language == "zh":
        return record.get("label_zh")
    if name in record:
        return record[name]
    extra = record.get("extra") or {}
    if f"{name}_{language}" in extra:
        return extra[f"{name}_{language}"]
    plain = extra.get(name)
    return plain if _is_chinese(as_text(plain)) == (language == "zh") else None


def as_text(value: Any) -> str:
    """A field as text: lists are joined with commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Text(Slot):
    """A text field; a list is joined. `language` is that of the example, the other one, or any: the field as it is."""

    name: str
    max_tokens: int = MAX_TOKENS
    language: Literal["own", "other", "any"] = "own"
    modality = "text"

    def value(self, record: Record, language: str) -> Any:
        if self.language == "any":
            return record.get(self.name)
        if self.language == "other":
            language = "zh" if language == "en" else "en"
        return localised(record, self.name, language)

    def present(self, record: Record, language: str) -> bool:
        return self.value(record, language) not in ABSENT

    def part(self, record: Record, language: str) -> Part:
        own = self.name == "label" or f"{self.name}_zh" in (record.get("extra") or {})
        column = f"{self.name}_zh" if own and language == "zh" else self.name
        # A short text is a label, but for answers to questions of any kind.
        named = {"column": column} if self.max_tokens <= SHORT and self.name != "answer" else {}
        return Part("text", as_text(self.value(record, language)), {"max_tokens": self.max_tokens, **named})

    def key(self, record: Record, language: str) -> str:
        return as_text(self.value(record, language))

    def metrics(self) -> tuple[str, ...]:
        return ("exact_match",) if self.max_tokens <= SHORT else ("char_bigram_f1", "exact_match")


class Gloss(Text):
    """A text without the words before its first colon if the label is among them: a definition without its word."""

    def part(self, record: Record, language: str) -> Part:
        text = as_text(self.value(record, language))
        head, colon, rest = text.partition(": ")
        label = as_text(localised(record, "label", language) or "")
        return Part("text", rest if colon and label and label in head else text, {"max_tokens": self.max_tokens})


class Title(Text):
    """The first line of a text of several lines."""

    def present(self, record: Record, language: str) -> bool:
        first, _, rest = as_text(self.value(record, language) or "").partition("\n")
        return bool(first.strip() and rest.strip())

    def part(self, record: Record, language: str) -> Part:
        return Part("text", as_text(self.value(record, language)).partition("\n")[0])


class Body(Title):
    def part(self, record: Record, language: str) -> Part:
        text = as_text(self.value(record, language)).partition("\n")[2]
        return Part("text", text, {"max_tokens": self.max_tokens})


@dataclass(frozen=True)
class Media(Slot):
    modality: str

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get(self.modality))

    def part(self, record: Record, language: str) -> Part:
        return Part(self.modality, record[self.modality])

    def metrics(self) -> tuple[str, ...]:
        return (*METRICS[self.modality], "knn_accuracy")


@dataclass(frozen=True)
class Numbers(Slot):
    min_columns: int = 1
    modality = "numbers"

    def present(self, record: Record, language: str) -> bool:
        return len((record.get("numbers") or {}).keys() - input_only(record)) >= self.min_columns

    def part(self, record: Record, language: str) -> Part:
        return Part("numbers", dict(record["numbers"]))


# Keys of `extra`: the column that is always held out of a record, the number columns that never are, and by each key of
# records that a category column fills, such as label or tags_en, that column.
PINNED, INPUT_ONLY, FILLED_BY = "pinned_column", "input_only_columns", "filled_by"


def pinned(record: Record) -> str | None:
    """The column of a record that is always the target, if it has one."""
    return (record.get("extra") or {}).get(PINNED)


def observed(record: Record) -> dict[str, float]:
    """The number columns of a record that hold a value."""
    numbers = record.get("numbers") or {}
    return {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}


def input_only(record: Record) -> list[str]:
    """The number columns of a record that are never the target: the parts of its dates."""
    return (record.get("extra") or {}).get(INPUT_ONLY) or []


def predictable(record: Record) -> dict[str, float]:
    """The number columns of a record that hold a value and may be the target."""
    without = input_only(record)
    return {name: value for name, value in observed(record).items() if name not in without}


def filled_by(record: Record) -> dict[str, str]:
    """By each key of the record that a category column fills, that column."""
    return (record.get("extra") or {}).get(FILLED_BY) or {}


def categories(record: Record) -> dict[str, str]:
    """The category columns of a record that hold a value."""
    return {name: value for name, value in (record.get("categories") or {}).items() if value}


@dataclass(frozen=True)
class Context:
    language: str
    rng: np.random.Generator
    train: bool = False


@dataclass(frozen=True)
class Built:
    """A target with the inputs that depend on the same random decision.

    Without a `key`, that of the target's slot counts; `words` fill names in the prompt that are not inputs. `turns` are
    the whole prompt, if it is a chat.
    """

    inputs: dict[str, Part]
    target: Part
    key: str | None = None
    words: dict[str, str] = field(default_factory=dict)
    turns: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Derived(Slot):
    """A part that no field holds. As a target it has the function that builds it, together with derived inputs.

    `needs` returns what the part is built from, or whether the record has it.
    """

    modality: str
    build: Callable[[Record, Context], Built] | None = None
    needs: Callable[[Record, str], object] = lambda record, language: True

    def present(self, record: Record, language: str) -> bool:
        return bool(self.needs(record, language))

    def part(self, record: Record, language: str) -> Part:
        raise NotImplementedError("a derived input comes from the `build` function of its task's target")

    def key(self, record: Record, language: str) -> str:
        return str(record.get("id"))


IMAGE, AUDIO, NUMBERS = Media("image"), Media("audio"), Numbers()
TEXT, TAGS, LABEL = Text("text"), Text("tags"), Text("label", max_tokens=SHORT)


YES_NO = {"en": ("no", "yes"), "zh": ("否", "是")}
# The fraction of the words (in Chinese: characters) of a text that is masked, and the mean length of a masked run.
MASKED_FRACTION, MASKED_RUN = 0.15, 3
MIN_CHARACTERS = 12  # shorter texts are not continued
COUPLET_TOKENS = 32
_SENTENCE = re.compile(r"[。！？；.!?;\n]+")
_COMMA = re.compile(r"[，,]")
MIN_STEPS = 8  # shorter series are not used
ANOMALY_SCALES = 6.0  # of the series, by which an anomaly moves one step
KEPT_COLUMNS = (0.2, 1.0)  # of the columns, in the training examples that are not given all
MARGIN = (0.1, 0.5)  # between the value and the bound in a question, as a fraction of the value
NO_CLOCK = 0.2  # of the training windows, without their times: a series is often asked about without


def _text(record: Record, language: str) -> str:
    return as_text(localised(record, "text", language) or "")


def split_text(record: Record, context: Context) -> Built:
    """The beginning of a text and the rest, cut in the middle half, at a space if there is one."""
    text = _text(record, context.language)
    quarter = len(text) // 4
    cut = int(context.rng.integers(quarter, max(quarter + 1, 3 * len(text) // 4)))
    space = text.find(" ", cut)
    cut = space if 0 <= space < len(text) - 1 else cut
    # If the beginning is too long, its end is kept.
    beginning = Part("text", text[:cut], {"cuttable": (Cuttable(0, cut, keep_end=True),)})
    return Built({"text": beginning}, Part("text", text[cut:], {"max_tokens": MAX_TOKENS}), text)


def mask_words(record: Record, context: Context) -> Built:
    """A text with a mask for each masked run of words, and the text (T5, arXiv 1910.10683, section 3.3.4)."""
    text = _text(record, context.language)
    joint = "" if context.language == "zh" else " "
    words = text.split(" ") if joint else list(text)
    count = max(1, round(MASKED_FRACTION * len(words)))
    runs = max(1, round(count / MASKED_RUN))
    lengths = [count // runs + (index < count % runs) for index in range(runs)]
    # Each run starts at its own word among those that stay, or after the last of them: no two runs touch.
    starts = sorted(context.rng.choice(len(words) - count + 1, runs, replace=False).tolist())
    kept: list[str] = []
    done = masked = 0
    for start, length in zip(starts, lengths, strict=True):
        kept += [*words[done : start + masked], MASK_CHARACTER]
        masked += length
        done = start + masked
    source = Part("text", joint.join([*kept, *words[done:]]))
    return Built({"text": source}, Part("text", text, {"max_tokens": MAX_TOKENS}), text)


def couplets(text: str) -> list[tuple[str, str]]:
    """Neighbouring halves of equal length within a sentence: first line, second line."""
    sentences = ([half.strip() for half in _COMMA.split(sentence)] for sentence in _SENTENCE.split(text))
    pairs = ((halves[0], halves[1]) for halves in sentences if len(halves) == 2)
    return [(first, second) for first, second in pairs if len(first) == len(second) >= 3]


def draw_couplet(record: Record, context: Context) -> Built:
    found = couplets(_text(record, context.language))
    first, second = found[int(context.rng.integers(len(found)))]
    return Built({"line": Part("text", first)}, Part("text", second, {"max_tokens": COUPLET_TOKENS}), second)


def hold_out(record: Record, context: Context, column: str | None = None) -> Built:
    """One column that has a value, drawn each time unless it is named, and all other columns."""
    values = predictable(record)
    column = column or sorted(values)[int(context.rng.integers(len(values)))]
    others = {"numbers": Part("numbers", {name: x for name, x in record["numbers"].items() if name != column})}
    target, key = Part("numbers", {column: values[column]}), f"{column}={values[column]}"
    return Built(others, target, key, {"column": _words(column)})


def _shown(record: Record, context: Context, column: str, answer: str = "") -> dict[str, Part]:
    """All but media of a record, without one column, texts that it fills, and a text that holds the answer."""
    rng, language = context.rng, context.language
    # In half of the training examples some columns are left out, so that any number of them may be missing.
    kept = float(rng.uniform(*KEPT_COLUMNS)) if context.train and rng.random() < 0.5 else 1.0

    def others(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if name != column and (kept == 1 or rng.random() < kept)}

    numbers, named = others(observed(record)), others(categories(record))
    text = "" if filled_by(record).get(f"text_{language}") == column else _text(record, language)
    parts = {"numbers": Part("numbers", numbers)} if numbers else {}
    if TAGS.present(record, language) and filled_by(record).get(f"tags_{language}") != column:
        parts["tags"] = TAGS.part(record, language)
    if named:
        listed = "; ".join(f"{_words(name)}: {value}" for name, value in named.items())
        parts["categories"] = Part("text", listed, {"columns": named})
    if text and not (answer and states(text, answer)) and (kept == 1 or rng.random() < kept):
        parts["text"] = Part("text", text)
    return parts


def states(text: str, answer: str) -> bool:
    """Whether a text is the answer or has it among its words; there, one as short as "no" may be in any text.

    If that counted, the text would be missing for one of two answers, which would give the answer away.
    """
    text, answer = text.strip().lower(), answer.strip().lower()
    if text == answer:
        return True
    if answer not in text or _is_chinese(answer):
        return len(answer) > 1 and answer in text
    return len(answer) >= MIN_STATED and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None


def _is_chinese(text: str) -> bool:
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def _words(column: str) -> str:
    return column.replace("_", " ")


def _may_ask(values: Mapping[str, Any], record: Record, language: str) -> bool:
    """Whether a record holds a target among the values, and more, and prompts suit its text, else its categories."""
    if (pinned(record) or next(iter(values), None)) not in values:
        return False
    others = sum(bool(record.get(key)) for key in ("image", "audio", f"text_{language}", f"tags_{language}"))
    if others + len(observed(record)) + len(categories(record)) < 2:
        return False
    texts = {name: localised(record, "text", name) for name in YES_NO}
    if any(texts.values()):
        return bool(texts[language])
    return _is_chinese("".join(categories(record).values())) == (language == "zh")


def hold_out_number(record: Record, context: Context, column: str | None = None) -> Built:
    """One number, drawn each time unless it is named, and what else the record holds."""
    values = predictable(record)
    column = column or pinned(record) or sorted(values)[int(context.rng.integers(len(values)))]
    target, key = Part("numbers", {column: values[column]}), f"{column}={values[column]}"
    return Built(_shown(record, context, column), target, key, {"column": _words(column)})


def hold_out_category(record: Record, context: Context, column: str | None = None) -> Built:
    """One category, drawn each time unless it is named, and what else the record holds."""
    values = categories(record)
    column = column or pinned(record) or sorted(values)[int(context.rng.integers(len(values)))]
    answer = values[column]
    target = Part("text", answer, {"max_tokens": SHORT, "column": column})
    return Built(_shown(record, context, column, answer), target, f"{column}={answer}", {"column": _words(column)})


def split_series(record: Record, context: Context) -> Built:
    """The context of a window and the steps to forecast, of one column with later values if there are several."""
    extra, found = record["extra"], record["series"]
    horizon = extra["horizon"]
    known = extra.get("known_covariates", ())
    covariates = [*extra.get("past_covariates", ()), *known]
    columns = sorted(set(found) - set(covariates))
    names = [name for name in columns if any(value is not None for value in found[name][-horizon:])] or columns
    name = names[int(context.rng.integers(len(names)))]
    values = found[name]
    start = len(values) - horizon
    past, clock = values[:start], extra.get("clock")
    if clock is not None and context.train and context.rng.random() < NO_CLOCK:
        clock = None
    stats = SeriesStats(extra["period"], extra["log"]) if "period" in extra else None
    beside = [NumberSeries(other, found[other] if other in known else found[other][:start], clock=clock)
              for other in covariates]  # fmt: skip
    series = NumberSeries(name, past, clock=clock, stats=stats, beside=beside)
    position = extra.get("position") if context.train else None
    future = NumberSeries(name, values[start:], past, clock, stats, position=position)
    return Built({"series": Part("numbers", series)}, Part("numbers", future))


def ask_column(record: Record, context: Context) -> Built:
    """A question whether a column lies above a bound near its value, and the answer."""
    seen, rng = predictable(record), context.rng
    name = sorted(seen)[int(rng.integers(len(seen)))]
    above = bool(rng.random() < 0.5)
    margin = max(abs(seen[name]), 1.0) * float(rng.uniform(*MARGIN))
    bound = float(f"{seen[name] + (-margin if above else margin):.3g}")
    column = _words(name)
    questions = {"en": f"Is the {column} above {bound:g}?", "zh": f"{column}大于{bound:g}吗？"}
    answer = YES_NO[context.language][int(above)]
    return Built({"question": Part("text", questions[context.language])}, Part("text", answer), key=str(above))


def _long_series(record: Record) -> dict[str, list[float | None]]:
    series = record.get("series") or {}
    return {name: values for name, values in series.items() if len(values) >= MIN_STEPS}


def insert_anomaly(record: Record, context: Context) -> Built:
    """A series, half of the time with one step moved, and that step, counted from 1, or none."""
    rng, found = context.rng, _long_series(record)
    name = sorted(found)[int(rng.integers(len(found)))]
    values = list(found[name])
    step, answers = None, {"en": "none", "zh": "无"}
    if rng.random() < 0.5:
        index = int(rng.integers(len(values)))
        loc, scale = fit_scale(np.asarray([np.nan if value is None else value for value in values], float))
        sign = 1 if rng.random() < 0.5 else -1
        old = values[index]
        values[index] = (loc if old is None else old) + sign * ANOMALY_SCALES * scale
        step, answers = index + 1, {"en": f"step {index + 1}", "zh": f"第{index + 1}步"}
    series = Part("numbers", NumberSeries(name, values))
    return Built({"series": series}, Part("text", answers[context.language]), key=str(step))


def draw_match(own: Part, negatives: Sequence[Any], context: Context) -> Built:
    """The record's own part or, half of the time, a negative, and which of them it is."""
    fits = not negatives or bool(context.rng.random() < 0.5)
    shown = own if fits else Part(own.modality, negatives[int(context.rng.integers(len(negatives)))])
    answer = Part("text", YES_NO[context.language][int(fits)])
    return Built({own.modality: shown}, answer, key=str(fits))


def match_text(record: Record, context: Context) -> Built:
    """A text, and whether it is the record's."""
    own = _text(record, context.language)
    texts = [other.get(context.language) for other in record.get("others", ())]
    return draw_match(Part("text", own), [text for text in texts if text not in (None, own)], context)


def mask_box(record: Record, context: Context) -> Built:
    """An image with a random box masked, as input and target."""
    box = random_box(context.rng)
    # The second draw is unused; without it all later draws of the example would change.
    random_box(context.rng)
    image = Part("image", record["image"], {"mask_box": box})
    return Built({"image": image}, image)


def match_audio(record: Record, context: Context) -> Built:
    """A recording, and whether it is the record's; others have another label, or without labels other bytes."""
    key = "label" if record.get("label") else "audio"
    others = [other for other in record.get("others", ()) if other.get(key) != record[key]]
    negatives = [other["audio"] for other in others if other.get("audio")]
    return draw_match(Part("audio", record["audio"]), negatives, context)


def mask_span(record: Record, context: Context) -> Built:
    """A recording with a random span masked, as input and target, both at one speed."""
    span = random_span(context.rng)
    speed = random_speed(context.rng) if context.train else 1.0
    audio = Part("audio", record["audio"], {"mask_span": span, "speed": speed})
    return Built({"audio": audio}, audio)


# Slots by the names that `built_in.yaml` calls them.
SLOTS: dict[str, Slot] = {
    "image": IMAGE,
    "audio": AUDIO,
    "numbers": NUMBERS,
    "several_numbers": Numbers(min_columns=2),  # one column is held out
    "rest_of_text": Derived("text", split_text, lambda record, lang: len(_text(record, lang)) >= MIN_CHARACTERS),
    "unmasked_text": Derived("text", mask_words),
    "second_line": Derived("text", draw_couplet, lambda record, language: couplets(_text(record, language))),
    "number": Derived("numbers", hold_out, lambda record, _: predictable(record)),
    # The price, from all other columns.
    "price": Derived("numbers", partial(hold_out, column="price"), lambda record, _: "price" in observed(record)),
    "any_number": Derived("numbers", hold_out_number, lambda row, lang: _may_ask(predictable(row), row, lang)),
    "any_category": Derived("text", hold_out_category, lambda row, lang: _may_ask(categories(row), row, lang)),
    "future": Derived("numbers", split_series, lambda x, _: x.get("series") and "horizon" in (x.get("extra") or ())),
    "column_answer": Derived("text", ask_column, lambda record, _: predictable(record)),
    "anomaly": Derived("text", insert_anomaly, lambda record, _: _long_series(record)),
    "text_match": Derived("text", match_text),
    "audio_match": Derived("text", match_audio),
    "unmasked_image": Derived("image", mask_box),
    "unmasked_audio": Derived("audio", mask_span),
}
# Slots that read a field: {gloss: text} is `Gloss("text")`.
KINDS: dict[str, Callable[..., Slot]] = {
    "text": Text,
    "category": partial(Text, max_tokens=SHORT),
    "gloss": Gloss,
    "title": Title,
    "body": Body,
    "derived": Derived,
}
