"""A task turns a record into an example: inputs, one target, and a prompt in English or Chinese around the inputs.

A task is data. Its modalities, metrics and baseline follow from the slots of its inputs and of its target.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from openm6.core.errors import ConfigError, MissingFieldError, nearest
from openm6.modalities.interface import Part
from openm6.modalities.simple_predictors import fold_of, given_columns
from openm6.modalities.text import join_texts
from openm6.tasks.slots import Built, Context, Derived, Record, Slot

LANGUAGES = ("en", "zh")
_NAME = re.compile(r"\{(\w+)\}")  # of an input, in a prompt
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*")
_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")
RECALLS = ("recall_at_1", "recall_at_5")
# By the modality of the target.
BASELINES = {
    "text": "frequent_answer",
    "image": "position_frequencies",
    "audio": "position_frequencies",
    "numbers": "column_median",
}


def literal_texts(prompt: str) -> list[str]:
    """The texts of a prompt between its names."""
    return [text for text in _NAME.split(prompt)[::2] if text]


def fill_prompt(prompt: str, inputs: Mapping[str, Part], words: Mapping[str, str]) -> list[Part]:
    """The prompt with each `{name}` replaced by its input, if there is one, or words; neighbouring texts become one.

    A text that is too long is cut in its inputs only, never in the words of the prompt.
    """
    parts: list[Part] = []
    left_out = False
    for index, segment in enumerate(_NAME.split(prompt)):
        segment = segment.removeprefix(" ") if left_out else segment
        left_out = index % 2 == 1 and segment not in words and segment not in inputs
        if left_out:
            continue
        if index % 2 == 1 and segment not in words:
            part = inputs[segment]
        elif segment:
            part = Part("text", words[segment] if index % 2 == 1 else segment, {"cuttable": ()})
        else:
            continue
        if part.modality == "text" and parts and parts[-1].modality == "text":
            parts[-1] = join_texts(parts[-1], part)
        else:
            parts.append(part)
    return parts


def without_inputs(prompt: str, words: Mapping[str, str]) -> str:
    """The words of a prompt with its inputs left out; the name of the target column stays."""
    segments = enumerate(_NAME.split(prompt))
    return " ".join("".join(words.get(one, " ") if index % 2 else one for index, one in segments).split())


def words_of(text: str) -> list[str]:
    """Words of Latin letters and digits in lower case, and single Chinese characters."""
    return _WORD.findall(text.lower())


def word_count(parts: Iterable[Part]) -> int:
    return sum(len(words_of(str(part.raw))) for part in parts if part.modality == "text")


@dataclass(frozen=True)
class Example:
    """A record as an example of a task. `answer` is the truth as metrics expect it; equal answers share a `key`.

    A `contrastive` example is a pair of which nothing is answered.

    `prompt` holds the prompt's own words without any input: all that remains when the inputs are dropped. Examples
    of one `block` depend on each other (windows that overlap), so a bootstrap draws them together. `column` is the one
    that a prompt asks for, if it names one.
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
    column: str = ""
    contrastive: bool = False

    def of_source(self, name: str) -> Self:
        """The example with the name of its source, by which the simple predictors of a label are chosen."""
        return replace(self, target=replace(self.target, options={**self.target.options, "source": name}))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Inputs by their names in the prompts, a target, and prompts by language (`en`, `zh`, …).

    A target that depends on the same random decision as some inputs is `Derived` and builds both. Metrics and baseline
    are those of the target unless they are set.
    """

    summary: str
    inputs: dict[str, Slot]
    target: Slot
    prompts: dict[str, tuple[str, ...]]
    metrics: tuple[str, ...] = ()
    baseline: str = ""
    name: str = ""  # its key in the registry
    needs_negatives: bool = False  # the record must come with `others`, fields of other records
    contrastive: bool = False  # nothing is answered: the embeddings of inputs and target are aligned (InfoNCE)
    optional: bool = False  # a record needs one of the inputs; those that it lacks are left out of the prompt
    is_inpainting: bool = False  # the target is the masked part of the input
    chat: bool = False  # the inputs are the turns of a conversation, of any modalities
    # Input modality: that of the first input that is not text, if there is one; and output modality.
    input_modality: str = field(init=False)
    output_modality: str = field(init=False)

    def __post_init__(self) -> None:
        for language, prompts in self.prompts.items():
            for prompt in prompts:
                if not _LANGUAGE.fullmatch(language):
                    raise ConfigError(f"prompts are by language, as en, zh or de; {language!r} is no code of one")
                known = [*self.inputs, "column"]
                unknown = next((name for name in _NAME.findall(prompt) if name not in known), None)
                if unknown is not None:
                    raise ConfigError(
                        f"the prompt {prompt!r} names no input by {{{unknown}}}; {nearest(unknown, known)}"
                    )
        modalities = [slot.modality for slot in self.inputs.values() if slot.modality != "text"]
        derived = {
            # Of a record with whatever it holds, that of its columns.
            "input_modality": "numbers" if self.optional else modalities[0] if modalities else "text",
            "output_modality": self.target.modality,
            "metrics": self.metrics or (RECALLS if self.contrastive else self.target.metrics()),
            "baseline": self.baseline or ("chance" if self.contrastive else BASELINES[self.target.modality]),
        }
        # The dataclass is frozen for its users.
        self.__dict__.update(derived)

    @property
    def may_be_label(self) -> bool:
        """Whether its answers are short texts that are compared as a whole."""
        return self.output_modality == "text" and self.metrics == ("exact_match",) and not self.needs_negatives

    def languages(self, record: Record) -> list[str]:
        """Languages in which this record has an example; a spoken record is bound to the language it is spoken in."""
        spoken = (record.get("extra") or {}).get("spoken_language")
        needed = any if self.optional else all
        return [
            language
            for language in self.prompts
            if self.target.present(record, language)
            and needed(slot.present(record, language) for slot in self.inputs.values())
            and spoken in (None, language)
        ]

    def build(self, record: Record, context: Context) -> Built:
        """The target and all inputs of a record that has what the task needs, each built once."""
        if isinstance(self.target, Derived) and self.target.build is not None:
            built = self.target.build(record, context)
            if built.turns:
                return built
        else:
            built = Built({}, self.target.part(record, context.language))
        inputs = {
            name: built.inputs[name] if name in built.inputs else slot.part(record, context.language)
            for name, slot in self.inputs.items()
            if name in built.inputs
            or not self.optional
            or (slot.present(record, context.language) and not isinstance(slot, Derived))
        }
        target = built.target
        if "column" in target.options or (target.modality == "numbers" and isinstance(target.raw, Mapping)):
            fold = fold_of(record) if context.train else None
            options = {**target.options, "given": given_columns(inputs.values()), "fold": fold}
            target = replace(target, options=options)
        return Built(inputs, target, built.key, built.words)

    def example(
        self, record: Record, rng: np.random.Generator, train: bool = False, language: str | None = None
    ) -> Example:
        """The record as an example, in `language` or any, as the generator draws; MissingFieldError if it has none."""
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
            source=built.turns or fill_prompt(prompt, built.inputs, built.words),
            target=built.target,
            answer=built.target.raw,
            key=key,
            record_id=str(record.get("id", "")),
            prompt=without_inputs(prompt, built.words),
            block=str((record.get("extra") or {}).get("block", "")),
            column=built.words.get("column", ""),
            contrastive=self.contrastive,
        )
