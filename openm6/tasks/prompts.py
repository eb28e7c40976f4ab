"""Prompts: what `{name}` stands for, the words that remain without inputs, and how much text a question holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from openm6.modalities.interface import Part
from openm6.modalities.text import join_texts

_NAME = re.compile(r"\{(\w+)\}")
_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]")


def names_in(prompt: str) -> set[str]:
    """The names that a prompt holds in braces."""
    return set(_NAME.findall(prompt))


def literal_texts(prompt: str) -> list[str]:
    """The texts of a prompt between its names."""
    return [text for text in _NAME.split(prompt)[::2] if text]


def fill_prompt(prompt: str, inputs: Mapping[str, Part], words: Mapping[str, str]) -> list[Part]:
    """The prompt with each `{name}` replaced by its input or words; neighbouring texts become one.

    A text that is too long is cut in its inputs only, never in the words of the prompt.
    """
    parts: list[Part] = []
    for index, segment in enumerate(_NAME.split(prompt)):
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
    return " ".join(_NAME.sub(lambda name: words.get(name[1], " "), prompt).split())


def words_of(text: str) -> list[str]:
    """Words of Latin letters and digits in lower case, and single Chinese characters."""
    return _WORD.findall(text.lower())


def word_count(parts: Iterable[Part]) -> int:
    """Words of all text among the parts."""
    return sum(len(words_of(str(part.raw))) for part in parts if part.modality == "text")
