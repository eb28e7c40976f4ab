"""Answers come in the order of the examples, whatever their number, and holes keep what is around them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openm6.evaluate import answers
from openm6.evaluate.answers import answer
from openm6.inference.sampling import MaskedSampling
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.small_model import demo_sources, loaded

MODEL = loaded(6)
FAST = MaskedSampling(steps=2, guidance=0.0)


def examples(task: str, source: str, count: int) -> list[Example]:
    return [TASKS[task].example(demo_sources("test")[source][n], np.random.default_rng(n)) for n in range(count)]


@pytest.mark.parametrize(("task", "source"), [("image_classification", "digits"), ("tabular_regression", "penguins")])
def test_batches_change_nothing(task: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = examples(task, source, 5)
    together = answer(MODEL, asked, FAST)
    monkeypatch.setattr(answers, "BATCH", 2)
    split = answer(MODEL, asked, FAST)
    assert len(together) == len(split) == 5
    for first, second in zip(together, split, strict=True):
        if isinstance(first, str):
            assert first == second
        else:
            np.testing.assert_allclose(first.median(), second.median(), rtol=1e-4)


def test_a_filled_image_keeps_what_was_given() -> None:
    asked = examples("image_inpainting", "digits", 3)
    for example, found in zip(asked, answer(MODEL, asked, FAST), strict=True):
        tokens = MODEL.image.target(example.target.raw, options=example.target.options)
        true = np.asarray(MODEL.image.decode(torch.from_numpy(tokens.arrays["codes"]))).astype(int)
        filled = np.asarray(found).astype(int)
        down = ~tokens.arrays["is_masked"].reshape(8, 8).repeat(8, 0).repeat(8, 1)
        inside = np.abs(filled - true)[~down].mean()
        assert inside > 3 * np.abs(filled - true)[down].mean() or inside == 0


def test_audio_is_as_long_as_wanted() -> None:
    asked = examples("text_to_speech", "spoken", 2)
    assert [len(found) for found in answer(MODEL, asked, FAST)] == [19_200, 19_200]
