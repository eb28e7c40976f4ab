"""Whether a question is of a kind that the model was trained on; if not, what it was trained on.

Checked in this order:

- the modalities: some trained task must have the same inputs and output;
- the words: more than half of the fixed words of one of that task's prompts must stand in the text;
- the length: if a task takes free text ("{text}"), the text must be about as long as those of training;
- the confidence: there, too, an answer whose tokens have a low mean probability is not trusted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from openm6.modalities.interface import Part
from openm6.models.description import CheckpointConfig
from openm6.tasks.registry import all_tasks
from openm6.tasks.task import Task, word_count, words_of

# Geometric mean probability of an answer's tokens; below it, an answer to free text is not trusted.
MIN_CONFIDENCE = 0.3
# The fraction of a prompt's fixed words that a question must exceed.
MIN_OVERLAP = 0.5
# How many times longer or shorter than those of training a text may be.
LENGTH_RATIO = 1.25
# Tasks or prompts that a message lists.
MAX_LISTED = 4
CHINESE = {"text": "文本", "image": "图片", "audio": "声音", "numbers": "数值"}
_SLOT = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Coverage:
    """The result: `en` and `zh` describe what is missing, and are empty if nothing is."""

    en: str = ""
    zh: str = ""

    @property
    def trained(self) -> bool:
        return not self.en

    def message(self, language: str) -> str:
        return self.zh if language == "zh" else self.en


def assess(
    parts: Sequence[Part], target: str, description: CheckpointConfig, confidence: float | None = None
) -> Coverage:
    """Check whether the model was trained for a question: its parts, and the modality of the answer.

    `confidence` is the geometric mean probability of the tokens of a text that was answered.
    """
    if description.base_model and target == "text" and all(part.modality == "text" for part in parts):
        return Coverage()
    names = dict.fromkeys(component.task for component in description.trained_tasks)
    known = all_tasks(description.tasks)
    trained = [known[name] for name in names if name in known and not known[name].contrastive]
    given = {part.modality for part in parts} - {"text"}
    seen: dict[str, set[str]] = {name: set() for name in names}
    for component in description.trained_tasks:
        seen[component.task].update(component.modalities)
    fitting = [
        task for task in trained
        if task.output_modality == target
        and (given <= inputs_of(task) | seen[task.name] if task.optional or task.chat else given == inputs_of(task))
    ]  # fmt: skip
    if not fitting:
        return _other_modalities(given, target, trained)
    words = set(words_of(" ".join(str(part.raw) for part in parts if part.modality == "text")))
    if any(len(fixed & words) > MIN_OVERLAP * len(fixed) for task in fitting for fixed in _fixed_words(task)):
        return Coverage()
    free_text = [task.name for task in fitting if not all(_fixed_words(task))]
    if not free_text:
        return _other_words(fitting)
    length = word_count(parts)
    ranges = [component.words for component in description.trained_tasks if component.task in free_text]
    recorded = [found for found in ranges if found is not None]
    # A task whose lengths were not recorded takes any.
    if len(recorded) == len(ranges) and not any(
        low / LENGTH_RATIO <= length <= high * LENGTH_RATIO for low, high in recorded
    ):
        shortest, longest = min(low for low, _ in recorded), max(high for _, high in recorded)
        return Coverage(
            f"not trained: the question has {length} words, and this model answers texts of {shortest} to "
            f"{longest} words, which must contain the answer",
            f"未学过：问题有{length}个词，该模型只学过回答{shortest}到{longest}个词的文本，且答案须在文本之中",
        )
    if confidence is None or confidence >= MIN_CONFIDENCE:
        return Coverage()
    return Coverage(
        f"probably not trained: the confidence in the answer is low (mean probability {confidence:.0%}), "
        f"as for questions unlike any in the training data",
        f"可能未学过：模型对答案没有把握（平均概率 {confidence:.0%}），训练数据中没有类似的问题",
    )


def confidence_of(nll: float, tokens: int) -> float:
    """Geometric mean probability of tokens whose negative log-likelihoods sum to `nll`; 0 without tokens."""
    return math.exp(-nll / tokens) if tokens else 0.0


def inputs_of(task: Task) -> set[str]:
    """The input modalities of a task besides text."""
    return {slot.modality for slot in task.inputs.values()} - {"text"}


def _fixed_words(task: Task) -> list[set[str]]:
    """The words of each prompt of a task without its inputs; none if the prompt is an input alone."""
    return [set(words_of(_SLOT.sub(" ", prompt))) for prompts in task.prompts.values() for prompt in prompts]


def _other_modalities(given: Collection[str], target: str, trained: list[Task]) -> Coverage:
    pairs = list(dict.fromkeys((tuple(sorted(inputs_of(task))) or ("text",), task.output_modality) for task in trained))
    inputs = sorted(given) or ["text"]
    en = "; ".join(f"{output} from {' and '.join(names)}" for names, output in pairs[:MAX_LISTED])
    zh = "；".join(f"{_zh(names)}→{CHINESE[output]}" for names, output in pairs[:MAX_LISTED])
    more = ("; …", "；…") if len(pairs) > MAX_LISTED else ("", "")
    return Coverage(
        f"not trained: this model was never trained to generate {target} from {' and '.join(inputs)}, "
        f"only {en or 'embeddings'}{more[0]}",
        f"未学过：该模型从未训练过{_zh(inputs)}→{CHINESE[target]}，只训练过{zh or '向量'}{more[1]}",
    )


def _other_words(fitting: list[Task]) -> Coverage:
    listed = {}
    for language in ("en", "zh"):
        prompts = [task.prompts[language][0] for task in fitting if language in task.prompts]
        shown = dict.fromkeys(prompts or [next(iter(task.prompts.values()))[0] for task in fitting])
        listed[language] = ", ".join(repr(_SLOT.sub("…", prompt).strip()) for prompt in list(shown)[:MAX_LISTED])
    return Coverage(
        f"not trained: no prompt of this model has such words; it was trained on {listed['en']}",
        f"未学过：该模型从未见过这样的问法，训练时的问法是 {listed['zh']}",
    )


def _zh(modalities: Collection[str]) -> str:
    return "、".join(CHINESE[name] for name in modalities)
