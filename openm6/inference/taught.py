"""Whether a question is of a kind that the model was trained on; if not, what it was trained on.

Four things are looked at, in this order:

- the pair: some trained task must have the same input and output modalities;
- the words: more than half of the fixed words of one of that task's prompts must stand in the text;
- the length: where a task takes any words ("{text}"), the text must be about as long as those that it was trained on;
- the answer: there, too, a text whose tokens have a low mean probability was not learned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from openm6.modalities.interface import Part
from openm6.models.description import CheckpointConfig
from openm6.tasks.prompts import word_count, words_of
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Task

SURE = (
    0.3  # geometric mean probability of an answer's tokens; below it, an answer to free words is not trusted
)
ALIKE = 0.5  # share of a prompt's fixed words that a question must exceed
LENGTHS = 1.25  # how many times longer or shorter than those of training a text may be
LISTED = 4  # kinds of answers that a note names
CHINESE = {"text": "文本", "image": "图片", "audio": "声音", "numbers": "数值"}
_SLOT = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Taught:
    """The result: `en` and `zh` describe what is missing, and are empty if nothing is."""

    en: str = ""
    zh: str = ""

    @property
    def taught(self) -> bool:
        return not self.en

    def said(self, language: str) -> str:
        """The sentence in a language."""
        return self.zh if language == "zh" else self.en


def assess(
    parts: Sequence[Part], target: str, description: CheckpointConfig, confidence: float | None = None
) -> Taught:
    """Check whether the model was trained for a question: its parts, and the modality of the answer.

    `confidence` is the geometric mean probability of the tokens of a text that was answered.
    """
    trained = [TASKS[name] for name in _trained(description)]
    given = {part.modality for part in parts} - {"text"}
    fitting = [task for task in trained if task.output_modality == target and inputs_of(task) == given]
    if not fitting:
        return _other_pair(given, target, trained)
    text = " ".join(str(part.raw) for part in parts if part.modality == "text")
    if any(_resembles(text, prompt) for task in fitting for prompt in _prompts(task)):
        return Taught()
    if any(map(_is_bare, fitting)):
        length = word_count(parts)
        known = [
            x.words for x in description.trained_tasks if TASKS[x.task] in fitting and _is_bare(TASKS[x.task])
        ]
        if not any(words is None or _near(length, words) for words in known):
            return _other_length(length, [words for words in known if words is not None])
        sure = confidence is None or confidence >= SURE
        return Taught() if sure else _unsure(confidence or 0.0)
    return _other_words(fitting)


def confidence_of(nll: float, tokens: int) -> float:
    """Geometric mean probability of tokens whose negative log-likelihoods sum to `nll`; 0 without tokens."""
    return math.exp(-nll / tokens) if tokens else 0.0


def inputs_of(task: Task) -> set[str]:
    """The input modalities of a task besides text."""
    return {slot.modality for slot in task.inputs.values()} - {"text"}


def _trained(description: CheckpointConfig) -> list[str]:
    """Names of the trained tasks that have an answer, each once."""
    names = dict.fromkeys(trained_task.task for trained_task in description.trained_tasks)
    return [name for name in names if name in TASKS and not TASKS[name].contrastive]


def _prompts(task: Task) -> list[str]:
    return [prompt for prompts in task.prompts.values() for prompt in prompts]


def _fixed_words(prompt: str) -> set[str]:
    return _words(_SLOT.sub(" ", prompt))


def _words(text: str) -> set[str]:
    """Words of Latin letters, and single Chinese characters."""
    return set(words_of(text))


def _is_bare(task: Task) -> bool:
    """Whether a prompt of the task has no words of its own."""
    return any(not _fixed_words(prompt) for prompt in _prompts(task))


def _near(length: int, words: tuple[int, int]) -> bool:
    return words[0] / LENGTHS <= length <= words[1] * LENGTHS


def _resembles(text: str, prompt: str) -> bool:
    fixed = _fixed_words(prompt)
    return len(fixed & _words(text)) > ALIKE * len(fixed)


def _other_pair(given: Collection[str], target: str, trained: list[Task]) -> Taught:
    pairs = list(
        dict.fromkeys((tuple(sorted(inputs_of(task))) or ("text",), task.output_modality) for task in trained)
    )
    read = sorted(given) or ["text"]
    more = len(pairs) > LISTED
    en = "; ".join(f"{output} from {' and '.join(inputs)}" for inputs, output in pairs[:LISTED])
    zh = "；".join(f"{_zh(inputs)}→{CHINESE[output]}" for inputs, output in pairs[:LISTED])
    return Taught(
        f"not taught: this model was never trained to give {target} from {' and '.join(read)}, "
        f"only {en or 'embeddings'}{'; …' if more else ''}",
        f"未学过：该模型从未训练过{_zh(read)}→{CHINESE[target]}，只训练过{zh or '向量'}{'；…' if more else ''}",
    )


def _other_words(fitting: list[Task]) -> Taught:
    prompts = {
        language: list(
            dict.fromkeys(task.prompts[language][0] for task in fitting if language in task.prompts)
        )
        for language in ("en", "zh")
    }
    en, zh = (
        ", ".join(f"{_shown(prompt)!r}" for prompt in (prompts[language] or prompts["en"])[:LISTED])
        for language in ("en", "zh")
    )
    return Taught(
        f"not taught: this model was never asked in such words; it was trained on {en}",
        f"未学过：该模型从未见过这样的问法，训练时的问法是 {zh}",
    )


def _other_length(length: int, known: list[tuple[int, int]]) -> Taught:
    min_words, max_words = min(low for low, _ in known), max(high for _, high in known)
    return Taught(
        f"not taught: the question has {length} words, and this model answers texts of {min_words} to "
        f"{max_words} words, which must hold what is asked for",
        f"未学过：问题有{length}个词，该模型只学过回答{min_words}到{max_words}个词的文本，且答案须在文本之中",
    )


def _unsure(confidence: float) -> Taught:
    return Taught(
        f"probably not taught: the model is unsure of every word (mean probability {confidence:.0%}), "
        f"as with questions that are like none in its training data",
        f"可能未学过：模型对答案没有把握（平均概率 {confidence:.0%}），训练数据中没有类似的问题",
    )


def _shown(prompt: str) -> str:
    return _SLOT.sub("…", prompt).strip()


def _zh(modalities: Collection[str]) -> str:
    return "、".join(CHINESE[name] for name in modalities)
