"""The slots tasks are made of: a text, a picture, a sound, numbers or a series of a record, whole or with a hole."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from openm6.modalities.image import random_hole
from openm6.modalities.interface import Cuttable, Part
from openm6.modalities.numbers import NumberSeries
from openm6.modalities.sound import random_gap, random_speed
from openm6.modalities.text import GAP
from openm6.tasks.task import Record, Scene, Slot

YES_NO = {"en": ("no", "yes"), "zh": ("否", "是")}


def localised(record: Record, name: str, language: str) -> Any:
    """A record's field in a language.

    `text` and `tags` carry a language suffix; `label` is English and `label_zh` Chinese; the other known keys have
    none. Any other name is looked for in `extra`.
    """
    if name in ("text", "tags"):
        return record.get(f"{name}_{language}")
    if name == "label" and language == "zh":
        return record.get("label_zh")
    return record[name] if name in record else _beside(record.get("extra") or {}, name, language)


def _beside(extra: Record, name: str, language: str) -> Any:
    """A field kept beside: `name_en` or `name_zh`, else `name` where it is written in that language."""
    if f"{name}_{language}" in extra:
        return extra[f"{name}_{language}"]
    plain = extra.get(name)
    if plain is None or is_chinese(as_text(plain)) != (language == "zh"):
        return None
    return plain


def is_chinese(text: str) -> bool:
    """Whether any letter of a text is Chinese."""
    return any("\u4e00" <= letter <= "\u9fff" for letter in text)


def as_text(value: Any) -> str:
    """A field as text: lists are joined with commas."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Text(Slot):
    """A text field in the example's language; a list is joined."""

    name: str
    max_tokens: int = 256

    def present(self, record: Record, language: str) -> bool:
        return bool(localised(record, self.name, language))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        return [Part("text", text, {"max_tokens": self.max_tokens})]

    def key(self, record: Record, scene: Scene) -> str:
        return as_text(localised(record, self.name, scene.language))


@dataclass(frozen=True)
class Gloss(Text):
    """A text without the words before its first colon where the label is among them: a definition without its word."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        head, colon, rest = text.partition(": ")
        label = as_text(localised(record, "label", scene.language) or "")
        return [Part("text", rest if colon and label and label in head else text)]


@dataclass(frozen=True)
class Caption(Text):
    """A text that says what goes with it; records of one English text say the same, in whatever language."""

    def key(self, record: Record, scene: Scene) -> str:
        return str(record.get("text_en") or record.get("text_zh") or record.get("id"))


@dataclass(frozen=True)
class OtherLanguage(Text):
    """The same field in the other language: what a translation wants."""

    def present(self, record: Record, language: str) -> bool:
        return bool(localised(record, self.name, _other(language)))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, _other(scene.language)))
        return [Part("text", text, {"max_tokens": self.max_tokens})]

    def key(self, record: Record, scene: Scene) -> str:
        return as_text(localised(record, self.name, _other(scene.language)))


def _other(language: str) -> str:
    return "zh" if language == "en" else "en"


@dataclass(frozen=True)
class TextWithHoles(Text):
    """The text without `share` of its words (Chinese: characters), in runs of about `run`; a gap marks each run."""

    share: float = 0.15
    run: int = 3

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        chinese = scene.language == "zh"
        units = list(text) if chinese else text.split(" ")
        kept: list[str] = []
        stop = 0
        for start, end in self._runs(len(units), scene):
            kept += [*units[stop:start], GAP]
            stop = end
        return [Part("text", ("" if chinese else " ").join([*kept, *units[stop:]]))]

    def _runs(self, count: int, scene: Scene) -> list[tuple[int, int]]:
        """Start and end of each run, in order and a word or more apart (arXiv 1910.10683, section 3.3.4)."""
        lost = max(1, round(self.share * count))
        runs = max(1, round(lost / self.run))
        lengths = [lost // runs + (number < lost % runs) for number in range(runs)]
        # Each run starts at a word of its own among the `count - lost` words that stay, or after the last of them.
        places = sorted(scene.rng.choice(count - lost + 1, runs, replace=False).tolist())
        before = [sum(lengths[:number]) for number in range(runs)]
        return [
            (place + gone, place + gone + length)
            for place, gone, length in zip(places, before, lengths, strict=True)
        ]


@dataclass(frozen=True)
class FirstPart(Text):
    """The beginning of a text, up to a cut that the wanted `Rest` shares; of a long one, what stands before the cut."""

    def present(self, record: Record, language: str) -> bool:
        return len(localised(record, self.name, language) or "") >= 12

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        cut = _cut(text, scene)
        return [Part("text", text[:cut], {"cuttable": (Cuttable(0, cut, keep_end=True),)})]


@dataclass(frozen=True)
class Rest(FirstPart):
    """What follows the cut."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        return [Part("text", text[_cut(text, scene) :], {"max_tokens": self.max_tokens})]


