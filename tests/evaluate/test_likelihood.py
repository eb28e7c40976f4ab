"""Likelihoods, strangers, and the bootstrap."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openm6.data.prepare import example_sequence
from openm6.evaluate.likelihood import (
    STRANGERS,
    all_hidden,
    bootstrap_interval,
    gained_bits,
    sequence_nats,
    strangers,
)
from openm6.generate.load import Loaded
from openm6.modalities.interface import Part
from openm6.tasks.registry import TASKS
from openm6.tasks.task import Example
from tests.small_model import demo_sources, loaded


def example(key: str, language: str = "en") -> Example:
    return Example("t", language, [Part("text", f"it is {key}")], Part("text", key), key, key)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["en", "zh"])), min_size=1, max_size=12))
def test_strangers_differ_in_answer_and_share_the_language(pairs: list[tuple[str, str]]) -> None:
    examples = [example(*pair) for pair in pairs]
    for own, found in zip(examples, strangers(examples, most=3), strict=True):
        fitting = sum(e.language == own.language and e.key != own.key for e in examples)
        assert len(found) == len(set(found)) == min(3, fitting)
        assert all(examples[o].language == own.language and examples[o].key != own.key for o in found)


def test_strangers_are_spread() -> None:
    examples = [example(str(n)) for n in range(10)]
    first = {others[0] for others in strangers(examples)}
    assert len(first) == 10, "each record is a stranger to one other"


def test_two_are_strangers_to_each_other() -> None:
    assert strangers([example("a"), example("b")], most=3) == [[1], [0]]
    assert strangers([example("a")]) == [[]]


@pytest.mark.parametrize("count", [8, 40])
def test_the_bootstrap_interval_covers_the_true_mean(count: int) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.exponential(2.0, count), trial)
        assert low < high
        covered += low <= 2.0 <= high
    assert 0.8 <= covered / 200 <= 0.99


def test_the_bootstrap_interval_of_little() -> None:
    assert bootstrap_interval(np.array([3.0]), 0) == (3.0, 3.0)
    assert all(np.isnan(end) for end in bootstrap_interval(np.zeros(0), 0))
    assert bootstrap_interval(np.arange(9.0), 4) == bootstrap_interval(np.arange(9.0), 4)


@pytest.fixture(scope="module")
def model() -> Loaded:
    return loaded(2)


def real(task: str, source: str, count: int) -> list[Example]:
    records = demo_sources("test")[source]
    step = len(records) // count
    return [TASKS[task].example(records[n * step], np.random.default_rng(n)) for n in range(count)]


@pytest.mark.parametrize(
    ("task", "source"),
    [
        ("name_picture", "digits"),
        ("fill_picture", "digits"),
        ("predict_number", "penguins"),
        ("speak", "spoken"),
    ],
)
def test_gained_bits_against_direct_computation(model: Loaded, task: str, source: str) -> None:
    examples = real(task, source, 5)
    nats, bits = gained_bits(model, examples)
    others = strangers(examples, STRANGERS)
    index = 0
    for row, found in enumerate(examples):
        hidden = replace(found, target=all_hidden(found.target))
        own = sequence_nats(model.omni, [example_sequence(hidden, model.modalities)])[0]
        assert nats[row] == pytest.approx(own, rel=1e-5)
        swapped = [
            example_sequence(hidden, model.modalities, source=examples[other].source) for other in others[row]
        ]
        if swapped:
            lost = [sequence_nats(model.omni, [one])[0] - own for one in swapped]
            assert bits[index] == pytest.approx(np.mean(lost) / np.log(2), abs=1e-2)
            index += 1
    assert len(bits) == index > 0


def test_a_source_that_is_the_same_gains_nothing(model: Loaded) -> None:
    examples = [replace(found, source=[Part("text", "same")]) for found in real("name_picture", "digits", 6)]
    assert np.abs(gained_bits(model, examples)[1]).max() < 1e-3


def test_all_hidden_leaves_other_options() -> None:
    part = Part("sound", b"x", {"gap": (0.1, 0.2), "hole": (0, 0, 1, 1), "seconds": 1.2})
    assert all_hidden(part) == Part("sound", b"x", {"seconds": 1.2})
