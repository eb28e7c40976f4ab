"""Answers to questions and other prompts, decoded as one batch, and a note if the model was not trained for one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image

from openm6.core.log import get_log
from openm6.inference.coverage import assess
from openm6.inference.engine import generate_scored, predict_distributions
from openm6.inference.load import LoadedModel
from openm6.inference.masked import decode_masked
from openm6.inference.prefill import Prompt
from openm6.inference.question import Question, prompt_parts
from openm6.inference.sampling import Decoding, MaskedSampling
from openm6.modalities.histogram import Histogram
from openm6.modalities.interface import Part, Segment
from openm6.modalities.registry import source_segments

# Images, audio or rows of numbers decoded side by side.
BATCH = 32

Answer = str | PIL.Image.Image | np.ndarray | Histogram
"""The output of a model: text, an image, 16 kHz samples, or distributions of numbers."""


def answer_questions(loaded: LoadedModel, questions: Sequence[Question], decoding: Decoding) -> list[Answer]:
    """Return the answers to questions, all of which ask for one modality; the one at i draws from seed + i."""
    parts = [prompt_parts(question, loaded) for question in questions]
    asked = zip(questions, parts, strict=True)
    targets = [target_of(question, prompt, loaded) for question, prompt in asked if question.output != "text"]
    return answer_parts(loaded, parts, questions[0].output, targets, decoding)


def answer_parts(
    loaded: LoadedModel, prompts: Sequence[Sequence[Part]], output: str, targets: Sequence[Segment], decoding: Decoding
) -> list[Answer]:
    """As `answer_questions`, of prompts as parts; `targets` are those of `target_of`, none for text."""
    segments = [source_segments(parts, loaded.modalities) for parts in prompts]
    found: list[Answer] = []
    confidences: list[float | None] = [None] * len(prompts)
    if output == "text":
        for index, generated in enumerate(generate_scored(loaded, segments, decoding.text)):
            found.append(generated.text)
            confidences[index] = generated.confidence
    for start in range(0, len(targets), BATCH):
        sampling = decoding.masked.model_copy(update={"seed": decoding.masked.seed + start})
        batch = slice(start, start + BATCH)
        found += decode_targets(loaded, segments[batch], output, list(targets[batch]), sampling)
    notes = [
        assess(parts, output, loaded.description, confidence).en
        for parts, confidence in zip(prompts, confidences, strict=True)
    ]
    for note in dict.fromkeys(filter(None, notes)):
        get_log().warning(note)
    return found


def decode_targets(
    loaded: LoadedModel, prompts: list[Prompt], modality: str, targets: list[Segment], sampling: MaskedSampling
) -> list[Answer]:
    """Return images, audio samples or distributions in answer to prompts, in one batch."""
    if modality == "numbers":
        return list(predict_distributions(loaded.omni, prompts, targets))
    codec = loaded.image if modality == "image" else loaded.audio
    return [codec.decode(codes) for codes in decode_masked(loaded.omni, prompts, targets, sampling).cpu()]


def target_of(question: Question, parts: Sequence[Part], loaded: LoadedModel) -> Segment:
    """Return what is decoded: all codes or those that are masked, a number, or the steps of a forecast."""
    if question.output == "numbers":
        name = question.target_column() if question.series is None else question.series.name
        # A target needs values; these are only asked for.
        value = loaded.numbers.scale(name)[0]
        raw = {name: value} if question.series is None else question.series.to_forecast(question.ahead)
        return loaded.numbers.target(raw, options={"given": loaded.numbers.given(parts)})
    modality = loaded.image if question.output == "image" else loaded.audio
    if question.is_inpainting:
        (masked,) = (part for part in parts if part.modality == question.output)
        return modality.target(masked.raw, options=masked.options)
    return modality.blank()
