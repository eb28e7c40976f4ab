"""Questions about numbers have the answer that the numbers give."""

from __future__ import annotations

import numpy as np

from openm6.modalities.numbers import fit_scale
from openm6.tasks.registry import TASKS
from tests.small_model import demo_sources


def test_the_answer_says_which_side_of_the_bound_the_value_lies() -> None:
    record, seen = demo_sources()["penguins"][7], set()
    for seed in range(40):
        example = TASKS["ask_numbers"].example(record, np.random.default_rng(seed), language="en")
        words = example.source[-1].raw.strip()
        column, bound = words.removeprefix("Is the ").removesuffix("?").split(" above ")
        value = record["numbers"][column.replace(" ", "_")]
        assert (value > float(bound)) == (example.answer == "yes")
        seen.add(example.answer)
    assert seen == {"yes", "no"}


def test_the_step_named_is_the_one_that_was_moved() -> None:
    record, places = demo_sources()["weather"][4], []
    for seed in range(30):
        example = TASKS["find_anomaly"].example(record, np.random.default_rng(seed), language="en")
        shown = next(part.raw for part in example.source if part.modality == "numbers").values
        true = record["series"]["temp_max"]
        moved = [place for place, pair in enumerate(zip(shown, true, strict=True), 1) if pair[0] != pair[1]]
        if example.answer == "none":
            assert moved == []
        else:
            assert [f"step {place}" for place in moved] == [example.answer]
            spread = fit_scale(np.asarray(true, float))[1]
            assert abs(shown[moved[0] - 1] - true[moved[0] - 1]) > 5 * spread
        places += moved
    assert 8 <= len(places) <= 22 and len(set(places)) > 5


def test_a_record_is_left_as_it_was() -> None:
    record = demo_sources()["weather"][4]
    before = list(record["series"]["temp_max"])
    for seed in range(5):
        TASKS["find_anomaly"].example(record, np.random.default_rng(seed))
    assert record["series"]["temp_max"] == before
