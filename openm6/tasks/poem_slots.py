"""Slots over poems: the title, what follows it, and the two lines of a couplet."""

from __future__ import annotations

import re
from dataclasses import dataclass

from openm6.modalities.interface import Part
from openm6.tasks.slots import Text, as_text, localised
from openm6.tasks.task import Record, Scene

_SENTENCE = re.compile(r"[。！？；.!?;\n]+")
_COMMA = re.compile(r"[，,]")


def couplets(text: str) -> list[tuple[str, str]]:
    """Neighbouring halves of equal length within a sentence: upper line, lower line."""
    found = []
    for sentence in _SENTENCE.split(text):
        halves = [half.strip() for half in _COMMA.split(sentence)]
        if len(halves) == 2 and len(halves[0]) == len(halves[1]) >= 3:
            found.append((halves[0], halves[1]))
    return found


@dataclass(frozen=True)
class UpperLine(Text):
    """The first line of a couplet of the text, drawn once for both lines."""

    half: int = 0

    def present(self, record: Record, language: str) -> bool:
        return bool(couplets(as_text(localised(record, self.name, language) or "")))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language))
        if "couplet" not in scene.shared:
            known = couplets(text)
            scene.shared["couplet"] = known[int(scene.rng.integers(len(known)))]
        return [Part("text", scene.shared["couplet"][self.half], {"max_tokens": self.max_tokens})]

    def key(self, record: Record, scene: Scene) -> str:
        return str(scene.shared["couplet"][self.half])


@dataclass(frozen=True)
class LowerLine(UpperLine):
    """The second line."""

    half: int = 1


@dataclass(frozen=True)
class Heading(Text):
    """The first line of a text of several lines, its title."""

    def present(self, record: Record, language: str) -> bool:
        first, _, rest = as_text(localised(record, self.name, language) or "").partition("\n")
        return bool(first.strip() and rest.strip())

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("text", as_text(localised(record, self.name, scene.language)).partition("\n")[0])]


@dataclass(frozen=True)
class Body(Heading):
    """What follows the title."""

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        text = as_text(localised(record, self.name, scene.language)).partition("\n")[2]
        return [Part("text", text, {"max_tokens": self.max_tokens})]


@dataclass(frozen=True)
class Author(Text):
    """The label as it is written: a name is the same in every language."""

    def present(self, record: Record, language: str) -> bool:
        return bool(record.get(self.name))

    def parts(self, record: Record, scene: Scene) -> list[Part]:
        return [Part("text", as_text(record[self.name]), {"max_tokens": self.max_tokens})]

    def key(self, record: Record, scene: Scene) -> str:
        return as_text(record[self.name])
