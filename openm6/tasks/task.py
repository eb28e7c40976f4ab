"""A task turns a record into an example: inputs, one target, and a prompt in English or Chinese around the inputs.

A task is data. Its modalities, metrics and baseline follow from the slots of its inputs and of its target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openm6.core.errors import ConfigError, MissingFieldError
from openm6.modalities.interface import Part
from openm6.tasks.prompts import fill_prompt, names_in, without_inputs
from openm6.tasks.slots import Built, Context, Derived, Record, Slot

LANGUAGES = ("en", "zh")
RECALLS = ("recall_at_1", "recall_at_5")
# By the modality of the target.
BASELINES = {
    "text": "frequent_answer",
    "image": "position_frequencies",
    "audio": "position_frequencies",
    "numbers": "column_median",
}


@dataclass(frozen=True)
class Example:
    """A record as an example of a task. `answer` is the truth as metrics expect it; equal answers share a `key`.

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


@dataclass(frozen=True, kw_only=True)
class Task:
    """Inputs by their names in the prompts, a target, and prompts by language.

    A target that depends on the same random decision as some inputs is `Derived` and builds both. Metrics and baseline
    are those of the target unless they are set.
    """

    summary: str
    inputs: dict[str, Slot]
    target: Slot
    prompts: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...] = ()
    baseline: str = ""
    # Its key in the registry.
    name: str = ""
    # The record must come with `others`, fields of other records.
    needs_negatives: bool = False
    # Nothing is answered: the embeddings of inputs and target are aligned (InfoNCE).
    contrastive: bool = False
    # The target is the masked part of the input.
    is_inpainting: bool = False
    # Input modality: that of the first input that is not text, if there is one; and output modality.
    input_modality: str = field(init=False)
    output_modality: str = field(init=False)

    def __post_init__(self) -> None:
        for language, prompts in self.prompts.items():
            for prompt in prompts:
                unknown = names_in(prompt) - set(self.inputs) - {"column"}
                if language not in LANGUAGES or unknown:
                    raise ConfigError(f"prompt {prompt!r} names {unknown or language}, not given")
        modalities = [slot.modality for slot in self.inputs.values() if slot.modality != "text"]
        derived = {
            "input_modality": modalities[0] if modalities else "text",
            "output_modality": self.target.modality,
            "metrics": self.metrics or (RECALLS if self.contrastive else self.target.metrics()),
            "baseline": self.baseline or ("chance" if self.contrastive else BASELINES[self.target.modality]),
        }
        for name, value in derived.items():
            # The dataclass is frozen for its users.
            object.__setattr__(self, name, value)

    def languages(self, record: Record) -> list[str]:
        """Languages in which this record has an example; a spoken record is bound to the language it is spoken in."""
        spoken = (record.get("extra") or {}).get("spoken_language")
        slots = [*self.inputs.values(), self.target]
        return [
            language
            for language in self.prompts
            if all(slot.present(record, language) for slot in slots) and spoken in (None, language)
        ]

    def build(self, record: Record, context: Context) -> Built:
        """The target and all inputs of a record that has what the task needs, each built once."""
        if isinstance(self.target, Derived) and self.target.build is not None:
            built = self.target.build(record, context)
        else:
            built = Built({}, self.target.part(record, context.language))
        inputs = {
            name: built.inputs[name] if name in built.inputs else slot.part(record, context.language)
            for name, slot in self.inputs.items()
        }
        return Built(inputs, built.target, built.key, built.words)

    def example(
        self, record: Record, rng: np.random.Generator, train: bool = False, language: str | None = None
    ) -> Example:
        """The record as an example; the generator draws language, prompt and what the task leaves open.

        Raises:
            MissingFieldError: the record lacks a field that the task needs (in `language`, if one is given).
        """
        languages = [found for found in self.languages(record) if language in (None, found)]
        if not languages:
            raise MissingFieldError(
                f"record {record.get('id')!r} lacks a field that task {self.name} needs: map it or choose another"
            )
        language = languages[int(rng.integers(len(languages)))]
        prompt = self.prompts[language][int(rng.integers(len(self.prompts[language]))) if train else 0]
        built = self.build(record, Context(language, rng, train))
        if self.contrastive:
            # Two records with one English text have the same meaning, in whatever language.
            key = str(record.get("text_en") or record.get("text_zh") or record.get("id"))
        else:
            key = self.target.key(record, language) if built.key is None else built.key
        return Example(
            task=self.name,
            language=language,
            source=fill_prompt(prompt, built.inputs, built.words),
            target=built.target,
            answer=built.target.raw,
            key=key,
            record_id=str(record.get("id", "")),
            prompt=without_inputs(prompt, built.words),
            block=str((record.get("extra") or {}).get("block", "")),
        )
