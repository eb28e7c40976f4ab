"""Likelihoods with and without the inputs, and the bound on their difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from openm6.data.prepare import example_sequence, null_example
from openm6.evaluate import likelihood
from openm6.evaluate.likelihood import AnswerFrequencies, TargetPrior, answer_entropy, likelihoods, sequence_nll
from openm6.inference.load import LoadedModel
from openm6.modalities.batch import PackedExample
from openm6.modalities.interface import Part
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.small_model import demo_sources, loaded


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(2)


def real(task: str, source: str, count: int, split: str = "test") -> list[Example]:
    records = demo_sources(split)[source]
    step = len(records) // count
    return [TASKS[task].example(records[n * step], np.random.default_rng(n)) for n in range(count)]


def tokens(model: LoadedModel, examples: list[Example]) -> list[PackedExample]:
    return [example_sequence(example, model.modalities) for example in examples]


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("image_classification", "digits"),
        ("image_inpainting", "digits"),
        ("tabular_regression", "penguins"),
        ("text_to_speech", "spoken"),
    ],
)
def test_likelihoods_against_direct_computation(model: LoadedModel, task: str, source: str) -> None:
    examples = real(task, source, 5)
    found = likelihoods(model, examples, tokens(model, examples), source, TargetPrior())
    assert found.null_predictor == "model without inputs"
    for row, example in enumerate(examples):
        own = sequence_nll(model.omni, tokens(model, [example]))[0] / np.log(2)
        null = sequence_nll(model.omni, tokens(model, [null_example(example, source)]))[0] / np.log(2)
        assert found.bits[row] == pytest.approx(own, rel=1e-5)
        assert found.null_bits[row] == pytest.approx(null, rel=1e-5)
        assert found.gain[row] == pytest.approx(null - own, abs=1e-2)


def test_inputs_that_say_nothing_gain_nothing(model: LoadedModel) -> None:
    """An example that consists of its null input only."""
    examples = [null_example(example, "digits") for example in real("image_classification", "digits", 6)]
    twice = [replace(example, prompt=example.source[0].raw.partition(" ")[2]) for example in examples]
    found = likelihoods(model, twice, tokens(model, twice), "digits", TargetPrior())
    assert np.abs(found.gain).max() < 1e-3


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("image_classification", "digits"),
        ("speech_recognition", "spoken"),
        ("tabular_classification", "penguins"),
    ],
)
def test_an_overconfident_model_gains_no_more_than_the_answers_hold(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, task: str, source: str
) -> None:
    """A model that is right with its inputs and absurdly wrong without them once "gained" 14.9 bits for ten digits."""
    examples = real(task, source, min(100, len(demo_sources("test")[source])))
    prior = AnswerFrequencies(real(task, source, min(400, len(demo_sources()[source])), "train"))
    entropy = answer_entropy(examples, prior)
    assert entropy is not None and 1 < entropy < 3.5

    def certain(_: object, sequences: list[PackedExample]) -> np.ndarray:
        half = len(sequences) // 2
        return np.concatenate([np.full(half, 1e-4), np.full(half, 30.0)])

    monkeypatch.setattr(likelihood, "sequence_nll", certain)
    gain = likelihoods(model, examples, tokens(model, examples), source, prior).gain
    smoothing = 0.02  # the share of an answer that training did not see
    assert gain.mean() <= entropy + smoothing + 2 * gain.std() / len(gain) ** 0.5


def test_a_new_answer_keeps_the_bound_of_the_others(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = real("image_classification", "digits", 40)
    new = np.asarray([one.answer == examples[0].answer for one in examples])
    seen = [one for one in real("image_classification", "digits", 400, "train") if one.answer != examples[0].answer]
    monkeypatch.setattr(likelihood, "sequence_nll", lambda _, sequences: np.full(len(sequences), 30.0))
    found = likelihoods(model, examples, tokens(model, examples), "digits", AnswerFrequencies(seen))
    assert found.null_predictor == "training frequencies" and np.isfinite(found.null_bits).all()
    assert found.null_bits[new].min() > 30 / np.log(2) > 10 > found.null_bits[~new].max()


def test_only_a_closed_set_of_answers_has_an_entropy() -> None:
    def said(answer: str, language: str = "en") -> Example:
        return Example("t", language, [], Part("text", answer), answer, answer)

    known = [said(answer) for answer in "abef"] + [said("c", "zh"), said("d", "zh")]
    prior = AnswerFrequencies(known)
    many = [said("a"), said("b")] * 50
    assert answer_entropy(many, prior) == pytest.approx(1 + 1 / (200 * np.log(2)))
    both = many + [said("c", "zh"), said("d", "zh")] * 50
    assert answer_entropy(both, prior) == pytest.approx(1.0, abs=0.01), "the prompt tells the language"
    assert answer_entropy(both[-2:], prior) == 1.0, "two records of two answers hold one bit at most"
    assert answer_entropy([said("a"), said("new")], prior) is None
    assert answer_entropy([said("a")], TargetPrior()) is None
