"""Test examples answered by the model, whatever their target: text, an image, audio or numbers."""

from __future__ import annotations

from openm6.evaluate.results import Answer
from openm6.inference.engine import generate_texts, predict_distributions
from openm6.inference.load import LoadedModel
from openm6.inference.masked import decode_masked
from openm6.inference.prefill import Prompt
from openm6.inference.sampling import MaskedSampling, Sampling
from openm6.modalities.registry import source_segments, target_segment
from openm6.tasks.task import Example

BATCH = 32  # images, audio or rows of numbers decoded side by side


def answer(loaded: LoadedModel, examples: list[Example], sampling: MaskedSampling) -> list[Answer]:
    """One answer per example; all must have targets of the same modality. Inpainting keeps what is given.

    The prompts of a batch are packed in one row, so an answer depends on its neighbours within rounding.
    """
    prompts = [source_segments(example.source, loaded.modalities) for example in examples]
    if examples and examples[0].target.modality == "text":
        default = loaded.text.max_tokens
        longest = max(int(example.target.options.get("max_tokens", default)) for example in examples)
        return list(generate_texts(loaded, prompts, Sampling(max_tokens=longest)))
    found: list[Answer] = []
    for start in range(0, len(examples), BATCH):
        rows = slice(start, start + BATCH)
        found += _answer_batch(loaded, examples[rows], prompts[rows], sampling)
    return found


def _answer_batch(
    loaded: LoadedModel, examples: list[Example], prompts: list[Prompt], sampling: MaskedSampling
) -> list[Answer]:
    modality = examples[0].target.modality
    if modality == "numbers":
        targets = [target_segment(example.target, loaded.modalities) for example in examples]
        return list(predict_distributions(loaded.omni, prompts, targets))
    codec = loaded.image if modality == "image" else loaded.audio
    targets = [codec.target(example.target.raw, options=example.target.options) for example in examples]
    return [codec.decode(codes) for codes in decode_masked(loaded.omni, prompts, targets, sampling).cpu()]
