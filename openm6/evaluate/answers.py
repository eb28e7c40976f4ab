"""Test examples answered by the model, whatever is wanted: text, a picture, sound or numbers."""

from __future__ import annotations

from typing import Any

import torch

from openm6.evaluate.results import Answer
from openm6.generate.load import Loaded
from openm6.generate.masked import MaskedSampling, fill_codes
from openm6.generate.numbers import predict
from openm6.generate.prompt import Prompt
from openm6.generate.sampling import Sampling
from openm6.generate.text import write
from openm6.modalities.image import Image
from openm6.modalities.interface import Segment
from openm6.modalities.registry import source_segments, target_segment
from openm6.modalities.sound import Sound
from openm6.tasks.task import Example

BATCH = 32


def answer(loaded: Loaded, examples: list[Example], sampling: MaskedSampling) -> list[Answer]:
    """One answer per example; all must want the same modality. Holes keep what is around them."""
    found: list[Answer] = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        prompts = [source_segments(example.source, loaded.modalities) for example in part]
        found.extend(_ANSWERS[part[0].target.modality](loaded, part, prompts, sampling))
    return found


def _texts(
    loaded: Loaded, examples: list[Example], prompts: list[Prompt], sampling: MaskedSampling
) -> list[Answer]:
    longest = max(
        int(example.target.options.get("max_tokens", loaded.text.max_tokens)) for example in examples
    )
    return list(write(loaded, prompts, Sampling(max_tokens=longest)))


def _numbers(
    loaded: Loaded, examples: list[Example], prompts: list[Prompt], sampling: MaskedSampling
) -> list[Answer]:
    wanted = [target_segment(example.target, loaded.modalities) for example in examples]
    return list(predict(loaded.omni, prompts, wanted))


def _pictures(
    loaded: Loaded, examples: list[Example], prompts: list[Prompt], sampling: MaskedSampling
) -> list[Answer]:
    codes = _codes(loaded, loaded.image, examples, prompts, sampling)
    return [loaded.image.decode(row) for row in codes]


def _sounds(
    loaded: Loaded, examples: list[Example], prompts: list[Prompt], sampling: MaskedSampling
) -> list[Answer]:
    codes = _codes(loaded, loaded.sound, examples, prompts, sampling)
    return [loaded.sound.decode(row) for row in codes]


def _codes(
    loaded: Loaded,
    modality: Image | Sound,
    examples: list[Example],
    prompts: list[Prompt],
    sampling: MaskedSampling,
) -> torch.Tensor:
    wanted: list[Segment] = [
        modality.target(example.target.raw, options=example.target.options) for example in examples
    ]
    return fill_codes(loaded.omni, prompts, wanted, sampling).cpu()


_ANSWERS: dict[str, Any] = {"text": _texts, "numbers": _numbers, "image": _pictures, "sound": _sounds}
