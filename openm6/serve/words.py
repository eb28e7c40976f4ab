"""The words in which a model was taught to be asked: routes that name a task put the client's text into them."""

from __future__ import annotations

import re

from openm6.inference.load import LoadedModel
from openm6.modalities.interface import Part
from openm6.tasks.registry import TASKS

_SLOT = re.compile(r"\{\w+\}")
_CHINESE = re.compile(r"[\u3400-\u9fff]")


def language_of(text: str) -> str:
    """`zh` if it holds a Chinese character, else `en`."""
    return "zh" if _CHINESE.search(text) else "en"


def taught(loaded: LoadedModel, task: str) -> bool:
    """Whether the model was trained on a task."""
    return any(lesson.task == task for lesson in loaded.description.lessons)


def text_in_words(task: str, text: str) -> tuple[Part, ...]:
    """A text in the first prompt of a task; one that is already worded so stays as it is."""
    prompts = TASKS[task].prompts[language_of(text)]
    for prompt in prompts:
        before, after = _SLOT.split(prompt, maxsplit=1)
        if before and text.startswith(before) and text.endswith(after):
            return (Part("text", text),)
    before, after = _SLOT.split(prompts[0], maxsplit=1)
    return (Part("text", before + text + after),)


def part_in_words(task: str, part: Part, language: str = "en", column: str = "") -> tuple[Part, ...]:
    """A picture, sound or numbers in the first prompt of a task."""
    prompt = TASKS[task].prompts[language][0].replace("{column}", column.replace("_", " "))
    before, after = _SLOT.split(prompt, maxsplit=1)
    parts = [Part("text", before), part, Part("text", after)]
    return tuple(piece for piece in parts if piece is part or piece.raw)
