"""Slots: how a task finds a text, an image, an audio recording or numbers in a record."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from openm6.modalities.interface import Part

Record = dict[str, Any]
MAX_TOKENS = 256
# A text of at most this many tokens is a name or a category.
SHORT = 16
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
    if plain is None:
        return None
    chinese = any("\u4e00" <= character <= "\u9fff" for character in as_text(plain))
    return plain if chinese == (language == "zh") else None


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
        return bool(self.value(record, language))

    def part(self, record: Record, language: str) -> Part:
        column = f"{self.name}_zh" if self.name == "label" and language == "zh" else self.name
        # A short text is a label, but for answers to questions of any kind.
        named = {"column": column} if self.max_tokens <= SHORT and self.name != "answer" else {}
        return Part("text", as_text(self.value(record, language)), {"max_tokens": self.max_tokens, **named})

    def key(self, record: Record, language: str) -> str:
        return as_text(self.value(record, language))

    def metrics(self) -> tuple[str, ...]:
        return ("exact_match",) if self.max_tokens <= SHORT else ("char_bigram_f1", "exact_match")


@dataclass(frozen=True)
class Gloss(Text):
    """A text without the words before its first colon if the label is among them: a definition without its word."""

    def part(self, record: Record, language: str) -> Part:
        text = as_text(self.value(record, language))
        head, colon, rest = text.partition(": ")
        label = as_text(localised(record, "label", language) or "")
        return Part("text", rest if colon and label and label in head else text)


@dataclass(frozen=True)
class Title(Text):
    """The first line of a text of several lines."""

    def present(self, record: Record, language: str) -> bool:
        first, _, rest = as_text(self.value(record, language) or "").partition("\n")
        return bool(first.strip() and rest.strip())

    def part(self, record: Record, language: str) -> Part:
        return Part("text", as_text(self.value(record, language)).partition("\n")[0])


@dataclass(frozen=True)
class Body(Title):
    """What follows the title."""

    def part(self, record: Record, language: str) -> Part:
        text = as_text(self.value(record, language)).partition("\n")[2]
        return Part("text", text, {"max_tokens": self.max_tokens})


@dataclass(frozen=True)
class Media(Slot):
    """The record's image or audio recording, whole."""

    modality: str

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get(self.modality))

    def part(self, record: Record, language: str) -> Part:
        return Part(self.modality, record[self.modality])

    def metrics(self) -> tuple[str, ...]:
        return (*METRICS[self.modality], "knn_accuracy")


@dataclass(frozen=True)
class Numbers(Slot):
    """All number columns of the record."""

    min_columns: int = 1
    modality = "numbers"

    def present(self, record: Record, language: str) -> bool:
        return len((record.get("numbers") or {}).keys() - input_only(record)) >= self.min_columns

    def part(self, record: Record, language: str) -> Part:
        return Part("numbers", dict(record["numbers"]))


# The key of `extra` with the column that is always held out of a record.
PINNED = "pinned_column"
# The key of `extra` with the number columns that are never held out.
INPUT_ONLY = "input_only_columns"


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


def categories(record: Record) -> dict[str, str]:
    """The category columns of a record that hold a value."""
    return {name: value for name, value in (record.get("categories") or {}).items() if value}


@dataclass(frozen=True)
class Context:
    """What an example depends on besides its record."""

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
TEXT, LABEL, QUESTION = Text("text"), Text("label", max_tokens=SHORT), Text("question")
