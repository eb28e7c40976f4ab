"""A task turns a record into an example: parts to read, one part to give, in the words of one prompt.

A task is data: slots for what is given and what is wanted, prompts in English and Chinese, the metrics that judge
the answer and the baseline it must beat. `{name}` in a prompt marks where a given slot goes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openm6.base.errors import ConfigError, MissingFieldError
from openm6.modalities.interface import Part
from openm6.modalities.truncation import join_texts

Record = dict[str, Any]
LANGUAGES = ("en", "zh")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Example:
    """A record seen through a task. `answer` is the truth as metrics want it; `key` tells like answers apart.

    `prompt` holds the prompt's own words without any input: all that remains when the inputs are dropped. Examples
    of one `block` depend on each other (windows that overlap), so a bootstrap draws them together.
    """

    task: str
    language: str
    source: list[Part]
    target: Part
    answer: Any
    key: str
    record_id: str = ""
    prompt: str = ""
    block: str = ""


@dataclass(frozen=True)
class Scene:
    """What the slots of one example share: the language, the draw, and choices that given and wanted agree on."""

    language: str
    rng: np.random.Generator
    train: bool
    shared: dict[str, Any] = field(default_factory=dict)


class Slot(ABC):
    """Finds one part in a record."""

    @abstractmethod
    def present(self, record: Record, language: str) -> bool:
        """Whether the record holds what this slot needs."""

    @abstractmethod
    def parts(self, record: Record, scene: Scene) -> list[Part]:
        """The part (or parts) to read, or, for a wanted slot, the single part to give."""

    def key(self, record: Record, scene: Scene) -> str:
        """What makes two answers the same: the label where there is one, else the record itself."""
        return str(record.get("label") or record.get("id"))


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn. `given` maps prompt names to slots; without prompts the slots are read in order."""

    name: str
    summary: str
    given: dict[str, Slot]
    wanted: Slot
    prompts: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...]
    baseline: str
    reads: str  # modality named first in the 4×4 table of pairs
    gives: str
    compares: bool = False  # the record must come with `others`, fields of other records
    contrasts: bool = False  # nothing is answered: given and wanted are to be embedded alike (InfoNCE)

    def __post_init__(self) -> None:
        for language, prompts in self.prompts.items():
            for prompt in prompts:
                unknown = set(_SLOT.findall(prompt)) - set(self.given) - {"column"}
                if language not in LANGUAGES or unknown:
                    raise ConfigError(
                        f"task {self.name}: prompt {prompt!r} names {unknown or language}, not given"
                    )

    def languages(self, record: Record) -> list[str]:
        """Languages in which this record can be posed; a spoken record is bound to the language it is spoken in."""
        spoken = (record.get("extra") or {}).get("spoken_language")
        slots = [*self.given.values(), self.wanted]
        fits = [
            language
            for language in self.prompts
            if all(slot.present(record, language) for slot in slots) and spoken in (None, language)
        ]
        return fits

    def example(
        self, record: Record, rng: np.random.Generator, train: bool = False, language: str | None = None
    ) -> Example:
        """The record as an example; the generator draws language, prompt and whatever the slots leave open.

        Raises:
            MissingFieldError: the record lacks a field that the task needs (in `language`, where one is given).
        """
        languages = [found for found in self.languages(record) if language in (None, found)]
        if not languages:
            raise MissingFieldError(
                f"record {record.get('id')!r} lacks a field that task {self.name} needs: map it or choose another"
            )
        language = languages[int(rng.integers(len(languages)))]
        prompt = self.prompts[language][int(rng.integers(len(self.prompts[language]))) if train else 0]
        scene = Scene(language, rng, train)
        # The wanted slot goes first: it may choose what the given ones must then leave out.
        target = self.wanted.parts(record, scene)[0]
        return Example(
            task=self.name,
            language=language,
            source=self._source(prompt, record, scene),
            target=target,
            answer=target.raw,
            key=self._key(record, scene),
            record_id=str(record.get("id", "")),
            prompt=without_inputs(prompt, scene),
            block=str((record.get("extra") or {}).get("block", "")),
        )

    def _key(self, record: Record, scene: Scene) -> str:
        slot = next(iter(self.given.values())) if self.contrasts else self.wanted
        return slot.key(record, scene)

    def _source(self, prompt: str, record: Record, scene: Scene) -> list[Part]:
        """The prompt with each `{name}` replaced by its slot's parts; neighbouring texts become one.

        What is too long is cut in its slots alone, never in the words of the prompt.
        """
        parts: list[Part] = []
        for number, piece in enumerate(_SLOT.split(prompt)):
            if number % 2 == 0:
                found = [Part("text", piece, {"cuttable": ()})] if piece else []
            elif piece == "column":
                found = [Part("text", _column(scene), {"cuttable": ()})]
            else:
                found = self.given[piece].parts(record, scene)
            for part in found:
                if part.modality == "text" and parts and parts[-1].modality == "text":
                    parts[-1] = join_texts(parts[-1], part)
                else:
                    parts.append(part)
        return parts


def without_inputs(prompt: str, scene: Scene) -> str:
    """The words of a prompt with its inputs left out; the name of the target column stays."""
    words = _SLOT.sub(
        lambda slot: _column(scene) if slot[1] == "column" else " ",
        prompt,
    )
    return " ".join(words.split())


def _column(scene: Scene) -> str:
    return str(scene.shared.get("column", "")).replace("_", " ")