def _cut(text: str, scene: Scene) -> int:
    """Somewhere in the middle half, at a space where there is one; drawn once for both halves."""
    if "cut" not in scene.shared:
        place = int(scene.rng.integers(len(text) // 4, max(len(text) // 4 + 1, 3 * len(text) // 4)))
        space = text.find(" ", place)
        scene.shared["cut"] = space if 0 <= space < len(text) - 1 else place
    return scene.shared["cut"]


@dataclass(frozen=True)
class Picture(Slot):
    """The record's picture; drawn when wanted."""

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get("image"))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("image", record["image"])]


@dataclass(frozen=True)
class PictureWithHole(Picture):
    """The picture with a box hidden; given and wanted share the box."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        hole = scene.shared.setdefault("hole", random_hole(scene.rng))
        return [Part("image", record["image"], {"hole": hole})]

    def key(self, record: Record, scene: Scene) -> str:
        return str(record.get("id"))


@dataclass(frozen=True)
class Sound(Slot):
    """The record's sound; spoken when wanted, as long as the modality's setting says."""

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get("audio"))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("sound", record["audio"])]


@dataclass(frozen=True)
class SoundWithGap(Sound):
    """The sound with a stretch silenced; given and wanted share the stretch."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        shared = scene.shared
        if "gap" not in shared:  # one gap and one speed for what is given and what is wanted
            shared["gap"] = random_gap(scene.rng)
            shared["speed"] = random_speed(scene.rng) if scene.train else 1.0
        return [Part("sound", record["audio"], {"gap": shared["gap"], "speed": shared["speed"]})]

    def key(self, record: Record, scene: Scene) -> str:
        return str(record.get("id"))


def observed(record: Record) -> dict[str, float]:
    """The columns of a record that hold a value."""
    numbers = record.get("numbers") or {}
    return {name: value for name, value in numbers.items() if value is not None and not math.isnan(value)}


@dataclass(frozen=True)
class Columns(Slot):
    """The record's number columns, without the one that is wanted."""

    at_least: int = 1

    def present(self, record: Record, language: str) -> bool:
        return len(record.get("numbers") or {}) >= self.at_least

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        wanted = scene.shared.get("column")
        return [Part("numbers", {name: value for name, value in record["numbers"].items() if name != wanted})]


@dataclass(frozen=True)
class OneColumn(Slot):
    """One observed column, drawn anew each time, or always the one named."""

    name: str | None = None

    def present(self, record: Record, language: str) -> bool:
        seen = observed(record)
        return bool(seen) if self.name is None else self.name in seen

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        seen = observed(record)
        if "column" not in scene.shared:
            scene.shared["column"] = self.name or sorted(seen)[int(scene.rng.integers(len(seen)))]
        name = scene.shared["column"]
        return [Part("numbers", {name: seen[name]})]

    def key(self, record: Record, scene: Scene) -> str:
        return f"{scene.shared['column']}={observed(record)[scene.shared['column']]}"


@dataclass(frozen=True)
class Past(Slot):
    """The context of a window over a series: one column, drawn when there are several."""

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get("series"))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        name, values = _series(record, scene)
        return [Part("numbers", NumberSeries(name, values[: len(values) - record["extra"]["horizon"]]))]


@dataclass(frozen=True)
class Future(Past):
    """The steps to forecast."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        name, values = _series(record, scene)
        return [Part("numbers", NumberSeries(name, values[len(values) - record["extra"]["horizon"] :]))]

    def key(self, record: Record, scene: Scene) -> str:
        return str(record.get("id"))


def _series(record: Record, scene: Scene) -> tuple[str, list[float | None]]:
    series = record["series"]
    if "column" not in scene.shared:
        scene.shared["column"] = sorted(series)[int(scene.rng.integers(len(series)))]
    return scene.shared["column"], series[scene.shared["column"]]
